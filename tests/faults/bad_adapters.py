"""Bad adapters of every kind, published under load: all are refused, and no request is affected."""

import random
import shutil
import time

from mtlora_pb.v1 import adapters_pb2

from tests.faults._bad_files import KINDS
from tests.faults._load import BackgroundLoad, failures
from tests.faults._server import shared
from tests.faults._swapping import FAILED, SERVING, Watcher, references, swap
from tests.faults.scenario import Options, Row

ORDER = 12
FULL_TIMES, SHORT_TIMES = 20, 2
_END = {SERVING, FAILED, adapters_pb2.ADAPTER_STAGE_VANISHED}
# The server says nothing about a version that vanishes before the server sees it.
_WAIT_S = {"vanishing": 5.0}


def run(options: Options) -> Row:
    """Each bad version is the highest of the adapter under load, so the server tries to serve it at once."""
    target = shared(options)
    rng = random.Random(options.seed)
    times = FULL_TIMES if options.full else SHORT_TIMES
    problems: list[str] = []
    with target.server.client() as client, Watcher(client) as watcher:
        asked, expected = references(target, client, watcher, options.seed)
        engine = {process.pid for process in target.engine_processes()}
        with BackgroundLoad(target.address, asked, seed=options.seed) as load:
            for kind, write in rng.sample([*KINDS.items()] * times, len(KINDS) * times):
                version, content = target.next_version()
                folder = target.root / target.name / version
                # Publish by a rename, so that the server does not see the healthy copy before it is damaged.
                hidden = folder.with_name(f".{version}")
                write(content, hidden, rng)
                hidden.rename(folder)
                if kind == "vanishing":
                    time.sleep(rng.random() * 0.4)
                    shutil.rmtree(folder)
                try:
                    event = watcher.wait(version, _END, _WAIT_S.get(kind, 60.0))
                    if event.stage == SERVING and kind != "vanishing":
                        problems.append(f"{kind}: version {version} came to serve")
                except TimeoutError as error:
                    if kind != "vanishing":
                        problems.append(f"{kind}: {error}; the server's log ends in {target.server.log()[-1000:]}")
                if folder.is_symlink():
                    folder.unlink()
                else:
                    shutil.rmtree(folder, ignore_errors=True)
            swap(target, watcher)
        up = engine == {process.pid for process in target.engine_processes()} and client.is_serving()
    failed, wrong = failures(load.asked), expected.wrong(load.asked, target.content_of)
    problems += [f"{each.question}: {each.status} {each.detail} {each.version}" for each in (*failed, *wrong)]
    for problem in problems[:8]:
        print(f"bad_adapters: {problem}")
    return Row(
        f"{len(KINDS)} kinds of bad adapters, {times} times each",
        "0 other requests affected, none served, the engine stays up",
        f"{len(failed) + len(wrong)} of {len(load.asked)} requests affected, "
        f"{len(problems) - len(failed) - len(wrong)} adapters not refused, engine {'up' if up else 'lost'}",
        met=not problems and up,
    )
