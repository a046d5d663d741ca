"""`python -m asyncengine.worker ARGS`: one rank; started by the host, not by people."""

import sys

from .process import main

if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("asyncengine.worker is started by the engine; see `asyncengine --help` for what to run")
    main(sys.argv[1])
