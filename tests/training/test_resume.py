"""A run that is killed and resumed ends as one that never stopped, and nothing damaged is ever loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.training import DamagedCheckpoint, FewShotTrainer, checkpoint, find_checkpoint, read_checkpoint, resume
from fewshot_nlp.training.checkpoint import Checkpoint, list_checkpoints, prune_checkpoints, write_checkpoint
from tests.training.toy import ToyLearner, ToySampler, toy_args, toy_reader, toy_trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7, "logging_steps": 3, "warmup_steps": 2}
FILES = ("params.safetensors", "optimizer.safetensors", "trainer_state.json", "progress.json")


class Killed(Exception):
    """As if the machine had gone away."""


class Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


def resumable(log_history):
    """Everything but the clock."""
    return [{k: v for k, v in entry.items() if k != "episodes_per_second"} for entry in log_history]


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
@pytest.mark.parametrize("step", [3, 5])
def test_killed_and_resumed_is_bit_identical(tmp_path, optim, step):
    # Accuracy rises, so with greater_is_better=False every validation but the first counts against patience.
    settings = {**SAVING, "optim": optim, "eval_strategy": "steps", "eval_steps": 2, "early_stopping_patience": 9}
    settings["greater_is_better"] = False
    whole = toy_trainer(tmp_path / "whole", **settings)
    whole.train()
    with pytest.raises(Killed):
        toy_trainer(tmp_path / "killed", callbacks=[Kill(step)], **settings).train()
    resumed = toy_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 7
    assert torch.equal(resumed.params["head.w"], whole.params["head.w"])
    assert resumable(resumed.state.log_history) == resumable(whole.state.log_history)
    for kind in ("exp_avg", "exp_avg_sq", "step") if optim == "adamw" else ():
        ours, theirs = (t.optimizer.state[t.params["head.w"]][kind] for t in (resumed, whole))
        assert torch.equal(ours, theirs)
    assert resumed.state.best_metric == whole.state.best_metric
    patience = [t.callback_handler.callbacks[2].early_stopping_patience_counter for t in (resumed, whole)]
    assert patience[0] == patience[1] > 0


@pytest.mark.parametrize("save_strategy", ["best", "steps"])
@pytest.mark.parametrize("step", [1, 3])
def test_a_start_that_was_the_best_still_is_after_a_resume(tmp_path, save_strategy, step):
    # Accuracy rises, so with greater_is_better=False nothing betters the start.
    settings = {**SAVING, "save_strategy": save_strategy, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"eval_on_start": True, "load_best_model_at_end": True, "greater_is_better": False}
    whole = toy_trainer(tmp_path / "whole", **settings)
    start = whole.params["head.w"].detach().clone()
    whole.train()
    with pytest.raises(Killed):
        toy_trainer(tmp_path / "killed", callbacks=[Kill(step)], **settings).train()
    resumed = toy_trainer(tmp_path / "killed", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_global_step == whole.state.best_global_step == 0
    assert torch.equal(resumed.params["head.w"], start)
    assert torch.equal(whole.params["head.w"], start)
    assert resumable(resumed.state.log_history) == resumable(whole.state.log_history)


def test_process_that_dies_without_warning_resumes_to_the_bit(tmp_path):
    """The same with a real process and os._exit, which flushes and closes nothing."""
    script = """
import os, sys
from transformers import TrainerCallback
from tests.training.toy import toy_trainer
class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os._exit(9)
toy_trainer(sys.argv[1], callbacks=[Die], save_strategy="steps", save_steps=2, max_steps=7).train()
"""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, str(tmp_path / "killed")]
    assert subprocess.run(command, env=environment, cwd=root, capture_output=True, timeout=120).returncode == 9
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 7}
    resumed = toy_trainer(tmp_path / "killed", resume_from_checkpoint="true", **settings)
    resumed.train()
    whole = toy_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert torch.equal(resumed.params["head.w"], whole.params["head.w"])


def test_resume_from_a_named_folder(tmp_path):
    whole = toy_trainer(tmp_path / "a", **SAVING)
    whole.train()
    again = toy_trainer(tmp_path / "b", **SAVING, resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    again.train()
    assert torch.equal(again.params["head.w"], whole.params["head.w"])


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "delete"])
def test_damaged_checkpoint_is_named_and_passed_over(tmp_path, file, damage):
    toy_trainer(tmp_path, **SAVING).train()
    path = tmp_path / "checkpoint-7" / file
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "flip":
        content = bytearray(path.read_bytes())
        content[-3] ^= 1
        path.write_bytes(bytes(content))
    else:
        path.unlink()
    with pytest.raises(DamagedCheckpoint, match=f"checkpoint-7.*{file}"):
        read_checkpoint(tmp_path / "checkpoint-7")
    with pytest.warns(UserWarning, match=f"checkpoint-7.*{file}"):
        assert find_checkpoint(tmp_path).name == "checkpoint-6"


@pytest.mark.parametrize("content", ["", "[]", "{}", "{"])
def test_damaged_manifest_is_found(tmp_path, content):
    toy_trainer(tmp_path, **SAVING).train()
    (tmp_path / "checkpoint-7" / "manifest.json").write_text(content)
    with pytest.raises(DamagedCheckpoint, match="manifest"):
        read_checkpoint(tmp_path / "checkpoint-7")


@pytest.mark.parametrize("name", [".checkpoint-3.partial", ".checkpoint-2.stale", ".saving-xyz"])
def test_what_was_half_written_or_half_deleted_is_invisible_and_cleared(tmp_path, name):
    def leave_half():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "params.safetensors").write_bytes(b"half")

    leave_half()
    assert list_checkpoints(tmp_path) == []
    toy_trainer(tmp_path, **SAVING).train()
    assert not (tmp_path / name).exists()
    assert read_checkpoint(tmp_path / "checkpoint-2").state["global_step"] == 2
    leave_half()
    toy_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    assert not (tmp_path / name).exists()


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path, monkeypatch):
    old, new = (Checkpoint({"w": torch.full((3,), value)}, {}, {}, {}) for value in (0.0, 1.0))
    write_checkpoint(tmp_path, 1, old)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_files", lambda folder, content: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError, match="full"):
            write_checkpoint(tmp_path, 1, new)
    assert torch.equal(read_checkpoint(tmp_path / "checkpoint-1").params["w"], old.params["w"])
    write_checkpoint(tmp_path, 1, new)
    assert torch.equal(read_checkpoint(tmp_path / "checkpoint-1").params["w"], new.params["w"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_nothing_in_a_checkpoint_is_pickled(tmp_path):
    toy_trainer(tmp_path, **SAVING, hub_token="hf_secretsecret").train()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert {path.suffix for path in files} == {".json", ".jsonl", ".safetensors"}
    assert all(b"hf_secret" not in path.read_bytes() for path in files)
    manifest = json.loads((tmp_path / "checkpoint-7" / "manifest.json").read_text())
    assert set(manifest) == set(FILES)


def test_save_total_limit_keeps_the_newest(tmp_path):
    toy_trainer(tmp_path, **SAVING, save_total_limit=2).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-7"]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, 3, [1, 2, 3, 10]), (1, None, [10]), (1, 1, [1, 10]), (2, 1, [1, 10]), (3, 1, [1, 3, 10]), (1, 10, [10])],
)
def test_limit_never_deletes_the_best(tmp_path, limit, best, left):
    content = Checkpoint({"w": torch.zeros(1)}, {}, {}, {})
    for step in (1, 2, 3, 10):
        write_checkpoint(tmp_path, step, content)
    prune_checkpoints(tmp_path, limit, None if best is None else f"elsewhere/checkpoint-{best}")
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]


def test_a_new_run_does_not_mix_with_an_old_one(tmp_path):
    toy_trainer(tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match=r"another run \(checkpoint-7\).*resume_from_checkpoint.*overwrite_output_dir"):
        toy_trainer(tmp_path, **SAVING).train()
    toy_trainer(tmp_path, **{**SAVING, "save_steps": 5}, overwrite_output_dir=True).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-7"]


@pytest.mark.filterwarnings("ignore:Checkpoint .* is damaged")
@pytest.mark.parametrize("left", ["damaged checkpoints", "an adapter alone"])
@pytest.mark.parametrize("how", [None, "auto", "true"])
def test_where_nothing_is_sound_no_advice_leads_to_another_refusal(tmp_path, left, how):
    if left == "an adapter alone":
        (tmp_path / "fewshot_config.json").write_text("{}")
    else:
        toy_trainer(tmp_path, **SAVING).train()
        for folder in list_checkpoints(tmp_path):
            (folder / "manifest.json").write_text("{")
    message = r"no sound checkpoint\..* another output_dir.*overwrite_output_dir"
    with pytest.raises(ValueError, match=message) as refused:
        toy_trainer(tmp_path, **SAVING, resume_from_checkpoint=how).train()
    assert "resume_from_checkpoint: true" not in str(refused.value) and "auto" not in str(refused.value)
    toy_trainer(tmp_path, **SAVING, overwrite_output_dir=True).train()
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in (2, 4, 6, 7)]
    for folder in list_checkpoints(tmp_path):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "message"), [("config.json", "another model"), ("fewshot_config.json", "overwrite_output_dir")]
)
def test_a_new_run_does_not_write_over_a_model(tmp_path, file, message):
    (tmp_path / file).write_text("{}")
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, **SAVING).train()
    assert [path.name for path in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 1}, "seed=0.*seed=1"),
        ({"meta_batch_size": 4}, "meta_batch_size=3.*meta_batch_size=4"),
        ({"learning_rate": 0.2}, r"learning_rate=0\.1.*learning_rate=0\.2"),
        ({"optim": "sgd"}, "optim='adamw'.*optim='sgd'"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, settings, message):
    toy_trainer(tmp_path, **SAVING).train()
    with pytest.raises(ValueError, match=message):
        toy_trainer(tmp_path, **{**SAVING, **settings}).train(resume_from_checkpoint=True)


def test_other_episodes_or_parameters_are_not_resumed(tmp_path):
    toy_trainer(tmp_path, **SAVING).train()
    args = toy_args(tmp_path, **SAVING, resume_from_checkpoint="true")
    with pytest.raises(ValueError, match="other episodes"):
        FewShotTrainer(ToyLearner(), args, ToySampler(n_way=2), toy_reader).train()

    class Bigger(ToyLearner):
        def init_params(self):
            return {"head.w": torch.zeros(5, 5)}

    with pytest.raises(ValueError, match=r"head\.w of shape \(4, 3\)"):
        FewShotTrainer(Bigger(), args, ToySampler(), toy_reader).train()

    class More(ToyLearner):
        def init_params(self):
            return {**super().init_params(), "head.b": torch.zeros(3)}

    with pytest.raises(ValueError, match=r"head\.b"):
        FewShotTrainer(More(), args, ToySampler(), toy_reader).train()


def test_what_a_resumed_run_saves_outlives_what_it_passed_over(tmp_path):
    toy_trainer(tmp_path, **SAVING).train()
    resumed = toy_trainer(tmp_path, callbacks=[Kill(6)], **{**SAVING, "save_steps": 5, "save_total_limit": 1})
    with pytest.raises(Killed):
        resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-4")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-5"]


def test_another_method_is_not_resumed(tmp_path):
    """Its parameters may have the same names and shapes."""
    learner = ToyLearner()
    learner.config = FewShotConfig(learner="maml", inner_learning_rate=0.1)
    toy_trainer(tmp_path, learner, **SAVING).train()
    resumed = toy_trainer(tmp_path, learner, **SAVING)
    assert resumed.train(resume_from_checkpoint=True).global_step == 7
    learner.config = FewShotConfig(learner="fomaml", inner_learning_rate=0.1)
    with pytest.raises(ValueError, match="trained with learner='maml', and this run has learner='fomaml'"):
        toy_trainer(tmp_path, learner, **SAVING).train(resume_from_checkpoint=True)


def test_a_checkpoint_from_before_a_setting_was_there_has_its_default(tmp_path, monkeypatch):
    def before(trainer, run_of=resume._run_of):
        return {k: v for k, v in run_of(trainer).items() if k not in ("use_label_names", "frozen_dtype")}

    learner = ToyLearner()
    learner.config = FewShotConfig()
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_run_of", before)
        toy_trainer(tmp_path, learner, **SAVING).train()
    assert toy_trainer(tmp_path, learner, **SAVING).train(resume_from_checkpoint=True).global_step == 7
    learner.config = FewShotConfig(use_label_names=True)
    with pytest.raises(ValueError, match="trained with use_label_names=False, and this run has use_label_names=True"):
        toy_trainer(tmp_path, learner, **SAVING).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("step", [1, 5])
def test_auto_goes_on_or_begins(tmp_path, step):
    settings = {**SAVING, "resume_from_checkpoint": "auto"}
    with pytest.raises(Killed):
        toy_trainer(tmp_path / "killed", callbacks=[Kill(step)], **settings).train()
    assert bool(list_checkpoints(tmp_path / "killed")) == (step == 5)
    again = toy_trainer(tmp_path / "killed", **settings)
    again.train()
    whole = toy_trainer(tmp_path / "whole", **SAVING)
    whole.train()
    assert torch.equal(again.params["head.w"], whole.params["head.w"])


def test_a_run_that_stopped_early_is_not_trained_on(tmp_path):
    """Killed after its last step, for example in the test that follows."""
    settings = {**SAVING, "eval_strategy": "steps", "eval_steps": 2, "early_stopping_patience": 1}
    settings["greater_is_better"] = False
    whole = toy_trainer(tmp_path, **settings)
    assert whole.train().global_step == 4
    resumed = toy_trainer(tmp_path, **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 4
    assert torch.equal(resumed.params["head.w"], whole.params["head.w"])


def test_a_run_that_reached_its_last_step_can_be_made_longer(tmp_path):
    toy_trainer(tmp_path, **SAVING).train()
    assert toy_trainer(tmp_path, **{**SAVING, "max_steps": 9}).train(resume_from_checkpoint=True).global_step == 9


def test_a_checkpoint_beyond_the_last_step_is_refused(tmp_path):
    toy_trainer(tmp_path, **SAVING).train()
    shorter = toy_trainer(tmp_path, **{**SAVING, "max_steps": 2}, resume_from_checkpoint="true")
    message = r"checkpoint-7 is of step 7, beyond max_steps=2.*Use a max_steps above 7, or leave resume_from"
    for begin in (lambda: resume.check_resumable(shorter, tmp_path / "checkpoint-7"), shorter.train):
        with pytest.raises(ValueError, match=message):
            begin()
    again = toy_trainer(tmp_path, **{**SAVING, "max_steps": 2})
    assert again.train(resume_from_checkpoint=tmp_path / "checkpoint-2").global_step == 2


def test_nothing_to_resume_from_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no sound checkpoint"):
        toy_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    with pytest.raises(FileNotFoundError, match="checkpoint-99"):
        toy_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=tmp_path / "checkpoint-99")


def test_a_damaged_best_leaves_the_last_parameters(tmp_path):
    class Spoil(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            (Path(state.best_model_checkpoint) / "params.safetensors").write_bytes(b"")

    trainer = toy_trainer(
        tmp_path, callbacks=[Spoil], eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="damaged.*last step"):
        trainer.train()
    assert trainer.state.global_step == 6
    assert trainer.state.best_global_step is None


BEST = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
BEST |= {"load_best_model_at_end": True, "save_total_limit": 1}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"metric_for_best_model": "loss"}, "metric_for_best_model, greater_is_better"),
        ({"greater_is_better": False}, "greater_is_better"),
        ({"eval_episodes": 5}, "validation episodes"),
    ],
)
def test_a_best_that_cannot_be_compared_is_dropped(tmp_path, changed, named):
    toy_trainer(tmp_path, **BEST).train()
    resumed = toy_trainer(tmp_path, **{**BEST, "max_steps": 8}, **changed)
    with pytest.warns(UserWarning, match=f"checkpoint-6 was validated with other {named}: its best step"):
        resumed.train(resume_from_checkpoint=True)
    # Whatever the new validation found was the first.
    assert resumed.state.best_global_step == 8


def test_a_best_of_other_texts_is_dropped(tmp_path):
    class Pooled(ToySampler):
        def __init__(self, fingerprint):
            super().__init__("validation")
            self.pools = {"toy": SimpleNamespace(fingerprint=fingerprint)}

    def trainer(fingerprint, steps):
        args = toy_args(tmp_path, **{**BEST, "max_steps": steps})
        return FewShotTrainer(ToyLearner(), args, ToySampler(), toy_reader, {"1-shot": Pooled(fingerprint)})

    trainer("a", 4).train()
    trainer("a", 6).train(resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match="other validation episodes"):
        trainer("b", 8).train(resume_from_checkpoint=True)


def test_the_best_comes_along_to_another_folder(tmp_path):
    # Accuracy rises, so with greater_is_better=False the first validation is the best.
    settings = {**BEST, "greater_is_better": False, "save_total_limit": None}
    first = toy_trainer(tmp_path / "a", **settings)
    first.train()
    best = read_checkpoint(tmp_path / "a" / "checkpoint-2").params["head.w"]
    resumed = toy_trainer(tmp_path / "b", **{**settings, "max_steps": 8})
    resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-6")
    assert resumed.state.best_global_step == 2 and torch.equal(resumed.params["head.w"], best)
    assert [path.name for path in list_checkpoints(tmp_path / "b")] == [f"checkpoint-{step}" for step in (2, 6, 8)]


@pytest.mark.parametrize("best", [True, False])
def test_a_run_killed_in_a_new_folder_goes_on_from_what_it_was_resumed_from(tmp_path, best):
    """Before it has saved anything, and whatever best step came along."""
    settings = {**(BEST if best else SAVING), "greater_is_better": False, "save_total_limit": None, "save_steps": 3}
    settings["max_steps"] = 11
    with pytest.raises(Killed):
        toy_trainer(tmp_path / "a", callbacks=[Kill(7)], **settings).train()
    settings["eval_steps"] = 5
    with pytest.raises(Killed):
        toy_trainer(tmp_path / "b", callbacks=[Kill(8)], **settings).train(tmp_path / "a" / "checkpoint-6")
    seen = []

    class First(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            seen.append((state.global_step, state.best_global_step))

    again = toy_trainer(tmp_path / "b", callbacks=[First], **settings, resume_from_checkpoint="auto")
    again.train()
    assert seen == [(6, 2 if best else None)]
    whole = toy_trainer(tmp_path / "whole", **{**settings, "load_best_model_at_end": False})
    whole.train()
    ours, theirs = (read_checkpoint(tmp_path / name / "checkpoint-11").params["head.w"] for name in ("b", "whole"))
    assert torch.equal(ours, theirs)


def test_a_run_that_saves_nothing_takes_nothing_along(tmp_path):
    toy_trainer(tmp_path / "a", **SAVING).train()
    again = toy_trainer(tmp_path / "b", **{**SAVING, "save_strategy": "no"})
    again.train(tmp_path / "a" / "checkpoint-4")
    assert list_checkpoints(tmp_path / "b") == []


@pytest.mark.parametrize("left", ["nothing", "damaged"])
def test_a_best_that_is_gone_is_dropped(tmp_path, left):
    settings = {**BEST, "greater_is_better": False, "save_total_limit": None}
    toy_trainer(tmp_path / "a", **settings).train()
    if left == "nothing":
        shutil.rmtree(tmp_path / "a" / "checkpoint-2")
    else:
        (tmp_path / "a" / "checkpoint-2" / "params.safetensors").write_bytes(b"")
    resumed = toy_trainer(tmp_path / "b", **{**settings, "max_steps": 8})
    with pytest.warns(UserWarning, match=r"The best step of .*checkpoint-6, 2, cannot be loaded, and is dropped: .*-2"):
        resumed.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-6")
    assert resumed.state.best_global_step == 8
