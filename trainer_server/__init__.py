"""The coordinator: rounds, aggregation, SAL, and the links to devices and disk. No torch."""
