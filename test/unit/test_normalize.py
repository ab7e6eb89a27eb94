from __future__ import annotations

import numpy as np
import pytest
import torch

from il_policies.policies.normalize import RANGE_FLOOR, Normalizer


def test_range_of_the_data_becomes_minus_one_to_one():
    data = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32) * [1.0, 100.0, 1e-2] + [0.0, 5.0, -3.0]
    scaled = Normalizer.fit({'state': data}).normalize('state', torch.tensor(data, dtype=torch.float32)).numpy()
    expected = 2 * (data - data.min(0)) / (data.max(0) - data.min(0)) - 1
    np.testing.assert_allclose(scaled, expected, atol=2e-4)


def test_unnormalize_is_the_inverse():
    data = np.random.default_rng(1).uniform(-2, 3, size=(50, 4)).astype(np.float32)
    normalizer = Normalizer.fit({'action': data})
    value = torch.randn(5, 7, 4)
    torch.testing.assert_close(normalizer.unnormalize('action', normalizer.normalize('action', value)), value)


def test_constant_columns_stay_finite_and_small_noise_on_them_small():
    data = np.full((10, 2), 1.5, np.float32)
    normalizer = Normalizer.fit({'state': data})
    assert normalizer.normalize('state', torch.tensor(data)).abs().max() == 0.0
    assert normalizer.normalize('state', torch.tensor(data) + RANGE_FLOOR / 2).abs().max() <= 1.001


def test_names_with_dots_and_no_weights():
    normalizer = Normalizer.fit({'arm.left': np.zeros((2, 1)), 'arm_left': np.ones((2, 1))})
    assert normalizer.normalize('arm.left', torch.zeros(1)) == 0.0
    assert normalizer.state_dict() == {}


def test_statistics_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match='finite'):
        Normalizer.fit({'state': np.array([[0.0], [np.nan]])})
