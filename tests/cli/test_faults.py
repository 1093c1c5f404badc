"""What ends a run before its time is one line on the terminal and an exit code, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal

import pytest
from accelerate.state import AcceleratorState

from fewshot_nlp.cli import train
from fewshot_nlp.cli.train import main
from fewshot_nlp.data import Pool
from fewshot_nlp.hub import files
from fewshot_nlp.training import FewShotTrainer
from fewshot_nlp.training.metrics_log import read_reports

SAVING = ["--save_strategy", "steps", "--save_steps", "1", "--adapter", "lora", "--resume_from_checkpoint", "auto"]


def without_clock(value):
    if not isinstance(value, dict):
        return value
    clocks = ("seconds", "runtime", "per_second")
    return {name: without_clock(each) for name, each in value.items() if not any(clock in name for clock in clocks)}


def results_of(folder):
    return without_clock(json.loads((folder / "results.json").read_text()))


@pytest.fixture
def whole(tiny, tmp_path):
    """Results and adapter of the run that is never disturbed."""
    main([*tiny, *SAVING, "--output_dir", str(tmp_path / "whole")])
    AcceleratorState._reset_state(reset_partial_state=True)
    return results_of(tmp_path / "whole"), (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("phase", ["training", "test"])
def test_sigterm_leaves_and_the_same_command_goes_on(tiny, tmp_path, whole, monkeypatch, capsys, phase):
    owner, name = (FewShotTrainer, "_optimizer_step") if phase == "training" else (train, "_test")
    told = getattr(owner, name)

    def told_to_leave(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return told(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, told_to_leave)
        with pytest.raises(SystemExit) as left:
            main([*tiny, *SAVING])
    assert left.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert {"training": "left after step 1 of 4. Saved", "test": "left without results"}[phase] in said
    assert "--resume_from_checkpoint true" in said
    assert not (tmp_path / "out" / "results.json").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*tiny, *SAVING])
    assert results_of(tmp_path / "out") == whole[0]
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == whole[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", ["load_pools_from_config", "build_learner", "FewShotTrainer"])
def test_a_signal_before_training_leaves_in_one_line(tiny, tmp_path, monkeypatch, capsys, number, at):
    loaded = getattr(train, at)

    def told_to_leave(*args, **kwargs):
        os.kill(os.getpid(), number)
        return loaded(*args, **kwargs)

    before = signal.getsignal(number)
    monkeypatch.setattr(train, at, told_to_leave)
    with pytest.raises(SystemExit) as left:
        main([*tiny, *SAVING])
    assert left.value.code == 128 + number and signal.getsignal(number) == before
    said = capsys.readouterr().err
    name = signal.Signals(number).name
    assert said.endswith(f"\n{name}: left while the run was prepared; nothing was trained yet.\n")
    assert not (tmp_path / "out").exists()


def test_data_that_go_away_are_one_line(tiny, tmp_path, monkeypatch):
    reads = []

    def examples(pool, rows, read=Pool.examples):
        reads.append(pool.split)
        if reads.count("validation") > 2:
            raise OSError("[Errno 5] Input/output error.")
        return read(pool, rows)

    started = train.execute

    def execute(run):
        monkeypatch.setattr(Pool, "examples", examples)
        return started(run)

    monkeypatch.setattr(train, "execute", execute)
    with pytest.raises(SystemExit, match=r"^error: The episode sentences/validation/\d cannot be read: .Errno 5."):
        main([*tiny, *SAVING])
    assert [entry["step"] for entry in read_reports(tmp_path / "out")] == [1, 2]


def test_a_disk_that_is_full_at_the_end_is_one_line(tiny, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.shutil, "copymode", full)
    with pytest.raises(SystemExit, match=r"^error: The adapter cannot be saved to .*No space left on device. Free"):
        main([*tiny, *SAVING])
    out = tmp_path / "out"
    assert not (out / "results.json").exists() and (out / "checkpoint-4").is_dir()
    assert list(out.glob(".saving-*")) == []


def test_gradients_that_are_not_finite_are_one_line(tiny, tmp_path):
    wild = ["--learner", "maml", "--inner_learning_rate", "1e30", "--inner_steps", "3", "--max_skipped_steps", "2"]
    diverges = pytest.warns(UserWarning, match=r"sentences/train/\d \(its inner loop diverges at step \d\)")
    with diverges, pytest.raises(SystemExit, match=r"^error: 2 steps in a row .* Step 2 is saved"):
        main([*tiny, *SAVING, *wild])
    assert (tmp_path / "out" / "checkpoint-2").is_dir()


def test_a_curve_that_cannot_be_drawn_takes_nothing_with_it(tiny, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(27, "File too large")

    monkeypatch.setattr(train, "learning_curve", full)
    with pytest.warns(UserWarning, match=r"learning_curve\.png cannot be drawn: .*File too large"):
        main([*tiny, *SAVING])
    out = tmp_path / "out"
    assert (out / "results.json").is_file() and (out / "adapter_model.safetensors").is_file()
    assert "learning_curve" not in (out / "README.md").read_text() and not (out / "learning_curve.png").exists()
