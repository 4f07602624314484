"""Three servers with TLS that stop, start and die on ports of their own, and a balancer in front of them."""

import multiprocessing
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from benchmarks.harness.ports import free_port
from mtlora.client import Access, Client, MetricsPage
from server.cli.process import ServerProcess
from tests.faults._certificates import Issued, authority, issue
from tests.fleet.stand_in import stand_in

BALANCERS = Path(__file__).parents[2] / "deploy" / "balancers"
# In the servers' certificates.
SERVER_NAME = "mtlora.mtlora.svc"
_VARIABLE = re.compile(r"\$\{([A-Z_0-9]+)\}")


class Member:
    """A server that can be started anew on its port."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = {"port": free_port(), "metrics_port": free_port(), **settings}
        self.address = f"127.0.0.1:{self.settings['port']}"

    def start(self) -> None:
        """Begin to start it."""
        raise NotImplementedError

    def wait_ready(self) -> None:
        """Wait until it serves."""
        raise NotImplementedError

    def signal(self, number: int) -> None:
        """Send it a signal."""
        raise NotImplementedError

    def stop(self) -> None:
        """End it as SIGTERM does."""
        raise NotImplementedError

    def kill(self) -> None:
        """kill -9."""
        raise NotImplementedError

    def page(self) -> MetricsPage:
        return MetricsPage.fetch(f"127.0.0.1:{self.settings['metrics_port']}")

    def answered(self) -> float:
        """Calls answered since the start."""
        return self.page().value("mtlora_requests_total", status="OK")


class RealMember(Member):
    """The server itself, on an engine."""

    def start(self) -> None:
        self._server = ServerProcess(**self.settings, wait=False, timeout=300).__enter__()

    def wait_ready(self) -> None:
        self._server.wait_ready()

    def signal(self, number: int) -> None:
        self._server.process.send_signal(number)

    def stop(self) -> None:
        self._server.stop()

    def kill(self) -> None:
        self._server.kill()


class StandIn(Member):
    """A server without an engine. Its process is forked off one that has imported all: it serves at once."""

    def start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.fleet.stand_in"])
        self._ready, ready = context.Pipe(duplex=False)
        self._process = context.Process(target=stand_in, args=(self.settings, ready), daemon=True)
        self._process.start()

    def wait_ready(self) -> None:
        self._ready.recv()

    def signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def stop(self) -> None:
        self._process.terminate()
        self._process.join(60)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@dataclass
class Fleet:
    """The servers, and what clients need to reach them: through `address` all of them, in turn."""

    folder: Path
    members: list[Member]
    ca: Issued

    @cached_property
    def address(self) -> str:
        return "ipv4:" + ",".join(member.address for member in self.members)

    def access(self, key: str | None = None) -> Access:
        return Access(api_key=key, ca=self.ca.pem, server_name=SERVER_NAME)

    def client(self, address: str, key: str | None = None) -> Client:
        return Client(address, self.access(key), retry=None)


@contextmanager
def running_fleet(kind: type[Member], folder: Path, number: int = 3, **settings: Any) -> Iterator[Fleet]:
    """Start the servers one after the other, so that they share no cores while they start; kill them at the end."""
    ca = authority(folder)
    served = issue(ca, folder, SERVER_NAME)
    tls = {"tls_certificate": served.pem, "tls_key": served.key}
    members = [kind(tls | settings) for _ in range(number)]
    with ExitStack() as stack:
        for member in members:
            member.start()
            stack.callback(member.kill)
            member.wait_ready()
        yield Fleet(folder, members, ca)


class Balancer:
    """A balancer's process, of Debian's package, with its configuration of deploy/balancers."""

    def __init__(self, name: str, fleet: Fleet) -> None:
        self.name, self._fleet = name, fleet
        self.address = f"127.0.0.1:{free_port()}"
        shown = issue(fleet.ca, fleet.folder, f"{name}.example.com")
        both = fleet.folder / f"{name}.both.pem"
        both.write_bytes(shown.pem.read_bytes() + shown.key.read_bytes())
        self._variables = {
            "BIND": self.address,
            "CERTIFICATE": str(both),
            "CERTIFICATE_KEY": str(shown.key),
            "AUTHORITY": str(fleet.ca.pem),
            "SERVER_NAME": SERVER_NAME,
            **{f"SERVER_{number}": member.address for number, member in enumerate(fleet.members, 1)},
        }
        self._log = fleet.folder / f"{name}.log"

    def access(self, key: str | None = None) -> Access:
        return Access(api_key=key, ca=self._fleet.ca.pem, server_name=f"{self.name}.example.com")

    def __enter__(self) -> Self:
        command = self._haproxy() if self.name == "haproxy" else self._nginx()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env={**os.environ, **self._variables}, stdout=log, stderr=subprocess.STDOUT
            )
        until = time.monotonic() + 30
        with Client(self.address, self.access(), retry=None) as client:
            while not client.is_serving("mtlora.v1.Inference"):
                if self._process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(f"{self.name} does not serve:\n{self._log.read_text()[-2000:]}")
                time.sleep(0.1)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(60)

    def _haproxy(self) -> list[str]:
        return ["haproxy", "-db", "-f", str(BALANCERS / "haproxy.cfg")]

    def _nginx(self) -> list[str]:
        """Configure nginx like its image with `envsubst`, plus what a user without rights needs."""
        text = (BALANCERS / "nginx.conf.template").read_text()
        path = self._fleet.folder / "nginx.conf"
        path.write_text(_VARIABLE.sub(lambda found: self._variables[found[1]], text))
        globally = f"daemon off; pid {self._fleet.folder}/nginx.pid; error_log stderr;"
        return ["nginx", "-p", str(self._fleet.folder), "-c", str(path), "-g", globally]


def installed(name: str) -> bool:
    """Whether a balancer's program is there."""
    return shutil.which(name) is not None or Path("/usr/sbin", name).exists()
