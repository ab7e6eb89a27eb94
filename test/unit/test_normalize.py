from __future__ import annotations

import numpy as np
import pytest
import torch

from il_policies.policies.normalize import DEVIATION_FLOOR, RANGE_FLOOR, Normalizer


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


def test_mean_becomes_zero_and_deviation_one():
    data = (np.random.default_rng(2).normal(size=(500, 3)) * [1.0, 100.0, 0.3] + [0.0, 5.0, -3.0]).astype(np.float32)
    normalizer = Normalizer.fit({'state': data}, 'mean_std')
    scaled = normalizer.normalize('state', torch.tensor(data)).double().numpy()
    np.testing.assert_allclose(scaled.mean(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(scaled.std(0), 1.0, atol=1e-4)
    torch.testing.assert_close(normalizer.unnormalize('state', torch.tensor(scaled).float()), torch.tensor(data))


def test_small_deviations_are_taken_as_the_floor():
    normalizer = Normalizer.fit({'state': np.array([[2.0, 0.0], [2.0, 2e-3]])}, 'mean_std')
    scaled = normalizer.normalize('state', torch.tensor([2.0 + DEVIATION_FLOOR, 1e-3 - DEVIATION_FLOOR]))
    torch.testing.assert_close(scaled, torch.tensor([1.0, -1.0]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('mode', ['min_max', 'mean_std'])
def test_observations_are_believed_half_a_range_beyond_what_was_seen(mode):
    """The mean lies at a fifth of the range, so that the two modes bound at different normalised numbers."""
    data = np.array([[0.0]] * 8 + [[10.0]] * 2)
    normalizer = Normalizer.fit({'state': data}, mode)
    value = torch.tensor([[-100.0], [-5.0], [-4.0], [3.0], [14.0], [15.0], [100.0]])
    seen = normalizer.unnormalize('state', normalizer.bounded('state', value))
    torch.testing.assert_close(seen, value.clamp(-5.0, 15.0))


def test_statistics_of_older_checkpoints_serve_min_max_only():
    older = {'state': {'min': [0.0], 'max': [2.0]}}
    assert Normalizer(older).normalize('state', torch.tensor([2.0])) == 1.0
    with pytest.raises(ValueError, match=r"statistics of 'state' lack \['mean', 'std'\], which mean_std needs"):
        Normalizer(older, 'mean_std')
    with pytest.raises(ValueError, match="std not negative"):
        Normalizer({'state': {**older['state'], 'mean': [1.0], 'std': [-1.0]}}, 'mean_std')
    with pytest.raises(ValueError, match="'z_score'; valid: min_max, mean_std"):
        Normalizer(older, 'z_score')
