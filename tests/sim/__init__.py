"""Whole replica sets, and networks of them (`net_*`), in one thread, on virtual time, under every fault: a seed gives the whole run.

``python -m tests.sim SEED`` and ``python -m tests.sim --network SEED`` replay one.
"""
