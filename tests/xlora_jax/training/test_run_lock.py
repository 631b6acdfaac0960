"""Two processes on one run's directory: the second is told who is there, and a dead one holds nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from xlora_jax.training.run_lock import RunLockedError, run_lock

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[2])
from xlora_jax.training.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run"), str(Path(__file__).parents[3])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        match = rf"run: another process .* pid {process.pid} on host \S+"
        with pytest.raises(RunLockedError, match=match) as caught, run_lock(tmp_path / "run"):
            pass
        assert isinstance(caught.value, OSError)
        process.send_signal(signal.SIGKILL)
    own = f"pid {os.getpid()}"
    with run_lock(tmp_path / "run"), pytest.raises(RunLockedError, match=own), run_lock(tmp_path / "run"):
        pass
    with run_lock(tmp_path / "run"):
        pass


def test_a_link_in_its_place_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"), run_lock(tmp_path):
        pass
    assert victim.read_text() == "untouched"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x"}'])
def test_a_damaged_name_of_the_holder(tmp_path, content):
    with run_lock(tmp_path):
        (tmp_path / ".lock").write_text(content)
        with pytest.raises(RunLockedError, match="its pid is not known"), run_lock(tmp_path):
            pass
