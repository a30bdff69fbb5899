"""The functional steps of a device: one module per family of graphs, losses and optimizers."""
