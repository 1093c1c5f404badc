"""Heads against their closed forms."""

import math
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.nn.functional import cosine_similarity, log_softmax

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.models.heads import BIAS, SCALE, WEIGHT, LinearHead, PrototypeHead, build_head, class_means

LABELS = torch.tensor([0, 1, 1, 2, 1, 0])
RNG = torch.Generator().manual_seed(0)
SUPPORT = torch.randn(6, 5, generator=RNG, dtype=torch.float64)
QUERY = torch.randn(4, 5, generator=RNG, dtype=torch.float64)
PARAMS = {SCALE: torch.tensor(math.log(7.0), dtype=torch.float64)}


def answer(head, query=QUERY):
    return head.logits(PARAMS, head.start(PARAMS, SUPPORT, LABELS, 3), query)


def head(**settings):
    return build_head(FewShotConfig(**settings), 4)


def test_class_means_with_unequal_counts():
    found = class_means(SUPPORT, LABELS, 3)
    torch.testing.assert_close(found[0], (SUPPORT[0] + SUPPORT[5]) / 2)
    torch.testing.assert_close(found[1], (SUPPORT[1] + SUPPORT[2] + SUPPORT[4]) / 3)
    assert torch.equal(found[2], SUPPORT[3])


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("kind", ["prototype", "linear"])
def test_mixed_precision_ends_before_the_head(kind, distance):
    """In bfloat16 the logits of two classes would tie."""
    made = head(head=kind, distance=distance)
    params, support, query = made.init_params(), SUPPORT.float(), QUERY.float()

    def logits():
        return made.logits(params, made.start(params, support, LABELS, 3), query)

    with torch.autocast("cpu", torch.bfloat16):
        found = logits()
    assert torch.equal(found, logits()) and found.dtype == torch.float32


def test_a_scale_that_is_given_is_kept_whatever_the_head():
    """Ten was once taken for the default, and became one."""
    for kind, own in (("prototype", 10.0), ("linear", 10.0), ("verbalizer", 1.0)):
        for given, expected in ((None, own), (10.0, 10.0), (1.0, 1.0)):
            params = build_head(FewShotConfig(head=kind, head_scale=given), 5).init_params()
            torch.testing.assert_close(params[SCALE].exp(), torch.tensor(expected))
    # One head's default is not carried over to another.
    assert replace(FewShotConfig(), head="verbalizer").logit_scale == 1.0


@pytest.mark.parametrize("scale", [0.5, 10.0, 64.0])
@pytest.mark.parametrize("kind", ["prototype", "linear"])
def test_the_scale_is_kept_as_a_logarithm(kind, scale):
    params = head(head=kind, head_scale=scale).init_params()
    assert params.keys() == {SCALE}
    torch.testing.assert_close(params[SCALE].exp(), torch.tensor(scale))


def test_prototypes_under_cosine():
    centres = class_means(SUPPORT, LABELS, 3)
    expected = torch.stack([7 * cosine_similarity(QUERY, centre[None]) for centre in centres], dim=1)
    torch.testing.assert_close(answer(head(head="prototype")), expected)


def test_prototypes_under_euclidean_distance():
    centres = class_means(SUPPORT, LABELS, 3)
    expected = -7 * torch.cdist(QUERY, centres).square()
    torch.testing.assert_close(answer(head(head="prototype", distance="euclidean")), expected)


def test_one_example_a_class_is_nearest_neighbour():
    nearest = head(head="prototype", distance="euclidean")
    state = nearest.start(PARAMS, SUPPORT, torch.arange(6), 6)
    assert torch.equal(nearest.logits(PARAMS, state, SUPPORT).argmax(1), torch.arange(6))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_a_linear_head_at_the_prototypes_is_the_prototype_head(distance):
    """The probabilities are; under Euclidean distance the logits differ by what every class shares."""
    linear = answer(head(head="linear", head_init="prototype", distance=distance))
    nearest = answer(head(head="prototype", distance=distance))
    torch.testing.assert_close(log_softmax(linear, 1), log_softmax(nearest, 1))
    assert torch.allclose(linear, nearest) == (distance == "cosine")


def test_a_linear_head_at_zero_knows_nothing():
    assert torch.equal(answer(head(head="linear", head_init="zero")), torch.zeros(4, 3).double())


def test_blind_is_a_head_whose_start_says_nothing_of_the_features():
    class Other(LinearHead):
        def start(self, *args):
            return {name: value + 1 for name, value in super().start(*args).items()}

    config = FewShotConfig(head_init="zero")
    assert head(head_init="zero").blind and not Other(config).blind
    replaced = head(head_init="zero")
    replaced.logits = lambda params, state, features: features
    assert not replaced.blind
    assert not any(each.blind for each in (head(), head(head="prototype"), head(task="regression")))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_linear_logits(distance):
    linear = head(head="linear", distance=distance)
    rng = torch.Generator().manual_seed(1)
    state = {
        WEIGHT: torch.randn(3, 5, generator=rng, dtype=torch.float64),
        BIAS: torch.randn(3, generator=rng, dtype=torch.float64),
    }
    features = QUERY / QUERY.norm(dim=1, keepdim=True) if distance == "cosine" else QUERY
    expected = 7 * torch.einsum("qd,cd->qc", features, state[WEIGHT]) + 7 * state[BIAS]
    torch.testing.assert_close(linear.logits(PARAMS, state, QUERY), expected)


@pytest.mark.parametrize("kind", ["prototype", "linear"])
def test_cosine_takes_no_notice_of_length(kind):
    cosine = head(head=kind)
    torch.testing.assert_close(answer(cosine, 100 * QUERY), answer(cosine))


@pytest.mark.parametrize(("kind", "expected"), [("prototype", PrototypeHead), ("linear", LinearHead)])
def test_build(kind, expected):
    built = head(head=kind)
    assert type(built) is expected
    assert built.fast == (kind == "linear")


class TestVerbalizer:
    """Words are the last rows of the features; scores of names are features as they are."""

    WORDS = torch.randn(3, 5, generator=RNG, dtype=torch.float64)
    BEYOND = torch.cat([LABELS, torch.full((3,), -1)])
    SCORES = torch.randn(6, 3, generator=RNG, dtype=torch.float64)
    ONE: ClassVar = {SCALE: torch.zeros((), dtype=torch.float64)}

    def made(self, scores_names, **settings):
        return build_head(FewShotConfig(head="verbalizer", **settings), 5, scores_names=scores_names)

    def test_words_score_by_inner_products(self):
        words = self.made(False, calibrate=False)
        state = words.start(self.ONE, torch.cat([SUPPORT, self.WORDS]), self.BEYOND, 3)
        torch.testing.assert_close(words.logits(self.ONE, state, QUERY), QUERY @ self.WORDS.T)

    def test_scores_are_logits_up_to_what_all_names_have_in_common(self):
        names = self.made(True, calibrate=False)
        state = names.start(self.ONE, self.SCORES, LABELS, 3)
        logits = names.logits(self.ONE, state, self.SCORES)
        torch.testing.assert_close(logits.softmax(dim=1), self.SCORES.softmax(dim=1))
        assert torch.equal(names.logits(self.ONE, state, self.SCORES + 8).argmax(dim=1), self.SCORES.argmax(dim=1))

    def test_an_inner_step_does_not_follow_what_all_names_have_in_common(self):
        names = self.made(True)

        def step(scores):
            state = {name: value.requires_grad_() for name, value in names.start(self.ONE, scores, LABELS, 3).items()}
            loss = torch.nn.functional.cross_entropy(names.logits(self.ONE, state, scores), LABELS)
            return torch.autograd.grad(loss, [*state.values()])

        for near, far in zip(step(self.SCORES), step(self.SCORES - 40), strict=True):
            torch.testing.assert_close(near, far)

    def test_calibrated_every_name_scores_alike_over_the_classes(self):
        for head, support, labels, examples in (
            (self.made(False), torch.cat([SUPPORT, self.WORDS]), self.BEYOND, SUPPORT),
            (self.made(True), self.SCORES, LABELS, self.SCORES),
        ):
            logits = head.logits(self.ONE, head.start(self.ONE, support, labels, 3), examples)
            torch.testing.assert_close(class_means(logits, LABELS, 3).mean(0), torch.zeros(3).double())

    def test_calibrated_by_the_classes_that_have_examples(self):
        """The third is told by its name alone."""
        kept = LABELS != 2
        for head, support, labels in (
            (self.made(False), torch.cat([SUPPORT[kept], self.WORDS]), torch.cat([LABELS[kept], self.BEYOND[-3:]])),
            (self.made(True), self.SCORES[kept], LABELS[kept]),
        ):
            features = support[: kept.sum()].clone().requires_grad_()
            state = head.start(self.ONE, torch.cat([features, support[kept.sum() :]]), labels, 3)
            logits = head.logits(self.ONE, state, features)
            torch.testing.assert_close(class_means(logits, LABELS[kept], 2).mean(0), torch.zeros(3).double())
            (slope,) = torch.autograd.grad(logits.square().sum(), features)
            assert torch.isfinite(slope).all()

    def test_without_examples_there_is_nothing_to_calibrate_by(self):
        names = self.made(True)
        state = names.start(self.ONE, self.SCORES[:0], LABELS[:0], 3)
        found = names.logits(self.ONE, state, self.SCORES).softmax(dim=1)
        torch.testing.assert_close(found, self.SCORES.softmax(dim=1))
        words = self.made(False)
        state = words.start(self.ONE, self.WORDS, self.BEYOND[-3:], 3)
        torch.testing.assert_close(words.logits(self.ONE, state, QUERY), QUERY @ self.WORDS.T)

    def test_what_was_left_at_its_default_gives_way(self):
        config = FewShotConfig(head="verbalizer")
        assert config.use_label_names and config.head_init == "names" and config.logit_scale == 1.0

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"head_init": "zero"}, "head_init='zero' is for head='linear'"),
            ({"template": "{text} is {mask} or {label}"}, r"must hold \{text\} once, and once \{mask\}"),
            ({"template": "this is {mask}"}, r"must hold \{text\} once"),
            ({"verbalizer": {"refund": "money"}}, "must be lists of words by label"),
            ({"verbalizer": {"refund": [" "]}}, "must be lists of words by label"),
            ({"learn_label_name_weight": True}, "learn_label_name_weight reads names as texts"),
            ({"condition_on_names": True}, "condition_on_names reads names as texts"),
            ({"head": "linear", "template": "{text} {mask}"}, "is read by head='verbalizer' alone"),
            ({"head": "prototype", "verbalizer": {}}, "is read by head='verbalizer' alone"),
            ({"task": "regression"}, "head='verbalizer' answers with classes"),
        ],
    )
    def test_wrong_settings(self, settings, message):
        with pytest.raises(ValueError, match=message):
            FewShotConfig(**{"head": "verbalizer", **settings})


def test_a_feature_of_zero_gives_no_nan():
    assert answer(head(head="prototype"), torch.zeros(1, 5).double()).isfinite().all()
