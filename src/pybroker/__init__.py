"""pybroker: a durable message broker that runs inside a Python program."""
