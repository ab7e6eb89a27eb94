from __future__ import annotations

import math

import pytest
import torch

from il_policies.policies import PolicyError
from il_policies.policies.guidance import Guidance, correction, guidance_weight, rtc_weights
from test_bc import make_bc


@pytest.mark.parametrize(('H', 'd', 's'), [(16, 3, 5), (8, 0, 1), (8, 4, 4), (50, 6, 25), (8, 0, 8)])
def test_weights_are_those_of_the_paper(H, d, s):
    """Step by step, as eq. 5 is printed."""
    expected = []
    for i in range(H):
        if i < d:
            expected.append(1.0)
        elif i < H - s:
            c = (H - s - i) / (H - s - d + 1)
            expected.append(c * (math.exp(c) - 1) / (math.e - 1))
        else:
            expected.append(0.0)
    weights = rtc_weights(H, d, s)
    torch.testing.assert_close(weights, torch.tensor(expected), rtol=1e-6, atol=1e-7)
    assert (weights.diff() <= 0).all()


@pytest.mark.parametrize(('H', 'd', 's'), [(8, 3, 2), (8, 3, 6), (8, -1, 2), (8, 0, 0), (8, 0, 9)])
def test_weights_that_leave_no_room_are_refused(H, d, s):
    with pytest.raises(ValueError, match=f'delay is {d} and executed {s} of horizon {H}; must be 0 <= delay <= executed'):
        rtc_weights(H, d, s)


def test_guidance_weight_is_that_of_the_paper():
    for tau in (0.05, 0.3, 0.5, 0.9, 0.95):
        printed = (1 - tau) / tau * (tau**2 + (1 - tau) ** 2) / (1 - tau) ** 2
        assert guidance_weight(tau, 1e9) == pytest.approx(printed)
        assert guidance_weight(tau, 5.0) == pytest.approx(min(5.0, printed))
    assert guidance_weight(0.0, 5.0) == 5.0


def test_correction_is_the_vector_jacobian_product():
    """Against the Jacobian by central differences, at a point where it is far from the identity."""
    torch.manual_seed(0)
    mix = torch.randn(6, 6, dtype=torch.float64)

    def predict(x):
        clean = torch.tanh(x.flatten(1) @ mix).view_as(x)
        return 2 * clean, clean, clean

    x, target = torch.randn(1, 3, 2, dtype=torch.float64), torch.randn(1, 3, 2, dtype=torch.float64)
    weights = torch.tensor([1.0, 0.4, 0.0])
    with torch.no_grad():  # as in Policy.predict
        output, g = correction(predict, x, target, weights, 'vjp')
        plain, error = correction(predict, x, target, weights, 'identity')
    jacobian = torch.zeros(6, 6, dtype=torch.float64)
    for j in range(6):
        h = torch.zeros(6, dtype=torch.float64)
        h[j] = 1e-5
        h = h.view_as(x)
        jacobian[:, j] = (predict(x + h)[1] - predict(x - h)[1]).flatten() / 2e-5
    e = (target - predict(x)[1]) * weights.double()[:, None]
    torch.testing.assert_close(g.flatten(), e.flatten() @ jacobian, rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(error, e)
    torch.testing.assert_close(output, plain)
    assert not g.requires_grad and not output.requires_grad and not x.requires_grad


@pytest.mark.parametrize(('wrong', 'message'), [
    ({'mode': 'soft'}, "mode is 'soft'; valid: vjp, identity, prefix"), ({'beta': 0.0}, 'beta is 0.0, must be > 0'),
    ({'delay': 8}, 'delay is 8, must be at least 0 and less than the horizon, 8'),
    ({'weights': torch.ones(7)}, r'weights have shape \(7,\), must be \(8,\) or \(2, 8\)'),
    ({'target': torch.zeros(8, 3)}, r'target has shape \(8, 3\), must be \(B, H, D\)')])
def test_wrong_guidance_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**{'target': torch.zeros(2, 8, 3), 'weights': torch.ones(8), **wrong})


def test_a_policy_that_does_not_sample_refuses_it():
    with pytest.raises(PolicyError, match='bc: it does not sample and takes no guidance'):
        make_bc().predict({'state': torch.zeros(1, 2, 2)}, guidance=Guidance(torch.zeros(1, 8, 3), torch.ones(8)))
