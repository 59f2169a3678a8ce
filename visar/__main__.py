"""`python -m visar`."""

import sys

from visar.cli import main

sys.exit(main())
