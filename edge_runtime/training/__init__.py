"""The computation of each stage of a run on a device."""
