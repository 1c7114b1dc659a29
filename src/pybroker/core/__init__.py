"""The broker as a synchronous, deterministic state machine. Pure: no clock, no task, no input or output."""
