"""The server: the coordinator of a run, its storage, and its MQTT and HTTP service. No torch."""
