"""Prompts of text tasks: without solved examples, or with some from the training split."""

from collections.abc import Callable

from mtlora.suite.base import Example, Suite, SuiteError, up_to
from mtlora.task import PromptParts, TaskSpec

# Gives the prompt of one example of a task.
PromptOf = Callable[[TaskSpec, Example], PromptParts]


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
