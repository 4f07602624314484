"""Many tasks about one document, on the real engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.harness.waiting import wait_until
from mtlora.client import Answer, Client
from server.cli.process import ServerProcess
from tests.server.adapters import entry, write_adapter
from tests.server.helpers import run_cli
from tests.server.live.published import published

DOCUMENT = " ".join(f"Item {i}: {i * 7 % 31} boxes of part {i * 13 % 97}." for i in range(30))
TASKS = [
    entry(f"paper_{name}", document_template="Paper:\n{document}\n\n", template=f"{name}?", stop=(), max_new_tokens=6)
    for name in ("who", "what", "when", "why")
]
IDS = [task.id for task in TASKS]
# Tokens of a block of the engine's cache.
BLOCK = 32


@pytest.fixture(scope="module")
def papers(adapters: Path, client: Client) -> Iterator[Path]:
    with published(adapters / "papers", client, TASKS, activation="task") as folder:
        yield folder


def begun(answer: Answer) -> float:
    """The log-probability of an answer's first token."""
    return answer.logprobs[0].chosen.logprob


def test_a_document_is_read_once_for_all_tasks_calls_and_versions(papers: Path, client: Client) -> None:
    first = client.analyze_all(IDS, DOCUMENT, logprobs=1)
    prompts = [each.result().summary.prompt_tokens for each in first]
    cached = [each.result().summary.cached_tokens for each in first]
    assert min(prompts) > 8 * BLOCK
    assert sorted(cached)[0] == 0
    assert all(prompt - BLOCK - 8 < found for prompt, found in list(zip(prompts, cached, strict=True))[1:])
    # Alone, and over the other way in, a task says the same, as far as batches of bfloat16 do.
    alone = [client.generate(task, DOCUMENT, logprobs=1) for task in IDS]
    assert [begun(each) for each in alone] == pytest.approx([begun(each.result()) for each in first], abs=0.2)
    write_adapter(papers / "2", TASKS, seed=2, activation="task")
    wait_until(lambda: client.task(IDS[0]).adapter_version == "2", 60)
    named = client.analyze_all(IDS, document_id=first[0].document_id, logprobs=1)
    assert {each.result().summary.adapter_version for each in named} == {"2"}
    assert all(each.result().summary.cached_tokens >= cached[1] for each in named)
    assert [each.result().logprobs for each in named] != [each.result().logprobs for each in first]
    (streamed,) = client.analyze(IDS[:1], document_id=first[0].document_id, logprobs=1)
    assert begun(streamed.result()) == pytest.approx(begun(named[0].result()), abs=0.2)


def test_the_command_asks_all_tasks_that_share_documents(papers: Path, server: ServerProcess, tmp_path: Path) -> None:
    file = tmp_path / "paper.txt"
    file.write_text(DOCUMENT)
    done = run_cli("analyze", str(file), "--address", server.address)
    assert done.returncode == 0, done.stderr
    assert all(task in done.stdout for task in IDS)
    assert "4 tasks about one document" in done.stdout
