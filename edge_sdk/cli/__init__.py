"""Commands of a device: ``cutlayer device`` and ``cutlayer bundle``."""
