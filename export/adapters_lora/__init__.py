"""Low-rank adapters: their modules, ranks, and PEFT's files."""
