"""Baselines: methods for comparison, which only simulations offer."""
