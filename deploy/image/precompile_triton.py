"""Compiles the C module that Triton otherwise compiles when it first uses an NVIDIA driver: images have no compiler.

Run it while building the image, with a folder that has any libcuda.so.1 to link to. The module goes to
TRITON_CACHE_DIR, where Triton finds it by its source. Exit status 1 if it is not there afterwards.
"""

import contextlib
import os
import sys
from pathlib import Path

from triton.backends.nvidia import driver
from triton.runtime.build import compile_module_from_src


def main() -> int:
    """argv[1]: the folder."""
    source = Path(driver.__file__).with_name("driver.c").read_text()
    # Loading fails without a real driver, after the compilation.
    with contextlib.suppress(ImportError):
        compile_module_from_src(
            src=source,
            name="cuda_utils",
            library_dirs=[driver.libdevice_dir, sys.argv[1]],
            include_dirs=driver.include_dirs,
            libraries=driver.libraries,
        )
    found = list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("cuda_utils*.so"))
    print(*(map(str, found) if found else ["no module was made"]))
    return int(not found)


if __name__ == "__main__":
    raise SystemExit(main())
