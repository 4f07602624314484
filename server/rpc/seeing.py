"""Turns the image of a text task into soft tokens: first the vision engine, then the adapter's projector."""

import asyncio
from typing import TYPE_CHECKING

import numpy as np
from mtlora_pb.v1 import inference_pb2 as pb

from server.call import Call
from server.errors import EngineAbortedError
from server.job import ServedTask, SoftTokens
from server.rpc.pictures import Picture

if TYPE_CHECKING:
    from server.rpc.classify import Classifier


class Sight:
    """The image of one request; all of its sequences share the soft tokens.

    soft_tokens: their number. at: position of the first one, set before `look`. Raises EngineDeadError before the
    first engine of images has started.
    """

    def __init__(self, request: pb.GenerateRequest, task: ServedTask, classifier: "Classifier") -> None:
        assert task.spec.picture is not None
        self._task = task
        self._preparation = task.spec.picture
        self._classifier = classifier
        self._picture = Picture(request.image, "image", "")
        self._lock = asyncio.Lock()
        self._seen: SoftTokens | None = None
        self.soft_tokens = classifier.running().engine.soft_tokens(self._preparation.size, task.version.projector.merge)
        self.at = 0

    def check(self) -> None:
        """Check everything except the content. Raises INVALID_ARGUMENT."""
        self._classifier.check(self._picture, self._preparation)

    async def look(self, call: Call) -> SoftTokens:
        """Compute the soft tokens, after a turn of the vision engine. Raises the errors of `Classifier.states`."""
        async with self._lock:
            if self._seen is None:
                states_TD = await self._classifier.states(self._picture, self._preparation, self._task, call)
                num_prefix = self._classifier.running().engine.num_prefix
                rows_SD = self._task.version.projector.soft_tokens(states_TD, num_prefix)
                if not np.isfinite(rows_SD).all():
                    raise EngineAbortedError("the image's soft tokens are not finite")
                self._seen = SoftTokens(self.at, rows_SD)
            return self._seen
