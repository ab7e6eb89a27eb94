"""Mismatches made on purpose, one at a time: each must be found, named, and explained with its fix, and nothing else said."""
from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from il_policies import checkpoint, cli
from il_policies.check.agreement import differences, of_contract, of_policy, ranges_of
from il_policies.check.command import CheckError, check
from il_policies.check.facts import Endpoint, Graph, Measured
from il_policies.check.findings import FAIL, NOTE, PASS, WARN, Report, show
from il_policies.check.streams import check_graph, check_streams, check_units, compare_streams
from il_policies.contract import Contract, Joint, from_dict
from il_policies.data.convert import convert
from il_policies.data.store import Dataset
from il_policies.policies import PolicySpec
from il_policies.policies.flow import Flow, FlowConfig
from il_policies.policies.normalize import Normalizer
from recordings import MS, START, compressed, contract, joint_state, picture, point, recording, write_bag

CONTRACT = contract()
ABOUT = {'contract': json.dumps(CONTRACT.to_dict())}
HOUR = 3600 * 1000 * MS


def write_contract(path: Path, robot: Contract) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(robot.to_dict()))
    return path


def save_policy(path: Path, dataset: Dataset, **changes) -> Path:
    """An untrained policy, as trained on a dataset; changes: fields of its spec, or `statistics` by feature, or `extra`."""
    torch.manual_seed(0)
    extra = {'contract': dataset.info.contract, 'dataset_hash': dataset.hash, **changes.pop('extra', {})}
    statistics = {name: {end: list(values.values()) for end, values in zip(('min', 'max'), ends)}
                  for name, ends in ranges_of(dataset).items()} | changes.pop('statistics', {})
    spec = PolicySpec(**{'features': {'joints': (2,), 'goal': (2,)}, 'action_names': dataset.info.action.names, 'horizon': 8,
                         'history': 1, 'step_period': 0.1, 'action_offset': 0.0, **changes})
    checkpoint.save(path, Flow(spec, FlowConfig(), Normalizer(statistics)), extra)
    return path


@pytest.fixture(scope='module')
def clean(tmp_path_factory) -> dict[str, Path]:
    """A contract, bags recorded under it, their dataset, and a policy of that."""
    folder = tmp_path_factory.mktemp('clean')
    for name in ('demo_1', 'demo_2'):
        write_bag(folder / 'bags' / name, recording(3.0), custom={'success': 'true'}, about=ABOUT)
    convert(folder / 'bags', CONTRACT, folder / 'dataset')
    save_policy(folder / 'policy', Dataset(folder / 'dataset'))
    return {'contract': write_contract(folder / 'two.yaml', CONTRACT), 'bags': folder / 'bags', 'dataset': folder / 'dataset',
            'policy': folder / 'policy'}


def faults(report: Report) -> list:
    return [finding for part in report.sections for finding in part.findings if finding.level in (FAIL, WARN)]


def changed(**fields) -> Contract:
    """The contract with other fields: dotted paths with __ for dots, such as observations__joints__rate."""
    data = CONTRACT.to_dict()
    for path, value in fields.items():
        *above, last = path.split('__')
        place = data
        for key in above:
            place = place[int(key) if key.isdigit() else key]
        place[last] = value
    return from_dict(Contract, data, 'test')


def assert_only(report: Report, level: str, code: str, place: str, found: str, fix: str) -> None:
    """All that is wrong is this."""
    wrong = faults(report)
    assert {finding.code for finding in wrong} == {code}, wrong
    matching = [finding for finding in wrong if place in finding.place]
    assert matching, wrong
    first = matching[0]
    assert first.level == level and found in first.words and fix in first.fix, first


# --- nothing wrong ----------------------------------------------------------------------------------------------------

def test_what_fits_is_said_and_nothing_else(clean):
    report = check(list(clean.values()))
    assert not faults(report)
    words = '\n'.join(finding.words for part in report.sections for finding in part.findings if finding.level == PASS)
    for said in ('joints (/joint_states) in 2 of 2', 'names (in another order: matched by name), beside 1 more, 100 Hz',
                 'front (/camera/compressed)', '8×12 jpeg', 'values within the limits', 'the same, hash ' + CONTRACT.hash,
                 f'trained on exactly {clean["dataset"]}', 'goal, front; 2 joints in the same order; 10 Hz'):
        assert said in words, words


@pytest.mark.parametrize('things', [('dataset', 'policy'), ('bags', 'policy'), ('bags', 'dataset'), ('policy',), ('bags',)])
def test_the_contract_may_be_the_one_that_something_carries(clean, things):
    report = check([clean[name] for name in things])
    assert not faults(report) and f'hash {CONTRACT.hash}' in report.sections[0].title
    assert str(clean[things[0 if 'dataset' not in things else things.index('dataset')]]) in report.sections[0].title or (
        things == ('bags', 'policy'))  # of these the policy is the nearer to what runs


# --- the contract and its description ---------------------------------------------------------------------------------

URDF = """<robot name="two"><link name="base"/><link name="arm"/><link name="hand"/>
<joint name="a" type="{a}"><parent link="base"/><child link="arm"/><axis xyz="0 0 1"/>
<limit lower="{low}" upper="3.1" velocity="{v}" effort="1"/></joint>
<joint name="{b}" type="revolute"><parent link="arm"/><child link="hand"/><axis xyz="0 0 1"/>
<limit lower="-3.1" upper="3.1" velocity="2" effort="1"/></joint>
</robot>"""


def describe(tmp_path, monkeypatch, a='revolute', b='b', low=-3.1, v=2.0, **fields) -> Report:
    """The contract with this description, checked."""
    share = tmp_path / 'prefix/share/two_description'
    share.mkdir(parents=True)
    (share / 'two.urdf').write_text(URDF.format(a=a, b=b, low=low, v=v))
    monkeypatch.setenv('AMENT_PREFIX_PATH', str(tmp_path / 'prefix'))
    robot = changed(**{'description': 'package://two_description/two.urdf', 'end_effector': 'hand', **fields})
    return check([write_contract(tmp_path / 'two.yaml', robot)])


def test_a_description_that_fits(tmp_path, monkeypatch):
    report = describe(tmp_path, monkeypatch)
    assert not faults(report)
    assert '2 joints with their units and limits, end effector hand' in [f.found for f in report.sections[0].findings]


@pytest.mark.parametrize(('case', 'level', 'code', 'place', 'found', 'fix'), [
    ({'description': 'package://nowhere/two.urdf'}, WARN, 'E501', 'description', 'not found', 'AMENT_PREFIX_PATH'),
    ({'b': 'bee'}, FAIL, 'E501', 'joints', 'expected b in the description, found a, bee', 'bee for b'),
    ({'end_effector': 'hands'}, FAIL, 'E501', 'end_effector', 'found links base, arm, hand', 'end_effector: hand'),
    ({'low': -1.234}, WARN, 'E502', 'joints.a.position', 'found [-3, 3]', 'position: [-1.23, 3]'),
    ({'v': 0.5}, WARN, 'E502', 'joints.a.velocity', 'at most 0.5', 'velocity: 0.5'),
    ({'a': 'prismatic'}, FAIL, 'E503', 'joints.a.unit', 'prismatic in the description, found rad', 'unit: m'),
    ({'a': 'fixed'}, FAIL, 'E501', 'joints', 'expected a in the description', 'spelling'),
    ({'joints__0__position': [-180, 180]}, FAIL, 'E503', 'joints.a.position', 'degrees', 'position: [-3.142, 3.142]'),
    ({'observations__joints__max_age': 0.005}, FAIL, 'E507', 'observations.joints.max_age', '0.005 s', 'max_age: 0.03'),
    ({'observations__front__rate': 25.0}, WARN, 'E211', 'policy_rate', '25 Hz of front', 'policy_rate: 12.5, or 8.333'),
    ({'observations__goal__rate': 5.0}, WARN, 'E211', 'observations.goal.rate', '5 Hz', 'policy_rate: 5'),
])
def test_a_contract_that_does_not_fit_its_robot(tmp_path, monkeypatch, case, level, code, place, found, fix):
    report = describe(tmp_path, monkeypatch, **case)
    wrong = [finding for finding in faults(report) if place == finding.place]
    assert wrong and (wrong[0].level, wrong[0].code) == (level, code), faults(report)
    assert found in wrong[0].words and fix in wrong[0].fix, wrong[0]


# --- bags -------------------------------------------------------------------------------------------------------------

def renamed(topic, stamp, message):
    if topic == 'joint_states':
        message = joint_state(stamp, ['joint_b', 'x', 'a'], message.position)
    return topic, stamp, message


def doubled(topic, stamp, message):
    if topic == 'joint_states':
        message = joint_state(stamp, ['b', 'b', 'a'], message.position[[0, 0, 2]])
    return topic, stamp, message


def apart(topic, stamp, message):
    if topic == 'joint_states':
        i = (stamp - START) // (10 * MS)
        message = joint_state(stamp, ['a', 'x'] if i % 2 else ['b'], [0.1] * (1 + i % 2))
    return topic, stamp, message


def in_degrees(topic, stamp, message):
    if topic == 'joint_states':
        message = joint_state(stamp, message.name, np.degrees(message.position))
    return topic, stamp, message


def half_as_often(topic, stamp, message):
    return None if topic == 'joint_states' and (stamp - START) // (10 * MS) % 2 else (topic, stamp, message)


def wide(topic, stamp, message):
    return (topic, stamp, compressed(stamp, picture(9, (9, 16)))) if topic == 'camera/compressed' else (topic, stamp, message)


def truncated(topic, stamp, message):
    if topic == 'camera/compressed':
        message = compressed(stamp, bytes(message.data)[:-20])
    return topic, stamp, message


def unstamped(topic, stamp, message):
    return (topic, stamp, point(0, 0.1, 0.2)) if topic == 'goal' else (topic, stamp, message)


def an_hour_off(topic, stamp, message):
    return (topic, stamp, compressed(stamp - HOUR, picture(9))) if topic == 'camera/compressed' else (topic, stamp, message)


def not_a_number(topic, stamp, message):
    return (topic, stamp, point(stamp, np.nan, 0.2)) if topic == 'goal' else (topic, stamp, message)


def elsewhere(topic, stamp, message):
    return ('target' if topic == 'goal' else topic), stamp, message


def of_another_type(topic, stamp, message):
    return (topic, stamp, joint_state(stamp, ['x'], [0.0])) if topic == 'goal' else (topic, stamp, message)


@pytest.mark.parametrize(('change', 'level', 'code', 'place', 'found', 'fix'), [
    (renamed, FAIL, 'E203', 'joints', 'expected joints b, found joint_b, x, a', 'joint_b for b'),
    (doubled, FAIL, 'E203', 'joints', 'b doubled in', 'one entry a joint'),
    (apart, FAIL, 'E203', 'joints', 'messages with', 'joint_state_publisher'),
    (in_degrees, FAIL, 'E503', 'joints', 'a 0 … 57.3 (limits -3 … 3 rad)', 'radians'),
    (half_as_often, FAIL, 'E211', 'joints', 'expected 100 Hz, found 50 Hz', 'observations.joints.rate: 50.0'),
    (wide, WARN, 'E508', 'front', 'expected the shape of 8×12 (image_size), found 9×16',
     'observations.front.image_size: [8, 14]'),
    (truncated, FAIL, 'E208', 'front', 'no whole JPEG', 'observations.front.type'),
    (unstamped, FAIL, 'E204', 'goal', 'no such stamp (30 of 30 messages)', 'observations.goal.clock: receive'),
    (an_hour_off, FAIL, 'E204', 'front', 'stamps 3600 s before their arrival', 'chrony'),
    (not_a_number, FAIL, 'E205', 'goal', 'x = nan', 'repair the driver'),
    (elsewhere, FAIL, 'E201', 'goal', 'not in the bag', 'observations.goal.topic: /target'),
    (of_another_type, FAIL, 'E201', 'goal', 'found sensor_msgs/msg/JointState', 'observations.goal.topic'),
])
def test_a_bag_that_does_not_fit(clean, tmp_path, change, level, code, place, found, fix):
    bag = write_bag(tmp_path / 'demo', [entry for entry in (change(*entry) for entry in recording(3.0)) if entry])
    assert_only(check([clean['contract'], bag]), level, code, place, found, fix)


def test_fields_that_a_message_does_not_have(clean, tmp_path):
    robot = write_contract(tmp_path / 'other.yaml', changed(observations__goal__fields=['point.x', 'point.q']))
    assert_only(check([robot, clean['bags']]), FAIL, 'E203', 'goal in 2 of 2',
                'expected fields point.x, point.q, found point.q: no', 'observations.goal.fields')


@pytest.mark.parametrize(('topic', 'code', 'fix'), [('goal', 'E202', 'driver'), ('command', 'E209', 'next_state')])
def test_a_bag_with_a_silent_topic(clean, tmp_path, topic, code, fix):
    bag = write_bag(tmp_path / 'demo', recording(3.0), keep=lambda name, _: name != topic)
    assert_only(check([clean['contract'], bag]), FAIL, code, {'command': 'action'}.get(topic, topic), 'no message', fix)


def test_a_stream_that_stops_for_longer_than_its_max_age(clean, tmp_path):
    bag = write_bag(tmp_path / 'demo', recording(3.0),
                    keep=lambda topic, time: topic != 'joint_states' or not 1000 * MS < time < 1300 * MS)
    assert_only(check([clean['contract'], bag]), WARN, 'E507', 'joints', 'some that get 0.30 s old',
                'observations.joints.max_age: 0.45')


def test_simulated_time_is_no_mismatch(clean, tmp_path):
    bag = write_bag(tmp_path / 'demo', recording(3.0), delay=HOUR)
    report = check([clean['contract'], bag])
    assert not faults(report) and any('simulated time' in f.found for f in report.sections[-1].findings if f.level == NOTE)


def test_another_namespace_in_a_bag_is_none_either(clean, tmp_path):
    assert not faults(check([clean['contract'], write_bag(tmp_path / 'demo', recording(3.0), prefix='/left/')]))


def test_a_damaged_bag_beside_others(clean, tmp_path):
    bags = tmp_path / 'bags'
    shutil.copytree(clean['bags'], bags)
    file = next((bags / 'demo_2').glob('*.mcap'))
    file.write_bytes(file.read_bytes()[:-2000])
    assert_only(check([clean['contract'], bags]), FAIL, 'E101', 'cannot be opened', 'usable', '')


def test_a_bag_recorded_under_another_contract(clean, tmp_path):
    other = changed(observations__joints__rate=90.0, joints__0__velocity=2.0)
    bag = write_bag(tmp_path / 'demo', recording(3.0), about={'contract': json.dumps(other.to_dict())})
    report = check([clean['contract'], bag])
    assert_only(report, WARN, 'E509', 'joints.a.velocity', f'expected 1.0 ({clean["contract"]}), found 2.0', 'il convert')
    assert any('observations.joints.rate' in f.found for f in report.sections[-1].findings if f.level == NOTE)


# --- dataset and checkpoint -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('fields', 'level', 'code', 'place', 'found', 'fix'), [
    ({'policy_rate': 5.0}, FAIL, 'E510', 'policy_rate', '0.2 s, 5 Hz', 'policy_rate: 10'),
    ({'action__joints': ['a', 'b']}, FAIL, 'E512', 'action.joints', "['b', 'a']: the same joints in another order",
     'action.joints: [b, a]'),
    ({'observations__joints__names': ['b', 'a']}, FAIL, 'E511', 'observations.joints.names',
     "the same in another order: ['a', 'b']", 'observations.joints.names: [a, b]'),
    ({'observations__front__image_size': [16, 24]}, FAIL, 'E511', 'observations.front', 'shape 16×24×3 (',
     'observations.front.image_size: [8, 12]'),
    ({'action__label': 'next_state'}, WARN, 'E513', 'action.label', 'found 0 s after', 'action.label: command'),
    ({'observations__goal__clock': 'receive'}, WARN, 'E509', 'observations.goal.clock', "found header", 'clock: '),
    ({'joints__1__position': [-3.5, 3.0]}, WARN, 'E509', 'joints.b.position', 'found [-3.0, 3.0]',
     'joints.b.position: [-3.0, 3.0]'),
])
def test_a_dataset_of_another_contract(clean, tmp_path, fields, level, code, place, found, fix):
    robot = write_contract(tmp_path / 'other.yaml', changed(**fields))
    assert_only(check([robot, clean['dataset']]), level, code, place, found, fix)


def test_contracts_are_compared_by_the_names_of_joints():
    data = changed(joints__1__velocity=0.5).to_dict()
    reordered = from_dict(Contract, data | {'joints': data['joints'][::-1]}, 'test')
    assert CONTRACT.differences(reordered) == ['joints.b.velocity: 1.0 ≠ 0.5']
    data = CONTRACT.to_dict()
    reordered = from_dict(Contract, data | {'joints': data['joints'][::-1]}, 'test')
    assert CONTRACT.differences(reordered) == ["joints: ['a', 'b'] ≠ ['b', 'a']"]
    more = from_dict(Contract, data | {'joints': [*data['joints'], {**data['joints'][0], 'name': 'c'}]}, 'test')
    assert list(CONTRACT.differing(more)) == ['joints.c'] and CONTRACT.differing(CONTRACT) == {}


def test_a_feature_by_another_name(clean, tmp_path):
    data = CONTRACT.to_dict()
    data['observations']['target'] = data['observations'].pop('goal')
    robot = write_contract(tmp_path / 'other.yaml', from_dict(Contract, data, 'test'))
    for thing in ('dataset', 'policy'):
        assert_only(check([robot, clean[thing]]), FAIL, 'E511', 'observations.goal', 'found goal', 'add observations.goal')


@pytest.mark.parametrize(('changes', 'level', 'code', 'place', 'found', 'fix'), [
    ({'step_period': 0.05}, FAIL, 'E510', 'policy_rate', 'found 0.05 s, 20 Hz', 'policy_rate: 20'),
    ({'action_names': ('a', 'b')}, FAIL, 'E512', 'action.joints', "found ['a', 'b']", 'action.joints: [a, b]'),
    ({'action_names': ('b', 'c')}, FAIL, 'E512', 'action.joints', 'without a; with c instead', 'il train'),
    ({'action_offset': 0.1}, WARN, 'E513', 'action.label', '0.1 s after, as of label next_state', 'action.label: next_state'),
    ({'features': {'joints': (3,)}, 'statistics': {'joints': {'min': [0] * 3, 'max': [1] * 3}}, 'extra': {'contract': None}},
     FAIL, 'E511', 'observations.joints', 'expected shape 2 (', 'observations.joints.names: 3 of them'),
    ({'extra': {'dataset_hash': '0123'}}, WARN, 'E514', 'dataset', 'trained on 0123', 'il train'),
    ({'extra': {'contract': changed(observations__joints__names=['b', 'a']).to_dict()}}, FAIL, 'E511',
     'observations.joints.names', "['b', 'a']", 'names: [b, a]'),
    ({'extra': {'contract': changed(observations__joints__field='effort', joint_state='goal2',
                                    observations__goal2=CONTRACT.to_dict()['observations']['joints']).to_dict()}},
     FAIL, 'E509', 'observations.joints.field', "expected position", 'observations.joints.field'),
])
def test_a_checkpoint_that_does_not_fit(clean, tmp_path, changes, level, code, place, found, fix):
    policy = save_policy(tmp_path / 'policy', Dataset(clean['dataset']), **changes)
    assert_only(check([clean['contract'], clean['dataset'], policy]), level, code, place, found, fix)


def test_a_checkpoint_trained_in_degrees(clean, tmp_path):
    dataset = Dataset(clean['dataset'])
    low, high = (np.degrees(list(ends.values())).tolist() for ends in ranges_of(dataset)['action'])
    policy = save_policy(tmp_path / 'policy', dataset, statistics={'action': {'min': low, 'max': high}})
    assert_only(check([clean['contract'], policy]), FAIL, 'E503', 'action', 'degrees?', 'radians')


def test_a_checkpoint_and_a_dataset_of_another_scale(clean, tmp_path):
    policy = save_policy(tmp_path / 'policy', Dataset(clean['dataset']), extra={'dataset_hash': 'x'},
                         statistics={'goal': {'min': [0.0003, 0.0], 'max': [0.0004, 0.003]}})
    wrong = faults(check([clean['contract'], clean['dataset'], policy]))
    assert [(f.level, f.code) for f in wrong] == [(FAIL, 'E515'), (WARN, 'E514')]
    assert 'point.y 0 … 2.9 (trained on 0 … 0.003)' in wrong[0].found and 'if a unit changed' in wrong[0].fix


def test_a_recording_where_nothing_was_demonstrated(clean, tmp_path):
    far = [(topic, stamp, point(stamp, 7.0, 0.1) if topic == 'goal' else message) for topic, stamp, message in recording(3.0)]
    bag = write_bag(tmp_path / 'demo', far)
    assert_only(check([clean['contract'], clean['policy'], bag]), WARN, 'E515', 'goal, recorded', 'point.x 7 … 7', 'demonstrate')


def test_imported_data_and_its_policy_need_no_contract(clean, tmp_path):
    shutil.copytree(clean['dataset'], tmp_path / 'dataset')
    file = tmp_path / 'dataset/dataset.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | {'contract': None, 'contract_hash': None}))
    dataset = Dataset(tmp_path / 'dataset')
    fits = save_policy(tmp_path / 'fits', dataset)
    assert not faults(check([dataset.path, fits]))
    wrong = save_policy(tmp_path / 'wrong', dataset, step_period=0.05)
    assert_only(check([dataset.path, wrong]), FAIL, 'E510', 'policy_rate', 'found 0.05 s', 'il train')
    with pytest.raises(CheckError, match='carries a contract; give one'):
        check([dataset.path])


def test_a_damaged_checkpoint(clean, tmp_path):
    shutil.copytree(clean['policy'], tmp_path / 'policy')
    (tmp_path / 'policy/model.safetensors').write_bytes(b'nothing')
    (wrong,) = faults(check([clean['contract'], tmp_path / 'policy']))
    assert wrong.place == 'cannot be opened' and 'damaged' in wrong.found


def test_what_the_policy_node_refuses(clean):
    policy = checkpoint.load(clean['policy'])
    assert differences(of_contract('c', CONTRACT), of_policy('p', policy)) == []
    (line,) = differences(of_contract('c', changed(observations__joints__names=['b', 'a'])), of_policy('p', policy))
    assert 'observations.joints.names' in line and 'the same in another order' in line


# --- units ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(('name', 'unit', 'limits', 'seen', 'said'), [
    ('elbow', 'rad', (-1.5, 1.5), (-80.0, 12.0), 'degrees?'),
    ('elbow', 'rad', (-1.5, 1.5), (-800.0, 12.0), 'limits'),
    ('gripper', 'rad', (0.0, 1.7), (0.0, 100.0), 'per cent?'),
    ('left_finger', 'm', (0.0, 0.04), (0.0, 40.0), 'per cent?'),
    ('slide', 'm', (0.0, 0.8), (0.0, 780.0), 'millimetres?'),
    ('elbow', 'rad', (-1.5, 1.5), (-1.7, 0.0), 'limits'),
    ('elbow', 'rad', (-1.5, 1.5), (-1.51, 1.51), ''),
])
def test_units(name, unit, limits, seen, said):
    joint = Joint(name, limits, 1.0, 1.0, 0.1, 0.1, unit)
    found = check_units('x', {name: seen[0], 'other': 1e9}, {name: seen[1], 'other': 1e9}, [joint])
    assert [f.found.endswith(said) or said in f.found for f in found] == [True] * bool(said)
    assert all(other not in f.found for f in found for other in ('degrees', 'per cent', 'millimetres') if other not in said)


# --- a graph, as the probe describes it -------------------------------------------------------------------------------

QOS = 'reliable, volatile'
RESOLVED = {name: f'/{name}' for name in ('joint_states', 'goal', 'camera/compressed', 'command', 'out', 'teleop')}


def by(node: str, kind: str = '', qos: str = QOS, incompatible: str = '') -> tuple[Endpoint, ...]:
    return (Endpoint(node, kind, qos, incompatible),)


def graph(publishers=None, listeners=None, streams=None, topics=None, sim_time=False) -> Graph:
    """A robot that fits, changed."""
    offers = {'/joint_states': by('/driver', 'sensor_msgs/msg/JointState'),
              '/goal': by('/goals', 'geometry_msgs/msg/PointStamped'),
              '/camera/compressed': by('/camera', 'sensor_msgs/msg/CompressedImage'), '/command': (), '/out': (), '/teleop': (),
              **(publishers or {})}
    seen = {'joints': Measured('/joint_states', 300, 100.0, 0.001, 0.012, (0.001, 0.002), 1.7e9, (('a', 'b'),),
                               {'a': 0.0, 'b': 0.0}, {'a': 0.1, 'b': 0.1}),
            'goal': Measured('/goal', 30, 10.0, 0.001, 0.11, (0.001, 0.002), 1.7e9),
            'front': Measured('/camera/compressed', 30, 10.0, 0.001, 0.11, (0.02, 0.03), 1.7e9, sizes=((8, 12),),
                              encodings=('jpeg',)),
            **(streams or {})}
    published = {topic: (of[0].type,) for topic, of in offers.items() if of} | (topics or {})
    return Graph('/', 3.0, sim_time, RESOLVED, published, offers,
                 {'/out': by('/arm_controller', 'std_msgs/msg/Float64MultiArray'), **(listeners or {})}, seen)


def judged(seen: Graph):
    found = check_graph(CONTRACT, seen) + check_streams(CONTRACT, seen.streams, seen.sim_time)
    return [finding for finding in found if finding.level in (FAIL, WARN)]


def silent(name: str) -> dict[str, Measured]:
    return {name: Measured(RESOLVED[CONTRACT.observations[name].topic], 0)}


def test_a_graph_that_fits():
    assert judged(graph()) == []


@pytest.mark.parametrize(('seen', 'level', 'code', 'place', 'found', 'fix'), [
    (graph({'/goal': ()}, streams=silent('goal')), FAIL, 'E201', 'goal (/goal)', 'nobody publishes it', 'start its driver'),
    (graph({'/goal': ()}, streams=silent('goal'), topics={'/left/goal': ('geometry_msgs/msg/PointStamped',)}), FAIL, 'E201',
     'goal', 'published in the namespace /left', '-r __ns:=/left'),
    (graph({'/goal': ()}, streams=silent('goal'), topics={'/goal_point': ('geometry_msgs/msg/PointStamped',)}), FAIL, 'E201',
     'goal', 'nobody', 'observations.goal.topic: /goal_point'),
    (graph({'/camera/compressed': by('/camera', 'sensor_msgs/msg/Image')}, streams=silent('front')), FAIL, 'E201', 'front',
     'found sensor_msgs/msg/Image by /camera', 'observations.front.type: sensor_msgs/msg/Image'),
    (graph(streams=silent('goal')), FAIL, 'E202', 'goal', 'silent for 3 s', 'look at /goals'),
    (graph({'/goal': by('/goals', 'geometry_msgs/msg/PointStamped', 'reliable, transient_local')}, streams=silent('goal')), FAIL,
     'E202', 'goal', 'silent', 'publish it 10 times a second'),
    (graph({'/joint_states': by('/arm', 'sensor_msgs/msg/JointState') + by('/hand', 'sensor_msgs/msg/JointState')}), FAIL, 'E505',
     'joints', '2: /arm, /hand', 'joint_state_publisher'),
    (graph({'/teleop': by('/leader', 'sensor_msgs/msg/JointState', 'best_effort, volatile', 'reliability')}), FAIL, 'E504',
     'teleop', 'publisher of /leader with best_effort', 'reliable, volatile'),
    (graph({'/out': by('/controller') + by('/moveit')}), FAIL, 'E505', 'action.outputs (/out)', '/controller, /moveit', 'stop'),
    (graph({'/out': by('/moveit')}), WARN, 'E505', 'action.outputs (/out)', '/moveit publishes here', 'stop /moveit'),
    (graph({'/command': by('/controller') + by('/other')}), FAIL, 'E505', 'action.topic', '/controller, /other', 'stop'),
    (graph(listeners={'/out': ()}), FAIL, 'E506', 'action.outputs', 'nobody listens', 'ros2 control list_controllers'),
    (graph(listeners={'/out': (), '/jtc/joint_trajectory': by('/jtc', 'trajectory_msgs/msg/JointTrajectory')}), FAIL, 'E506',
     'action.outputs', 'nobody', '{topic: jtc/joint_trajectory, type: trajectory_msgs/msg/JointTrajectory} (/jtc)'),
    (graph(listeners={'/out': (), '/left/out': by('/left/arm', 'std_msgs/msg/Float64MultiArray')}), FAIL, 'E506',
     'action.outputs', 'one in the namespace /left', '-r __ns:=/left'),
    (graph(listeners={'/out': by('/jtc', 'trajectory_msgs/msg/JointTrajectory')}), FAIL, 'E201', 'action.outputs',
     '/jtc listens for trajectory', 'type: trajectory_msgs/msg/JointTrajectory'),
    (graph(listeners={'/out': by('/arm', 'std_msgs/msg/Float64MultiArray', 'reliable, transient_local', 'durability')}), FAIL,
     'E504', 'action.outputs', 'subscription of /arm with reliable, transient_local: durability', 'volatile'),
    (graph(streams={'goal': Measured('/goal', 30, 10.0, 0.0, 0.1, (1.7e9, 1.7e9), 12.0)}), FAIL, 'E204', 'goal',
     'expected stamps on the time of day', 'observations.goal.clock: receive'),
    (graph(streams={'goal': Measured('/goal', 30, 10.0, 0.0, 0.1, (-1.7e9, -1.7e9), 1.7e9)}, sim_time=True), FAIL, 'E204', 'goal',
     'simulated time', 'use_sim_time:=true'),
    (graph(streams={'goal': Measured('/goal', 30, 10.0, 0.0, 0.1, (-0.2, -0.1), 1.7e9)}), FAIL, 'E204', 'goal', '0.20 s after',
     'chrony'),
    (graph(streams={'goal': Measured('/goal', 30, 10.0, 0.0, 0.1, (0.45, 0.5), 1.7e9)}), FAIL, 'E507', 'goal',
     'that get 0.55 s old', 'max_age: '),
    (graph(streams={'goal': Measured('/goal', 30, 10.0, 0.08, 0.2, (0.0, 0.1), 1.7e9)}), WARN, 'E211', 'goal', 'bursts', 'Wi-Fi'),
])
def test_a_graph_that_does_not_fit(seen, level, code, place, found, fix):
    wrong = judged(seen)
    assert {finding.code for finding in wrong} == {code}, wrong
    assert wrong[0].level == level and place in wrong[0].place and found in wrong[0].words and fix in wrong[0].fix, wrong[0]


def test_the_camera_is_in_another_mode_than_when_recorded():
    recorded = graph().streams
    (same,) = compare_streams(CONTRACT, recorded, recorded)
    assert same.level == PASS
    wide = replace(recorded['front'], sizes=((9, 16),), rate=20.0)
    size, rate = compare_streams(CONTRACT, recorded, {**recorded, 'front': wide})
    assert (size.level, size.code, rate.level, rate.code) == (FAIL, 'E508', WARN, 'E211')
    assert 'expected 8×12, as recorded, found 9×16: another shape shows another part of the scene' in size.words


# --- the command ------------------------------------------------------------------------------------------------------

def test_command(clean, tmp_path, capsys):
    robot = write_contract(tmp_path / 'other.yaml', changed(policy_rate=5.0))
    with pytest.raises(SystemExit) as ended:
        cli.main(['check', str(robot), str(clean['dataset']), '--json', str(tmp_path / 'out.json')])
    assert ended.value.code == 1
    out = ' '.join(capsys.readouterr().out.split())
    assert 'FAIL E510 policy_rate: expected step period 0.2 s' in out and 'fix: policy_rate: 10 in' in out
    content = json.loads((tmp_path / 'out.json').read_text())
    assert content['FAIL'] == 1 and content['sections'][1]['findings'][0]['code'] == 'E510'
    cli.main(['check', '--contract', str(clean['contract']), '--bag', str(clean['bags']), '--checkpoint', str(clean['policy'])])
    assert '0 FAIL, 0 WARN' in capsys.readouterr().out


@pytest.mark.parametrize(('arguments', 'words'), [
    ([], 'nothing to compare'), (['nowhere'], 'nowhere: no such file or folder'),
    (['{contract}', '{contract}x.yaml'], 'no such file'),
    (['{contract}', '--live', '--seconds', '0'], 'seconds is 0'), (['--live'], 'nothing to compare')])
def test_what_cannot_be_looked_at_is_a_line_and_2(clean, capsys, arguments, words):
    with pytest.raises(SystemExit) as ended:
        cli.main(['check', *(argument.format(**clean) for argument in arguments)])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize('package', ['rclpy', 'il_runtime'])
def test_live_without_ros_is_a_line_and_2(clean, capsys, monkeypatch, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == package else find(name))
    with pytest.raises(SystemExit) as ended:
        cli.main(['check', str(clean['contract']), '--live'])
    assert ended.value.code == 2 and f'--live needs {package}, which is not here: ' in capsys.readouterr().err


@pytest.mark.parametrize('width', [80, 130])
def test_the_terminal(clean, tmp_path, width):
    robot = write_contract(tmp_path / 'other.yaml', changed(action__joints=['a', 'b']))
    out = StringIO()
    show(check([robot, clean['policy']]), Console(file=out, width=width, highlight=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    heading = next(i for i, line in enumerate(lines) if line.startswith('checkpoint '))
    first, _, rest = ' '.join(' '.join(lines[heading:]).split()).partition(' NOTE ')
    assert 'FAIL E512 action.joints: expected joints' in first and 'fix: action.joints: [b, a] in' in first
    assert 'PASS contract' not in rest and lines[-1] == '1 FAIL, 0 WARN, 2 NOTE, 2 PASS'
