"""Types that llguidance's lexer cannot hold: refused, or answered, and other requests of the type go on."""

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mtlora.answer import Regex
from mtlora.answer.constraint import Constraint
from mtlora.cli import main
from tests.mtlora.answer.sampling import sample
from tests.server.adapters import entry, write_adapter

typed = pytest.importorskip("mtlora.vllm_plugin.typed")
from mtlora.vllm_plugin import lexer  # noqa: E402  it needs llguidance

# Its first mask takes more work than llguidance does in one.
_NO_FIRST_TOKEN = "(.{0,9}[a-m]){0,10}!"
# Hundreds of new states at every token.
_EXPLODING = [".*a.{60}7", "(.*a.{200}|.*b.{199})7"]


@pytest.fixture
def outputs(backbone: Path) -> Any:
    return _outputs(backbone)


@cache
def _outputs(backbone: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    return typed.TypedOutputs(tokenizer, len(tokenizer))


def _text(pattern: str) -> str:
    return Constraint(Regex(pattern=pattern)).text


def test_a_type_without_a_first_mask_is_refused(outputs: Any) -> None:
    with pytest.raises(ValueError, match=r"too complex: .*too many expressions"):
        outputs.compiled(_text(_NO_FIRST_TOKEN))
    assert not outputs.has(_text(_NO_FIRST_TOKEN))


def test_verify_refuses_a_type_without_a_first_mask(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "1", [entry("one", answer={"type": "regex", "pattern": _NO_FIRST_TOKEN})])
    assert main(["verify", str(tmp_path / "1"), "--backbone", str(backbone)]) == 1
    assert "task one: answer: too complex" in capsys.readouterr().err


def test_verify_refuses_a_limit_below_the_shortest_answer(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "1", [entry("one", answer={"type": "date"}, max_new_tokens=1)])
    assert main(["verify", str(tmp_path / "1"), "--backbone", str(backbone)]) == 1
    assert "task one: max_new_tokens: found 1; its shortest answer takes" in capsys.readouterr().err


@pytest.mark.parametrize("pattern", _EXPLODING)
def test_every_answer_of_an_exploding_type_lies_within_it(outputs: Any, pattern: str) -> None:
    rng = random.Random(0)
    for _ in range(3):
        assert Regex(pattern=pattern).check(sample(outputs, _text(pattern), 500, rng).decode())


def test_a_lexer_that_many_masks_filled_is_replaced(outputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenant that fills the lexer of a task's type must not cut other tenants' answers short."""
    monkeypatch.setattr(lexer, "_MOST", lexer._FEW)
    monkeypatch.setattr(lexer, "_WORTHWHILE", 1)
    text = _text(".*a.{60}8")
    first = outputs.compiled(text).lexer.whole()
    sample(outputs, text, 100, random.Random(0))
    assert outputs.compiled(text).lexer.whole() is not first


def test_a_type_that_fills_its_lexer_at_once_rests(outputs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lexer, "_MOST", lexer._FEW)
    now = [100.0]
    monkeypatch.setattr(lexer.time, "monotonic", lambda: now[0])
    text = _text(".*a.{60}9")
    sample(outputs, text, 100, random.Random(0))
    assert outputs.compiled(text).lexer.whole() is None
    now[0] += lexer._REST_S
    assert outputs.compiled(text).lexer.whole() is not None


def test_a_lexer_grows_with_its_type(outputs: Any) -> None:
    text = _text(r"([^:]{1,20}: [^;]{1,30}; ?){1,12}")
    small = outputs.compiled(text).lexer.states
    for seed in range(8):
        sample(outputs, text, 400, random.Random(seed))
    assert small < outputs.compiled(text).lexer.states < lexer._MOST
