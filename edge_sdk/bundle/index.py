"""The index of a folder of bundles: which tiers it has, and the manifest of each.

An export is a folder with ``index.json`` and ``blobs/``. Fields of the index that are not known
here are kept when the index is written again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_sdk.bundle.manifest import FORMAT, Manifest, check_format
from edge_sdk.bundle.store import BlobStore, write_atomically
from edge_sdk.errors import BundleError

INDEX = "index.json"


@dataclass(frozen=True)
class TierEntry:
    """A tier in the index.

    Attributes:
        cut: cut layer: how many blocks the devices hold.
        codec: how activations are packed.
        manifest: blob with the manifest, the identity of the bundle.
        extra: other fields.
    """

    cut: int
    codec: str
    manifest: str
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> TierEntry:
        """Parse an entry. Raises KeyError, TypeError, ValueError or AttributeError."""
        extra = {k: v for k, v in raw.items() if k not in ("cut", "codec", "manifest")}
        return cls(int(raw["cut"]), str(raw["codec"]), str(raw["manifest"]), extra)

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        return {"cut": self.cut, "codec": self.codec, "manifest": self.manifest, **self.extra}


@dataclass(frozen=True)
class BundleIndex:
    """A folder of bundles.

    Attributes:
        folder: path of the folder.
        model: ``module:function`` that builds the SplitModel, if it was exported from one.
        classes: number of classes.
        optimizer: the optimizer in the step graphs.
        tiers: tiers by name.
        extra: other fields.
    """

    folder: Path
    model: str | None
    classes: int
    optimizer: str
    tiers: Mapping[str, TierEntry] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> BundleIndex:
        """Read the index of an export; :class:`BundleError` if there is none."""
        known = ("format", "model", "classes", "optimizer", "tiers")
        try:
            raw = json.loads((folder / INDEX).read_text("utf-8"))
            check_format(raw["format"], str(folder))
            tiers = {name: TierEntry.from_json(entry) for name, entry in raw["tiers"].items()}
            extra = {k: v for k, v in raw.items() if k not in known}
            return cls(folder, raw["model"], raw["classes"], raw["optimizer"], tiers, extra)
        except (FileNotFoundError, NotADirectoryError):
            raise BundleError(
                f"no bundles in {folder} (it has no {INDEX}); run cutlayer export first"
            ) from None
        except OSError as error:
            raise BundleError(f"{folder / INDEX} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BundleError(f"{folder / INDEX} is damaged ({error}); export again") from error

    def write(self) -> None:
        """Write ``index.json``, in one step: readers see the old index or this one."""
        body = {
            "format": FORMAT,
            "model": self.model,
            "classes": self.classes,
            "optimizer": self.optimizer,
            **self.extra,
            "tiers": {name: entry.to_json() for name, entry in self.tiers.items()},
        }
        write_atomically(self.folder / INDEX, (json.dumps(body, indent=1) + "\n").encode())

    def manifest(self, tier: str) -> Manifest:
        """The manifest of a tier, verified by its sha256."""
        return Manifest.from_bytes(self.blobs().read(self.tiers[tier].manifest))

    def blobs(self) -> BlobStore:
        """The blobs of all tiers."""
        return BlobStore(self.folder / "blobs")
