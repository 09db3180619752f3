# SPDX-License-Identifier: MIT
"""The tests, in rooms like those of lap_ext, with what they share in helpers and zoo."""
