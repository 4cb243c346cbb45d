"""FedFMSL: the public API. Importing it needs numpy only."""
