"""A compiled engine gives the eager engine's answers, from one graph whatever the number of layers."""

import random
import shutil

import pytest
import torch

from mtlora.backbone import identify
from mtlora.config import MtLoRAConfig
from tests.engine._engine import running_engine
from tests.engine._models import VOCABULARY, make_adapter, make_model

pytestmark = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler, g++ or clang++"
)


def test_compiled_answers_equal_eager_ones(tmp_path, monkeypatch):
    from vllm import SamplingParams
    from vllm.config import CompilationMode
    from vllm.lora.request import LoRARequest

    model = make_model(tmp_path / "model", "llama", num_layers=3)
    chooser = random.Random(0)
    requests = [None]
    for i, blocks in enumerate(["ffn", "attention", "both"], start=1):
        make_adapter(tmp_path / f"a{i}", identify(model), MtLoRAConfig(r=4, num_experts=4, blocks=blocks), seed=i)
        requests.append(LoRARequest(f"a{i}", i, f"{tmp_path / f'a{i}'}#t1"))
    requests = requests + requests[::-1] + [None]
    prompts = [[chooser.randrange(3, VOCABULARY) for _ in range(chooser.randint(2, 30))] for _ in requests]

    def answers(eager):
        graphs.clear()
        with running_engine(model, dtype="float32", enforce_eager=eager) as engine:
            mode = engine.llm_engine.vllm_config.compilation_config.mode
            assert (mode == CompilationMode.NONE) == eager
            assert not [name for name in splitting_ops(engine) if "mtlora" in name]
            outputs = engine.generate(
                [{"prompt_token_ids": prompt} for prompt in prompts],
                SamplingParams(temperature=0, max_tokens=6, logprobs=1, prompt_logprobs=0, ignore_eos=True),
                lora_request=requests,
                use_tqdm=False,
            )
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        logprobs = [
            next(iter(position.values())).logprob for output in outputs for position in output.outputs[0].logprobs
        ]
        return tokens, torch.tensor(logprobs)

    def splitting_ops(engine):
        return engine.llm_engine.vllm_config.compilation_config.splitting_ops or []

    def counting(self, graph, inputs, **changes):
        graphs.append(graph.print_readable(print_output=False).count("finish_path_"))
        return stock(self, graph, inputs, **changes)

    graphs, stock = [], torch._TorchCompileInductorWrapper.__call__
    monkeypatch.setattr(torch._TorchCompileInductorWrapper, "__call__", counting)
    eager_tokens, eager_logprobs = answers(eager=True)
    assert not [count for count in graphs if count]
    # Keep the test's compiled graphs out of the real cache.
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    compiled_tokens, compiled_logprobs = answers(eager=False)
    # One graph, with every layer's two blocks in it.
    assert [count for count in graphs if count] == [2 * 3]
    assert compiled_tokens == eager_tokens
    torch.testing.assert_close(compiled_logprobs, eager_logprobs, atol=1e-4, rtol=0)
