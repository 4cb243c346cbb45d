"""Samples: from files in a folder to cached features."""
