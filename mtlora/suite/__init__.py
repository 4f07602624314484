"""Task suites: the built-in one, or a folder of files in the layout of BIG-Bench Hard. Needs no torch."""

from pathlib import Path

from mtlora.suite.base import SPLITS, Example, Split, Suite, SuiteError, split_of
from mtlora.suite.bbh import FolderSuite
from mtlora.suite.builtin import BuiltinSuite, builtin_suite

__all__ = ["SPLITS", "BuiltinSuite", "Example", "FolderSuite", "Split", "Suite", "SuiteError", "load_suite", "split_of"]


def load_suite(name_or_path: str) -> Suite:
    """The suite called `builtin`, or the one in a folder. (A folder of that name is `./builtin`.)"""
    if name_or_path == "builtin":
        return builtin_suite()
    if not name_or_path or not Path(name_or_path).is_dir():
        raise SuiteError(
            f"no suite {name_or_path!r}: allowed are builtin, or the path of a folder of JSON files in the layout of "
            "BIG-Bench Hard"
        )
    return FolderSuite(name_or_path)
