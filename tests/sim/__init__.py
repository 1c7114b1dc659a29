"""Whole replica sets in one thread, on virtual time, under every fault: a seed gives the whole run. `python -m tests.sim SEED`."""
