"""`python -m server`."""

import sys

from server.cli import main

# The guard is needed: the engine's processes import this module again, under another name.
if __name__ == "__main__":
    sys.exit(main())
