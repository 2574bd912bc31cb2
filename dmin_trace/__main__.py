"""`python -m dmin_trace` is `dmin-trace`."""

import sys

from dmin_trace.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
