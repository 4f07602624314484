"""Where the engines' threads run: the setting, the environment, or all cores."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.engine import threads
from server.job import Lane
from server.settings import Settings, load_settings


def test_threads_follow_the_setting_then_the_environment_then_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    monkeypatch.setattr(threads, "quota_cores", lambda: None)
    assert threads.thread_environment("7", {threads.BIND: "1"}, 1) == {threads.BIND: "7"}
    assert threads.thread_environment(None, {threads.BIND: "1"}, 1) == {}
    assert threads.thread_environment(None, {}, 1) == {threads.BIND: "0,1,2,3,4"}
    assert threads.thread_environment(None, {}, 2) == {threads.BIND: "0,1|2,3,4"}
    assert threads.thread_environment(None, {}, 6) == {threads.BIND: "0|1|2|3|4|0"}
    assert threads.thread_environment(None, {}, 2, from_last=True) == {threads.BIND: "1,0|4,3,2"}
    assert threads.thread_environment(None, {}, 2, bound=False) == {threads.BIND: "nobind", "OMP_NUM_THREADS": "2"}
    assert threads.thread_environment("0|1", {}, 2, bound=False) == {threads.BIND: "0|1"}


def test_a_quota_of_fewer_cores_limits_threads_without_binding_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(threads, "quota_cores", lambda: 8)
    assert threads.thread_environment(None, {}, 2) == {threads.BIND: "nobind", "OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("150000 100000", 1), ("400000 100000", 4), ("?", None)]
)
def test_quota_is_read_from_the_control_group(tmp_path: Path, text: str, cores: int | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert threads.quota_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("binding", "ranks", "message"),
    [
        ("0-3", 1, ""),
        ("0, 2-3", 1, ""),
        ("0|1|2-3", 3, ""),
        ("nobind", 2, ""),
        ("auto", 2, ""),
        ("abc", 1, "found 'abc' in 'abc'; allowed: cores such as 0-3,8 or, by rank, 0|1"),
        ("0,", 1, "found '' in '0,'; "),
        ("0|", 2, "found '' in '0|'; "),
        ("3-1", 1, "found '3-1' in '3-1'; "),
        ("-1", 1, "found '-1' in '-1'; "),
        ("0-999999999", 1, "found '0-999999999' in '0-999999999'; "),
        ("0", 2, "groups of cores in '0': found 1; allowed: 2, one for each rank, with | between"),
        ("0|1", 1, "groups of cores in '0|1': found 2; allowed: 1, "),
        ("0-99", 1, "found core 4; allowed: those of this process, 0-3,8"),
        ("9", 1, "found core 9; "),
    ],
)
def test_cores_of_a_binding_are_there_one_group_for_each_rank(binding: str, ranks: int, message: str) -> None:
    if not message:
        threads.check_cores(binding, ranks, {8, 0, 1, 2, 3})
        return
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        threads.check_cores(binding, ranks, {8, 0, 1, 2, 3})


@given(st.text("0123|,- a", max_size=12), st.integers(1, 3))
def test_a_binding_that_passes_is_one_that_vllm_reads(binding: str, ranks: int) -> None:
    from vllm.utils.cpu_resource_utils import parse_id_list

    try:
        threads.check_cores(binding, ranks, range(400))
    except ValueError:
        return
    groups = binding.split("|")
    assert len(groups) == ranks
    assert all(set(parse_id_list(group)) <= set(range(400)) and parse_id_list(group) for group in groups)


def test_each_lane_has_its_setting_and_its_ranks(tmp_path: Path) -> None:
    def settings(**given: object) -> Settings:
        return load_settings({"adapters": tmp_path, "vision_backbone": "vision", **given})

    one = settings(omp_threads_bind="0", tensor_parallel_size=2, data_parallel_size=3, vision_data_parallel_size=4)
    assert [threads.binding_setting(one, lane) for lane in Lane] == ["omp_threads_bind", "omp_threads_bind"]
    assert [threads.ranks_of(one, lane) for lane in Lane] == [6, 4]
    own = settings(vision_omp_threads_bind="1")
    assert [threads.binding_setting(own, lane) for lane in Lane] == [None, "vision_omp_threads_bind"]
