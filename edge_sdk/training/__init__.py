"""Local training on a device: batches through the step graphs of a bundle."""
