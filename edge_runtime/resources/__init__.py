"""What the machine allows: sensors, governor, memory and time measurements, level cap."""
