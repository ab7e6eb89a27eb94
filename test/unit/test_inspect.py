"""What an engineer reads about bags and datasets: numbers, words, pictures and plots are those of the recording."""
from __future__ import annotations

import base64
import json
import pickle
import re
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from rich.console import Console

from il_policies import cli
from il_policies.bags.reader import find_bags
from il_policies.data import inspect, inspect_page
from il_policies.data.convert import convert
from il_policies.data.convert_bag import Options
from il_policies.data.store import ActionInfo, Dataset, DatasetInfo, Feature, create, write_episode
from recordings import MS, START, compressed, contract, joint_state, picture, point, positions, text, write_bag

LAG = 0.06
CONTRACT = contract()


def demonstration(seconds: float = 4.0) -> list[tuple[str, int, object]]:
    """Joints that follow the commands by LAG; frame i is flat grey of value 5·i."""
    messages = []
    for i in range(round(seconds * 100)):
        a, b = positions(i * 0.01 - LAG)
        messages.append(('joint_states', START + i * 10 * MS, joint_state(START + i * 10 * MS, ['a', 'b'], [a, b])))
    for i in range(round(seconds * 50)):
        a, b = positions(i * 0.02)
        messages.append(('command', START + i * 20 * MS, joint_state(START + i * 20 * MS, ['a', 'b'], [a, b])))
    for i in range(round(seconds * 10)):
        stamp = START + i * 100 * MS
        messages += [('goal', stamp, point(stamp, 0.25, 0.1)), ('camera/compressed', stamp, compressed(stamp, picture(5 * i)))]
    return sorted(messages, key=lambda entry: entry[1])


@pytest.fixture(scope='module')
def bags(tmp_path_factory) -> Path:
    """demo_1: clean; demo_2: a frame lost; demo_3: a gap of a second; demo_10: cut off."""
    folder = tmp_path_factory.mktemp('inspect') / 'bags'
    messages = demonstration()
    custom = {'task': 'reach <left> & "right"', 'success': 'true'}
    write_bag(folder / 'demo_1', messages, custom=custom)
    write_bag(folder / 'demo_2', messages, custom=custom,
              keep=lambda topic, time: not (topic == 'camera/compressed' and time == 2000 * MS))
    write_bag(folder / 'demo_3', messages, custom={'success': 'false'},
              keep=lambda topic, time: not (topic == 'camera/compressed' and 2000 * MS <= time < 3000 * MS))
    cut = write_bag(folder / 'demo_10', messages)
    file = next(cut.glob('*.mcap'))
    file.write_bytes(file.read_bytes()[:-2000])
    return folder


@pytest.fixture(scope='module')
def inspection(bags) -> inspect.Inspection:
    return inspect.inspect_bags(find_bags(bags), CONTRACT, Options())


@pytest.fixture(scope='module')
def page(inspection) -> str:
    return inspect_page.page(inspection)


def reasons(inspection: inspect.Inspection) -> list[list[str]]:
    return [episode.report['reasons'] for episode in inspection.episodes]


def terminal(inspection: inspect.Inspection, width: int) -> str:
    out = StringIO()
    inspect.show(inspection, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def visible(page: str) -> str:
    """What a reader sees, as one line."""
    return ' '.join(re.sub(r'<[^>]*>', ' ', re.sub(r'<style>.*?</style>', '', page, flags=re.DOTALL)).split())


def test_every_bag_has_its_verdict(inspection):
    assert [episode.name for episode in inspection.episodes] == ['demo_1', 'demo_2', 'demo_3', 'demo_10']
    assert [episode.verdict for episode in inspection.episodes] == ['PASS', 'WARN', 'FAIL', 'FAIL']
    clean, lost, gap, cut = reasons(inspection)
    assert clean == []
    assert lost == ['WARN 1 of 40 rows repeat something that was missing (2.5 %, the first at 2.00 s)',
                    'WARN front: 1 of 40 messages lost (2.5 %), the longest gap 0.20 s at 1.90 s']
    assert gap[0].startswith('FAIL E206 gap of 1.1') and 'demo_3' not in gap[0]
    assert gap[1] == 'FAIL front: silent for 1.10 s at 1.90 s, allowed 0.50 s'
    assert cut[0].startswith('FAIL E101 demo_10_0.mcap: ') and '--salvage' in cut[0]
    assert inspection.episodes[0].report['episode']['lag_s'] == pytest.approx(LAG, abs=0.005)


def test_an_episode_shows_what_was_recorded(inspection):
    episode = inspection.episodes[0]
    np.testing.assert_allclose(episode.action, positions(episode.times)[:, ::-1], atol=1e-9)  # b, a
    np.testing.assert_allclose(episode.state, positions(episode.times - LAG)[:, ::-1], atol=1e-9)
    assert [axis.name for axis in episode.axes] == ['b', 'a'] and episode.axes[0].limits == (-3.0, 3.0)
    values = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE) for jpeg in episode.frames['front']]
    rows = len(episode.times)
    assert [image.shape for image in values] == [(8, 12)] * 2
    np.testing.assert_allclose([image.mean() for image in values], [0, 5 * (rows - 1)], atol=2)


def test_a_bag_is_judged_as_the_converter_does(bags, inspection, tmp_path):
    convert(bags, CONTRACT, tmp_path / 'data')
    dataset = Dataset(tmp_path / 'data')
    converted = inspect.inspect_dataset(dataset)
    assert len(converted.episodes) == 2
    for seen, made in zip(inspection.episodes, converted.episodes):
        assert made.name.endswith(seen.name) and made.task == seen.task
        assert made.report == seen.report
        np.testing.assert_array_equal(made.times, seen.times)
        np.testing.assert_allclose(made.state, seen.state, atol=1e-6)
        np.testing.assert_allclose(made.action, seen.action, atol=1e-6)
        for pair, other in zip(made.frames['front'], seen.frames['front']):
            images = [cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_GRAYSCALE) for jpeg in (pair, other)]
            np.testing.assert_allclose(*[image.mean() for image in images], atol=2)
    assert converted.contract_hash == inspection.contract_hash == CONTRACT.hash
    assert converted.to_dict()['PASS'] == converted.to_dict()['WARN'] == 1


def test_several_episodes_in_a_bag(tmp_path):
    marks = ((500, 'start pick'), (2000, 'success'), (2500, 'start place'), (3800, 'failure'))
    messages = sorted([*demonstration(), *(('episode', START + at * MS, text(mark)) for at, mark in marks)], key=lambda m: m[1])
    bag = write_bag(tmp_path / 'long', messages)
    found = inspect.inspect_bags([bag], CONTRACT, Options(markers='episode'))
    assert [(episode.name, episode.task, episode.report['success']) for episode in found.episodes] == [
        ('long #0', 'pick', True), ('long #1', 'place', False)]
    assert [episode.verdict for episode in found.episodes] == ['PASS', 'PASS'], reasons(found)
    for episode, begin in zip(found.episodes, (0.5, 2.5)):
        grey = cv2.imdecode(np.frombuffer(episode.frames['front'][0], np.uint8), cv2.IMREAD_GRAYSCALE).mean()
        assert grey == pytest.approx(50 * begin, abs=6)


def test_parts_of_a_split_bag_are_judged_by_themselves(bags):
    parts = inspect.inspect_bags([bags / 'demo_3'], CONTRACT, Options(gaps='split'))
    assert [episode.name for episode in parts.episodes] == ['demo_3 #0', 'demo_3 #1']
    assert [episode.verdict for episode in parts.episodes] == ['WARN', 'WARN'], 'the gap is in none of them'
    assert all('gap of 1.1' in reasons[0] for reasons in reasons(parts))


def test_a_contract_inside_the_bag(tmp_path):
    about = {'contract': json.dumps(CONTRACT.to_dict()), 'contract_hash': CONTRACT.hash}
    bag = write_bag(tmp_path / 'own', demonstration(2.0), about=about)
    found = inspect.inspect_bags([bag], None, Options())
    assert (found.robot, found.contract_hash) == ('two', CONTRACT.hash)
    broken = write_bag(tmp_path / 'broken', demonstration(2.0), about={'contract': '{"robot": 3}'})
    found = inspect.inspect_bags([bag, broken], None, Options())
    assert found.episodes[1].verdict == 'FAIL' and 'robot' in found.episodes[1].report['reasons'][0]


def test_what_a_process_finds_can_be_sent(bags):
    for bag in find_bags(bags):
        seen = inspect._look_at_bag(inspect._Job(bag, CONTRACT, Options()), lambda share: None)
        sent = pickle.loads(pickle.dumps(seen))
        assert sent.episodes[0].report == seen.episodes[0].report and str(sent.error) == str(seen.error)


def test_a_damaged_episode_fails_alone(tmp_path):
    info = DatasetInfo(10.0, {'state': Feature((1,), 'lowdim', ('x',))}, ActionInfo(('x',)), 'imported')
    create(tmp_path / 'data', info)
    values = np.sin(np.arange(60) / 10)[:, None]
    for i in range(2):
        write_episode(tmp_path / 'data', i, {'state': values}, values, np.arange(60) * 10**8, np.zeros(60, bool), {}, {}, {})
    (tmp_path / 'data/episodes/000000/lowdim.parquet').write_bytes(b'PAR1')
    found = inspect.inspect_dataset(Dataset(tmp_path / 'data'))
    assert [episode.verdict for episode in found.episodes] == ['FAIL', 'PASS']
    assert 'lowdim.parquet: not readable' in reasons(found)[0][0] and 'lowdim.parquet' in terminal(found, 160)
    assert 'convert its bag again' in visible(inspect_page.page(found))


def test_imported_rows_without_a_report(tmp_path):
    info = DatasetInfo(10.0, {'state': Feature((2,), 'lowdim', ('x', 'y'))}, ActionInfo(('x', 'y')), 'imported')
    create(tmp_path / 'data', info)
    T = 60
    action = np.stack([np.sin(np.arange(T) / 10), np.cos(np.arange(T) / 10)], axis=1)
    for i, values in enumerate((action, np.ones((T, 2)))):
        write_episode(tmp_path / 'data', i, {'state': values}, values, np.arange(T) * 10**8, np.zeros(T, bool), {}, {}, {})
    found = inspect.inspect_dataset(Dataset(tmp_path / 'data'))
    assert [episode.verdict for episode in found.episodes] == ['PASS', 'FAIL']
    assert reasons(found)[1] == ['FAIL the action never changes']
    assert 'y' in visible(inspect_page.page(found)) and 'action never changes' in terminal(found, 80)


def test_the_terminal(inspection):
    narrow, wide = terminal(inspection, 80), terminal(inspection, 160)
    assert all(len(line) <= 80 for line in narrow.splitlines())
    head, *lines = wide.splitlines()
    assert head.split() == ['episode', 'length', 'filled', 'lost', 'gap', 'lag', 'still']
    assert lines[0].split() == ['PASS', 'demo_1', '3.90', 's', '0', '0', '0', '60', 'ms', '0', '+', '0']
    assert lines[1].split()[:10] == ['WARN', 'demo_2', '3.90', 's', '2.5', '%', '2.5', '%', '0.20', 's']
    assert lines[2].split()[:2] == ['FAIL', 'demo_3']
    assert 'bags: 4 episodes, 7.8 s, 80 rows at 10 Hz, robot two' in wide
    assert '1 PASS, 1 WARN, 2 FAIL' in wide
    for episode in inspection.episodes:
        for reason in episode.report['reasons']:
            assert reason in wide or reason[:100] in wide


def test_the_terminal_shows_the_streams_of_one_bag(bags):
    one = inspect.inspect_bags([bags / 'demo_2'], CONTRACT, Options())
    line = next(line for line in terminal(one, 120).splitlines() if line.startswith('front'))
    # Stamped when taken, received 2 ms later; a tick may be a frame old.
    assert line.split() == ['front', '39', '10/10', '0', '2.5', '%', '0.20', 's', '2', 'ms,', '2', 'ms', '0', '0.10', 's', '0']


class Tags(HTMLParser):
    """Checks that tags nest, and gathers ids, references and images."""

    VOID = {'meta', 'input', 'br', 'img'}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.ids, self.references, self.images, self.paths = [], [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids += [attributes['id']] if 'id' in attributes else []
        href = attributes.get('href', '')
        (self.images if href.startswith('data:') else self.references).append(href) if href else None
        if tag == 'path':
            self.paths.append((attributes.get('class'), attributes['d']))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(page):
    tags = Tags(page)
    for absent in ('http:', 'https:', '<script', '<link', '<iframe', 'url(', '@import'):
        assert absent not in page
    assert len(tags.ids) == len(set(tags.ids))
    assert tags.references and all(reference.startswith('#') and reference[1:] in tags.ids for reference in tags.references)
    assert len(tags.images) == 4 and all(image.startswith('data:image/jpeg;base64,') for image in tags.images)
    for image in tags.images:
        assert cv2.imdecode(np.frombuffer(base64.b64decode(image.partition(',')[2]), np.uint8), cv2.IMREAD_COLOR) is not None
    assert 'nan' not in re.sub(r'base64,[^"]*', '', page).lower().split('<style>')[0] + visible(page).lower()


def test_the_page_says_what_the_reports_say(page, inspection):
    words = visible(page)
    for episode in inspection.episodes:
        for reason in episode.report['reasons']:
            assert reason.partition(' ')[2] in words.replace('&#x27;', "'"), reason
    assert '1 PASS, 1 WARN, 2 FAIL' in page and '7.8 s' in words and '80 rows at 10 Hz' in words
    assert '1 succeeded' not in words and '2 succeeded, 0 failed, 2 not labelled' in words
    assert 'reach &lt;left&gt; &amp; &quot;right&quot;' in page, 'a task is text, not HTML'


def test_the_plots_are_to_scale(page, inspection):
    """The drawn lines, read back through the axes' own labels, are the recorded ones."""
    figure = re.search(r'<figcaption><b>b</b>.*?</figure>', page, re.DOTALL)[0]
    labels = re.findall(r'<text x="[\d.]+" y="([\d.]+)">([^<]+)</text>', figure)
    (y0, v0), (y1, v1) = [(float(y) - 3, float(value.replace('−', '-'))) for y, value in (labels[0], labels[-1])]
    times = re.findall(r'<text class="time" x="([\d.]+)" y="[\d.]+">([^<]+)</text>', figure)
    (x0, t0), (x1, t1) = [(float(x), float(value)) for x, value in (times[0], times[-1])]
    episode = inspection.episodes[0]
    for kind, wanted in (('command', episode.action), ('measured', episode.state)):
        path = re.search(rf'<path class="{kind}" d="M(\d+),(\d+)l([^"]*)"', figure)
        steps = [tuple(map(int, step.split(','))) for step in path[3].split()]
        points = np.cumsum([(int(path[1]), int(path[2])), *steps], axis=0) / inspect_page.FINE
        t = t0 + (points[:, 0] - x0) * (t1 - t0) / (x1 - x0)
        value = v0 + (points[:, 1] - y0) * (v1 - v0) / (y1 - y0)
        np.testing.assert_allclose(t, episode.times, atol=0.02)
        np.testing.assert_allclose(value, wanted[:, 0], atol=0.02)


def test_peaks_stay_in_long_plots():
    line = np.sin(np.arange(20_000) / 3000)
    line[7777] = 5.0
    places = inspect_page._thinned(line, 150)
    assert len(places) <= 300 and 7777 in places and np.all(np.diff(places) > 0)


def test_gaps_are_drawn_where_they_were(page):
    lanes = re.findall(r'<rect class="FAIL" x="(\d+)" width="(\d+)" height="10"><title>([^<]*)</title>', page)
    (x, width, title), = [lane for lane in lanes if 'too long' in lane[2]]
    assert title == 'no message for too long for 1.10 s at 1.90 s'
    end = 3.99  # the last message of all, since the first one
    assert int(x) / 1000 == pytest.approx(1.9 / end, abs=0.003) and int(width) / 1000 == pytest.approx(1.1 / end, abs=0.003)


def test_depth_is_shown_near_bright():
    depth = np.full((10, 20, 1), 1000, np.uint16)
    depth[:, 10:] = 2000
    depth[0] = 0
    image = cv2.imdecode(np.frombuffer(inspect._thumbnail(depth), np.uint8), cv2.IMREAD_GRAYSCALE)
    assert image[6, 3] > 240 and 40 < image[6, 16] < 70 and image[0, 3] < 30


@pytest.fixture
def il(capsys):
    """Runs il inspect in this process: arguments → (exit code, stdout, stderr)."""
    def run(*arguments):
        try:
            cli.main(['inspect', *map(str, arguments)])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        return code, *capsys.readouterr()
    return run


def test_command(il, bags, tmp_path):
    robot = tmp_path / 'two.yaml'
    robot.write_text(yaml.safe_dump(CONTRACT.to_dict()))
    code, out, err = il(bags / 'demo_1', bags / 'demo_2', '--contract', robot, '--html', tmp_path / 'new/page.html', '--json',
                        tmp_path / 'reports.json')
    assert code == 0 and '1 PASS, 1 WARN, 0 FAIL' in ' '.join(out.split()) and err == ''
    assert (tmp_path / 'new/page.html').read_text().startswith('<!doctype html>')
    reports = json.loads((tmp_path / 'reports.json').read_text())
    assert [episode['verdict'] for episode in reports['episodes']] == ['PASS', 'WARN'] and reports['fps'] == 10.0
    code, out, _ = il(bags, '--contract', robot)
    assert code == 1 and '2 FAIL' in out
    assert il(bags, '--contract', robot, '--salvage', '--gaps', 'split')[0] == 0
    for arguments, message in (
            ((tmp_path / 'nothing',), 'E102'), ((bags / 'demo_10', '--contract', robot), 'E101'), ((), 'no bags and no dataset'),
            ((bags / 'demo_1',), 'E212 .*no contract inside; give one with --contract'),
            ((bags, '--contract', tmp_path / 'absent.yaml'), 'no such file')):
        code, _, err = il(*arguments)
        assert code == 2 and len(err.strip().splitlines()) == 1 and re.search(message, err), (arguments, err)
