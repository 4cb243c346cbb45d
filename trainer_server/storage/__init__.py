"""The server's files: run database, checkpoints, tensors, uploads, PEFT adapter."""
