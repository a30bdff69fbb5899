"""Rounds: who takes part, what each device owes, what it delivers, and where it is cut."""
