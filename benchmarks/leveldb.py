"""How the trial and bare plyvel open LevelDB: the same options for both, and the module's name on every Python."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 13):
    import plyvel_next as plyvel
else:
    import plyvel

WRITE_BUFFER_BYTES = 16 * 1024 * 1024


def open_database(path: str | Path) -> Any:
    """A LevelDB at `path`, made if it is not there."""
    return plyvel.DB(str(path), create_if_missing=True, write_buffer_size=WRITE_BUFFER_BYTES)
