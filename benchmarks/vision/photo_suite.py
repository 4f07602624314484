"""A suite of real images in folders, 15 or 25 tasks, from a set of clothing photographs and Omniglot's alphabets.

Clothing: all ten classes as one task, and groups of classes that are hard to tell apart. Omniglot: an alphabet is a
task, a character a class; the last five of its twenty drawings are the test.

    python -m benchmarks.vision.photo_suite --clothing DIR --omniglot DIR --tasks 15 --out DIR
"""

import argparse
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Photographs of a class that train; the test takes all there are.
_TRAIN = 60
_DRAWINGS, _TEST_DRAWINGS = 20, 5
_ALPHABETS = (
    "Greek", "Early_Aramaic", "Balinese", "Tagalog", "Latin", "Sanskrit", "Korean", "Japanese_(katakana)",
)  # fmt: skip
# The first ones are the smaller suite's.
_GROUPS = (
    "dress hat longsleeve outwear pants shirt shoes shorts skirt t-shirt",
    "shirt t-shirt", "longsleeve outwear", "longsleeve shirt", "dress skirt", "pants shorts", "shorts skirt",
    "longsleeve outwear shirt t-shirt", "pants shorts skirt", "dress outwear shirt",
    "longsleeve t-shirt", "outwear shirt", "dress longsleeve", "dress t-shirt", "pants skirt", "hat shoes",
    "dress longsleeve outwear skirt",
)  # fmt: skip
# Number of tasks: groups of clothing and alphabets.
SIZES = {15: (10, 5), 25: (17, 8)}


def write_suite(clothing: Path, omniglot: Path, tasks: int, out: Path) -> None:
    """Write the suite; photographs are links."""
    groups, alphabets = SIZES[tasks]
    for group in _GROUPS[:groups]:
        classes = group.split()
        task = out / ("clothing" if len(classes) == 10 else "-or-".join(classes))
        for label in classes:
            for split, count in (("train", _TRAIN), ("test", None)):
                for photograph in sorted((clothing / split / label).iterdir())[:count]:
                    path = task / split / label / photograph.name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.symlink_to(photograph.resolve())
    drawings = dict(_drawings(omniglot))
    for alphabet in _ALPHABETS[:alphabets]:
        task = out / alphabet.lower().replace("(", "").replace(")", "")
        for (of, character, drawing), content in drawings.items():
            if of == alphabet:
                split = "test" if drawing > _DRAWINGS - _TEST_DRAWINGS else "train"
                path = task / split / character / f"{drawing:02}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        # A character mirrored, or in another colour, is another one or none.
        (task / "task.json").write_text(json.dumps({"image": {"augment": ["crop"]}}))


def _drawings(omniglot: Path) -> Iterator[tuple[tuple[str, str, int], bytes]]:
    """(alphabet, character, drawing) and its PNG; files are named CLASS_DRAWING.png."""
    for file in sorted(omniglot.glob("*.zip")):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if name.endswith(".png"):
                    _, alphabet, character, drawing = Path(name).parts
                    yield (alphabet, character, int(Path(drawing).stem.split("_")[1])), archive.read(name)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clothing", type=Path, required=True, metavar="DIR", help="{train,test}/class/*.jpg")
    parser.add_argument("--omniglot", type=Path, required=True, metavar="DIR", help="its zip files")
    parser.add_argument("--tasks", type=int, choices=tuple(SIZES), default=15)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    args = parser.parse_args()
    write_suite(args.clothing, args.omniglot, args.tasks, args.out)


if __name__ == "__main__":
    main()
