"""The cost of every cut on devices and links."""
