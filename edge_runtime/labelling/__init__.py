"""Asking a person for the classes of files: in which order, and where the answers go."""
