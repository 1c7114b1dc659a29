"""The total-queue check: the ledgers of all programs outside are laid side by side, and every promise is looked for in them.

Knows the promises (DESIGN.md section 7), nothing of the broker. A *copy* is what one acceptance of a message makes in one
place: (place, message-id). A message that was sent again has several copies.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

DLQ = "/queue/ActiveMQ.DLQ"
TOPIC = "/topic/"

Ledger = dict[str, Any]


@dataclass
class Account:
    """`faults` by kind; `counts` for the table that is printed."""

    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)

    def fault(self, kind: str, text: str) -> None:
        self.faults[kind].append(text)

    def __str__(self) -> str:
        lines = [", ".join(f"{name} {count}" for name, count in self.counts.items())]
        lines += [f"{kind}: {len(texts)}, such as {texts[:5]}" for kind, texts in self.faults.items()]
        return "\n".join(lines)


Check = Callable[["Account", list[Ledger]], None]  # of all consumers


def settle(
    ledgers: list[Ledger], check_copies: Check | None = None, check_acknowledged: Check | None = None
) -> Account:
    """Check everything; the two by the rules of one broker, if no others are given."""
    account = Account()
    senders = [ledger for ledger in ledgers if "sent" in ledger]
    consumers = [ledger for ledger in ledgers if "deliveries" in ledger]
    sent: dict[str, dict[str, Any]] = {id: row for ledger in senders for id, row in ledger["sent"].items()}
    moved = {ledger["moves"][0]: ledger["moves"][1] for ledger in consumers if "moves" in ledger}
    deliveries: dict[str, list[tuple[Ledger, dict[str, Any]]]] = defaultdict(list)  # by id
    for ledger in consumers:
        for row in ledger["deliveries"]:
            deliveries[row["id"]].append((ledger, row))
    account.counts["sent"] = len(sent)
    account.counts["sent again"] = sum(row["attempts"] > 1 for row in sent.values())
    account.counts["deliveries"] = sum(map(len, deliveries.values()))
    check_content(account, sent, deliveries, moved)
    check_lost(account, ledgers, sent, deliveries)
    (check_copies or check_repeats)(account, consumers)
    (check_acknowledged or check_settled)(account, consumers)
    check_transactions(account, ledgers, deliveries)
    check_moved(account, sent, deliveries, moved)
    for ledger in consumers:
        if ledger.get("alone"):
            check_order(account, ledger)
    return account


def place_of(ledger: Ledger, row: dict[str, Any]) -> str:
    """Where a delivery came from: each durable subscription is a place of its own."""
    return f"{row['from']} {ledger['name']}" if row["from"].startswith(TOPIC) else str(row["from"])


def check_content(account: Account, sent: dict[str, Any], deliveries: dict[str, Any], moved: dict[str, str]) -> None:
    for id, found in deliveries.items():
        if id not in sent:
            account.fault("unexpected", id)
            continue
        home = sent[id]["to"]
        for _, row in found:
            if row["sha"] != sent[id]["sha"]:
                account.fault("corrupted", id)
            if row["from"] not in (home, moved.get(home), DLQ):
                account.fault("unexpected", f"{id} of {home} came from {row['from']}")
            if row["from"] == DLQ and not row["reason"]:
                account.fault("dead letter without a reason", id)


def check_lost(account: Account, ledgers: list[Ledger], sent: dict[str, Any], deliveries: dict[str, Any]) -> None:
    """P1: what was confirmed was delivered: in its queue, to every durable subscription, or as a dead letter."""
    aborted = set()
    confirmed = {id for id, row in sent.items() if row["confirmed"] is not None}
    for ledger in ledgers:
        for transaction in ledger.get("transactions", ()):
            if transaction["end"] == "abort":
                aborted |= set(transaction["ids"])
            elif transaction["confirmed"] is not None:
                confirmed |= set(transaction["ids"])
    account.counts["confirmed"] = len(confirmed)
    subscriptions = [
        (ledger["name"], destination)
        for ledger in ledgers
        for destination in ledger.get("destinations", ())
        if destination.startswith(TOPIC)
    ]
    for id in confirmed:
        homes = [name for name, destination in subscriptions if destination == sent[id]["to"]] or [None]
        got = {ledger["name"] for ledger, _ in deliveries.get(id, ())}
        dead = sum(row["from"] == DLQ for _, row in deliveries.get(id, ()))
        missing = [home for home in homes if home not in got] if homes != [None] else [] if got else [None]
        if len(missing) > dead:
            account.fault("lost", f"{id} to {sent[id]['to']} {missing}")
    for id in aborted & deliveries.keys():
        account.fault("unexpected", f"{id} of an aborted transaction")


def check_repeats(account: Account, consumers: list[Ledger]) -> None:
    """A repeat is a redelivery, and marked, or the message was sent again. No two messages have one id."""
    copies: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for ledger in consumers:
        for row in ledger["deliveries"]:
            copies[place_of(ledger, row), row["message_id"]].append(row)
    for copy, rows in copies.items():
        if len({row["id"] for row in rows}) > 1:
            account.fault("one message-id for two messages", str(copy))
        rows.sort(key=lambda row: (row["life"], row["at"]))
        first, *again = rows
        account.counts["redelivered"] += len(again)
        account.counts["marked at first sight"] += first["redelivered"] == "true"
        for row in again:
            if row["redelivered"] != "true":
                account.fault("repeat not marked", f"{row['id']} {copy}")
    account.counts["copies"] = len(copies)


def check_settled(account: Account, consumers: list[Ledger]) -> None:
    """P4: nothing comes again after its acknowledgement was confirmed."""
    confirmed: dict[tuple[str, str], dict[str, Any]] = {}
    for ledger in consumers:
        for ack in ledger["acks"]:
            if ack["confirmed"] is not None:
                confirmed[place_of(ledger, ack), ack["message_id"]] = ack
    account.counts["acknowledged"] = len(confirmed)
    for ledger in consumers:
        for row in ledger["deliveries"]:
            ack = confirmed.get((place_of(ledger, row), row["message_id"]))
            # Of an earlier life it may still have stood in the socket of a slow consumer.
            if ack and (row["life"] > ack["life"] or (row["life"] == ack["life"] and row["at"] > ack["confirmed"])):
                account.fault("delivered after its acknowledgement was confirmed", f"{row} {ack}")


def check_transactions(account: Account, ledgers: list[Ledger], deliveries: dict[str, Any]) -> None:
    for ledger in ledgers:
        for transaction in ledger.get("transactions", ()):
            account.counts["transactions"] += 1
            there = sum(id in deliveries for id in transaction["ids"])
            if there not in (0, len(transaction["ids"])):
                account.fault("transaction in part", str(transaction))


def check_moved(account: Account, sent: dict[str, Any], deliveries: dict[str, Any], moved: dict[str, str]) -> None:
    """Sent once, moved in transactions: at most one copy behind the move; and either there or among the dead letters."""
    for id, row in sent.items():
        if row["to"] not in moved or id not in deliveries:
            continue
        behind = {each["message_id"] for _, each in deliveries[id] if each["from"] == moved[row["to"]]}
        dead = any(each["from"] == DLQ for _, each in deliveries[id])
        account.counts["moved"] += len(behind)
        if row["attempts"] == 1 and (len(behind) > 1 or not (behind or dead)):
            account.fault("not moved exactly once", f"{id}: {behind}")


def check_order(account: Account, ledger: Ledger) -> None:
    """P3: one consumer sees each producer's messages for the first time in the order in which they were sent."""
    last: dict[tuple[str, str], int] = {}
    seen: set[tuple[str, str]] = set()
    for row in ledger["deliveries"]:
        place = row["from"]
        if (place, row["id"]) in seen:
            continue
        seen.add((place, row["id"]))
        producer, _, number = row["id"].rpartition("-")
        if int(number) < last.get((place, producer), -1):
            account.fault("out of order", f"{row['id']} after {last[place, producer]} from {place}")
        last[place, producer] = int(number)
