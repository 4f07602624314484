"""The memory of an engine on a CPU."""

import os


def memory_environment() -> dict[str, str]:
    """Environment variables of a process that will run an engine on a CPU. A value that is set already stays.

    glibc then asks the kernel for huge pages, and the weights lie in them.
    """
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
