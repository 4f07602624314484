"""`python -m mtlora.cli`."""

import sys

from mtlora.cli import main

sys.exit(main())
