"""A fleet on one machine: the hub and devices of a job over links in memory, on a virtual clock."""
