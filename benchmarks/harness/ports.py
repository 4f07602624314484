"""Ports of this machine."""

import random
import socket

# Below the ports that Linux gives to outgoing connections (net.ipv4.ip_local_port_range): a connection could take one
# before the server starts, or while it restarts.
_PORTS = range(20_000, 32_768)
# Tests seed the module's own generator: two processes would choose the same ports.
_random = random.SystemRandom()


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    for port in _random.sample(_PORTS, len(_PORTS)):
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"no free port from {_PORTS.start} to {_PORTS.stop - 1}")
