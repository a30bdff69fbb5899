"""Commands for operators: ``cutlayer hub``, ``cutlayer token`` and ``cutlayer model``."""
