"""The state machine of `machine.py` on one queue whose consumers differ: selectors, groups, exclusive consumers, priorities."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule

from pybroker.core import choosing
from pybroker.core import groups as groups_module
from pybroker.core.consumer import ACK_MODES
from tests.core.machine import LIMITS, CoreMachine, index
from tests.core.model import QUEUE_SELECTORS

GROUPED = tuple(b"s:%d\nJMSXGroupID:%b\n" % (number, group) for number in (1, 2) for group in (b"g", b"h"))
BLOCKS = {
    "selectors": (b"s:1\n", b"s:1\n", b"s:2\n", b""),
    "groups": (b"JMSXGroupID:g\n", b"JMSXGroupID:h\n", b"", b"JMSXGroupID:g\nJMSXGroupSeq:-1\n"),
    "both": (*GROUPED, b"s:1\n", b""),
}


class ChoosyMachine(CoreMachine):
    """What is sent and who consumes differ from run to run; the promises are those of `CoreMachine`."""

    @initialize(
        about=st.sampled_from(sorted(BLOCKS)),
        exclusive=st.booleans(),
        expiring=st.booleans(),
        window=st.sampled_from((1, 2, 4, 8)),
        names=st.sampled_from((0, 100)),
        delay=st.sampled_from((0, 0, 50)),
        narrow_from=st.sampled_from((0, 16)),
    )
    def first(  # type: ignore[override]
        self, about: str, exclusive: bool, expiring: bool, window: int, names: int, delay: int, narrow_from: int
    ) -> None:
        self.limits = replace(LIMITS, window_messages_max=window, groups_max=names)
        self.patches.enter_context(patch.object(groups_module, "BUCKETS", 1 << 30))
        self.patches.enter_context(patch.object(choosing, "NARROW_FROM", narrow_from))
        self._open(delay, 2)
        self.focus = ("/queue/a",)
        self.lasting = (0, 50, 1_500) if expiring else (0,)
        self.about = about
        self.blocks = BLOCKS[about]
        if not names:  # a group of a bucket is not closed
            self.blocks = tuple(block for block in self.blocks if b"Seq" not in block)
        self.exclusive = exclusive

    @rule(
        number=index,
        mode=st.sampled_from(ACK_MODES),
        prefetch=st.integers(1, 3),
        selector=st.sampled_from(("", *QUEUE_SELECTORS)),
        exclusive=st.booleans(),
        priority=st.sampled_from((0, 0, 0, 5, -3)),
    )
    @precondition(lambda self: len(self.model.members) < 5)
    def subscribe_choosily(
        self, number: int, mode: str, prefetch: int, selector: str, exclusive: bool, priority: int
    ) -> None:
        selector = selector if self.about != "groups" else ""
        exclusive = exclusive and self.exclusive
        self._subscribe(self.connection(number), "/queue/a", mode, prefetch, True, None, selector, exclusive, priority)
