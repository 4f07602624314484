"""vLLM's engine core between two steps: the next one waits for a request that is about to come, where that pays.

Of an engine that makes one step after another. One that prepares a step while another runs (pipeline parallelism,
asynchronous scheduling) and those that step together with others (data parallelism of experts) never wait.
"""

import os
import queue
import time
from typing import Any

from vllm.v1.engine import EngineCoreRequestType
from vllm.v1.engine.core import EngineCore, EngineCoreProc

from mtlora.vllm_plugin.anticipation import Anticipation

ENVIRONMENT_ANTICIPATION = "MTLORA_ANTICIPATION"


class Between:
    """What an engine core does between its steps, and what that came to."""

    def __init__(self, anticipation: Anticipation) -> None:
        self._anticipation = anticipation
        self._waited_s = 0.0
        self._followed = 0

    def counts(self) -> dict[str, float]:
        """Since the start: seconds for which steps were held up, and requests that came meanwhile."""
        return {"waited_s": self._waited_s, "followed": self._followed}

    def arrived(self) -> None:
        """A request came in. On the thread that reads the socket."""
        self._anticipation.arrived(time.monotonic())

    def stepped(self, began: float, outputs: Any) -> None:
        """A step ended: vLLM's outputs of it, by client."""
        finished = sum(o.finish_reason is not None for each in outputs.values() for o in each.outputs)
        now = time.monotonic()
        self._anticipation.stepped(now, now - began, finished)

    def wait(self, core: EngineCoreProc) -> None:
        """Take in what came during the step, and where it pays, what is about to come."""
        began, places = time.monotonic(), core.vllm_config.scheduler_config.max_num_seqs
        while not core.input_queue.empty():
            core._handle_client_request(*core.input_queue.get_nowait())
        running, waiting = core.scheduler.get_request_counts()
        # Where nothing runs vLLM waits by itself; where more is there than places, none stays empty.
        if not running or running + waiting >= places:
            return
        patience_s = self._anticipation.patience_s(began, running + waiting)
        if not patience_s:
            return
        expected, until = self._anticipation.expected(began), began + patience_s
        while expected and (left_s := until - time.monotonic()) > 0:
            try:
                kind, request = core.input_queue.get(timeout=left_s)
            except queue.Empty:
                break
            core._handle_client_request(kind, request)
            if kind == EngineCoreRequestType.ADD:
                expected -= 1
                self._followed += 1
        self._waited_s += time.monotonic() - began


def wait_between_steps() -> None:
    """Have vLLM's engine core do as this module says, and tell what it came to when `mtlora_between` is called.

    With `MTLORA_ANTICIPATION=0` in the environment no step waits.
    """
    # A process runs one engine core.
    between = Between(Anticipation())
    EngineCoreProc.mtlora_between = lambda _: between.counts()
    if os.environ.get(ENVIRONMENT_ANTICIPATION, "1") == "0":
        return
    process_input_queue, preprocess_add_request = (
        EngineCoreProc._process_input_queue,
        EngineCoreProc.preprocess_add_request,
    )

    def step(self: EngineCoreProc) -> Any:
        began = time.monotonic()
        outputs, executed = EngineCore.step(self)
        if executed:
            between.stepped(began, outputs)
        return outputs, executed

    def preprocess(self: EngineCoreProc, request: Any) -> Any:
        between.arrived()
        return preprocess_add_request(self, request)

    def process(self: EngineCoreProc) -> None:
        if type(self) is EngineCoreProc:
            between.wait(self)
        process_input_queue(self)

    EngineCoreProc.step = step
    EngineCoreProc.preprocess_add_request = preprocess
    EngineCoreProc._process_input_queue = process
