"""Settings are checked when they are built, and callbacks find what they read."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
from accelerate.tracking import get_available_trackers
from transformers import TrainingArguments

from fewshot_nlp.training import FewShotTrainingArguments
from fewshot_nlp.training.accelerator import build_accelerator, check_trackers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_steps": 0}, r"max_steps=0 .*at least 1"),
        ({"max_steps": 1.5}, r"max_steps=1\.5 must be of type int"),
        ({"max_steps": True}, r"max_steps=True must be of type int"),
        ({"learning_rate": "1e-4"}, r"learning_rate='1e-4' must be of type float.*1\.0e-4"),
        ({"learning_rate": -1.0}, r"learning_rate=-1\.0 .*at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"adam_beta1": 1.0}, r"adam_beta1=1\.0 .*below 1"),
        ({"meta_batch_size": 0}, "meta_batch_size=0"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"optim": "lion"}, "optim='lion' .*adamw, sgd"),
        ({"lr_scheduler_type": "linaer"}, "lr_scheduler_type='linaer'"),
        ({"eval_strategy": "epoch"}, "eval_strategy='epoch' .*no, steps"),
        (
            {"eval_strategy": "no", "load_best_model_at_end": True},
            "needs validation.*or leave load_best_model_at_end out",
        ),
        ({"eval_strategy": "no", "early_stopping_patience": 1}, "early_stopping_patience needs validation"),
        ({"eval_strategy": "no", "save_strategy": "best"}, "save_strategy='best' needs validation"),
        ({"save_strategy": "no", "load_best_model_at_end": True}, "needs checkpoints"),
        ({"save_total_limit": 0}, "save_total_limit=0"),
        ({"early_stopping_patience": 0}, "early_stopping_patience=0"),
        ({"bf16": "yes"}, "bf16='yes' must be of type bool"),
        ({"output_dir": 5}, "output_dir=5 must be of type str"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"run_name": 5}, "run_name=5 must be of type str"),
        ({"report_to": [1]}, "report_to=1 must be of type str"),
    ],
)
def test_bad_values_are_named(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        FewShotTrainingArguments(**{"output_dir": str(tmp_path), **settings})


def test_output_dir_that_cannot_be_written(tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    for path in (file, file / "run"):
        with pytest.raises(ValueError, match=r"output_dir=.* cannot be written.*Give a folder"):
            FewShotTrainingArguments(output_dir=str(path))
    if Path("/proc/self").is_dir():
        with pytest.raises(ValueError, match="cannot be written"):
            FewShotTrainingArguments(output_dir="/proc/self/run")


def test_checking_makes_no_folder(tmp_path):
    FewShotTrainingArguments(output_dir=str(tmp_path / "a" / "b"))
    assert list(tmp_path.iterdir()) == []


def test_names_are_those_of_transformers():
    ours = {field.name for field in fields(FewShotTrainingArguments)}
    own = {
        "adam_epsilon", "baseline_episodes", "baseline_learning_rate", "baseline_steps", "cpu_threads",
        "early_stopping_patience", "early_stopping_threshold",
        "eval_episodes", "max_skipped_steps", "meta_batch_size", "overwrite_output_dir", "test_episodes",
        "weight_interpolation",
    }  # fmt: skip
    assert ours - {field.name for field in fields(TrainingArguments)} == own - {"adam_epsilon"}


def test_token_is_never_shown(tmp_path):
    args = FewShotTrainingArguments(output_dir=str(tmp_path), hub_token="hf_secret")
    for shown in (repr(args), str(args), args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())):
        assert "hf_secret" not in shown
    assert json.loads(args.to_json_string())["learning_rate"] == args.learning_rate


def test_conveniences(tmp_path):
    args = FewShotTrainingArguments(
        output_dir=str(tmp_path), learning_rate=1, report_to="none", resume_from_checkpoint=True, optim="adamw_torch",
        test_episodes=7, metric_for_best_model="loss", meta_batch_size=3, gradient_accumulation_steps=2,
    )  # fmt: skip
    assert args.learning_rate == 1.0
    assert type(args.learning_rate) is float
    assert args.trackers == []
    assert args.resume_from_checkpoint == "true"
    assert args.optim == "adamw"
    assert args.baseline_episodes == 7
    assert args.greater_is_better is False
    assert args.episodes_per_step == 6
    assert (
        FewShotTrainingArguments(output_dir=str(tmp_path), resume_from_checkpoint=False).resume_from_checkpoint is None
    )


def test_unknown_tracker_names_the_known_ones():
    with pytest.raises(ValueError, match=r"report_to='tensorbord' .*tensorboard"):
        check_trackers(["tensorbord"])


def test_missing_tracker_is_an_error_before_training(tmp_path):
    absent = {"aim", "swanlab", "dvclive"} - {str(name) for name in get_available_trackers()}
    if not absent:
        pytest.skip("every tracker is installed")
    name = sorted(absent)[0]
    with pytest.raises(ImportError, match=f"report_to='{name}' .*pip install"):
        build_accelerator(FewShotTrainingArguments(output_dir=str(tmp_path), report_to=[name]))


def test_fp16_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="bf16"):
        build_accelerator(FewShotTrainingArguments(output_dir=str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("bf16", [True, False])
def test_a_run_does_not_take_over_the_precision_of_one_before_it(tmp_path, bf16):
    first = build_accelerator(FewShotTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=bf16))
    assert first.mixed_precision == ("bf16" if bf16 else "no")
    with pytest.raises(ValueError, match=f"mixed_precision='{'no' if bf16 else 'bf16'}'"):
        build_accelerator(FewShotTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=not bf16))


def test_the_precision_of_the_launcher_holds_where_none_is_set(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = build_accelerator(FewShotTrainingArguments(output_dir=str(tmp_path), use_cpu=True))
    assert accelerator.mixed_precision == "bf16"


def test_a_launcher_that_starts_one_process_of_several_is_no_secret(tmp_path, monkeypatch):
    """`accelerate launch --cpu --num_processes 2` sets these and no more."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    args = FewShotTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.warns(UserWarning, match=r"starts this one alone.*torchrun --nproc_per_node"):
        assert build_accelerator(args).num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "1")
    build_accelerator(args)


def test_a_compiler_is_refused(tmp_path, monkeypatch):
    args = FewShotTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    build_accelerator(args)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(ValueError, match="dynamo_backend='inductor' would change nothing"):
        build_accelerator(args)
