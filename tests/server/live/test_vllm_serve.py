"""vLLM's OpenAI server with the plugin gives the native service's greedy texts. One start."""

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness.vllm_server import vllm_server
from benchmarks.harness.waiting import wait_until
from mtlora.client import Client
from mtlora.vllm_cpu.precision import engine_dtype
from tests.server.adapters import entry, write_adapter


@pytest.fixture(scope="module")
def base_url(adapters: Path, backbone: Path) -> Iterator[str]:
    alpha = adapters / "alpha" / "1"
    modules = {"count_words": alpha, "two-fields": Path(f"{alpha}#pair"), "open": adapters / "beta" / "10"}
    settings = {
        "served_model_name": "backbone", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8,
        "kv_cache_memory_bytes": 256 << 20,
        # The dtype that the native service chooses.
        "dtype": engine_dtype("auto", backbone),
        "enable_lora": True, "max_loras": 8,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
        with vllm_server(backbone, modules, **settings) as server:
            yield f"{server.url}/v1"


def post(url: str, **body: Any) -> bytes:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return bytes(reply.read())


def complete(base_url: str, model: str, prompt: str, **parameters: Any) -> str:
    reply = post(f"{base_url}/completions", model=model, prompt=prompt, temperature=0, **parameters)
    return str(json.loads(reply)["choices"][0]["text"])


def test_gives_the_native_services_greedy_texts(base_url: str, client: Client) -> None:
    text = "The quick brown fox"
    prompt = f"{text}\nAnswer:"
    native = client.generate("count_words", text)
    assert complete(base_url, "count_words", prompt, max_tokens=8).strip() == native.text
    native = client.generate("pair", {"first": "red", "second": "blue"})
    given = {"max_tokens": 8, "stop": ["\n"]}
    assert complete(base_url, "two-fields", "First: red\nSecond: blue\nAnswer:", **given).strip() == native.text
    native = client.generate("open", text)
    assert complete(base_url, "open", prompt, max_tokens=16).strip() == native.text
    alone = client.generate("open", text, without_adapter=True)
    assert complete(base_url, "backbone", prompt, max_tokens=16).strip() == alone.text
    # An adapter that changes nothing tests nothing.
    assert native.text != alone.text


def test_answers_an_openai_client(base_url: str, client: Client) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=base_url, api_key="none") as http:
        assert {"count_words", "two-fields", "open", "backbone"} == {model.id for model in http.models.list()}
        messages = [{"role": "user", "content": "Name a colour."}]
        chat = http.chat.completions.create(model="open", messages=messages, max_tokens=16, temperature=0)
    native = client.generate("open", messages, stop=[], max_new_tokens=16)
    assert chat.choices[0].message.content == native.text


@pytest.fixture
def typed(adapters: Path, client: Client) -> Iterator[Path]:
    """An adapter of a task of labels and one of JSON, which the native server serves."""
    properties = {"open": {"type": "boolean"}, "size": {"enum": ["small", "large"]}}
    schema = {"type": "object", "properties": properties, "required": [*properties]}
    record = entry("record", answer={"type": "json", "schema": schema}, max_new_tokens=48)
    folder = adapters / "typed" / "1"
    write_adapter(folder, [entry("choice", allowed_answers=("left", "right", "straight on")), record])
    wait_until(lambda: {"choice", "record"} <= {task.id for task in client.tasks()}, 60)
    yield folder
    # Other tests count the adapters of the folder.
    client.unload_adapter("typed")
    shutil.rmtree(folder.parent)
    wait_until(lambda: "typed" not in {adapter.name for adapter in client.adapters()}, 60)


def test_an_openai_client_reads_typed_answers(base_url: str, client: Client, typed: Path) -> None:
    openai = pytest.importorskip("openai")
    text = "The door is ajar."
    with openai.OpenAI(base_url=base_url, api_key="none") as http:
        for task in ("choice", "record"):
            post(f"{base_url}/load_lora_adapter", lora_name=task, lora_path=str(typed))
            try:
                given = {"model": task, "prompt": f"{text}\nAnswer:", "stop": ["\n"], "max_tokens": 48}
                if task == "record":
                    schema = json.loads(client.task(task).answer.json)
                    of_schema = {"type": "json_schema", "json_schema": {"name": task, "schema": schema}}
                    given["extra_body"] = {"response_format": of_schema}
                found = http.completions.create(**given, temperature=0).choices[0].text.strip()
                drawn = http.completions.create(**given, temperature=2, n=8).choices
            finally:
                post(f"{base_url}/unload_lora_adapter", lora_name=task)
            assert found == client.generate(task, text).text
            texts = {choice.text.strip() for choice in drawn}
            if task == "choice":
                assert {found, *texts} <= {"left", "right", "straight on"}
            else:
                assert {frozenset(json.loads(each)) for each in (found, *texts)} == {frozenset({"open", "size"})}


def test_an_engine_process_refuses_a_bad_adapter_and_lives(base_url: str, adapters: Path) -> None:
    with pytest.raises(urllib.error.HTTPError) as raised:
        post(f"{base_url}/load_lora_adapter", lora_name="bad", lora_path=f"{adapters / 'alpha' / '1'}#nonsense")
    assert "no task 'nonsense'" in raised.value.read().decode()
    assert complete(base_url, "open", "Once", max_tokens=4)


def test_holds_a_tasks_answers_to_its_type(base_url: str, adapters: Path) -> None:
    post(f"{base_url}/load_lora_adapter", lora_name="sort_words", lora_path=str(adapters / "alpha" / "1"))
    try:
        given = {"model": "sort_words", "prompt": "Once\nAnswer:", "max_tokens": 8, "temperature": 2, "n": 16}
        choices = json.loads(post(f"{base_url}/completions", **given))["choices"]
        assert {choice["text"].strip() for choice in choices} <= {"yes", "no"}
        refused = {"task sort_words has a type": {"stop": ["e"]}, "max_tokens: found 1": {"max_tokens": 1}}
        for why, wrong in refused.items():
            with pytest.raises(urllib.error.HTTPError) as raised:
                post(f"{base_url}/completions", **given | wrong)
            assert raised.value.code == 400
            assert why in raised.value.read().decode()
        free = json.loads(post(f"{base_url}/completions", **given, vllm_xargs={"mtlora_free": 1}))["choices"]
        assert not {choice["text"].strip() for choice in free} <= {"yes", "no"}
    finally:
        post(f"{base_url}/unload_lora_adapter", lora_name="sort_words")
