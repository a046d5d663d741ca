"""`python -m asyncengine` is the `asyncengine` command."""

import sys

from .serve.cli import main

sys.exit(main())
