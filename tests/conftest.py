"""Fixtures of every test, and what is decided about a test from what it uses: whether it is slow, and its group.

A group runs in one worker of pytest-xdist, in order, so that its tests share servers, engines and imports. Without
xdist groups change nothing.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

# What starts an engine, in a process of its own or not. A module that imports one of them is slow.
ENGINES = ("ServerProcess", "EngineProcess", "running_engine")
# Making the default backbone takes half of what `make test-fast` may take.
SLOW_FIXTURES = {"backbone", "short_backbone", "tiny_backbone", "server"}
TESTS = Path(__file__).parent

os.environ["TQDM_DISABLE"] = "1"
if not torch.cuda.is_available():
    # Triton looks at it when it is imported first, which any test may bring about.
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """A worker of xdist has a core for its engines: two threads of an engine would wait for other workers' threads."""
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores = sorted(os.sched_getaffinity(0))
        core = cores[int(worker.removeprefix("gw")) % len(cores)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))


# First: xdist reads the groups in this hook too.
@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        if any(hasattr(item.module, name) for name in ENGINES) or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    if "PYTEST_XDIST_WORKER" in os.environ:
        # The longest groups first, so that no worker is left with one at the end.
        groups = {_group(item): None for item in items if item.get_closest_marker("slow")}
        order = {group: place for place, group in enumerate(["server", "engine", *groups])}
        items.sort(key=lambda item: order.get(_group(item), len(order)))


def _group(item: pytest.Function) -> str:
    """The tests of the session's server, those in whose process an engine runs, else the tests of a file."""
    folder, *_ = item.path.relative_to(TESTS).parts
    if folder == "engine":
        return "engine"
    return "server" if "server" in item.fixturenames else str(item.path.relative_to(TESTS))


@pytest.fixture(scope="session")
def backbone() -> Path:
    """The prepared default backbone; made on first use."""
    from mtlora.backbone import resolve

    return resolve("default")


@pytest.fixture(scope="session")
def short_backbone(backbone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first layers of the default backbone, for engines whose answers need to make no sense."""
    from safetensors.torch import load_file, save_file

    num_layers = 4
    folder = tmp_path_factory.mktemp("short-backbone")
    config = json.loads((backbone / "config.json").read_text()) | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(backbone / "model.safetensors")
    kept = {
        name: tensor
        for name, tensor in tensors.items()
        if ".layers." not in name or int(name.split(".layers.")[1].split(".")[0]) < num_layers
    }
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(backbone / name, folder)
    return folder


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
