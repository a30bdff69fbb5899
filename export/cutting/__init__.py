"""From a PyTorch module to stem, blocks and head, and to the segment of a device."""
