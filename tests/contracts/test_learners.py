"""Every learner keeps the contract. To add one: a line in ``LEARNERS``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fewshot_nlp.config import LEARNERS as NAMES
from fewshot_nlp.learners import FineTuning, FrozenPrototypes, LogisticRegression, build_learner, learner_class
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.cache import FrozenFeatures
from fewshot_nlp.types import Learner
from tests.contracts.learner import Check, an_accelerator_changes_nothing, contract
from tests.contracts.subject import COUNTS, Entry, Subject
from tests.tiny import tiny_config

KINDS = ("text", "image", "vector")


def by_name(folder: str, **settings: Any) -> Learner:
    return build_learner(tiny_config(folder, **{"num_virtual_tokens": 2, "inner_learning_rate": 0.1, **settings}))


def named(learner: str, exact: bool = True, kinds: tuple[str, ...] = KINDS, **settings: Any) -> Entry:
    """A learner that ``FewShotConfig`` names."""
    entry = Entry(partial(by_name, learner=learner, **settings), exact=exact, kinds=kinds)
    if settings.get("task") == "regression":
        return replace(entry, task="regression", loss=lambda logits, targets: mse_loss(logits[:, 0], targets))
    return entry


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """That of a relation network: every class is a yes or a no of its own."""
    return (logits.sigmoid() - torch.eye(logits.shape[1])[labels]).square().sum(1).mean()


def told(learner: str, exact: bool = True, **settings: Any) -> Entry:
    """The same, given the names of the classes."""
    return replace(named(learner, exact, kinds=("text",), use_label_names=True, **settings), names=True)


def speaks(learner: str, kind: str, exact: bool = True, **settings: Any) -> Entry:
    """One that answers by the names of the classes, through a model that fills a blank or one that goes on."""
    entry = told(learner, exact, head="verbalizer", **settings)
    return replace(entry, kinds=(kind,))


def frozen(kind: Callable[[FrozenFeatures], Learner], folder: str) -> Learner:
    model = FewShotModel.build(tiny_config(folder, adapter="none"))
    model.module.double()
    return kind(FrozenFeatures(model))


def fine_tuning(folder: str) -> Learner:
    return FineTuning.like(build_learner(tiny_config(folder)), steps=3, learning_rate=0.01)


#: Learners' own networks, at the size of the backbone.
SMALL: dict[str, dict[str, Any]] = {
    "snail": {"key_size": 4, "value_size": 3, "filters": 3, "sequence_length": 6},
    "leo": {"latent_size": 6, "sample": False},
}

LEARNERS = {
    "maml": named("maml"),
    "maml, zero head": named("maml", head_init="zero"),
    "maml, euclidean": named("maml", distance="euclidean", inner_learning_rate=0.05),
    "maml, prototype head": named("maml", head="prototype"),
    "maml, adam": named("maml", inner_rule="adam", inner_learning_rate=0.01),
    "maml, prompt": named("maml", kinds=("text",), adapter="prompt_tuning"),
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
    "imaml": named("imaml", exact=False, proximal=5.0, inner_learning_rate=0.05),
    "normalised reptile": named("normalised_reptile", exact=False),
    "normalised reptile, weights": named("normalised_reptile", exact=False, learner_kwargs={"of": "weights"}),
    "snail": replace(named("snail", learner_kwargs=SMALL["snail"]), ordered=True),
    # The penalties are no part of what it reports; drawn codes are not those of ``predict``.
    "leo": named("leo", exact=False, learner_kwargs=SMALL["leo"]),
    "leo, no penalties": named("leo", learner_kwargs={**SMALL["leo"], "kl_weight": 0.0, "encoder_weight": 0.0}),
    "leo, fine-tuned": named("leo", exact=False, inner_steps=3, learner_kwargs={**SMALL["leo"], "tuning_steps": 1}),
    "hyper": named("hyper", learner_kwargs={"code_size": 3}),
    "hyper, no steps": named("hyper", inner_steps=0, learner_kwargs={"code_size": 3}),
    "meta-lstm": named("meta_lstm", exact=False),
    "meta-lstm, exact": named("meta_lstm", estimator="exact"),
    "meta-lstm, one layer": named("meta_lstm", estimator="exact", learner_kwargs={"hidden_size": 0}),
    "meta-transfer": named("meta_transfer", adapter="none"),
    "meta-transfer, lora": named("meta_transfer", kinds=("text",)),
    "joint": named("joint", exact=False, inner_learning_rate=0.02, learner_kwargs={"target": "random", "weight": 0.5}),
    "domain-adversarial": replace(named("domain_adversarial", exact=False), silent="learner.discriminator."),
    "protonet": named("protonet", head="prototype"),
    "protonet, euclidean": named("protonet", head="prototype", distance="euclidean"),
    "protonet, linear head": named("protonet"),
    "protonet, centred": named("protonet", head="prototype", center_features=True),
    "protonet, unit": named("protonet", head="prototype", center_features=True, normalize_features=True),
    "protonet, whitened": named("protonet", head="prototype", center_features=True, whiten_features=0.5),
    "protonet, no adapter": named("protonet", head="prototype", adapter="none"),
    "matching": named("matching"),
    "matching, euclidean": named("matching", kinds=("text",), distance="euclidean"),
    "matching, full context": replace(named("matching", learner_kwargs={"full_context": True}), ordered=True),
    "relation": named("relation"),
    "relation, no residual": named("relation", kinds=("text",), learner_kwargs={"residual": False}),
    "relation, squared error": replace(named("relation", learner_kwargs={"loss": "mse"}), loss=squared_error),
    "relational": named("relational"),
    "memory": named("memory", learner_kwargs={"capacity": 12, "neighbours": 5}),
    "protonet, names": told("protonet", head="prototype", label_name_weight=2),
    "protonet, weighted names": told("protonet", head="prototype", learn_label_name_weight=True),
    "protonet, told": told("protonet", head="prototype", condition_on_names=True),
    "maml, names": told("maml"),
    "maml, start at names": told("maml", head_init="names"),
    "maml, start at names, euclidean": told("maml", head_init="names", distance="euclidean", inner_learning_rate=0.02),
    "maml, weighted names, told": told("maml", learn_label_name_weight=True, condition_on_names=True),
    "maml, prototype head, weighted names": told("maml", head="prototype", learn_label_name_weight=True),
    "anil, start at names, told": told("anil", head_init="names", condition_on_names=True),
    "imaml, told": told("imaml", exact=False, proximal=5.0, inner_learning_rate=0.05, condition_on_names=True),
    "reptile, names": told("reptile", exact=False, inner_learning_rate=0.02),
    "cavia, told": told("cavia", inner_learning_rate=5.0, head="prototype", condition_on_names=True),
    "matching, told": told("matching", condition_on_names=True),
    "relation, weighted names, told": told("relation", learn_label_name_weight=True, condition_on_names=True),
    "meta-transfer, told": told("meta_transfer", condition_on_names=True),
    "relational, told": told("relational", condition_on_names=True),
    "leo, told": told("leo", exact=False, condition_on_names=True, learner_kwargs=SMALL["leo"]),
    "maml, blank": speaks("maml", "cloze", inner_learning_rate=0.02),
    "anil, blank": speaks("anil", "cloze", inner_learning_rate=0.02),
    "reptile, blank": speaks("reptile", "cloze", exact=False, inner_learning_rate=0.02),
    "protonet, blank, prompt": speaks("protonet", "cloze", adapter="prompt_tuning"),
    "maml, phrases": speaks("maml", "phrase", inner_learning_rate=0.02),
    "maml, phrases, prompt": speaks("maml", "phrase", adapter="prompt_tuning"),
    "anil, phrases": speaks("anil", "phrase"),
    "reptile, phrases": speaks("reptile", "phrase", exact=False),
    "meta-sgd, phrases": speaks("meta_sgd", "phrase"),
    "protonet, phrases": speaks("protonet", "phrase", adapter="prefix_tuning"),
    "fine-tuning": Entry(fine_tuning, exact=False, saved=False, kinds=KINDS),
    "frozen prototypes": Entry(partial(frozen, FrozenPrototypes), trained=False, kinds=KINDS),
    "logistic regression": Entry(partial(frozen, LogisticRegression), trained=False, kinds=KINDS),
    "regression: maml": named("maml", task="regression", inner_learning_rate=0.05),
    "regression: anil": named("anil", task="regression", inner_learning_rate=0.05),
    "regression: meta-lstm": named("meta_lstm", exact=False, task="regression", inner_learning_rate=0.05),
    "regression: meta-transfer": named("meta_transfer", adapter="none", task="regression", inner_learning_rate=0.05),
    "regression: reptile": named("reptile", exact=False, task="regression", inner_learning_rate=0.05),
    "regression: meta-sgd": named("meta_sgd", task="regression", inner_learning_rate=0.05),
    "regression: imaml": named("imaml", exact=False, task="regression", proximal=2.0, inner_learning_rate=0.05),
    "regression: cavia": named("cavia", task="regression", inner_learning_rate=0.5),
}


def matters(name: str, check: Check, shape: str, kind: str) -> bool:
    """What a learner does with classes of one size hardly depends on what its inputs are; what one of its variants does
    hardly depends on the sizes either, and where it is done on neither."""
    first, unequal, variant = kind == LEARNERS[name].kinds[0], shape == "unequal", ", " in name
    if check is an_accelerator_changes_nothing:
        return first and not variant
    return (first and unequal) if variant else (first or unequal)


@cache
def subject(name: str, folder: str, shape: str, kind: str) -> Subject:
    """Loaded once: a learner keeps nothing between calls, which the contract checks too."""
    return Subject(LEARNERS[name], folder, COUNTS[shape], kind)


# PEFT says that it knows GPT-2's transposed layers.
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize(
    ("name", "check", "shape", "kind"),
    [
        pytest.param(
            name,
            check,
            shape,
            kind,
            id=f"{name}-{check.__name__}-{shape}-{kind}",
            marks=[] if matters(name, check, shape, kind) else [pytest.mark.full],
        )
        for name, entry in LEARNERS.items()
        for kind in entry.kinds
        for check, shape in contract(entry, kind)
    ],
)
def test_contract(folders, name, check, shape, kind):
    check(subject(name, folders[kind], shape, kind))


def test_every_learner_is_in_the_table(bert_folder):
    found = {type(entry.build(bert_folder)) for entry in LEARNERS.values() if "text" in entry.kinds}
    assert found >= {*map(learner_class, NAMES), FineTuning, FrozenPrototypes, LogisticRegression}
