"""No passage stands twice in the code, but for those listed here."""

from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("mtlora", "server", "loadtest", "benchmarks", "deploy", "docs")
LINES = 6
# Files that share a passage, and why no third place holds it.
REASONS = {
    ("mtlora/client/async_client.py", "mtlora/client/client.py"): "one awaits where the other blocks",
    ("mtlora/client/calls.py",): "public signatures: `analyze` and `analyze_all` take the same arguments",
    ("mtlora/client/method.py",): "overloads: the two kinds of method differ in their types alone",
    ("mtlora/model/language.py",): "public signatures: logits are made of the states of the same arguments",
    ("mtlora/ops/reference.py", "mtlora/ops/training.py"): "the reference takes what the operator takes",
}


def passages() -> dict[tuple[str, ...], list[str]]:
    """By the files that share them: the first line of each passage that stands twice.

    Indentation, blank lines, comments and imports do not count.
    """
    places: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            stripped = (line.strip() for line in file.read_text().splitlines())
            lines = [line for line in stripped if line and not line.startswith(("#", "import ", "from "))]
            for first in range(len(lines) - LINES + 1):
                places[tuple(lines[first : first + LINES])].append(str(file.relative_to(ROOT)))
    shared: defaultdict[tuple[str, ...], list[str]] = defaultdict(list)
    for lines_, files in places.items():
        if len(files) > 1:
            shared[tuple(sorted(set(files)))].append(lines_[0])
    return shared


def test_passages_that_stand_twice_have_a_reason() -> None:
    """A passage is six lines. A reason without a passage is out of date."""
    assert passages().keys() == REASONS.keys(), passages()
