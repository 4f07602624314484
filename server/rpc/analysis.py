"""Calls about one document: each task is an item of a batch, and all items share the document's part of the prompt."""

from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

from mtlora_pb.v1 import inference_pb2 as pb

from server.call import current_call
from server.errors import Violation, invalid_argument
from server.rpc.batch import TOKENIZE_APART_BYTES, Expand, TextItem, samples, text_items
from server.rpc.documents import Document, Documents
from server.rpc.generation import Generation
from server.rpc.validation import sharing_violation
from server.scheduling.fair_thread import FairThread

if TYPE_CHECKING:
    from server.rpc.inference_service import InferenceServicer


@dataclass
class DocumentCall:
    """A call about a document. text: the document to encode; empty if the call names a `known` document.

    document: set inside `Analysis.document_of`.
    """

    items: list[TextItem]
    template: str
    text: str = ""
    known: Document | None = None
    document: Document = field(init=False)


class Analysis:
    """Makes items of tasks about a document, and keeps the document for later calls."""

    def __init__(self, service: "InferenceServicer", tokenizing: FairThread, documents: Documents) -> None:
        self._service = service
        self._tokenizing = tokenizing
        self._documents = documents

    def asked(self, request: pb.AnalyzeRequest) -> DocumentCall:
        """The items of a call, one per task. Raises INVALID_ARGUMENT or NOT_FOUND."""
        source = request.WhichOneof("source")
        if source is None or (source == "document" and not request.document.strip()):
            found = "none" if source is None else "only blanks"
            raise invalid_argument([Violation("document", f"found {found}; allowed: a text, or a document_id")])
        items = text_items(self._service.find, [_request(each) for each in request.tasks], "tasks", "AnalyzeTask")
        known = self._documents.get(current_call.get().tenant, request.document_id) if source != "document" else None
        tasks = [item.task for item in items if item.task is not None]
        template = known.template if known else next((each.spec.document_template or "" for each in tasks), "")
        violations = [
            Violation(f"tasks[{item.index}].task_id", reason)
            for item in items
            if item.task is not None and (reason := sharing_violation(item.task, template))
        ]
        if violations:
            raise invalid_argument(violations)
        if not tasks:
            raise self._service.not_found(items[0].request.task_id)
        return DocumentCall(items, template, request.document, known)

    @asynccontextmanager
    async def document_of(self, asked: DocumentCall) -> AsyncIterator[None]:
        """Set the document of a call and of its items. Encoding may wait: the call already has its places.

        Raises INVALID_ARGUMENT.
        """
        with ExitStack() as held:
            for version in {item.task.version for item in asked.items if item.task and item.task.version}:
                held.enter_context(self._service.backend.residency.hold(version))
            asked.document = document = asked.known or await self._encoded(asked.text, asked.template)
            for item in asked.items:
                item.document = document
                item.request.routing_key = item.request.routing_key or document.id
            yield

    async def _encoded(self, text: str, template: str) -> Document:
        """Encode and keep a document of the current call. Raises INVALID_ARGUMENT if it leaves no room for a task."""
        tenant, prompts = current_call.get().tenant, self._service.backend.engine.prompts
        context = self._service.backend.limits.max_model_len
        longest, rendered = context - 2, template.format(document=text)
        if (found := prompts.fewest_tokens(rendered)) <= longest:
            encode = partial(prompts.prompt, rendered)
            apart = len(rendered) > TOKENIZE_APART_BYTES
            ids = await self._tokenizing.run(tenant, len(rendered), encode) if apart else encode()
            if (found := len(ids)) <= longest:
                return self._documents.keep(tenant, template, ids)
        allowed = f"up to {longest}, which leaves room for a task and its answer in {context}"
        raise invalid_argument([Violation("document", f"found {found} tokens or more; allowed: {allowed}")])


def _request(task: pb.DocumentTask) -> pb.GenerateRequest:
    """The GenerateRequest of a document's task, without the document."""
    request = pb.GenerateRequest(
        task_id=task.task_id,
        parameters=task.parameters,
        fields=task.fields,
        include_reasoning=task.include_reasoning,
        routing_key=task.routing_key,
        free=task.free,
    )
    if task.HasField("answer"):
        request.answer.CopyFrom(task.answer)
    return request


def led(asked: DocumentCall) -> Expand[Generation]:
    """The first sequence of a call computes the document; the others are charged for their own part."""
    leads = True

    def expand(first: Generation) -> list[Generation]:
        nonlocal leads
        made = samples(first)
        for each in made[leads:]:
            each.job = replace(each.job, shared=len(asked.document.ids))
        leads = False
        return made

    return expand
