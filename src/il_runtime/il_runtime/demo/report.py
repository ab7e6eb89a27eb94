"""demo_out/report.html: what the demo measured, on one page that needs nothing else; and paths.png for the README.

    python -m il_runtime.demo.report demo_out      write both again from the files that are there
"""
from __future__ import annotations

import base64
import io
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Rectangle, Wedge
from matplotlib.ticker import FixedLocator, NullLocator
from PIL import Image

from il_policies.data.store import Dataset
from il_policies.sim import reach_around as task
from il_policies.sim.reach_around import ReachAround, SceneError

INK, SOFT, LINE = '#1d2733', '#5d6b79', '#dfe5eb'
# Outcomes are at least 40 apart in CIELAB where red or green is not seen, sides 34; besides, late runs are dashed and
# contacts crossed.
STYLES = {'left': ('#2b74b8', '-'), 'right': ('#8a93a0', '-'), 'reached': ('#0f9d86', '-'), 'touched': ('#cf4417', '-'),
          'late': ('#6b4c9a', (0, (4, 2)))}
"""What a path is → colour and dashes."""
MEASURED = '#c2528b'
VIEW = (-11.0, 11.0), (8.5, 31.0)
"""Every view from above shows these y and x [cm]."""
CLIP_FPS, CLIP_SIZE, CLIP_HOLD_S = 10, (480, 360), 1.2
"""Of the clip: frames a second, width and height [px], rest on the last frame before it starts again [s]."""
POLICIES = {'bc': 'BC', 'flow': 'Flow'}
JOINT = 'shoulder_pan'
"""Joint whose chunks are shown: it swings the arm round the pillar."""
RC = {'font.size': 10.5, 'text.color': INK, 'axes.labelcolor': SOFT, 'xtick.color': SOFT, 'ytick.color': SOFT,
      'axes.edgecolor': LINE, 'axes.spines.top': False, 'axes.spines.right': False, 'axes.spines.left': False,
      'axes.axisbelow': True, 'xtick.major.size': 0, 'ytick.major.size': 0, 'ytick.minor.size': 0, 'grid.color': LINE,
      'grid.linewidth': 0.7}


# --- what there is to show --------------------------------------------------------------------------------------------

def side(path: np.ndarray) -> str:
    """left or right: where a path (N, 2 or 3) passes the pillar, or, if it never does, where it is at its widest."""
    beyond = path[:, 0] > task.PILLAR[0]
    place = np.argmax(beyond) if beyond.any() else np.argmax(np.abs(path[:, 1]))
    return 'left' if path[place, 1] > 0 else 'right'


@dataclass
class Rollouts:
    """Episodes of one policy, from rollouts/<name>.npz."""

    paths: list[np.ndarray]
    """Path of the tip in each episode [m]. Shapes (N, 3)."""
    outcomes: list[str]
    """reached, touched (the pillar) or late, for each episode."""
    arrays: dict[str, np.ndarray]
    """Everything in the file."""


def load_rollouts(out: Path, name: str) -> Rollouts:
    """Read rollouts/<name>.npz. Raises OSError if it is not there, KeyError if an array is missing."""
    with np.load(out / 'rollouts' / f'{name}.npz', allow_pickle=False) as file:
        arrays = dict(file)
    outcomes = ['touched' if touched else 'reached' if reached else 'late'
                for reached, touched in zip(arrays['reached'], arrays['touched'], strict=True)]
    return Rollouts(np.split(arrays['tips'], arrays['ends'][:-1]), outcomes, arrays)


def demonstrated(dataset: Dataset) -> list[np.ndarray]:
    """Path of the tip in each demonstration [m]. Shapes (N, 3)."""
    tables = [dataset.lowdim(i)['joint_positions'] for i in range(len(dataset))]
    return np.split(task.tips(np.concatenate(tables)), np.cumsum([len(table) for table in tables])[:-1])


@dataclass
class Shown:
    """The episode over DDS that is shown in full; times since its first command."""

    command_times: np.ndarray
    """[s]. Shape (K,)."""
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

    @property
    def end(self) -> float:
        """Time of the last command [s]."""
        return float(self.command_times[-1])

    def chunk_times(self, i: int) -> np.ndarray:
        """Times of the steps of chunk i [s]. Shape (H,)."""
        return self.chunk_starts[i] + self.period * np.arange(self.chunks.shape[1])

    def seam(self, joint: int) -> tuple[float, float]:
        """Where successive chunks differ most, over the first half of the later one.

        Returns when that one starts [s] and by how much they differ [rad].
        """
        found = (float(self.chunk_starts[0]), 0.0)
        for i in range(1, len(self.chunks)):
            before, times = self.chunk_times(i - 1), self.chunk_times(i)[:self.chunks.shape[1] // 2]
            times = times[times <= min(before[-1], self.end)]
            earlier = np.interp(times, before, self.chunks[i - 1, :, joint])
            difference = np.abs(self.chunks[i, :len(times), joint] - earlier)
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


# --- figures ----------------------------------------------------------------------------------------------------------

View = tuple[str, str, list[np.ndarray], list[str]]
"""Title, subtitle, paths and kinds of a view from above."""


def top_view(ax: Axes, paths: list[np.ndarray], kinds: list[str], goals: str = 'narrow') -> None:
    """Paths (N, 2 or 3) [m] seen from above: x upwards, y to the left, as the arm sees it.

    kinds: keys of STYLES. goals: their area, as for `sample_scene`.
    """
    areas = [(task.START_X, task.START_Y, '#e9edf1')]
    if goals == 'narrow':
        areas.append((task.GOAL_X, task.GOAL_Y, '#d9efe8'))
    else:
        near, far = 100 * np.array(task.GOAL_RADIUS) + (-0.3, 0.3)
        ax.add_patch(Wedge((100 * task.PAN_AXIS[1], 100 * task.PAN_AXIS[0]), far, *(90 + np.rad2deg(task.GOAL_ANGLE)),
                           width=far - near, facecolor='#d9efe8', edgecolor='none', zorder=1))
    for (x0, x1), (y0, y1), colour in areas:
        corner, width, height = (100 * y0 - 0.3, 100 * x0 - 0.3), 100 * (y1 - y0) + 0.6, 100 * (x1 - x0) + 0.6
        ax.add_patch(Rectangle(corner, width, height, facecolor=colour, edgecolor='none', zorder=1))
    ax.add_patch(Circle((100 * task.PILLAR[1], 100 * task.PILLAR[0]), 100 * task.PILLAR_RADIUS, facecolor='#cdd5dc',
                        edgecolor='#98a4b0', linewidth=1.2, zorder=1.5))
    beyond = 29.8 if goals == 'narrow' else 30.2
    for x, y, text in ((100 * task.PILLAR[0], 0, 'pillar'), (beyond, 0, 'goals'), (10.7, -4.6, 'starts')):
        ax.text(y, x, text, ha='center', va='center', fontsize=9.5, color=SOFT, zorder=4)
    alpha = float(np.clip(25 / max(len(paths), 1), 0.4, 0.9))
    for kind in ('left', 'right', 'reached', 'late', 'touched'):  # failures on top
        colour, dashes = STYLES[kind]
        chosen = [100 * path[:, 1::-1] for path, this in zip(paths, kinds, strict=True) if this == kind]
        ax.add_collection(LineCollection(chosen, colors=colour, linestyles=[dashes], linewidths=1.1, alpha=alpha,
                                         zorder=2))
        if kind == 'touched' and chosen:
            ends = np.array([path[-1] for path in chosen])
            ax.scatter(*ends.T, marker='x', s=16, linewidths=1.1, color=colour, alpha=0.8, zorder=3)
    ax.set(xlim=VIEW[0][::-1], ylim=VIEW[1], aspect='equal', xticks=[10, 5, 0, -5, -10], yticks=[10, 15, 20, 25, 30])
    ax.grid(True)
    ax.spines['bottom'].set_visible(False)


def top_view_image(paths: list[np.ndarray], kinds: list[str], alt: str, goals: str = 'narrow') -> str:
    """One view from above; all of them have the same axes in the same place."""
    drawing = Figure(figsize=(3.1, 3.12))
    top_view(drawing.add_axes((0.115, 0.075, 0.88, 0.92)), paths, kinds, goals)
    drawing.text(0.012, 0.012, 'cm', fontsize=9.5, color=SOFT)
    return image(data_uri(drawing), alt)


def paths_figure(views: list[View], goals: str = 'narrow') -> Figure:
    """Views from above in a row."""
    drawing = Figure(figsize=(2.9 * len(views), 3.5))
    axes = drawing.subplots(1, len(views), sharey=True)
    for ax, (title, subtitle, paths, kinds) in zip(axes, views, strict=True):
        top_view(ax, paths, kinds, goals)
        ax.text(0, 1.095, title, transform=ax.transAxes, fontsize=12, fontweight='bold')
        ax.text(0, 1.02, subtitle, transform=ax.transAxes, fontsize=10, color=SOFT)
    drawing.text(0.008, 0.02, 'cm', color=SOFT)
    drawing.subplots_adjust(left=0.035, right=0.995, bottom=0.075, top=0.87, wspace=0.06)
    return drawing


def panel(size: tuple[float, float], xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    """A figure of `size` [100 px] with one grid of axes that keeps its margins at any size."""
    (width, height), left, right, bottom, top = size, 0.5, 0.08, 0.52, 0.3
    drawing = Figure(figsize=size)
    ax = drawing.add_axes((left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height))
    ax.set_xlabel(xlabel)
    drawing.text(0.06 / width, 1 - 0.06 / height, ylabel, color=SOFT, va='top')
    ax.grid(True)
    return drawing, ax


def chunk_figure(shown: Shown, joint: int, low: float, high: float, close: bool, size: tuple[float, float]) -> Figure:
    """Chunks, command and measurement of one joint between two times [s]. close: with steps and ticks as dots."""
    drawing, ax = panel(size, xlabel='time [s]', ylabel=f'{JOINT} [°]')
    command, joints, chunks = (np.rad2deg(array[..., joint]) for array in (shown.commands, shown.joints, shown.chunks))
    ax.plot(shown.command_times, command, color=INK, linewidth=4.5, solid_joinstyle='round', zorder=2)
    ax.plot(shown.joint_times, joints, color=MEASURED, linewidth=1.5, linestyle=(0, (4, 2)), zorder=3)
    drawn = [command[(shown.command_times >= low) & (shown.command_times <= high)],
             joints[(shown.joint_times >= low) & (shown.joint_times <= high)]]
    for i, chunk in enumerate(chunks):
        times = shown.chunk_times(i)
        colour = matplotlib.colormaps['viridis'](0.4 + 0.52 * np.clip(times[0] / max(shown.end, 1e-9), 0.0, 1.0))
        ax.plot(times, chunk, color=colour, linewidth=1.7, marker='o' if close else '', markersize=5, zorder=4)
        ax.plot(times[0], chunk[0], 'o', color=colour, markersize=8 if close else 6, zorder=4)
        drawn.append(chunk[(times >= low) & (times <= high)])
    if close:
        ax.plot(shown.command_times, command, '.', color='white', markersize=3, zorder=5)
    drawn = np.concatenate(drawn)
    margin = 0.08 * np.ptp(drawn) + 0.1
    ax.set(xlim=(low, high), ylim=(drawn.min() - margin, drawn.max() + margin))
    return drawing


def lateness_figure(lateness: np.ndarray, marks: dict[str, float], size: tuple[float, float]) -> Figure:
    """Histogram of how late ticks came (T,) [ms], with a line at each of `marks` (label → [ms])."""
    drawing, ax = panel(size, xlabel='lateness of a tick [ms]', ylabel='ticks')
    low, high = min(lateness.min(), 0.0), 1.04 * max(lateness.max(), *marks.values(), 0.1)
    most = ax.hist(lateness, bins=np.linspace(low, high, 90), color='#8fb3cf', log=True)[0].max()
    ax.set(xlim=(low - 0.01 * high, high), ylim=(0.7, 30 * most))  # the labels stand above the bars
    ax.yaxis.set_major_locator(FixedLocator([10**k for k in range(9) if 10**k <= most]))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter('{x:.0f}')
    for i, (label, value) in enumerate(marks.items()):
        top, right = 0.97 - 0.11 * i, value > 0.6 * high
        ax.axvline(value, color=INK, linewidth=1.1, ymax=top)
        ax.annotate(f'{label}  {value:g} ms', (value, top), xycoords=('data', 'axes fraction'), va='top',
                    xytext=(-5 if right else 5, 0), textcoords='offset points', ha='right' if right else 'left',
                    bbox={'facecolor': 'white', 'edgecolor': 'none', 'pad': 1})
    return drawing


def render_clip(shown: Shown) -> bytes:
    """The shown episode as an animated WebP that loops. Raises SceneError where nothing can be rendered."""
    simulation = ReachAround()
    last = shown.joint_times[-1]
    times = np.append(np.arange(max(shown.joint_times[0], 0.0), last, 1 / CLIP_FPS), last)
    width, height = CLIP_SIZE
    frames = []
    for i in np.searchsorted(shown.joint_times, times):
        # A third larger, then scaled down: edges get smooth without multisampling.
        pixels = simulation.render_pose(shown.joints[i], shown.goal, (height * 4 // 3, width * 4 // 3))
        frames.append(Image.fromarray(pixels).resize(CLIP_SIZE, Image.Resampling.LANCZOS))
    simulation.close()
    durations = [1000 // CLIP_FPS] * (len(frames) - 1) + [round(1000 * CLIP_HOLD_S)]
    buffer = io.BytesIO()
    frames[0].save(buffer, 'WEBP', save_all=True, append_images=frames[1:], duration=durations, loop=0, quality=72,
                   method=2)
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


# --- pieces of HTML ---------------------------------------------------------------------------------------------------

def image(uri: str, alt: str, classes: str = '') -> str:
    """An image."""
    return f'<img class="{classes}" alt="{escape(alt)}" src="{uri}">'


def responsive(draw: Callable[[tuple[float, float]], Figure], wide: tuple[float, float], alt: str) -> str:
    """A figure drawn at two sizes [100 px]: narrow screens show one whose text they can read."""
    narrow = f'<source media="(max-width: 640px)" srcset="{data_uri(draw((3.7, 3.0)))}">'
    return f'<picture>{narrow}{image(data_uri(draw(wide)), alt)}</picture>'


def figure(body: str, caption: str) -> str:
    """Something to look at and what to look for."""
    return f'<figure>{body}<figcaption>{caption}</figcaption></figure>\n'


def section(title: str, lead: str, body: str) -> str:
    """A card of the page."""
    return f'<section><h2>{title}</h2><p class="lead">{lead}</p>{body}</section>\n'


def table(header: list[str], rows: list[list[str]], classes: str) -> str:
    """A table; the first cell of a row is its heading."""
    head = ''.join(f'<th scope="col">{cell}</th>' for cell in header)
    body = ''.join(f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
                   for first, *cells in rows)
    return f'<table class="{classes}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def bar(*parts: tuple[str, float]) -> str:
    """A bar of parts (kind, share of the whole)."""
    pieces = ''.join(f'<i class="{kind}" style="width:{100 * share:.1f}%"></i>' for kind, share in parts)
    return f'<span class="bar">{pieces}</span>'


def legend(**names: str) -> str:
    """What the colours mean: kind=name."""
    keys = ''.join(f'<span><i class="{kind}"></i>{name}</span>' for kind, name in names.items())
    return f'<p class="legend">{keys}</p>'


OUTCOMES = {'reached': 'goal reached, pillar not touched', 'touched': 'pillar touched: the run ends there (×)',
            'late': 'goal not reached in time'}


def interval(successes: int, episodes: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a success rate."""
    z, p, n = 1.96, successes / episodes, episodes
    middle, half = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def score(counts: dict, prefix: str = '') -> str:
    """Successes, what went wrong, and how sure that is."""
    successes, n, touched = (counts.get(f'{prefix}{key}') for key in ('successes', 'episodes', 'touched'))
    if successes is None or not n:
        return '<span class="soft">not run</span>'
    parts, facts = [('reached', successes / n)], []
    if touched is not None:
        late = n - successes - touched
        parts += [('touched', touched / n), ('late', late / n)]
        facts = [f'{touched} touched the pillar'] + [f'{late} out of time'] * (late > 0)
    low, high = interval(successes, n)
    facts.append(f'95 % interval {100 * low:.0f}\u2060–\u2060{100 * high:.0f}\u00a0%')
    return f'''<b class="number">{successes}<small> / {n}</small></b>{bar(*parts)}
      <small class="facts">{"".join(f"<span>{fact}</span>" for fact in facts)}</small>'''


def of(counts: dict, key: str = 'successes', prefix: str = '') -> str:
    """k of n."""
    return f'{counts[prefix + key]} of {counts[prefix + "episodes"]}'


# --- the page ---------------------------------------------------------------------------------------------------------

def opening(results: dict, shown: Shown, dataset: Dataset) -> str:
    """Headline, clip and success table."""
    bc, flow = (results['policies'][name] for name in POLICIES)
    left = results.get('studies', {}).get('bc_left')
    control = ''
    rows = [['BC <small>mean squared error</small>', score(bc), score(bc, 'lockstep_')],
            ['Flow <small>flow matching</small>', score(flow), score(flow, 'lockstep_')]]
    if left:
        rows.insert(1, ['BC, one side <small>control: demonstrations round the left only</small>',
                        '<span class="soft">–</span>', score(left)])
        if left['successes'] / left['episodes'] > bc['lockstep_successes'] / bc['lockstep_episodes'] + 0.3:
            control = f'''Trained on one side only, BC succeeds in {of(left)}: it is the two ways that defeat it, not
              the training.'''
    return f'''<header>
<div>
  <p class="soft small">SO-101 in simulation · reach around a pillar</p>
  <h1>Flow gets round the pillar in {of(flow, prefix="lockstep_")} starts, BC in {of(bc, prefix="lockstep_")}</h1>
  <p>Every start and goal was demonstrated twice, once round the left of the pillar and once round the right
  ({results["demonstrations"]} demonstrations). BC predicts their average, and that leads into the pillar; Flow draws
  one of the two. Data, network, budget and stride are the same for both. {control}</p>
</div>
<div class="hero">{hero(shown)}{still(dataset)}</div>
<div>
  {table(["", "over DDS, real time", "lock-step"], rows, "scores")}
  <p class="soft small">Success: the gripper rests at the goal within {task.EPISODE_S:g} s, nothing touched the pillar.
  Over DDS: simulator, planner and controller are processes of their own, at real-time factor 1. Lock-step: the same
  planner, ensembling and safety code without ROS. The starts and goals are none of the demonstrated ones.</p>
</div>
</header>
'''


def hero(shown: Shown) -> str:
    """Clip of the shown run."""
    ends = {'reached': 'reaches the goal', 'touched': 'touches the pillar', 'late': 'has not reached the goal'}
    try:
        clip = image(data_uri(render_clip(shown)), 'clip of the arm moving round the pillar', 'clip')
    except SceneError as error:
        clip = f'<p class="soft">No clip: {escape(str(error))}</p>'
    return figure(clip, f'One Flow run over DDS, at the speed it had: after {shown.end:.1f} s the gripper {ends[shown.outcome]}.')


def still(dataset: Dataset) -> str:
    """A camera image of the dataset."""
    if not dataset.info.images:
        return ''
    name = dataset.info.images[0]
    height, width, _ = dataset.info.features[name].shape
    frame = Image.fromarray(dataset.image(0, name, dataset.episodes[0]['length'] // 2))
    return f'''<div class="still">{image(data_uri(frame), "camera image", "pixels")}
      <span>What the dataset holds of camera <code>{escape(name)}</code>: {width} × {height} pixels at
      {dataset.info.fps:g} Hz.</span></div>'''


def from_above(results: dict, views: list[View], over_dds: list[Rollouts]) -> str:
    """The views from above side by side."""
    bc, flow = (results['policies'][name] for name in POLICIES)
    panels = ''.join(figure(top_view_image(paths, kinds, f'{title}: {subtitle}'), f'<b>{title}</b><br>{subtitle}')
                     for title, subtitle, paths, kinds in views)
    dds = ''.join(figure(top_view_image(runs.paths, runs.outcomes, f'{title} over DDS'),
                         f'<b>{title}</b><br>{runs.outcomes.count("reached")} of {len(runs.paths)} reach the goal')
                  for title, runs in zip(POLICIES.values(), over_dds, strict=True))
    lead = f'''Look in front of the pillar, where the ways part: {of(bc, "touched", "lockstep_")} BC runs end at the
      pillar, between the two ways; of Flow’s {flow["lockstep_episodes"]}, {flow["lockstep_touched"]} touch it and the
      others go one way or the other.'''
    key = legend(left='demonstration round the left', right='demonstration round the right', **OUTCOMES)
    return section('From above', lead, f'''{key}<div class="grid four">{panels}</div>
      <p class="soft small">Paths of the gripper’s tip, in lock-step; the arm’s base is below the picture, its left is
      on the left. The gripper is wider than a line: it touches before the tip is there.</p>
      <details><summary>The same over DDS, in real time</summary><div class="grid four">{dds}</div></details>''')


def one_start(runs: Rollouts, study: dict) -> str:
    """Both ways from one start."""
    left, right, n = study['left'], study['right'], study['episodes']
    kinds = ['touched' if outcome == 'touched' else side(path)
             for path, outcome in zip(runs.paths, runs.outcomes, strict=True)]
    lead = f'''One start, one goal, {n} draws of noise: Flow goes left {left} times and right {right} times. Look for
      both colours: a policy that had settled on one side would show one.'''
    return section('Both ways from one start', lead, f'''<div class="grid beside">
      <figure>{top_view_image(runs.paths, kinds, f"{n} runs from one start: {left} left, {right} right")}</figure>
      <div>
        <div class="ends"><b>{left}<small> left</small></b><b>{right}<small> right</small></b></div>
        {bar(("left", left / n), ("right", right / n))}
        <p>{of(study)} reach the goal without touching the pillar. The noise picks the side; each later chunk is started
        from the one before it, so that a run keeps to its side. A path’s side is where it passes the pillar;
        if it touches, where it is widest.</p>
        {legend(left="went left", right="went right", touched="touched the pillar")}
      </div></div>''')


def ensembling(shown: Shown, dataset: Dataset) -> str:
    """Chunks and the ensembled command."""
    joint = dataset.info.action.names.index(JOINT)
    when, difference = shown.seam(joint)
    step = f'{np.rad2deg(np.abs(np.diff(shown.commands[:, joint])).max()):.2f}°'
    if contract := dataset.info.contract:
        velocity = next(entry['velocity'] for entry in contract['joints'] if entry['name'] == JOINT)
        step += f', limit {np.rad2deg(velocity / contract["control_rate"]):.2f}°'
    spans = {False: (min(0.0, float(shown.chunk_starts[0])), shown.end), True: (when - 0.25, when + 0.55)}

    def draw(close: bool, width: float, alt: str) -> str:
        return responsive(lambda size: chunk_figure(shown, joint, *spans[close], close, size), (width, 3.5), alt)

    whole = figure(draw(False, 7.2, 'chunks, command and measurement over time'), f'''
      <b>The whole run:</b> {(shown.chunk_starts <= shown.end).sum()} chunks of {shown.chunks.shape[1]} steps,
      {1000 * shown.period:.0f} ms apart; a dot marks where one begins. Where chunks overlap, the command is their mean,
      weighted by age.''')
    close = figure(draw(True, 3.6, 'the same, enlarged'), f'''
      <b>The widest seam,</b> at {when:.1f} s: two successive chunks differ by up to {np.rad2deg(difference):.1f}°, and
      the command crosses from one to the other. White dots are single 50 Hz commands.''')
    lead = f'''Look where coloured lines part: chunks do not quite agree, yet the command never jumps (largest step from
      tick to tick {step}). This is the joint that swings the arm round the pillar, in the run of the clip.'''
    key = legend(chunk='chunks, the later the lighter', command='command, 50 Hz', measured='measured')
    return section('Chunks and the ensembled command', lead, f'{key}<div class="grid chunks">{whole}{close}</div>')


def averaging(studies: dict, runs: dict[str, Rollouts]) -> str:
    """Plain averaging of chunks from fresh noise against warm start."""
    fresh, warm = studies['fresh_average'], studies['warm_start']
    jerks = [study.get('jerk_rms') for study in (fresh, warm)]
    lead = f'''Averaging chunks that chose different sides is BC’s mistake again. Both runs plan twice as often and
      average all live chunks with equal weight; only the noise differs. Look in front of the pillar:
      {of(fresh, "touched")} touch it with fresh noise, {of(warm, "touched")} with warm start.'''
    if None not in jerks and jerks[0] <= jerks[1] and fresh['successes'] < warm['successes']:
        lead += ' By jerk alone fresh noise would win: smoothness says nothing without success.'
    panels = ''
    for name, title, jerk in (('fresh_average', 'Fresh noise for every chunk', jerks[0]),
                              ('warm_start', 'Warm start from the chunk before', jerks[1])):
        smoothness = '' if None in jerks else f'''<div class="metric">jerk of the commands, RMS<br>
          <b class="number">{jerk:g}<small> rad/s³</small></b>{bar(("plain", jerk / max(*jerks, 1e-9)))}</div>'''
        panels += figure(top_view_image(runs[name].paths, runs[name].outcomes, f'{title}: {of(studies[name])}'),
                         f'<b>{title}</b><div class="metric">success<br>{score(studies[name])}</div>{smoothness}')
    return section('What averaging does to Flow', lead, f'{legend(**OUTCOMES)}<div class="grid two">{panels}</div>')


def timing(controller: dict, lateness: np.ndarray) -> str:
    """The controller's loop. lateness: (T,) [ms]."""
    p50, p99, latest = (controller[f'lateness_{key}_ms'] for key in ('p50', 'p99', 'max'))
    rate = controller['rate_hz']
    tiles = ''.join(f'<div><b class="number">{value}</b><span>{label}</span></div>' for value, label in (
        (f'{p50:g} ms', 'median lateness'), (f'{p99:g} ms', '99 % are earlier'), (f'{latest:g} ms', 'the latest'),
        (controller['missed_ticks'], f'missed of {controller["ticks"]} ticks'),
        (controller['limit_violations'], 'limit violations')))
    marks = {'p50': p50, 'p99': p99, 'max': latest}
    scheduler = f'; scheduler {escape(str(controller["scheduler"]))}' if controller.get('scheduler') else ''
    histogram = figure(
        responsive(lambda size: lateness_figure(lateness, marks, size), (10.6, 3.0), 'histogram of tick lateness'),
        f'''Lateness of {len(lateness)} ticks over DDS at real-time factor 1, logarithmic counts: p50 {p50:g} ms,
        p99 {p99:g} ms, max {latest:g} ms{scheduler}. Limit violations: commands outside position, velocity or
        acceleration limits, recomputed from the commands of all runs.''')
    lead = f'Look at the right end: how late a tick comes at worst, against {1000 / rate:.0f} ms from tick to tick.'
    return section(f'The {rate:g} Hz loop', lead, f'<div class="tiles">{tiles}</div>{histogram}')


def making(results: dict) -> str:
    """Stages, machine, training, dataset."""
    body = ''
    if stages := results.get('stages'):
        longest = max(*(seconds for _, seconds in stages), 1e-9)
        body += table(['stage', 'time', ''], [[escape(name), f'{seconds:.1f}\u00a0s', bar(('plain', seconds / longest))]
                                              for name, seconds in stages], 'stages')
    facts = [f'{what} {results[key]:.1f} s' for key, what in (('wall_s', 'all together'), ('setup_s', 'set-up'))
             if key in results]
    if machine := results.get('machine'):
        facts.append(escape(machine))
    body += f'<p class="soft small">{" · ".join(facts)}</p>'
    if training := results.get('training'):
        names = {**POLICIES, 'bc_left': 'BC, one side'}
        rows = [[names.get(name, escape(name)), str(fact.get('episodes', '–')), str(fact['steps']),
                 f'{fact["seconds"]:.0f}\u00a0s', f'{fact["loss"]:.4f}'] for name, fact in training.items()]
        body += table(['training', 'demonstrations', 'steps', 'time', 'loss'], rows, 'plain')
        if 'bc' in training:
            body += '<p class="soft small">The losses of BC and Flow measure different things and do not compare.</p>'
    if dataset := results.get('dataset'):
        body += f'<p><b>Dataset.</b> {escape(dataset)}</p>'
    return section('Where the time went', 'Each stage reuses what is already there, so a second run is shorter.', body)


def going_on(name: str) -> str:
    """How to reproduce, and what next. name: the folder's."""
    steps = (
        ('make demo', 'again with the demonstrations and policies that are there'),
        ('make demo FRESH=1', 'everything from the start'),
        ('. ./env.sh', 'the environment for what follows'),
        (f'il evaluate {name}/checkpoints/flow --task reach_around --episodes 200', 'more starts, in lock-step'),
        (f'il train {name}/dataset --out my_policy --preset config/policies/flow.yaml --steps 5000',
         'a policy of your own'),
        ('il convert BAGS --contract config/robots/ROBOT.yaml --out DATASET', 'recordings of your own arm: see README.md'))
    return commands(name, steps)


def commands(name: str, steps: Sequence[tuple[str, str]]) -> str:
    """Commands and what they do. name: the folder's."""
    listed = ''.join(f'<div><code>{command}</code><span>{what}</span></div>' for command, what in steps)
    return section('Reproduce, and go on', f'The numbers of this page are in <code>{name}/results.json</code>.',
                   f'<div class="steps">{listed}</div>')


def write(out: Path) -> Path:
    """Write report.html and paths.png from the files below `out`, and return the path of the page.

    Raises OSError, ValueError (DataError among them) or KeyError (the name) for what is missing or broken.
    """
    results = json.loads((out / 'results.json').read_text())
    studies = results.get('studies', {})
    dataset = Dataset(out / 'dataset')
    names = ['bc', 'flow', 'bc_dds', 'flow_dds', *(name for name in ('bc_left', 'flow_one_start') if name in studies)]
    if 'fresh_average' in studies and 'warm_start' in studies:
        names += ['fresh_average', 'warm_start']
    runs = {name: load_rollouts(out, name) for name in names}
    over_dds = [runs[f'{name}_dds'] for name in POLICIES]
    shown = load_shown(runs['flow_dds'])
    lateness = 1e3 * np.concatenate([rollouts.arrays['lateness'] for rollouts in over_dds])

    paths = demonstrated(dataset)
    sides = [side(path) for path in paths]
    views = [('Demonstrations', f'{sides.count("left")} left, {sides.count("right")} right', paths, sides)]
    for name, title in (('bc', 'BC'), ('bc_left', 'BC, one side only'), ('flow', 'Flow')):
        if name in runs:
            outcomes = runs[name].outcomes
            reached = f'{outcomes.count("reached")} of {len(outcomes)} reach the goal'
            views.append((title, reached, runs[name].paths, outcomes))

    with matplotlib.rc_context(RC):
        paths_figure(views).savefig(out / 'paths.png', dpi=150)
        body = opening(results, shown, dataset) + from_above(results, views, over_dds)
        if 'flow_one_start' in runs:
            body += one_start(runs['flow_one_start'], studies['flow_one_start'])
        body += ensembling(shown, dataset)
        if 'warm_start' in runs:
            body += averaging(studies, runs)
        body += timing(results['controller'], lateness) + making(results) + going_on(escape(out.resolve().name))
    return write_page(out, 'Reach around: BC and Flow', body)


def write_page(out: Path, title: str, body: str) -> Path:
    """Write report.html below `out`, and return its path."""
    colours = {kind: colour for kind, (colour, _) in STYLES.items()}
    colours.update(ink=INK, soft=SOFT, line=LINE, measured=MEASURED)
    page = f'''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; {" ".join(f"--{name}: {colour};" for name, colour in colours.items())} }}
{STYLE}</style></head><body><main>
{body}</main></body></html>
'''
    path = out / 'report.html'
    path.write_text(page, encoding='utf-8')
    return path


STYLE = '''\
* { box-sizing: border-box; }
body { margin: 0; background: #f5f7f9; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 20px 48px; }
header { display: grid; grid-template: auto 1fr / minmax(0, 1.32fr) minmax(0, 1fr); gap: 0 40px; align-items: start;
  padding: 12px 0 28px; }
h1 { font-size: clamp(1.65rem, 3.2vw, 2.3rem); line-height: 1.18; letter-spacing: -0.018em; margin: 0 0 14px;
  text-wrap: balance; }
h2 { font-size: 1.28rem; letter-spacing: -0.01em; margin: 0 0 6px; }
p { margin: 0 0 12px; }
.lead { max-width: 76ch; margin-bottom: 16px; }
.soft, .facts, figcaption, .legend, thead th, tbody th small, .number small { color: var(--soft); font-weight: 400; }
.small, small, figcaption, .legend, thead th { font-size: 0.86rem; line-height: 1.45; }
figcaption b { color: var(--ink); }
section { background: #fff; border: 1px solid var(--line); border-radius: 14px; padding: 24px 26px; margin-top: 20px; }
figure { margin: 0; min-width: 0; }
figcaption { margin-top: 8px; }
img { display: block; width: 100%; height: auto; }
code { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #eef2f5; padding: 1px 5px;
  border-radius: 5px; overflow-wrap: anywhere; }
.hero { grid-column: 2; grid-row: 1 / 3; }
.clip { border-radius: 14px; border: 1px solid var(--line); }
.still { display: flex; gap: 14px; align-items: center; margin: 16px 0; color: var(--soft); font-size: 0.86rem;
  line-height: 1.45; }
.pixels { flex: none; width: 120px; }
.pixels, .seen { border-radius: 8px; image-rendering: pixelated; }
.grid { display: grid; gap: 22px; }
.grid + .small { margin-top: 16px; }
.four { grid-template-columns: repeat(4, minmax(0, 1fr)); }
.six { grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 12px; }
.two { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 40px; }
.two figure { display: grid; grid-template-columns: minmax(0, 1.45fr) minmax(0, 1fr); gap: 20px; align-items: center; }
.beside { grid-template-columns: minmax(0, 400px) minmax(0, 520px); gap: 64px; align-items: center; }
.chunks { grid-template-columns: minmax(0, 2fr) minmax(0, 1fr); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; margin-bottom: 14px; }
.legend span { display: inline-flex; align-items: center; gap: 7px; }
.legend i { width: 22px; height: 4px; border-radius: 2px; flex: none; }
i.left { background: var(--left); }
i.right { background: var(--right); }
i.reached { background: var(--reached); }
i.touched { background: var(--touched); }
i.late { background: repeating-linear-gradient(90deg, var(--late) 0 5px, #fff 5px 7px); }
i.chunk { background: linear-gradient(90deg, #24878e, #a5db36); }
i.command { background: var(--ink); }
i.measured { background: repeating-linear-gradient(90deg, var(--measured) 0 6px, #fff 6px 9px); }
i.plain { background: #9db0c1; }
.bar { display: flex; height: 9px; border-radius: 5px; overflow: hidden; background: #e9eef2; margin: 3px 0 5px; }
.bar i { height: 100%; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 9px 18px 9px 0; border-top: 1px solid var(--line); }
th:last-child, td:last-child { padding-right: 0; }
thead th { border: 0; padding-bottom: 4px; }
tbody th { font-weight: 650; }
tbody th small, .facts span { display: block; }
.scores { margin: 6px 0 12px; }
.scores th:first-child { width: 27%; }
.scores td { width: 36%; }
.stages, .plain { margin-bottom: 12px; font-size: 0.94rem; }
.stages tbody th { font-weight: 400; }
.stages td:last-child { width: 38%; vertical-align: middle; }
.number { font-size: 1.35rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.metric { margin-top: 12px; }
.ends { display: flex; justify-content: space-between; font-size: 1.9rem; line-height: 1.2; }
.ends small { color: var(--soft); font-weight: 400; }
.ends + .bar { height: 14px; border-radius: 7px; margin: 4px 0 16px; }
.tiles { display: grid; grid-template-columns: repeat(5, minmax(0, 1fr)); gap: 12px; margin-bottom: 18px; }
.tiles div { background: #f5f7f9; border-radius: 10px; padding: 12px 14px; }
.tiles span { display: block; color: var(--soft); font-size: 0.86rem; }
details { margin-top: 12px; }
summary { cursor: pointer; color: var(--soft); margin-bottom: 12px; }
.steps div { display: grid; grid-template-columns: minmax(0, 1.5fr) minmax(0, 1fr); gap: 4px 24px; padding: 8px 0;
  border-top: 1px solid var(--line); }
.steps code { background: none; padding: 0; }
.steps span { color: var(--soft); }
@media (max-width: 900px) {
  header { grid-template: auto / minmax(0, 1fr); }
  .hero { grid-column: 1; grid-row: auto; }
  .chunks, .two { grid-template-columns: minmax(0, 1fr); }
  .four { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .six { grid-template-columns: repeat(3, minmax(0, 1fr)); }
}
@media (max-width: 640px) {
  main { padding: 16px 12px 32px; }
  section { padding: 18px 16px; border-radius: 12px; }
  .grid { gap: 18px 12px; }
  .beside, .steps div { grid-template-columns: minmax(0, 1fr); }
  .two, .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .two figure { display: block; }
  th, td { padding-right: 12px; }
  .stages td:last-child { width: 26%; }
}
@media print { section { break-inside: avoid; } }
'''


def main(write: Callable[[Path], Path] = write, module: str = 'report', folder: str = 'demo_out', make: str = 'make demo') -> int:
    """Entry point; 0 written, 1 something is missing, 2 wrong arguments."""
    if len(sys.argv) != 2 or sys.argv[1].startswith('-'):
        print(f'usage: python -m il_runtime.demo.{module} {folder}', file=sys.stderr)
        return 2
    try:
        print(write(Path(sys.argv[1])))
    except KeyError as error:
        print(f'report: {error} is missing in {sys.argv[1]}; run "{make}"', file=sys.stderr)
    except (OSError, ValueError) as error:
        print(f'report: {error}', file=sys.stderr)
    else:
        return 0
    return 1


if __name__ == '__main__':
    sys.exit(main())
