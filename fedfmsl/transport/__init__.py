"""The MQTT link, broker addresses, TLS identities."""
