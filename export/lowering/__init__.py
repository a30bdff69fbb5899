"""Lowering: from a functional step to a file that a stock runtime runs, checked against eager."""
