"""A quantised backbone: the engine adds the formula's path to what each of its blocks computes.

The blocks' own products are vLLM's; how exact they are in int8 depends on the processor. So the path is held against
the formula at the inputs that the blocks have in the quantised engine itself.

Shape suffixes: T tokens, D hidden size, L positions of a prompt, V vocabulary.
"""

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtlora.backbone import identify
from mtlora.checkpoint.read import read_checkpoint
from mtlora.config import MtLoRAConfig
from tests.engine._engine import lora_manager_of, running_engine
from tests.engine._models import VOCABULARY, all_logprobs, make_adapter, make_model, path_reference

# Relative to the norm of a token's path, as in test_formula.py; and bfloat16's rounding of the sum.
TOLERANCE = 1e-2
ROUNDING = 2**-8
# Smallest change of a log-probability by the adapter; an adapter without effect would test nothing.
EFFECT = 1.4


def quantise(source: Path, target: Path) -> None:
    """Write `source` with int8 weights, a scale a row, to `target`. Activations are quantised token by token."""
    tensors = load_file(source / "model.safetensors")
    for name, weight in list(tensors.items()):
        if ".layers." not in name or not name.endswith("proj.weight"):
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        tensors[name], tensors[f"{name}_scale"] = (weight / scale).round().to(torch.int8), scale
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }
    (target / "config.json").write_text(json.dumps(config))


class Record(NamedTuple):
    """One block in one step: its name, its input, and its output without and with the path."""

    name: str
    x_TD: torch.Tensor
    without_TD: torch.Tensor
    y_TD: torch.Tensor


class Recorder:
    """Records what the blocks of a running engine do."""

    def __init__(self, engine: Any) -> None:
        self._records: list[Record] = []
        for block in lora_manager_of(engine)._adapter_manager.blocks:
            block.finish_ = self._recording(block.block_name, block.finish_)

    def _recording(self, name: str, finish_: Any) -> Any:
        def recording(y_TD: torch.Tensor, x_TD: torch.Tensor) -> None:
            without_TD = y_TD.clone()
            finish_(y_TD, x_TD)
            self._records.append(Record(name, x_TD.clone(), without_TD, y_TD.clone()))

        return recording

    def take(self) -> list[Record]:
        """The records since the last call."""
        taken, self._records = self._records, []
        return taken


def test_adapters_add_their_paths_beside_a_quantised_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.lora.request import LoRARequest

    model = make_model(tmp_path / "model", "llama")
    quantise(model, tmp_path / "int8")
    make_adapter(tmp_path / "a", identify(model), MtLoRAConfig(r=8, num_experts=4, num_groups=2, blocks="both"))
    checkpoint = read_checkpoint(tmp_path / "a")
    request = LoRARequest("a", 1, f"{tmp_path / 'a'}#t1")
    chooser = random.Random(0)
    prompt = [chooser.randrange(3, VOCABULARY) for _ in range(24)]

    with (
        running_engine(tmp_path / "int8", dtype="bfloat16", max_logprobs=-1) as engine,
        pytest.raises(ValueError, match="weights_fingerprint"),
    ):
        engine.llm_engine.add_lora(request)

    monkeypatch.setenv("MTLORA_ADAPTER_BACKBONE_CHECK", "architecture")
    with running_engine(
        tmp_path / "int8", dtype="bfloat16", max_logprobs=-1, quantization="compressed-tensors"
    ) as engine:
        assert engine.llm_engine.add_lora(request)
        recorder = Recorder(engine)
        bare_LV = logprobs(engine, prompt, None)
        without_adapter = recorder.take()
        found_LV = logprobs(engine, prompt, request)
        with_adapter = recorder.take()

    # Two blocks in each of two layers, one step.
    assert len(without_adapter) == len(with_adapter) == 4
    for name, _, without_TD, y_TD in without_adapter:
        assert torch.equal(y_TD, without_TD), name
    for name, x_TD, without_TD, y_TD in with_adapter:
        path_TD = path_reference(checkpoint, "t1", name, x_TD)
        assert path_TD is not None
        error_T = (y_TD.double() - without_TD.double() - path_TD).norm(dim=1)
        assert (error_T <= TOLERANCE * path_TD.norm(dim=1) + ROUNDING * y_TD.double().norm(dim=1)).all(), name
        assert (path_TD.norm(dim=1) > 0.1 * y_TD.double().norm(dim=1)).all(), "a path too small to be seen"
    assert (found_LV - bare_LV).abs().max() > EFFECT


def logprobs(engine: Any, prompt: list[int], request: Any) -> torch.Tensor:
    """Log-probabilities [L, V] of a prompt's tokens after the first."""
    from vllm import SamplingParams

    (output,) = engine.generate(
        [{"prompt_token_ids": prompt}],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1),
        lora_request=request,
        use_tqdm=False,
    )
    return all_logprobs(output.prompt_logprobs[1:])
