"""`mtlora seams`: check in a vLLM release's sources which of the plugin's seams it has."""

import argparse
from pathlib import Path
from typing import Any

from mtlora.cli.output import print_table


def add_parser(subparsers: Any) -> None:
    """Add the command `seams`."""
    seams = subparsers.add_parser(
        "seams",
        help="say which seams of the plugin hold in a release of vLLM, by its sources",
        description="Nothing is installed or imported. Exit status 1 where a seam that correctness needs is missing.",
    )
    seams.add_argument(
        "releases",
        type=Path,
        nargs="*",
        metavar="WHEEL|ARCHIVE|FOLDER",
        help="a release's .whl or .tar.gz, or a folder that holds the package vllm; default: the installed one",
    )
    seams.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from mtlora.vllm_plugin.seams import SEAMS, Need, missing_points
    from mtlora.vllm_plugin.sources import Sources

    releases = {_label(path): Sources(path) for path in args.releases or [_installed()]}
    missing = {
        (seam.name, release): list(missing_points(seam, sources.find))
        for seam in SEAMS
        for release, sources in releases.items()
    }
    print_table(
        "seams",
        ("seam", "needed for", "taken in", *releases),
        [
            (
                seam.name,
                seam.need,
                seam.taken_in,
                *("missing" if missing[seam.name, release] else "holds" for release in releases),
            )
            for seam in SEAMS
            if seam.points
        ],
    )
    for (name, release), points in missing.items():
        for point in points:
            print(f"{release}: {name}: {point}")
    needed = {seam.name for seam in SEAMS if seam.need is Need.CORRECTNESS}
    return int(any(points and name in needed for (name, _), points in missing.items()))


def _label(path: Path) -> str:
    """Name and version of a distribution, from its file name."""
    return "-".join(path.name.removesuffix(".whl").removesuffix(".tar.gz").split("-")[:2])


def _installed() -> Path:
    from importlib.util import find_spec

    from mtlora.vllm_plugin.sources import SourcesError

    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise SourcesError("vLLM is not installed here; name a wheel, a source archive or a folder")
    return Path(spec.origin).parent
