from __future__ import annotations

import pytest
import torch

from il_policies.policies.bc import BC, BCConfig
from il_policies.policies.transformer import TransformerConfig
from test_flow import SMALL, make_flow, make_spec, unit_normalizer


def make_bc(**config) -> BC:
    torch.manual_seed(0)
    return BC(make_spec(), BCConfig(SMALL, **config), unit_normalizer(make_spec())).eval()


def test_loss_is_the_mean_squared_error_of_the_valid_steps():
    bc = make_bc()
    observation = {'state': torch.randn(6, 2, 2).clamp(-1, 1)}
    action = torch.randn(6, 8, 3)
    valid = torch.arange(8)[None] < torch.tensor([8, 1, 3, 5, 8, 2])[:, None]
    loss = bc.loss({'observation': observation, 'action': action, 'valid': valid})['loss']
    prediction = bc.predict(observation)
    expected = torch.stack([(prediction[b, h] - action[b, h]).square().mean()
                            for b in range(6) for h in range(8) if valid[b, h]]).mean()
    torch.testing.assert_close(loss, expected)


def test_it_is_deterministic_and_ignores_noise():
    bc = make_bc()
    observation = {'state': torch.randn(2, 2, 2)}
    torch.testing.assert_close(bc.predict(observation), bc.predict(observation, noise=torch.randn(2, 8, 3)))


def test_its_network_is_flows_without_the_flow_time():
    """Every layer of one is in the other, and the same size but for what receives the time."""
    bc = {name: p.shape for name, p in make_bc().net.named_parameters()}
    flow = {name: p.shape for name, p in make_flow().net.named_parameters() if not name.startswith('time.')}
    assert bc.keys() == flow.keys()
    assert [name for name in bc if bc[name] != flow[name]] == [name for name in bc if name.endswith('film.weight')]


@pytest.mark.parametrize('backbone', ['unet', 'transformer'])
def test_it_learns_a_function(backbone):
    """Chunks a(h) = s·(h+1)/H, with s observed, are learnt from random s."""
    bc = make_bc(backbone=backbone, transformer=TransformerConfig(32, 2, 2))
    ramp = (torch.arange(8) + 1) / 8
    optimizer = torch.optim.Adam(bc.parameters(), lr=3e-3)
    for _ in range(200):
        s = torch.rand(64, 1) * 2 - 1
        batch = {'observation': {'state': s[:, None].expand(64, 2, 2)},
                 'action': (s * ramp)[..., None].expand(64, 8, 3), 'valid': torch.ones(64, 8, dtype=torch.bool)}
        optimizer.zero_grad()
        bc.loss(batch)['loss'].backward()
        optimizer.step()
    s = torch.linspace(-0.9, 0.9, 7)[:, None]
    chunk = bc.predict({'state': s[:, None].expand(7, 2, 2)})
    assert (chunk - (s * ramp)[..., None]).abs().mean() < 0.05
