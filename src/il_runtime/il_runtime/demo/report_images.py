"""demo_out/images/report.html: what the demo with images measured, on one page that needs nothing else; and paths.png.

    python -m il_runtime.demo.report_images demo_out/images      write both again from the files that are there
"""
from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from il_policies.data.store import Dataset
from il_policies.sim import reach_around as task
from il_runtime.demo.report import (
    OUTCOMES,
    RC,
    STYLES,
    Rollouts,
    Shown,
    View,
    commands,
    data_uri,
    demonstrated,
    ensembling,
    figure,
    hero,
    image,
    interval,
    legend,
    load_rollouts,
    load_shown,
    main,
    making,
    of,
    panel,
    paths_figure,
    score,
    section,
    side,
    table,
    timing,
    top_view_image,
    write_page,
)

PICTURES = 6


def opening(results: dict, shown: Shown) -> str:
    """Headline, clip and success table."""
    flow, shuffled, chance = results['flow'], results['shuffled'], results['chance']
    rows = [['Its own images', score(results['dds']), score(flow)],
            ['Images of other episodes <small>control: the same policy, the same starts</small>',
             '<span class="soft">–</span>', score(shuffled)]]
    low, high = (100 * bound for bound in interval(shuffled['successes'], shuffled['episodes']))
    judged = 'that is chance' if low <= 100 * chance <= high or 100 * chance > high else 'that is more than chance'
    return f'''<header>
<div>
  <p class="soft small">SO-101 in simulation · reach around a pillar · from images</p>
  <h1>The goal is in the picture only: Flow reaches it in {of(flow)} starts</h1>
  <p>The policy sees joint positions and a camera, and was never told where the goal is. It learnt that from
  {results["demonstrations"]} demonstrations, every start and goal shown round both sides of the pillar, with goals spread
  over an arc of 20 cm. Shown the images of other episodes, the same policy reaches the goal in {of(shuffled)}:
  {judged}, for {100 * chance:.0f}&nbsp;% of goals lie within tolerance of another episode’s.</p>
</div>
<div class="hero">{hero(shown)}</div>
<div>
  {table(["", "over DDS, real time", "lock-step"], rows, "scores")}
  <p class="soft small">Success: the gripper rests within {1000 * task.REACH_TOLERANCE:.0f} mm of the goal within
  {task.EPISODE_S:g} s, nothing touched the pillar. Over DDS: simulator with camera, planner and controller are processes
  of their own, at real-time factor 1. Lock-step: the same planner, ensembling and safety code without ROS, and images that
  went through JPEG as well. The starts and goals are none of the demonstrated ones.</p>
</div>
</header>
'''


def seen(dataset: Dataset) -> str:
    """First images of demonstrations whose goals are spread over the arc."""
    name = dataset.info.images[0]
    height, width, _ = dataset.info.features[name].shape
    # Told by the last pose: the gripper rests at the goal.
    ends = task.tips(np.array([dataset.lowdim(i)['joint_positions'][-1] for i in range(len(dataset))]))[:, 1]
    chosen = np.argsort(-ends)[np.linspace(0, len(ends) - 1, min(PICTURES, len(ends))).round().astype(int)]
    pictures = ''.join(figure(image(data_uri(Image.fromarray(dataset.image(int(i), name, 0))), 'camera image', 'seen'),
                              f'goal {100 * abs(ends[i]):.0f} cm {"left" if ends[i] > 0 else "right"}') for i in chosen)
    lead = f'''The first image of {len(chosen)} demonstrations as they lie in the dataset, {width} × {height} pixels at
      {dataset.info.fps:g} Hz. Look for the green disc: nothing else tells the policy where to go.'''
    return section('What it sees', lead, f'<div class="grid six">{pictures}</div>')


def along(points: np.ndarray) -> np.ndarray:
    """Where points (N, 2 or 3) [m] are on the arc of goals [cm], from its middle to the right."""
    x, y = (points[:, :2] - task.PAN_AXIS).T
    return -100 * np.mean(task.GOAL_RADIUS) * np.arctan2(y, x)


def ends_figure(shown: np.ndarray, ends: np.ndarray, others: np.ndarray | None, size: tuple[float, float]) -> Figure:
    """Ends of runs against the goals that they were shown and, hollow, against their own; all (N,) [cm] along the arc."""
    drawing, ax = panel(size, xlabel='goal [cm right of the middle]', ylabel='end of the run [cm right of the middle]')
    line, tolerance = np.array([-11.5, 11.5]), 100 * task.REACH_TOLERANCE
    ax.fill_between(line, line - tolerance, line + tolerance, color='#d9efe8', linewidth=0)
    if others is not None:
        ax.plot(others, ends, 'o', markersize=5, markerfacecolor='none', markeredgecolor=STYLES['right'][0], alpha=0.8)
    ax.plot(shown, ends, 'o', markersize=5, color=STYLES['reached'][0], markeredgecolor='none', alpha=0.8)
    ax.set(xlim=line, ylim=line, xticks=[-10, -5, 0, 5, 10], yticks=[-10, -5, 0, 5, 10], aspect='equal', anchor='W')
    return drawing


def where_to(results: dict, own: Rollouts, shuffled: Rollouts) -> str:
    """Ends of runs against goals."""
    panels = ''
    for runs, title, text in (
            (own, 'Its own images', f'{of(results["flow"])} come to rest at their goal in time.'),
            (shuffled, 'Images of other episodes', f'''{of(results["shuffled"], "at_shown")} end within tolerance of the goal
             in the images. Hollow: the same ends against the goals of their own episodes, which they were not shown;
             {of(results["shuffled"])} happen to reach them.''')):
        ends, goals = along(np.array([path[-1] for path in runs.paths])), along(runs.arrays['goals'])
        shown, others = (goals, None) if runs is own else (np.roll(goals, -1), goals)
        drawing = ends_figure(shown, ends, others, (3.4, 3.7))
        panels += figure(image(data_uri(drawing), f'{title}: ends of runs against goals'), f'<b>{title}</b><br>{text}')
    lead = '''Each dot is a run: across, where on the arc the images show the goal; upwards, where the gripper ended. In the band
      it is within tolerance.'''
    return section('It goes where the images show the goal', lead, f'<div class="grid two">{panels}</div>')


def from_above(views: list[View], over_dds: Rollouts) -> str:
    """The views from above side by side."""
    panels = ''.join(figure(top_view_image(paths, kinds, f'{title}: {subtitle}', 'wide'), f'<b>{title}</b><br>{subtitle}')
                     for title, subtitle, paths, kinds in views)
    reached = f'{over_dds.outcomes.count("reached")} of {len(over_dds.paths)} reach the goal'
    panels += figure(top_view_image(over_dds.paths, over_dds.outcomes, f'over DDS: {reached}', 'wide'),
                     f'<b>Own images, over DDS</b><br>{reached}')
    lead = '''Look at the arc: with images of other episodes the paths are as good, only the goals are wrong. And look at the
      pillar: both ways are gone, as demonstrated.'''
    key = legend(left='demonstration round the left', right='demonstration round the right', **OUTCOMES)
    return section('From above', lead, f'''{key}<div class="grid four">{panels}</div>
      <p class="soft small">Paths of the gripper’s tip; the arm’s base is below the picture, its left is on the left.</p>''')


def going_on(name: str) -> str:
    """How to reproduce, and what next. name: the folder's."""
    return commands(name, (
        ('make demo IMAGES=1', 'again with the demonstrations and the policy that are there'),
        ('make demo IMAGES=1 FRESH=1', 'everything from the start'),
        ('. ./env.sh', 'the environment for what follows'),
        (f'il evaluate {name}/checkpoints/flow --task reach_around_wide --episodes 100', 'more starts, in lock-step'),
        (f'il evaluate {name}/checkpoints/flow --task reach_around_wide --shuffled', 'with images of other episodes'),
        (f'il train {name}/dataset --out my_policy --preset config/policies/flow_images.yaml --steps 8000',
         'a policy of your own')))


def write(out: Path) -> Path:
    """Write report.html and paths.png from the files below `out`, and return the path of the page.

    Raises OSError, ValueError (DataError among them) or KeyError (the name) for what is missing or broken.
    """
    results = json.loads((out / 'results.json').read_text())
    dataset = Dataset(out / 'dataset')
    runs = {name: load_rollouts(out, name) for name in ('flow', 'shuffled', 'flow_dds')}
    shown, lateness = load_shown(runs['flow_dds']), 1e3 * runs['flow_dds'].arrays['lateness']
    paths = demonstrated(dataset)
    sides = [side(path) for path in paths]
    views = [('Demonstrations', f'{sides.count("left")} left, {sides.count("right")} right', paths, sides)]
    for name, title in (('flow', 'Own images'), ('shuffled', 'Images of other episodes')):
        outcomes = runs[name].outcomes
        views.append((title, f'{outcomes.count("reached")} of {len(outcomes)} reach the goal', runs[name].paths, outcomes))
    with matplotlib.rc_context(RC):
        paths_figure(views, 'wide').savefig(out / 'paths.png', dpi=150)
        body = (opening(results, shown) + seen(dataset) + where_to(results, runs['flow'], runs['shuffled'])
                + from_above(views, runs['flow_dds'])
                + ensembling(shown, dataset) + timing(results['controller'], lateness) + making(results)
                + going_on(escape('/'.join(out.resolve().parts[-2:]))))
    return write_page(out, 'Reach around, from images', body)


if __name__ == '__main__':
    sys.exit(main(write, 'report_images', 'demo_out/images', 'make demo IMAGES=1'))
