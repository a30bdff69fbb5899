"""A hostile peer against a hub that serves an honest job."""
