"""An inspection as one HTML page that needs nothing else: figures are inline SVG, in the colours of the reader's theme."""
from __future__ import annotations

import base64
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import cv2
import numpy as np
from matplotlib.ticker import MaxNLocator

from il_policies.data import quality
from il_policies.data.inspect import STREAM_COLUMNS, Axis, Episode, Inspection, interval, long_duration, percent, stream_cells
from il_policies.data.quality import FAIL, PASS, VERDICTS, WARN, duration

PLOT = 300, 116
"""Size of a joint's plot [px]."""
MARGIN = 30, 4, 4, 15
"""Of its axes, left, right, top and bottom [px]."""
FINE = 4
"""Steps in a pixel: coordinates are written as whole numbers."""
FEW = 3
"""From so many episodes on they are compared."""


@dataclass(frozen=True)
class Figure:
    """A figure by which episodes are compared."""

    key: str
    """In `Episode.worst`."""
    title: str
    """What it is."""
    text: Callable[[float], str]
    """A value in words."""
    warn: tuple[float, float] | None = None
    """It is a WARN outside these."""
    fail: float = math.inf
    """It is a FAIL above."""

    allowed: Callable[[dict], bool] | None = None
    """Where what is allowed depends on the streams: whether a report keeps to it."""

    def level(self, episode: Episode) -> str:
        """PASS, WARN or FAIL for this figure; '' if nothing depends on it.

        Never worse than the episode's verdict, which knows more.
        """
        value = episode.worst[self.key]
        low, high = self.warn or (-math.inf, math.inf)
        if self.allowed is not None:
            level = PASS if self.allowed(episode.report) else WARN if math.isinf(self.fail) else FAIL
        elif self.warn is None and math.isinf(self.fail):
            return ''
        else:
            level = FAIL if value > self.fail else PASS if low <= value <= high else WARN
        return min(level, episode.verdict, key=VERDICTS.index)

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Where a verdict begins."""
        return [(mark, verdict) for mark, verdict in (*((mark, WARN) for mark in self.warn or ()), (self.fail, FAIL))
                if math.isfinite(mark)]


def figures(fps: float | None) -> list[Figure]:
    """What episodes are compared by, with the thresholds of `quality`."""
    def within(key: str, allowed: str) -> Callable[[dict], bool]:
        return lambda report: all(stream[key] <= stream[allowed] for stream in report['streams'].values())

    return [Figure('length', 'length', interval),
            Figure('filled', 'rows with something repeated', percent, _above(quality.FILLED_WARN), quality.FILLED_FAIL),
            Figure('lost', 'messages lost, worst stream', percent, allowed=within('lost_share', 'lost_allowed')),
            Figure('gap', 'longest gap of a stream', interval, None, quality.GAP_FAIL, within('dt_max_s', 'dt_allowed_s')),
            Figure('frozen', 'image frozen in motion', interval, None, quality.FROZEN_FAIL),
            Figure('latency', 'latency, 95 %, slowest stream', interval),
            Figure('clock', 'drift of a clock', interval, _above(quality.DRIFT_WARN / fps) if fps else None),
            Figure('skew', 'cameras apart, 95 %', interval,
                   allowed=lambda report: report['episode']['skew_p95_s'] <= report['episode']['skew_allowed_s']),
            Figure('lag', 'motion after command', interval, quality.LAG_WARN),
            Figure('head', 'still at the beginning', interval, _above(quality.HEAD_WARN)),
            Figure('tail', 'still at the end', interval, _above(quality.TAIL_WARN)),
            Figure('pause', 'longest pause in between', interval, _above(quality.PAUSE_WARN))]


def _above(limit: float) -> tuple[float, float]:
    return -math.inf, limit


def page(inspection: Inspection) -> str:
    """The page, as HTML."""
    episodes = inspection.episodes
    fastest = max((_speed(episode).max(initial=0.0) for episode in episodes), default=0.0) or 1.0
    many = len(episodes) >= FEW
    listed = ''.join(_episode(i, episode, fastest, opened=not many) for i, episode in enumerate(episodes))
    choices = ''.join(
        f'<label><input type="radio" name="shown" id="only-{verdict or "all"}"{"" if verdict else " checked"}>{label}</label>'
        for verdict, label in (('', 'all'), (WARN, f'{inspection.count(WARN)} WARN'), (FAIL, f'{inspection.count(FAIL)} FAIL')))
    body = _header(inspection)
    if many:
        body += _section('Across the episodes', 'A dot is an episode: click it to see all of it. Beyond a dashed line it is a '
                         'WARN, beyond a solid one a FAIL.', _comparison(inspection))
    body += _section('Episodes' if len(episodes) > 1 else 'Episode', '', (f'<p class="choices">{choices}</p>' if many else '')
                     + f'<div class="episodes">{listed}</div>')
    return f'''<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(inspection.name)}: {_counts(inspection)}</title>
<style>{STYLE}</style></head><body><main>
{body}{_section('What is judged', '', _rules(inspection.fps))}</main></body></html>
'''


def _counts(inspection: Inspection) -> str:
    return ', '.join(f'{inspection.count(verdict)} {verdict}' for verdict in VERDICTS)


def _section(title: str, lead: str, body: str) -> str:
    lead = f'<p class="lead">{lead}</p>' if lead else ''
    return f'<section><h2>{title}</h2>{lead}{body}</section>\n'


def _header(inspection: Inspection) -> str:
    """Name, verdicts, amount."""
    episodes = inspection.episodes
    facts = [f'robot {escape(inspection.robot)}'] if inspection.robot else []
    facts += [f'contract <code>{escape(inspection.contract_hash)}</code>'] if inspection.contract_hash else []
    labels = [episode.report.get('success') for episode in episodes]
    facts += [f'{labels.count(True)} succeeded, {labels.count(False)} failed, {labels.count(None)} not labelled']
    tasks = sorted({episode.task for episode in episodes if episode.task})
    facts += [f'{len(tasks)} tasks' if len(tasks) > 2 else ' · '.join(f'“{escape(task)}”' for task in tasks)] if tasks else []
    tiles = ''.join(f'<div class="tile {verdict if inspection.count(verdict) else ""}"><b>{inspection.count(verdict)}</b>'
                    f'<span>{verdict}</span></div>' for verdict in VERDICTS)
    amount = ((len(episodes), 'episode' if len(episodes) == 1 else 'episodes'),
              (long_duration(sum(episode.report['duration_s'] for episode in episodes)), 'of demonstrations'),
              (f'{sum(episode.report["rows"] for episode in episodes):,}'.replace(',', '\u202f'),
               f'rows at {inspection.fps:g} Hz' if inspection.fps else 'rows'))
    tiles += ''.join(f'<div class="tile"><b>{value}</b><span>{label}</span></div>' for value, label in amount)
    shares = ''.join(f'<i class="{verdict}" style="flex:{inspection.count(verdict)}"></i>' for verdict in VERDICTS
                     if inspection.count(verdict))
    return f'''<header><h1>{escape(inspection.name)}</h1><p class="soft">{" · ".join(facts)}</p>
<div class="tiles">{tiles}</div><div class="share">{shares}</div></header>
'''


def _rules(fps: float | None) -> str:
    """What the verdicts depend on."""
    row = f'half a row ({duration(quality.DRIFT_WARN / fps)})' if fps else 'half a row'
    rules = (
        (FAIL, f'a stream is silent for more than {duration(quality.GAP_FAIL)} and its max age; more than '
               f'{percent(quality.FILLED_FAIL)} of the rows repeat something; an image stands still for more than '
               f'{duration(quality.FROZEN_FAIL)} while the arm moves (in simulation: WARN); stamps are more than '
               f'{quality.CLOCK_FAIL:g} s off, or ahead of their arrival by more than a row; the action never changes; a '
               'value is not finite; the converter refuses it.'),
        (WARN, f'more than {percent(quality.LOST_WARN)} of a stream’s messages are lost ({percent(quality.LOST_FAST_WARN)} if it '
               f'is twice as fast as the rows), {percent(quality.DISORDER_WARN)} of its stamps are doubled or go back, '
               f'{percent(quality.COPIES_WARN)} of its images are copies, {percent(quality.FILLED_WARN)} of the rows repeat '
               'something; a stream comes in bursts, slower than declared, later than its max age allows, or a second after the '
               f'others; a clock moves by more than {row} during the episode; images of a row are further apart than half a row '
               f'and {quality.SKEW_FRAMES_WARN:g} frames; the arm moves before its commands '
               f'or more than {duration(quality.LAG_WARN[1])} after them, leaves its limits, or stands still for '
               f'{quality.HEAD_WARN:g} s at the beginning, {quality.TAIL_WARN:g} s at the end or {quality.PAUSE_WARN:g} s in '
               'between; the recording was interrupted or salvaged.'))
    return ''.join(f'<p><span class="chip {verdict}">{verdict}</span> when {text}</p>' for verdict, text in rules)


# --- comparison -------------------------------------------------------------------------------------------------------

def _comparison(inspection: Inspection) -> str:
    """A strip of dots for each figure that differs from nothing."""
    rows, nothing = '', []
    for figure in figures(inspection.fps):
        values = [(i, episode, episode.worst[figure.key]) for i, episode in enumerate(inspection.episodes)
                  if episode.worst[figure.key] is not None]
        if not values:
            continue
        if not any(value for *_, value in values):
            nothing.append(figure.title)
            continue
        numbers = np.array([value for *_, value in values])
        rows += (f'<div class="strip"><span>{figure.title}</span>{_strip(figure, values, numbers)}'
                 f'<span>{figure.text(float(np.median(numbers)))}</span><span>{figure.text(numbers.min())}</span>'
                 f'<span>{figure.text(numbers.max())}</span></div>')
    head = '<div class="strip head"><span></span><span></span><span>median</span><span>least</span><span>most</span></div>'
    zero = f'<p class="soft small">Zero in every episode: {", ".join(nothing)}.</p>' if nothing else ''
    return f'<div class="strips">{head}{rows}</div>{zero}'


def _strip(figure: Figure, values: Sequence[tuple[int, Episode, float]], numbers: np.ndarray) -> str:
    """Dots on a line; a threshold far beyond them is not drawn."""
    width, height = 640, 30
    low, high = min(0.0, numbers.min()), max(numbers.max(), 0.0)
    reach = 1.6 * max(high, -low)
    for mark, _ in figure.marks:
        if abs(mark) <= reach:
            low, high = min(low, mark), max(high, mark)
    scale = (width - 16) / ((high - low) or 1.0)

    def x(value: float) -> float:
        return round(8 + (value - low) * scale, 1)

    lines = ''.join(f'<path class="{verdict}" d="M{x(mark)},2V{height - 2}"><title>{verdict}: {figure.text(mark)}</title></path>'
                    for mark, verdict in figure.marks if low <= mark <= high)
    # Dots that would cover each other stand beside each other, the worst ones on top.
    offsets = np.linspace(-1, 1, 5)[(np.arange(len(values)) * 2) % 5] * 7 if len(values) > 8 else np.zeros(len(values))
    drawn = [(figure.level(episode), f'<a href="#e{i}"><circle class="{figure.level(episode)}" cx="{x(value)}" '
              f'cy="{height / 2 + offset:g}" r="4"><title>{escape(episode.name)}: {figure.text(value)}</title></circle></a>')
             for (i, episode, value), offset in zip(values, offsets)]
    dots = ''.join(dot for _, dot in sorted(drawn, key=lambda entry: ('', *VERDICTS).index(entry[0])))
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{figure.title}"><path d="M8,{height / 2}H{width - 8}"/>'
            f'{lines}{dots}</svg>')


# --- an episode -------------------------------------------------------------------------------------------------------

def _episode(i: int, episode: Episode, fastest: float, opened: bool) -> str:
    """A line with what matters, and below it everything."""
    report = episode.report
    outcome = {True: 'success', False: 'failure'}.get(report.get('success'), '')
    thumbnails = ''.join(_image(f'e{i}f{k}', jpeg, f'{name}, {edge} image')
                         for k, (name, edge, jpeg) in enumerate(_frames(episode)[:2]))
    reasons = ''.join(f'<li class="{reason.partition(" ")[0]}">{escape(reason.partition(" ")[2])}</li>'
                      for reason in report['reasons'])
    first = f'<small>{escape(report["reasons"][0].partition(" ")[2])}</small>' if reasons else (
        f'<small>{escape(episode.task)}</small>' if episode.task else '')
    length = f'{duration(report["duration_s"])}' if report['rows'] else '–'
    head = (f'<span class="chip {episode.verdict}">{episode.verdict}</span><span class="name"><b>{escape(episode.name)}</b>'
            f'{first}</span><span class="thumbnails">{thumbnails}</span>{_sparkline(episode, fastest)}<span>{length}</span>'
            f'<span class="soft">{outcome}</span>')
    body = f'<ul class="reasons">{reasons}</ul>' if reasons else ''
    facts = _facts(episode)
    body += f'<p class="soft small">{" · ".join(facts)}</p>' if facts else ''
    body += _pictures(i, episode) + _streams(episode) + _plots(episode)
    return (f'<details class="{episode.verdict}"{" open" if opened else ""}><summary>{head}</summary>'
            f'<div class="body" id="e{i}">{body}</div></details>\n')


def _facts(episode: Episode) -> list[str]:
    """What the plots and tables do not say."""
    report, measured = episode.report, episode.report['episode']
    facts = [f'“{escape(episode.task)}”'] if episode.task and report['reasons'] else []
    if report['rows']:
        facts += [f'{report["rows"]} rows, {report["filled"]} filled']
        facts += [f'still for {duration(measured[key])} {where}' for key, where in (
            ('static_head_s', 'at the beginning'), ('static_tail_s', 'at the end'), ('longest_pause_s', 'in between'))
            if measured.get(key)]
    if measured.get('skew_p95_s'):
        facts.append(f'cameras up to {duration(measured["skew_p95_s"])} apart')
    if measured.get('lag_s') is not None:
        facts.append(f'the arm moves {duration(measured["lag_s"])} after its commands (correlation '
                     f'{measured["lag_correlation"]:.3f})')
    if report.get('contract_differs'):
        facts.append('recorded under another contract')
    if measured.get('clock_offset_s') is not None:
        facts.append('stamps are on a clock of their own (simulated time?): latency is not known')
    return facts


def _frames(episode: Episode) -> list[tuple[str, str, bytes]]:
    """(camera, first or last, JPEG)."""
    return [(name, edge, jpeg) for name, pair in episode.frames.items() for edge, jpeg in zip(('first', 'last'), pair)]


def _image(identity: str, jpeg: bytes, text: str) -> str:
    """An image that others on the page may repeat by its id, so that its bytes are there once."""
    height, width = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE).shape
    data = base64.b64encode(jpeg).decode()
    return (f'<svg class="image" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(text)}"><image id="{identity}" '
            f'width="{width}" height="{height}" href="data:image/jpeg;base64,{data}"/></svg>')


def _pictures(i: int, episode: Episode) -> str:
    """First and last image of every camera."""
    cells = ''
    for k, (name, edge, jpeg) in enumerate(_frames(episode)):
        if k < 2:  # stands in the summary already
            height, width = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE).shape
            picture = f'<svg class="image" viewBox="0 0 {width} {height}"><use href="#e{i}f{k}"/></svg>'
        else:
            picture = _image(f'e{i}f{k}', jpeg, f'{name}, {edge} image')
        cells += ('' if k % 2 else '<div>') + f'<figure>{picture}<figcaption>{escape(name)}, {edge}</figcaption></figure>'
        cells += '</div>' if k % 2 else ''
    return f'<div class="pictures">{cells}</div>' if cells else ''


def _speed(episode: Episode) -> np.ndarray:
    """(T - 1,) commanded speed, as a share of each joint's range per second, of the fastest joint."""
    if len(episode.action) < 2:
        return np.zeros(0)
    ranges = np.array([axis.limits[1] - axis.limits[0] if axis.limits else np.ptp(column) or 1.0
                       for axis, column in zip(episode.axes, episode.action.T)])
    steps = np.abs(np.diff(episode.action, axis=0)) / np.diff(episode.times)[:, None]
    return (steps / ranges).max(axis=1)


def _sparkline(episode: Episode, fastest: float) -> str:
    """How fast the arm is commanded over the episode: alike episodes look alike."""
    speed = _speed(episode)
    if not len(speed):
        return '<span></span>'
    parts = [part.mean() for part in np.array_split(speed, min(len(speed), 60))]
    points = ' '.join(f'{120 * k / max(len(parts) - 1, 1):.0f},{22 - 20 * part / fastest:.1f}' for k, part in enumerate(parts))
    return (f'<svg class="spark" viewBox="0 0 120 22" role="img" aria-label="speed over time"><title>commanded speed over time'
            f'</title><polygon points="0,22 {points} 120,22"/></svg>')


def _streams(episode: Episode) -> str:
    """A row for each stream, with its gaps over time."""
    report = episode.report
    if not report['streams']:
        return ''
    end = max(report['span_s'][1], float(episode.times[-1]) if len(episode.times) else 0.0) or 1.0
    rows, kinds = '', {}
    if len(episode.times):
        period = float(np.median(np.diff(episode.times))) if len(episode.times) > 1 else 0.0
        repeated = [(t, period) for t in episode.times[episode.filled]]
        lane = _lane(end, (episode.times[0], episode.times[-1]), [(repeated, WARN, 'repeated')])
        rows += (f'<tr><th scope="row">rows<small>of the dataset</small></th><td>{lane}</td><td>{report["rows"]}</td>'
                 f'<td colspan="{len(STREAM_COLUMNS) - 1}" class="soft">{report["filled"]} repeat something</td></tr>')
    for (name, topic, *cells), stream in zip(stream_cells(report), report['streams'].values()):
        gaps = [(at, length) for at, length in stream['gaps_at']]
        long = [gap for gap in gaps if gap[1] > stream['dt_allowed_s']]
        marks = [([gap for gap in gaps if gap not in long], WARN, 'no message'), (long, FAIL, 'no message for too long'),
                 (stream.get('frozen_at', []), 'frozen', 'the image stands still')]
        kinds |= {kind: text for stretches, kind, text in marks if stretches}
        lane = _lane(end, tuple(report['span_s']), marks)
        rows += (f'<tr><th scope="row">{escape(name)}<small>{escape(topic)}</small></th><td>{lane}</td>'
                 + ''.join(f'<td>{cell}</td>' for cell in cells) + '</tr>')
    head = f'<th scope="col">stream</th><th scope="col">0 … {duration(end)}</th>' + ''.join(
        f'<th scope="col" title="{meaning}">{title}</th>' for title, meaning in STREAM_COLUMNS)
    legend = ''.join(f'<span><i class="mark {kind}"></i>{text}</span>' for kind, text in kinds.items())
    legend = f'<p class="legend">{legend}</p>' if legend else ''
    return f'{legend}<div class="scroll"><table class="streams"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _lane(end: float, span: tuple[float, float], marks: Sequence[tuple[Sequence[tuple[float, float]], str, str]]) -> str:
    """0 to `end` [s]: where something was recorded, and marks (begin, length), their class and what they mean."""
    scale = 1000 / end
    pieces = f'<rect x="{span[0] * scale:.0f}" width="{max(span[1] - span[0], 0) * scale:.0f}" height="10"/>'
    for stretches, kind, text in marks:
        pieces += ''.join(f'<rect class="{kind}" x="{at * scale:.0f}" width="{max(length * scale, 3):.0f}" height="10"><title>'
                          f'{text} for {duration(length)} at {duration(at)}</title></rect>' for at, length in stretches)
    return f'<svg class="lane" viewBox="0 0 1000 10" preserveAspectRatio="none">{pieces}</svg>'


# --- plots of joints --------------------------------------------------------------------------------------------------

def _plots(episode: Episode) -> str:
    """Command and measurement of every joint over time."""
    if len(episode.times) < 2:
        return ''
    legend = '<span><i class="command"></i>action</span>'
    legend += '<span><i class="measured"></i>measured</span>' if episode.state is not None else ''
    legend += '<span><i class="filled"></i>repeated row</span>' if episode.filled.any() else ''
    plots = ''.join(_plot(episode, j, axis) for j, axis in enumerate(episode.axes))
    legend += '<span><i class="limit"></i>limit</span>' if 'class="limit"' in plots else ''
    return f'<p class="legend">{legend}</p><div class="plots">{plots}</div>'


def _plot(episode: Episode, j: int, axis: Axis) -> str:
    """One joint."""
    (width, height), (left, right, top, bottom) = PLOT, MARGIN
    times = episode.times
    lines = [('command', episode.action[:, j])] + ([('measured', episode.state[:, j])] if episode.state is not None else [])
    values = np.concatenate([line for _, line in lines])
    low, high = float(values.min()), float(values.max())
    # Noise of a joint at rest is not to fill its plot.
    least = 0.02 * (axis.limits[1] - axis.limits[0]) if axis.limits else 1e-6
    margin = max(0.06 * (high - low), (least - (high - low)) / 2)
    low, high = low - margin, high + margin
    begin, end = float(times[0]), float(times[-1])

    def x(t):
        return left + (t - begin) / (end - begin) * (width - left - right)

    def y(value):
        return top + (high - value) / (high - low) * (height - top - bottom)

    grid = ''
    for value in _ticks(low, high, 4):
        grid += (f'<path d="M{left},{y(value):.1f}H{width - right}"/>'
                 f'<text x="{left - 4}" y="{y(value) + 3:.1f}">{_tick(value)}</text>')
    for t in _ticks(begin, end, 6):
        grid += f'<text class="time" x="{x(t):.1f}" y="{height - 3}">{_tick(t)}</text>'
    for limit in axis.limits or ():
        if low <= limit <= high:
            grid += (f'<path class="limit" d="M{left},{y(limit):.1f}H{width - right}"><title>limit {limit:g} {axis.unit}'
                     '</title></path>')
    repeated = ''.join(f'<rect class="filled" x="{x(t) - 1:.1f}" y="{top}" width="2" height="{height - top - bottom}"/>'
                       for t in times[episode.filled])
    drawn = ''
    for kind, line in lines:
        places = _thinned(line, 150)
        drawn += f'<path class="{kind}" d="{_path(x(times[places]), y(line[places]))}" transform="scale({1 / FINE:g})"/>'
    unit = f' <small>{axis.unit}</small>' if axis.unit else ''
    return (f'<figure><figcaption><b>{escape(axis.name)}</b>{unit}</figcaption><svg class="plot" viewBox="0 0 {width} {height}" '
            f'role="img" aria-label="{escape(axis.name)} over time [s]">{grid}{repeated}{drawn}</svg></figure>')


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers between low and high."""
    return [value for value in MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high).tolist() if low <= value <= high]


def _tick(value: float) -> str:
    return f'{round(value, 9):g}'.replace('-', '−')


def _thinned(line: np.ndarray, parts: int) -> np.ndarray:
    """Places of the least and the greatest value in each of `parts` of a long line (T,): peaks stay."""
    if len(line) <= 2 * parts:
        return np.arange(len(line))
    places = [part[[np.argmin(line[part]), np.argmax(line[part])]] for part in np.array_split(np.arange(len(line)), parts)]
    return np.unique(places)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A polyline in steps from point to point, in whole numbers of 1/FINE px: a few bytes a point."""
    points = np.round(np.stack([x, y], axis=1) * FINE).astype(int)
    steps = np.diff(points, axis=0)
    return f'M{points[0, 0]},{points[0, 1]}l' + ' '.join(f'{dx},{dy}' for dx, dy in steps)


STYLE = '''
:root { color-scheme: light dark; --ink: #1d2733; --soft: #5d6b79; --line: #dfe5eb; --back: #f5f7f9; --card: #fff;
  --pass: #0f9d86; --warn: #c98a06; --fail: #cf4417; --frozen: #6b4c9a; --measured: #c2528b; --lane: #c5d5e2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4eaf0; --soft: #93a1af; --line: #2f3a46; --back: #12181f;
  --card: #1a222b; --pass: #2fbfa5; --warn: #e0aa3a; --fail: #f0764d; --frozen: #a98bd6; --measured: #ff5fae; --lane: #3d4f5f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; font-variant-numeric: tabular-nums; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 20px 48px; }
h1 { font-size: clamp(1.6rem, 3vw, 2.2rem); letter-spacing: -0.018em; line-height: 1.2; margin: 0 0 4px;
  overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 4px; }
p { margin: 0 0 10px; }
.soft, .lead, small, figcaption small { color: var(--soft); }
.small, small, figcaption, .legend, th, td { font-size: 0.84rem; }
code { font: 0.9em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 20px 22px; margin-top: 18px; }
.tiles { display: flex; flex-wrap: wrap; gap: 10px; margin: 16px 0 12px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 10px 18px; min-width: 96px; }
.tile b { display: block; font-size: 1.7rem; line-height: 1.15; }
.tile span { color: var(--soft); font-size: 0.84rem; }
.tile.PASS b { color: var(--pass); } .tile.WARN b { color: var(--warn); } .tile.FAIL b { color: var(--fail); }
.share { display: flex; gap: 2px; height: 8px; border-radius: 4px; overflow: hidden; }
i.PASS, .chip.PASS { background: var(--pass); } i.WARN, .chip.WARN { background: var(--warn); }
i.FAIL, .chip.FAIL { background: var(--fail); }
.chip { color: var(--card); border-radius: 6px; padding: 2px 8px; font-size: 0.76rem; font-weight: 700; letter-spacing: 0.03em; }
.strip { display: grid; grid-template-columns: 210px minmax(0, 1fr) 76px 76px 76px; gap: 12px; align-items: center;
  border-top: 1px solid var(--line); padding: 3px 0; font-size: 0.84rem; }
.strip span:nth-child(n+3) { text-align: right; color: var(--soft); }
.strip span:nth-child(3) { color: var(--ink); }
.strip.head { border: 0; } .strip.head span { color: var(--soft); }
.strips { margin-bottom: 10px; }
.strip svg { display: block; width: 100%; }
.strip path { stroke: var(--line); stroke-width: 1; }
.strip path.WARN { stroke: var(--warn); stroke-width: 1.5; stroke-dasharray: 3 3; }
.strip path.FAIL { stroke: var(--fail); stroke-width: 1.5; }
circle { fill: var(--soft); fill-opacity: 0.6; stroke: var(--card); stroke-width: 0.6; }
circle.PASS { fill: var(--pass); } circle.WARN { fill: var(--warn); fill-opacity: 0.95; }
circle.FAIL { fill: var(--fail); fill-opacity: 0.95; }
circle:hover { fill-opacity: 1; stroke: var(--ink); }
.choices label { margin-right: 16px; cursor: pointer; }
body:has(#only-WARN:checked) details:not(.WARN), body:has(#only-FAIL:checked) details:not(.FAIL) { display: none; }
details { border-top: 1px solid var(--line); }
summary { display: grid; grid-template-columns: 58px minmax(0, 1fr) auto 120px 64px 60px; gap: 14px; align-items: center;
  padding: 7px 4px; cursor: pointer; list-style: none; }
summary::-webkit-details-marker { display: none; }
summary:hover { background: var(--back); }
.chip { text-align: center; }
.name { min-width: 0; } .name b, .name small { display: block; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.thumbnails { display: flex; gap: 4px; } .thumbnails svg { height: 44px; border-radius: 4px; display: block; }
details[open] > summary .thumbnails { visibility: hidden; }
.spark { width: 120px; height: 22px; } .spark polygon { fill: var(--lane); }
.body { padding: 8px 4px 22px; scroll-margin-top: 80px; }
.reasons { margin: 0 0 12px; padding: 0; list-style: none; }
.reasons li { border-left: 4px solid var(--warn); padding: 3px 10px; margin-bottom: 4px; background: var(--back); }
.reasons li.FAIL { border-color: var(--fail); }
.pictures { display: flex; flex-wrap: wrap; gap: 10px 22px; margin-bottom: 14px; }
.pictures div { display: flex; gap: 6px; }
.pictures svg { height: 150px; border-radius: 8px; display: block; }
figure { margin: 0; min-width: 0; }
.scroll { overflow-x: auto; margin-bottom: 14px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: right; padding: 4px 10px 4px 0; border-top: 1px solid var(--line); white-space: nowrap; }
thead th { border: 0; color: var(--soft); font-weight: 400; }
th:first-child { text-align: left; } th small { display: block; font-weight: 400; font-size: 0.76rem; }
td[colspan] { text-align: left; }
.streams th:nth-child(2), .streams td:nth-child(2) { width: 30%; min-width: 150px; text-align: left; }
.lane { width: 100%; height: 12px; display: block; border-radius: 3px; background: var(--back); }
.lane rect { fill: var(--lane); } .lane rect.WARN { fill: var(--warn); } .lane rect.FAIL { fill: var(--fail); }
.lane rect.frozen { fill: var(--frozen); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--soft); }
.legend span { display: inline-flex; align-items: center; gap: 7px; }
.legend i { width: 20px; height: 0; border-top: 2px solid var(--ink); }
.legend i.measured { border-color: var(--measured); } .legend i.limit { border-top: 2px dashed var(--warn); }
.legend i.filled { width: 3px; height: 12px; border: 0; background: var(--warn); opacity: 0.5; }
.legend i.mark { width: 14px; height: 10px; border: 0; border-radius: 2px; } i.frozen { background: var(--frozen); }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(270px, 1fr)); gap: 10px 18px; }
.plot { width: 100%; display: block; }
.plot path { stroke: var(--line); fill: none; } .plot text { font-size: 9px; fill: var(--soft); text-anchor: end; }
.plot text.time { text-anchor: middle; }
.plot path.command, .plot path.measured { stroke-width: 6; stroke: var(--ink); stroke-linejoin: round; }
.plot path.measured { stroke: var(--measured); stroke-width: 5; }
.plot path.limit { stroke: var(--warn); stroke-dasharray: 4 3; }
.plot rect.filled { fill: var(--warn); opacity: 0.35; }
@media (max-width: 760px) {
  main { padding: 16px 10px 32px; } section { padding: 16px 12px; }
  .strip { grid-template-columns: minmax(0, 1fr) 60px 60px 60px; } .strip svg { grid-column: 1 / -1; grid-row: 2; }
  .strip.head span:nth-child(2) { display: none; }
  summary { grid-template-columns: 58px minmax(0, 1fr) 64px; } summary > :nth-child(n+3):not(:nth-child(5)) { display: none; }
}
@media print { section { break-inside: avoid; } }
'''
