"""`python -m server`."""

import sys

from server.cli import main

# The engine's processes import this module again, under another name.
if __name__ == "__main__":
    sys.exit(main())
