"""Answers of a device: alone, through the hub, or as a mixture of base networks."""
