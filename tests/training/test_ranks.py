"""Any number of processes trains to the parameters that one reaches on the same tasks, and none waits for ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewshot_nlp.training import read_checkpoint
from tests.training.rank_worker import CASES, STOPPED_AT, cases_of

ROOT = Path(__file__).parents[2]
SIZES = (1, 2, 4)

pytestmark = [pytest.mark.processes, pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bert_folder):
    """The folder of what runs on one, two and four processes left, and of what happened to three."""
    out = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "tests/training/rank_worker.py", str(out), bert_folder, *map(str, SIZES)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    codes = json.loads((out / "codes.json").read_text())
    for size in SIZES:
        assert codes[f"train on {size}"] == codes[f"go on on {size}"] == [0] * size, done.stderr[-3000:]
    return out


def codes(runs, name):
    return json.loads((runs / "codes.json").read_text())[name]


@pytest.mark.parametrize(("size", "case"), [(size, case) for size in SIZES[1:] for case in cases_of(size)])
def test_ranks_equal_one(runs, size, case):
    one, many = (load_file(runs / str(each) / f"{case}.safetensors") for each in (1, size))
    assert one.keys() == many.keys()
    close = 1e-9 if CASES[case].dtype == torch.float64 else 1e-6
    for name in one:
        assert many[name].dtype == CASES[case].dtype
        torch.testing.assert_close(
            many[name], one[name], rtol=0, atol=close, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = [float((one[name] - one[f"start.{name}"]).abs().max()) for name in one if not name.startswith("start.")]
    assert max(moved) > 1e-5


@pytest.mark.parametrize("size", SIZES[1:])
def test_ranks_validate_as_one(runs, size):
    one, many = (json.loads((runs / str(each) / "metrics.json").read_text()) for each in (1, size))
    for case in cases_of(size):
        assert len(one[case]) == 2
        for ours, theirs in zip(many[case], one[case], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_checkpoint_of_any_number_of_ranks_is_sound(runs):
    for size in SIZES:
        for case, (*_, steps, _, _) in cases_of(size).items():
            assert read_checkpoint(runs / str(size) / case / f"checkpoint-{steps}").state["global_step"] == steps


def test_one_rank_that_is_told_to_leave_takes_the_others_along(runs):
    assert codes(runs, "told") == [128 + signal.SIGTERM] * 3
    folder = runs / "told" / "run"
    assert read_checkpoint(folder / f"checkpoint-{STOPPED_AT}").state["global_step"] == STOPPED_AT


@pytest.mark.parametrize("size", SIZES)
def test_a_run_of_three_ranks_goes_on_on_any_number(runs, size):
    whole, resumed = (
        load_file(runs / "1" / "lora-maml-3.safetensors"),
        load_file(runs / f"on-{size}" / "end.safetensors"),
    )
    for name, value in resumed.items():
        torch.testing.assert_close(value, whole[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["killed", "halted"])
def test_a_rank_that_dies_or_halts_ends_the_run_in_time_with_one_readable_error(runs, what):
    assert codes(runs, what) == [1, 1, -signal.SIGKILL]
    seconds, _, said = (runs / what / "0.txt").read_text().partition(" ")
    assert float(seconds) < 20 + 60
    assert "did not answer within ddp_timeout=20 seconds, as process 0 of 3 found" in said
    assert "--resume_from_checkpoint true" in said
    assert len(said.splitlines()) == 1
    # What was saved before is sound.
    assert read_checkpoint(runs / what / "run" / "checkpoint-4").state["global_step"] == 4
