"""Streams of stages: what is replayed, what is held fast, what is held out, and what is reported."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from fewshot_nlp.training.lifelong import (
    Consolidation,
    GoingOn,
    LifelongArguments,
    ReplaySampler,
    Reservoir,
    fisher_diagonal,
    learn_stream,
)
from fewshot_nlp.types import EpisodeSpec
from tests.training.toy import ToyLearner, ToySampler, hand_gradient, toy_args, toy_reader, toy_trainer

ROOT = Path(__file__).parents[2]


class Shifted(ToySampler):
    """Another stage: other episodes of the same kind."""

    def __init__(self, by: int, split: str = "train") -> None:
        super().__init__(split)
        self.by = by

    def __getitem__(self, index: int) -> EpisodeSpec:
        return super().__getitem__(index + self.by)


STAGES = {"one": Shifted(0), "two": Shifted(1000), "three": Shifted(2000)}
HELD_OUT = {"1-shot": {name: [Shifted(i, "test")[j] for j in range(3)] for i, name in enumerate(STAGES)}}


def stream(tmp_path, learner=None, stages=STAGES, told=None, **settings):
    args = toy_args(tmp_path, meta_batch_size=4, max_steps=3, **told or {})
    return learn_stream(
        learner or ToyLearner(),
        args,
        LifelongArguments(**settings),
        stages,
        toy_reader,
        HELD_OUT,
        tell=lambda text: None,
    )


class Spy(ToyLearner):
    """Writes down which episodes it was given."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def meta_grad(self, params, episodes):
        self.seen += [episode.spec.index for episode in episodes]
        return super().meta_grad(params, episodes)


def test_a_reservoir_keeps_everything_alike_often():
    counts: Counter = Counter()
    for seed in range(2000):
        reservoir = Reservoir(3, seed)
        for i in range(8):
            reservoir.add(i)
        assert len(set(reservoir.kept)) == 3
        counts.update(reservoir.kept)
    # Each of 8 is kept with probability 3/8; four standard deviations of a binomial around it.
    spread = 4 * (2000 * 3 / 8 * 5 / 8) ** 0.5
    assert all(abs(counts[i] - 750) < spread for i in range(8)), counts


def test_a_reservoir_that_is_not_full_keeps_all():
    reservoir = Reservoir(5)
    for i in range(4):
        reservoir.add(i)
    assert reservoir.kept == [0, 1, 2, 3]


def test_every_meta_batch_is_part_new_and_part_past():
    past = [Shifted(500)[i] for i in range(7)]
    sampler = ReplaySampler(Shifted(0), past, batch=4, count=1)
    drawn = [[sampler[4 * b + i].index for i in range(4)] for b in range(30)]
    assert [index for row in drawn for index in row[:3]] == list(range(90))
    assert {row[3] for row in drawn} == set(range(500, 507))
    assert [sampler[i] for i in (11, 3, 7)] == [sampler[i] for i in (11, 3, 7)]
    assert [sampler.fresh_before(i) for i in range(9)] == [0, 1, 2, 3, 3, 4, 5, 6, 6]


def test_with_no_past_all_is_new():
    sampler = ReplaySampler(Shifted(0), [], batch=4, count=2)
    assert [sampler[i].index for i in range(9)] == list(range(9))
    assert sampler.fresh_before(9) == 9


def test_a_stream_replays_past_stages_alone_and_no_more_than_it_may(tmp_path):
    learner = Spy()
    output = stream(tmp_path, learner, variant="replay", replay_size=5)
    one, two, three = (learner.seen[i : i + 12] for i in (0, 12, 24))
    assert one == list(range(12))
    assert len([i for i in two if i < 1000]) == 6 and set(two) - set(range(12)) == set(range(1000, 1006))
    assert sum(i < 2000 for i in three) == 6 and {i for i in three if i < 2000} <= {*range(12), *range(1000, 1006)}
    assert len({i for i in three if i < 2000}) <= 5
    assert output.remembered == 5


def test_naive_goes_on_where_the_last_stage_ended(tmp_path):
    """Three runs of a trainer by hand, each with an optimiser of its own."""
    weights = ToyLearner().init_params()["head.w"]
    for by in (0, 1000, 2000):
        optimiser = torch.optim.AdamW([weights], lr=0.1, weight_decay=0.0)
        for step in range(3):
            episodes = [toy_reader(Shifted(by)[4 * step + i]) for i in range(4)]
            weights.grad = sum(hand_gradient(weights, episode) for episode in episodes) / 4
            torch.nn.utils.clip_grad_norm_([weights], 1.0)
            optimiser.step()
    found = stream(tmp_path, variant="naive", told={"lr_scheduler_type": "constant"}).params["head.w"]
    torch.testing.assert_close(found, weights, rtol=1e-5, atol=1e-6)


def test_every_stage_is_answered_before_and_after_every_stage(tmp_path):
    output = stream(tmp_path, variant="naive")
    matrix = output.matrices["1-shot"]
    assert matrix.accuracies.shape == (4, 3, 3)
    specs = [spec for name in STAGES for spec in HELD_OUT["1-shot"][name]]
    assert output.final["1-shot"].specs == specs
    for row, params in ((0, ToyLearner().init_params()), (-1, output.params)):
        for i, spec in enumerate(specs):
            query = toy_reader(spec).query
            right = (ToyLearner().predict(params, None, query).argmax(1) == query.labels).float().mean()
            assert matrix.accuracies[row].ravel()[i] == pytest.approx(float(right))
    assert len(output.losses) == 3


def test_the_fisher_diagonal_is_the_mean_squared_gradient(tmp_path):
    trainer = toy_trainer(tmp_path)
    specs = [ToySampler()[i] for i in range(5)]
    weights = trainer.detached_params()["head.w"]
    expected = sum(hand_gradient(weights, toy_reader(spec)) ** 2 for spec in specs) / 5
    torch.testing.assert_close(fisher_diagonal(trainer, ToyLearner(), specs)["head.w"], expected)


def test_the_pull_is_the_slope_of_the_penalty():
    """Of the penalties of two stages, written out and differentiated by autograd."""
    rng = torch.Generator().manual_seed(0)
    first, second, here = ({"w": torch.randn(3, generator=rng)} for _ in range(3))
    f1, f2 = ({"w": torch.rand(3, generator=rng)} for _ in range(2))
    penalty = Consolidation(7.0).after(first, f1).after(second, f2)
    theta = here["w"].clone().requires_grad_()
    by_hand = 7 / 2 * (f1["w"] * (theta - first["w"]) ** 2 + f2["w"] * (theta - second["w"]) ** 2).sum()
    by_hand.backward()
    torch.testing.assert_close(penalty.gradient("w", here["w"]), theta.grad)


def test_the_pull_counts_once_for_each_episode_of_a_sum():
    params = ToyLearner().init_params()
    away = {"head.w": params["head.w"] + 1}
    learner = GoingOn(ToyLearner(), params, Consolidation(2.0).after(params, {"head.w": torch.ones(4, 3)}))
    episodes = [toy_reader(ToySampler()[i]) for i in range(3)]
    plain, pulled = ToyLearner().meta_grad(away, episodes), learner.meta_grad(away, episodes)
    torch.testing.assert_close(pulled.grads["head.w"] - plain.grads["head.w"], torch.full((4, 3), 6.0))
    assert torch.equal(pulled.loss, plain.loss)
    assert torch.equal(learner.init_params()["head.w"], params["head.w"])


def test_a_stream_is_pulled_to_where_its_stages_ended(tmp_path):
    """Two stages of plain gradient descent, the second with its pull, by hand."""
    rate, weight, count = 0.05, 20.0, 4
    told = {"lr_scheduler_type": "constant", "optim": "sgd", "learning_rate": rate, "max_grad_norm": 0.0}
    stages = {name: STAGES[name] for name in ("one", "two")}
    theta = ToyLearner().init_params()["head.w"]

    def mean_of(sampler, indices, power):
        parts = [hand_gradient(theta, toy_reader(sampler[i])) ** power for i in indices]
        return sum(parts, torch.zeros_like(theta)) / len(parts)

    for step in range(3):
        theta = theta - rate * mean_of(stages["one"], range(4 * step, 4 * step + 4), 1)
    # The episodes that follow those of training.
    fisher, anchor = mean_of(stages["one"], range(12, 12 + count), 2), theta
    for step in range(3):
        slope = mean_of(stages["two"], range(4 * step, 4 * step + 4), 1) + weight * fisher * (theta - anchor)
        theta = theta - rate * slope
    settings = {"ewc_weight": weight, "ewc_episodes": count, "told": told, "stages": stages}
    found = stream(tmp_path, variant="ewc", **settings).params["head.w"]
    torch.testing.assert_close(found, theta, rtol=1e-5, atol=1e-6)
    naive = stream(tmp_path, variant="naive", told=told, stages=stages).params["head.w"]
    assert (found - anchor).norm() < 0.95 * (naive - anchor).norm()
    assert torch.equal(stream(tmp_path, variant="ewc", **{**settings, "ewc_weight": 0.0}).params["head.w"], naive)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variant": "none"}, "variant='none'"),
        ({"evaluate_on": "train"}, "evaluate_on='train'"),
        ({"replay_share": 1.0}, "replay_share=1.0 is out of range"),
        ({"ewc_weight": -1.0}, "ewc_weight"),
        ({"stage_file": "x.json", "stream_dataset_names": ["y"]}, "Leave stream_dataset_names out"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        LifelongArguments(**settings)


def test_settings_that_a_stream_has_no_use_for_are_refused(tmp_path):
    with pytest.raises(ValueError, match="save_strategy='steps' does not fit a stream"):
        stream(tmp_path, told={"save_strategy": "steps"})
    with pytest.raises(ValueError, match="leaves no place for past or for new episodes"):
        stream(tmp_path, variant="replay", replay_share=0.1)
    with pytest.raises(ValueError, match="A stream of 1 stage"):
        stream(tmp_path, stages={"one": Shifted(0)})
