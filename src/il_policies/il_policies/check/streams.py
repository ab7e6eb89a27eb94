"""What streams carry against what the contract declares, live and from a bag alike; and who publishes and listens."""
from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import get_args, get_type_hints

from il_policies.check.facts import Endpoint, Graph, Measured
from il_policies.check.findings import FAIL, NOTE, PASS, WARN, Finding
from il_policies.check.robot import renaming
from il_policies.contract import Contract, Joint, Output, Stream
from il_policies.data.quality import (
    CLOCK_AHEAD_FAIL,
    CLOCK_AHEAD_WARN,
    CLOCK_FAIL,
    JITTER_WARN,
    RATE_TOLERANCE,
    RATE_WARN,
    clock_offset,
    duration,
)
from il_policies.data.recording import streams_of

FAR = 0.25
"""Beyond a limit by more than this share of the joint's range is no noise: another unit, or the wrong limits."""
NEAR = 0.02
"""Beyond a limit by less than this share of the range is noise."""
SAME_ASPECT = 0.02
"""Images whose ratio of sides differs by less than this share are not noticeably squeezed."""
LONG_AGO = 1e8
"""A stamp before this, 1973, is no time of day [s]."""
FEW = 5
"""Fewer messages tell no rate."""
MERGE = ('ros2 run joint_state_publisher joint_state_publisher --ros-args -p source_list:="[{}]", if arm and gripper publish '
         'apart; else stop one of them')
OUTPUT_TYPES = get_args(get_type_hints(Output)['type'])
IMAGE_TYPES = 'sensor_msgs/msg/Image', 'sensor_msgs/msg/CompressedImage'
EVERYWHERE = {'/rosout', '/parameter_events'}
"""Topics that every node publishes."""
GRIPPER = ('grip', 'finger', 'jaw', 'claw', 'hand')


def check_streams(contract: Contract, seen: dict[str, Measured], sim_time: bool | None = None) -> list[Finding]:
    """Streams by name as they came.

    sim_time: live, whether times are simulated; None: from a bag, whose clocks may together be off, as of simulated time.
    """
    offset = 0.0
    if sim_time is None:
        latencies = {name: measured.latency[:1] for name, measured in seen.items() if measured.latency}
        offset = clock_offset(latencies, any(m.n and m.latency is None for m in seen.values())) or 0.0
    declared, findings = streams_of(contract), []
    for name, measured in seen.items():
        if measured.n:
            findings += _stream(name, declared.get(name) or declared['action'], measured, contract, offset, sim_time)
    if offset:
        findings.append(Finding(NOTE, 'clock', f'all stamps are {offset:+.4g} s before their arrival, as of simulated time'))
    return findings


def _stream(name: str, stream: Stream, seen: Measured, contract: Contract, offset: float,
            sim_time: bool | None) -> list[Finding]:
    place = name if seen.topic.strip('/') == name else f'{name} ({seen.topic})'
    key = f'observations.{name}'
    findings: list[Finding] = []
    fits: list[str] = []

    def fault(level: str, code: str, expected: str, found: str, fix: str) -> None:
        findings.append(Finding(level, place, found, code, expected, fix))

    for code, words in seen.faults.items():
        if code == 'E203' and stream.field:
            _names(stream, seen, key, words, fault)
        elif code == 'E203':
            fault(FAIL, code, f'fields {", ".join(stream.fields)}', words,
                  f'{key}.fields: attribute paths that {stream.type} has')
        elif code == 'E204':
            fault(FAIL, code, f'a stamp by the clock `{stream.clock}`', words, 'stamp the header with the time of measurement'
                  + (f', or {key}.clock: receive' if name in contract.observations else ''))
        elif code == 'E205':
            fault(FAIL, code, 'finite values', words, 'repair the driver: a joint that is not read must not be NaN')
        else:
            fault(FAIL, code, 'an image that can be decoded', words,
                  f'another encoding in the driver, or {key}.type, {key}.depth')
    if seen.orders and 'E203' not in seen.faults:
        extra = [n for n in seen.orders[0] if n not in stream.names]
        order = [n for n in seen.orders[0] if n in stream.names]
        fits.append('names' + (' (in another order: matched by name)' if order != list(stream.names) else '')
                    + (f', beside {len(extra)} more' if extra else ''))
    if name in contract.observations:
        _rate(stream, seen, key, offset, fault, fits)
    _clock(stream, seen, key, offset, sim_time, fault, fits)
    if stream.field == 'position':
        units = check_units(place, seen.low, seen.high, contract.joints)
        findings += units
        if seen.low and not units:
            fits.append('values within the limits')
    if stream.is_image:
        _image(stream, seen, key, fault, fits)
    if fits:
        findings.append(Finding(PASS, place, ', '.join(fits)))
    return findings


def _names(stream: Stream, seen: Measured, key: str, words: str, fault) -> None:
    present = list(dict.fromkeys(name for order in seen.orders for name in order))
    doubled = [name for name in stream.names if any(order.count(name) > 1 for order in seen.orders)]
    missing = [name for name in stream.names if name not in present]
    if doubled:
        fault(FAIL, 'E203', 'each joint once', f'{", ".join(doubled)} doubled in {list(seen.orders[0])}',
              'one entry a joint in the driver')
    elif missing:
        fault(FAIL, 'E203', f'joints {", ".join(missing)}', f'{", ".join(present)}', 'the spelling of the driver in the contract '
              f'(joints, observations.*.names, action.joints): {renaming(missing, present)}')
    elif len(seen.orders) > 1:
        fault(FAIL, 'E203', 'all joints in each message', 'messages with ' + ' and others with '.join(
            ', '.join(order) for order in seen.orders), MERGE.format(f'{seen.topic}, …'))
    else:
        fault(FAIL, 'E203', f'a {stream.field} for each of {", ".join(stream.names)}', words,
              f'{key}.field: position, or a driver that fills {stream.field}')


def _rate(stream: Stream, seen: Measured, key: str, offset: float, fault, fits: list[str]) -> None:
    if seen.n < FEW or not seen.rate:
        fault(NOTE, '', '', f'too few messages to tell a rate: {seen.n}', '')
        return
    off, period = seen.rate / stream.rate - 1, 1 / seen.rate
    if abs(off) > RATE_TOLERANCE or off < -RATE_WARN:
        refused = ': recording would not begin' if abs(off) > RATE_TOLERANCE else ''
        fault(FAIL if refused else WARN, 'E211', f'{stream.rate:g} Hz', f'{seen.rate:.3g} Hz{refused}',
              f'set the driver to {stream.rate:g} Hz, or {key}.rate: {_round(seen.rate)}')
    else:
        fits.append(f'{seen.rate:.3g} Hz')
    # Just before the next sample is there, the last one is a period and the time to arrive old. Of wrong clocks `_clock` tells.
    latency = [part - offset for part in seen.latency or ()]
    oldest, late = (period + max(part, 0.0) if abs(part) < CLOCK_FAIL else period for part in latency or (0.0, 0.0))
    late = max(late, seen.longest)
    if stream.max_age < oldest:
        fault(FAIL, 'E507', 'max_age above a period and the time to arrive', f'{stream.max_age:g} s for samples that get '
              f'{duration(oldest)} old', f'{key}.max_age: {2 * period + oldest:.2g}; or a faster way (JPEG, wire)')
    elif stream.max_age < late:
        fault(WARN, 'E507', f'samples at most {stream.max_age:g} s old (max_age)', f'some that get {duration(late)} old',
              f'find what holds it up (network, load), or {key}.max_age: {1.5 * late:.2g}')
    if seen.jitter > JITTER_WARN * period:
        fault(WARN, 'E211', f'even steps of {duration(period)}', f'steps off by {duration(seen.jitter)}: it comes in bursts',
              'find what holds it up: a busy machine, Wi-Fi, a queue in the driver, stamps that are not of the measurement')


def _clock(stream: Stream, seen: Measured, key: str, offset: float, sim_time: bool | None, fault, fits: list[str]) -> None:
    if seen.latency is None:
        return
    middle = seen.latency[0] - offset
    ahead, chrony = -middle, 'set the clock of its sender: chrony or ntpd on both machines (chronyc tracking)'
    if not -CLOCK_FAIL <= middle <= CLOCK_FAIL + stream.max_age:
        if sim_time:
            clock, fix = 'simulated time, since /clock is published', 'start this driver with -p use_sim_time:=true'
        elif seen.stamped < LONG_AGO:
            clock, fix = 'the time of day', ('start its sender without use_sim_time; one that stamps with the time since it '
                                             f'began needs {key}.clock: receive')
        else:
            clock, fix = 'the clock of this machine', chrony
        fault(FAIL, 'E204', f'stamps on {clock}',
              f'stamps {abs(middle):.4g} s {"before" if middle > 0 else "after"} their arrival', fix)
    elif ahead > CLOCK_AHEAD_WARN:
        level = FAIL if ahead > CLOCK_AHEAD_FAIL else WARN
        fault(level, 'E204', 'stamps not after their arrival', f'{duration(ahead)} after', chrony)
    else:
        fits.append(f'stamps {duration(max(middle, 0.0))} old on arrival')


def check_units(place: str, low: dict[str, float], high: dict[str, float], joints: Iterable[Joint]) -> list[Finding]:
    """Positions, by joint lowest and highest, against the limits: far outside they probably have another unit. [] if all fit."""
    far: dict[str, list[str]] = {}
    slight = []
    for joint in joints:
        if joint.name not in low:
            continue
        ends, width = (low[joint.name], high[joint.name]), joint.position[1] - joint.position[0]
        beyond = max(joint.position[0] - ends[0], ends[1] - joint.position[1])
        words = f'{joint.name} {ends[0]:.4g} … {ends[1]:.4g} (limits {joint.position[0]:g} … {joint.position[1]:g} {joint.unit})'
        if beyond > FAR * width:
            far.setdefault(_unit(joint, ends), []).append(words)
        elif beyond > NEAR * width:
            slight.append(words)
    fixes = {'degrees': 'publish radians (REP 103): use_degrees off in the driver, or a node of yours that multiplies by 0.01745',
             'millimetres': 'publish metres (REP 103), or a node of yours that divides by 1000',
             'per cent': 'publish the joint in [rad] or [m], or a node of yours that scales 0 … 100 to its range',
             '': 'correct the unit in the driver, or joints.*.position in the contract'}
    findings = [Finding(FAIL, place, f'{", ".join(words)}{f": {unit}?" if unit else ""}', 'E503',
                        'positions in [rad] or [m] within the limits', fixes[unit]) for unit, words in far.items()]
    if slight:
        findings.append(Finding(WARN, place, ', '.join(slight), 'E503', 'positions within the limits', 'move the arm inside: '
                                'outside it is armed only with an approach; or joints.*.position, if they are too narrow'))
    return findings


def _unit(joint: Joint, ends: tuple[float, float]) -> str:
    """Which unit values far outside the limits probably have; '' if none explains them."""
    def explains(factor: float) -> bool:
        margin = FAR * (joint.position[1] - joint.position[0])
        return joint.position[0] - margin <= ends[0] * factor and ends[1] * factor <= joint.position[1] + margin

    if any(part in joint.name.lower() for part in GRIPPER) and -1 <= ends[0] and ends[1] <= 101:
        return 'per cent'
    if joint.unit == 'rad' and explains(math.pi / 180):
        return 'degrees'
    return 'millimetres' if joint.unit == 'm' and explains(1e-3) else ''


def _image(stream: Stream, seen: Measured, key: str, fault, fits: list[str]) -> None:
    height, width = stream.image_size
    if len(seen.sizes) > 1:
        fault(WARN, 'E508', 'images of one size', ' and '.join(map(_size, seen.sizes)), 'one node a topic, one mode a camera')
    for h, w in seen.sizes[:1]:
        if abs(w * height / (h * width) - 1) > SAME_ASPECT:
            fault(WARN, 'E508', f'the shape of {_size((height, width))} (image_size)', f'{_size((h, w))}: squeezed by '
                  f'{100 * abs(w * height / (h * width) - 1):.0f} %', f'crop in the driver, or {key}.image_size: '
                  f'[{height}, {round(height * w / h)}] before anything is recorded; a policy needs the size it was trained on')
        elif h < height:
            fault(WARN, 'E508', f'at least {_size((height, width))} (image_size)',
                  f'{_size((h, w))}: enlarged, which adds nothing',
                  f'a larger mode of the camera, or {key}.image_size: [{h}, {w}]')
        else:
            fits.append(f'{_size((h, w))} {", ".join(seen.encodings)}')


def _size(size: tuple[int, int]) -> str:
    return f'{size[0]}×{size[1]}'


def _round(rate: float) -> str:
    """A rate as one would write it."""
    return f'{round(rate)}.0' if rate > 5 and abs(rate / round(rate) - 1) < 0.03 else f'{rate:.3g}'


def compare_streams(contract: Contract, recorded: dict[str, Measured], live: dict[str, Measured]) -> list[Finding]:
    """Live streams against those in a bag: is what the policy will see what was demonstrated?"""
    findings, compared = [], []
    for name, now in live.items():
        then, key = recorded.get(name), f'observations.{name}'
        if name not in contract.observations or not (then and then.n and now.n):
            continue
        compared.append(name)
        if then.sizes and now.sizes and then.sizes[0] != now.sizes[0]:
            (h, w), (height, width) = now.sizes[0], then.sizes[0]
            other = abs(w * height / (h * width) - 1) > SAME_ASPECT
            why = ': another shape shows another part of the scene' if other else ''
            findings.append(Finding(FAIL if other else WARN, name, f'{_size((h, w))}{why}', 'E508',
                                    f'{_size((height, width))}, as recorded', 'the mode of the camera with which was recorded'))
        if then.rate and now.n >= FEW and abs(now.rate / then.rate - 1) > RATE_TOLERANCE:
            findings.append(Finding(WARN, name, f'{now.rate:.3g} Hz', 'E211', f'{then.rate:.3g} Hz, as recorded',
                                    f'set the driver to the rate that was recorded; {key}.rate: {_round(now.rate)} for new ones'))
    if compared and not findings:
        findings.append(Finding(PASS, ', '.join(compared), 'images and rates as recorded'))
    return findings


# --- the graph --------------------------------------------------------------------------------------------------------

def check_graph(contract: Contract, graph: Graph) -> list[Finding]:
    """Who publishes what the contract names, with which type and QoS, and who listens to the commands."""
    findings = []
    if graph.sim_time:
        findings.append(Finding(NOTE, 'clock', '/clock is published: rates and ages are of simulated time; start every node with '
                                'use_sim_time:=true'))
    by_topic: dict[str, list[str]] = {}
    for name, stream in contract.observations.items():
        by_topic.setdefault(graph.resolved[stream.topic], []).append(name)
    absent: dict[str, list[str]] = {}
    for topic, names in by_topic.items():
        stream = contract.observations[names[0]]
        if graph.publishers[topic]:
            findings += _published(names, topic, stream, graph)
        else:
            absent[topic] = names
    if graph.topics.keys() <= EVERYWHERE:
        return [*findings, Finding(FAIL, 'network', 'nobody but this node', 'E201', 'nodes that publish something', 'start the '
                                   'drivers; compare ROS_DOMAIN_ID and ROS_AUTOMATIC_DISCOVERY_RANGE with theirs (LOCALHOST is '
                                   'this machine only, SUBNET is all)')]
    findings += _absent(contract, graph, absent)
    findings += _teleop(graph)
    ours = {endpoint.node for endpoint in graph.publishers[graph.resolved[contract.action.topic]]}
    findings += _commanded('action.topic', graph.resolved[contract.action.topic], graph, set())
    for output in contract.action.outputs:
        topic = graph.resolved[output.topic]
        findings += _commanded('action.outputs', topic, graph, ours if len(ours) == 1 else set())
        findings += _heard(contract, output, topic, graph)
    return findings


def _published(names: list[str], topic: str, stream: Stream, graph: Graph) -> list[Finding]:
    """Of a topic that somebody publishes, and the features that are made of it."""
    place, offers, key = f'{", ".join(names)} ({topic})', graph.publishers[topic], f'observations.{names[0]}'
    types = sorted({endpoint.type for endpoint in offers})
    if types != [stream.type]:
        fix = (f'{key}.type: {types[0]}' if stream.is_image and types[0] in IMAGE_TYPES else
               _instead(key, topic, stream.type, graph) or f'{key}.type: {types[0]}, with the fields it has')
        return [Finding(FAIL, place, f'{", ".join(types)} by {_nodes(offers)}', 'E201', stream.type, fix)]
    findings = [_incompatible(place, endpoint, 'publisher') for endpoint in offers if endpoint.incompatible]
    if not graph.streams[names[0]].n and not findings:
        latched = any('transient_local' in endpoint.qos for endpoint in offers)
        fix = (f'publish it {stream.rate:g} times a second: whoever starts later never sees what was published once'
               if latched else f'look at {_nodes(offers)}: it is there and says nothing (unplugged, not activated?)')
        findings.append(Finding(FAIL, place, f'silent for {graph.seconds:g} s', 'E202', f'{stream.rate:g} Hz', fix))
    if len(offers) > 1:
        fix = MERGE.format(f'{topic}_arm, {topic}_gripper') if stream.field else 'stop one of them'
        findings.append(Finding(FAIL, place, f'{len(offers)}: {_nodes(offers)}', 'E505', 'one publisher', fix))
    return findings or [Finding(PASS, place, f'{stream.type} by {_nodes(offers)}, {offers[0].qos}')]


def _absent(contract: Contract, graph: Graph, absent: dict[str, list[str]]) -> list[Finding]:
    """Of streams that nobody publishes: by another name, in another namespace, or not at all?"""
    findings = []
    elsewhere: dict[str, list[str]] = {}
    for topic, names in absent.items():
        stream = contract.observations[names[0]]
        found = _namespaces(stream.topic, topic, [other for other, types in graph.topics.items() if stream.type in types])
        if found:
            elsewhere.setdefault(' or '.join(sorted(found)), []).extend(names)
            continue
        key = f'observations.{names[0]}'
        fix = _instead(key, topic, stream.type, graph) or f'start its driver, or {key}.topic: TOPIC (ros2 topic list -t)'
        findings.append(Finding(FAIL, f'{", ".join(names)} ({topic})', 'nobody publishes it', 'E201', stream.type, fix))
    for namespace, names in elsewhere.items():
        here = [topic for topic, of in absent.items() if set(of) & set(names)]
        findings.append(Finding(
            FAIL, f'{", ".join(names)} ({", ".join(here)})', f'published in the namespace {namespace}', 'E201',
            f'a publisher in {graph.namespace}', _move(namespace)))
    return findings


def _namespaces(name: str, topic: str, among: Iterable[str]) -> list[str]:
    """Other namespaces in which a topic of this name is."""
    ending = '/' + name.strip('/')
    return sorted(other.removesuffix(ending) or '/' for other in among if other.endswith(ending) and other != topic)


def _move(namespace: str) -> str:
    first = namespace.split(' or ')[0]
    return (f'start all nodes with --ros-args -r __ns:={first} and look with il check --namespace {first}, or write the topics '
            'of the contract in full')


def _instead(key: str, topic: str, kind: str, graph: Graph) -> str:
    """A line of YAML that names the topic that was probably meant."""
    alike = [other for other, types in graph.topics.items() if kind in types and other not in graph.resolved.values()]
    close = get_close_matches(topic, alike, 1, 0.3) or (alike if len(alike) == 1 else [])
    return f'{key}.topic: {close[0]}' if close else f'{key}.topic: one of {", ".join(alike)}' if alike else ''


def _teleop(graph: Graph) -> list[Finding]:
    topic = graph.resolved['teleop']
    return [_incompatible(f'teleop ({topic})', endpoint, 'publisher') for endpoint in graph.publishers[topic]
            if endpoint.incompatible]


def _commanded(key: str, topic: str, graph: Graph, ours: set[str]) -> list[Finding]:
    """Of a topic on which only our controller may publish."""
    place, offers = f'{key} ({topic})', graph.publishers[topic]
    others = [endpoint for endpoint in offers if endpoint.node not in ours]
    if len(offers) > 1:
        return [Finding(FAIL, place, f'{len(offers)}: {_nodes(offers)}', 'E505', 'one publisher, the controller',
                        f'stop {_nodes(others)}: the controller does not arm beside it, and latches a fault')]
    if key == 'action.outputs' and others:
        return [Finding(WARN, place, f'{_nodes(others)} publishes here', 'E505',
                        'no publisher but the controller, which does not run', f'stop {_nodes(others)} before arming')]
    return []


def _heard(contract: Contract, output: Output, topic: str, graph: Graph) -> list[Finding]:
    """Does the robot listen to an output?"""
    place, listeners = f'action.outputs ({topic})', graph.listeners.get(topic, ())
    findings = [_incompatible(place, endpoint, 'subscription') for endpoint in listeners if endpoint.incompatible]
    if any(endpoint.type == output.type for endpoint in listeners):
        return findings or [Finding(PASS, place, f'{output.type}, heard by {_nodes(listeners)}')]
    if listeners:
        kind = listeners[0].type
        return [Finding(FAIL, place, f'{_nodes(listeners)} listens for {kind}', 'E201', output.type,
                        f'type: {kind} for this output' + ('' if kind in OUTPUT_TYPES else f' is not supported; valid: '
                                                           f'{", ".join(OUTPUT_TYPES)}'))]
    if namespaces := _namespaces(output.topic, topic, [other for other, of in graph.listeners.items() if of]):
        where = ' or '.join(namespaces)
        return [Finding(FAIL, place, f'one in the namespace {where}', 'E506', f'a subscription of {output.type} in '
                        f'{graph.namespace}', _move(where))]
    alike = [f'{{topic: {other.lstrip("/")}, type: {of[0].type}}} ({_nodes(of)})' for other, of in graph.listeners.items()
             if of and other not in {graph.resolved[each.topic] for each in contract.action.outputs}]
    fix = (f'action.outputs: {" or ".join(alike)}' if alike else
           "start the robot's controller (ros2 control list_controllers: is it active?)")
    return [Finding(FAIL, place, 'nobody listens', 'E506', f'a subscription of {output.type}', fix)]


def _incompatible(place: str, endpoint: Endpoint, what: str) -> Finding:
    return Finding(FAIL, place, f'{what} of {endpoint.node} with {endpoint.qos}: {endpoint.incompatible}', 'E504',
                   'QoS compatible with ours: reliable, volatile', f'set the QoS of this {what} to reliable, volatile')


def _nodes(endpoints) -> str:
    return ', '.join(sorted({endpoint.node for endpoint in endpoints}))
