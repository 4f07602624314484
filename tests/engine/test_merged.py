"""A task added to an adapter leaves the other tasks' log-probabilities in the engine the same bits."""

import pytest
import torch

from mtlora.checkpoint.read import read_checkpoint
from mtlora.checkpoint.write import write_checkpoint
from mtlora.config import MtLoRAConfig
from mtlora.merge.extend import extended_config, merged_tasks, merged_tensors, starting_point
from mtlora.ops.cpu_kernel import INSTRUCTION_SETS, compiled_kernel
from mtlora.task import TaskSpec
from tests.engine._engine import running_engine
from tests.engine._models import VOCABULARY, HuggingFace, all_logprobs, make_adapter, make_model
from tests.factories import learned

NUM_TASKS = 3
CONFIG = MtLoRAConfig(r=16, num_experts=4, num_groups=2, blocks="both")


def adds_in_order() -> bool:
    """Whether the kernel adds a column's terms in the same order however many columns and terms there are.

    Its products of bfloat16 do; in other arithmetic a single token's do not.
    """
    kernel = compiled_kernel()
    return kernel is not None and bool(kernel.mtlora_supported(INSTRUCTION_SETS["avx512_bf16"]))


def add_task(folder, out, new_experts: int):
    """Merge a task, with random tensors instead of training."""
    checkpoint = read_checkpoint(folder)
    start = starting_point(checkpoint, new_experts, torch.Generator().manual_seed(new_experts))
    write_checkpoint(
        out,
        backbone=checkpoint.manifest.backbone,
        config=extended_config(checkpoint, new_experts),
        tasks=merged_tasks(checkpoint, TaskSpec(id="added", description="a test's task")),
        tensors=merged_tensors(checkpoint, learned(start, new_experts)),
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_old_tasks_keep_their_bits(tmp_path, dtype):
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    from mtlora.vllm_plugin.naming import slot_path

    model = make_model(tmp_path / "model", "llama")
    make_adapter(tmp_path / "before", HuggingFace(model).backbone, CONFIG, num_tasks=NUM_TASKS)
    new_experts = {"bias": 0, "experts": 3}
    for name, count in new_experts.items():
        add_task(tmp_path / "before", tmp_path / name, count)
    chooser = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=chooser).tolist() for n in (5, 12, 33)]

    with running_engine(model, dtype=dtype, max_logprobs=-1) as engine:

        def logprobs(adapter: str, task: str, number: int) -> torch.Tensor:
            outputs = engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                SamplingParams(temperature=0, max_tokens=6, logprobs=-1, prompt_logprobs=-1, ignore_eos=True),
                lora_request=LoRARequest(f"{adapter}-{task}", number, slot_path(tmp_path / adapter, task)),
                use_tqdm=False,
            )
            return torch.cat(
                [all_logprobs([*output.prompt_logprobs[1:], *output.outputs[0].logprobs]) for output in outputs]
            )

        ids = iter(range(1, 100))
        before = [logprobs("before", f"t{i}", next(ids)) for i in range(NUM_TASKS)]
        added = {}
        for name in new_experts:
            for i in range(NUM_TASKS):
                found = logprobs(name, f"t{i}", next(ids))
                if name == "bias" or (dtype == "bfloat16" and adds_in_order()):
                    assert torch.equal(found, before[i]), f"{name}: task t{i} has moved"
                else:
                    # The added terms are zero, but the order of additions changes, so last bits differ, and later
                    # values too.
                    torch.testing.assert_close(found, before[i], atol=5e-5 if dtype == "float32" else 0.05, rtol=0)
            added[name] = logprobs(name, "added", next(ids))
    assert not torch.equal(added["bias"], added["experts"])
    assert min((found - before[0]).abs().max() for found in added.values()) > 0.1
