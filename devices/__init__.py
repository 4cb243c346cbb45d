"""Devices of a fleet: provisioning, installation, boards; and the trial, a whole federation on one machine."""
