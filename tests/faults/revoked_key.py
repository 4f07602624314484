"""A tenants file is broken in ten ways; after each, a good file that revokes a key takes effect at once."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.tenants import tenant, write_tenants
from benchmarks.harness.waiting import wait_until
from mtlora.client import Access, Client, MetricsPage
from tests.faults._load import BackgroundLoad, failures, questions
from tests.faults._tenanted import accepted, tenanted
from tests.faults.scenario import Options, Row

ORDER = 59
# The server looks at the file once a second.
_POLL_S = 1.0
MAX_POLLS = 5
# A refused file is counted; a watcher that ended counts nothing.
_NOTICED_POLLS = 5

Entries = list[dict[str, Any]]
Break = Callable[[Path, Entries], None]


def _text(make: Callable[[Entries], str | bytes]) -> Break:
    def write(path: Path, entries: Entries) -> None:
        content = make(entries)
        fresh = path.with_suffix(".new")
        fresh.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(fresh, path)

    return write


def _yaml(entries: Entries, **changes: Any) -> str:
    """A tenants file; JSON is YAML too. `changes` are made to the last tenant."""
    return json.dumps({"tenants": [*entries[:-1], entries[-1] | changes]})


def _without_permission(path: Path, entries: Entries) -> None:
    # Root ignores file permissions, so make the content invalid too.
    _text(lambda _: "tenants: no")(path, entries)
    path.chmod(0)


def _folder(path: Path, entries: Entries) -> None:
    path.unlink()
    path.mkdir()


def _dangling_link(path: Path, entries: Entries) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


WAYS: dict[str, Break] = {
    "invalid YAML": _text(lambda entries: _yaml(entries)[:-3] + "\n\t: ["),
    "wrong types": _text(lambda entries: _yaml(entries, weight=["heavy"], tasks=7)),
    "no such date": _text(lambda entries: _yaml(entries)[:-1] + ', "expires": 2026-02-30}'),
    "binary": _text(lambda _: bytes(range(256)) * 64),
    "huge": _text(lambda entries: _yaml(entries) + "\n#" + "x" * (17 << 20)),
    "empty": _text(lambda _: ""),
    "permission denied": _without_permission,
    "a folder in its place": _folder,
    "a dangling link": _dangling_link,
    "duplicate ids": _text(lambda entries: _yaml([*entries, entries[-1]])),
}


def run(options: Options) -> Row:
    """One tenant has a key for each way, and loses one after each. Another one asks in a closed loop meanwhile."""
    server = tenanted(options)
    steady_key, steady = tenant("steady")
    made = {way: tenant("revoked") for way in WAYS}
    kept_key, kept = tenant("revoked")
    kept["api_keys"] += [entry["api_keys"][0] for _, entry in made.values()]
    entries = [steady, kept]
    server.pace  # noqa: B018
    write_tenants(server.file, *entries)
    access = Access(api_key=steady_key)
    server.wait_accepted(access)
    slowest, alive, unnoticed = 0.0, [], []
    with Client(server.address, access) as client:
        asked = questions(client, 16, options.seed)
    with BackgroundLoad(server.address, asked, seed=options.seed, in_flight=4, access=access) as load:
        for way, break_file in WAYS.items():
            key, entry = made[way]
            refused = _refused(server.server.metrics)
            with Client(server.address, Access(api_key=key)) as revoked:
                # The server then has verified the key and caches it.
                if not accepted(revoked):
                    raise RuntimeError(f"{way}: the key is refused before it is revoked")
                break_file(server.file, entries)
                if _wait(lambda: _refused(server.server.metrics) > refused, _NOTICED_POLLS) is None:  # noqa: B023
                    unnoticed.append(way)
                kept["api_keys"].remove(entry["api_keys"][0])
                if server.file.is_dir() and not server.file.is_symlink():
                    server.file.rmdir()
                write_tenants(server.file, *entries)
                seconds = _wait(lambda: not accepted(revoked), MAX_POLLS)
            if seconds is None:
                alive.append(way)
            else:
                slowest = max(slowest, seconds)
    with Client(server.address, Access(api_key=kept_key)) as client:
        others = accepted(client)
    failed = failures(load.asked)
    for each in failed[:5]:
        print(f"revoked_key: {each.question}: {each.status} {each.detail}")
    return Row(
        f"revoked key after a broken file, {len(WAYS)} ways",
        f"every broken file refused, the key within {MAX_POLLS} looks at the file; no request of another tenant fails",
        f"{slowest:.1f} s, the slowest of {len(WAYS) - len(alive)}"
        + (f"; still accepted after: {', '.join(alive)}" if alive else "")
        + (f"; broken, and not refused: {', '.join(unnoticed)}" if unnoticed else "")
        + f"; {len(failed)} of {len(load.asked)} requests failed"
        + ("" if others else "; a key that was kept is refused"),
        met=not alive and not unnoticed and not failed and others,
    )


def _refused(metrics: str) -> float:
    return MetricsPage.fetch(metrics).value("mtlora_tenants_reload_failures_total")


def _wait(condition: Callable[[], bool], polls: int) -> float | None:
    """Seconds until a condition holds; None if that takes more than some looks of the server at its file."""
    began = time.monotonic()
    try:
        wait_until(condition, polls * _POLL_S, every_s=0.1)
    except TimeoutError:
        return None
    return time.monotonic() - began
