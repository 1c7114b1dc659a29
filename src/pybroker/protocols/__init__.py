"""Wire protocols as sans-IO state machines: bytes in, events out, bytes out. No input, output, clock or task here."""
