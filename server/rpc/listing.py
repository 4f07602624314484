"""Pages of a list: the requested page, and the token of the next one."""

import base64
import binascii

from mtlora_pb.v1 import inference_pb2 as pb

from server.errors import Violation

MAX_PAGE_SIZE = 1000


def page_of(request: pb.ListTasksRequest) -> tuple[list[Violation], int, str]:
    """(violations, number of tasks on the page, id after which the page begins)."""
    violations, after = [], ""
    if request.page_size > MAX_PAGE_SIZE:
        violations.append(Violation("page_size", f"found {request.page_size}; allowed: 0 to {MAX_PAGE_SIZE}"))
    try:
        after = base64.b64decode(request.page_token.encode("ascii"), b"-_", validate=True).decode()
    except (UnicodeError, binascii.Error):
        reason = "found no page token of this server; allowed: next_page_token of a reply"
        violations.append(Violation("page_token", reason))
    return violations, request.page_size or MAX_PAGE_SIZE, after


def page_token(last: str) -> str:
    """The token of the page that follows this id."""
    return base64.urlsafe_b64encode(last.encode()).decode()
