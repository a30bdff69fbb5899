"""Several narrow base networks on a device, mixed at the moment of use.

Split-Mix (Hong et al., ICLR 2022, https://arxiv.org/abs/2203.09747): an answer is the mean of the
logits of some base networks. With more of them it is better and takes longer.
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
from edge_sdk.training.learner import Learner
from edge_sdk.training.self_check import check_sample


@dataclass(frozen=True)
class MixtureAnswer:
    """The answer of some base networks.

    Attributes:
        logits: mean of their logits, (heads, rows, classes), or (heads, rows, positions,
            vocabulary).
        parts: packed activations by number of the base; empty if bases are whole on the device.
    """

    logits: Array
    parts: dict[int, dict[str, Array]]


@dataclass(frozen=True)
class _Stack:
    """Numbers of some bases, best first, and their stacked tensors, each (bases, ...)."""

    bases: list[int]
    tensors: dict[str, Array]


class Mixture:
    """The base networks that a device holds, best first.

    Args:
        manifest: manifest of the bundle, which all bases share.
        runtime: runs its graphs; the state that it holds is neither used nor changed.
    """

    def __init__(self, manifest: Manifest, runtime: Runtime) -> None:
        self._manifest, self._runtime = manifest, runtime
        self._offered: dict[int, str] = {}
        self._states: dict[int, Mapping[str, Array]] = {}
        # replaced, never changed: another thread may be computing an answer
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
        """Load all base networks from bundles that ``cutlayer model export`` wrote, without
        a hub.

        Args:
            folder: the folder.
            tier: the tier whose bundle is loaded.
            trust: public keys, one of which must have signed the bundle; without them an unsigned
                bundle is accepted.
            threads: threads of the runtime.

        Raises:
            BundleError: there is no such bundle, it holds no trained bases, it is damaged, it is
                not signed by a key in ``trust``, or it answers its sample differently.
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
                "cutlayer model export RUN --format bundles"
            )
        bundle = Bundle.open(manifest, blobs.read)
        runtime = load_runtime(bundle, threads)
        check_sample(Learner(manifest, runtime), bundle.sample)
        mixture = cls(manifest, runtime)
        mixture.offer({str(i): name for i, name in enumerate(manifest.base_states)})
        for base, name in mixture.missing(manifest.bases):
            mixture.put(base, name, unpack_tensors(blobs.read(name)))
        return mixture

    def offer(self, bases: Mapping[str, str]) -> None:
        """Set the present versions of all bases; states of other versions are dropped.

        Args:
            bases: version (sha256 of the state) by number of the base, best first.
        """
        offered = {int(base): version for base, version in bases.items()}
        self._states = {
            base: state for base, state in self._states.items()
            if self._offered[base] == offered.get(base)
        }  # fmt: skip
        self._offered = offered
        self._stack = _Stack([], {})

    @property
    def held(self) -> list[int]:
        """Numbers of the bases whose states are here, best first."""
        return [base for base in self._offered if base in self._states]

    def missing(self, bases: int) -> list[tuple[int, str]]:
        """Number and version of those of the best ``bases`` bases that are not here.

        Raises:
            DataError: ``bases`` is below 1, or there are fewer.
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
        """Add the state of a base.

        Raises:
            BundleError: the version is not the present one, or the tensors do not fit the bundle.
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
        """The answer of the best ``bases`` bases.

        It takes one call if the bundle has a graph for this number, else a few: 7 bases take the
        graphs for 4, 2 and 1.

        Args:
            x: inputs (rows, ...), as the model takes them.
            bases: number of bases to mix; their states must be here.
            robustness: weight of the noise norms, from 0 to 1.

        Raises:
            DataError: the inputs do not fit the model, there are fewer bases, one of them is not
                here, or ``robustness`` is out of range or not available.
        """
        x = self._manifest.ranges.fit_x(x)
        self._manifest.check_robustness(robustness)
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
        """Stacked tensors of all bases that are here; the best ``bases`` are among them."""
        stack, held = self._stack, self.held
        if stack.bases[:bases] != held[:bases]:
            states = [self._states[base] for base in held]
            names = [spec.name for spec in self._manifest.exchanged()]
            stack = self._stack = _Stack(held, {n: np.stack([s[n] for s in states]) for n in names})
        return stack

    def _calls(self, bases: int) -> Iterator[tuple[int, int]]:
        """The first base and the number of bases of each call."""
        first = 0
        for count in reversed(self._manifest.mixture_sizes):
            while bases - first >= count:
                yield first, count
                first += count
