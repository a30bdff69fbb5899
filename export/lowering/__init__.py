"""Lowers functional steps to files for stock runtimes, and verifies them against eager PyTorch."""
