"""The total-queue check for a network of brokers: that of a replica set, and that nothing is stored twice.

Knows the promises (DESIGN.md section 7). A native program knows the id of each message that it sent, and its client never makes
a second message of a send: whatever broker a delivery came from, it has this id. A program that stays with one set is in doubt of
nothing: the set knows, across all failovers, what it has stored of it (P7).
"""

from __future__ import annotations

from typing import Any

from tests.crash.account import Account, Ledger
from tests.ensemble import account as one_set


def settle(ledgers: list[Ledger]) -> Account:
    """Check everything. (Two copies of one message somewhere in the network are two unmarked deliveries of it, or one too late.)"""
    account = one_set.settle(ledgers)
    check_once(account, ledgers)
    check_resolved(account, ledgers)
    account.counts["repeated by clients"] = sum(ledger.get("repeated", 0) for ledger in ledgers)
    return account


def check_once(account: Account, ledgers: list[Ledger]) -> None:
    """P7: a send is stored once, under the id that its client gave it."""
    given: dict[str, str] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for ledger in ledgers:
        for id, row in ledger.get("sent", {}).items() if ledger.get("once") else ():
            if "message_id" in row:
                given[id] = row["message_id"]
        for row in ledger.get("deliveries", ()):
            rows.setdefault(row["id"], []).append(row)
    for id, message_id in given.items():
        others = {row["message_id"] for row in rows.get(id, ())} - {message_id}
        if others:
            account.fault("stored twice", f"{id} has the id {message_id}, and was delivered as {others}")
    account.counts["sent once"] = len(given)


def check_resolved(account: Account, ledgers: list[Ledger]) -> None:
    """P7: what was sent to one set, and sent again by the client after a lost connection, is confirmed in the end."""
    for ledger in ledgers:
        if not ledger.get("once") or ledger.get("wanders"):
            continue
        in_transactions = {id for transaction in ledger.get("transactions", ()) for id in transaction["ids"]}
        for id, row in ledger["sent"].items():
            if row["confirmed"] is None and id not in in_transactions:
                account.fault("in doubt", id)
        for transaction in ledger.get("transactions", ()):
            if transaction["confirmed"] is None:
                account.fault("in doubt", f"transaction of {transaction['ids']}")
