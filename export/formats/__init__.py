"""Writes trained models in the formats that other software opens, checked before they appear."""
