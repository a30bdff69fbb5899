"""Bundles: tiers, the writer, and inference with 8-bit weights."""
