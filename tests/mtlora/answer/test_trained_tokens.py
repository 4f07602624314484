"""The tokens that the shipped adapter was trained to emit are among those that its types allow."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from mtlora.checkpoint.read import read_manifest
from mtlora.prompt import PromptEncoder
from mtlora.suite import load_suite

typed = pytest.importorskip("mtlora.vllm_plugin.typed")
SHIPPED = Path(__file__).parents[3] / "adapters" / "builtin" / "4"


def test_types_shut_out_no_trained_token(backbone: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    prompts, outputs = PromptEncoder(tokenizer), typed.TypedOutputs(tokenizer, len(tokenizer))
    manifest = read_manifest(SHIPPED)
    row = torch.zeros(1, len(outputs.vocabulary.ordinary), dtype=torch.int32)
    for suite in (load_suite("builtin"), load_suite("bbh-generated")):
        for task in suite.tasks:
            served = manifest.task(task.id)
            constraint = served.constraint()
            assert constraint is not None
            for example in suite.examples(task.id, "test", 2):
                working = example.working if served.answer_marker else None
                ids = prompts.answer(served.worked_answer(working, example.target))
                # The tightest that the task's own limit lets the answer be.
                grammar = outputs.grammar(constraint.text, served.max_new_tokens, None)
                for place, token in enumerate(ids):
                    grammar.fill_bitmask(row, 0)
                    allowed = int(row[0, token // 32]) >> (token % 32) & 1
                    assert allowed, (task.id, tokenizer.decode(ids[:place]), tokenizer.decode([token]))
                    assert grammar.accept_tokens("x", [token])
                assert grammar.is_terminated()
