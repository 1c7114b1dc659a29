"""Bare plyvel: put and delete, one synced write per batch of 100, nothing else. The floor under the durable figures.

Run as ``python -m benchmarks.bare --data DIR --messages N``; prints one JSON object. Uses LevelDB as the trial does:
the same keys and values, one write thread. Each batch puts 100 messages and deletes those of the batch before it.
"""

from __future__ import annotations

import argparse
import json
import struct
import time

from benchmarks.leveldb import open_database

BATCH_MESSAGES = 100


def measure(path: str, messages: int, size: int) -> float:
    """Messages put and deleted in one second; each of `messages` with a value of `size` bytes."""
    database = open_database(path)
    pack = struct.Struct(">Q").pack
    value = b"x" * size
    former: list[bytes] = []
    started = time.perf_counter()
    for first in range(0, messages, BATCH_MESSAGES):
        batch = database.write_batch(sync=True)
        put, delete = batch.put, batch.delete
        keys = [pack(number) for number in range(first, first + BATCH_MESSAGES)]
        for key in former:
            delete(key)
        for key in keys:
            put(key, value)
        batch.write()
        former = keys
    batch = database.write_batch(sync=True)
    for key in former:
        batch.delete(key)
    batch.write()
    elapsed = time.perf_counter() - started
    database.close()
    return messages / elapsed


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bare")
    parser.add_argument("--data", required=True)
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--size", type=int, default=256)
    options = parser.parse_args()
    print(json.dumps({"rate": measure(options.data, options.messages, options.size)}))


if __name__ == "__main__":
    main()
