"""Bundles: what a tier downloads, and how a device knows that it may load it."""
