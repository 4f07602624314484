"""`make image`: build the server's image, check it, write its bill of materials. The standard library alone.

Equal inputs give equal layers: all files have the same date, byte code contains hashes instead of dates, and packages
are pinned by hash.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy.image import base, left_out, reproduced
from deploy.image.engines import Engine, EngineError, find

ROOT = Path(__file__).parents[2]
# Decimal gigabytes, as container engines count.
LARGEST_GB = {"cpu": 2.0, "gpu": 12.0}
# Limit with pip's packages cached, because download times do not depend on the build.
LONGEST_MIN = 8.0
# The date of every file unless SOURCE_DATE_EPOCH gives another: the first day of zip files.
EPOCH = 315532800
PULLED_BASE = "python:3.11.14-slim-trixie"


def main(argv: Sequence[str] | None = None) -> int:
    """Print a line a check and a summary line; 1 if a check is not met, 2 if the image could not be built."""
    parser = argparse.ArgumentParser(prog="python -m deploy.image", description=__doc__)
    parser.add_argument("--device", choices=sorted(LARGEST_GB), default="cpu")
    parser.add_argument(
        "--base", help=f'"debian": made from Debian\'s packages, the default where mmdebstrap is; else {PULLED_BASE}'
    )
    parser.add_argument("--refresh", action="store_true", help="make the base from Debian's packages again")
    parser.add_argument("--engine", help="buildah, podman or docker; default: the first that is installed")
    parser.add_argument("--tag", help="default: localhost/mtlora-server:VERSION-DEVICE")
    parser.add_argument(
        "--out", type=Path, default=Path("out/image"), help="for the bill of materials; default: %(default)s"
    )
    parser.add_argument("--twice", action="store_true", help="build again on the same base, and compare all layers")
    options = parser.parse_args(argv)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    tag = options.tag or f"localhost/mtlora-server:{version}-{options.device}"
    began = time.monotonic()
    try:
        engine = find(options.engine)
        base_image = build(engine, options.device, tag, options.base, refresh=options.refresh)
        seconds = time.monotonic() - began
        found = check(engine, options.device, tag)
        if options.twice:
            again = f"{tag}-again"
            build(engine, options.device, again, base_image, cached=False)
            found["the same layers when built again"] = reproduced.differing(engine, tag, again)
            engine.remove(again)
        gigabytes = engine.size(tag) / 1e9
        components = write_bill(engine, tag, options.out / f"sbom-{options.device}.cdx.json")
    except EngineError as error:
        pulled = options.base is None and not shutil.which("mmdebstrap")
        hint = f"; if {PULLED_BASE} cannot be pulled: install mmdebstrap, or give BASE=IMAGE" if pulled else ""
        print(f"image: {error}{hint}")
        return 2
    largest = LARGEST_GB[options.device]
    found[f"at most {largest} GB"] = "" if gigabytes <= largest else f"{gigabytes:.2f} GB"
    print(f"Left out:\n{left_out.table(options.device)}")
    for name, problem in found.items():
        print(f"{'NOT met' if problem else 'met    '}  {name}{': ' if problem else ''}{problem[:2000]}")
    met = sum(not problem for problem in found.values())
    minutes = seconds / 60
    print(
        f"image: {tag}, {gigabytes:.2f} GB (at most {largest}), built by {engine.name} in {minutes:.1f} min (goal with "
        f"packages cached: {LONGEST_MIN:g}{', missed' if minutes > LONGEST_MIN else ''}), {components} components in "
        f"{options.out}, {len(found)} checks, {met} met"
    )
    return int(met < len(found))


def build(
    engine: Engine, device: str, tag: str, base_image: str | None, *, refresh: bool = False, cached: bool = True
) -> str:
    """Build the image; returns what it is based on. Raises EngineError."""
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH))
    base_image = base_image or ("debian" if shutil.which("mmdebstrap") else PULLED_BASE)
    if base_image == "debian":
        base_image = base.make(engine, epoch, refresh=refresh)
    with tempfile.TemporaryDirectory() as temporary:
        host = Path(temporary)
        arguments = {"PYTHON_IMAGE": base_image, "DEVICE": device, **pip_arguments(host, os.environ)}
        engine.build(ROOT / "deploy" / "Dockerfile", ROOT, tag, arguments, {"host": host}, epoch, cached=cached)
    return base_image


def pip_arguments(host: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """Arguments of the build: where pip finds packages. Wheels and certificates of this machine go to `host`."""
    names = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_DEFAULT_TIMEOUT", "TORCH", "TORCH_INDEX")
    arguments = {name: environment[name] for name in names if environment.get(name)}
    wheels = [wheel for place in environment.get("PIP_FIND_LINKS", "").split() for wheel in Path(place).glob("*.whl")]
    if wheels:
        (host / "wheels").mkdir()
        for wheel in wheels:
            shutil.copy2(wheel, host / "wheels")
        arguments["PIP_FIND_LINKS"] = "/host/wheels"
    if certificate := environment.get("PIP_CERT"):
        shutil.copyfile(certificate, host / "certificates.crt")
        arguments["PIP_CERT"] = "/host/certificates.crt"
    return arguments


def check(engine: Engine, device: str, tag: str) -> dict[str, str]:
    """Findings by check; empty if the check passes."""
    every = left_out.names((ROOT / "requirements" / f"{device}.lock").read_text())
    lock = left_out.server_lock(device)
    program = (Path(__file__).parent / "check.py").read_text()
    found: dict[str, str] = json.loads(
        engine.python(
            tag, program, json.dumps([left_out.lines(lock), sorted(every - left_out.names(lock))])
        ).splitlines()[-1]
    )
    return found


def write_bill(engine: Engine, tag: str, file: Path) -> int:
    """Write the image's bill of materials to `file`; returns the number of components."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = engine.python(tag, "print(open('/opt/mtlora/sbom.cdx.json').read())")
    file.write_text(text)
    return len(json.loads(text)["components"])


if __name__ == "__main__":
    raise SystemExit(main())
