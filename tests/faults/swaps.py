"""Version swaps under load: no request fails, every answer is its version's, and tokens keep coming."""

import itertools
import time

from tests.faults._load import BackgroundLoad, failures, p99_gap_s
from tests.faults._server import shared
from tests.faults._swapping import Watcher, references, swap
from tests.faults.scenario import Options, Row

ORDER = 10
MAX_RATIO = 1.5


def run(options: Options) -> Row:
    """Steady load, then swaps one after another under the same load, then steady load again."""
    swaps = 100 if options.full else 10
    target = shared(options)
    # Enough steps for a 99th percentile.
    steady_s = max(60.0 if options.full else 10.0, 150 * target.pace.step_s)
    with target.server.client() as client, Watcher(client) as watcher:
        asked, expected = references(target, client, watcher, options.seed)
        # Its prompts are in the cache.
        swap(target, watcher)
        with BackgroundLoad(target.address, asked, seed=options.seed) as load:
            time.sleep(2 * target.pace.answer_s)
            marks = [time.monotonic()]
            time.sleep(steady_s)
            marks.append(time.monotonic())
            for _ in range(swaps):
                swap(target, watcher)
            marks.append(time.monotonic())
            time.sleep(steady_s)
            marks.append(time.monotonic())
    failed = failures(load.asked)
    wrong = expected.wrong(load.asked, target.content_of)
    for each in (*failed, *wrong)[:5]:
        print(f"swaps: {each.question}: {each.status} {each.detail} {each.version} {each.text!r}")
    gaps = [p99_gap_s(load.asked, since, until) for since, until in itertools.pairwise(marks)]
    steady, swapping = max(gaps[0], gaps[2]), gaps[1]
    seen = len({each.version for each in load.asked})
    return Row(
        f"{swaps} version swaps under load",
        f"0 failed or wrong, p99 inter-token latency at most {MAX_RATIO} x steady",
        f"{len(failed)} failed, {len(wrong)} wrong of {len(load.asked)} on {seen} versions, "
        f"{swapping * 1e3:.0f} / {steady * 1e3:.0f} ms = {swapping / steady:.2f}, "
        f"{(marks[2] - marks[1]) / swaps:.2f} s a swap",
        met=not failed and not wrong and swapping <= MAX_RATIO * steady,
    )
