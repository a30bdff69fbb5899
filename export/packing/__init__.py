"""Codecs of activations as graph operations, and their inverse for the hub."""
