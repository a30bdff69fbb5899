"""Commands of an operator: ``cutlayer hub``, ``cutlayer token`` and ``cutlayer mix``."""
