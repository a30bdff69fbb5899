"""Names that travel, as enums: activation modes and error codes."""

from __future__ import annotations

import enum


class ActivationMode(enum.StrEnum):
    """When a device sends activations in a round, and what comes back for them."""

    NONE = "none"
    """Never: the device trains alone."""
    TRAIN = "train"
    """From the training steps of the first epoch; nothing comes back."""
    FORWARD = "forward"
    """From a pass before training; nothing comes back."""
    RETURNED = "returned"
    """In every epoch; the device steps with the gradient that comes back, its heads rest."""
    FUSED = "fused"
    """In every epoch; the device joins the gradient that comes back with that of its heads."""
    U_SHAPED = "u_shaped"
    """In every epoch, without labels: features come back, then the gradient."""

    @property
    def returns_gradients(self) -> bool:
        """Whether a gradient comes back for every batch."""
        return self in (self.RETURNED, self.FUSED, self.U_SHAPED)
