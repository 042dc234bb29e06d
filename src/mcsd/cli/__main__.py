"""``python -m mcsd.cli``: the same as ``mcsd``."""

import sys

from mcsd.cli import main

sys.exit(main())
