"""`kill -9` of the engine under load: health reports it at once, the engine restarts, no request hangs."""

import random
import time

from benchmarks.harness.waiting import wait_until
from mtlora.client import Client
from tests.faults._load import BackgroundLoad, questions
from tests.faults._server import Target, shared
from tests.faults.scenario import Options, Row

ORDER = 15
MAX_UNHEALTHY_AFTER_S = 2.0
# A multiple of the time that the server took to start, without load.
MAX_STARTS = 2.0
# A request in flight at the kill must end within this time: it ends with the engine, and takes no step.
_MAX_END_S = 10.0
_GIVE_UP_STARTS = 10


def run(options: Options) -> Row:
    """Kill the engine's core or its worker, chosen at random, under constant load."""
    target = shared(options)
    rng = random.Random(options.seed)
    kills = 10 if options.full else 2
    unhealthy, serving, kill_times = [], [], []
    max_serving_s = MAX_STARTS * target.server.start_seconds
    with target.server.client() as client:
        asked = questions(client, 16, options.seed)
        with BackgroundLoad(target.address, asked, seed=options.seed) as load:
            for _ in range(kills):
                time.sleep(max(1.0, target.pace.answer_s))
                kill_times.append(time.monotonic())
                down, up = _kill(target, client, rng)
                unhealthy.append(down)
                serving.append(up)
                _wait_for_an_answer(load, 10 * target.pace.answer_s)
    in_flight = [e for t in kill_times for e in load.asked if e.began < t and (not e.ended or e.ended > t)]
    hung = [each for each in load.asked if not each.status]
    late = [e for t in kill_times for e in in_flight if e.began < t < e.ended and e.ended > t + _MAX_END_S]
    others = [each for each in load.asked if each.status not in ("OK", "UNAVAILABLE", "")]
    for each in (*hung, *late, *others)[:5]:
        print(f"engine_kill: {each.question}: {each.status} {each.detail} {each.ended - each.began:.1f} s")
    met = (
        max(unhealthy) <= MAX_UNHEALTHY_AFTER_S
        and max(serving) <= max_serving_s
        and not hung
        and not late
        and not others
    )
    return Row(
        f"kill -9 of the engine, {kills} times",
        f"health right within {MAX_UNHEALTHY_AFTER_S:g} s, serving within {MAX_STARTS:g} starts of "
        f"the server, {max_serving_s:.0f} s, every request ends in an answer or UNAVAILABLE",
        f"{max(unhealthy):.2f} s, {max(serving):.0f} s, {len(hung) + len(late)} hung, {len(others)} other statuses; "
        f"{len(in_flight)} were in flight",
        met=met,
    )


def _wait_for_an_answer(load: BackgroundLoad, timeout_s: float) -> None:
    def answers() -> int:
        return sum(each.status == "OK" for each in load.asked)

    before = answers()
    wait_until(lambda: answers() > before, max(30.0, timeout_s))


def _kill(target: Target, client: Client, rng: random.Random) -> tuple[float, float]:
    """Kill; returns seconds until health reports it, and until the server serves again."""
    rng.choice(target.engine_processes()).kill()
    began = time.monotonic()
    wait_until(lambda: not client.is_serving(), 30)
    down = time.monotonic() - began
    wait_until(client.is_serving, _GIVE_UP_STARTS * target.server.start_seconds)
    return down, time.monotonic() - began
