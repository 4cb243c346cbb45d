"""Measurements of accuracy, speed, memory and load. Nothing imports this package."""
