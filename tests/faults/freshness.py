"""Time from a new version's files, copied into place, to its first answer."""

import shutil
import time

from tests.faults._load import questions
from tests.faults._server import shared
from tests.faults.scenario import Options, Row

ORDER = 11
MAX_S = 2.0


def run(options: Options) -> Row:
    """A client asks until an answer names the new version."""
    target = shared(options)
    seconds = []
    with target.server.client() as client:
        (question,) = questions(client, 1, options.seed)
        for _ in range(20 if options.full else 5):
            version, content = target.next_version()
            shutil.copytree(content, target.root / target.name / version)
            began = time.monotonic()
            while time.monotonic() < began + 30:
                answer = client.generate(question.task_id, question.text, max_new_tokens=1, free=True)
                if answer.summary.adapter_version == version:
                    break
            seconds.append(time.monotonic() - began)
            target.forget_below(target.version - 3)
    size = sum(file.stat().st_size for file in content.iterdir()) / 1e6
    return Row(
        "files in place to first answer",
        f"at most {MAX_S:g} s",
        f"{max(seconds):.2f} s, the slowest of {len(seconds)}; adapter of {size:.1f} MB",
        met=max(seconds) <= MAX_S,
    )
