"""Commands for operators: ``cutlayer hub``, ``token``, ``model`` and ``release``."""
