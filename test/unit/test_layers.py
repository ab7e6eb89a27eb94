"""Arrows point down only (README, "The house"): read from the sources, so that an unused import counts too."""
from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / 'src'
PACKAGES = {package: sorted((ROOT / package / package).rglob('*.py')) for package in ('il_policies', 'il_runtime')}
TORCH = {'torch', 'il_policies.policies', 'il_policies.checkpoint', 'il_policies.train', 'il_policies.planner',
         'il_policies.evaluate', 'il_policies.lockstep', 'il_policies.replay', 'il_policies.deploy',
         'il_policies.bench'}


def imports(path: Path, top_level: bool = False) -> set[str]:
    """Every module that a file imports; only those run at its own import, if asked."""
    tree = ast.parse(path.read_text())
    nodes = [n for n in tree.body] if top_level else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
    return found


def touching(found: set[str], modules: set[str]) -> set[str]:
    return {name for name in found for module in modules if name == module or name.startswith(module + '.')}


def of(package: str, *parts: str) -> list[Path]:
    return [path for path in PACKAGES[package] if (ROOT / package / package).joinpath(*parts) in (path, *path.parents)]


def test_there_is_something_to_look_at():
    assert len(PACKAGES['il_policies']) > 10 and len(PACKAGES['il_runtime']) > 10


@pytest.mark.parametrize('path', PACKAGES['il_policies'], ids=lambda p: p.name)
def test_il_policies_knows_no_ros(path):
    ros = {'rclpy', 'il_msgs', 'sensor_msgs', 'std_msgs', 'geometry_msgs', 'builtin_interfaces', 'il_runtime'}
    allowed = {name for name in imports(path) if name.startswith('il_runtime.core.')} if path.name == 'lockstep.py' else set()
    assert touching(imports(path), ros) <= allowed


@pytest.mark.parametrize('path', [path for part in ('bags', 'data', 'exchange', 'sim', 'contract.py')
                                  for path in of('il_policies', part)], ids=lambda p: p.name)
def test_data_simulation_and_contract_know_no_torch(path):
    assert not touching(imports(path), TORCH)


@pytest.mark.parametrize('path', of('il_runtime', 'core'), ids=lambda p: p.name)
def test_core_is_pure(path):
    allowed = ('numpy', 'ruckig', 'il_policies.contract', 'il_runtime.core',
               '__future__', 'bisect', 'collections', 'dataclasses', 'enum', 'math')
    assert {name for name in imports(path) if not name.startswith(allowed)} == set()


@pytest.mark.parametrize('path', PACKAGES['il_runtime'], ids=lambda p: p.name)
def test_policy_node_alone_imports_torch(path):
    if path.name == 'policy_node.py':
        assert touching(imports(path), {'torch'})
    else:
        assert not touching(imports(path, top_level=True), TORCH)
