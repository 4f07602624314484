"""Task suites: built-in, a folder of files like BIG-Bench Hard's, inputs generated like its, or a mix. No torch."""

from collections.abc import Sequence
from pathlib import Path

from mtlora.suite.base import SPLITS, Example, Split, Suite, SuiteError, split_of, up_to
from mtlora.suite.bbh_generated import GeneratedBBHSuite
from mtlora.suite.builtin import BuiltinSuite
from mtlora.suite.documents import DocumentsSuite
from mtlora.suite.folder import FolderSuite
from mtlora.suite.mix import MixedSuite, SuitePart

__all__ = [
    "SPLITS",
    "BuiltinSuite",
    "DocumentsSuite",
    "Example",
    "FolderSuite",
    "GeneratedBBHSuite",
    "MixedSuite",
    "Split",
    "Suite",
    "SuiteError",
    "SuitePart",
    "load_suite",
    "split_of",
    "up_to",
]


def load_suite(name_or_path: str | Sequence[SuitePart]) -> Suite:
    """The suite called `builtin`, `bbh-generated` or `documents`, the one in a folder, or a mix of parts.

    Write `./builtin` for a folder of that name.
    """
    if not isinstance(name_or_path, str):
        return MixedSuite([(part, load_suite(part.suite)) for part in name_or_path])
    if name_or_path == "builtin":
        return BuiltinSuite()
    if name_or_path == "bbh-generated":
        return GeneratedBBHSuite()
    if name_or_path == "documents":
        return DocumentsSuite()
    if name_or_path == "builtin-vision":
        # Drawing needs packages that text does not.
        from mtlora.suite.vision.builtin import VisionSuite

        return VisionSuite()
    if not name_or_path or not Path(name_or_path).is_dir():
        raise SuiteError(
            f"no suite {name_or_path!r}: allowed are builtin, bbh-generated, documents, or the path of a folder of "
            "JSON files in the layout of BIG-Bench Hard"
        )
    return FolderSuite(name_or_path)
