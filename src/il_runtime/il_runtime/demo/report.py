"""demo_out/report.html: what the demo measured, on one page that needs nothing else; and demo_out/paths.png for the README.

    python -m il_runtime.demo.report demo_out      write both again from the files that are there
"""
from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle
from PIL import Image

from il_policies.data.store import Dataset, DataError
from il_policies.sim import reach_around as task
from il_policies.sim.reach_around import ReachAround, SceneError

# Told apart with any colour vision (CIELAB distance of outcomes at least 30 where red or green is not seen); besides, late runs
# are dashed and contacts crossed.
INK, SOFT, LINE = '#1d2733', '#5d6b79', '#dfe5eb'
STYLES = {'left': ('#2b74b8', '-'), 'right': ('#8a93a0', '-'), 'reached': ('#0f9d86', '-'), 'touched': ('#cf4417', '-'),
          'late': ('#6b4c9a', (0, (4, 2)))}
"""What a path is → colour and dashes."""
MEASURED = '#c2528b'
VIEW = (-11.0, 11.0), (8.5, 31.0)
"""Every view from above shows these y and x [cm]."""
CLIP_FPS, CLIP_SIZE, CLIP_HOLD_S = 10, (480, 360), 1.2
"""Of the clip: frames a second, width and height [px], rest on the last frame before it starts again [s]."""
POLICIES = {'bc': 'BC', 'flow': 'Flow'}
RC = {'font.size': 10.5, 'text.color': INK, 'axes.labelcolor': SOFT, 'xtick.color': SOFT, 'ytick.color': SOFT,
      'axes.edgecolor': LINE, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.axisbelow': True,
      'xtick.major.size': 0, 'ytick.major.size': 0, 'ytick.minor.size': 0, 'grid.color': LINE, 'grid.linewidth': 0.7}


@dataclass
class Rollouts:
    """Episodes of one policy, from rollouts/<name>.npz."""

    paths: list[np.ndarray]
    """Path of the tip in each episode [m]. Shapes (N, 3)."""
    reached: np.ndarray
    """The goal was reached in time. Shape (E,)."""
    touched: np.ndarray
    """The pillar was touched. Shape (E,)."""
    arrays: dict[str, np.ndarray]
    """Everything in the file."""

    @property
    def outcomes(self) -> list[str]:
        """reached, touched or late, for each episode."""
        return ['touched' if t else 'reached' if r else 'late' for r, t in zip(self.reached, self.touched)]

    @property
    def sides(self) -> list[str]:
        """left or right, where the path is at its widest; or touched."""
        return ['touched' if touched else 'left' if path[np.argmax(np.abs(path[:, 1])), 1] > 0 else 'right'
                for path, touched in zip(self.paths, self.touched)]


def load_rollouts(out: Path, name: str) -> Rollouts:
    """Read rollouts/<name>.npz. Raises OSError if it is not there, KeyError if an array is missing."""
    with np.load(out / 'rollouts' / f'{name}.npz', allow_pickle=False) as file:
        arrays = dict(file)
    return Rollouts(np.split(arrays['tips'], arrays['ends'][:-1]), arrays['reached'], arrays['touched'], arrays)


def demonstrations(dataset: Dataset) -> tuple[list[np.ndarray], list[str]]:
    """Path of the tip [m], shape (N, 3), and side of each demonstration."""
    tables = [dataset.lowdim(i)['joint_positions'] for i in range(len(dataset))]
    paths = np.split(task.tips(np.concatenate(tables)), np.cumsum([len(table) for table in tables])[:-1])
    return paths, ['left' if path[np.argmax(np.abs(path[:, 1])), 1] > 0 else 'right' for path in paths]


# --- figures ----------------------------------------------------------------------------------------------------------

def top_view(ax: Axes, paths: list[np.ndarray], kinds: list[str], labels: bool = True) -> None:
    """Paths (N, 2 or 3) [m] as seen from above: x upwards, y to the left, as the arm looks at it. kinds: keys of STYLES."""
    for (low_x, high_x), (low_y, high_y), colour in ((task.START_X, task.START_Y, '#e9edf1'), (task.GOAL_X, task.GOAL_Y, '#d9efe8')):
        ax.add_patch(Rectangle((100 * low_y - 0.3, 100 * low_x - 0.3), 100 * (high_y - low_y) + 0.6, 100 * (high_x - low_x) + 0.6,
                               facecolor=colour, edgecolor='none', zorder=1))
    ax.add_patch(Circle((100 * task.PILLAR[1], 100 * task.PILLAR[0]), 100 * task.PILLAR_RADIUS, facecolor='#cdd5dc',
                        edgecolor='#98a4b0', linewidth=1.2, zorder=1.5))
    alpha = float(np.clip(25 / max(len(paths), 1), 0.4, 0.9))
    # Failures last, on top.
    for kind in ('left', 'right', 'reached', 'late', 'touched'):
        colour, dashes = STYLES[kind]
        chosen = [100 * path[:, 1::-1] for path, this in zip(paths, kinds) if this == kind]
        ax.add_collection(LineCollection(chosen, colors=colour, linestyles=[dashes], linewidths=1.1, alpha=alpha, zorder=2))
        if kind == 'touched' and chosen:
            ends = np.array([path[-1] for path in chosen])
            ax.scatter(*ends.T, marker='x', s=16, linewidths=1.1, color=colour, alpha=0.8, zorder=3)
    if labels:
        text = {'ha': 'center', 'va': 'center', 'fontsize': 9.5, 'color': SOFT, 'zorder': 4}
        ax.text(0, 100 * task.PILLAR[0], 'pillar', **text)
        ax.text(0, 29.8, 'goals', **text)
        ax.text(-4.6, 10.7, 'starts', **text)
    ax.set(xlim=VIEW[0][::-1], ylim=VIEW[1], aspect='equal', xticks=[10, 5, 0, -5, -10], yticks=[10, 15, 20, 25, 30])
    ax.grid(True)
    for spine in ax.spines.values():
        spine.set_visible(False)


def top_view_figure(paths: list[np.ndarray], kinds: list[str]) -> str:
    """One view from above as a data URI; all of them have the same axes in the same place."""
    figure = Figure(figsize=(3.1, 3.12))
    ax = figure.add_axes((0.115, 0.075, 0.88, 0.92))
    top_view(ax, paths, kinds)
    figure.text(0.012, 0.012, 'cm', fontsize=9.5, color=SOFT)
    return data_uri(figure)


def paths_figure(views: list[tuple[str, str, list[np.ndarray], list[str]]]) -> Figure:
    """The views from above (title, subtitle, paths, kinds) in a row, for the README."""
    figure = Figure(figsize=(2.9 * len(views), 3.5))
    for ax, (title, subtitle, paths, kinds) in zip(figure.subplots(1, len(views), sharey=True), views):
        top_view(ax, paths, kinds)
        ax.set_title(f'{title}\n', fontsize=12, fontweight='bold', loc='left', pad=2)
        ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=10, color=SOFT)
    figure.text(0.008, 0.02, 'cm', color=SOFT)
    figure.subplots_adjust(left=0.035, right=0.995, bottom=0.075, top=0.87, wspace=0.06)
    return figure


@dataclass
class Shown:
    """The episode over DDS that is shown in full."""

    command_times: np.ndarray
    """[s] since the first command. Shape (K,)."""
    commands: np.ndarray
    """[rad]. Shape (K, 6)."""
    joint_times: np.ndarray
    """[s]. Shape (J,)."""
    joints: np.ndarray
    """Measured [rad]. Shape (J, 6)."""
    chunk_starts: np.ndarray
    """Time of each chunk's first step, rising [s]. Shape (C,)."""
    chunks: np.ndarray
    """[rad]. Shape (C, H, 6)."""
    period: float
    """Between the steps of a chunk [s]."""
    goal: tuple[float, float]
    """[m]."""
    outcome: str
    """reached, touched or late."""

    def chunk_times(self, i: int) -> np.ndarray:
        """Times of the steps of chunk i [s]. Shape (H,)."""
        return self.chunk_starts[i] + self.period * np.arange(self.chunks.shape[1])

    def seam(self, joint: int) -> tuple[float, float]:
        """Where two successive chunks differ most over the first half of the later one: when it starts [s], by how much [rad]."""
        found = (float(self.chunk_starts[0]), 0.0)
        for i in range(1, len(self.chunks)):
            times = self.chunk_times(i)[:self.chunks.shape[1] // 2]
            both = (times >= self.chunk_starts[i - 1]) & (times <= min(self.chunk_times(i - 1)[-1], self.command_times[-1]))
            before = np.interp(times, self.chunk_times(i - 1), self.chunks[i - 1, :, joint])
            difference = np.abs(self.chunks[i, :len(times), joint] - before)[both]
            if difference.size and difference.max() > found[1]:
                found = (float(times[0]), float(difference.max()))
        return found


def load_shown(rollouts: Rollouts) -> Shown:
    """The episode shown: the first success, or else the first episode. Raises KeyError if an array is missing."""
    arrays = rollouts.arrays
    order = np.argsort(arrays['shown_chunk_starts'])
    zero = arrays['shown_command_times'][0]
    return Shown(arrays['shown_command_times'] - zero, arrays['shown_commands'], arrays['shown_joint_times'] - zero,
                 arrays['shown_joints'], arrays['shown_chunk_starts'][order] - zero, arrays['shown_chunks'][order],
                 float(arrays['chunk_period']), tuple(arrays['shown_goal'].tolist()),
                 'reached' if 'reached' in rollouts.outcomes else rollouts.outcomes[0])


def chunk_figure(shown: Shown, joint: int, low: float, high: float, close: bool, size: tuple[float, float]) -> Figure:
    """Chunks, command and measurement of one joint between two times [s]. close: with steps and ticks as dots."""
    drawing = Figure(figsize=size, layout='constrained')
    ax = drawing.subplots()
    ax.grid(True)
    command, joints, steps = (np.rad2deg(values[..., joint]) for values in (shown.commands, shown.joints, shown.chunks))
    times = [shown.chunk_times(i) for i in range(len(steps))]
    drawn = [values[(at >= low) & (at <= high)] for at, values in ((shown.command_times, command), (shown.joint_times, joints),
                                                                   *zip(times, steps))]
    ax.plot(shown.command_times, command, color=INK, linewidth=4.5, solid_joinstyle='round', zorder=2)
    ax.plot(shown.joint_times, joints, color=MEASURED, linewidth=1.5, linestyle=(0, (4, 2)), zorder=3)
    for i, place in enumerate(Normalize(0, max(shown.command_times[-1], 1e-9))(shown.chunk_starts)):
        colour = matplotlib.colormaps['viridis'](0.4 + 0.52 * place)
        ax.plot(times[i], steps[i], color=colour, linewidth=1.7, marker='o' if close else '', markersize=5, zorder=4)
        ax.plot(times[i][0], steps[i, 0], 'o', color=colour, markersize=8 if close else 6, zorder=4)
    if close:
        ax.plot(shown.command_times, command, '.', color='white', markersize=3, zorder=5)
    drawn = np.concatenate(drawn)
    margin = 0.08 * np.ptp(drawn) + 0.1
    ax.set(xlim=(low, high), ylim=(drawn.min() - margin, drawn.max() + margin), xlabel='time [s]', ylabel='shoulder_pan [°]')
    ax.spines['left'].set_visible(False)
    return drawing


def lateness_figure(lateness: np.ndarray, marks: dict[str, float], size: tuple[float, float]) -> Figure:
    """Histogram of how late ticks came (T,) [ms], with lines at `marks`."""
    figure = Figure(figsize=size, layout='constrained')
    ax = figure.subplots()
    high = max(lateness.max(), *marks.values(), 0.1) * 1.04
    ax.grid(True, axis='y')
    ax.hist(lateness, bins=np.linspace(min(lateness.min(), 0.0), high, 90), color='#8fb3cf', log=True)
    top = ax.get_ylim()[1] * 6  # room for the labels above the bars
    ax.set(xlim=(min(lateness.min(), 0.0) - 0.01 * high, high), ylim=(0.7, top), xlabel='lateness of a tick [ms]', ylabel='ticks')
    for i, (label, value) in enumerate(marks.items()):
        ax.axvline(value, color=INK, linewidth=1.1, ymax=0.97 - 0.11 * i)
        right = value > 0.6 * high
        ax.annotate(f'{label}  {value:g} ms', (value, 0.97 - 0.11 * i), xycoords=('data', 'axes fraction'), va='top',
                    xytext=(-5 if right else 5, 0), textcoords='offset points', ha='right' if right else 'left',
                    bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})
    ax.spines['left'].set_visible(False)
    return figure


def render_clip(shown: Shown) -> bytes:
    """The shown episode as an animated WebP that loops. Raises SceneError where nothing can be rendered."""
    simulation = ReachAround()
    end = shown.joint_times[-1]
    times = np.append(np.arange(max(shown.joint_times[0], 0.0), end, 1 / CLIP_FPS), end)
    frames = []
    for i in np.searchsorted(shown.joint_times, times).clip(max=len(shown.joints) - 1):
        # A third larger and scaled down: edges are smooth without multisampling.
        image = simulation.render_pose(shown.joints[i], shown.goal, (CLIP_SIZE[1] * 4 // 3, CLIP_SIZE[0] * 4 // 3))
        frames.append(Image.fromarray(image).resize(CLIP_SIZE, Image.Resampling.LANCZOS))
    simulation.close()
    durations = [1000 // CLIP_FPS] * (len(frames) - 1) + [round(1000 * CLIP_HOLD_S)]
    buffer = io.BytesIO()
    frames[0].save(buffer, 'WEBP', save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=72, method=2)
    return buffer.getvalue()


def data_uri(content: Figure | Image.Image | bytes) -> str:
    """A figure, an image or the bytes of a WebP file as a data URI."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        if isinstance(content, Figure):
            content.savefig(buffer, format='webp', dpi=200, pil_kwargs={'lossless': True, 'method': 1})
        else:
            content.save(buffer, 'WEBP', lossless=True)
        content = buffer.getvalue()
    return 'data:image/webp;base64,' + base64.b64encode(content).decode()


# --- HTML -------------------------------------------------------------------------------------------------------------

def image(uri: str, alt: str, classes: str = '', width: int | None = None) -> str:
    """An image."""
    size = f' style="width:{width}px"' if width else ''
    return f'<img class="{classes}"{size} alt="{escape(alt)}" src="{uri}">'


def responsive(draw: Callable[[tuple[float, float]], Figure], wide: tuple[float, float], alt: str) -> str:
    """A figure drawn at two sizes [100 px], of which narrow screens show one whose text they can read."""
    return (f'<picture><source media="(max-width: 640px)" srcset="{data_uri(draw((3.7, 3.0)))}">'
            f'{image(data_uri(draw(wide)), alt)}</picture>')


def figure(body: str, caption: str, classes: str = '') -> str:
    """Something to look at and what to look for."""
    return f'<figure class="{classes}">{body}<figcaption>{caption}</figcaption></figure>'


def section(title: str, lead: str, body: str) -> str:
    """A card of the page."""
    return f'<section><h2>{escape(title)}</h2><p class="lead">{lead}</p>{body}</section>'


def table(header: list[str], rows: list[list[str]], classes: str = '') -> str:
    """A table; the first cell of a row is its heading."""
    head = ''.join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ''.join(f'<tr><th scope="row">{row[0]}</th>' + ''.join(f'<td>{cell}</td>' for cell in row[1:]) + '</tr>' for row in rows)
    return f'<table class="{classes}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    z, p = 1.96, successes / episodes
    middle, half = p + z * z / (2 * episodes), z * np.sqrt(p * (1 - p) / episodes + z * z / (4 * episodes**2))
    return max(0.0, (middle - half) / (1 + z * z / episodes)), min(1.0, (middle + half) / (1 + z * z / episodes))


def bar(parts: list[tuple[str, float]]) -> str:
    """A bar of parts (kind, share of the whole)."""
    return '<span class="bar">' + ''.join(f'<i class="{kind}" style="width:{100 * share:.1f}%"></i>' for kind, share in parts) + '</span>'


def score(counts: dict, prefix: str = '') -> str:
    """Successes, their interval and what went wrong."""
    successes, episodes, touched = (counts.get(f'{prefix}{key}') for key in ('successes', 'episodes', 'touched'))
    if successes is None or not episodes:
        return '<span class="soft">not run</span>'
    low, high = interval(successes, episodes)
    text = f'<b class="count">{successes}<small> / {episodes}</small></b>'
    parts = [('reached', successes / episodes)]
    wrong = ''
    if touched is not None:
        late = episodes - successes - touched
        parts += [('touched', touched / episodes), ('late', late / episodes)]
        wrong = f'<span>{touched} touched the pillar</span>' + (f'<span>{late} out of time</span>' if late else '')
    return f'{text}{bar(parts)}<small class="soft facts">{wrong}<span>95 % interval {100 * low:.0f}\u2060–\u2060{100 * high:.0f}\u00a0%</span></small>'


def legend(*kinds: str) -> str:
    """What the colours mean."""
    names = {'left': 'demonstration round the left', 'right': 'demonstration round the right', 'reached': 'goal reached, pillar not touched',
             'touched': 'pillar touched: the run ends there (×)', 'late': 'goal not reached in time'}
    return '<p class="legend">' + ''.join(f'<span><i class="{kind}"></i>{names[kind]}</span>' for kind in kinds) + '</p>'


def header(results: dict, hero: str) -> str:
    """Headline, success table and clip."""
    bc, flow = (results['policies'][name] for name in POLICIES)
    left = results.get('studies', {}).get('bc_left')
    text = (f'Every start and goal was demonstrated twice, once round the left of the pillar and once round the right '
            f'({results["demonstrations"]} demonstrations). BC predicts their average, and that leads into the pillar; Flow draws '
            f'one of the two. Data, network, budget and stride are the same for both.')
    rows = [['BC <small>mean squared error</small>', score(bc), score(bc, 'lockstep_')],
            ['Flow <small>flow matching</small>', score(flow), score(flow, 'lockstep_')]]
    if left:
        rows.insert(1, ['BC, one side <small>control: demonstrations round the left only</small>', '<span class="soft">–</span>', score(left)])
        if left['successes'] / left['episodes'] > bc['lockstep_successes'] / bc['lockstep_episodes'] + 0.3:
            text += (f' Trained on one side only, BC reaches the goal in {left["successes"]} of {left["episodes"]}: it is the two '
                     f'ways that defeat it, not the training.')
    return (f'<header><div class="opening"><p class="kicker">SO-101 in simulation · reach around a pillar</p>'
            f'<h1>Flow gets round the pillar in {flow["lockstep_successes"]} of {flow["lockstep_episodes"]} starts, '
            f'BC in {bc["lockstep_successes"]} of {bc["lockstep_episodes"]}</h1><p>{text}</p></div>{hero}<div>'
            + table(['', 'over DDS, real time', 'lock-step'], rows, 'scores')
            + f'<p class="soft small">Success: the gripper rests at the goal within {task.EPISODE_S:g} s and nothing touched the pillar. '
            f'Over DDS: simulator, planner and controller are processes of their own, at real-time factor 1. Lock-step: the same '
            f'planner, ensembling and safety code without ROS. The starts and goals are none of the demonstrated ones.</p></div></header>')


def hero(shown: Shown, dataset: Dataset) -> str:
    """Clip of the shown run and a camera image of the dataset."""
    end = {'reached': 'reaches the goal', 'touched': 'touches the pillar', 'late': 'does not reach the goal in time'}[shown.outcome]
    caption = (f'One Flow run over DDS in real time: the gripper {end} after {shown.command_times[-1]:.1f} s.')
    try:
        clip = image(data_uri(render_clip(shown)), 'clip of the arm moving round the pillar', 'clip')
    except SceneError as error:
        clip = f'<p class="soft">No clip: {escape(str(error))}</p>'
    still = ''
    if dataset.info.images:
        name = dataset.info.images[0]
        height, width, _ = dataset.info.features[name].shape
        frame = dataset.image(0, name, dataset.episodes[0]['length'] // 2)
        still = (f'<div class="still">{image(data_uri(Image.fromarray(frame)), "camera image", "pixels", 120)}<span>What the dataset '
                 f'holds of camera <code>{escape(name)}</code>: {width} × {height} pixels at {dataset.info.fps:g} Hz.</span></div>')
    return f'<div class="hero">{figure(clip, caption)}{still}</div>'


def share(counts: dict) -> str:
    """Successes in words."""
    return f'{counts["successes"]} of {counts["episodes"]}'


def from_above(results: dict, views: list, over_dds: list[tuple[str, Rollouts]]) -> str:
    """The views from above side by side."""
    bc, flow = (results['policies'][name] for name in POLICIES)
    panels = ''.join(figure(image(top_view_figure(paths, kinds), f'{title}: {subtitle}'), f'<b>{escape(title)}</b><br>{escape(subtitle)}')
                     for title, subtitle, paths, kinds in views)
    dds = ''.join(figure(image(top_view_figure(runs.paths, runs.outcomes), f'{name} over DDS'),
                         f'<b>{name}</b><br>{sum(kind == "reached" for kind in runs.outcomes)} of {len(runs.paths)} reach the goal')
                  for name, runs in over_dds)
    lead = (f'Look in front of the pillar, where the ways part: {bc["lockstep_touched"]} of {bc["lockstep_episodes"]} BC runs end at the '
            f'pillar, between the two ways; of Flow’s {flow["lockstep_episodes"]}, {flow["lockstep_touched"]} touch it and the others go '
            f'one way or the other.')
    note = ('<p class="soft small">Paths of the gripper’s tip, in lock-step; the arm’s base is below the picture, its left is on the '
            'left. The gripper is wider than a line: it touches before the tip is there.</p>')
    return section('From above', lead, legend('left', 'right', 'reached', 'touched', 'late') + f'<div class="grid four">{panels}</div>{note}'
                   f'<details><summary>The same over DDS, in real time</summary><div class="grid four">{dds}</div></details>')


def one_start(runs: Rollouts, study: dict) -> str:
    """Both ways from one start."""
    left, right, n = study['left'], study['right'], study['episodes']
    lead = (f'One start, one goal, {n} draws of noise: Flow goes left {left} times and right {right} times. Look for both '
            f'colours: a policy that had settled on one side would show one.')
    split = (f'<div class="split"><div class="ends"><b>{left}<small> left</small></b><b>{right}<small> right</small></b></div>'
             + bar([('left', left / n), ('right', right / n)])
             + f'<p>{share(study)} reach the goal without touching the pillar. The noise picks the side; each later chunk is '
             f'started from the one before it, so that a run keeps to its side.</p>'
             '<p class="legend"><span><i class="left"></i>went left</span><span><i class="right"></i>went right</span><span>'
             '<i class="touched"></i>touched the pillar</span></p></div>')
    panel = image(top_view_figure(runs.paths, runs.sides), f'{n} runs from one start: {left} left, {right} right')
    return section('Both ways from one start', lead, f'<div class="grid beside"><figure>{panel}</figure>{split}</div>')


def chunks(shown: Shown, dataset: Dataset) -> str:
    """Chunks and the ensembled command."""
    joint = dataset.info.action.names.index('shoulder_pan')
    when, difference = shown.seam(joint)
    step = f'{np.rad2deg(np.abs(np.diff(shown.commands[:, joint])).max()):.2f}°'
    if contract := dataset.info.contract:
        limit = next(j['velocity'] for j in contract['joints'] if j['name'] == 'shoulder_pan') / contract['control_rate']
        step += f', limit {np.rad2deg(limit):.2f}°'
    end = float(shown.command_times[-1])
    count = int((shown.chunk_starts <= end).sum())
    whole = figure(
        responsive(lambda size: chunk_figure(shown, joint, min(0.0, shown.chunk_starts[0]), end, False, size), (7.2, 3.5),
                   'chunks, command and measurement over time'),
        f'<b>The whole run:</b> {count} chunks of {shown.chunks.shape[1]} steps, {1000 * shown.period:.0f} ms apart; a dot marks where '
        f'one begins. Where chunks overlap, the command is their mean, weighted by age.')
    close = figure(
        responsive(lambda size: chunk_figure(shown, joint, when - 0.25, when + 0.55, True, size), (3.6, 3.5), 'the same, enlarged'),
        f'<b>The widest seam,</b> at {when:.1f} s: two successive chunks differ by up to {np.rad2deg(difference):.1f}°, and the command '
        f'crosses from one to the other. White dots are single 50 Hz commands.')
    lead = (f'Look where coloured lines part: chunks do not quite agree, yet the command never jumps (largest step from tick to tick '
            f'{step}). This is the joint that swings the arm round the pillar, in the run of the clip.')
    return section('Chunks and the ensembled command', lead,
                   '<p class="legend"><span><i class="chunk"></i>chunks, the later the lighter</span><span><i class="command"></i>command, '
                   '50 Hz</span><span><i class="measured"></i>measured</span></p>'
                   f'<div class="grid chunks">{whole}{close}</div>')


def averaging(studies: dict, runs: dict[str, Rollouts]) -> str:
    """Plain averaging of chunks from fresh noise against warm start."""
    fresh, warm = studies['fresh_average'], studies['warm_start']
    names = {'fresh_average': 'Fresh noise for every chunk', 'warm_start': 'Warm start from the chunk before'}
    most = max(study.get('jerk_rms', 0.0) for study in (fresh, warm)) or 1.0
    panels = ''
    for name, title in names.items():
        study = studies[name]
        jerk = (f'<div class="metric"><span>jerk of the commands, RMS</span><b>{study["jerk_rms"]:g}<small> rad/s³</small></b>'
                f'{bar([("plain", study["jerk_rms"] / most)])}</div>' if 'jerk_rms' in study else '')
        panels += (f'<figure>{image(top_view_figure(runs[name].paths, runs[name].outcomes), f"{title}: {share(study)}")}<figcaption>'
                   f'<b>{title}</b><div class="metric"><span>success</span>{score(study)}</div>{jerk}</figcaption></figure>')
    lead = (f'Averaging chunks that chose different sides is BC’s mistake again. Both runs plan twice as often and average all live '
            f'chunks with equal weight; only the noise differs. Look in front of the pillar: {fresh["touched"]} of {fresh["episodes"]} '
            f'touch the pillar with fresh noise, {warm["touched"]} of {warm["episodes"]} with warm start.')
    if 'jerk_rms' in fresh and 'jerk_rms' in warm and fresh['jerk_rms'] <= warm['jerk_rms'] and fresh['successes'] < warm['successes']:
        lead += ' By jerk alone fresh noise would win: smoothness says nothing without success.'
    return section('What averaging does to Flow', lead, legend('reached', 'touched', 'late') + f'<div class="grid two">{panels}</div>')


def timing(controller: dict, lateness: np.ndarray) -> str:
    """The controller's loop."""
    marks = {label: controller[f'lateness_{key}_ms'] for label, key in (('p50', 'p50'), ('p99', 'p99'), ('max', 'max'))}
    ticks, missed = controller['ticks'], controller['missed_ticks']
    tiles = [(f'{marks["p50"]:g} ms', 'median lateness'), (f'{marks["p99"]:g} ms', '99 % are earlier'), (f'{marks["max"]:g} ms', 'the latest'),
             (f'{missed:g}', f'missed of {ticks} ticks'), (f'{controller["limit_violations"]}', 'limit violations')]
    lead = f'Look at the right end: how late a tick comes at worst, against {1000 / controller["rate_hz"]:.0f} ms from tick to tick.'
    body = '<div class="tiles">' + ''.join(f'<div><b>{value}</b><span>{label}</span></div>' for value, label in tiles) + '</div>'
    body += figure(responsive(lambda size: lateness_figure(lateness, marks, size), (10.6, 3.0), 'histogram of tick lateness'),
                   f'Lateness of {len(lateness)} ticks over DDS at real-time factor 1, logarithmic counts: p50 {marks["p50"]:g} ms, p99 '
                   f'{marks["p99"]:g} ms, max {marks["max"]:g} ms'
                   + (f'; scheduler {escape(controller["scheduler"])}' if controller.get('scheduler') else '')
                   + '. Limit violations: commands outside position, velocity or acceleration limits, recomputed from the commands of '
                   'all runs.')
    return section('The 50 Hz loop', lead, body)


def making(results: dict, out: Path) -> str:
    """Stages, training, how to reproduce, what next."""
    stages = results.get('stages', [])
    longest = max((seconds for _, seconds in stages), default=0.0) or 1.0
    rows = [[escape(name), f'{seconds:.1f} s', bar([('plain', seconds / longest)])] for name, seconds in stages]
    facts = [f'{results["wall_s"]:.1f} s in all' if 'wall_s' in results else '',
             f'of which set-up {results["setup_s"]:.1f} s' if 'setup_s' in results else '', escape(results.get('machine', ''))]
    body = f'<p class="soft small">{" · ".join(fact for fact in facts if fact)}</p>'
    if rows:
        body = table(['stage', 'time', ''], rows, 'stages') + body
    trained = [[{'bc_left': 'BC, one side'}.get(name) or POLICIES.get(name, escape(name)), f'{fact.get("episodes", "–")}', f'{fact["steps"]}',
                f'{fact["seconds"]:.0f}\u00a0s', f'{fact["loss"]:.4f}'] for name, fact in results.get('training', {}).items()]
    if trained:
        body += table(['training', 'demonstrations', 'steps', 'time', 'loss'], trained, 'plain')
        body += '<p class="soft small">The losses of BC and Flow measure different things and do not compare.</p>'
    if results.get('dataset'):
        body += f'<p><b>Dataset.</b> {escape(results["dataset"])}</p>'
    name = escape(out.resolve().name)
    steps = [('make demo', 'again with the demonstrations and policies that are there'), ('make demo FRESH=1', 'everything from the start'),
             ('. ./env.sh', 'the environment for what follows'),
             (f'il evaluate {name}/checkpoints/flow --task reach_around --episodes 200', 'more starts, in lock-step'),
             (f'il train {name}/dataset --output my_policy --preset config/policies/flow.yaml --steps 5000', 'a policy of your own'),
             ('il convert BAGS DATASET --contract config/robots/ROBOT.yaml', 'your own recordings, from your own arm: see README.md')]
    listed = ''.join(f'<div><code>{command}</code><span>{what}</span></div>' for command, what in steps)
    return (section('Where the time went', 'Each stage reuses what is already there, so a second run is shorter.', body)
            + section('Reproduce, and go on', f'The numbers of this page are in <code>{name}/results.json</code>.', f'<div class="steps">{listed}</div>'))


STYLE = f'''
:root {{ color-scheme: light; --ink: {INK}; --soft: {SOFT}; --line: {LINE}; }}
* {{ box-sizing: border-box; }}
body {{ margin: 0; background: #f5f7f9; color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }}
main {{ max-width: 1160px; margin: 0 auto; padding: 28px 20px 48px; }}
header {{ display: grid; grid-template-columns: minmax(0, 1.32fr) minmax(0, 1fr); gap: 0 40px; padding: 12px 0 28px;
  align-items: start; grid-template-rows: auto 1fr; }}
h1 {{ font-size: clamp(1.65rem, 3.2vw, 2.3rem); line-height: 1.18; letter-spacing: -0.018em; margin: 0 0 14px; text-wrap: balance; }}
h2 {{ font-size: 1.28rem; letter-spacing: -0.01em; margin: 0 0 6px; }}
p {{ margin: 0 0 12px; }}
.kicker {{ color: var(--soft); font-size: 0.86rem; margin-bottom: 8px; }}
.lead {{ max-width: 76ch; margin-bottom: 16px; }}
.soft, figcaption {{ color: var(--soft); }}
.small, small, figcaption, .legend {{ font-size: 0.86rem; line-height: 1.45; }}
figcaption b {{ color: var(--ink); }}
section {{ background: #fff; border: 1px solid var(--line); border-radius: 14px; padding: 24px 26px; margin-top: 20px; }}
figure {{ margin: 0; min-width: 0; }}
figcaption {{ margin-top: 8px; }}
img {{ display: block; width: 100%; height: auto; }}
code {{ font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #eef2f5; border-radius: 5px; padding: 1px 5px;
  overflow-wrap: anywhere; }}
.hero {{ grid-column: 2; grid-row: 1 / 3; }}
.clip {{ border-radius: 14px; border: 1px solid var(--line); }}
.still {{ display: flex; gap: 14px; align-items: center; margin-top: 16px; color: var(--soft); font-size: 0.86rem; line-height: 1.45; }}
.still img {{ flex: none; border-radius: 8px; }}
.pixels {{ image-rendering: pixelated; }}
.grid {{ display: grid; gap: 22px; }}
.four {{ grid-template-columns: repeat(4, minmax(0, 1fr)); }}
.two {{ grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 40px; }}
.two figure {{ display: grid; grid-template-columns: minmax(0, 1.45fr) minmax(0, 1fr); gap: 20px; align-items: center; }}
.beside {{ grid-template-columns: minmax(0, 400px) minmax(0, 520px); gap: 64px; align-items: center; }}
.chunks {{ grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); }}
.legend {{ display: flex; flex-wrap: wrap; gap: 4px 20px; color: var(--soft); margin-bottom: 14px; }}
.legend span {{ display: inline-flex; align-items: center; gap: 7px; }}
.legend i {{ width: 22px; height: 4px; border-radius: 2px; flex: none; }}
i.left {{ background: {STYLES['left'][0]}; }} i.right {{ background: {STYLES['right'][0]}; }}
i.reached {{ background: {STYLES['reached'][0]}; }} i.touched {{ background: {STYLES['touched'][0]}; }}
i.chunk {{ background: linear-gradient(90deg, #24878e, #a5db36); }} i.command {{ background: var(--ink); }}
i.measured {{ background: repeating-linear-gradient(90deg, {MEASURED} 0 6px, #fff 6px 9px); }}
i.plain {{ background: #9db0c1; }}
i.late {{ background: repeating-linear-gradient(90deg, {STYLES['late'][0]} 0 5px, #fff 5px 7px); }}
.bar {{ display: flex; height: 9px; border-radius: 5px; overflow: hidden; background: #e9eef2; margin: 3px 0 5px; }}
.bar i {{ height: 100%; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; vertical-align: top; padding: 9px 18px 9px 0; border-top: 1px solid var(--line); }}
th:last-child, td:last-child {{ padding-right: 0; }}
thead th {{ border: 0; padding-bottom: 4px; color: var(--soft); font-weight: 500; font-size: 0.86rem; }}
tbody th {{ font-weight: 650; }}
tbody th small {{ display: block; font-weight: 400; color: var(--soft); }}
.facts span {{ display: block; }}
.scores th:first-child {{ width: 27%; }}
.scores td {{ width: 36%; }}
.scores {{ margin: 6px 0 12px; }}
.count {{ font-size: 1.35rem; font-weight: 650; line-height: 1.2; }}
.count small, .metric b small, .ends small {{ font-weight: 400; color: var(--soft); }}
.stages th {{ font-weight: 400; }}
.stages td {{ white-space: nowrap; }}
.stages td:last-child {{ width: 38%; vertical-align: middle; }}
.stages, .plain {{ margin-bottom: 12px; font-size: 0.94rem; }}
.metric {{ margin-top: 12px; }}
.metric > span:first-child {{ display: block; }}
.metric > b {{ font-size: 1.35rem; font-weight: 650; line-height: 1.2; }}
.ends {{ display: flex; justify-content: space-between; font-size: 1.9rem; line-height: 1.2; }}
.split .bar {{ height: 14px; border-radius: 7px; margin: 4px 0 16px; }}
.tiles {{ display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 12px; margin-bottom: 18px; }}
.tiles div {{ background: #f5f7f9; border-radius: 10px; padding: 12px 14px; }}
.tiles b {{ display: block; font-size: 1.3rem; line-height: 1.25; font-variant-numeric: tabular-nums; }}
.tiles span {{ color: var(--soft); font-size: 0.86rem; }}
.grid + .small {{ margin-top: 16px; }}
details {{ margin-top: 12px; }}
summary {{ cursor: pointer; color: var(--soft); margin-bottom: 12px; }}
.steps div {{ display: grid; grid-template-columns: minmax(0, 1.5fr) minmax(0, 1fr); gap: 4px 24px; padding: 8px 0; border-top: 1px solid var(--line); }}
.steps code {{ background: none; padding: 0; }}
.steps span {{ color: var(--soft); }}
@media (max-width: 900px) {{
  header, .chunks {{ grid-template-columns: minmax(0, 1fr); gap: 24px; }}
  .hero {{ grid-column: 1; grid-row: auto; }}
  .four {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }}
  .two {{ grid-template-columns: minmax(0, 1fr); }}
}}
@media (max-width: 640px) {{
  main {{ padding: 16px 12px 32px; }}
  section {{ padding: 18px 16px; border-radius: 12px; }}
  .grid {{ gap: 18px 12px; }}
  .beside {{ grid-template-columns: minmax(0, 1fr); }}
  .two {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }}
  .two figure {{ display: block; }}
  .tiles {{ grid-template-columns: repeat(2, minmax(0, 1fr)); }}
  .steps div {{ grid-template-columns: minmax(0, 1fr); }}
  th, td {{ padding-right: 12px; }}
  .stages td:last-child {{ width: 26%; }}
}}
@media print {{ section {{ break-inside: avoid; }} }}
'''


def write(out: Path) -> Path:
    """Write report.html and paths.png from the files below `out`, and return the path of the page.

    Raises OSError, DataError or KeyError (the name) for what is missing.
    """
    results = json.loads((out / 'results.json').read_text())
    studies = results.get('studies', {})
    dataset = Dataset(out / 'dataset')
    names = ['bc', 'flow', 'bc_dds', 'flow_dds', *(name for name in ('bc_left', 'flow_one_start') if name in studies)]
    if 'fresh_average' in studies and 'warm_start' in studies:
        names += ['fresh_average', 'warm_start']
    runs = {name: load_rollouts(out, name) for name in names}
    shown = load_shown(runs['flow_dds'])
    lateness = 1e3 * np.concatenate([runs[f'{name}_dds'].arrays['lateness'] for name in POLICIES])

    paths, sides = demonstrations(dataset)
    views = [('Demonstrations', f'{sides.count("left")} left, {sides.count("right")} right', paths, sides)]
    for name, title in (('bc', 'BC'), ('bc_left', 'BC, one side only'), ('flow', 'Flow')):
        if name in runs:
            reached = runs[name].outcomes.count('reached')
            views.append((title, f'{reached} of {len(runs[name].paths)} reach the goal', runs[name].paths, runs[name].outcomes))

    with matplotlib.rc_context(RC):
        paths_figure(views).savefig(out / 'paths.png', dpi=150)
        body = header(results, hero(shown, dataset))
        body += from_above(results, views, [(title, runs[f'{name}_dds']) for name, title in POLICIES.items()])
        if 'flow_one_start' in runs:
            body += one_start(runs['flow_one_start'], studies['flow_one_start'])
        body += chunks(shown, dataset)
        if 'warm_start' in runs:
            body += averaging(studies, runs)
        body += timing(results['controller'], lateness) + making(results, out)
    page = (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<title>Reach around: BC and Flow</title><style>{STYLE}</style></head><body><main>{body}</main></body></html>\n')
    path = out / 'report.html'
    path.write_text(page, encoding='utf-8')
    return path


def main() -> int:
    """Entry point; 0 written, 1 something is missing, 2 wrong arguments."""
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        print('usage: python -m il_runtime.demo.report demo_out', file=sys.stderr)
        return 2
    try:
        print(write(Path(sys.argv[1])))
    except KeyError as error:
        print(f'report: {error} is missing in {sys.argv[1]}; run "make demo"', file=sys.stderr)
    except (OSError, DataError) as error:
        print(f'report: {error}', file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == '__main__':
    sys.exit(main())
