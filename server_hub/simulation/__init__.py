"""Simulates a fleet on one machine: hub, devices and links in memory run on a virtual clock."""
