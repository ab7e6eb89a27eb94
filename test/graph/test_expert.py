from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from support import ROOT, patient_contract

CONTRACT = ROOT / 'config/robots/so101.yaml'


def expert(*parameters: str) -> subprocess.CompletedProcess:
    arguments = [part for parameter in (f'contract:={CONTRACT}', *parameters) for part in ('-p', parameter)]
    return subprocess.run([sys.executable, '-m', 'il_runtime.expert_node', '--ros-args', *arguments], timeout=120,
                          capture_output=True, text=True)


def test_it_has_each_scene_recorded_round_both_sides(nodes, tmp_path):
    nodes.start('simulator_node', contract=CONTRACT, real_time_factor=3.0, publish_clock='true')
    nodes.start('controller_node', contract=patient_contract(tmp_path), use_sim_time='true')
    nodes.start('recorder_node', contract=CONTRACT, use_sim_time='true', output=tmp_path / 'bags')
    done = expert('use_sim_time:=true', 'demonstrations:=2', 'seed:=5')
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('demonstration') and 'repeated' not in line]
    assert lines == ['demonstration 1/2 left reached', 'demonstration 2/2 right reached']
    bags = sorted((tmp_path / 'bags').iterdir())
    assert [bag.name for bag in bags] == ['scene_0000_left', 'scene_0000_right']
    for bag in bags:
        facts = yaml.safe_load((bag / 'metadata.yaml').read_text())['rosbag2_bagfile_information']
        counts = {entry['topic_metadata']['name']: entry['message_count']
                  for entry in facts['topics_with_message_count']}
        assert facts['custom_data']['success'] == 'true' and bag.name.split('_')[-1] in facts['custom_data']['task']
        assert facts['duration']['nanoseconds'] > 3.0e9  # of simulated time
        assert counts['/command'] > 150 and counts['/joint_states'] > 300 and counts['/camera/image/compressed'] > 30
    assert all(nodes.stop(name) == 0 for name in list(nodes.processes))


def test_what_makes_no_session_is_refused_in_one_line():
    done = expert('demonstrations:=3')
    assert done.returncode == 2 and 'must be even' in done.stderr.splitlines()[-1]
    done = expert('goals:=far')
    assert done.returncode == 2 and "goals is 'far'; valid: narrow, wide" in done.stderr.splitlines()[-1]


def test_a_session_names_who_does_not_answer(ros):
    from il_runtime.session import Session, SessionError
    node = ros.create_node('lonely')
    session = Session(node)
    session.silence_s = 0.5
    with pytest.raises(SessionError, match='controller/stop: nobody offers this service'):
        session.stop()
    with pytest.raises(SessionError, match='controller/status is silent for 0.5 s; publishers: 0'):
        session.wait_status(lambda controller, task: True, timeout=1.0)
    session.close()
    node.destroy_node()
