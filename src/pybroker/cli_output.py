"""How commands show what they found: one console for tables and coloured lines. Owns its width in a pipe."""

from __future__ import annotations

import sys

from rich.console import Console

PIPE_WIDTH = 2_000  # columns of a table that goes into a file or a pipe: no name is broken or cut there


def make_console() -> Console:
    """A console on standard output as it is now."""
    return Console(soft_wrap=True, width=None if sys.stdout.isatty() else PIPE_WIDTH)
