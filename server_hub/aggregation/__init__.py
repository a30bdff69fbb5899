"""Aggregation: the global model, layer by layer, and the rules that average trained copies."""
