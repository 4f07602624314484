"""Adapters on an S3 server: whole, torn, listed late, behind rotated credentials, away, refusing connections.

By fsspec, as the server copies them, and by rclone, as the overlays do.
"""

import os
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy import manifests
from server.registry.mirror import Mirror, MirrorError
from server.registry.source import scan

pytest.importorskip("moto", reason="moto's S3 server is not installed")
pytest.importorskip("s3fs", reason="s3fs, fsspec's S3, is not installed")
# Clients of S3 take long to make.
pytestmark = pytest.mark.slow
needs_rclone = pytest.mark.skipif(not shutil.which("rclone"), reason="rclone is not installed (a Debian package)")
BUCKET = "adapters"
FILES = ("adapter.json", "adapter.safetensors")
_KEY_ID = re.compile(r"Credential=([^/]+)/")


class S3:
    """moto's S3 server behind what can go wrong with one.

    key_id: the only one that is let in. stale: listings are those of before. torn: parts of keys whose objects end
    half-way.
    """

    def __init__(self, credentials: Path) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import make_server

        self._app: Any = DomainDispatcherApplication(create_backend_app)
        self._credentials = credentials
        self._serve = partial(make_server, "127.0.0.1", app=self, threaded=True)
        self._away, self.stale, self.torn = False, False, ""
        self._listings: dict[str, tuple[Any, ...]] = {}
        self._listen(port=0)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.rotate("FIRST")

    def leave(self, how: str) -> None:
        """Be away: "slow down" answers each call with 503, "refused" takes no connection."""
        self._away = True
        if how == "refused":
            self._close()

    def come_back(self) -> None:
        self._away = False
        if self._server is None:
            self._listen(port=int(self.url.rpartition(":")[2]))

    def rotate(self, key_id: str) -> None:
        """Let in another key, which a Secret's file has."""
        self.key_id = key_id
        self._credentials.write_text(f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = secret\n")

    def close(self) -> None:
        """Stop, and forget all buckets, which moto keeps for the whole process."""
        let_in = {"Authorization": f"Credential={self.key_id}/"}
        self.come_back()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset", method="POST", headers=let_in))
        self._close()

    def _listen(self, port: int) -> None:
        self._server: Any = self._serve(port=port)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server = None

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        shown = _KEY_ID.search(environ.get("HTTP_AUTHORIZATION", ""))
        if self._away:
            return _error(start_response, "503 Slow Down", "SlowDown")
        if shown is None or shown[1] != self.key_id:
            return _error(start_response, "403 Forbidden", "InvalidAccessKeyId")
        said: list[Any] = []
        body = b"".join(self._app(environ, lambda *given: said.extend(given)))
        status, headers = said[:2]
        # Both versions of ListObjects.
        if environ["REQUEST_METHOD"] == "GET" and "prefix=" in environ["QUERY_STRING"]:
            kept = self._listings.setdefault(environ["QUERY_STRING"], (status, headers, body))
            if not self.stale:
                kept = self._listings[environ["QUERY_STRING"]] = (status, headers, body)
            status, headers, body = kept
        elif environ["REQUEST_METHOD"] == "GET" and self.torn and self.torn in environ["PATH_INFO"]:
            body = body[: len(body) // 2]
        start_response(status, headers)
        return [body]


def _error(start_response: Callable[..., Any], status: str, code: str) -> list[bytes]:
    start_response(status, [("Content-Type", "application/xml")])
    return [f"<Error><Code>{code}</Code><Message>{status}</Message></Error>".encode()]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    credentials = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(credentials))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    # No retries: their waits are longer than the tests.
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    server = S3(credentials)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    _files().mkdir(BUCKET)
    yield server
    server.close()


def _files() -> Any:
    return _client(os.environ["AWS_ENDPOINT_URL"], Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).read_text())


@lru_cache(1)
def _client(url: str, credentials: str) -> Any:
    """A client takes long to make, and reads the credentials once."""
    import s3fs

    return s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)


def put(version: str, content: str) -> None:
    for name in FILES:
        _files().pipe_file(f"{BUCKET}/{version}/{name}", f"{name} {content}".encode() * 50)


@pytest.fixture
def mirror(s3: S3, tmp_path: Path) -> Mirror:
    return Mirror(f"s3://{BUCKET}", tmp_path / "mirror", 1 << 20)


def versions(tmp_path: Path) -> set[str]:
    return {f"{each.name}/{each.version}" for each in scan(tmp_path / "mirror")[0]}


Copy = Callable[[], bool]


@pytest.fixture(params=["fsspec", pytest.param("rclone", marks=needs_rclone)])
def copy(request: pytest.FixtureRequest, s3: S3, mirror: Mirror, tmp_path: Path) -> Copy:
    """Copies the bucket to the folder `mirror`; returns whether that succeeded."""

    def sync() -> bool:
        if request.param == "rclone":
            return rclone(s3, tmp_path / "mirror").returncode == 0
        try:
            mirror.sync()
        except MirrorError:
            return False
        return True

    return sync


def test_versions_come_change_and_go(copy: Copy, tmp_path: Path) -> None:
    put("a/1", "one")
    assert copy()
    assert versions(tmp_path) == {"a/1"}
    put("a/1", "other")
    put("a/2", "two")
    assert copy()
    assert (tmp_path / "mirror/a/1/adapter.json").read_text().startswith("adapter.json other")
    _files().rm(f"{BUCKET}/a/1", recursive=True)
    assert copy()
    assert versions(tmp_path) == {"a/2"}


def test_a_torn_object_is_not_taken_and_comes_later(s3: S3, mirror: Mirror, tmp_path: Path) -> None:
    put("a/1", "one")
    put("b/1", "one")
    s3.torn = "b/1/adapter.safetensors"
    mirror.sync()
    assert versions(tmp_path) == {"a/1"}
    s3.torn = ""
    mirror.sync()
    assert versions(tmp_path) == {"a/1", "b/1"}
    assert (tmp_path / "mirror/b/1/adapter.safetensors").stat().st_size == len(b"adapter.safetensors one") * 50


def test_a_listing_that_comes_late_shows_versions_late(s3: S3, copy: Copy, tmp_path: Path) -> None:
    put("a/1", "one")
    assert copy()
    s3.stale = True
    put("a/2", "two")
    assert copy()
    assert versions(tmp_path) == {"a/1"}
    s3.stale = False
    assert copy()
    assert versions(tmp_path) == {"a/1", "a/2"}


def test_a_version_removed_but_still_listed_leaves_with_the_listing(s3: S3, mirror: Mirror, tmp_path: Path) -> None:
    put("a/1", "one")
    put("a/2", "two")
    mirror.sync()
    s3.stale = True
    _files().rm(f"{BUCKET}/a/1", recursive=True)
    mirror.sync()
    assert versions(tmp_path) == {"a/1", "a/2"}
    s3.stale = False
    mirror.sync()
    assert versions(tmp_path) == {"a/2"}


def test_credentials_are_read_again_once_they_are_refused(s3: S3, mirror: Mirror, tmp_path: Path) -> None:
    put("a/1", "one")
    mirror.sync()
    s3.rotate("SECOND")
    put("a/2", "two")
    with pytest.raises(MirrorError):
        mirror.sync()
    assert versions(tmp_path) == {"a/1"}
    mirror.sync()
    assert versions(tmp_path) == {"a/1", "a/2"}


@needs_rclone
def test_rclone_keeps_what_it_has_until_it_gets_the_rotated_credentials(s3: S3, tmp_path: Path) -> None:
    """A pod's Secret is read when its container starts: the kubelet's restart brings the new one."""
    folder, old = tmp_path / "mirror", s3.key_id
    put("a/1", "one")
    assert rclone(s3, folder).returncode == 0
    s3.rotate("SECOND")
    put("a/2", "two")
    assert rclone(s3, folder, key_id=old).returncode != 0
    assert versions(tmp_path) == {"a/1"}
    assert rclone(s3, folder).returncode == 0
    assert versions(tmp_path) == {"a/1", "a/2"}


@pytest.mark.parametrize("how", ["slow down", "refused"])
def test_storage_that_is_away_removes_nothing(how: str, s3: S3, copy: Copy, tmp_path: Path) -> None:
    """For more than one poll, as when it is away for minutes."""
    put("a/1", "one")
    assert copy()
    s3.leave(how)
    for _ in range(2):
        assert not copy()
        assert versions(tmp_path) == {"a/1"}
    s3.come_back()
    put("a/2", "two")
    assert copy()
    assert versions(tmp_path) == {"a/1", "a/2"}


def rclone(s3: S3, folder: Path, key_id: str = "") -> "subprocess.CompletedProcess[str]":
    """The overlays' init container, without retries: S3's client waits before each."""
    component = manifests.FOLDER / "kubernetes" / "components" / "adapters-from-object-storage" / "deployment.yaml"
    (container,) = yaml.safe_load(component.read_text())["spec"]["template"]["spec"]["initContainers"]
    secret = {
        "ADAPTERS_BUCKET": BUCKET,
        "RCLONE_CONFIG_ADAPTERS_TYPE": "s3",
        "RCLONE_CONFIG_ADAPTERS_PROVIDER": "Other",
        "RCLONE_CONFIG_ADAPTERS_ENDPOINT": s3.url,
        "RCLONE_CONFIG_ADAPTERS_REGION": "us-east-1",
        "RCLONE_CONFIG_ADAPTERS_ACCESS_KEY_ID": key_id or s3.key_id,
        "RCLONE_CONFIG_ADAPTERS_SECRET_ACCESS_KEY": "secret",
    }
    arguments = [each.replace("$(ADAPTERS_BUCKET)", BUCKET) for each in container["args"]]
    arguments[arguments.index("/var/lib/mtlora/adapters")] = str(folder)
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder.parent), **secret}
    once = ["--low-level-retries=1", "--retries=1"]
    return subprocess.run(["rclone", *arguments, *once], env=environment, capture_output=True, text=True, timeout=120)


@needs_rclone
def test_rclone_copies_what_is_whole_and_fails_on_the_rest(s3: S3, tmp_path: Path) -> None:
    folder = tmp_path / "mirror"
    put("a/1", "one")
    done = rclone(s3, folder)
    assert done.returncode == 0, done.stderr
    assert versions(tmp_path) == {"a/1"}
    put("a/2", "two")
    s3.torn = "a/2/adapter.safetensors"
    assert rclone(s3, folder).returncode != 0
    assert not (folder / "a/2/adapter.safetensors").exists()
    assert all((folder / "a/1" / name).exists() for name in FILES)
    s3.torn = ""
    assert rclone(s3, folder).returncode == 0
    assert versions(tmp_path) == {"a/1", "a/2"}
