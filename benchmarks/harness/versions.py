"""Versions of an adapter in a folder NAME/VERSION/."""

from pathlib import Path

from mtlora.checkpoint.format import MANIFEST_FILE
from server.registry.version import version_key


def newest_version(adapter: Path) -> Path:
    """The folder of an adapter's highest version. Raises SystemExit if there is none."""
    versions = [manifest.parent for manifest in adapter.glob(f"*/{MANIFEST_FILE}")]
    if not versions:
        raise SystemExit(
            f"{adapter}: found no version; allowed: a folder with VERSION/{MANIFEST_FILE}, or --adapter DIR"
        )
    return max(versions, key=lambda each: version_key(each.name))
