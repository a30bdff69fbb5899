"""Verifies graphs: the traced graph against eager PyTorch, and the runtime against that graph."""
