"""The memory of an engine on a CPU."""

import os


def memory_environment() -> dict[str, str]:
    """Environment variables of a process that will run an engine on a CPU. A value that is set already stays.

    They make glibc use huge pages, so the weights are in huge pages.
    """
    return {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
