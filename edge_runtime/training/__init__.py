"""What a device computes in each stage of a run."""
