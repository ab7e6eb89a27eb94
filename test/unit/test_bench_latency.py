from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from il_policies import cli
from il_policies.bench import latency
from il_policies.bench.latency import Chunk, Command, Followed, Heard, Planned, Status, beyond_inference, durations, starvation

MS = 1_000_000
BEGAN = 1_795_932_750_068_405_181  # [ns], as a wall clock tells it
RNG = np.random.default_rng(4)


def chunk(received_ms: float, length_ms: float = 500.0, epoch: int = 1, sequence: int = 0, inference_ms: float = 0.0) -> Chunk:
    """A chunk that begins when its inference did and is sent 1 ms before it is received."""
    received = BEGAN + round(received_ms * MS)
    observed = received - MS - round(inference_ms * MS)
    return Chunk(epoch, sequence, 'p', 0.1, observed, round(inference_ms * MS), observed, observed + round(length_ms * MS),
                 received - MS, received)


def status(time_ms: float, epoch: int = 1, follows: bool = True, starved: bool = False) -> Status:
    return Status(BEGAN + round(time_ms * MS), epoch, follows, starved, False, 'no fresh chunk' if starved else 'armed')


def heard(chunks, statuses=(), ended_ms: float = 10_000.0, planned=(), followed=(), commands=()) -> Heard:
    return Heard(BEGAN, BEGAN + round(ended_ms * MS), list(chunks), list(planned), list(followed), list(commands), list(statuses),
                 'continuous')


def test_stages_are_what_went_by_and_add_up_to_the_whole_to_the_nanosecond():
    took = RNG.integers(1, 200 * MS, (40, 6))  # waited, arrival, planning, inference, publishing, first command
    chunks, planned, followed, commands = [], [], [], []
    for k, (wait, arrival, planning, inference, publishing, command) in enumerate(took.tolist()):
        captured = BEGAN + wait
        arrived, began = captured + arrival, captured + arrival + planning
        sent = began + inference + publishing
        chunks.append(Chunk(1 + k // 20, k % 20, 'p', 0.1, began, inference, began, began + 1500 * MS, sent, sent + MS))
        planned.append(Planned(1 + k // 20, k % 20, captured, arrived, began, began + inference))
        followed.append(Followed(1 + k // 20, k % 20, k))
        commands.append(Command(k, sent + command))
    order = RNG.permutation(40)
    found = durations(heard(chunks, planned=[planned[k] for k in order], followed=[followed[k] for k in order[::-1]],
                            commands=[commands[k] for k in order]))
    for stage, expected in zip(latency.STAGES, took[:, 1:].T):
        np.testing.assert_allclose(found[stage], expected * 1e-9, rtol=0, atol=1e-12)
    np.testing.assert_allclose(sum(found[stage] for stage in latency.STAGES), found[latency.WHOLE], rtol=0, atol=1e-12)
    np.testing.assert_allclose(found[latency.OBSERVED], took[:, 3:].sum(axis=1) * 1e-9, rtol=0, atol=1e-12)


def test_what_nobody_says_is_not_known():
    """A chunk that no command used; one of a planner that says nothing; a command that was not heard."""
    found = durations(heard([chunk(100, sequence=0, inference_ms=30), chunk(200, sequence=1, inference_ms=40)],
                            planned=[Planned(1, 0, BEGAN, BEGAN, BEGAN, BEGAN)], followed=[Followed(1, 1, 7)]))
    assert found['inference'].tolist() == pytest.approx([0.03, 0.04])
    assert np.isnan(found['capture to arrival']).tolist() == [False, True]
    for stage in ('published to first command', latency.WHOLE, latency.OBSERVED):
        assert np.isnan(found[stage]).all()


def test_time_without_a_fresh_chunk_is_between_those_of_an_epoch():
    chunks = [chunk(100, epoch=1, inference_ms=30), chunk(190, epoch=1, inference_ms=50), chunk(400, epoch=1, inference_ms=60),
              chunk(5000, epoch=2, inference_ms=30), chunk(5060, epoch=2, inference_ms=70)]
    np.testing.assert_allclose(beyond_inference(chunks[::-1]), [0.04, 0.15, -0.01], atol=1e-9)
    assert not len(beyond_inference(chunks[:1])) and not len(beyond_inference([]))


@pytest.mark.parametrize('seed', range(8))
def test_starvation_equals_what_looking_every_millisecond_sees(seed):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.choice(np.arange(5, 9_000), 25, replace=False))
    cuts = np.sort(rng.choice(np.arange(10, 9_990), 12, replace=False)).tolist()
    statuses = [status(-50)]
    for at in cuts:
        statuses.append(status(at, statuses[-1].epoch + int(rng.random() < 0.3), bool(rng.random() < 0.7)))
    epochs = [max((s for s in statuses if s.time <= BEGAN + t * MS), key=lambda s: s.time).epoch for t in times.tolist()]
    # Some have ended when they come.
    chunks = [chunk(float(t), float(rng.integers(5, 900)), epoch, k, float(rng.integers(0, 300)))
              for k, (t, epoch) in enumerate(zip(times, epochs))]
    given = heard(chunks, statuses)

    seen, out_of = 0, 0
    for ms in range(10_000):
        now = BEGAN + ms * MS + MS // 2
        current = max((s for s in statuses if s.time <= now), key=lambda s: s.time)
        mine = [c for c in chunks if c.epoch == current.epoch and c.received <= now]
        if current.follows and mine:
            out_of += 1
            seen += not any(c.start <= now <= c.end for c in mine)
    shuffled = heard([chunks[k] for k in rng.permutation(len(chunks))], statuses[::-1])
    found, followed = starvation(shuffled)
    assert starvation(given) == (found, followed)
    assert sum(end - begin for begin, end in found) * 1e-9 == pytest.approx(seen * 1e-3, abs=0.05)
    assert followed == pytest.approx(out_of * 1e-3, abs=0.05) and seen > 200
    assert all(begin < end for begin, end in found) and all(a[1] <= b[0] for a, b in zip(found, found[1:]))


def test_a_controller_that_is_never_without_a_chunk_is_not_starved():
    found, followed = starvation(heard([chunk(100 * k, 300) for k in range(1, 100)], [status(0), status(3000), status(6000)]))
    assert not found and followed == pytest.approx(9.9, abs=1e-6)
    assert starvation(heard([], [status(0)])) == ([], 0.0)
    # Told again and again in one interval, it is starved once.
    found, _ = starvation(heard([chunk(100, 300)], [status(ms) for ms in range(0, 5000, 100)], 5000.0))
    assert len(found) == 1 and found[0][1] - found[0][0] == pytest.approx(4_601 * MS, abs=2 * MS)


def test_what_it_writes_are_numpys_quantiles(tmp_path, capsys):
    took = RNG.gamma(2.0, 20.0, 300)
    arrivals = np.cumsum(took + RNG.gamma(2.0, 5.0, 300))
    given = heard([chunk(at, 1500, sequence=k, inference_ms=ms) for k, (at, ms) in enumerate(zip(arrivals, took))],
                  [status(0), *(status(1000 + 100 * k, starved=k in (0, 1, 3)) for k in range(4))], 60_000)
    result = latency._report({'continuous': given, 'stride': given}, 'made up', tmp_path)
    rows = {(row['plan_when'], row['stage']): row for row in result['rows']}
    beyond = np.diff(arrivals) - took[1:]
    for stage, values in (('inference', took), (latency.BEYOND, beyond)):
        row = rows['continuous', stage]
        assert row['count'] == len(values)
        for head, share in (('p50_ms', 50), ('p90_ms', 90), ('p99_ms', 99), ('max_ms', 100)):
            assert row[head] == pytest.approx(np.percentile(values, share, method='higher'), abs=1e-4)
    assert rows['stride', latency.WHOLE]['count'] == 0 and rows['stride', latency.WHOLE]['p50_ms'] is None
    continuous, stride = result['verdicts']
    assert continuous['kept'] is True and continuous['beyond_inference_p99_s'] == pytest.approx(
        np.percentile(beyond, 99, method='higher') * 1e-3, abs=1e-6)
    assert stride['kept'] is None and continuous['stops_for_want_of_a_chunk'] == 2
    written = json.loads((tmp_path / 'latency.json').read_text())['durations_ms']['stride']
    assert written['inference'] == pytest.approx(took, abs=1e-3) and written[latency.WHOLE] == [None] * 300
    assert (tmp_path / 'latency.png').stat().st_size > 20_000
    said = capsys.readouterr().out
    assert 'one policy step is 100 ms: kept' in said and 'not judged: this planner waits on purpose' in said


@pytest.mark.parametrize(('when', 'arrivals', 'kept', 'words'), [
    ('continuous', (100, 240, 400), False, 'p99: 110.0 ms, one policy step is 100 ms: missed'),
    ('continuous', (100, 240, 385), True, 'p99: 95.0 ms, one policy step is 100 ms: kept'),
    ('horizon', (100, 240, 400), None, 'p99: 110.0 ms, one policy step is 100 ms: not judged: this planner waits on purpose'),
    ('unknown', (100,), None, 'unknown: only one chunk came'),
])
def test_a_gap_of_more_than_a_policy_step_is_missed(when, arrivals, kept, words):
    given = heard([chunk(at, 1500, inference_ms=50) for at in arrivals], [status(0)], 1000)
    verdict = latency._verdict(when, given, beyond_inference(given.chunks))
    assert verdict['kept'] is kept and words in latency._words(verdict) and 'FAULT' not in latency._words(verdict)


def test_faults_are_told_once_each():
    told = [Status(BEGAN + at * MS, 1, not fault, False, fault, 'stale' if fault else 'armed')
            for at, fault in ((0, True), (100, True), (200, False), (300, True), (400, True))]
    verdict = latency._verdict('continuous', heard([chunk(100)], told), np.array([]))
    assert verdict['faults'] == ['stale', 'stale'] and latency._words(verdict).count('; FAULT: stale') == 2


@pytest.mark.parametrize(('arguments', 'words'), [
    ((), 'give either a checkpoint, to be run in simulation, or --live'),
    (('nowhere', '--live'), 'give either a checkpoint, to be run in simulation, or --live'),
    (('nowhere',), 'nowhere'),
    (('nowhere', '--seconds', '0.5'), 'seconds is 0.5, must be 1 to 3600'),
    (('nowhere', '--stride', '0'), 'stride is 0 and threads 1, must be at least 1'),
    (('--live',), '--live needs the contract of the robot that runs'),
    (('--live', '--contract', 'nowhere.yaml'), 'nowhere.yaml'),
    (('--live', '--contract', 'x.yaml', '--plan-when', 'stride'), '--plan-when is for a checkpoint'),
])
def test_what_cannot_be_measured_is_a_line_and_2(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        cli.main(['bench', 'latency', *arguments])
    assert ended.value.code == 2 and words in (said := capsys.readouterr().err) and said.count('\n') == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('package', ['rclpy', 'il_runtime'])
def test_without_ros_it_is_a_line_and_2(package, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == package else find(name))
    with pytest.raises(SystemExit) as ended:
        cli.main(['bench', 'latency', '--live', '--contract', 'config/robots/so101.yaml', '--out', str(tmp_path)])
    assert ended.value.code == 2 and f'il: bench latency needs {package}, which is not here: ' in capsys.readouterr().err
