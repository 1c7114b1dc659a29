"""Kinds of queues."""

from __future__ import annotations

QUEUE = "queue"  # /queue/NAME
SUBSCRIPTION = "subscription"  # a durable subscription to a topic
BACKLOG = "backlog"  # a plain subscription to a topic; gone with its consumer
TEMPORARY = "temporary"  # of one connection, see temporary.py; its messages are never stored
LINK = "link"  # what is on its way to another broker of the network, in order of forwarding
DELETED = "deleted"  # a durable subscription whose messages are being removed
CONSUMED = (QUEUE, TEMPORARY)  # kinds whose messages are shared out among several consumers
