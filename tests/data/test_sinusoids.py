"""Sinusoids: tasks that are addresses, and the points they stand for."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from fewshot_nlp.data import SinusoidSampler, read_sinusoid
from fewshot_nlp.data.episodes import spec_from_dict
from fewshot_nlp.data.sinusoids import sinusoid


def test_an_episode_is_a_pure_function_of_its_address():
    sampler, twin = (SinusoidSampler("test", k_shot=5, n_query=7, seed=3) for _ in range(2))
    backwards = [twin[i] for i in reversed(range(20))][::-1]
    assert [sampler[i] for i in range(20)] == backwards
    assert sampler[4].address == "sinusoids/test/4"
    others = (SinusoidSampler("train", seed=3), SinusoidSampler("test", seed=4))
    assert all(sinusoid(sampler[0]) != sinusoid(other[0]) for other in others)
    assert [spec.index for spec in SinusoidSampler(num_episodes=3)] == [0, 1, 2]


def test_points_lie_on_the_wave():
    spec = SinusoidSampler(k_shot=5, n_query=7)[2]
    episode, (amplitude, phase) = read_sinusoid(spec), sinusoid(spec)
    for batch, count in ((episode.support, 5), (episode.query, 7)):
        assert batch.inputs["values"].shape == (count, 1) and batch.labels.shape == (count,) and batch.n_way == 1
        assert batch.inputs["values"].dtype == batch.labels.dtype == torch.float32
        for (x,), y in zip(batch.inputs["values"].tolist(), batch.labels.tolist(), strict=True):
            assert y == pytest.approx(amplitude * math.sin(x - phase), abs=1e-5)


def test_the_distribution_is_that_of_the_paper():
    """Means of uniform numbers over 2,000 tasks, and their ends."""
    specs = [SinusoidSampler()[i] for i in range(2000)]
    amplitudes, phases = torch.tensor([sinusoid(spec) for spec in specs]).T
    x = torch.cat([read_sinusoid(spec).support.inputs["values"] for spec in specs])
    for values, low, high in ((amplitudes, 0.1, 5.0), (phases, 0.0, math.pi), (x, -5.0, 5.0)):
        assert low <= values.min() < low + 0.01 * (high - low) and high - 0.01 * (high - low) < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))


def test_an_address_alone_is_enough():
    """It goes through JSON, as an episode list does."""
    spec = SinusoidSampler("validation", seed=5)[9]
    again = read_sinusoid(spec_from_dict(json.loads(json.dumps(asdict(spec)))))
    assert again.spec == spec and torch.equal(again.query.labels, read_sinusoid(spec).query.labels)


@pytest.mark.parametrize("change", [{"pool": "banking77"}, {"classes": ("lost card",)}, {"classes": ("a", "b")}])
def test_what_is_no_sinusoid_is_refused(change):
    with pytest.raises(ValueError, match=r"is no sinusoid\. Draw it from a SinusoidSampler"):
        read_sinusoid(replace(SinusoidSampler()[0], **change))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "split='dev' is not known"),
        ({"k_shot": 0}, "k_shot=0 is out of range"),
        ({"n_query": 0}, "n_query=0 is out of range"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        SinusoidSampler(**settings)
