"""Training windows: for every row of every episode, the observations up to it and the actions from it on."""
from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from il_policies.data.cache import open_cache
from il_policies.data.errors import DataError
from il_policies.data.store import Dataset

THREADS = os.cpu_count() or 1
"""Threads that decode the images of a batch."""


class Windows:
    """One window per (episode, row t): history of rows t-To+1..t, actions of rows t..t+H-1; action 0 belongs to row t.

    Before the first row of an episode the first is repeated; after the last the last action is repeated and not valid.
    Low-dimensional data is held in memory. Images are read from DATASET/cache, where they lie decoded; those that are not
    there are decoded when asked for.
    """

    def __init__(self, dataset: Dataset, observations: Sequence[str], history: int, horizon: int,
                 episodes: Sequence[int] | None = None, cache: bool = True):
        """Gather the chosen episodes (places in `dataset.episodes`; None: all), and decode images not yet in the cache.

        cache: False never writes to the dataset's folder and decodes images for every batch, at about a tenth of the speed.
        Raises DataError for unknown features or episodes, an empty choice, or sizes below one.
        """
        unknown = [name for name in observations if name not in dataset.info.features]
        if unknown:
            raise DataError(f'{dataset.path}: no features {unknown}; there are: {list(dataset.info.features)}')
        if history < 1 or horizon < 1:
            raise DataError(f'history is {history} and horizon {horizon}; both must be at least 1')
        episodes = list(range(len(dataset)) if episodes is None else episodes)
        absent = [i for i in episodes if not 0 <= i < len(dataset)]
        if absent or not episodes:
            raise DataError(f'{dataset.path}: no episodes {absent or "chosen"}; there are {len(dataset)}')
        self.dataset, self.history, self.horizon = dataset, history, horizon
        tables = [dataset.lowdim(i) for i in episodes]
        self.lowdim = {name: np.concatenate([table[name] for table in tables])
                       for name in observations if name in dataset.info.lowdim}
        """Feature → all N rows of the chosen episodes, (N, D) float32."""
        self.images = [name for name in observations if name in dataset.info.images]
        """The image and depth features."""
        self.action = np.concatenate([table['action'] for table in tables])
        """All actions, (N, D) float32."""
        lengths = np.array([len(table['stamp']) for table in tables])
        ends = np.cumsum(lengths)
        self._episode = np.repeat(np.array(episodes), lengths)  # (N,)
        self._first = np.repeat(ends - lengths, lengths)        # (N,) first row of the row's episode
        self._last = np.repeat(ends - 1, lengths)               # (N,)
        self._cached = open_cache(dataset, episodes, self.images) if cache else {}
        self._pool = ThreadPoolExecutor(THREADS, 'decode')

    def __len__(self) -> int:
        """Number of windows: one per row."""
        return len(self.action)

    def batch(self, indices: np.ndarray) -> dict:
        """The windows at rows `indices` (B,).

        Returns {'observation': {feature: (B, To, D) float32, (B, To, h, w, 3) uint8 RGB or (B, To, h, w, 1) uint16 [mm]},
        'action': (B, H, D) float32, 'valid': (B, H) bool}.
        """
        rows = np.asarray(indices, np.int64)
        past = np.maximum(rows[:, None] + np.arange(1 - self.history, 1), self._first[rows][:, None])  # (B, To)
        future = rows[:, None] + np.arange(self.horizon)                                              # (B, H)
        last = self._last[rows][:, None]
        observation = {name: values[past] for name, values in self.lowdim.items()}
        observation |= {name: self._images(name, past) for name in self.images}
        return {'observation': observation, 'action': self.action[np.minimum(future, last)], 'valid': future <= last}

    def _images(self, name: str, rows: np.ndarray) -> np.ndarray:
        """Images of rows (B, To), (B, To, h, w, c)."""
        feature = self.dataset.info.features[name]
        images = np.empty((*rows.shape, *feature.shape), feature.dtype)
        flat = images.reshape(-1, *feature.shape)
        absent: dict[tuple[int, int], list[int]] = {}  # (episode, row) → places; what occurs several times is decoded once
        for k, (i, t) in enumerate(zip(self._episode[rows].ravel().tolist(), (rows - self._first[rows]).ravel().tolist())):
            cached = self._cached.get((i, name))
            if cached is None or not cached.read(t, flat[k]):
                absent.setdefault((i, t), []).append(k)
        def decode(share: list[tuple[tuple[int, int], list[int]]]) -> None:
            for (i, t), places in share:
                flat[places] = self.dataset.image(i, name, t)

        images_to_decode = list(absent.items())
        list(self._pool.map(decode, [images_to_decode[k::THREADS] for k in range(THREADS)]))
        return images
