"""Names of the step graphs that a bundle has only where a method needs them."""

from __future__ import annotations

from collections.abc import Iterable

NEEDS: dict[str, tuple[str, ...]] = {
    "activate": (),
    "backward": ("activate",),
    "finish": ("backward",),
    "fuse": ("activate",),
    "attack": (),
    "adversarial_train": ("attack",),
}
"""By the name of a graph the others that a device needs with it."""


def with_needed(graphs: Iterable[str]) -> frozenset[str]:
    """The given names, and those of the graphs that they need.

    Raises:
        ValueError: there is no such graph, or it is no optional one.
    """
    found: set[str] = set()
    waiting = list(graphs)
    while waiting:
        name = waiting.pop()
        if name not in NEEDS:
            raise ValueError(f"there is no optional graph {name!r}; there are {', '.join(NEEDS)}")
        if name not in found:
            found.add(name)
            waiting += NEEDS[name]
    return frozenset(found)
