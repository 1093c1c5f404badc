"""Every learner keeps the contract. To add one: a line in ``LEARNERS``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from fewshot_nlp.learners import LEARNER_CLASSES, FineTuning, FrozenPrototypes, LogisticRegression, build_learner
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.cache import FrozenFeatures
from fewshot_nlp.types import Learner
from tests.contracts.learner import contract
from tests.contracts.subject import COUNTS, Entry, Subject
from tests.tiny import tiny_config


def by_name(folder: str, **settings: Any) -> Learner:
    return build_learner(tiny_config(folder, **{"num_virtual_tokens": 2, "inner_learning_rate": 0.1, **settings}))


def named(learner: str, exact: bool = True, **settings: Any) -> Entry:
    """A learner that ``FewShotConfig`` names."""
    return Entry(partial(by_name, learner=learner, **settings), exact=exact)


def frozen(kind: Callable[[FrozenFeatures], Learner], folder: str) -> Learner:
    model = FewShotModel.build(tiny_config(folder, adapter="none"))
    model.module.double()
    return kind(FrozenFeatures(model))


def fine_tuning(folder: str) -> Learner:
    return FineTuning.like(build_learner(tiny_config(folder)), steps=3, learning_rate=0.01)


LEARNERS = {
    "maml": named("maml"),
    "maml, zero head": named("maml", head_init="zero"),
    "maml, euclidean": named("maml", distance="euclidean", inner_learning_rate=0.05),
    "maml, prototype head": named("maml", head="prototype"),
    "maml, adam": named("maml", inner_rule="adam", inner_learning_rate=0.01),
    "maml, prompt": named("maml", adapter="prompt_tuning"),
    "fomaml": named("fomaml", exact=False),
    "fomaml, zero head": named("fomaml", exact=False, head_init="zero"),
    "fomaml, prototype head": named("fomaml", exact=False, head="prototype"),
    "anil": named("anil"),
    "anil, zero head": named("anil", head_init="zero"),
    "reptile": named("reptile", exact=False),
    "reptile, zero head": named("reptile", exact=False, head_init="zero"),
    "reptile, prototype head": named("reptile", exact=False, head="prototype"),
    "protonet": named("protonet", head="prototype"),
    "protonet, euclidean": named("protonet", head="prototype", distance="euclidean"),
    "protonet, linear head": named("protonet"),
    "protonet, no adapter": named("protonet", head="prototype", adapter="none"),
    "fine-tuning": Entry(fine_tuning, exact=False, saved=False),
    "frozen prototypes": Entry(partial(frozen, FrozenPrototypes), trained=False),
    "logistic regression": Entry(partial(frozen, LogisticRegression), trained=False),
}


@cache
def subject(name: str, folder: str, shape: str) -> Subject:
    """Loaded once: a learner keeps nothing between calls, which the contract checks too."""
    return Subject(LEARNERS[name], folder, COUNTS[shape])


@pytest.mark.parametrize(
    ("name", "check", "shape"),
    [
        pytest.param(name, check, shape, id=f"{name}-{check.__name__}-{shape}")
        for name, entry in LEARNERS.items()
        for check, shape in contract(entry)
    ],
)
def test_contract(bert_folder, name, check, shape):
    check(subject(name, bert_folder, shape))


def test_every_learner_is_in_the_table(bert_folder):
    found = {type(entry.build(bert_folder)) for entry in LEARNERS.values()}
    assert found >= {*LEARNER_CLASSES.values(), FineTuning, FrozenPrototypes, LogisticRegression}
