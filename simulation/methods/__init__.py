"""Federated methods on one interface, so that they can be compared (see `simulation.methods.base`)."""
