"""Certificates, broker configuration, service units, installation."""
