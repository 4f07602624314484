"""Steps that wait for the request that follows an answer, on the real engine."""

import threading
from random import Random

from server.cli.process import ServerProcess
from tests.server.helpers import eventually
from tests.server.test_serving import metrics

WORDS = ["apple", "river", "stone", "cloud", "tiger", "lemon", "piano", "garden", "window", "candle"]


def test_clients_that_ask_one_thing_after_another_find_a_step_held_up_for_them(server: ServerProcess) -> None:
    """Each answer takes a long step of a prompt and a short one, so that the two clients' steps alternate."""
    done = threading.Event()
    failures: list[Exception] = []

    def ask(seed: int) -> None:
        random = Random(seed)
        try:
            with server.client() as client:
                while not done.is_set():
                    client.generate("echo", " ".join(random.choices(WORDS, k=300)), max_new_tokens=3, stop=[])
        except Exception as error:
            failures.append(error)

    def followed() -> float:
        return metrics(server)["mtlora_engine_anticipated_requests_total"]

    before = followed()
    clients = [threading.Thread(target=ask, args=(seed,)) for seed in range(2)]
    for client in clients:
        client.start()
    try:
        eventually(lambda: bool(failures) or followed() > before, timeout=90)
    finally:
        done.set()
        for client in clients:
            client.join()
    assert not failures
