"""A federation of virtual devices in one process or on Ray, with the algorithms and engines of real ones."""
