"""Task suites: built-in, of text or images, files of published forms, or a mix. No torch."""

import os
from collections.abc import Sequence
from pathlib import Path

from mtlora.suite.base import SPLITS, Example, Split, Suite, SuiteError, split_of, up_to
from mtlora.suite.bbh_generated import GeneratedBBHSuite
from mtlora.suite.builtin import BuiltinSuite
from mtlora.suite.documents import DocumentsSuite
from mtlora.suite.folder import FolderSuite, has_texts
from mtlora.suite.instructions import InstructionSuite
from mtlora.suite.mix import MixedSuite, SuitePart
from mtlora.suite.mmlu import MMLUSuite, is_mmlu_folder

__all__ = [
    "BUILT_IN",
    "SPLITS",
    "BuiltinSuite",
    "DocumentsSuite",
    "Example",
    "FolderSuite",
    "GeneratedBBHSuite",
    "InstructionSuite",
    "MMLUSuite",
    "MixedSuite",
    "Split",
    "Suite",
    "SuiteError",
    "SuitePart",
    "load_suite",
    "split_of",
    "up_to",
]

BUILT_IN = (
    "builtin",
    "bbh-generated",
    "documents",
    "builtin-vision",
    "builtin-pictures",
    "packaged-vision",
    "vision-maps-N",
)

_FOLDERS = (
    "a folder of JSON files in the layout of BIG-Bench Hard, of MMLU's CSV files or of images, or a file of JSON lines"
)


def load_suite(name_or_path: str | Sequence[SuitePart]) -> Suite:
    """The suite of a name in `BUILT_IN`, the one in a folder or a file, or a mix of parts.

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
        # Import here: drawing needs packages that text suites do not need.
        from mtlora.suite.vision.builtin import VisionSuite

        return VisionSuite()
    if name_or_path == "builtin-pictures":
        from mtlora.suite.vision.pictures import PicturesSuite

        return PicturesSuite()
    if name_or_path == "packaged-vision":
        from mtlora.suite.vision.packaged import PackagedSuite

        return PackagedSuite()
    if name_or_path.startswith("vision-maps-"):
        from mtlora.suite.vision.maps import LabelMapSuite

        return LabelMapSuite(name_or_path)
    path = Path(name_or_path)
    # `Path.is_file` raises for a name too long.
    if os.path.isfile(path):
        return InstructionSuite(path)
    if not name_or_path or not os.path.isdir(path):
        raise SuiteError(f"suite: found {name_or_path!r}; allowed: {', '.join(BUILT_IN)}, {_FOLDERS}")
    return _of_folder(path)


def _of_folder(folder: Path) -> Suite:
    if is_mmlu_folder(folder):
        return MMLUSuite(folder)
    # Texts may have images beside them, and images JSON files.
    if not (folder / "manifest.jsonl").exists() and has_texts(folder):
        return FolderSuite(folder)
    # Import here: images need packages that text suites do not need.
    from mtlora.suite.vision.folder import ImageFolderSuite, is_image_folder
    from mtlora.suite.vision.layout import LAYOUTS, READ, found_in

    if is_image_folder(folder):
        return ImageFolderSuite(folder)
    if any(folder.glob("*.json")):
        return FolderSuite(folder)
    raise SuiteError(f"{folder}: {found_in(folder)}; allowed: {_FOLDERS}. Of images the layouts are {LAYOUTS}; {READ}")
