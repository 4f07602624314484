"""The paper's claim on images: accuracy against the number of tasks, by method (docs/claim.md). `make claim`.

After a stop, the same command continues.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claim.methods import BOUNDS, METHODS
from benchmarks.claim.results import KEPT, compare, keep, restore
from benchmarks.claim.runs import SMOKE, Claim, Size
from mtlora.backbone import resolve


def main(argv: Sequence[str] | None = None) -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.claim", description=__doc__)
    parser.add_argument("--out", type=Path, help="default: out/claim; --anew: out/claim-anew; --smoke: out/claim-smoke")
    parser.add_argument("--backbone", default="vision")
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, each on one core")
    parser.add_argument("--smoke", action="store_true", help="the same code, small: minutes")
    parser.add_argument("--report", action="store_true", help="train nothing: write the report of what is done")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2")
    parser.add_argument("--counts", type=int, nargs="+", help="numbers of tasks; default: 5 10 15 20 25")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), help="default: all")
    parser.add_argument("--rates", type=float, nargs="+", help="default: 2e-4 7e-4 2e-3; one: no choice of rates")
    parser.add_argument(
        "--rate",
        type=_rate,
        action="append",
        default=[],
        metavar="METHOD=RATE",
        help="a rate chosen before; repeatable",
    )
    parser.add_argument("--maps", type=int, nargs="*", help="numbers of label maps; default: 4 16 64")
    parser.add_argument("--keep", action="store_true", help=f"at the end, write all finished cells into {KEPT.name}")
    parser.add_argument("--anew", action="store_true", help=f"train what {KEPT.name} has too, and compare")
    args = parser.parse_args(argv)
    if args.keep and args.smoke:
        parser.error("--keep is for whole cells; --smoke makes small ones")
    if args.anew and (args.keep or args.smoke or args.out):
        # Kept cells copied to another folder would be compared with themselves.
        parser.error("--anew has a folder of its own: found it with --keep, --smoke or --out")
    size = SMOKE if args.smoke else Size()
    chosen = {
        name: tuple(value) if isinstance(value, list) else value
        for name in ("seeds", "counts", "methods", "rates", "maps")
        if (value := getattr(args, name)) is not None
    }
    out = args.out or Path("out/claim" + ("-smoke" if args.smoke else "-anew" if args.anew else ""))
    if not (args.smoke or args.anew):
        restore(KEPT, out)
    size = Size(**{**vars(size), **chosen})
    Claim(out, resolve(args.backbone), size, args.jobs, train=not args.report, chosen=dict(args.rate)).run()
    if args.anew:
        print(compare(out, KEPT), end="")
    if args.keep:
        keep(out, KEPT)


def _rate(text: str) -> tuple[str, float]:
    """A method and its rate. Raises ArgumentTypeError."""
    name, _, rate = text.rpartition("=")
    if name not in METHODS | BOUNDS:
        raise argparse.ArgumentTypeError(f"method: found {name!r}; allowed: {', '.join(METHODS | BOUNDS)}")
    try:
        return name, float(rate)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{rate!r} is no rate") from None


if __name__ == "__main__":
    main()
