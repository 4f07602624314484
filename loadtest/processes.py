"""The generators of a run: one in this process, or several processes that share every load evenly."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from loadtest.errors import LoadTestError
from loadtest.phase import Generator, Ran, Share
from loadtest.recorder import Recorder
from loadtest.settings import Load
from loadtest.workload import Request, Workload

# Until every process has its phase and waits for the common start.
_HEAD_START_S = 0.5
_POLL_S = 0.5
# Processes spawned import and draw their examples first.
_START_S = 120.0

Progress = Callable[["Seen"], None]


class Seen:
    """A running phase as far as it has gone, for the live view."""

    def __init__(self, recorder: Recorder | None, sent: int, ok: int, failed: int, in_flight: int) -> None:
        self.recorder = recorder
        self.sent, self.ok, self.failed, self.in_flight = sent, ok, failed, in_flight


class Generators(Protocol):
    """Runs phases; `run` returns one `Ran`, merged. `stop` ends the phase that runs."""

    workload: Workload

    async def run(self, load: Load, progress: Progress, requests: list[Request] | None = None) -> Ran: ...

    def stop(self) -> None: ...

    async def close(self) -> None: ...


class OneProcess:
    """The generator in this process."""

    def __init__(self, share: Share) -> None:
        self._generator = Generator(share)
        self.workload = self._generator.workload

    async def run(self, load: Load, progress: Progress, requests: list[Request] | None = None) -> Ran:
        watching = asyncio.create_task(self._watch(progress))
        try:
            return await self._generator.run(load, time.monotonic() + 0.05, requests)
        finally:
            watching.cancel()

    def stop(self) -> None:
        self._generator.stop()

    async def close(self) -> None:
        await self._generator.close()

    async def _watch(self, progress: Progress) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            if (recorder := self._generator.recorder) is not None:
                progress(_seen(recorder))


class SeveralProcesses:
    """A generator in each of several child processes, started and stopped together; their records are merged."""

    def __init__(self, share: Share, count: int) -> None:
        # Fails here, in one place, where a child would fail: same settings.
        self.workload = Workload(share.settings.workload, share.tasks, share.tenants)
        context = multiprocessing.get_context("spawn")
        self._children: list[Any] = []
        self._pipes: list[Any] = []
        self._stopping = False
        for index in range(count):
            ours, theirs = context.Pipe()
            child = context.Process(target=_child, args=(theirs, replace(share, index=index, count=count)), daemon=True)
            child.start()
            theirs.close()
            self._children.append(child)
            self._pipes.append(ours)
        for pipe in self._pipes:
            self._receive_ready(pipe)

    async def run(self, load: Load, progress: Progress, requests: list[Request] | None = None) -> Ran:
        self._stopping = False
        began = time.monotonic() + _HEAD_START_S
        for pipe in self._pipes:
            pipe.send(("run", load, began, requests))
        seen: list[Seen | None] = [None] * len(self._pipes)
        ran: list[Ran | None] = [None] * len(self._pipes)
        told = False
        while not all(ran):
            if self._stopping and not told:
                told = True
                for pipe in self._pipes:
                    pipe.send(("stop",))
            for i, pipe in enumerate(self._pipes):
                while ran[i] is None and pipe.poll():
                    kind, value = self._receive(pipe)
                    if kind == "ran":
                        ran[i] = value
                    else:
                        seen[i] = Seen(None, *value)
            progress(_sum(seen))
            await asyncio.sleep(_POLL_S / 5)
        return _merge([each for each in ran if each is not None])

    def stop(self) -> None:
        self._stopping = True

    async def close(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(("close",))
        for child in self._children:
            child.join(5)
            if child.is_alive():
                child.kill()

    def _receive_ready(self, pipe: Any) -> None:
        if not pipe.poll(_START_S):
            raise LoadTestError(f"a generator process was not ready after {_START_S:g} s")
        kind, value = self._receive(pipe)
        if kind != "ready":
            raise LoadTestError(str(value))

    def _receive(self, pipe: Any) -> tuple[str, Any]:
        try:
            kind, value = pipe.recv()
        except EOFError:
            raise LoadTestError("a generator process ended before its time") from None
        if kind == "failed":
            raise LoadTestError(str(value))
        return kind, value


def start(share: Share) -> Generators:
    """As many processes as the settings ask for. Raises LoadTestError where the workload cannot be drawn."""
    count = share.settings.processes
    return OneProcess(share) if count == 1 else SeveralProcesses(share, count)


def _child(pipe: Any, share: Share) -> None:
    # Ctrl-C reaches every process of a terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(_serve(pipe, share))
    except LoadTestError as error:
        pipe.send(("failed", str(error)))
    except (EOFError, BrokenPipeError):
        # The parent has gone.
        os._exit(1)


async def _serve(pipe: Any, share: Share) -> None:
    generator = Generator(share)
    loop = asyncio.get_running_loop()
    commands: asyncio.Queue[Any] = asyncio.Queue()

    def read() -> None:
        while True:
            try:
                command = pipe.recv()
            except (EOFError, OSError):
                command = ("close",)
            if command[0] in ("stop", "close"):
                loop.call_soon_threadsafe(generator.stop)
            if command[0] != "stop":
                loop.call_soon_threadsafe(commands.put_nowait, command)
            if command[0] == "close":
                return

    threading.Thread(target=read, daemon=True).start()
    pipe.send(("ready", None))
    while (command := await commands.get())[0] == "run":
        _, load, began, requests = command
        running = asyncio.create_task(generator.run(load, began, requests))
        while not (await asyncio.wait({running}, timeout=_POLL_S))[0]:
            if generator.recorder is not None:
                seen = _seen(generator.recorder)
                pipe.send(("seen", (seen.sent, seen.ok, seen.failed, seen.in_flight)))
        pipe.send(("ran", running.result()))
    await generator.close()


def _seen(recorder: Recorder) -> Seen:
    everything = recorder.everything
    ended = sum(everything.statuses.values())
    return Seen(recorder, everything.offered, everything.ok, ended - everything.ok, recorder.in_flight)


def _sum(seen: list[Seen | None]) -> Seen:
    have = [each for each in seen if each is not None]
    return Seen(
        None, sum(s.sent for s in have), sum(s.ok for s in have), sum(s.failed for s in have),
        sum(s.in_flight for s in have),
    )  # fmt: skip


def _merge(ran: list[Ran]) -> Ran:
    first, *others = ran
    for other in others:
        first.recorder.merge(other.recorder)
    return Ran(
        first.recorder, sum(each.cpu_s for each in ran), max(each.wall_s for each in ran),
        any(each.gone for each in ran), any(each.stopped for each in ran),
    )  # fmt: skip
