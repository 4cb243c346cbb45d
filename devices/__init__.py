"""What differs by machine: the local fleet of a trial, its broker, assets and report."""
