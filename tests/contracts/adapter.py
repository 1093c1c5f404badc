"""What every adapter must do: one function a promise. An adapter joins by one line in ``test_adapters.py``."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModel

from fewshot_nlp.functional.call import call
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel, load_backbone
from fewshot_nlp.models.adapters import load_adapter, save_adapter
from fewshot_nlp.models.model import PREFIX
from fewshot_nlp.models.pooling import pool
from tests.contracts.double import KeepDouble, hessian_is_exact
from tests.tiny import random_batch, random_episode, tiny_config


@dataclass(frozen=True)
class Entry:
    """One line of the table.

    Attributes:
        settings: of ``FewShotConfig``.
        peft_config: makes a PEFT configuration object to use instead.
        neutral: before training, features are the bare backbone's.
        idle: parameters of the backbone that no feature depends on, by a part of their names.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    peft_config: Callable[[], peft.PeftConfig] | None = None
    neutral: bool = False
    idle: tuple[str, ...] = ()


class Subject:
    """A model with the adapter, and parameters as training might leave them."""

    def __init__(self, entry: Entry, folder: str) -> None:
        self.entry, self.folder = entry, folder
        self.config = tiny_config(folder, **{"num_virtual_tokens": 3, "head": "prototype", **entry.settings})
        self.model = self.build()
        rng = torch.Generator().manual_seed(1)
        self.params = {
            name: value + 0.2 * torch.randn(value.shape, generator=rng)
            for name, value in self.model.init_params().items()
        }
        self.inputs = random_batch([3, 2], seed=4).inputs

    def build(self) -> FewShotModel:
        peft_config = self.entry.peft_config and self.entry.peft_config()
        return FewShotModel.build(self.config, peft_config)

    def features(self, params: dict[str, Tensor] | None = None) -> Tensor:
        return self.model.features(self.params if params is None else params, self.inputs).detach()

    def bare(self) -> Tensor:
        """Features of the backbone, loaded again and without this package's model."""
        module, _ = load_backbone(self.folder)
        with torch.no_grad():
            return pool(module(**self.inputs).last_hidden_state, self.inputs["attention_mask"], self.model.pooling)


def starts_as_it_says(subject: Subject) -> None:
    """A neutral adapter changes nothing before it is trained; any other does."""
    distance = (subject.features(subject.model.init_params()) - subject.bare()).abs().max()
    assert distance < 1e-6 if subject.entry.neutral else distance > 1e-3


def every_tensor_changes_the_features(subject: Subject) -> None:
    before = subject.features()
    assert subject.params
    for name, value in subject.params.items():
        noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(2))
        moved = subject.features({**subject.params, name: value + 0.5 * noise})
        idle = any(part in name for part in subject.entry.idle)
        assert ((moved - before).abs().max() > 1e-5) != idle, name


def frozen_features_are_the_bare_backbones(subject: Subject) -> None:
    """Before and after training, which never writes into the module."""
    before = subject.model.frozen_features(subject.inputs)
    # Several texts may have been in a row, which changes the last bit.
    torch.testing.assert_close(before, subject.bare(), rtol=1e-5, atol=2e-6)
    learner = build_learner(subject.config, subject.model)
    params = learner.init_params()
    for seed in range(3):
        part = learner.meta_grad(params, [random_episode([1, 2], seed=seed)])
        params = {name: value - part.grads[name] for name, value in params.items()}
    assert not torch.equal(subject.features(params_of(params)), subject.features(subject.model.init_params()))
    assert torch.equal(subject.model.frozen_features(subject.inputs), before)


def params_of(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in params.items() if name.startswith(PREFIX)}


def parameters_are_copies(subject: Subject) -> None:
    start = subject.model.init_params()
    for value in subject.model.init_params().values():
        assert not value.requires_grad
        value.fill_(7.0)
    assert all(torch.equal(value, start[name]) for name, value in subject.model.init_params().items())


def holding_is_for_a_while(subject: Subject) -> None:
    """Inside, the module has the parameters as its own; afterwards, its old ones again, after an error too."""
    start = subject.model.init_params()
    for fails in (False, True):
        outcome = pytest.raises(RuntimeError, match="inside") if fails else nullcontext()
        with outcome, subject.model.holding(subject.params):
            own = subject.model.init_params()
            assert all(torch.equal(own[name], value) for name, value in subject.params.items())
            if fails:
                raise RuntimeError("inside")
        assert all(torch.equal(value, start[name]) for name, value in subject.model.init_params().items())


def same_seed_same_start(subject: Subject) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    twin = subject.build()
    assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"
    start, again = subject.model.init_params(), twin.init_params()
    assert start.keys() == again.keys()
    assert all(torch.equal(start[name], again[name]) for name in start)


def a_text_is_read_alone(subject: Subject) -> None:
    """Its features do not depend on its batch, nor on padding."""
    together = subject.features()
    for i, length in enumerate(subject.inputs["attention_mask"].sum(1).tolist()):
        row = {name: value[i : i + 1, :length] for name, value in subject.inputs.items()}
        alone = subject.model.features(subject.params, row).detach()
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=2e-6)


def second_derivatives_are_exact(subject: Subject) -> None:
    """A Hessian-vector product against central differences of the gradient, in float64."""
    subject = Subject(subject.entry, subject.folder)
    subject.model.module.double()
    with KeepDouble():
        check_second_derivatives(subject)


def check_second_derivatives(subject: Subject) -> None:
    params = {name: value.double().requires_grad_() for name, value in subject.params.items()}
    hessian_is_exact(lambda at: subject.model.features(at, subject.inputs).square().tanh().sum(), params)


def vmap_over_parameters_is_a_loop(subject: Subject) -> None:
    model = subject.model
    twins = [params_of(p) for p in (model.init_params(), subject.params)]
    stacked = {name.removeprefix(PREFIX): torch.stack([twin[name] for twin in twins]) for name in twins[0]}
    mask = subject.inputs["attention_mask"]

    def features(body: dict[str, Tensor]) -> Tensor:
        hidden = call(model.module, model.trainable, body, **subject.inputs).last_hidden_state
        return pool(hidden, mask, subject.model.pooling)

    found = torch.vmap(features)(stacked).detach()
    torch.testing.assert_close(found, torch.stack([subject.features(t) for t in twins]), rtol=1e-5, atol=2e-6)


def saved_and_loaded_it_is_the_same(subject: Subject) -> None:
    expected, twin = subject.features(), subject.build()
    with tempfile.TemporaryDirectory() as folder:
        with subject.model.holding(subject.params) as module:
            save_adapter(module, folder)
        load_adapter(twin.module, folder)
    assert torch.equal(twin.features(twin.init_params(), subject.inputs).detach(), expected)


def plain_peft_loads_it(subject: Subject) -> None:
    """PEFT and transformers alone make the same hidden states of what ``save_adapter`` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        with subject.model.holding(subject.params) as module:
            save_adapter(module, folder)
        base = AutoModel.from_pretrained(subject.folder, attn_implementation="eager")
        plain = peft.PeftModel.from_pretrained(base, folder).eval()
    body = {name.removeprefix(PREFIX): value for name, value in subject.params.items()}
    with torch.no_grad():
        expected = call(subject.model.module, subject.model.trainable, body, **subject.inputs).last_hidden_state
        found = plain(**subject.inputs).last_hidden_state
    real = subject.inputs["attention_mask"].bool()
    length = real.shape[1]
    # A soft prompt's own rows come first, and a prefix's are not there.
    assert found.shape == expected.shape
    torch.testing.assert_close(found[:, -length:][real], expected[:, -length:][real], rtol=1e-5, atol=1e-6)


Check = Callable[[Subject], None]
CHECKS: tuple[Check, ...] = (
    starts_as_it_says,
    every_tensor_changes_the_features,
    frozen_features_are_the_bare_backbones,
    parameters_are_copies,
    holding_is_for_a_while,
    same_seed_same_start,
    a_text_is_read_alone,
    second_derivatives_are_exact,
    vmap_over_parameters_is_a_loop,
)
#: For what PEFT's own files bring back.
FILE_CHECKS: tuple[Check, ...] = (saved_and_loaded_it_is_the_same, plain_peft_loads_it)
