# SPDX-License-Identifier: MIT
"""Runs the command lap-ext as `python -m lap_ext`."""

import sys

from lap_ext.cli import main

if __name__ == "__main__":
    sys.exit(main())
