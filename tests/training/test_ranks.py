"""Two processes train to the same parameters as one that is given the same tasks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewshot_nlp.training import read_checkpoint
from tests.training.rank_worker import CASES

ROOT = Path(__file__).parents[2]


def launch(out: Path, bert: str, world_size: int) -> None:
    out.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command = [sys.executable, *torchrun, "tests/training/rank_worker.py", str(out), bert, str(world_size)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bert_folder):
    """Folders of what one process and what two processes left."""
    parent = tmp_path_factory.mktemp("ranks")
    for world_size in (1, 2):
        launch(parent / str(world_size), bert_folder, world_size)
    return parent / "1", parent / "2"


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(runs, case):
    one, two = (load_file(folder / f"{case}.safetensors") for folder in runs)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(
            two[name], one[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
    moved = [float((one[name] - one[f"start.{name}"]).abs().max()) for name in one if not name.startswith("start.")]
    assert max(moved) > 1e-5


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_validate_as_one(runs):
    one, two = (json.loads((folder / "metrics.json").read_text()) for folder in runs)
    for case in CASES:
        assert len(one[case]) == 2
        for ours, theirs in zip(two[case], one[case], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.processes
@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_is_sound(runs):
    for folder in runs:
        for case in CASES:
            steps = CASES[case].steps
            assert read_checkpoint(folder / case / f"checkpoint-{steps}").state["global_step"] == steps
