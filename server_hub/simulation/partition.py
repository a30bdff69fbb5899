"""Partitions of a data set over the clients of a fleet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import Array
from server_hub.simulation.datasets import Dataset, apportion

Kind = Literal["iid", "dirichlet", "shards", "domain", "length"]
NAMED = 5
"""Maximum number of clients that an error names; it counts the others."""


@dataclass(frozen=True)
class PartitionTable:
    """The partition of a job: the table ``[partition]``.

    Attributes:
        kind: ``iid``: shuffled, equal shares. ``dirichlet``: for every class, shares of the
            clients from a Dirichlet distribution. ``shards``: rows sorted by label, cut into
            shards, ``classes_per_client`` of them for each client. ``domain``: every client has
            rows of one domain. ``length``: as ``dirichlet``, over classes of token length.
        alpha: parameter of the Dirichlet distribution; a small one gives skewed shares, a large
            one nearly equal shares.
        classes_per_client: number of shards of each client.
        seed: seed of the partition.
    """

    kind: Kind = "iid"
    alpha: float = 0.5
    classes_per_client: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        # Outside these bounds the distribution's gamma variates underflow or overflow.
        if not (math.isfinite(self.alpha) and 1e-3 <= self.alpha <= 1e6):
            raise ValueError(f"alpha is {self.alpha}; it must be from 0.001 to 1000000")
        if self.classes_per_client < 1:
            raise ValueError(
                f"classes_per_client is {self.classes_per_client}; it must be at least 1"
            )
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; it must not be negative")


def partition(data: Dataset, clients: int, table: PartitionTable) -> list[Array]:
    """Share the training rows out; every row goes to exactly one client.

    Args:
        data: data set whose ``train`` is shared out.
        clients: number of clients.
        table: kind and parameters of the partition.

    Returns:
        Row numbers of each client, sorted.

    Raises:
        ConfigError: there are more clients than rows, the kind does not fit the data, or a client
            would have no rows.
    """
    rows = len(data.train)
    if clients < 1:
        raise ConfigError(f"{clients} clients; there must be at least 1")
    if clients > rows:
        raise ConfigError(f"{clients} clients cannot share {rows} rows; take {rows} at most")
    rng = np.random.default_rng(table.seed)
    if table.kind == "iid":
        owner = _deal(rng.permutation(rows), clients)
    elif table.kind == "domain":
        owner = _domains(data, clients, rng)
    elif table.kind == "length":
        owner = _lengths(data, clients, table.alpha, rng)
    else:
        if data.task != "classes":
            raise ConfigError(
                f"partition {table.kind!r} needs one label per row, and texts have none; "
                "take 'length' or 'iid'"
            )
        if table.kind == "shards":
            owner = _shards(data.train.y, clients, table.classes_per_client, rng)
        else:
            owner = dirichlet(data.train.y, data.classes, clients, table.alpha, rng)
    shares = [np.flatnonzero(owner == client) for client in range(clients)]
    empty = [client for client, share in enumerate(shares) if len(share) == 0]
    if empty:
        raise ConfigError(
            f"partition {table.kind!r} leaves {_named(empty)} without rows; "
            f"raise alpha ({table.alpha}), take fewer clients ({clients}) or another seed"
        )
    return shares


def dirichlet(
    labels: Array, classes: int, clients: int, alpha: float, rng: np.random.Generator
) -> Array:
    """Return the owner of each row: for every class, the shares of the clients ~ Dirichlet(alpha).

    Some clients may have no rows.

    Args:
        labels: label of each row, (rows,), ``0..classes-1``.
        classes: number of classes.
        clients: number of clients.
        alpha: parameter of the distribution; a small one gives skewed shares.
        rng: generator for shares and rows.
    """
    owner = np.zeros(len(labels), np.int64)
    for label in range(classes):
        rows = rng.permutation(np.flatnonzero(labels == label))
        edges = np.cumsum(rng.dirichlet([alpha] * clients))[:-1] * len(rows)
        for client, part in enumerate(np.split(rows, edges.round().astype(int))):
            owner[part] = client
    return owner


def table_of(shares: list[Array], labels: Array, classes: int) -> Array:
    """Count the labels of each class that each client has: (clients, classes) int64.

    Labels of -1, which mark positions of a text that do not count, are left out.

    Args:
        shares: row numbers of each client.
        labels: labels of all rows, (rows,) or (rows, positions).
        classes: number of classes.
    """
    counts = np.zeros((len(shares), classes), np.int64)
    for client, rows in enumerate(shares):
        own = labels[rows]
        counts[client] = np.bincount(own[own >= 0], minlength=classes)
    return counts


def _deal(rows: Array, parts: int) -> Array:
    """Return the owner of each row; part i owns the i-th of equal pieces of ``rows``."""
    owner = np.empty(len(rows), np.int64)
    for part, piece in enumerate(np.array_split(rows, parts)):
        owner[piece] = part
    return owner


def _shards(labels: Array, clients: int, each: int, rng: np.random.Generator) -> Array:
    shards = clients * each
    if shards > len(labels):
        raise ConfigError(
            f"{clients} clients with {each} shards each cannot share {len(labels)} rows; "
            "take fewer clients or fewer classes_per_client"
        )
    shuffled = rng.permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    owner: Array = rng.permutation(np.repeat(np.arange(clients), each))[_deal(by_label, shards)]
    return owner


def _domains(data: Dataset, clients: int, rng: np.random.Generator) -> Array:
    if data.domains is None:
        raise ConfigError(
            "partition 'domain' needs data with domains: a folder DOMAIN/CLASS/*.png, or an "
            "array domain (domain_train) in the .npz"
        )
    domains, sizes = np.unique(data.domains, return_counts=True)
    if clients < len(domains):
        raise ConfigError(
            f"{clients} clients for {len(domains)} domains; partition 'domain' needs at least one "
            "client per domain"
        )
    # Each domain has one client; every further client goes to the domain whose clients hold the
    # most rows each.
    held = np.ones(len(domains), np.int64)
    for _ in range(clients - len(domains)):
        held[np.argmax(sizes / held)] += 1
    # Tiers are assigned by the numbers of clients. Without a shuffle of the numbers, a tier would
    # have clients of few domains.
    numbers = np.split(rng.permutation(clients), np.cumsum(held)[:-1])
    owner = np.empty(len(data.train), np.int64)
    for domain, mine in zip(domains, numbers, strict=True):
        rows = rng.permutation(np.flatnonzero(data.domains == domain))
        for client, piece in zip(mine, np.array_split(rows, len(mine)), strict=True):
            owner[piece] = client
    return owner


def _lengths(data: Dataset, clients: int, alpha: float, rng: np.random.Generator) -> Array:
    """Partition texts as SplitFT does.

    Texts are sorted into quantile classes of token length, as many as clients. For each class, the
    shares of the clients come from a Dirichlet distribution.
    """
    if data.task != "tokens":
        raise ConfigError(
            "partition 'length' needs texts, and these data are no texts; take 'dirichlet' or 'iid'"
        )
    lengths = (data.train.y >= 0).sum(1)
    shuffled = rng.permutation(len(lengths))  # rows of the same length are in random order
    by_length = shuffled[np.argsort(lengths[shuffled], kind="stable")]
    owner = np.empty(len(lengths), np.int64)
    for rows in np.array_split(by_length, clients):
        counts = apportion(rng.dirichlet([alpha] * clients), len(rows))
        owner[rng.permutation(rows)] = np.repeat(np.arange(clients), counts)
    return owner


def _named(clients: Sequence[int]) -> str:
    names = ", ".join(map(str, clients[:NAMED]))
    more = f" and {len(clients) - NAMED} more" if len(clients) > NAMED else ""
    return f"client{'s' if len(clients) > 1 else ''} {names}{more}"
