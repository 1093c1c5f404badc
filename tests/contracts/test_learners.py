"""Every learner keeps the contract. To add one: a line in ``LEARNERS``."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest

from fewshot_nlp.config import LEARNERS as NAMES
from fewshot_nlp.learners import FineTuning, FrozenPrototypes, LogisticRegression, build_learner, learner_class
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.cache import FrozenFeatures
from fewshot_nlp.types import Learner
from tests.contracts.learner import contract
from tests.contracts.subject import COUNTS, Entry, Subject
from tests.tiny import tiny_config

KINDS = ("text", "image", "vector")


def by_name(folder: str, **settings: Any) -> Learner:
    return build_learner(tiny_config(folder, **{"num_virtual_tokens": 2, "inner_learning_rate": 0.1, **settings}))


def named(learner: str, exact: bool = True, kinds: tuple[str, ...] = KINDS, **settings: Any) -> Entry:
    """A learner that ``FewShotConfig`` names."""
    return Entry(partial(by_name, learner=learner, **settings), exact=exact, kinds=kinds)


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
    "protomaml": named("protomaml"),
    "boil": named("boil"),
    "cavia": named("cavia", inner_learning_rate=5.0, head="prototype"),
    "cavia, learned rates": named("cavia", inner_rule="meta_sgd", inner_learning_rate=5.0, head="prototype"),
    "meta-sgd": named("meta_sgd"),
    # What it reports is the loss after the last step, and what it follows is the sum over steps.
    "maml++": named("mamlpp", exact=False),
    "imaml": named("imaml", exact=False, proximal=2.0),
    "normalised reptile": named("normalised_reptile", exact=False),
    "normalised reptile, weights": named("normalised_reptile", exact=False, learner_kwargs={"of": "weights"}),
    "protonet": named("protonet", head="prototype"),
    "protonet, euclidean": named("protonet", head="prototype", distance="euclidean"),
    "protonet, linear head": named("protonet"),
    "protonet, no adapter": named("protonet", head="prototype", adapter="none"),
    "memory": named("memory", learner_kwargs={"capacity": 12, "neighbours": 5}),
    "fine-tuning": Entry(fine_tuning, exact=False, saved=False),
    "frozen prototypes": Entry(partial(frozen, FrozenPrototypes), trained=False),
    "logistic regression": Entry(partial(frozen, LogisticRegression), trained=False),
}


@cache
def subject(name: str, folder: str, shape: str, kind: str) -> Subject:
    """Loaded once: a learner keeps nothing between calls, which the contract checks too."""
    return Subject(LEARNERS[name], folder, COUNTS[shape], kind)


@pytest.mark.parametrize(
    ("name", "check", "shape", "kind"),
    [
        pytest.param(name, check, shape, kind, id=f"{name}-{check.__name__}-{shape}-{kind}")
        for name, entry in LEARNERS.items()
        for kind in entry.kinds
        for check, shape in contract(entry)
    ],
)
def test_contract(folders, name, check, shape, kind):
    check(subject(name, folders[kind], shape, kind))


def test_every_learner_is_in_the_table(bert_folder):
    found = {type(entry.build(bert_folder)) for entry in LEARNERS.values()}
    assert found >= {*map(learner_class, NAMES), FineTuning, FrozenPrototypes, LogisticRegression}
