"""Models that lie on the devices as a whole."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from export.split import SplitModel


class NoHead(nn.Module):
    """Stands where a model's head would: its answers are those of its last auxiliary head."""

    def forward(self, h: Tensor) -> Tensor:
        """``h``."""
        return h


def without_trunk(model: SplitModel) -> SplitModel:
    """A model that is cut behind its last block: its head stands where an auxiliary head would.

    Nothing is left above the cut but a block and a head that do nothing. Auxiliary heads that the
    model has are left out.
    """
    model = copy.deepcopy(model)
    whole = SplitModel(
        model.stem,
        [*model.block, nn.Identity()],
        NoHead(),
        model.task,
        channels_first=model.channels_first,
    )
    whole.aux[str(model.depth)] = model.head
    return whole
