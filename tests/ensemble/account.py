"""The total-queue check for a replica set: that of `tests.crash.account`, where a broker's life is the time of a connection.

Knows the promises (DESIGN.md section 7). Two checks are other ones than for a broker on its own, because what an old leader had
sent may be read after what its successor sends: of each copy at most one delivery may be unmarked, whichever was read
first; and an acknowledgement that was confirmed binds connections that were made after it.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from tests.crash import account as alone
from tests.crash.account import Account, Ledger, place_of

LEASE = (
    2.0  # seconds for which a deposed leader that does not know it may still deliver (P4); the configuration's default
)


def settle(ledgers: list[Ledger]) -> Account:
    """Check everything."""
    account = alone.settle(ledgers, check_copies, check_acknowledged)
    account.counts["connections"] = sum(ledger["connections"] for ledger in ledgers)
    return account


def check_copies(account: Account, consumers: list[Ledger]) -> None:
    """All deliveries of a copy but one are marked as redelivered. No two messages have one id."""
    copies: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for ledger in consumers:
        for row in ledger["deliveries"]:
            copies[place_of(ledger, row), row["message_id"]].append(row)
    for copy, rows in copies.items():
        if len({row["id"] for row in rows}) > 1:
            account.fault("one message-id for two messages", str(copy))
        account.counts["redelivered"] += len(rows) - 1
        unmarked = [row for row in rows if row["redelivered"] != "true"]
        if len(unmarked) > 1:
            account.fault("repeat not marked", f"{copy}: {unmarked}")
    account.counts["copies"] = len(copies)


def check_acknowledged(account: Account, consumers: list[Ledger]) -> None:
    """P4: nothing comes again after its acknowledgement was confirmed; but by a deposed leader, while its lease lasts."""
    confirmed: dict[tuple[str, str], dict[str, Any]] = {}
    for ledger in consumers:
        for ack in ledger["acks"]:
            if ack["confirmed"] is not None:
                confirmed[place_of(ledger, ack), ack["message_id"]] = ack
    account.counts["acknowledged"] = len(confirmed)
    for ledger in consumers:
        for row in ledger["deliveries"]:
            ack = confirmed.get((place_of(ledger, row), row["message_id"]))
            if ack is None:
                continue
            end = ack["confirmed"] + (LEASE if row["address"] != ack["address"] else 0.0)
            # On an older connection it may have waited for its reader; on the same one nothing can overtake the receipt.
            is_late = row["life"] > ack["confirmed"] or row["life"] == ack["life"]
            if is_late and row["at"] > end:
                account.fault("delivered after its acknowledgement was confirmed", f"{row} {ack}")
