"""Normalisation of each entry by its statistics in the training data: its range to [-1, 1], or mean 0 and deviation 1."""
from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

RANGE_FLOOR = 1e-3
"""Entries that vary less than this (in their own unit) are scaled as if they varied by this: constants stay finite."""
DEVIATION_FLOOR = 1e-2
"""The same for standard deviations; ACT's."""
BEYOND = 0.5
"""Observations are believed this far beyond the training range, as a fraction of it."""
Mode = Literal['min_max', 'mean_std']


class Normalizer(nn.Module):
    """Maps each entry's range in the training data to [-1, 1], or its mean to 0 and its standard deviation to 1.

    The statistics are plain numbers, which a checkpoint keeps as JSON; they serve both modes, and a policy chooses.
    """

    def __init__(self, statistics: dict[str, dict[str, list[float]]], mode: Mode = 'min_max'):
        """statistics: name → {'min': D numbers, 'max': D numbers}, and 'mean' and 'std' for the mode `mean_std`.

        Raises ValueError if they are absent, not finite, not ordered or of different lengths.
        """
        super().__init__()
        if mode not in get_args(Mode):
            raise ValueError(f'mode of normalisation is {mode!r}; valid: {", ".join(get_args(Mode))}')
        self.statistics, self.mode = statistics, mode
        self._index = {name: i for i, name in enumerate(statistics)}
        for name, i in self._index.items():
            needed = ('min', 'max') if mode == 'min_max' else ('min', 'max', 'mean', 'std')
            absent = [key for key in needed if key not in statistics[name]]
            if absent:
                raise ValueError(f'statistics of {name!r} lack {absent}, which {mode} needs; there are: '
                                 f'{list(statistics[name])}')
            low, high, *moments = (torch.tensor(statistics[name][key], dtype=torch.float64) for key in needed)
            if low.shape != high.shape or not (low.isfinite().all() and high.isfinite().all() and (low <= high).all()):
                raise ValueError(f'statistics of {name!r}: min {low.tolist()} and max {high.tolist()} must be finite '
                                 'and ordered')
            center, scale = (low + high) / 2, (high - low).clamp_min(RANGE_FLOOR) / 2
            most = 1.0 + 2.0 * BEYOND
            bound = torch.stack([-most * torch.ones_like(low), most * torch.ones_like(low)])
            if mode == 'mean_std':
                mean, deviation = moments
                if not (mean.shape == deviation.shape == low.shape and mean.isfinite().all() and deviation.isfinite().all()
                        and (deviation >= 0.0).all()):
                    raise ValueError(f'statistics of {name!r}: mean {mean.tolist()} and std {deviation.tolist()} must be '
                                     f'{len(low)} finite numbers each, std not negative')
                deviation = deviation.clamp_min(DEVIATION_FLOOR)
                bound = (center + bound * scale - mean) / deviation
                center, scale = mean, deviation
            # Not persistent: the JSON is the one place where they are kept. Names may hold dots, buffers may not.
            for part, value in (('center', center), ('scale', scale), ('low', bound[0]), ('high', bound[1])):
                self.register_buffer(f'{part}_{i}', value.float(), persistent=False)

    @classmethod
    def fit(cls, arrays: dict[str, np.ndarray], mode: Mode = 'min_max') -> Normalizer:
        """From training data. arrays: name → (N, D). Raises ValueError for data that is not finite."""
        # In double precision: the mean of a million equal float32 numbers is not that number.
        return cls({name: {'min': values.min(axis=0).astype(float).tolist(),
                           'max': values.max(axis=0).astype(float).tolist(),
                           'mean': values.mean(axis=0, dtype=float).tolist(),
                           'std': values.std(axis=0, dtype=float).tolist()} for name, values in arrays.items()}, mode)

    def _of(self, name: str, *parts: str) -> list[Tensor]:
        return [getattr(self, f'{part}_{self._index[name]}') for part in parts]

    def normalize(self, name: str, value: Tensor) -> Tensor:
        """Raw units → normalised. Shape (..., D)."""
        center, scale = self._of(name, 'center', 'scale')
        return (value - center) / scale

    def bounded(self, name: str, value: Tensor) -> Tensor:
        """As `normalize`, with values far outside the training range brought back to `BEYOND` it. Shape (..., D).

        An entry that hardly moved in the demonstrations would drown all others when it is off live.
        """
        low, high = self._of(name, 'low', 'high')
        return self.normalize(name, value).clamp(low, high)

    def unnormalize(self, name: str, value: Tensor) -> Tensor:
        """The inverse of `normalize`. Shape (..., D)."""
        center, scale = self._of(name, 'center', 'scale')
        return value * scale + center
