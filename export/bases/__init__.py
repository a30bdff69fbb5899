"""Base networks of Split-Mix: a model split by width, with dual norms, run side by side."""
