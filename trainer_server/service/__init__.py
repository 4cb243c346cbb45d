"""The server process: MQTT, clock, and HTTP around the coordinator."""
