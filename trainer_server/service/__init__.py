"""The server process around the coordinator: MQTT, the run's clock, and HTTP."""
