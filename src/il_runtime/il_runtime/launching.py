"""What the launch files share: arguments that mean the same in all of them, and nodes that take them.

For launch files only. `ros2 launch` runs them with a Python that need not have what the nodes have: nothing is imported but
launch.
"""
from __future__ import annotations

from pathlib import Path

from ament_index_python.packages import get_package_share_directory, get_packages_with_prefixes
from launch.actions import (
    DeclareLaunchArgument,
    GroupAction,
    IncludeLaunchDescription,
    OpaqueFunction,
    SetEnvironmentVariable,
    SetLaunchConfiguration,
    Shutdown,
)
from launch.conditions import IfCondition
from launch.launch_description_sources import AnyLaunchDescriptionSource
from launch.substitutions import (
    EnvironmentVariable,
    LaunchConfiguration,
    NotEqualsSubstitution,
    OrSubstitution,
    PathJoinSubstitution,
)
from launch_ros.actions import Node, PushRosNamespace, SetParametersFromFile
from launch_ros.parameter_descriptions import ParameterValue
from launch_ros.substitutions import FindPackageShare

CONFIG = Path(get_package_share_directory('il_runtime')) / 'config'
ROBOTS = {path.stem: path for path in sorted((CONFIG / 'robots').glob('*.yaml'))}
"""Contracts that come with this package."""
FLAG = ['true', 'false', 'True', 'False']
FRAMES = [('/tf', 'tf'), ('/tf_static', 'tf_static')]
"""Remappings: frames have no namespace, so each arm keeps a tree of its own."""
CANNOT_START = 2
"""Exit code of a node whose parameters, contract or machine do not do."""

SHARED = {
    'namespace': ('namespace of all nodes, topics and services; two arms get two', None),
    'robot': (f'the arm, by the name of its contract: {", ".join(ROBOTS)}', None),
    'contract': ('path of a contract of your own (docs/your-robot.md), in place of robot', None),
    'params_file': ('path of a YAML file with more parameters of these nodes; what an argument says wins', None),
    'use_sim_time': ('take the time from /clock', FLAG),
    'speed_scale': ('slows every motion down [%], 0 to 100; a new arm begins at 20; later: ros2 param set /controller '
                    'speed_scale 50.0', float),
    'checkpoint': ('folder written by il train, whose policy plans', None),
    'plan_when': ('when the policy plans: every stride policy steps, as fast as it can, or when the last chunk runs out',
                  ['stride', 'continuous', 'horizon']),
    'stride': ('policy steps from one plan to the next, 1 to 1000', int),
    'rtc': ('real-time chunking, a new chunk continues the one that is executed; any but off wants ensembling:=latest',
            ['off', 'vjp', 'identity', 'prefix']),
    'ensembling': ('how the controller blends chunks that overlap', ['newest_first', 'oldest_first', 'latest', 'crossfade']),
    'backend': ('what runs the network; auto: the fastest that the checkpoint was exported for (il export onnx), or torch',
                ['auto', 'torch', 'onnxruntime', 'openvino']),
    'teleop': ('what a human drives the arm with: a gamepad on the topic joy, or a leader arm on leader/joint_states; the '
               'keyboard needs a terminal of its own: ros2 run il_runtime teleop_node', ['none', 'gamepad', 'leader']),
    'bags': ('folder for demonstrations, a bag each; they begin and end by the services /recorder/start_episode and '
             '/recorder/stop_episode', None),
    'flight': ('folder for the last 30 s before and around a fault or a takeover, a bag each; empty: not kept', None),
    'drivers': ('path of a launch file of your own that starts the arm, cameras, gamepad or leader arm: included in the '
                'namespace, and given these arguments and any others', None),
    'visualizer': ('show chunks, path, goal, clamps and mode on the topic visualization; always with rviz', FLAG),
    'mcap': ('path of a file (.mcap) to which the visualizer writes the same for Foxglove; empty: none', None),
    'rviz': ('open RViz', FLAG),
}
"""Argument → what it means with its unit and range, and its choices, float, int, or None for any text."""


# --- network ----------------------------------------------------------------------------------------------------------
def this_machine_only() -> SetEnvironmentVariable:
    """Nodes are found on this machine only, unless the environment says otherwise (docs/security.md)."""
    return SetEnvironmentVariable('ROS_AUTOMATIC_DISCOVERY_RANGE',
                                  EnvironmentVariable('ROS_AUTOMATIC_DISCOVERY_RANGE', default_value='LOCALHOST'))


# --- arguments --------------------------------------------------------------------------------------------------------
def arguments(**defaults: str | None) -> list[DeclareLaunchArgument]:
    """Declare shared arguments, each with its default in this launch file."""
    return [argument(name, default, *SHARED[name]) for name, default in defaults.items()]


def argument(name: str, default: str | None, description: str, valid: list[str] | type | None = None) -> DeclareLaunchArgument:
    """Declare one argument; default None: it must be given; valid: its choices, float, int, or None for any text."""
    description = f'{description}{"; required" if default is None else ""}.'
    if valid in (float, int):
        return _Number(name, default_value=default, description=description, kind=valid)
    return DeclareLaunchArgument(name, default_value=default, description=description, choices=valid)


class _Number(DeclareLaunchArgument):
    """Says so when it is none, and before anything is started."""

    def __init__(self, *arguments, kind: type, **options):
        super().__init__(*arguments, **options)
        self.kind = kind

    def execute(self, context) -> None:
        super().execute(context)
        value = context.launch_configurations[self.name]
        try:
            self.kind(value)
        except ValueError:
            raise ValueError(f'{self.name} is {value!r}, must be {"an integer" if self.kind is int else "a number"}') from None


def unless(name: str, value: str) -> IfCondition:
    """Whether an argument is anything else; with '', whether it is given."""
    return IfCondition(NotEqualsSubstitution(LaunchConfiguration(name), value))


def text(name: str) -> ParameterValue:
    """An argument as a string, whatever it looks like, for a parameter."""
    return ParameterValue(LaunchConfiguration(name), value_type=str)


def number(name: str) -> ParameterValue:
    """An argument as a float, for a parameter."""
    return ParameterValue(LaunchConfiguration(name), value_type=float)


def integer(name: str) -> ParameterValue:
    """An argument as an integer, for a parameter."""
    return ParameterValue(LaunchConfiguration(name), value_type=int)


def flag(name: str) -> ParameterValue:
    """An argument as a bool, for a parameter."""
    return ParameterValue(LaunchConfiguration(name), value_type=bool)


# --- an arm and its nodes ---------------------------------------------------------------------------------------------
def arm(*actions) -> GroupAction:
    """Actions about one arm: its contract is looked up, and params_file holds for their nodes."""
    return GroupAction([
        find_contract(),
        OpaqueFunction(function=_find_params_file),
        SetParametersFromFile(LaunchConfiguration('params_file'), condition=unless('params_file', '')),
        # What is included may fail, and launch forgets the processes that the same description has started until then: first.
        *sorted(actions, key=lambda action: isinstance(action, Node))])


def find_contract(condition: IfCondition | None = None) -> OpaqueFunction:
    """Make the argument contract the path of the contract, whichever way it was named; end with what is valid otherwise."""
    def find(context) -> list[SetLaunchConfiguration]:
        robot, contract = context.launch_configurations['robot'], context.launch_configurations['contract']
        path = Path(contract).expanduser() if contract else ROBOTS.get(robot)
        if path is None:
            raise ValueError(f'robot is {robot!r}, valid: {", ".join(ROBOTS)}; or contract:=<path of one of your own>')
        if not path.is_file():
            raise ValueError(f'contract is {contract!r}: there is no such file')
        return [SetLaunchConfiguration('contract', str(path))]

    return OpaqueFunction(function=find, condition=condition)


def _find_params_file(context) -> None:
    file = context.launch_configurations['params_file']
    if file and not Path(file).is_file():
        raise ValueError(f'params_file is {file!r}: there is no such file')


def needs(*packages: str, condition: IfCondition | None = None) -> OpaqueFunction:
    """Packages of others: end with all that are missing, before anything is started."""
    def look(_context) -> None:
        if missing := set(packages) - set(get_packages_with_prefixes()):
            raise ValueError(f'not installed: {", ".join(sorted(missing))}')

    return OpaqueFunction(function=look, condition=condition)


def node(package: str, executable: str, **options) -> Node:
    """A node in the namespace. It is said to each one: what an event handler starts would miss that of a group."""
    parameters = [{'use_sim_time': flag('use_sim_time')}, *options.pop('parameters', [])]
    return Node(package=package, executable=executable, namespace=LaunchConfiguration('namespace'), output='screen',
                parameters=parameters, **options)


def ours(executable: str, *, on_exit=None, name=None, condition=None, remappings=(), **parameters) -> Node:
    """A node of this package with its parameters, to which the contract is added. If it cannot start, everything ends."""
    return node('il_runtime', executable, name=name, condition=condition, remappings=list(remappings),
                parameters=[{'contract': text('contract'), **parameters}],
                on_exit=on_exit or needed_at_start, sigkill_timeout='15')  # [s] for bags that are being written


def needed(event, context) -> Shutdown | None:
    """For on_exit: everything ends with this node."""
    if context.is_shutdown:
        return None
    if event.returncode:  # raised, it ends everything and makes the exit code of ros2 launch 1
        raise RuntimeError(f'{event.process_name} ended with exit code {event.returncode}, see above')
    return Shutdown(reason=f'{event.process_name} has ended')


def needed_at_start(event, context) -> Shutdown | None:
    """For on_exit: later the others go on. An arm is not let go of because the disk of a recorder is full."""
    return needed(event, context) if event.returncode == CANNOT_START else None


def not_needed(_event, _context) -> None:
    """For on_exit: the others go on."""


def controller(**options) -> Node:
    """The 50 Hz loop. `ours` takes the options."""
    return ours('controller_node', on_exit=needed, speed_scale=number('speed_scale'), **options)


def policy(**options) -> Node:
    """The planner, if there is a checkpoint. `ours` takes the options."""
    return ours('policy_node', condition=unless('checkpoint', ''), checkpoint=text('checkpoint'),
                plan_when=text('plan_when'), stride=integer('stride'), rtc=text('rtc'), backend=text('backend'), **options)


def teleop() -> Node:
    """A human's hand on the arm, if wanted."""
    return ours('teleop_node', condition=unless('teleop', 'none'), source=text('teleop'))


def recorder() -> Node:
    """Recorder of demonstrations, if there is a folder for them."""
    return ours('recorder_node', condition=unless('bags', ''), output=text('bags'))


def flight_recorder() -> Node:
    """Flight recorder, if there is a folder for it."""
    return ours('flight_recorder_node', condition=unless('flight', ''), output=text('flight'))


def visualizer(**options) -> Node:
    """The overlay, if wanted. It needs the arm's description, the rest does not. `ours` takes the options."""
    wanted = OrSubstitution(LaunchConfiguration('visualizer'), LaunchConfiguration('rviz'))
    return ours('visualizer_node', condition=IfCondition(wanted), on_exit=not_needed, mcap=text('mcap'), **options)


def rviz(**arguments: str) -> GroupAction:
    """RViz, if wanted; arguments of rviz.launch.py that differ from its own."""
    file = PathJoinSubstitution([FindPackageShare('il_runtime'), 'launch', 'rviz.launch.py'])
    return GroupAction([IncludeLaunchDescription(file, launch_arguments=arguments.items())],
                       condition=IfCondition(LaunchConfiguration('rviz')))


def drivers() -> GroupAction:
    """What the user's own launch file starts, if there is one."""
    return GroupAction([
        PushRosNamespace(LaunchConfiguration('namespace')),
        IncludeLaunchDescription(AnyLaunchDescriptionSource(LaunchConfiguration('drivers'))),
    ], condition=unless('drivers', ''))
