"""An adapter of the authors' own module, converted, gives the engine their outputs."""

import torch
from torch import nn

from mtlora.checkpoint.convert import convert
from mtlora.task import TaskSpec
from tests.engine._engine import running_engine
from tests.engine._models import HIDDEN_SIZE, VOCABULARY, HuggingFace, all_logprobs, make_model
from tests.mtlora.authors import AuthorsBlockAdapter, attach_authors, authors_state

TOLERANCE = 5e-5
BLOCKS = {"ffn": ("mlp",), "attention": ("self_attn",), "both": ("self_attn", "mlp")}


def test_logprobs_equal_the_authors_loop(tmp_path):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from mtlora.vllm_plugin.naming import slot_path

    model = make_model(tmp_path / "model", "llama")
    reference = HuggingFace(model)
    theirs, requests = [], []
    for i, (name, modules) in enumerate(BLOCKS.items(), start=1):
        torch.manual_seed(i)
        adapters = {}
        for layer in range(reference.backbone.num_layers):
            for module in modules:
                block = AuthorsBlockAdapter(HIDDEN_SIZE, 4 * i, 1 + 2 * i, lora_alpha=8.0, num_groups=2 ** (i - 1))
                for expert in block.lora_B:
                    nn.init.normal_(expert.weight, std=0.3)
                adapters[layer, module] = block.eval()
        theirs.append(adapters)
        torch.save(authors_state(adapters, "base_model.model.model."), tmp_path / f"{name}.bin")
        convert(
            tmp_path / f"{name}.bin",
            tmp_path / name,
            backbone=reference.backbone,
            tasks=[TaskSpec(id="theirs", description="a test's task")],
            lora_alpha=8.0,
        )
        requests.append(LoRARequest(name, i, slot_path(tmp_path / name, None)))
    chooser = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=chooser).tolist() for n in (9, 21, 33)]

    with running_engine(model, dtype="float32", max_logprobs=-1) as engine:
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0, max_tokens=4, logprobs=-1, prompt_logprobs=-1, ignore_eos=True),
            lora_request=requests,
            use_tqdm=False,
        )

    for prompt, adapters, output in zip(prompts, theirs, outputs, strict=True):
        tokens = prompt + list(output.outputs[0].token_ids)[:-1]
        found_LV = all_logprobs([*output.prompt_logprobs[1:], *output.outputs[0].logprobs])
        bare_LV = reference.logprobs(tokens)
        handles = attach_authors(reference.model, adapters)
        expected_LV = reference.logprobs(tokens)
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(found_LV, expected_LV, atol=TOLERANCE, rtol=0)
        assert (expected_LV - bare_LV).abs().max() > 0.1, "an adapter that changes nothing tests nothing"
