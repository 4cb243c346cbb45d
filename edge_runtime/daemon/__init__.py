"""The daemon: its state machine, and the I/O around it."""
