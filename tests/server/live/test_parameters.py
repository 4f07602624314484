"""Batches, samples and the less usual parameters against a real engine; an upload that it serves."""

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mtlora_pb.v1 import inference_pb2 as pb

from benchmarks.harness.waiting import wait_until
from mtlora.client import AsyncClient, Client, ServerError
from server.cli.process import ServerProcess
from tests.server.adapters import entry, write_adapter

PROMPT = "Once upon a time"
ALONE = {"without_adapter": True}


@pytest.fixture(scope="module")
def words(backbone: Path) -> dict[str, int]:
    """Token ids of the backbone's vocabulary."""
    return json.loads((backbone / "tokenizer.json").read_text())["model"]["vocab"]


def test_a_batch_answers_items_of_several_adapters_beside_a_failed_one(client: Client) -> None:
    items = [("open", PROMPT), ("none", "x"), ("count_words", "a b c"), ("open", PROMPT)]
    first, missing, counted, again = client.generate_all(items)
    assert missing.error is not None
    assert [first.result().summary.adapter_name, counted.result().summary.adapter_name] == ["beta", "alpha"]
    assert first.result().summary.prompt_tokens == again.result().summary.prompt_tokens > 0
    assert all(each.result().summary.completion_tokens for each in (first, counted, again))
    streamed = {each.index: each for each in client.generate_batch(items, timeout=60)}
    assert sorted(index for index, each in streamed.items() if each.answer) == [0, 2, 3]


def test_best_of_gives_the_likeliest_of_the_samples(client: Client) -> None:
    sampled = {"temperature": 1.0, "seed": 3, "max_new_tokens": 4, "logprobs": 1}
    answer = client.generate("open", PROMPT, n=4, **sampled, **ALONE)
    assert len({sample.text for sample in answer.samples}) > 1
    for sample in answer.samples:
        total = sum(token.chosen.logprob for token in sample.logprobs)
        assert sample.cumulative_logprob == pytest.approx(total, abs=1e-3)
    best = client.generate("open", PROMPT, best_of=4, **sampled, **ALONE)
    likeliest = max(answer.samples, key=lambda sample: sample.cumulative_logprob)
    assert best.text == likeliest.text
    # The same seed gives the first sample alone, and later ones read the prompt from the cache.
    assert client.generate("open", PROMPT, **sampled, **ALONE).text == answer.text
    assert answer.summary.prompt_tokens == best.summary.prompt_tokens


def test_allowed_banned_and_biased_tokens_and_stops_shape_the_answer(client: Client, words: dict[str, int]) -> None:
    a, b = words["a"], words["b"]
    asked = {"max_new_tokens": 6, "stop": [], "return_token_ids": True, **ALONE}
    assert set(client.generate("open", PROMPT, allowed_tokens=[a, b], **asked).token_ids) <= {a, b}
    free = client.generate("open", PROMPT, **asked).token_ids
    assert free[0] not in client.generate("open", PROMPT, banned_tokens=free, **asked).token_ids
    assert client.generate("open", PROMPT, logit_bias={a: 100.0}, **asked).token_ids == [a] * 6
    penalised = client.generate("open", PROMPT, logit_bias={a: 20.0, b: 19.0}, frequency_penalty=2.0, **asked)
    assert set(penalised.token_ids) == {a, b}
    ended = client.generate("open", PROMPT, stop_token_ids=[free[1]], **asked)
    assert (ended.token_ids, ended.summary.finish_reason) == (free[:2], pb.FINISH_REASON_STOP)
    longer = client.generate("open", PROMPT, stop_token_ids=[free[1]], min_new_tokens=4, **asked)
    assert len(longer.token_ids) >= 4
    assert free[1] not in longer.token_ids[:3]


def test_prompts_as_token_ids_have_logprobs(client: Client, words: dict[str, int]) -> None:
    ids = [words[word] for word in ("Once", "Ġupon", "Ġa", "Ġtime")]
    answer = client.generate("open", ids, prompt_logprobs=2, max_new_tokens=2, **ALONE)
    assert [token.chosen.token_id for token in answer.prompt_logprobs] == ids[1:]
    assert all(token.chosen.logprob <= 0 for token in answer.prompt_logprobs)
    assert all(len(token.top) == 2 for token in answer.prompt_logprobs)
    assert answer.summary.prompt_tokens == 4
    # Again, where the prompt lies in the cache.
    again = client.generate("open", ids, prompt_logprobs=2, max_new_tokens=2, **ALONE)
    assert len(again.prompt_logprobs) == 3
    pieces = list(
        client.stream("open", ids, prompt_logprobs=1, return_token_ids=True, max_new_tokens=3, stop=[], **ALONE)
    )
    assert sum(len(piece.prompt_logprobs) for piece in pieces) == 3
    assert sum(len(piece.token_ids) for piece in pieces) == 3
    with pytest.raises(ServerError, match="a special token"):
        client.generate("open", [*ids, 1])


@pytest.fixture
def no_upload_stays(client: Client, adapters: Path) -> Iterator[None]:
    """Other tests count the adapters of the folder."""
    yield
    client.unload_adapter("uploaded")
    shutil.rmtree(adapters / "uploaded")
    (adapters / ".uploads").rmdir()
    wait_until(lambda: "uploaded" not in {adapter.name for adapter in client.adapters()}, 60)


@pytest.mark.usefixtures("no_upload_stays")
def test_an_uploaded_adapter_serves_with_its_own_defaults(
    server: ServerProcess, client: Client, words: dict[str, int], tmp_path: Path
) -> None:
    a, x = words["a"], words["x"]
    defaults = {"allowed_tokens": [a, x], "temperature": 2.0, "return_token_ids": True}
    marked = entry("marked", answer_marker="x", stop=(), max_new_tokens=40, defaults=defaults)
    judged = entry("judged", answer_marker="=>", allowed_answers=("left", "right"), stop=(), max_new_tokens=16)
    write_adapter(tmp_path / "made", [marked, judged])
    version = client.upload_adapter(tmp_path / "made", "uploaded")
    assert version == "1"
    wait_until(lambda: any(each.id == "marked" for each in client.tasks()), 60)
    assert client.task("marked").defaults.temperature == 2.0
    answer = client.generate("marked", PROMPT, seed=1, include_reasoning=True)
    assert set(answer.token_ids) <= {a, x}
    # A token for each letter of the working.
    assert answer.summary.working_tokens == answer.token_ids.index(x) == len(answer.reasoning)
    # The working of a score ends at its marker, and leaves the label open.
    (score,) = client.score("judged", [PROMPT])
    assert score.reasoning
    found = client.download_manifest("uploaded")
    assert json.loads(found.manifest)["tasks"][0]["defaults"]["allowed_tokens"] == [a, x]
    # As if the last reply was lost: repeating the upload finds its version.
    assert client.upload_adapter(tmp_path / "made", "uploaded") == "1"
    write_adapter(tmp_path / "other", [marked], seed=1)

    async def asynchronous() -> str:
        async with AsyncClient(server.address) as client:
            return await client.upload_adapter(tmp_path / "other", "uploaded")

    assert asyncio.run(asynchronous()) == "2"
    (tmp_path / "other" / "adapter.safetensors").write_bytes(b"garbage")
    with pytest.raises(ServerError, match="not verified"):
        client.upload_adapter(tmp_path / "other", "elsewhere")
    assert "elsewhere" not in {adapter.name for adapter in client.adapters()}
