"""Connections that break at a chosen point: the k-th movement of bytes over all connections of a client. Owns the fault only."""

from __future__ import annotations

from typing import Literal

import trio

from pybroker.cluster.native_urls import NativeAddress
from pybroker.remote_connection import Dial

How = Literal["lost", "half", "arrived"]


class Cutter:
    """Breaks the connection that makes movement number `at` (from 1); counts them in `moves`.

    how   what becomes of the bytes of a write: they are lost, half of them arrive, or all do and the rest is silence. (Those
          of a read are always lost.)
    """

    def __init__(self, dial: Dial, at: int, how: How) -> None:
        self._dial = dial
        self.at = at
        self.how = how
        self.moves = 0

    @property
    def done(self) -> bool:
        """Whether the point was reached."""
        return self.moves >= self.at

    def here(self) -> bool:
        self.moves += 1
        return self.moves == self.at

    async def dial(self, address: NativeAddress) -> trio.abc.Stream:
        return _CutStream(await self._dial(address), self)


class _CutStream(trio.abc.Stream):
    def __init__(self, inner: trio.abc.Stream, cutter: Cutter) -> None:
        self._inner = inner
        self._cutter = cutter

    async def send_all(self, data: bytes) -> None:
        cutter = self._cutter
        if not cutter.here():
            await self._inner.send_all(data)
            return
        kept = {"lost": 0, "half": len(data) // 2, "arrived": len(data)}[cutter.how]
        if kept:
            await self._inner.send_all(data[:kept])
        await trio.aclose_forcefully(self._inner)
        raise trio.BrokenResourceError("cut")

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        data = await self._inner.receive_some(max_bytes)
        if self._cutter.here():
            await trio.aclose_forcefully(self._inner)
            raise trio.BrokenResourceError("cut")
        return data

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def aclose(self) -> None:
        await self._inner.aclose()
