"""Regression: learners for which it is defined, against computations written out by hand; the others say so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import mse_loss

from fewshot_nlp.classifier import FewShotClassifier
from fewshot_nlp.config import LEARNERS, FewShotConfig
from fewshot_nlp.data import SinusoidSampler, read_sinusoid
from fewshot_nlp.evaluation import compare, evaluate, merge
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import FineTuning, build_learner, learner_class
from fewshot_nlp.learners.planner import example_episode
from fewshot_nlp.training import FewShotTrainer, FewShotTrainingArguments
from fewshot_nlp.training.callbacks import validation_line
from fewshot_nlp.types import Batch
from tests.tiny import random_batch, random_episode, tiny_config

DEFINED = ("maml", "fomaml", "anil", "reptile", "normalised_reptile", "meta_sgd", "mamlpp", "imaml", "cavia")
#: What a learner cannot be built without.
SETTINGS = {"meta_transfer": {"adapter": "none"}}


def learner_on(folders, name="maml", kind="vector", **settings):
    defaults = {"task": "regression", "inner_learning_rate": 0.05}
    return build_learner(tiny_config(folders[kind], learner=name, **{**defaults, **settings}))


def float64(learner, seed=0):
    """The learner, parameters away from the start, and an episode, in double precision."""
    learner.model.module.double()
    rng = torch.Generator().manual_seed(seed)
    params = {
        name: value.double() + 0.3 * torch.randn(value.shape, generator=rng, dtype=torch.float64)
        for name, value in learner.init_params().items()
    }
    return params, random_episode([3, 4], 3, kind="vector", task="regression")


def network(params, values):
    """The perceptron and its output layer, written out."""
    for layer in (0, 1):
        weight, bias = (params[f"model.layers.{layer}.{part}"] for part in ("weight", "bias"))
        values = (values @ weight.T + bias).clamp(min=0)
    return (values @ params["head.weight"].T + params["head.bias"])[:, 0]


def test_no_target_is_taken_for_an_example_of_no_class(folders):
    """-1 is a number like any other."""
    learner = learner_on(folders)
    params, episode = float64(learner)
    batch = Batch({name: rows[:1] for name, rows in episode.support.inputs.items()}, episode.support.labels[:1], 1)

    def moved(target):
        state = learner.adapt(params, replace(batch, labels=torch.full_like(batch.labels, target)))
        return {name: state[name] - params[name] for name in state}

    for name, value in moved(-1.0).items():
        torch.testing.assert_close(value, moved(-1.0001)[name], rtol=0.01, atol=1e-3)
    assert max(value.abs().max() for value in moved(-1.0).values()) > 1e-3


@pytest.mark.parametrize("name", LEARNERS)
def test_every_learner_works_or_says_that_it_does_not(folders, name):
    if "regression" not in learner_class(name).tasks:
        with pytest.raises(ValueError, match=f"learner='{name}' is not defined for task='regression'.*learner='maml'"):
            learner_on(folders, name)
        return
    learner = learner_on(folders, name, **SETTINGS.get(name, {}))
    params, episode = (
        learner.init_params(),
        random_episode([3, 4], kind="vector", dtype=torch.float32, task="regression"),
    )
    part = learner.meta_grad(params, [episode])
    assert all(grad.isfinite().all() for grad in part.grads.values())
    assert part.grads["head.weight"].any()
    logits = learner.predict(params, learner.adapt(params, episode.support), episode.query)
    assert logits.shape == (len(episode.query), 1)


def test_those_of_the_paper_are_among_them():
    assert {name for name in LEARNERS if "regression" in learner_class(name).tasks} >= set(DEFINED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "ranking"}, "task='ranking' is not known. Use one of: classification, regression"),
        ({"task": "regression", "head": "prototype"}, "head='prototype' answers with classes.*Use head='linear'"),
        ({"task": "regression", "head_init": "zero"}, "head_init='zero' is for classes.*Use head_init='learned'"),
        ({"task": "regression", "use_label_names": True}, "use_label_names names classes"),
        ({"head_init": "learned"}, "head_init='learned' needs as many outputs in every task"),
    ],
)
def test_settings_that_contradict(settings, message):
    with pytest.raises(ValueError, match=message):
        FewShotConfig(**settings)


def test_settings_survive_saving():
    config = FewShotConfig(task="regression")
    assert config.head_init == "learned" and config.score == "negative_mse"
    assert FewShotConfig.from_dict(config.to_dict()) == config


def test_labels_of_the_other_kind_are_refused(folders):
    for task, other in (("regression", "classification"), ("classification", "regression")):
        learner = learner_on(folders, task=task)
        episode = random_episode([2, 2], kind="vector", dtype=torch.float32, task=other)
        for call in (
            lambda learner=learner, episode=episode: learner.adapt(learner.init_params(), episode.support),
            lambda learner=learner, episode=episode: learner.meta_grad(learner.init_params(), [episode]),
        ):
            with pytest.raises(ValueError, match=f"do not fit a learner of task='{task}'"):
                call()


def test_an_untrained_output_is_zero(folders):
    learner = learner_on(folders)
    params, batch = learner.init_params(), random_batch([3], kind="vector", dtype=torch.float32, task="regression")
    assert not learner.predict(params, params, batch).any()


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", ["maml", "meta_sgd", "fomaml"])
def test_meta_gradients_by_hand(folders, name, steps):
    learner = learner_on(folders, name, inner_steps=steps)
    params, episode = float64(learner)
    theta = {key: value.clone().requires_grad_() for key, value in params.items()}
    fast = {key: value for key, value in theta.items() if not key.startswith("rule.")}
    for _ in range(steps):
        loss = mse_loss(network(fast, episode.support.inputs["values"]), episode.support.labels)
        grads = torch.autograd.grad(loss, list(fast.values()), create_graph=name != "fomaml")
        rates = [theta.get(f"rule.rate.{key}", 0.05) for key in fast]
        fast = {k: v - rate * g for (k, v), rate, g in zip(fast.items(), rates, grads, strict=True)}
    loss = mse_loss(network(fast, episode.query.inputs["values"]), episode.query.labels)
    expected = torch.autograd.grad(loss, list(theta.values()))
    found = learner.meta_grad(params, [episode])
    torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(found.accuracy, -found.loss)
    for key, grad in zip(theta, expected, strict=True):
        torch.testing.assert_close(found.grads[key], grad, rtol=1e-9, atol=1e-12)


def test_without_inner_steps_it_is_one_network_for_all_tasks(folders):
    learner = learner_on(folders, inner_steps=0)
    params, episode = float64(learner)
    theta = {key: value.clone().requires_grad_() for key, value in params.items()}
    loss = mse_loss(network(theta, episode.query.inputs["values"]), episode.query.labels)
    expected = torch.autograd.grad(loss, list(theta.values()))
    found = learner.meta_grad(params, [episode]).grads
    for key, grad in zip(theta, expected, strict=True):
        torch.testing.assert_close(found[key], grad, rtol=1e-9, atol=1e-12)


def test_reptile_moves_the_output_layer_too(folders):
    learner = learner_on(folders, "reptile")
    params, episode = float64(learner)
    state = learner.adapt(params, episode.support)
    grads = learner.meta_grad(params, [episode]).grads
    assert grads["head.weight"].any()
    for key, grad in grads.items():
        torch.testing.assert_close(grad, params[key] - state[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", ["step", "weights"])
def test_the_norm_runs_over_the_output_layer_too(folders, of):
    learner = learner_on(folders, "normalised_reptile", learner_kwargs={"of": of, "radius": 0.5})
    params, episode = float64(learner)
    state, grads = learner.adapt(params, episode.support), learner.meta_grad(params, [episode]).grads

    def length(tensors):
        return torch.cat([tensor.flatten() for tensor in tensors]).norm()

    if of == "step":
        torch.testing.assert_close(length(grads.values()), torch.tensor(0.5, dtype=torch.float64))
    else:
        ends = [params[key] - grad for key, grad in grads.items()]
        scale = length(params.values()) / length(state.values())
        torch.testing.assert_close(ends, [scale * state[key] for key in grads])


def test_anil_in_closed_form(folders):
    """Gradient descent on a quadratic: ``w_K = A^K w_0 + Σ_j A^j 2α/n Xᵀy`` with ``A = I - 2α/n XᵀX``."""
    steps, rate = 7, 0.02
    learner = learner_on(folders, "anil", inner_steps=steps, inner_learning_rate=rate)
    params, episode = float64(learner)
    features = learner.model.features(params, episode.support.inputs)
    design = torch.cat([features, torch.ones_like(features[:, :1])], dim=1)
    gain = 2 * rate / len(design)
    shrink = torch.eye(design.shape[1], dtype=torch.float64) - gain * design.T @ design
    powers = [torch.linalg.matrix_power(shrink, k) for k in range(steps + 1)]
    start = torch.cat([params["head.weight"][0], params["head.bias"]])
    expected = powers[-1] @ start + sum(powers[:-1]) @ (gain * design.T @ episode.support.labels)
    state = learner.adapt(params, episode.support)
    torch.testing.assert_close(
        torch.cat([state["head.weight"][0], state["head.bias"]]), expected, rtol=1e-9, atol=1e-12
    )


def test_cavia_leaves_the_output_layer_alone(folders):
    learner = learner_on(folders, "cavia", inner_learning_rate=0.5)
    params, episode = float64(learner)
    state = learner.adapt(params, episode.support)
    assert all(torch.equal(state[name], params[name]) for name in ("head.weight", "head.bias"))
    assert state["learner.context"].any()


def test_learned_rates_have_the_shape_of_the_output_layer(folders):
    for task, shape in (("regression", (1, 16)), ("classification", ())):
        params = learner_on(folders, "meta_sgd", task=task).init_params()
        assert params["rule.rate.head.weight"].shape == shape


def test_fine_tuning_is_a_baseline_of_it(folders):
    learner = learner_on(folders)
    episode = random_episode([3, 4], kind="vector", dtype=torch.float32, task="regression")
    tuned, params = FineTuning.like(learner, steps=30, learning_rate=0.01), learner.init_params()
    loss = {}
    for name, each in (("start", learner_on(folders, inner_steps=0)), ("tuned", tuned)):
        answers = each.predict(params, each.adapt(params, episode.support), episode.support)
        loss[name] = mse_loss(answers[:, 0], episode.support.labels)
    assert loss["tuned"] < 0.5 * loss["start"]


def test_the_planner_makes_episodes_of_it(folders):
    learner = learner_on(folders, kind="text")
    episode = example_episode(learner, 2, 3, 2)
    assert episode.support.labels.is_floating_point() and episode.support.n_way == 1
    assert learner.meta_grad(learner.init_params(), [episode]).loss.isfinite()


def sine_learner(**settings):
    config = {"model_name_or_path": "mlp", "adapter": "full", "task": "regression", "inner_learning_rate": 0.01}
    return build_learner(FewShotConfig(**{**config, **settings}))


def test_results_are_errors_under_their_own_name():
    learner = sine_learner()
    params, specs = learner.init_params(), [SinusoidSampler("test")[i] for i in range(4)]
    result = evaluate(learner, params, specs, read_sinusoid)
    errors, answers, targets = [], [], []
    for spec in specs:
        episode = read_sinusoid(spec)
        answer = learner.predict(params, learner.adapt(params, episode.support), episode.query)[:, 0].detach()
        errors.append(float((answer - episode.query.labels).square().mean()))
        answers.append(answer)
        targets.append(episode.query.labels)
    assert result.losses == pytest.approx(errors) and result.accuracies == pytest.approx([-error for error in errors])
    assert result.score == "negative_mse"
    answer, target = torch.cat(answers), torch.cat(targets)
    r2 = 1 - (answer - target).square().sum() / (target - target.mean()).square().sum()
    assert result.metrics == {"r2": pytest.approx(float(r2), abs=1e-5)}
    parts = [evaluate(learner, params, specs, read_sinusoid, shard=(rank, 2)) for rank in (0, 1)]
    assert merge(parts).losses == result.losses and merge(parts).metrics == result.metrics
    compared = compare(result, {"prototypes": result})
    assert compared["negative_mse"] == pytest.approx(-sum(errors) / 4) and "accuracy" not in compared


def test_a_target_may_be_any_number():
    """Minus one is a class out of scope to a classifier alone."""
    spec = SinusoidSampler()[0]

    def reader(spec):
        episode = read_sinusoid(spec)
        episode.query.labels.fill_(-1.0)
        return episode

    learner = sine_learner(inner_steps=0)
    assert evaluate(learner, learner.init_params(), [spec], reader).losses == [1.0]


def test_answers_that_are_no_numbers_are_no_crash():
    learner = sine_learner(inner_learning_rate=1e30)
    params = {name: value + 0.1 for name, value in learner.init_params().items()}
    result = evaluate(learner, params, [SinusoidSampler()[0]], read_sinusoid)
    assert not result.accuracy > -1e30
    assert "r2" in result.metrics


def test_the_trainer_lowers_the_error_and_says_what_it_measures(tmp_path):
    args = FewShotTrainingArguments(
        str(tmp_path / "out"), max_steps=40, meta_batch_size=4, learning_rate=0.005, logging_steps=20, eval_steps=20,
        eval_episodes=20, save_steps=20, metric_for_best_model="negative_mse", load_best_model_at_end=True,
        disable_tqdm=True, use_cpu=True, eval_on_start=True,
    )  # fmt: skip
    learner = sine_learner()
    evaluation = {"10-shot": SinusoidSampler("validation")}
    trainer = FewShotTrainer(learner, args, SinusoidSampler(), read_sinusoid, evaluation)
    trainer.train()
    logs = trainer.state.log_history
    names = {name for entry in logs for name in entry}
    assert {"negative_mse", "eval_negative_mse", "eval_10-shot_negative_mse"} <= names
    assert not any("accuracy" in name for name in names)
    validations = [entry for entry in logs if "eval_loss" in entry]
    assert validations[-1]["eval_loss"] < validations[0]["eval_loss"]
    assert all(entry["eval_negative_mse"] == pytest.approx(-entry["eval_loss"]) for entry in validations)
    assert validation_line(40, validations[-1]).startswith("step 40: validation negative mse -")
    FewShotAdapter(learner, trainer.detached_params()).save_pretrained(tmp_path / "adapter")
    loaded = FewShotAdapter.from_pretrained(tmp_path / "adapter")
    assert "FewShotClassifier" not in (tmp_path / "adapter" / "README.md").read_text()
    spec = SinusoidSampler("test")[0]
    found, expected = (
        evaluate(each, params, [spec], read_sinusoid).losses
        for each, params in ((loaded.learner, loaded.params), (learner, trainer.detached_params()))
    )
    assert found == expected


def test_the_metric_of_a_classifier_is_not_measured(tmp_path):
    args = FewShotTrainingArguments(str(tmp_path), eval_episodes=1, use_cpu=True)
    with pytest.raises(ValueError, match=r"metric_for_best_model='accuracy' is not measured. Use one of: negative_mse"):
        FewShotTrainer(sine_learner(), args, SinusoidSampler(), read_sinusoid, {"10-shot": SinusoidSampler("test")})


def test_a_classifier_refuses_such_an_adapter(folders):
    learner = learner_on(folders, kind="text")
    classifier = FewShotClassifier(FewShotAdapter(learner, learner.init_params()), device="cpu")
    with pytest.raises(ValueError, match=r"trained for task='regression', and a classifier answers with classes"):
        classifier.fit(["red light", "play music"], ["light", "music"])
