"""Replica sets: who leads (`election`), through ZooKeeper (`coordinator`), and how the others hold the same store."""
