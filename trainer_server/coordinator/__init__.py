"""The coordinator: a run as a state machine without I/O."""
