"""Damaged files of every kind: a right result or an error that names a file, within 10 s and 1 GiB.

All targets run in one process of their own, whose memory is limited. FUZZ_SECONDS is the time for each.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("FUZZ_SECONDS", "2"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "FUZZ_SECONDS": str(SECONDS),
        "FUZZ_OUTPUT": str(tmp_path_factory.mktemp("fuzz")),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.run"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"target": ')]
    return {line["target"]: line for line in lines}, done


@pytest.mark.timeout(300 + len(TARGETS) * (3 * SECONDS + 30))
@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(results, name):
    found, done = results
    assert name in found, f"the process ended with {done.returncode} before this target: {done.stderr[-3000:]}"
    assert "failed" not in found[name], f"{found[name]['files']}: {found[name]['failed']}"
    assert found[name]["inputs"] >= 25
