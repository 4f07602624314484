"""Settings that vLLM refuses, and parameters that it takes."""

import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from server.engine import Engine, EngineStartError, launch
from server.engine.threads import BIND
from server.engine.translation import sampling_params
from server.job import Lane, MoreSampling, Sampling
from server.settings import load_settings
from tests.engine._models import make_model


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_model_len": 1_000_000, "enforce_eager": False}, "User-specified max_model_len .+"),
        ({"max_model_len": 128, "tensor_parallel_size": 3}, "Total number of attention heads .+ divisible by .+"),
    ],
)
def test_an_engine_that_does_not_start_says_why_in_one_line(
    tmp_path: Path, setting: dict[str, Any], message: str
) -> None:
    settings = load_settings({"adapters": tmp_path, **setting})
    engine = Engine(settings, make_model(tmp_path / "model", "llama"), on_stats=lambda _: None)
    with mock.patch.dict(os.environ), pytest.raises(EngineStartError) as failure:
        engine.start()
    assert re.fullmatch("the engine did not start: " + message, str(failure.value))


@pytest.mark.parametrize("own", [None, "0-3"])
def test_an_engines_cores_are_not_those_of_the_next(
    own: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings({"adapters": tmp_path})
    monkeypatch.delenv(BIND, raising=False)
    if own is not None:
        monkeypatch.setenv(BIND, own)
    found = []

    def environment(*_: Any) -> dict[str, str]:
        found.append(os.environ.get(BIND))
        return {BIND: "4-7"}

    def refused(*_: Any) -> dict[str, Any]:
        found.append(os.environ[BIND])
        raise ValueError("refused")

    monkeypatch.setattr(launch, "engine_environment", environment)
    monkeypatch.setattr(launch, "_engine_args", refused)

    with mock.patch.dict(os.environ), mock.patch.dict(launch._before, clear=True):
        for _ in range(2):
            with pytest.raises(ValueError, match="refused"):
                launch.launch(settings, Lane.TEXT, tmp_path, lambda _: None)
    assert found == [own, "4-7"] * 2


def test_vision_engines_keep_the_first_model_runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs vLLM would choose the second, which refuses images as prompts of embeddings."""
    from vllm import envs
    from vllm.config import VllmConfig
    from vllm.v1.worker.gpu.model_states import encoder_only

    name = "VLLM_USE_V2_MODEL_RUNNER"
    settings = load_settings({"adapters": tmp_path})
    monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", True)
    envs.disable_envs_cache()
    assert not encoder_only.EncoderOnlyModelState.supports_prompt_embeds
    with mock.patch.dict(os.environ), mock.patch.dict(launch._before, clear=True):
        for lane, second in ((Lane.TEXT, True), (Lane.IMAGES, False), (Lane.TEXT, True)):
            launch._set_environment(settings, lane)
            assert VllmConfig().use_v2_model_runner is second


def test_vllm_takes_what_is_valid() -> None:
    more = MoreSampling(
        min_p=0.5, logit_bias={7: 2.0, 9: 1.0}, banned_tokens=(9,), allowed_tokens=(7,), min_new_tokens=1
    )
    given = sampling_params(Sampling(max_new_tokens=3, temperature=1.0, more=more), 64)
    assert given.logit_bias == {7: 2.0, 9: float("-inf")}
    assert (given.n, given.min_p, given.min_tokens, given.allowed_token_ids) == (1, 0.5, 1, [7])
    plain = sampling_params(Sampling(max_new_tokens=3), 64)
    assert (plain.logit_bias, plain.allowed_token_ids, plain.logprobs, plain.prompt_logprobs) == (None,) * 4


@pytest.mark.parametrize(
    ("change", "at_once"),
    [
        ({}, True),
        ({"max_new_tokens": 65}, False),
        ({"logprobs": 1}, False),
        ({"more": MoreSampling()}, False),
        ({"constraint": None}, False),
        ({"stops_occur": True}, False),
    ],
)
def test_a_whole_answer_of_a_type_is_decoded_at_once(change: dict[str, Any], at_once: bool) -> None:
    """Not token by token to look for stop strings, which a type lets not occur."""
    held: dict[str, Any] = {"max_new_tokens": 64, "stop": ("\n",), "constraint": "mtlora:"}
    given = sampling_params(Sampling(**(held | change)), 64)
    assert (given.detokenize, given.stop) == ((False, []) if at_once else (True, ["\n"]))
