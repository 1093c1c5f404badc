"""The outer loop against arithmetic done by hand."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.evaluation import evaluate
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.joint import JointOptions
from fewshot_nlp.training import FewShotTrainer
from fewshot_nlp.training.lifelong import LifelongArguments, learn_stream
from fewshot_nlp.training.optimization import build_optimizer
from tests.tiny import tiny_config
from tests.training.toy import ToyLearner, ToySampler, mean_gradient, toy_args, toy_reader, toy_trainer

SGD = {"optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0}


def weights(trainer):
    return trainer.params["head.w"].detach()


def test_one_step_is_start_minus_rate_times_mean_gradient(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=1, **SGD)
    start = weights(trainer).clone()
    out = trainer.train()
    assert out.global_step == 1
    torch.testing.assert_close(weights(trainer), start - 0.1 * mean_gradient(start, range(3)))


def test_second_step_uses_the_next_episodes(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=2, **SGD)
    w = weights(trainer).clone()
    trainer.train()
    for indices in (range(0, 3), range(3, 6)):
        w = w - 0.1 * mean_gradient(w, indices)
    torch.testing.assert_close(weights(trainer), w)


def test_accumulation_equals_a_bigger_batch(tmp_path):
    small = toy_trainer(tmp_path, meta_batch_size=2, gradient_accumulation_steps=3)
    large = toy_trainer(tmp_path, meta_batch_size=6)
    small.train()
    large.train()
    torch.testing.assert_close(weights(small), weights(large), rtol=1e-6, atol=1e-6)


def test_gradient_is_clipped_to_the_norm(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=1, **{**SGD, "max_grad_norm": 0.01})
    start = weights(trainer).clone()
    trainer.train()
    gradient = mean_gradient(start, range(3))
    assert gradient.norm() > 0.1
    torch.testing.assert_close(weights(trainer), start - 0.1 * 0.01 * gradient / gradient.norm(), rtol=1e-4, atol=1e-7)


def test_learning_rate_falls_once_a_step_with_warmup(tmp_path):
    seen = []

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[0]["lr"])

    toy_trainer(tmp_path, callbacks=[Rates], max_steps=6, warmup_steps=2, gradient_accumulation_steps=2).train()
    assert seen == pytest.approx([0.0, 0.05, 0.1, 0.075, 0.05, 0.025])


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_only_matrices_decay(tmp_path, optim):
    shapes = {"model.lora_A.weight": (2, 3), "model.norm.weight": (3,), "model.bias": (3,), "head.log_scale": ()}
    shapes |= {"rule.rate.model.lora_A.weight": (2, 3), "features.centre": (3,), "features.whitening": (3, 3)}
    params = {name: torch.nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}
    optimizer = build_optimizer(params, toy_args(tmp_path, optim=optim, weight_decay=0.5, learning_rate=0.1))
    for param in params.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    decayed = {name for name, value in params.items() if not torch.equal(value, torch.ones_like(value))}
    assert decayed == {"model.lora_A.weight"}


def test_adamw_with_weight_decay_equals_torch(tmp_path):
    trainer = toy_trainer(
        tmp_path, max_steps=3, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3,
        max_grad_norm=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    w = torch.nn.Parameter(weights(trainer).clone())
    optimizer = torch.optim.AdamW([w], lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.1)
    trainer.train()
    for step in range(3):
        w.grad = mean_gradient(w.detach(), range(3 * step, 3 * step + 3))
        optimizer.step()
    torch.testing.assert_close(weights(trainer), w.detach())


def test_a_share_of_what_training_changed_is_validated_and_kept(tmp_path):
    """The steps themselves are those of a run that keeps all."""
    whole = toy_trainer(tmp_path / "whole", **SGD)
    start = weights(whole).clone()
    whole.train()
    evaluation = {"eval_strategy": "steps", "eval_steps": 6}
    part = toy_trainer(tmp_path / "part", weight_interpolation=0.25, **evaluation, **SGD)
    part.train()
    kept = part.detached_params()
    torch.testing.assert_close(kept["head.w"], start + 0.25 * (weights(whole) - start))
    shared = part.evaluate_on(part.eval_specs["1-shot"], part.learner, kept)
    assert part.state.log_history[-1]["eval_1-shot_loss"] == pytest.approx(shared.loss, rel=1e-6)
    # What is tested after training is what is kept, and not a share of that share.
    assert part.evaluate_on(part.eval_specs["1-shot"]).loss == pytest.approx(shared.loss, rel=1e-6)
    assert part.evaluate()["eval_1-shot_loss"] == pytest.approx(shared.loss, rel=1e-6)


def test_training_starts_at_the_parameters_that_are_given(tmp_path):
    given = {"head.w": torch.full((4, 3), 0.5)}
    trainer = FewShotTrainer(
        ToyLearner(), toy_args(tmp_path, max_steps=1, **SGD), ToySampler(), toy_reader, params=given
    )
    trainer.train()
    torch.testing.assert_close(weights(trainer), given["head.w"] - 0.1 * mean_gradient(given["head.w"], range(3)))
    assert (given["head.w"] == 0.5).all()


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_is_above_none_and_up_to_all(tmp_path, share):
    with pytest.raises(ValueError, match=f"weight_interpolation={share} is out of range"):
        toy_args(tmp_path, weight_interpolation=share)


def test_user_callback_sees_every_event_in_order(tmp_path):
    events = []

    class Recorder(TrainerCallback):
        def __getattribute__(self, name):
            if name.startswith("on_"):
                return lambda args, state, control, **kwargs: events.append((name, state.global_step))
            return super().__getattribute__(name)

    toy_trainer(
        tmp_path, callbacks=[Recorder()], max_steps=2, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
    ).train()  # fmt: skip
    step = ["on_step_begin", "on_substep_end", "on_pre_optimizer_step", "on_optimizer_step"]
    assert events == [
        ("on_init_end", 0), ("on_train_begin", 0), ("on_epoch_begin", 0),
        *[(name, 0) for name in step], ("on_step_end", 1),
        *[(name, 1) for name in step], ("on_step_end", 2),
        ("on_log", 2), ("on_log", 2), ("on_evaluate", 2), ("on_save", 2),
        ("on_epoch_end", 2), ("on_train_end", 2),
    ]  # fmt: skip


def test_user_callback_can_stop_training(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3
            return control

    assert toy_trainer(tmp_path, callbacks=[Stop]).train().global_step == 3


def test_log_history_holds_means_since_the_last_log(tmp_path):
    trainer = toy_trainer(tmp_path, max_steps=4, logging_steps=2, logging_first_step=True)
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history] == [1, 2, 4]
    first = trainer.state.log_history[0]
    result = ToyLearner().meta_grad(ToyLearner().init_params(), [toy_reader(ToySampler()[i]) for i in range(3)])
    assert first["loss"] == pytest.approx(float(result.loss) / 3)
    assert first["accuracy"] == pytest.approx(float(result.accuracy) / 3)
    assert first["grad_norm"] == pytest.approx(float(result.grads["head.w"].norm()) / 3)
    assert first["episodes_per_second"] > 0


def test_validation_is_the_mean_over_samplers(tmp_path):
    trainer = toy_trainer(tmp_path, eval_strategy="steps", eval_steps=2, eval_on_start=True, eval_episodes=3)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4, 6]
    for entry in entries:
        for metric in ("accuracy", "loss"):
            mean = (entry[f"eval_1-shot_{metric}"] + entry[f"eval_5-shot_{metric}"]) / 2
            assert entry[f"eval_{metric}"] == pytest.approx(mean)
    by_hand = []
    for i in range(3):
        episode = toy_reader(ToySampler("validation")[i])
        answers = (episode.query.inputs["x"] @ ToyLearner().init_params()["head.w"]).argmax(-1)
        by_hand.append((answers == episode.query.labels).float().mean())
    assert entries[0]["eval_1-shot_accuracy"] == pytest.approx(float(sum(by_hand)) / 3)


class Scripted(FewShotTrainer):
    """A trainer whose validation gives the numbers it is told."""

    script: tuple[float, ...] = ()

    def evaluate(self):
        value = self.script[self.state.global_step - (not self.args.eval_on_start)]
        metrics = {"eval_accuracy": value, "eval_loss": -value}
        self.log(metrics)
        self._notify("on_evaluate", metrics=metrics)
        return metrics


def scripted(tmp_path, script, callbacks=(), **settings):
    """Validation gives ``script``, step by step; its first number is the start's with ``eval_on_start``."""
    steps = len(script) - settings.get("eval_on_start", False)
    args = toy_args(tmp_path, eval_strategy="steps", eval_steps=1, **{"max_steps": steps, **settings})
    trainer = Scripted(ToyLearner(), args, ToySampler(), toy_reader, {"1-shot": ToySampler("validation")}, callbacks)
    trainer.script = script
    return trainer


@pytest.mark.parametrize(
    ("settings", "best"), [({}, 2), ({"metric_for_best_model": "loss"}, 2), ({"greater_is_better": False}, 4)]
)
def test_ends_with_the_best_parameters(tmp_path, settings, best):
    seen = []

    class Keep(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            seen.append(optimizer.param_groups[0]["params"][0].detach().clone())

    trainer = scripted(
        tmp_path, (0.5, 0.9, 0.7, 0.1), [Keep], load_best_model_at_end=True, save_strategy="best", **settings
    )
    trainer.train()
    assert trainer.state.best_global_step == best
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert torch.equal(weights(trainer), seen[best - 1])


@pytest.mark.parametrize("save_strategy", ["best", "steps"])
def test_the_untrained_start_may_be_the_best(tmp_path, save_strategy, capsys):
    options = {"load_best_model_at_end": True, "save_strategy": save_strategy, "save_total_limit": 1}
    trainer = scripted(tmp_path, (0.8, 0.5, 0.7), eval_on_start=True, **options)
    start = weights(trainer).clone()
    trainer.train()
    assert (trainer.state.best_global_step, trainer.state.best_metric) == (0, 0.8)
    assert torch.equal(weights(trainer), start)
    assert "The untrained start was the best on validation" in capsys.readouterr().out


def test_a_start_that_training_betters_is_left_behind(tmp_path, capsys):
    trainer = scripted(tmp_path, (0.5, 0.8), eval_on_start=True, load_best_model_at_end=True, save_strategy="best")
    start = weights(trainer).clone()
    trainer.train()
    assert trainer.state.best_global_step == 1
    assert not torch.equal(weights(trainer), start)
    assert "untrained start" not in capsys.readouterr().out


def test_validations_worse_than_the_start_count_against_patience(tmp_path):
    options = {"eval_on_start": True, "load_best_model_at_end": True, "save_strategy": "best"}
    assert scripted(tmp_path, (0.8, 0.5, 0.6, 0.9), early_stopping_patience=2, **options).train().global_step == 2


def test_best_is_on_disk_even_between_save_steps(tmp_path):
    trainer = scripted(tmp_path, (0.5, 0.9, 0.7, 0.1), load_best_model_at_end=True, save_strategy="steps", save_steps=4)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{i}" for i in (1, 2, 4)]


def test_early_stopping_by_setting_and_by_callback(tmp_path):
    script = (0.5, 0.9, 0.7, 0.6, 0.95, 0.1)
    options = {"save_strategy": "best", "load_best_model_at_end": True}
    assert scripted(tmp_path / "a", script, early_stopping_patience=2, **options).train().global_step == 4
    assert scripted(tmp_path / "b", script, [EarlyStoppingCallback(3)], **options).train().global_step == 6


class Poisoned(ToyLearner):
    """Non-finite answers on the episodes of ``bad``."""

    def __init__(self, bad, value=math.nan):
        self.bad, self.value = bad, value

    def meta_grad(self, params, episodes):
        part = super().meta_grad(params, episodes)
        if any(episode.spec.index in self.bad for episode in episodes):
            part.grads["head.w"][0, 0] = self.value
        return part


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_named(tmp_path, value):
    trainer = toy_trainer(tmp_path, Poisoned({4}, value), max_steps=3, **SGD)
    w = weights(trainer).clone()
    with pytest.warns(UserWarning, match=r"step 2: .* not finite by themselves: toy/train/4\. Replay one"):
        out = trainer.train()
    for indices in (range(0, 3), range(6, 9)):
        w = w - 0.1 * mean_gradient(w, indices)
    torch.testing.assert_close(weights(trainer), w)
    assert trainer.skipped_steps == 1
    assert out.metrics["train_skipped_steps"] == 1
    assert math.isfinite(out.training_loss)


@pytest.mark.filterwarnings("ignore:Skipped")
def test_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    trainer = toy_trainer(tmp_path, Poisoned(range(3, 100)), max_skipped_steps=2)
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .*\. Start anew with a lower inner_learning_rate"):
        trainer.train()
    assert trainer.state.global_step == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Skipped")
def test_a_run_that_stops_at_skipped_steps_is_saved(tmp_path):
    settings = {"max_skipped_steps": 2, "save_strategy": "steps", "save_steps": 50}
    trainer = toy_trainer(tmp_path, Poisoned(range(3, 9)), **settings)
    with pytest.raises(FloatingPointError, match=r"Step 3 is saved\. Start anew .* overwrite_output_dir: true; "):
        trainer.train()
    # The episodes after it are sound.
    resumed = toy_trainer(tmp_path, Poisoned(range(3, 9)), **settings)
    assert resumed.train(resume_from_checkpoint=True).global_step == 6
    assert resumed.skipped_steps == 2


def test_a_sum_of_finite_episodes_that_is_not_finite_is_told_so(tmp_path):
    class Huge(ToyLearner):
        def meta_grad(self, params, episodes):
            part = super().meta_grad(params, episodes)
            part.grads["head.w"][0, 0] = torch.tensor(2e38) * len(episodes)
            return part

    with pytest.warns(UserWarning, match="each of its episodes alone is finite"):
        toy_trainer(tmp_path, Huge(), max_steps=1).train()


def test_skipped_steps_far_apart_do_not_stop_the_run(tmp_path):
    trainer = toy_trainer(tmp_path, Poisoned({0, 6, 12}), max_skipped_steps=2)
    with pytest.warns(UserWarning, match="Skipped"):
        assert trainer.train().global_step == 6
    assert trainer.skipped_steps == 3


def test_training_neither_reads_nor_moves_the_global_generator(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a global generator was seeded")

    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with monkeypatch.context() as patched:
            patched.setattr(torch, "manual_seed", refuse)
            trainer = toy_trainer(tmp_path)
            trainer.train()
        assert torch.equal(torch.get_rng_state(), before)
        results.append(weights(trainer))
    assert torch.equal(*results)


def test_gradient_of_other_parameters_is_an_error(tmp_path):
    class Wrong(ToyLearner):
        def meta_grad(self, params, episodes):
            part = super().meta_grad(params, episodes)
            return type(part)({}, part.loss, part.accuracy, part.episodes)

    with pytest.raises(ValueError, match=r"head\.w"):
        toy_trainer(tmp_path, Wrong()).train()


def test_learner_without_parameters_is_an_error(tmp_path):
    class Empty(ToyLearner):
        def init_params(self):
            return {}

    with pytest.raises(ValueError, match="no parameters to train"):
        toy_trainer(tmp_path, Empty())


def test_a_reader_that_leaves_out_the_names_a_learner_is_to_read_is_an_error(tmp_path):
    class Reader:
        use_label_names = False

        def __call__(self, spec):
            return toy_reader(spec)

    learner, reader = ToyLearner(), Reader()
    learner.config = FewShotConfig(use_label_names=True)
    with pytest.raises(ValueError, match=r"use_label_names=True, and the reader False.* to EpisodeReader, too"):
        FewShotTrainer(learner, toy_args(tmp_path), ToySampler(), reader)
    reader.use_label_names = True
    FewShotTrainer(learner, toy_args(tmp_path), ToySampler(), reader)
    reader.label_texts = "description"
    with pytest.raises(ValueError, match=r"label_texts='name', and the reader 'description'"):
        FewShotTrainer(learner, toy_args(tmp_path), ToySampler(), reader)


def test_a_target_that_no_training_task_is_of_is_an_error(tmp_path):
    """Its weight would be left out without a word."""
    learner, sampler = ToyLearner(), ToySampler()
    learner.options = JointOptions(target="bank")
    FewShotTrainer(learner, toy_args(tmp_path), sampler, toy_reader)  # of what pools, nobody knows
    sampler.pools = {"home": None, "banks": None}
    with pytest.raises(ValueError, match=r"target='bank' is none .* Use one of: home, banks\."):
        FewShotTrainer(learner, toy_args(tmp_path), sampler, toy_reader)
    with pytest.raises(ValueError, match="target='bank'"):
        learn_stream(learner, toy_args(tmp_path), LifelongArguments(), {"a": sampler, "b": sampler}, toy_reader, {})
    sampler.pools["bank"] = None
    FewShotTrainer(learner, toy_args(tmp_path), sampler, toy_reader)


def test_validation_without_samplers_or_with_an_unknown_metric_is_an_error(tmp_path):
    args = toy_args(tmp_path, eval_strategy="steps")
    with pytest.raises(ValueError, match="eval_samplers"):
        FewShotTrainer(ToyLearner(), args, ToySampler(), toy_reader)
    args = toy_args(tmp_path, eval_strategy="steps", metric_for_best_model="f1")
    with pytest.raises(ValueError, match=r"'f1'.*accuracy, loss, 1-shot_accuracy"):
        FewShotTrainer(ToyLearner(), args, ToySampler(), toy_reader, {"1-shot": ToySampler("validation")})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"args": TrainingArguments}, "args of type TrainingArguments must be FewShotTrainingArguments"),
        ({"eval_samplers": ToySampler("validation")}, "eval_samplers of type ToySampler must be samplers by name"),
        (
            {"eval_samplers": {"1-shot": [ToySampler()[i] for i in range(3)]}},
            r"eval_samplers\['1-shot'\] has 3 episodes, and eval_episodes=4 asks for 4\. Lower eval_episodes",
        ),
        (
            {"train_sampler": ToySampler(num_episodes=17)},
            "train_sampler has 17 episodes, and max_steps=6 asks for 18",
        ),
    ],
)
def test_what_does_not_fit_is_named_before_training(tmp_path, given, message):
    whole = {"args": toy_args, "train_sampler": ToySampler(), "eval_samplers": None, **given}
    whole["args"] = whole["args"](str(tmp_path))
    with pytest.raises(ValueError, match=message):
        FewShotTrainer(ToyLearner(), reader=toy_reader, **whole)


def test_an_adapter_is_no_learner(tmp_path, bert_folder):
    learner = build_learner(tiny_config(bert_folder))
    adapter = FewShotAdapter(learner, learner.init_params())
    with pytest.raises(TypeError, match=r"FewShotAdapter does not adapt and predict. Give .* adapter\.learner"):
        FewShotTrainer(adapter, toy_args(tmp_path), ToySampler(), toy_reader)
    with pytest.raises(TypeError, match=r"Give a learner, which of an adapter is adapter\.learner"):
        evaluate(adapter, adapter.params, [ToySampler()[0]], toy_reader)


def test_learner_is_never_handed_tensors_with_a_graph(tmp_path):
    class Strict(ToyLearner):
        def meta_grad(self, params, episodes):
            assert all(not value.requires_grad for value in params.values())
            return super().meta_grad(params, episodes)

    toy_trainer(tmp_path, Strict()).train()


def test_bf16_runs_under_autocast(tmp_path):
    seen = []

    class Looking(ToyLearner):
        def meta_grad(self, params, episodes):
            seen.append((torch.is_autocast_enabled("cpu"), (params["head.w"].T @ params["head.w"]).dtype))
            return super().meta_grad(params, episodes)

    trainer = toy_trainer(tmp_path, Looking(), bf16=True, max_steps=1)
    trainer.train()
    assert seen == [(True, torch.bfloat16)]
    assert weights(trainer).dtype == torch.float32


def test_an_accelerator_that_is_given_computes_as_the_settings_say(tmp_path):
    """Full precision was taken for bf16 without a word."""
    args, given = toy_args(tmp_path, bf16=True), Accelerator(cpu=True)
    with pytest.raises(ValueError, match=r"bf16 is set, .* mixed_precision='no'"):
        FewShotTrainer(ToyLearner(), args, ToySampler(), toy_reader, accelerator=given)


class ListTracker(GeneralTracker):
    """A tracker of Accelerate's that keeps what it is given."""

    name = "list"
    requires_logging_directory = False
    main_process_only = True

    def __init__(self):
        super().__init__()
        self.config, self.logged = None, []

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))


def test_trackers_get_settings_and_logs_but_no_token(tmp_path):
    tracker = ListTracker()
    args = toy_args(tmp_path, eval_strategy="steps", eval_steps=3, logging_steps=3, hub_token="hf_secret")
    evals = {"1-shot": ToySampler("validation")}
    accelerator = Accelerator(cpu=True, log_with=tracker)
    trainer = FewShotTrainer(ToyLearner(), args, ToySampler(), toy_reader, evals, accelerator=accelerator)
    trainer.train()
    assert tracker.config["learning_rate"] == 0.1
    assert "hf_secret" not in str(tracker.config)
    assert [step for step, _ in tracker.logged] == [3, 3, 6, 6]
    assert {"train/loss", "train/accuracy", "train/learning_rate"} <= set(tracker.logged[0][1])
    assert {"eval/accuracy", "eval/1-shot_accuracy"} <= set(tracker.logged[1][1])
