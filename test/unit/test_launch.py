"""Launch files, read without launch: every name in them is the name of something.

test/graph/test_launch.py runs them, where launch_ros is installed.
"""
from __future__ import annotations

import ast
import configparser
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from il_policies.contract import load_contract
from il_policies.deploy import BACKENDS
from il_policies.planner import RTC
from il_runtime.core.ensembling import MODES

ROOT = Path(__file__).parents[2]
NODES = ROOT / 'src' / 'il_runtime' / 'il_runtime'
FILES = {path.name: path.read_text() for path in sorted((ROOT / 'launch').glob('*.py'))}
LAUNCHING = (NODES / 'launching.py').read_text()
KINDS = {'text': str, 'number': float, 'integer': int, 'flag': bool}
"""Functions that make an argument the value of a parameter → the type it must have."""
OPTIONS = {'on_exit', 'name', 'condition', 'remappings'}
"""Keywords of `ours` that are no parameters."""
OTHERS = {
    'rviz2': {'rviz2'}, 'robot_state_publisher': {'robot_state_publisher'}, 'controller_manager': {'spawner', 'unspawner'},
    'ros_gz_sim': {'create', 'remove'}, 'ros_gz_bridge': {'parameter_bridge', 'static_bridge'}, 'ros_gz_image': {'image_bridge'},
    'gz_ros2_control': set(), 'joint_state_broadcaster': set(), 'forward_command_controller': set(),
    'joint_trajectory_controller': set(), 'compressed_image_transport': set(), 'example-robot-data': set()}
"""Packages of others and their executables, as their own CMake files and setup.py say."""
SLOW_AT_FIRST = {('robot.launch.py', 'speed_scale'), ('deploy.launch.py', 'speed_scale')}
"""Whose default is not the node's."""


# --- reading ----------------------------------------------------------------------------------------------------------
parsed = cache(ast.parse)
walked = cache(lambda tree: [*ast.walk(tree)])


def calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    """Calls of functions with one of these names."""
    for found in walked(tree):
        if isinstance(found, ast.Call) and isinstance(found.func, ast.Name) and found.func.id in names:
            yield found


def constant(tree: ast.AST | None):
    """Its value, or None for anything that is computed."""
    return tree.value if isinstance(tree, ast.Constant) else None


@cache
def functions(launching: str) -> dict[str, ast.FunctionDef]:
    """Of the module that launch files share."""
    return {part.name: part for part in parsed(launching).body if isinstance(part, ast.FunctionDef)}


def read(tree: ast.AST, launching: str) -> set[str]:
    """Arguments that are read in a tree, and in the shared functions that it mentions."""
    shared, found, waiting, seen = functions(launching), set(), [tree], set()
    while waiting:
        part = waiting.pop()
        for call in calls(part, *KINDS, 'LaunchConfiguration', 'unless'):
            found.add(constant(call.args[0]))
        for inner in ast.walk(part):
            if isinstance(inner, ast.Subscript) and getattr(inner.value, 'attr', '') == 'launch_configurations':
                found.add(constant(inner.slice))
            if isinstance(inner, ast.Name) and inner.id in shared and inner.id not in seen:
                seen.add(inner.id)
                waiting.append(shared[inner.id])
    return found - {None}


def declared(tree: ast.AST) -> dict[str, str | None]:
    """Arguments of a launch file → default, None for one that is computed or missing."""
    found = {keyword.arg: constant(keyword.value) for call in calls(tree, 'arguments') for keyword in call.keywords}
    return found | {constant(call.args[0]): constant(call.args[1]) for call in calls(tree, 'argument')}


def choices(tree: ast.AST, launching: str) -> dict[str, list[str]]:
    """Arguments of a launch file → their choices, if they have any."""
    flag = ['true', 'false', 'True', 'False']
    valid = {constant(call.args[0]): call.args[3] for call in calls(tree, 'argument') if len(call.args) > 3}
    valid |= {constant(key): value.elts[1] for key, value in shared_arguments(launching) if constant(key) in declared(tree)}
    return {argument: flag if getattr(value, 'id', '') == 'FLAG' else [constant(word) for word in value.elts]
            for argument, value in valid.items() if isinstance(value, ast.List) or getattr(value, 'id', '') == 'FLAG'}


def shared_arguments(launching: str) -> list[tuple[ast.expr, ast.expr]]:
    """Names and what is said of them."""
    return next(list(zip(part.value.keys, part.value.values)) for part in parsed(launching).body
                if isinstance(part, ast.Assign) and part.targets[0].id == 'SHARED')


def started(tree: ast.AST, launching: str) -> Iterator[tuple[str, ast.Call]]:
    """Our executables that a tree starts, directly or by a shared function, and the calls that say how."""
    for call in calls(tree, 'ours'):
        yield constant(call.args[0]), call
    for name, function in functions(launching).items():
        for inner in calls(function, 'ours'):
            for call in calls(tree, name):
                yield constant(inner.args[0]), call


@cache
def parameters(executable: str) -> dict[str, object]:
    """Parameters that a node declares → default, None for one that is computed."""
    found = {'use_sim_time': False, 'nice': 10}
    for call in calls(parsed((NODES / f'{executable}.py').read_text()), 'declare'):
        found[constant(call.args[1])] = constant(call.args[2])
    return found


def remapped(tree: ast.AST, call: ast.Call, launching: str) -> set[str]:
    """Topics that a call remaps; lists may have names, here or in the shared module."""
    lists = {target.id: part.value for source in (tree, parsed(launching)) for part in walked(source)
             if isinstance(part, ast.Assign) for target in part.targets if isinstance(target, ast.Name)}
    waiting, found = [keyword.value for keyword in call.keywords if keyword.arg == 'remappings'], set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, ast.BinOp):
            waiting += [part.left, part.right]
        elif isinstance(part, (ast.Name, ast.Starred)):
            waiting.append(lists[getattr(part, 'value', part).id])
        elif isinstance(part, ast.List):
            waiting += part.elts
        else:
            found.add(constant(part.elts[0]))
    return found


def path_of(tree: ast.AST) -> str:
    """A path that is put together with /, from CONFIG on; '' for anything else."""
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Div):
        return f'{base}/{constant(tree.right)}' if (base := path_of(tree.left)) else ''
    return {'CONFIG': 'config', 'SIM': 'config/sim'}.get(getattr(tree, 'id', ''), '')


# --- what is wrong ----------------------------------------------------------------------------------------------------
def problems(name: str, text: str, launching: str = LAUNCHING) -> list[str]:
    """What a launch file names that does not exist."""
    tree, shared = parsed(text), parsed(launching)
    return [*about_arguments(tree, launching), *about_our_nodes(name, tree, launching), *about_others(tree, launching),
            *about_files(tree), *about_files(shared)]


def about_arguments(tree: ast.AST, launching: str) -> Iterator[str]:
    """Declared, described, used, with defaults that are valid; and what is imported exists."""
    defaults, wanted = declared(tree), read(tree, launching)
    yield from (f'argument {argument} is not declared' for argument in wanted - set(defaults))
    yield from (f'argument {argument} is not used' for argument in set(defaults) - wanted)
    described = {constant(key) for key, _ in shared_arguments(launching)}
    for call in calls(tree, 'arguments'):
        yield from (f'argument {keyword.arg} is not described' for keyword in call.keywords if keyword.arg not in described)
    for argument, valid in choices(tree, launching).items():
        if defaults[argument] not in valid:
            yield f'{argument} is {defaults[argument]}, valid: {valid}'
    if defaults.get('robot') and not (ROOT / 'config' / 'robots' / f'{defaults["robot"]}.yaml').exists():
        yield f'there is no contract {defaults["robot"]}'
    for call in calls(tree, 'rviz'):
        there = declared(parsed(FILES['rviz.launch.py']))
        yield from (f'rviz.launch.py has no argument {keyword.arg}' for keyword in call.keywords if keyword.arg not in there)
    there = {name for part in parsed(launching).body for name in
             ([part.name] if hasattr(part, 'name') else [target.id for target in getattr(part, 'targets', [])])}
    for part in tree.body:
        if isinstance(part, ast.ImportFrom) and part.module.startswith('il_runtime'):
            if part.module != 'il_runtime.launching':
                yield f'there is no {part.module}'
            yield from (f'launching has no {alias.name}' for alias in part.names if alias.name not in there)


@cache
def programs() -> set[str]:
    """Console scripts of il_runtime."""
    setup = configparser.ConfigParser()
    setup.read(NODES.parent / 'setup.cfg')
    return {line.split(' = ')[0] for line in setup['options.entry_points']['console_scripts'].split('\n') if line}


def about_our_nodes(name: str, tree: ast.AST, launching: str) -> Iterator[str]:
    """Executables, their parameters with type and default, remapped topics."""
    defaults = declared(tree)
    commanded = {load_contract(path).action.topic for path in (ROOT / 'config' / 'robots').glob('*.yaml')}
    for executable, call in [*started(tree, launching), *started(parsed(launching), launching)]:
        if executable not in programs():
            yield f'il_runtime has no {executable}'
            continue
        has, source = parameters(executable), (NODES / f'{executable}.py').read_text()
        for parameter in call.keywords:
            if parameter.arg is None or parameter.arg in OPTIONS:
                continue
            if parameter.arg not in has:
                yield f'{executable} has no parameter {parameter.arg}'
            elif isinstance(parameter.value, ast.Call) and has[parameter.arg] is not None:
                own, given = has[parameter.arg], defaults.get(constant(parameter.value.args[0]))
                if KINDS.get(parameter.value.func.id) is not type(own):
                    yield f'{executable}: {parameter.arg} is a {type(own).__name__}'
                if given not in (None, '', 'none') and given != str(own).lower() and (name, parameter.arg) not in SLOW_AT_FIRST:
                    yield f'{executable}: {parameter.arg} is {own} by default, here {given}'
        for topic in remapped(tree, call, launching):
            if f"'{topic}'" not in source and topic not in commanded:
                yield f'{executable} knows no topic {topic}'


def about_others(tree: ast.AST, launching: str) -> Iterator[str]:
    """Packages of others, which are looked for before anything is started, and their executables; topics that RViz shows."""
    looked_for = {constant(word) for call in calls(tree, 'needs') for word in call.args}
    looked_for |= {constant(word) for part in tree.body if isinstance(part, ast.Assign) and part.targets[0].id == 'PACKAGES'
                   for word in part.value.elts}
    looked_for.discard(None)
    yield from (f'there is no package {package}' for package in looked_for - set(OTHERS))
    used = {constant(call.args[0]) for call in calls(tree, 'node', 'FindPackageShare')} - {'il_runtime'}
    yield from (f'it is not looked whether there is {package}' for package in used - looked_for)
    shown = (ROOT / 'config' / 'rviz' / 'il.rviz').read_text()
    for call in calls(tree, 'node'):
        package, executable = (constant(word) for word in call.args[:2])
        if executable not in OTHERS.get(package, ()):
            yield f'{package} has no {executable}'
        for topic in remapped(tree, call, launching) - {'/tf', '/tf_static'}:
            if f'Value: {topic}\n' not in shown:
                yield f'{executable} knows no topic {topic}'


def about_files(tree: ast.AST) -> Iterator[str]:
    """Files of config/ and launch/."""
    for part in ast.walk(tree):
        if (path := path_of(part)) and not (ROOT / path).exists():
            yield f'there is no {path}'
        if re.fullmatch(r'[\w.]+\.launch\.\w+', str(constant(part))) and constant(part) not in (*FILES, 'gz_sim.launch.py'):
            yield f'there is no {constant(part)}'


# --- tests ------------------------------------------------------------------------------------------------------------
VALUES = {'true', 'false', 'none', 'auto', 'reach_around', 'base_link', 'il', 'shadow', 'controller', 'chunks', 'shadow/chunks',
          'command', 'shadow/command', 'visualization', 'robot_description'}
"""Words in launch files that are no names, or that a launch file itself gives."""
GAZEBO = {'camera/image', 'config_file', 'geometry_msgs/msg/PointStamped', 'goal', 'gz_args', 'joint_state_broadcaster',
          'joint_trajectory_controller', 'launch', 'log', 'on_exit_shutdown', 'pub', 'ros2', 'so101', 'topic', 'xacro'}
"""Likewise in gazebo.launch.py, of which test_sim_files.py compares controllers, topics and types; and words of ros_gz."""


@pytest.mark.parametrize('name', FILES)
def test_what_a_launch_file_names_exists(name):
    assert problems(name, FILES[name]) == []


def words(text: str) -> Iterator[tuple[int, str]]:
    """Position and text of every name in a source that a typing error could change.

    Strings that are one word, and keywords that declare an argument or give a parameter.
    """
    tree, lines = parsed(text), [0, *(match.end() for match in re.finditer('\n', text))]
    for part in ast.walk(tree):
        if isinstance(part, ast.Constant) and re.fullmatch(r'[a-z][\w/.-]*[a-z_\d]', str(part.value)):
            yield lines[part.lineno - 1] + part.col_offset + 1, part.value
    for call in calls(tree, 'ours', 'arguments', 'controller', 'policy', 'rviz'):
        for keyword in call.keywords:
            if keyword.arg and keyword.arg not in OPTIONS:
                yield lines[keyword.lineno - 1] + keyword.col_offset, keyword.arg


@pytest.mark.parametrize('name', FILES)
def test_a_misspelt_name_is_found(name):
    text, before, not_found = FILES[name], len(problems(name, FILES[name])), []
    for position, word in words(text):
        assert text[position:].startswith(word)
        misspelt = f'{text[:position]}{word[:-1]}{"y" if word[-1] != "y" else "x"}{text[position + len(word):]}'
        if len(problems(name, misspelt)) <= before:
            not_found.append(word)
    assert set(not_found) - VALUES - (GAZEBO if name == 'gazebo.launch.py' else set()) == set()


def test_choices_are_those_of_the_nodes():
    def of(executable, constant_name):
        """Words of a constant of a node's module."""
        value = next(part.value for part in parsed((NODES / f'{executable}.py').read_text()).body
                     if isinstance(part, ast.Assign) and part.targets[0].id == constant_name)
        return [constant(word) for word in (value.keys if isinstance(value, ast.Dict) else value.elts)]

    valid = choices(parsed(FILES['sim.launch.py']), LAUNCHING)
    assert valid['task'] == of('simulator_node', 'TASKS')
    assert valid['plan_when'] == of('policy_node', 'PLAN_WHEN')
    assert (valid['rtc'], valid['backend'], valid['ensembling']) == (list(RTC), list(BACKENDS), list(MODES))
    assert {*valid['teleop']} - {'none'} == {*of('teleop_node', 'SOURCES')} - {'keyboard'}  # which needs a terminal


DOCUMENTS = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')), *sorted((ROOT / 'docker').iterdir()),
             *sorted((ROOT / 'launch').glob('*.py')), *sorted((ROOT / 'config').rglob('*.*'))]


@pytest.mark.parametrize('path', DOCUMENTS, ids=lambda path: path.name)
def test_commands_in_documents_launch_what_exists_with_arguments_that_it_has(path):
    text = path.read_text().replace('\\\n', ' ') if path.suffix != '.png' else ''
    for name, rest in re.findall(r'ros2 launch il_runtime (\S+\.launch\.py)([^\n`|]*)', text):
        tree = parsed(FILES[name])
        has = {*declared(tree), *(declared(parsed(FILES['rviz.launch.py'])) if 'rviz' in declared(tree) else ())}
        for argument, value in re.findall(r'(\w+):=(\w*)', rest):
            assert argument in has, name
            assert value in choices(tree, LAUNCHING).get(argument, [value]), argument
