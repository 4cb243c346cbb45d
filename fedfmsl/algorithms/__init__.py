"""The algorithms, as functions and small dataclasses over arrays. numpy only: no network, no disk, no runtime."""
