"""The thin shell that every process shares: command line, files, MQTT link."""
