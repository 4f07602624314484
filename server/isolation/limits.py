"""What a child process may take, and what it means when it took more."""

import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """Limits of a child.

    timeout_s: seconds of wall time, and of processor time. memory_bytes: address space in addition to that at its
    start. file_bytes: largest file that it may write. niceness: as for `os.nice`.
    """

    timeout_s: float
    memory_bytes: int = 2 << 30
    file_bytes: int = resource.RLIM_INFINITY
    niceness: int = 5

    def apply(self) -> None:
        """Limit this process."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + self.memory_bytes
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        seconds = max(1, int(self.timeout_s))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.file_bytes, self.file_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.nice(self.niceness)

    @property
    def too_much_memory(self) -> str:
        """Why a child failed that got no more memory."""
        return f"takes more than {self.memory_bytes >> 20} MiB of memory"

    @property
    def too_long(self) -> str:
        """Why a child failed that had not ended in time."""
        return f"not done within {self.timeout_s:g} s"

    def death(self, exit_code: int | None) -> str:
        """Why a child ended without a result."""
        if exit_code == -signal.SIGXCPU:
            return f"takes more than {self.timeout_s:g} s of a core"
        return f"ended the process that read it (exit status {exit_code})"
