"""Folders of BIG-Bench Hard files: what loads, and how others are refused."""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtlora.suite import SPLITS, FolderSuite, SuiteError, load_suite, split_of

BBH = Path(__file__).parents[3].parent / "shared" / "data" / "bbh"


def _write(folder: Path, name: str, document: Any) -> Path:
    file = folder / name
    file.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return file


def _examples(n: int) -> dict[str, Any]:
    return {"examples": [{"input": f"Is {i} even?", "target": "no" if i % 2 else "yes"} for i in range(n)]}


def test_loads_a_folder(tmp_path: Path) -> None:
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


def test_a_file_may_set_its_tasks_own_parameters(tmp_path: Path) -> None:
    _write(tmp_path, "a.json", {**_examples(3), "defaults": {"temperature": 0.5, "banned_tokens": [7]}})
    (task,) = FolderSuite(tmp_path).tasks
    assert task.defaults is not None
    assert dict(task.defaults.given) == {"temperature": 0.5, "banned_tokens": (7,)}
    for defaults, reason in (({"n": 2}, "n: found 2 at temperature 0"), ({"min_new_tokens": 4000}, "min_new_tokens")):
        _write(tmp_path, "a.json", {**_examples(3), "defaults": defaults})
        with pytest.raises(SuiteError, match=rf"a\.json: .*{reason}"):
            FolderSuite(tmp_path)


def test_splits_are_disjoint_and_stable(tmp_path: Path) -> None:
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
    # Examples do not depend on the file's order.
    document["examples"].reverse()
    _write(tmp_path, "even.json", document)
    assert FolderSuite(tmp_path).examples("even", "train", None, seed=3) == parts["train"]


def test_warns_about_repeated_inputs_with_other_targets(tmp_path: Path) -> None:
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
        ("", "Invalid JSON: EOF while parsing a value at line 1 column 0"),
        ('{"examples": [', "Invalid JSON: EOF while parsing a list at line 1 column 14"),
        ("[" * 100_000, "Invalid JSON: recursion limit exceeded"),
        ([], r"Input should be an object \(found \[\]\); the layout is {\"examples\": "),
        (None, "Input should be an object .found None"),
        (3, "Input should be an object .found 3"),
        ({}, "examples: Field required"),
        ({"Examples": [GOOD], "canary": ""}, "examples: Field required"),
        ({"examples": {"0": GOOD}}, "examples: Input should be a valid array"),
        ({"examples": []}, "examples: List should have at least 1 item"),
        ({"examples": [GOOD, "x"]}, r"examples\.1: Input should be an object \(found 'x'\)"),
        ({"examples": [GOOD, GOOD, {"input": "z"}]}, r"examples\.2\.target: Field required"),
        ({"examples": [{"target": "z"}]}, r"examples\.0\.input: Field required"),
        (
            {"examples": [{"input": 3, "target": "z"}]},
            r"examples\.0\.input: .* a valid string \(found 3\)",
        ),
        (
            {"examples": [{"input": "z", "target": True}]},
            r"examples\.0\.target: .* a valid string \(found True\)",
        ),
        ({"examples": [{"input": " \n", "target": "z"}]}, r"examples\.0\.input: blank"),
        ({"examples": [{"input": "z", "target": ""}]}, r"examples\.0\.target: blank"),
        (
            {"examples": [{"input": "z", "target": "a\nb"}]},
            r"0\.target: contains the stop string '\\n'.*found 'a\\nb'",
        ),
        (
            {"examples": [{"input": "z", "target": "a" * 257}]},
            r"examples\.0\.target: .* at most 256 characters",
        ),
        ({"examples": [{"input": "z\ud800", "target": "a"}]}, "Invalid JSON: .*hex escape at line 1 column"),
    ],
)
def test_refuses_a_wrong_file(tmp_path: Path, document: Any, message: str) -> None:
    _write(tmp_path, "fine.json", {"examples": [GOOD]})
    file = _write(tmp_path, "wrong.json", document)
    with pytest.raises(SuiteError, match=message) as caught:
        FolderSuite(tmp_path)
    assert str(caught.value).startswith(f"{file}: ")


def test_refuses_a_wrong_folder(tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match=r"no \.json file in the folder"):
        FolderSuite(tmp_path)
    with pytest.raises(SuiteError, match="not a folder"):
        FolderSuite(tmp_path / "missing")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(SuiteError, match=r"folder\.json: not a file"):
        FolderSuite(tmp_path)
    with pytest.raises(SuiteError, match="not a folder"):
        FolderSuite(_write(tmp_path, "task.json", _examples(1)))


def test_refuses_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_bytes(b'{"examples": [{"input": "\xff", "target": "x"}]}')
    with pytest.raises(SuiteError, match=r"task\.json: Invalid JSON: invalid unicode code point at line 1 column 26"):
        FolderSuite(tmp_path)


@pytest.mark.parametrize("name", ["two words.json", "-x.json", "é.json", "x" * 130 + ".json"])
def test_refuses_a_wrong_file_name(tmp_path: Path, name: str) -> None:
    _write(tmp_path, name, _examples(1))
    with pytest.raises(SuiteError, match=r"ids must match \^\[a-z0-9\]"):
        FolderSuite(tmp_path)


def test_refuses_ids_that_differ_in_case(tmp_path: Path) -> None:
    _write(tmp_path, "Task.json", _examples(1))
    _write(tmp_path, "task.json", _examples(1))
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("the file system ignores case, so there can be only one")
    with pytest.raises(SuiteError, match=r"task\.json: task id 'task' is taken by Task\.json"):
        FolderSuite(tmp_path)


@pytest.mark.parametrize("name", ["", "built-in", "/nowhere/at/all", "a\0b"])
def test_refuses_an_unknown_suite(name: str) -> None:
    with pytest.raises(SuiteError, match="allowed: builtin, bbh-generated, documents, builtin-vision"):
        load_suite(name)


def test_refuses_an_unknown_task_or_split(tmp_path: Path) -> None:
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
