"""Two engines on the same cores: threads of a step, and that a real engine takes them."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mtlora.vllm_cpu import shared_cores
from mtlora.vllm_cpu.shared_cores import SharedCores
from server.engine import launch, threads
from server.job import Lane
from server.settings import load_settings
from tests.engine._engine import running_engine
from tests.engine._models import make_model


@pytest.fixture
def path() -> Iterator[str]:
    descriptor = os.memfd_create("board")
    os.ftruncate(descriptor, 16)
    yield f"/proc/{os.getpid()}/fd/{descriptor}"
    os.close(descriptor)


@pytest.mark.parametrize(("all_threads", "halves"), [(1, (1, 1)), (2, (1, 1)), (5, (3, 2)), (8, (4, 4))])
def test_each_has_half_while_both_run(
    path: str, all_threads: int, halves: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, images = (SharedCores(path, place, all_threads) for place in (0, 1))
    assert text.threads == images.threads == all_threads
    with text:
        assert (text.threads, images.threads) == (all_threads, halves[1])
        with images:
            assert text.threads == halves[0]
    # Its next step may come within the pause.
    monkeypatch.setattr(shared_cores, "_PAUSE_S", 600.0)
    assert images.threads == halves[1]
    monkeypatch.setattr(shared_cores, "_PAUSE_S", 0.0)
    assert images.threads == all_threads


def test_an_engine_that_was_killed_in_a_step_leaves_its_cores(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text, images = (SharedCores(path, place, 4) for place in (0, 1))
    images.__enter__()
    assert text.threads == 2
    SharedCores(path, 1, 4)
    assert text.threads == 4
    images.__enter__()
    monkeypatch.setattr(shared_cores, "_LONGEST_S", 0.0)
    assert text.threads == 4


def test_another_process_sees_the_board() -> None:
    other = "import os; from mtlora.vllm_cpu.shared_cores import SharedCores as S; S.of_environment(2).__enter__()"
    text = SharedCores(shared_cores.board(), 0, 2)
    environment = os.environ | shared_cores.sharing_environment(1)
    subprocess.run([sys.executable, "-c", other], env=environment, check=True)
    assert text.threads == 1


def test_only_engines_that_nobody_placed_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(threads.BIND, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setattr(threads, "quota_cores", lambda: None)

    def environment(lane: Lane, **settings: object) -> dict[str, str]:
        return launch.engine_environment(load_settings({"adapters": tmp_path, **settings}), lane)

    both = {"vision_backbone": "vision"}
    assert environment(Lane.TEXT, **both)[threads.BIND] == "0,1,2"
    assert environment(Lane.IMAGES, **both)[threads.BIND] == "2,1,0"
    assert environment(Lane.IMAGES, **both)[shared_cores.ENVIRONMENT].startswith("1:/proc/")
    two = environment(Lane.IMAGES, **both, vision_data_parallel_size=2)
    assert (two[threads.BIND], two["OMP_NUM_THREADS"]) == ("nobind", "1")
    assert shared_cores.ENVIRONMENT not in two
    for placed in ({}, both | {"omp_threads_bind": "0-1"}, both | {"vision_omp_threads_bind": "2"}):
        assert shared_cores.ENVIRONMENT not in environment(Lane.IMAGES, **placed)
    monkeypatch.setenv(threads.BIND, "0-2")
    assert shared_cores.ENVIRONMENT not in environment(Lane.IMAGES, **both)


def test_a_real_engine_takes_half_of_its_threads_beside_another(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm import SamplingParams

    from mtlora.ops import cpu_elementwise
    from mtlora.vllm_cpu.sharing_executor import SharingExecutor

    before = torch.get_num_threads()
    found: list[int] = []
    one_call = cpu_elementwise.silu_and_mul
    monkeypatch.setattr(cpu_elementwise, "silu_and_mul", lambda x: found.append(torch.get_num_threads()) or one_call(x))
    monkeypatch.setenv(shared_cores.ENVIRONMENT, f"0:{path}")
    # On a machine of any speed.
    monkeypatch.setattr(shared_cores, "_LONGEST_S", 600.0)
    torch.set_num_threads(4)
    try:
        model = make_model(tmp_path / "model", "llama")
        with running_engine(model, dtype="float32", distributed_executor_backend=SharingExecutor) as engine:
            images = SharedCores(path, 1, 4)

            def steps() -> set[int]:
                found.clear()
                engine.generate([{"prompt_token_ids": [5] * 7}], SamplingParams(max_tokens=3), use_tqdm=False)
                return set(found)

            assert steps() == {4}
            with images:
                assert steps() == {2}
            time.sleep(2 * shared_cores._PAUSE_S)
            assert steps() == {4}
    finally:
        torch.set_num_threads(before)
