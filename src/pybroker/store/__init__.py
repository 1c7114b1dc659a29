"""The store layer: keeps what the core asks it to keep. Owns the public names of the layer; see DESIGN.md section 4."""

from pybroker.store.backend import Backend, Change
from pybroker.store.leveldb import LevelDBBackend
from pybroker.store.memory import MemoryBackend
from pybroker.store.pages import Page
from pybroker.store.spool import discard, open_spool
from pybroker.store.store import Store

__all__ = ["Backend", "Change", "LevelDBBackend", "MemoryBackend", "Page", "Store", "discard", "open_spool"]
