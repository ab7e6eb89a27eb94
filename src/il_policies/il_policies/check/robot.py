"""A contract by itself, and against the description of its robot."""
from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from difflib import get_close_matches
from typing import NamedTuple

from il_policies.check.findings import FAIL, NOTE, PASS, WARN, Finding
from il_policies.contract import Contract, ContractError, Joint
from il_policies.data.align import SAME_RATE
from il_policies.description import DescriptionError, resolve
from il_policies.kinematics import Kinematics

LARGEST_ANGLE = 4 * math.pi
"""A limit beyond this is in degrees, or of a joint that turns for ever [rad]."""
LARGEST_SLIDE = 10.0
"""A limit beyond this is in millimetres [m]."""


class DescribedJoint(NamedTuple):
    """A joint as the URDF has it."""

    kind: str
    """revolute, continuous, prismatic, fixed, …"""
    position: tuple[float, float]
    """Lowest and highest position [rad or m]; infinite where there is no limit."""
    velocity: float
    """Largest speed [rad/s or m/s]; infinite where there is no limit."""


def check_contract(contract: Contract) -> list[Finding]:
    """What can be said from the contract alone."""
    findings = []
    for joint in contract.joints:
        largest = max(map(abs, joint.position))
        if joint.unit == 'rad' and largest > LARGEST_ANGLE:
            findings.append(_in_another_unit(joint, 'degrees', math.pi / 180))
        elif joint.unit == 'm' and largest > LARGEST_SLIDE:
            findings.append(_in_another_unit(joint, 'millimetres', 1e-3))
    for name, stream in contract.observations.items():
        if stream.max_age < 1 / stream.rate:
            findings.append(Finding(
                FAIL, f'observations.{name}.max_age', f'{stream.max_age:g} s', 'E507',
                f'more than the time between two samples, {1 / stream.rate:.3g} s at {stream.rate:g} Hz',
                f'observations.{name}.max_age: {3 / stream.rate:.2g}'))
        if stream.rate < contract.policy_rate * (1 - SAME_RATE):
            findings.append(Finding(
                WARN, f'observations.{name}.rate', f'{stream.rate:g} Hz', 'E211',
                f'at least policy_rate, {contract.policy_rate:g} Hz',
                f'a faster driver, or policy_rate: {stream.rate:g}; else rows repeat samples'))
    for name in contract.cameras[:1]:
        rate = contract.observations[name].rate
        ratio = rate / contract.policy_rate
        if ratio > 1 and abs(ratio / round(ratio) - 1) > SAME_RATE:
            findings.append(Finding(
                WARN, 'policy_rate', f'{contract.policy_rate:g} Hz: rows at uneven times', 'E211',
                f'a whole part of the {rate:g} Hz of {name}, whose images give the rows',
                f'policy_rate: {rate / math.floor(ratio):.4g}, or {rate / math.ceil(ratio):.4g}'))
    if not findings:
        findings.append(Finding(PASS, 'joints, rates, ages', f'{len(contract.joints)} joints, {len(contract.observations)} '
                                f'observations, policy {contract.policy_rate:g} Hz, control {contract.control_rate:g} Hz'))
    return findings


def _in_another_unit(joint: Joint, unit: str, factor: float) -> Finding:
    low, high = (f'{value * factor:.4g}' for value in joint.position)
    return Finding(FAIL, f'joints.{joint.name}.position', f'{list(joint.position)}, which looks like {unit}', 'E503',
                   f'limits in [{joint.unit}]', f'position: [{low}, {high}]; velocity, acceleration and tolerances likewise')


def check_description(contract: Contract) -> list[Finding]:
    """The contract against its URDF: joints, links, limits, units. Controller and policy need none; RViz and jogging do."""
    if not contract.description:
        return [Finding(NOTE, 'description', 'none is named: no RViz, no Cartesian teleoperation')]
    try:
        joints, links = _read(contract.description)
    except DescriptionError as error:
        return [Finding(WARN, 'description', str(error), 'E501', fix='put it below a prefix in AMENT_PREFIX_PATH as '
                        'share/<package>/<path> (a xacro expanded), or correct `description`; without it there is no RViz and '
                        'no Cartesian teleoperation')]
    findings = []
    moving = {name: joint for name, joint in joints.items() if joint.kind != 'fixed'}
    missing = [joint.name for joint in contract.joints if joint.name not in moving]
    if missing:
        findings.append(Finding(FAIL, 'joints', ', '.join(moving), 'E501', f'{", ".join(missing)} in the description',
                                f'the spelling of the driver in both: {renaming(missing, list(moving))}'))
    if contract.end_effector and contract.end_effector not in links:
        close = get_close_matches(contract.end_effector, links, 1, 0.4)
        findings.append(Finding(FAIL, 'end_effector', f'links {", ".join(links)}', 'E501', f'a link {contract.end_effector}',
                                f'end_effector: {(close or links)[0 if close else -1]}'))
    if contract.end_effector and not findings:
        try:
            Kinematics(contract)
        except (ContractError, DescriptionError) as error:
            findings.append(Finding(FAIL, 'end_effector', str(error), 'E501', fix='correct `end_effector` or `action.joints`'))
    shared = [joint for joint in contract.joints if joint.name in moving]
    for joint in shared:
        findings += _limits(joint, moving[joint.name])
    if shared and not findings:
        ends = f', end effector {contract.end_effector}' if contract.end_effector else ''
        findings.append(Finding(PASS, 'description', f'{len(shared)} joints with their units and limits{ends}'))
    return findings


def _read(uri: str) -> tuple[dict[str, DescribedJoint], list[str]]:
    """Joints by name, and the links of a URDF. Raises DescriptionError."""
    file = resolve(uri)
    try:
        robot = ElementTree.parse(file).getroot()
        joints = {}
        for joint in robot.findall('joint'):
            limit = joint.find('limit')
            limit = {} if limit is None else limit.attrib
            ends = (0.0, 0.0) if 'lower' in limit or 'upper' in limit else (-math.inf, math.inf)  # 0 is what URDF assumes
            position = float(limit.get('lower', ends[0])), float(limit.get('upper', ends[1]))
            kind = joint.get('type', '')
            joints[joint.get('name', '')] = DescribedJoint(
                kind, (-math.inf, math.inf) if kind == 'continuous' else position, float(limit.get('velocity', math.inf)))
    except (ElementTree.ParseError, ValueError, OSError) as error:
        raise DescriptionError(f'{file}: no URDF: {error}') from None
    return joints, [link.get('name', '') for link in robot.findall('link')]


def _limits(joint: Joint, described: DescribedJoint) -> list[Finding]:
    place = f'joints.{joint.name}'
    unit = 'm' if described.kind == 'prismatic' else 'rad'
    if unit != joint.unit:
        return [Finding(FAIL, f'{place}.unit', joint.unit, 'E503', f'{unit}: it is {described.kind} in the description',
                        f'unit: {unit}')]
    findings = []
    (low, high), (lower, upper) = joint.position, described.position
    if low < lower - 1e-3 or high > upper + 1e-3:
        inside = f'[{max(low, _up(lower)):g}, {min(high, -_up(-upper)):g}]'
        findings.append(Finding(WARN, f'{place}.position', f'[{low:g}, {high:g}]', 'E502',
                                f'within [{lower:.4g}, {upper:.4g}], the limits of the description', f'position: {inside}'))
    if joint.velocity > described.velocity * 1.001:
        findings.append(Finding(WARN, f'{place}.velocity', f'{joint.velocity:g}', 'E502',
                                f'at most {described.velocity:g}, the limit of the description',
                                f'velocity: {described.velocity:g}'))
    return findings


def _up(limit: float) -> float:
    """A limit rounded to the inside of its range."""
    return math.ceil(limit * 100 - 1e-6) / 100


def renaming(missing: list[str], present: list[str]) -> str:
    """What absent names probably are called, in words."""
    known = []
    for name in missing:
        longer = [other for other in present if re.search(rf'(^|[_/.]){re.escape(name)}($|[_/.])', other)]
        close = longer or get_close_matches(name, present, 1, 0.5)
        known += [f'{close[0]} for {name}'] if close else []
    return ', '.join(known) if known else f'there are {", ".join(present) or "none"}'
