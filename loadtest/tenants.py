"""The tenants that send requests: names and API keys from a file."""

from dataclasses import dataclass
from pathlib import Path

from loadtest import LoadTestError
from loadtest.trace import read_lines


@dataclass(frozen=True, slots=True)
class Tenant:
    """A tenant of the server. Requests carry its key, if it has one."""

    name: str
    key: str | None = None

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self.key}"),) if self.key else ()


ANONYMOUS = Tenant("anonymous")


def read_tenants(path: Path) -> list[Tenant]:
    """Read lines of `NAME KEY`; skip blank lines and those that begin with #. Raises LoadTestError naming the line."""
    tenants: dict[str, Tenant] = {}
    for number, line in enumerate(read_lines(path), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        # Keys are secret: the message must not repeat the line.
        if len(words) != 2 or not words[1].isascii() or not words[1].isprintable():
            raise LoadTestError(f"{path}: line {number}: expected NAME KEY, found {len(words)} words")
        if words[0] in tenants:
            raise LoadTestError(f"{path}: line {number}: tenant {words[0]!r} is there already")
        tenants[words[0]] = Tenant(*words)
    if not tenants:
        raise LoadTestError(f"{path}: no tenant in it; a line is NAME KEY")
    return list(tenants.values())
