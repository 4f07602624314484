"""Scores the labels of one input: the working where there is one, then one token at each place where labels part."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mtlora_pb.v1 import inference_pb2 as pb

from mtlora.answer.constraint import next_token
from mtlora.answer.labels import LabelTree
from mtlora.prompt import PromptEncoder
from server.call import Call
from server.errors import Violation, invalid_argument
from server.job import GenerationJob, ServedTask, TokenLogprobs
from server.rpc.batch import Expand, TextItem
from server.rpc.generation import Generation
from server.rpc.pictures import Picture

if TYPE_CHECKING:
    from server.rpc.inference_service import TextBackend

# Most inputs of one call.
MAX_SCORED = 256


class Scoring(Generation):
    """A Generation whose answer is constrained to the labels; afterwards also holds their probabilities.

    probabilities: (label, probability) of every label, likeliest first.
    """

    probabilities: Sequence[tuple[str, float]] = ()
    _prompts: PromptEncoder
    _max_model_len: int
    _calibrated: bool

    @classmethod
    def of(cls, generation: Generation, prompts: PromptEncoder, max_model_len: int, *, calibrated: bool) -> "Scoring":
        """Make the scoring for a job. calibrated: apply the task's temperature."""
        job, task = generation.job, generation.job.task.spec
        # Stop at the marker, which ends the working; the type allows it as a stop string. An answer without working
        # ends by itself.
        stop = (*task.stop, task.answer_marker) if task.answer_marker else task.stop
        sampling = replace(job.sampling, temperature=0.0, stop=stop, stops_occur=True, logprobs=0, more=None)
        made = cls(replace(job, sampling=sampling, n=1, best_of=1), generation.call, generation.metrics)
        made._prompts, made._max_model_len, made._calibrated = prompts, max_model_len, calibrated
        return made

    async def _run(self, *services: Any) -> None:
        """See Generation._run. Each sequence waits for its own turn; `run` counts all of them as one request."""
        task, worked = self.job.task, self.marker is not None
        prompt_ids = self.job.prompt_ids
        if worked:
            await super()._run(*services)
            # Without the marker, which was cut off, the text was treated as answer: correct that.
            if self.token_ids[-1] != self._prompts.tokenizer.eos_token_id:
                self.reasoning = self.text
                prompt_ids += tuple(self._prompts.text(f" {self.text.strip()} {self.marker}"))
            self.text = ""
        tree = _tree(self._prompts, task.spec.labels or ())
        if (longest := len(prompt_ids) + max(len(ids) for ids, _ in tree.branches)) >= self._max_model_len:
            given = f"found {longest} tokens with the working and the beginning of a label"
            raise invalid_argument([Violation("input", f"{given}; allowed: 1 to {self._max_model_len - 1}")])
        branches = [
            Generation(self._job(prompt_ids + ids, after, further=worked or i > 0), self.call, self.metrics)
            for i, (ids, after) in enumerate(tree.branches)
        ]
        try:
            async with asyncio.TaskGroup() as running:
                for branch in branches:
                    running.create_task(branch._run(*services))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        logprobs = [_of_tokens(branch.logprobs[0]) for branch in branches]
        found = tree.probabilities(logprobs, (self._calibrated and task.calibration) or 1.0)
        self.probabilities = sorted(found.items(), key=lambda each: -each[1])
        self.text = self.probabilities[0][0]
        self.finish_reason = "stop"
        self.completion_tokens += sum(branch.completion_tokens for branch in branches)
        self.total_s = max(branch.total_s for branch in branches)
        if not worked:
            # The sequence that usage counts: its prompt includes the labels' common prefix.
            first = branches[0]
            self.job, self.cached_tokens = first.job, first.cached_tokens
            self.queue_s, self.ttft_s = first.queue_s, first.ttft_s

    def _job(self, prompt_ids: tuple[int, ...], tokens: Sequence[int], *, further: bool) -> GenerationJob:
        constraint = next_token(tokens)
        sampling = replace(self.job.sampling, max_new_tokens=1, stop=(), logprobs=len(tokens), constraint=constraint)
        return replace(self.job, prompt_ids=prompt_ids, sampling=sampling, further=further)


def scoring(backend: "TextBackend", *, calibrated: bool) -> Expand[Generation]:
    """The function that makes an item's scoring of its task's labels. calibrated: apply the task's temperature."""
    prompts, max_model_len = backend.engine.prompts, backend.limits.max_model_len
    return lambda first: [Scoring.of(first, prompts, max_model_len, calibrated=calibrated)]


def scored_pictures(request: pb.ScoreRequest, task: ServedTask) -> list[tuple[ServedTask, Picture]]:
    """The inputs of an image task. Raises INVALID_ARGUMENT."""
    _check_inputs(request, "image")
    return [
        (task, Picture(each.image, f"inputs[{i}].image", each.routing_key)) for i, each in enumerate(request.inputs)
    ]


def scored_items(request: pb.ScoreRequest, task: ServedTask, call: Call) -> list[TextItem]:
    """An item per input; each counts as its own call in usage, metrics and log. Raises INVALID_ARGUMENT."""
    if task.spec.picture is not None:
        allowed = "tasks of texts, or of images (Generate asks this one)"
        found = f"task {task.spec.id} takes text and an image; allowed: {allowed}"
        raise invalid_argument([Violation("task_id", found)])
    if task.spec.labels is None:
        kind = task.spec.answer_type.type if task.spec.answer_type else "text"
        found = f"task {task.spec.id} answers with a {kind}; allowed: a task of labels"
        raise invalid_argument([Violation("task_id", found)])
    _check_inputs(request, "text", "chat", "fields")
    items = []
    for index, each in enumerate(request.inputs):
        one = pb.GenerateRequest(task_id=request.task_id, routing_key=each.routing_key)
        if given := each.WhichOneof("input"):
            one.MergeFrom(pb.GenerateRequest(**{given: getattr(each, given)}))
        items.append(TextItem(one, task, call.item(index, "ScoreItem"), 1, index))
    return items


def _check_inputs(request: pb.ScoreRequest, *allowed: str) -> None:
    """Raise INVALID_ARGUMENT for too many inputs, or for a kind that the task does not take."""
    if not 1 <= len(request.inputs) <= MAX_SCORED:
        raise invalid_argument([Violation("inputs", f"found {len(request.inputs)}; allowed: 1 to {MAX_SCORED}")])
    for index, each in enumerate(request.inputs):
        # An input of no kind fails later, with its own status.
        if (found := each.WhichOneof("input")) not in (None, *allowed):
            raise invalid_argument([Violation(f"inputs[{index}]", f"found {found}; allowed: {', '.join(allowed)}")])


def _of_tokens(found: TokenLogprobs) -> dict[int, float]:
    return {each.token_id: each.logprob for each in (found.chosen, *found.top)}


@lru_cache(maxsize=1024)
def _tree(prompts: PromptEncoder, labels: tuple[str, ...]) -> LabelTree:
    return LabelTree({label: prompts.answer(label) for label in labels})
