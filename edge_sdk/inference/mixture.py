"""Several narrow base networks on a device, mixed at the moment of use.

Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747): the more bases have a part in
an answer, the better it is and the longer it takes. An answer is the mean of their logits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from edge_sdk.bundle.index import BundleIndex
from edge_sdk.bundle.manifest import Bundle, Manifest
from edge_sdk.bundle.signing import check, read_trust
from edge_sdk.errors import BundleError, DataError
from edge_sdk.protocol.frames import unpack_tensors
from edge_sdk.protocol.tensors import DTYPES, Array
from edge_sdk.runtime import Runtime, load_runtime


@dataclass(frozen=True)
class MixtureAnswer:
    """What some bases answer.

    Attributes:
        logits: their mean, (heads, rows, classes), or (heads, rows, positions, vocabulary).
        parts: packed activations of each, by number; none where all of a base is on the device.
    """

    logits: Array
    parts: dict[int, dict[str, Array]]


@dataclass(frozen=True)
class _Stack:
    """Numbers of some bases, best first, and their tensors, each (bases, ...)."""

    bases: list[int]
    tensors: dict[str, Array]


class Mixture:
    """The bases that a device holds, those that answer best first.

    Args:
        manifest: of the bundle, which is the same for all bases.
        runtime: runs its graphs; the state that it holds is not used, and stays.
    """

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self._manifest, self._runtime = manifest, runtime
        self._offered: dict[int, str] = {}
        self._states: dict[int, Mapping[str, Array]] = {}
        # replaced, never changed: an answer may be on its way in another thread
        self._stack = _Stack([], {})

    @classmethod
    def open(
        cls,
        folder: str | Path,
        tier: str,
        *,
        trust: Iterable[str | Path] | None = None,
        threads: int = 1,
    ) -> Mixture:
        """All bases of a folder that ``cutlayer mix`` has written, without a hub.

        Args:
            folder: the folder.
            tier: whose bundle.
            trust: public keys, one of which must have signed the bundle; without them an unsigned
                one is taken, too.
            threads: of the runtime.

        Raises:
            BundleError: there is no such bundle, it holds no trained bases, it is damaged, or not
                signed by a key in ``trust``.
        """
        index = BundleIndex.read(Path(folder))
        if tier not in index.tiers:
            known = ", ".join(index.tiers)
            raise BundleError(f"there is no tier {tier!r} in {folder}; it has {known}")
        blobs = index.blobs()
        data = blobs.read(index.tiers[tier].manifest)
        check(data, read_trust(trust))
        manifest = Manifest.from_bytes(data)
        if not manifest.base_states:
            raise BundleError(
                f"the bundle of {tier!r} in {folder} holds no trained bases; write one with "
                "cutlayer mix, from a hub's run"
            )
        mix = cls(manifest, load_runtime(Bundle.open(manifest, blobs.read), threads))
        mix.offer({str(i): name for i, name in enumerate(manifest.base_states)})
        for base, name in mix.missing(manifest.bases):
            mix.put(base, name, unpack_tensors(blobs.read(name)))
        return mix

    def offer(self, bases: Mapping[str, str]) -> None:
        """The present versions of all bases, by number, best first; older ones are forgotten."""
        offered = {int(base): version for base, version in bases.items()}
        self._states = {
            base: state for base, state in self._states.items()
            if self._offered[base] == offered.get(base)
        }  # fmt: skip
        self._offered = offered
        self._stack = _Stack([], {})

    @property
    def held(self) -> list[int]:
        """The bases that are here, best first."""
        return [base for base in self._offered if base in self._states]

    def missing(self, bases: int) -> list[tuple[int, str]]:
        """Number and version of those of the best ``bases`` that are not here.

        Raises:
            DataError: there are not so many, or none is asked for.
        """
        if not self._offered:
            raise DataError(
                f"{bases} bases are to be mixed, and the hub has named none; the model is not one "
                "of several bases"
            )
        if not 1 <= bases <= len(self._offered):
            raise DataError(
                f"{bases} bases are to be mixed; there are {len(self._offered)}, so ask for 1 to "
                f"{len(self._offered)}"
            )
        first = list(self._offered.items())[:bases]
        return [(base, version) for base, version in first if base not in self._states]

    def put(self, base: int, version: str, state: Mapping[str, Array]) -> None:
        """Add a base.

        Raises:
            BundleError: it is of another version than the others, or not of this bundle.
        """
        if self._offered.get(base) != version:
            raise BundleError(
                f"base {base} is here in version {version[:12]}…, and the others go with "
                f"{self._offered.get(base, 'none')[:12]}…; fetch it again, versions do not mix"
            )
        for spec in self._manifest.exchanged():
            tensor = state.get(spec.name)
            if tensor is None or (tensor.shape, tensor.dtype) != (spec.shape, DTYPES[spec.dtype]):
                raise BundleError(
                    f"base {base} lacks a fitting {spec.name}; it is of another model"
                )
        self._states = {**self._states, base: state}

    def answer(self, x: Array, bases: int, robustness: float = 0.0) -> MixtureAnswer:
        """What the best ``bases`` answer, in one call where the bundle has a graph for so many.

        Other numbers are sums of a few calls, 7 of 4, 2 and 1.

        Args:
            x: inputs (rows, ...).
            bases: how many have a part in it; they must be here.
            robustness: weight of the noise norms, from 0 to 1.

        Raises:
            DataError: there are not so many, or the robustness cannot be had.
        """
        check_robustness(robustness, self._manifest)
        absent = self.missing(bases)
        if absent:
            raise DataError(f"base {absent[0][0]} is not here yet; fetch it before it is mixed")
        stack = self._stacked(bases)
        given = {"x": x, "robustness": np.asarray(robustness, np.float32)}
        total: Array = np.zeros((), np.float32)
        parts = {}
        for first, count in self._calls(bases):
            some = {f"bases/{n}": t[first : first + count] for n, t in stack.tensors.items()}
            outputs = self._runtime.run(f"mix_{count}", {**given, **some})
            total = total + outputs.pop("logits") * np.float32(count / bases)
            for i, base in enumerate(stack.bases[first : first + count]):
                own = {n.removeprefix("bases."): part[i] for n, part in outputs.items()}
                if own:
                    parts[base] = own
        return MixtureAnswer(total, parts)

    def _stacked(self, bases: int) -> _Stack:
        """The best so many, and those behind them that are here, too."""
        stack, held = self._stack, self.held
        if stack.bases[:bases] != held[:bases]:
            states = [self._states[base] for base in held]
            names = [spec.name for spec in self._manifest.exchanged()]
            stack = self._stack = _Stack(held, {n: np.stack([s[n] for s in states]) for n in names})
        return stack

    def _calls(self, bases: int) -> Iterator[tuple[int, int]]:
        """From which base on, and how many, each call takes."""
        first = 0
        for count in reversed(self._manifest.mixes):
            while bases - first >= count:
                yield first, count
                first += count


def check_robustness(robustness: float, manifest: Manifest) -> None:
    """Raise :class:`DataError` unless a bundle can answer with this robustness."""
    if not 0 <= robustness <= 1:
        raise DataError(f"robustness is {robustness:g}; it must be from 0 to 1")
    names = [port.spec.name for port in manifest.graphs["predict"].inputs]
    if robustness and "robustness" not in names:
        raise DataError(
            f"robustness is {robustness:g}, and the model has no dual norms; export it with "
            "dual_norms = true, or leave robustness at 0"
        )
