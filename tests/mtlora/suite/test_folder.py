"""Folders of BIG-Bench Hard files: what loads, what is refused and how it is said."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtlora.suite import SPLITS, FolderSuite, SuiteError, load_suite, split_of

BBH = Path(__file__).parents[3].parent / "shared" / "data" / "bbh"


def _write(folder: Path, name: str, document: Any) -> Path:
    file = folder / name
    file.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return file


def _examples(n: int) -> dict[str, Any]:
    return {"examples": [{"input": f"Is {i} even?", "target": "no" if i % 2 else "yes"} for i in range(n)]}


def test_loads(tmp_path: Path) -> None:
    _write(tmp_path, "Even.json", {"canary": "x", **_examples(200)})
    _write(tmp_path, "a-b.c_1.json", "\ufeff" + json.dumps({"examples": [{"input": "x", "target": "{y}", "note": 1}]}))
    _write(tmp_path, "README.md", "not a task")
    suite = FolderSuite(tmp_path)
    assert suite.name == tmp_path.name
    assert [spec.id for spec in suite.tasks] == ["a-b.c_1", "even"]
    spec = suite.tasks[1]
    assert spec.template == "{input}\nAnswer:"
    assert spec.stop == ("\n",)
    assert spec.allowed_answers is None
    assert spec.max_new_tokens >= 3
    assert [e.input for e in suite.all_examples("even")] == [f"Is {i} even?" for i in range(200)]
    assert load_suite(str(tmp_path)).tasks == suite.tasks


def test_splits(tmp_path: Path) -> None:
    document = _examples(300)
    _write(tmp_path, "even.json", document)
    suite = FolderSuite(tmp_path)
    parts = {split: suite.examples("even", split, None, seed=3) for split in SPLITS}
    whole = [example for part in parts.values() for example in part]
    assert len(whole) == len(set(whole)) == 300
    assert set(whole) == set(suite.all_examples("even"))
    for split, part in parts.items():
        assert all(split_of("even", example.input) == split for example in part)
        assert suite.examples("even", split, 5, seed=3) == part[:5]
        assert suite.examples("even", split, None, seed=4) != part
        with pytest.raises(SuiteError, match=f"has {len(part)} {split} inputs, {len(part) + 1} were asked for"):
            suite.examples("even", split, len(part) + 1)
        with pytest.raises(SuiteError, match="-1 were asked for"):
            suite.examples("even", split, -1)
    # The order of the file is not the order of the examples.
    document["examples"].reverse()
    _write(tmp_path, "even.json", document)
    assert FolderSuite(tmp_path).examples("even", "train", None, seed=3) == parts["train"]


def test_repeated_inputs(tmp_path: Path) -> None:
    entries = [("a", "b"), ("c", "b"), ("a", " b"), ("c", "d")]
    _write(tmp_path, "task.json", {"examples": [{"input": i, "target": t} for i, t in entries]})
    with pytest.warns(UserWarning, match=r"task\.json: example 3 has the input of example 1 but target 'd' instead"):
        suite = FolderSuite(tmp_path)
    assert len(suite.all_examples("task")) == 4
    unique = [example for split in SPLITS for example in suite.examples("task", split, None)]
    assert sorted((example.input, example.target) for example in unique) == [("a", "b"), ("c", "b")]


GOOD = {"input": "x", "target": "y"}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("", "not JSON: Expecting value at line 1, column 1"),
        ('{"examples": [', "not JSON: .* line 1, column 15"),
        ("[" * 100_000, "cannot be read"),
        ([], 'expected an object with "examples", found a list'),
        (None, "found null"),
        (3, "found a number"),
        ({}, "found no keys"),
        ({"Examples": [GOOD], "canary": ""}, "found keys 'Examples', 'canary'"),
        ({"examples": {"0": GOOD}}, '"examples" must be a list, found an object'),
        ({"examples": []}, '"examples" is empty'),
        ({"examples": [GOOD, "x"]}, 'example 1: expected an object with "input" and "target", found a string'),
        ({"examples": [GOOD, GOOD, {"input": "z"}]}, "example 2: no \"target\"; found keys 'input'"),
        ({"examples": [{"target": "z"}]}, "example 0: no \"input\"; found keys 'target'"),
        ({"examples": [{"input": 3, "target": "z"}]}, 'example 0: "input" must be a string, found a number'),
        ({"examples": [{"input": "z", "target": True}]}, 'example 0: "target" must be a string, found a boolean'),
        ({"examples": [{"input": " \n", "target": "z"}]}, 'example 0: "input" is blank'),
        ({"examples": [{"input": "z", "target": ""}]}, 'example 0: "target" is blank'),
        ({"examples": [{"input": "z", "target": "a\nb"}]}, r"example 0: target 'a\\nb' contains the stop string '\\n'"),
        ({"examples": [{"input": "z", "target": "a" * 257}]}, "example 0: target has 257 characters; at most 256"),
        ({"examples": [{"input": "z\ud800", "target": "a"}]}, 'example 0: "input" has half a surrogate pair at .* 1'),
    ],
)
def test_wrong_file(tmp_path: Path, document: Any, message: str) -> None:
    _write(tmp_path, "fine.json", {"examples": [GOOD]})
    file = _write(tmp_path, "wrong.json", document)
    with pytest.raises(SuiteError, match=message) as caught:
        FolderSuite(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")


def test_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"no \.json file in the folder"):
        FolderSuite(tmp_path)
    with pytest.raises(SuiteError, match="not a folder"):
        FolderSuite(tmp_path / "missing")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(SuiteError, match=r"folder\.json: not a file"):
        FolderSuite(tmp_path)
    with pytest.raises(SuiteError, match="not a folder"):
        FolderSuite(_write(tmp_path, "task.json", _examples(1)))


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_bytes(b'{"examples": [{"input": "\xff", "target": "x"}]}')
    with pytest.raises(SuiteError, match=r"task\.json: not UTF-8 at byte 25"):
        FolderSuite(tmp_path)


@pytest.mark.parametrize("name", ["two words.json", "-x.json", "é.json", "x" * 130 + ".json"])
def test_wrong_file_name(tmp_path: Path, name: str) -> None:
    _write(tmp_path, name, _examples(1))
    with pytest.raises(SuiteError, match=r"ids must match \^\[a-z0-9\]"):
        FolderSuite(tmp_path)


def test_ids_ignore_case(tmp_path: Path) -> None:
    _write(tmp_path, "Task.json", _examples(1))
    _write(tmp_path, "task.json", _examples(1))
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("the file system ignores case, so there can be only one")
    with pytest.raises(SuiteError, match=r"task\.json: task id 'task' is taken by Task\.json"):
        FolderSuite(tmp_path)


@pytest.mark.parametrize("name", ["", "built-in", "/nowhere/at/all", "a\0b"])
def test_unknown_suite(name: str) -> None:
    with pytest.raises(SuiteError, match="allowed are builtin, bbh-generated, or the path"):
        load_suite(name)


def test_unknown_task_and_split(tmp_path: Path) -> None:
    _write(tmp_path, "task.json", _examples(1))
    suite = FolderSuite(tmp_path)
    with pytest.raises(SuiteError, match="no task 'other'; it has task"):
        suite.examples("other", "train", None)
    with pytest.raises(SuiteError, match="no split 'dev'; there are train, validation, test"):
        suite.examples("task", "dev", None)  # type: ignore[arg-type]


_text = st.text(st.characters(), max_size=12) | st.sampled_from(["input", "target", "examples", "a\nb", "x" * 257])
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=6,
)
_entry = st.fixed_dictionaries({"input": _text, "target": _text}, optional={"more": _json})
_document = st.fixed_dictionaries(
    {"examples": st.lists(_entry, max_size=4) | st.lists(_entry | _json, max_size=3)}, optional={"canary": _json}
)


@given(text=(_document | _json).map(json.dumps) | st.text(max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_file_loads_or_is_refused(text: str) -> None:
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "task.json"
        file.write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            suite = FolderSuite(name)
        except SuiteError as error:
            refusal = str(error)
        else:
            refusal = ""
    if refusal:
        assert refusal.startswith(f"{file}: ")
        return
    (spec,) = suite.tasks
    examples = suite.all_examples("task")
    assert examples
    assert sum(len(suite.examples("task", split, None)) for split in SPLITS) == len({e.input for e in examples})
    for example in examples:
        assert spec.render(example.input) == f"{example.input}\nAnswer:"
        assert 0 < len(example.target) <= 256
        assert "\n" not in example.target


@pytest.mark.skipif(not BBH.is_dir(), reason="the BIG-Bench Hard files are not beside the checkout")
def test_big_bench_hard_loads() -> None:
    suite = load_suite(str(BBH))
    assert isinstance(suite, FolderSuite)
    assert len(suite.tasks) == 27
    for spec in suite.tasks:
        entries = json.loads((BBH / f"{spec.id}.json").read_text(encoding="utf-8"))["examples"]
        found = {e.input: e.target for e in suite.all_examples(spec.id)}
        assert found == {entry["input"]: entry["target"] for entry in entries}
        assert all(suite.examples(spec.id, split, None) for split in SPLITS)
