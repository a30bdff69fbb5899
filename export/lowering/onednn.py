"""Disables oneDNN, whose kernels have no translation; imports nothing but torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_onednn() -> Iterator[None]:
    """Disable oneDNN, so that an LSTM is traced as matrix products: its kernel has no translation.

    ``torch.backends.mkldnn.flags`` would do the same, but warns about settings of GPUs.
    """
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
