"""Protocol version 1, without I/O: tensors, messages, frames and the exactly-once channel."""
