"""python -m devices.trial: a whole run on one machine, and its report."""
