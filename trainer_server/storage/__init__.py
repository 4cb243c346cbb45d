"""The server's disk: run database, tensor files, uploads, exported adapter."""
