"""Accuracy by exact match, per task and overall, of anything that answers."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from mtlora.checkpoint.format import TaskEntry
from mtlora.errors import MtLoRAError
from mtlora.evaluation.batches import cut
from mtlora.evaluation.calibration import Labeller
from mtlora.evaluation.generate import Prompt, greedy_answers
from mtlora.evaluation.likelihood import label_probabilities, likeliest, options_of
from mtlora.model.language import AdaptedModel, Placed
from mtlora.suite.base import Example, Suite, SuiteError, up_to
from mtlora.task import PromptParts, TaskSpec, is_correct, normalise_answer

if TYPE_CHECKING:
    from mtlora.client import Access

# Gives an answer to each example, in order.
Answerer = Callable[[Sequence[Example]], list[str]]
# Gives the prompt of one example of a task.
PromptOf = Callable[[TaskSpec, Example], PromptParts]

# A task counts as learned this far above the accuracy of always giving the most frequent answer.
FLOOR_MARGIN = 0.10
# Requests to a server at a time.
_CONCURRENCY = 32


class PromptError(MtLoRAError):
    """A prompt that the backbone cannot take."""


@dataclass(frozen=True)
class TaskScore:
    """One task's examples, its right answers, and how many its most frequent target would get right."""

    task_id: str
    total: int
    correct: int
    majority: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.correct / self.total

    @property
    def floor(self) -> float:
        """The least accuracy of a learned task: that of the most frequent target, plus a margin."""
        return self.majority / self.total + FLOOR_MARGIN


@dataclass(frozen=True)
class Scores:
    """Scores of one answerer over a set of tasks."""

    tasks: tuple[TaskScore, ...]

    @property
    def mean(self) -> float:
        """Mean of the tasks' accuracies: every task counts the same."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)

    @property
    def below_floor(self) -> tuple[TaskScore, ...]:
        """The tasks that do not reach their floor."""
        return tuple(task for task in self.tasks if task.accuracy < task.floor - 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """JSON form: mean, and per task its counts and accuracy."""
        return {
            "mean_accuracy": round(self.mean, 4),
            "tasks": {
                score.task_id: {
                    **{k: v for k, v in asdict(score).items() if k != "task_id"},
                    "accuracy": round(score.accuracy, 4),
                }
                for score in self.tasks
            },
        }


def score(examples: Sequence[Example], answers: Sequence[str]) -> Scores:
    """Exact match of answers against their examples' targets, tasks in order of first appearance."""
    by_task: dict[str, list[tuple[Example, str]]] = {}
    for example, answer in zip(examples, answers, strict=True):
        by_task.setdefault(example.task_id, []).append((example, answer))
    return Scores(
        tuple(
            TaskScore(
                task_id,
                len(pairs),
                sum(is_correct(answer, example.target) for example, answer in pairs),
                Counter(normalise_answer(example.target) for example, _ in pairs).most_common(1)[0][1],
            )
            for task_id, pairs in by_task.items()
        )
    )


def plain_prompt(task: TaskSpec, example: Example) -> PromptParts:
    """The task's own prompt: zero shots."""
    return task.parts(example.input)


def few_shot_prompt(suite: Suite, shots: int, seed: int = 0) -> PromptOf:
    """Prompts that begin with `shots` solved examples of the same task from the suite's training split.

    The shots are the same for every input of a task, but never hold the input itself. A prompt raises SuiteError if the
    split has fewer examples.
    """
    drawn: dict[str, list[Example]] = {}

    def prompt(task: TaskSpec, example: Example) -> PromptParts:
        if task.id not in drawn:
            # Draw one more, in case the input is among them.
            drawn[task.id] = up_to(suite, task.id, "train", shots + 1, seed)
        others = [shot for shot in drawn[task.id] if shot.input != example.input][:shots]
        if len(others) < shots:
            raise SuiteError(
                f"task {task.id} has {len(others)} training examples for its shots; {shots} were asked for"
            )
        parts = [f"{task.render(shot.input)} {shot.target}" for shot in others]
        return PromptParts("", "\n\n".join([*parts, task.render(example.input)]))

    return prompt


def offline_answerer(
    adapted: AdaptedModel,
    tasks: Sequence[TaskEntry],
    *,
    with_adapter: bool = True,
    prompt_of: PromptOf = plain_prompt,
    batch_size: int = 32,
    batch_tokens: int = 8192,
) -> Answerer:
    """Answers from the Hugging Face model in this process, in batches of like length.

    A batch has at most `batch_size` prompts and, padded, `batch_tokens` prompt tokens, but at least one prompt.
    """
    by_id = {task.id: task for task in tasks}

    def answer(examples: Sequence[Example]) -> list[str]:
        prompts = _encode(adapted, by_id, examples, prompt_of, with_images=with_adapter)
        lengths = [len(prompt.ids) for prompt in prompts]

        def shortest_first(i: int) -> tuple[object, ...]:
            """Shortest answers, then shortest prompts; with an activated adapter, a document's prompts together."""
            n = prompts[i].document_length if adapted.activated else 0
            return n, prompts[i].ids[:n], by_id[examples[i].task_id].max_new_tokens, lengths[i]

        order = sorted(range(len(examples)), key=shortest_first)
        answers = [""] * len(examples)
        with _bar(len(examples), "answer", with_adapter) as bar:
            for rows in cut(order, lengths, batch_size, batch_tokens):
                batch_tasks = [by_id[examples[i].task_id] for i in rows]
                found = greedy_answers(adapted, batch_tasks, [prompts[i] for i in rows], with_adapter=with_adapter)
                for i, text in zip(rows, found, strict=True):
                    answers[i] = text
                bar.update(len(rows))
        return answers

    return answer


def likelihood_answerer(
    adapted: AdaptedModel,
    tasks: Sequence[TaskEntry],
    *,
    with_adapter: bool = True,
    prompt_of: PromptOf = plain_prompt,
) -> Answerer:
    """Like `offline_answerer`, but the likeliest option answers a multiple choice."""
    by_id = {task.id: task for task in tasks}
    generate = offline_answerer(adapted, tasks, with_adapter=with_adapter, prompt_of=prompt_of)

    def answer(examples: Sequence[Example]) -> list[str]:
        options = [options_of(by_id[example.task_id], example.input) for example in examples]
        open_ended = [i for i in range(len(examples)) if not options[i]]
        generated = generate([examples[i] for i in open_ended]) if open_ended else []
        answers = [""] * len(examples)
        for i, text in zip(open_ended, generated, strict=True):
            answers[i] = text
        prompts = _encode(adapted, by_id, examples, prompt_of, with_images=with_adapter)
        with _bar(len(examples) - len(open_ended), "choose", with_adapter) as bar:
            for i, example in enumerate(examples):
                if options[i]:
                    task = by_id[example.task_id]
                    answers[i] = likeliest(adapted, task, prompts[i], options[i], with_adapter=with_adapter)
                    bar.update()
        return answers

    return answer


def with_other_images(answerer: Answerer) -> Answerer:
    """Answers about the image of the task's next example: how far the texts alone lead."""

    def answer(examples: Sequence[Example]) -> list[str]:
        images: dict[str, list[Any]] = {}
        for example in examples:
            images.setdefault(example.task_id, []).append(example.image)
        rotated = {task_id: iter([*found[1:], found[0]]) for task_id, found in images.items()}
        return answerer([replace(example, image=next(rotated[example.task_id])) for example in examples])

    return answer


def offline_labeller(adapted: AdaptedModel, tasks: Sequence[TaskEntry]) -> Labeller:
    """Probabilities of labels from the Hugging Face model in this process."""
    by_id = {task.id: task for task in tasks}

    def label(examples: Sequence[Example]) -> list[Mapping[str, float]]:
        prompts = _encode(adapted, by_id, examples, plain_prompt)
        with _bar(len(examples), "score", True) as bar:
            found: list[Mapping[str, float]] = []
            for example, prompt in zip(examples, prompts, strict=True):
                found.append(label_probabilities(adapted, by_id[example.task_id], prompt))
                bar.update()
        return found

    return label


def _encode(
    adapted: AdaptedModel,
    by_id: Mapping[str, TaskEntry],
    examples: Sequence[Example],
    prompt_of: PromptOf,
    *,
    with_images: bool = True,
) -> list[Prompt]:
    """Token ids of every prompt. Raises PromptError for a prompt that leaves no room to answer.

    The backbone alone cannot see: its prompts have no images.
    """
    room: int = adapted.model.config.max_position_embeddings
    prompts = []
    keys: Sequence[str | None] = [None] * len(examples)
    if with_images and any(by_id[example.task_id].picture for example in examples):
        if adapted.reader is None:
            raise PromptError("tasks take images: found no vision backbone; one is needed")
        keys = adapted.reader.read(by_id.values(), examples)
    for example, key in zip(examples, keys, strict=True):
        task = by_id[example.task_id]
        if key and adapted.reader and task.picture:
            texts = task.around_image(example.input)
            ids, at = adapted.prompts.around_image(texts, adapted.reader.num_soft_tokens(task.picture))
            prompt = Prompt(ids, image=Placed(at, key))
        else:
            prompt = Prompt(*adapted.prompts.parts(prompt_of(task, example)))
        if len(prompt.ids) + task.max_new_tokens > room:
            raise PromptError(
                f"task {task.id}: prompt of {len(prompt.ids)} tokens and {task.max_new_tokens} new ones; "
                f"the backbone takes {room}: {example.input[:80]!r}"
            )
        prompts.append(prompt)
    return prompts


def _bar(total: int, what: str, with_adapter: bool) -> "tqdm[Any]":
    return tqdm(total=total, desc=f"{what} ({'adapter' if with_adapter else 'backbone alone'})", unit="ex", leave=False)


def server_answerer(
    address: str, access: "Access | None" = None, *, without_adapter: bool = False, concurrency: int = _CONCURRENCY
) -> Answerer:
    """Answers from a running server, `concurrency` requests at a time. Raises ServerError if one fails."""
    from concurrent.futures import ThreadPoolExecutor

    from mtlora.client import OPEN, Client

    def answer(examples: Sequence[Example]) -> list[str]:
        def ask(example: Example) -> str:
            image = None if example.image is None else example.encoded_image()
            text = client.generate(example.task_id, example.input, image=image, without_adapter=without_adapter).text
            # Update the bar here: the loop that collects answers waits for the slowest example before each.
            with bar.get_lock():
                bar.update()
            return text

        with (
            Client(address, access or OPEN) as client,
            ThreadPoolExecutor(concurrency) as pool,
            _bar(len(examples), "ask", not without_adapter) as bar,
        ):
            return list(pool.map(ask, examples))

    return answer


def server_labeller(address: str, access: "Access | None" = None) -> Labeller:
    """Probabilities of labels from a running server, not calibrated. Raises ServerError if an input fails."""
    from concurrent.futures import ThreadPoolExecutor

    from mtlora.client import OPEN, Client

    def label(examples: Sequence[Example]) -> list[Mapping[str, float]]:
        def ask(example: Example) -> Mapping[str, float]:
            (score,) = client.score(example.task_id, [example.input], uncalibrated=True)
            if score.error is not None:
                raise score.error
            return score.probabilities

        with Client(address, access or OPEN) as client, ThreadPoolExecutor(_CONCURRENCY) as pool:
            return list(pool.map(ask, examples))

    return label
