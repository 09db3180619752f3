# SPDX-License-Identifier: MIT
"""python -m lap_ext is the command lap-ext."""

import sys

from lap_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
