"""Fixtures of every test. A test's fixtures decide whether it is slow; its folder decides its group.

A group runs in one worker of pytest-xdist, in order: its tests share servers, engines and imports.
"""

import json
import os
import shutil
from pathlib import Path

import hypothesis
import pytest

# A module that has one of these is slow: it starts a server, a worker of the benchmarks, an engine or processes like an
# engine's, or runs Triton's interpreter.
LONG = (
    "ServerProcess", "running_fleet", "LyingServer", "WorkerProcess", "running_engine", "running_bare_engine",
    "EngineProcesses", "triton_gpu",
)  # fmt: skip
# Making the default backbone takes half of the time limit of `make test-fast`.
SLOW_FIXTURES = {"backbone", "short_backbone", "tiny_backbone", "server"}
# Folders whose tests run in one worker of xdist, in order.
TOGETHER = ("tests/server/live/", "tests/engine/")

os.environ["TQDM_DISABLE"] = "1"
# No deadline: tests must pass on a machine of any speed. In CI, the same examples each time, so that only the change
# decides; elsewhere new ones, which find more.
_ANY_MACHINE = hypothesis.settings(deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.register_profile("any machine", _ANY_MACHINE, max_examples=50)
hypothesis.settings.register_profile("many", _ANY_MACHINE, max_examples=300)
hypothesis.settings.load_profile("any machine")
# Do not wait for watchers to notice: nothing watches the health of servers in tests.
os.environ["MTLORA_DRAIN_DELAY_S"] = "0"


def pytest_configure(config: pytest.Config) -> None:
    """Give each xdist worker one core for engines and PyTorch: more threads would wait for other workers' threads."""
    if config.getoption("numprocesses", None):
        # This process starts the workers and runs no test.
        return
    if worker := os.environ.get("PYTEST_XDIST_WORKER"):
        cores = sorted(os.sched_getaffinity(0))
        core = cores[int(worker.removeprefix("gw")) % len(cores)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(core))
        # PyTorch reads these when it is imported. Waiting threads must not spin.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    if not torch.cuda.is_available():
        # Triton reads it when it is imported, which any test may cause.
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        assert isinstance(item, pytest.Function)
        if any(hasattr(item.module, name) for name in LONG) or SLOW_FIXTURES & set(item.fixturenames):
            item.add_marker("slow")
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Run groups with slow tests first, so that none is left for the end.
        slow = {_group(item.nodeid) for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (_group(item.nodeid) not in TOGETHER, _group(item.nodeid) not in slow))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return Scheduling(config, log)


def _group(nodeid: str) -> str:
    """A test's file, or the folder whose tests share a server, or vLLM's imports."""
    file = nodeid.partition("::")[0]
    return next((folder for folder in TOGETHER if file.startswith(folder)), file)


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
    from tests.factories import write_tiny_backbone

    return write_tiny_backbone(tmp_path_factory.mktemp("tiny-backbone"))
