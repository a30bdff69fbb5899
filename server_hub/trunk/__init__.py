"""The trunk: training of the deep blocks for all devices together, in a process of its own."""
