"""`make pod`: play overlay cpu's pod from the image of `make image`, check it, print a line a check and a summary."""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from deploy.image.engines import Engine, needs_runc
from deploy.pod.checks import Checks
from deploy.pod.pod import Pod, PodError
from server.cli.process import exit_on_sigterm


def main(argv: Sequence[str] | None = None) -> int:
    """1 if a check is not met, 2 if there is nothing to check."""
    parser = argparse.ArgumentParser(prog="python -m deploy.pod", description=__doc__)
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), metavar="DIR", help="default: %(default)s")
    parser.add_argument(
        "--throughput", action="store_true", help="a thirteenth check: compare with a server outside; minutes"
    )
    options = parser.parse_args(argv)
    tools = ("podman", "kustomize", "openssl", *(["runc"] if needs_runc() else []))
    missing = [tool for tool in tools if not shutil.which(tool)]
    if missing:
        print(
            f"pod: {', '.join(missing)} not installed (Debian: apt-get install podman runc netavark aardvark-dns "
            "nftables kustomize openssl)"
        )
        return 2
    if os.geteuid():
        print("pod: needs root: it looks into the container's processes, volumes and control groups")
        return 2
    exit_on_sigterm()
    with tempfile.TemporaryDirectory() as temporary:
        pod = Pod(Path(temporary), options.adapters)
        if not Engine("podman").has(pod.image):
            print(f"pod: podman has no image {pod.image}; make image ENGINE=buildah or ENGINE=podman builds it")
            return 2
        if foreign := pod.foreign():
            print(
                f"pod: found {', '.join(foreign)}, not made by make pod, which would delete them; rename or remove them"
            )
            return 2
        pod.remove()
        checks = Checks(pod, options.adapters, Path(temporary))
        try:
            met, count = run_checks(checks, throughput=options.throughput)
        finally:
            pod.remove()
    print(f"pod: image {Engine('podman').size(pod.image) / 1e9:.1f} GB, {count} checks, {met} met")
    return int(met < count)


def run_checks(checks: Checks, *, throughput: bool) -> tuple[int, int]:
    """How many checks are met, and how many there are."""
    named = {
        "ready": checks.ready,
        "security context, mounts and settings": checks.as_the_manifest_says,
        "every task answered": checks.every_task,
        "a new adapter version in the volume": checks.new_version,
        "a key revoked through the Secret": checks.revoked_key,
        "memory limit held under load": checks.memory_limit,
        "CPU limit held under load": checks.processor_limit,
        "the engine's threads are its CPUs": checks.engine_threads,
        "the engine killed inside": checks.engine_killed,
        **({"throughput in the container ÷ outside": checks.throughput} if throughput else {}),
        "the pod deleted in the middle of streams": checks.deleted_while_streaming,
        "started again on the same volumes": checks.started_again,
        "what cannot serve says why": checks.refusals,
    }
    met = 0
    for name, check in named.items():
        try:
            line, good = check(), True
        except PodError as error:
            line, good = str(error), False
        except Exception as error:
            line, good = f"{type(error).__name__}: {error}", False
        met += good
        print(f"{'met    ' if good else 'NOT met'}  {name}: {line}", flush=True)
        if not checks.serving:
            break
    return met, len(named)


if __name__ == "__main__":
    raise SystemExit(main())
