"""`python -m sd_guard.cli`, for launchers that take a module."""

import sys

from sd_guard.cli import main

sys.exit(main())
