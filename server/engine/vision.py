"""An engine with a vision backbone: takes an image's patches, returns its feature or its states.

Shape suffixes: C colours, S pixels of a side, T positions, D hidden size, F size of a feature.
"""

from contextlib import aclosing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from server.engine.engine import BaseEngine
from server.engine.launch import launch
from server.job import Lane


class VisionEngine(BaseEngine):
    """One engine. `start` it, then `load` slots, then `embed` images and `encode` them."""

    def _launch(self) -> Any:
        import torch

        from mtlora.vision.encoder import load_encoder
        from mtlora.vllm_vision import feature_params, image_prompt, state_params

        # Use one thread for these small products: more threads would compete with the engine's.
        torch.set_num_threads(1)
        encoder = load_encoder(self._backbone)
        self._embeddings, self._config = encoder.embeddings, encoder.config
        self._prompt, self._feature, self._states = image_prompt, feature_params(), state_params()
        llm = launch(self._settings, Lane.IMAGES, self._backbone, self._record_step)
        self._dtype = llm.model_config.dtype
        return llm

    def positions(self, size: int) -> int:
        """Positions of the sequence of an image of size x size pixels."""
        return self._config.num_positions(size)

    def embed(self, pixels_CSS: NDArray[np.float32]) -> Any:
        """Patches with positions, [T, D], of normalised pixels. Callable from any thread."""
        import torch

        with torch.inference_mode():
            return self._embeddings(torch.from_numpy(pixels_CSS)[None])[0].to(self._dtype)

    @property
    def num_prefix(self) -> int:
        """Positions before an image's patches."""
        return self._config.num_prefix

    def soft_tokens(self, size: int, merge: int) -> int:
        """Soft tokens of an image of size x size pixels; see `VisionConfig`."""
        return self._config.num_soft_tokens(size, merge)

    async def encode(self, embeds_TD: Any, slot: Any | None) -> NDArray[np.float32]:
        """The feature [F] of an embedded image. Cancelling it aborts the sequence in the engine."""
        return await self._pooled(embeds_TD, self._feature, slot)

    async def states(self, embeds_TD: Any) -> NDArray[np.float32]:
        """All states [T, D] that the backbone alone gives of an embedded image. Cancelling is as for `encode`."""
        return await self._pooled(embeds_TD, self._states, None)

    async def _pooled(self, embeds_TD: Any, params: Any, slot: Any | None) -> NDArray[np.float32]:
        self._count += 1
        name = f"image-{self._count}"
        outputs = self._running.encode(self._prompt(embeds_TD), params, name, lora_request=slot)
        async with aclosing(outputs):
            with self._waiting(self._sequences):
                output = await anext(outputs)
        found: NDArray[np.float32] = output.outputs.data.float().numpy()
        return found

    async def warm_up(self, slot: Any | None, *, short: bool = False) -> None:
        """Run an image of the smallest size, so that no user's request pays for first calls."""
        size = self._config.patch_size
        await self.encode(self.embed(np.zeros((3, size, size), np.float32)), slot)
