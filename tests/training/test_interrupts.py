"""A run that is told to leave saves, says how to go on, and goes on as if it had not been told."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from fewshot_nlp.training import interrupts
from fewshot_nlp.training.interrupts import Interrupted, Listener, leaving_at_once
from tests.training.test_resume import SAVING, resumable
from tests.training.toy import ToyLearner, toy_trainer

RUN = {**SAVING, "save_steps": 5, "logging_steps": 1, "gradient_accumulation_steps": 2}


class Tell(ToyLearner):
    """Sends the process a signal when it is asked for the gradient of an episode."""

    def __init__(self, number, index):
        self.number, self.index = number, index

    def meta_grad(self, params, episodes):
        if any(episode.spec.index == self.index for episode in episodes):
            os.kill(os.getpid(), self.number)
        return super().meta_grad(params, episodes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("index", [0, 20, 23])
def test_it_saves_leaves_and_goes_on_to_the_bit(tmp_path, capsys, number, code, index):
    """Before the first step, in the first and in the second round of a step of six episodes."""
    before = {each: signal.getsignal(each) for each in interrupts.SIGNALS}
    with pytest.raises(Interrupted) as told:
        toy_trainer(tmp_path / "told", Tell(number, index), **RUN).train()
    assert told.value.code == code
    assert {each: signal.getsignal(each) for each in interrupts.SIGNALS} == before
    step = index // 6
    assert [path.name for path in (tmp_path / "told").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    said = capsys.readouterr().err
    assert f"{signal.Signals(number).name}: left after step {step} of 7. Saved {tmp_path}" in said
    assert "--resume_from_checkpoint true" in said
    resumed, whole = toy_trainer(tmp_path / "told", **RUN), toy_trainer(tmp_path / "whole", **RUN)
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert torch.equal(resumed.params["head.w"], whole.params["head.w"])
    assert resumable(resumed.state.log_history) == resumable(whole.state.log_history)


def test_a_signal_between_two_steps_is_heard_in_the_next(tmp_path):
    class Between(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        toy_trainer(tmp_path, callbacks=[Between], **RUN).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


LAST = {**RUN, "save_steps": 100, "eval_strategy": "steps", "eval_steps": 7}


def test_a_signal_in_the_last_validation_is_heard(tmp_path, capsys):
    class InValidation(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as told:
        toy_trainer(tmp_path, callbacks=[InValidation], **LAST).train()
    assert told.value.code == 143 and "left after step 7 of 7. Saved" in capsys.readouterr().err
    assert toy_trainer(tmp_path, **LAST).train(resume_from_checkpoint=True).global_step == 7


def test_a_signal_that_another_rank_heard_in_the_last_validation_counts(tmp_path, monkeypatch):
    trainer, reduce = toy_trainer(tmp_path, **LAST), Accelerator.reduce

    def summed(self, tensor, **how):
        # The other rank hears it once all steps are done.
        told = tensor.numel() == 1 and trainer.state.global_step == 7
        return reduce(self, tensor, **how) + (signal.SIGTERM if told else 0)

    monkeypatch.setattr(Accelerator, "reduce", summed)
    with pytest.raises(Interrupted):
        trainer.train()
    assert (tmp_path / "checkpoint-7").is_dir()


def test_a_signal_after_the_last_look_comes_again(tmp_path, capsys):
    class AtTheEnd(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted), leaving_at_once("Go on."):
        toy_trainer(tmp_path, callbacks=[AtTheEnd], **RUN).train()
    assert capsys.readouterr().err.endswith("\nSIGTERM: Go on.\n")


def test_without_checkpoints_it_says_so(tmp_path, capsys):
    with pytest.raises(Interrupted):
        toy_trainer(tmp_path, Tell(signal.SIGTERM, 5)).train()
    assert "Nothing was saved, as save_strategy=no" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_second_signal_kills_and_an_echo_of_the_first_does_not(monkeypatch):
    now, raised = [10.0], []
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signal, "raise_signal", lambda number: raised.append((number, signal.getsignal(number))))
    listener = Listener()
    with listener.listening():
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += interrupts.ECHO / 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert listener.heard == signal.SIGINT and not raised
        now[0] += interrupts.ECHO
        os.kill(os.getpid(), signal.SIGTERM)
    # Killed by the second; here the block goes on to its end, and nobody has acted on the first.
    assert raised[0] == (signal.SIGTERM, signal.SIG_DFL)
    assert [number for number, _ in raised[1:]] == [signal.SIGINT]


def test_where_nothing_needs_saving_the_first_signal_ends_it(capsys):
    with pytest.raises(Interrupted) as told, leaving_at_once("Go on."):
        os.kill(os.getpid(), signal.SIGTERM)
    assert told.value.code == 143
    assert capsys.readouterr().err == "\nSIGTERM: Go on.\n"
