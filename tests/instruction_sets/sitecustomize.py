"""Masks instruction sets in every Python process of a test run: `make test ISA=avx2`, or avx512, avx512_bf16.

Our kernels, torch, oneDNN and MKL read environment variables, which the Makefile sets. vLLM asks `torch.cpu`, whose
answers are masked here, as soon as that module is imported: Python imports this file at its start, from PYTHONPATH.
"""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

# Functions and capabilities of `torch.cpu` to deny, by the mask's name.
_HIDDEN_BY = {
    "avx2": ("avx512", "avx10", "amx"),
    "avx512": ("avx512_bf16", "avx512_fp16", "avx10", "amx"),
    "avx512_bf16": ("amx",),
}


def mask(module: Any, hidden: Sequence[str]) -> None:
    """Make `torch.cpu` deny instruction sets with these prefixes."""
    for name in vars(module).copy():
        if name.startswith(tuple(f"_is_{each}" for each in hidden)):
            setattr(module, name, lambda: False)
    asked: Callable[[], dict[str, Any]] = module.get_capabilities
    module.get_capabilities = lambda: {
        name: value and not name.startswith(tuple(hidden)) if isinstance(value, bool) else value
        for name, value in asked().items()
    }


class _Finder:
    """Finds `torch.cpu` as before, and masks it once it has run."""

    @staticmethod
    def find_spec(name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch.cpu" or (spec := importlib.machinery.PathFinder.find_spec(name, path, target)) is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            mask(module, _HIDDEN_BY[os.environ["MTLORA_ISA"]])

        loader.exec_module = exec_module
        return spec


def _run_the_next() -> None:
    """This file hides another sitecustomize.py on the path, so run that one too."""
    here = os.path.dirname(__file__)
    others = [folder for folder in sys.path if os.path.abspath(folder or ".") != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("MTLORA_ISA"):
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
_run_the_next()
