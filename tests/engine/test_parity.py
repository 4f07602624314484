"""The engine's log-probabilities equal Hugging Face's, with every kind of adapter, on every family of backbones."""

import random

import pytest
import torch

from mtlora.config import MtLoRAConfig
from mtlora.families import FAMILIES
from tests.engine._engine import running_engine
from tests.engine._models import VOCABULARY, HuggingFace, all_logprobs, make_adapter, make_model

# float32 differs by rounding alone. A bfloat16 engine is compared with Hugging Face in float32.
TOLERANCE = {"float32": 5e-5, "bfloat16": 0.25}
ADAPTERS = [
    (blocks, task_bias, task)
    for blocks in ("ffn", "attention", "both")
    for task_bias, task in ((True, "t1"), (True, None), (False, None))
]


@pytest.mark.parametrize(("family", "dtype"), [*((family, "float32") for family in FAMILIES), ("llama", "bfloat16")])
def test_logprobs_equal_hugging_face(family, dtype, tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from mtlora.vllm_plugin.naming import slot_path

    model = make_model(tmp_path / "model", family)
    reference = HuggingFace(model)
    requests, wanted = [None], [(None, None)]
    for i, (blocks, task_bias, task) in enumerate(ADAPTERS, start=1):
        config = MtLoRAConfig(
            r=4 * i,
            num_experts=1 + i % 4 if not task_bias else 4,
            num_groups=2 ** (i % 4),
            blocks=blocks,
            task_bias=task_bias,
        )
        make_adapter(tmp_path / f"a{i}", reference.backbone, config, seed=i)
        requests.append(LoRARequest(f"a{i}", i, slot_path(tmp_path / f"a{i}", task)))
        wanted.append((tmp_path / f"a{i}", task))
    chooser = random.Random(family)
    prompts = [[chooser.randrange(3, VOCABULARY) for _ in range(chooser.randint(5, 40))] for _ in requests]

    with running_engine(model, dtype=dtype, max_logprobs=-1) as engine:
        for request in requests[1:]:
            assert engine.llm_engine.add_lora(request)
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=6, logprobs=-1, prompt_logprobs=-1, ignore_eos=True),
            lora_request=requests,
            use_tqdm=False,
        )

    effects = []
    for prompt, (adapter, task), output in zip(prompts, wanted, outputs, strict=True):
        generated = list(output.outputs[0].token_ids)
        found_LV = all_logprobs([*output.prompt_logprobs[1:], *output.outputs[0].logprobs])
        tokens = prompt + generated[:-1]
        expected_LV = reference.logprobs(tokens, adapter, task)
        torch.testing.assert_close(found_LV, expected_LV, atol=TOLERANCE[dtype], rtol=0)
        effects.append((expected_LV - reference.logprobs(tokens)).abs().max().item())
    assert effects[0] == 0
    assert min(effects[1:]) > 10 * TOLERANCE["float32"], "an adapter that changes nothing tests nothing"
