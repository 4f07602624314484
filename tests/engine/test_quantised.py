"""A quantised backbone: the path beside its blocks is the one it has beside the weights that it stands for."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mtlora.backbone import identify
from mtlora.config import MtLoRAConfig
from tests.engine._engine import running_engine
from tests.engine._models import VOCABULARY, HuggingFace, make_adapter, make_model

# Activations are quantised as well, token by token.
TOLERANCE = 0.35


def quantise(source: Path, target: Path, plain: Path) -> None:
    """Write `source` with int8 weights, a scale a row, to `target`, and the same values in float32 to `plain`."""
    tensors = load_file(source / "model.safetensors")
    quantised, values = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if ".layers." not in name or not name.endswith("proj.weight"):
            continue
        scale = weight.abs().amax(dim=1, keepdim=True) / 127
        rounded = (weight / scale).round()
        quantised[name], quantised[f"{name}_scale"] = rounded.to(torch.int8), scale
        values[name] = rounded * scale
    config = json.loads((source / "config.json").read_text())
    for folder, kept in ((target, quantised), (plain, values)):
        folder.mkdir()
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config))
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
    }
    (target / "config.json").write_text(json.dumps(config))


def test_adapters_beside_a_quantised_backbone(tmp_path, monkeypatch):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    model = make_model(tmp_path / "model", "llama")
    quantise(model, tmp_path / "int8", tmp_path / "plain")
    make_adapter(tmp_path / "a", identify(model), MtLoRAConfig(r=8, num_experts=4, num_groups=2, blocks="both"))
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
        outputs = engine.generate(
            [{"prompt_token_ids": prompt}] * 2,
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=-1),
            lora_request=[request, None],
            use_tqdm=False,
        )
    found, bare = (
        torch.tensor([[position[v].logprob for v in range(VOCABULARY)] for position in output.prompt_logprobs[1:]])
        for output in outputs
    )
    reference = HuggingFace(tmp_path / "plain")
    expected = reference.logprobs(prompt, tmp_path / "a", "t1")[:-1]
    torch.testing.assert_close(bare, reference.logprobs(prompt)[:-1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert (expected - bare).abs().max() > 4 * TOLERANCE, "an adapter that changes nothing tests nothing"
