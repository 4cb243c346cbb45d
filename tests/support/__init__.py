"""Helpers of the tests. They hold no tests."""
