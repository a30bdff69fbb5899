"""The global model, layer by layer, and the averages of what was trained."""
