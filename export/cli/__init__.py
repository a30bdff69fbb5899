"""Commands of the exporter: ``export``, ``adapter`` and ``plan``."""
