"""`python -m mpisync` is the command `mpisync`."""

import sys

from mpisync.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
