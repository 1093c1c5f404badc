"""Learners keep their contract on vision backbones: second order through attention and convolutions, LoRA on both."""

from __future__ import annotations

from functools import cache

import pytest

from tests.contracts import learner as contract
from tests.contracts.subject import COUNTS, Subject
from tests.contracts.test_learners import named
from tests.tiny import TINY_VISION

#: What the backbone can break, beside what every learner is checked for elsewhere.
CHECKS = (
    contract.meta_gradient_is_the_slope,
    contract.meta_gradients_add_up,
    contract.other_queries_do_not_matter,
    contract.calls_leave_no_trace,
    contract.adapt_writes_nothing,
    contract.fixed_parameters_change_nothing,
    contract.same_seed_same_numbers,
    contract.saved_and_loaded_it_is_the_same,
)
LEARNERS = {
    "maml, lora": named("maml", adapter="lora"),
    "reptile, lora": named("reptile", exact=False, adapter="lora"),
    "protonet, full": named("protonet", adapter="full", head="prototype"),
}
BACKBONES = {**{kind: {} for kind in TINY_VISION}, "resnet, transductive": {"batch_norm": "transductive"}}


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folders = {kind: build(tmp_path_factory.mktemp(kind)) for kind, build in TINY_VISION.items()}

    @cache
    def made(backbone: str, learner: str) -> Subject:
        entry, settings = LEARNERS[learner], BACKBONES[backbone]
        build = entry.build
        entry = type(entry)(**{**vars(entry), "build": lambda folder: build(folder, **settings)})
        return Subject(entry, folders[backbone.split(",")[0]], COUNTS["unequal"], "image")

    return made


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize(
    ("learner", "check"),
    [
        pytest.param(name, check, id=f"{name}-{check.__name__}")
        for name, entry in LEARNERS.items()
        for check in CHECKS
        if entry.exact or check is not contract.meta_gradient_is_the_slope
    ],
)
def test_contract(subject, backbone, learner, check):
    check(subject(backbone, learner))
