"""An hour at 80 % load with version swaps: memory does not grow, and no request fails.

Another length: `python -m tests.faults.soak --minutes 10`.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.harness.processes import resident_bytes
from tests.faults._load import BackgroundLoad, ask_many_lengths, failures
from tests.faults._server import Target, shared
from tests.faults._swapping import Watcher, references, swap
from tests.faults.scenario import Options, Row

ORDER = 14
FULL_S, SHORT_S = 3600.0, 40.0
SWAP_EVERY_S, SHORT_SWAP_EVERY_S = 30.0, 5.0
SHARE = 0.8
MAX_GROWTH = 0.02
_SAMPLES = 5


def run(options: Options) -> Row:
    """Soak for an hour, in the short form for 40 s."""
    return soak(options, FULL_S if options.full else SHORT_S, SWAP_EVERY_S if options.full else SHORT_SWAP_EVERY_S)


def soak(options: Options, seconds: float, swap_every_s: float) -> Row:
    """Compare memory with that after a warm-up under the same load, a quarter as long, at most 2 minutes."""
    target = shared(options)
    with target.server.client() as client, Watcher(client) as watcher:
        asked, expected = references(target, client, watcher, options.seed)
        ask_many_lengths(client)
        with BackgroundLoad(target.address, asked, seed=options.seed) as full:
            time.sleep(max(8.0, 5 * target.pace.answer_s))
        span = full.asked[-1].ended - full.asked[0].began
        rate = SHARE * len(full.asked) / span
        with BackgroundLoad(target.address, asked, seed=options.seed + 1, rate=rate) as load:
            _swapping(target, watcher, min(seconds / 4, 120.0), swap_every_s)
            before = _resident(target)
            swaps = _swapping(target, watcher, seconds, swap_every_s)
            after = _resident(target)
    failed, wrong = failures(load.asked), expected.wrong(load.asked, target.content_of)
    for each in (*failed, *wrong)[:5]:
        print(f"soak: {each.question}: {each.status} {each.detail} {each.version} {each.text!r}")
    growth = after / before - 1
    return Row(
        f"soak of {seconds / 60:g} min at {SHARE:.0%} load, {swaps} swaps",
        f"resident memory grows less than {MAX_GROWTH:.0%}, no error",
        f"{growth:+.2%} of {before / (1 << 30):.2f} GiB, {len(failed) + len(wrong)} errors in {len(load.asked)} "
        f"requests at {rate:.1f}/s",
        met=growth < MAX_GROWTH and not failed and not wrong,
    )


def _swapping(target: Target, watcher: Watcher, seconds: float, every_s: float) -> int:
    until, swaps = time.monotonic() + seconds, 0
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(every_s, left))
        swap(target, watcher)
        swaps += 1
    return swaps


def _resident(target: Target) -> float:
    """Resident bytes of the server's processes, the median over some seconds."""
    samples = []
    for _ in range(_SAMPLES):
        samples.append(resident_bytes(target.server.process.pid))
        time.sleep(0.5)
    return statistics.median(samples)


def main() -> int:
    """Soak for some minutes. Returns 0 if the goal is met."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--backbone", default="default")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options = Options(arguments.backbone, arguments.adapters.resolve(), Path(folder), arguments.seed, full=True)
        row = soak(options, arguments.minutes * 60, SWAP_EVERY_S)
    print(f"{row.name}: {'met' if row.met else 'MISSED'}: {row.figure} (goal: {row.goal})")
    return 0 if row.met else 1


if __name__ == "__main__":
    sys.exit(main())
