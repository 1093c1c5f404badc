"""Saving arithmetic must not change an answer."""

from __future__ import annotations

import pytest
import torch

from fewshot_nlp.evaluation import evaluate
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models.buckets import CALL_COST, length_buckets
from fewshot_nlp.models.cache import FixedModel, FrozenFeatures
from tests.tiny import random_batch, random_episode, tiny_config


def mask_of(lengths):
    return (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()


def test_buckets_hold_every_row_once_and_whole():
    lengths = [3, 60, 4, 5, 61, 3, 30, 31, 4]
    buckets = length_buckets(mask_of(lengths))
    assert sorted(row for rows, _ in buckets for row in rows.tolist()) == list(range(len(lengths)))
    assert all(max(lengths[row] for row in rows) == longest for rows, longest in buckets)
    assert [longest for _, longest in buckets] == [5, 31, 61]


def test_a_batch_is_cut_only_where_it_pays():
    rows = CALL_COST // 10
    assert len(length_buckets(mask_of([5] * rows + [15]))) == 1
    assert len(length_buckets(mask_of([5] * (rows + 1) + [15]))) == 2
    assert len(length_buckets(mask_of([7] * 50))) == 1


@pytest.mark.parametrize("adapter", ["lora", "prompt_tuning"])
def test_bucketed_features_and_gradients_are_those_of_the_whole_batch(bert_folder, adapter, monkeypatch):
    learner = build_learner(tiny_config(bert_folder, adapter=adapter))
    learner.model.module.double()
    params = {name: value.double() for name, value in learner.init_params().items()}
    episode = random_episode([2, 3, 4], seed=3)
    # Texts in a row of their own, or buckets would have nothing to do.
    monkeypatch.setattr("fewshot_nlp.models.model.packing_for", lambda inputs: None)
    monkeypatch.setattr("fewshot_nlp.models.buckets.CALL_COST", 0)
    assert len(length_buckets(episode.support.inputs["attention_mask"])) > 1
    cut = learner.meta_grad(params, [episode])
    monkeypatch.setattr("fewshot_nlp.models.buckets.CALL_COST", 10**6)
    whole = learner.meta_grad(params, [episode])
    for name, grad in whole.grads.items():
        torch.testing.assert_close(cut.grads[name], grad, rtol=1e-9, atol=1e-12)


def test_a_text_goes_through_the_backbone_once(bert_folder):
    model = build_learner(tiny_config(bert_folder)).model
    cache = FrozenFeatures(model)
    batch = random_batch([2, 2])
    compute, seen = cache.compute, []
    cache.compute = lambda inputs: seen.append(len(inputs["input_ids"])) or compute(inputs)
    first = cache(batch.inputs)
    wider = {name: torch.nn.functional.pad(tensor, (0, 3)) for name, tensor in batch.inputs.items()}
    assert torch.equal(cache(wider), first)
    assert seen == [4]


@pytest.mark.parametrize("name", ["protonet", "anil"])
def test_evaluation_with_a_cache_gives_the_answers_without(bert_folder, name):
    learner = build_learner(tiny_config(bert_folder, learner=name))
    rng = torch.Generator().manual_seed(0)
    params = {n: v + 0.1 * torch.randn(v.shape, generator=rng) for n, v in learner.init_params().items()}
    fixed = learner.fixed(params)
    assert isinstance(fixed.model, FixedModel)
    assert not isinstance(learner.model, FixedModel)
    for seed in range(3):
        episode = random_episode([1, 2, 3], seed=seed)
        plain = learner.predict(params, learner.adapt(params, episode.support), episode.query)
        cached = fixed.predict(params, fixed.adapt(params, episode.support), episode.query)
        torch.testing.assert_close(cached, plain, rtol=1e-4, atol=1e-5)
    specs = [random_episode([1, 2, 3], seed=seed).spec for seed in range(3)]
    result = evaluate(learner, params, specs, lambda spec: random_episode([1, 2, 3], seed=spec.index))
    assert len(result) == 3


def test_a_learner_that_changes_features_is_not_cached(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="maml"))
    assert learner.fixed(learner.init_params()) is learner


def test_embedding_examples_gives_their_frozen_features_in_their_order(bert_folder):
    model = build_learner(tiny_config(bert_folder)).model
    texts = [" ".join(["red"] * n) for n in (3, 1, 6, 2, 5, 4)]
    cache = FrozenFeatures(model)
    found = cache.embed(texts, batch_size=4)
    assert not cache.known
    expected = torch.cat([cache(model.encoder()([text])) for text in texts])
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_all_that_is_given_of_a_text_is_what_it_is_known_by(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="anil"))
    params, inputs = learner.init_params(), random_batch([2, 2]).inputs
    fixed = learner.fixed(params)
    kinds = [{**inputs, "token_type_ids": torch.full_like(inputs["input_ids"], kind)} for kind in (0, 1)]
    found = [fixed.features(params, each) for each in kinds]
    for each, features in zip(kinds, found, strict=True):
        torch.testing.assert_close(features, learner.features(params, each))
    assert (found[0] - found[1]).abs().max() > 0.01


def test_validation_goes_on_from_what_training_kept(bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="protonet", lora_layers_to_transform=[1]))
    assert learner.fixed(learner.init_params()).model.trunk is learner.model.trunk
