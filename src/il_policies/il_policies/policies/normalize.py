"""Min-max normalisation to [-1, 1], per entry."""
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

RANGE_FLOOR = 1e-3
"""Entries that vary less than this (in their own unit) are scaled as if they varied by this: constants stay finite."""


class Normalizer(nn.Module):
    """Maps each entry's range in the training data to [-1, 1].

    The statistics are plain numbers, which a checkpoint keeps as JSON.
    """

    def __init__(self, statistics: dict[str, dict[str, list[float]]]):
        """statistics: name → {'min': D numbers, 'max': D numbers}.

        Raises ValueError if they are not finite or not ordered.
        """
        super().__init__()
        self.statistics = statistics
        self._index = {name: i for i, name in enumerate(statistics)}
        for name, i in self._index.items():
            low = torch.tensor(statistics[name]['min'], dtype=torch.float64)
            high = torch.tensor(statistics[name]['max'], dtype=torch.float64)
            if low.shape != high.shape or not (low.isfinite().all() and high.isfinite().all() and (low <= high).all()):
                raise ValueError(f'statistics of {name!r}: min {low.tolist()} and max {high.tolist()} must be finite '
                                 'and ordered')
            # Not persistent: the JSON is the one place where they are kept. Names may hold dots, buffers may not.
            self.register_buffer(f'center_{i}', ((low + high) / 2).float(), persistent=False)
            self.register_buffer(f'half_{i}', ((high - low).clamp_min(RANGE_FLOOR) / 2).float(), persistent=False)

    @classmethod
    def fit(cls, arrays: dict[str, np.ndarray]) -> Normalizer:
        """From training data. arrays: name → (N, D). Raises ValueError for data that is not finite."""
        return cls({name: {'min': values.min(axis=0).astype(float).tolist(),
                           'max': values.max(axis=0).astype(float).tolist()} for name, values in arrays.items()})

    def _of(self, name: str) -> tuple[Tensor, Tensor]:
        i = self._index[name]
        return getattr(self, f'center_{i}'), getattr(self, f'half_{i}')

    def normalize(self, name: str, value: Tensor) -> Tensor:
        """Raw units → [-1, 1] over the training range. Shape (..., D)."""
        center, half = self._of(name)
        return (value - center) / half

    def unnormalize(self, name: str, value: Tensor) -> Tensor:
        """The inverse. Shape (..., D)."""
        center, half = self._of(name)
        return value * half + center
