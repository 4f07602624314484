"""Publishes a checkpoint in a server's adapters folder: `ADAPTERS/NAME/VERSION/`."""

import os
from pathlib import Path

from mtlora.checkpoint.format import MANIFEST_FILE, TENSORS_FILE
from mtlora.checkpoint.read import read_checkpoint
from mtlora.errors import MtLoRAError
from mtlora.files import folder_in_the_making, let_all_read, make_folders, sync, write_durably


def publish(checkpoint: Path, adapter: Path) -> Path:
    """Copy a valid checkpoint to the next free version of an adapter's folder; returns the new folder.

    Every user may read the copy, whatever the umask. A rename puts it in place, so a server never sees half of it.
    Raises CheckpointError for a checkpoint that cannot be read, MtLoRAError if the folder `adapter` is itself a
    checkpoint.
    """
    read_checkpoint(checkpoint)
    if (adapter / MANIFEST_FILE).exists():
        raise MtLoRAError(
            f"{adapter}: a checkpoint; expected an adapter's folder, which holds its versions: ADAPTERS/NAME"
        )
    make_folders(adapter)
    with folder_in_the_making(adapter / "version") as made:
        for name in (MANIFEST_FILE, TENSORS_FILE):
            write_durably(made / name, (checkpoint / name).read_bytes())
        read_checkpoint(made)
        let_all_read(made)
        sync(made)
        return put_version(made, adapter)


def put_version(made: Path, adapter: Path) -> Path:
    """Move a finished folder to the next free version of an adapter's folder on the same file system; returns it."""
    while True:
        version = adapter / str(1 + max((int(p.name) for p in adapter.iterdir() if p.name.isdecimal()), default=0))
        try:
            os.rename(made, version)
        except OSError:
            # Another publisher took the number: a rename over its folder fails, because it is not empty.
            if not version.exists():
                raise
        else:
            sync(adapter)
            return version
