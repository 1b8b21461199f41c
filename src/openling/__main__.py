"""`python -m openling` is `openling`, where a folder of scripts is not on the PATH."""

import sys

from openling.cli import main

if __name__ == "__main__":
    sys.exit(main())
