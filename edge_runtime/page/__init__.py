"""The device's page: what it is doing, and "What is this?", where people give files a class."""
