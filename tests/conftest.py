"""Fixtures of every test."""

import os
from pathlib import Path

import pytest
import torch

os.environ["TQDM_DISABLE"] = "1"
if not torch.cuda.is_available():
    # Triton looks at it when it is imported first, which any test may bring about.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def backbone() -> Path:
    """The prepared default backbone; made on first use."""
    from mtlora.backbone import resolve

    return resolve("default")


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone small enough to train in seconds: random weights, the default backbone's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from mtlora.backbone import resolve

    folder = tmp_path_factory.mktemp("tiny-backbone")
    tokenizer = AutoTokenizer.from_pretrained(resolve("default"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Tied embeddings at transformers' scale leave a model this narrow unable to prefer any token.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.5)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
