"""What every pair of a backbone and an adapter must do under every kind of learner: one function a promise.

A family joins by one line in ``families.py``, an adapter by one in ``SHELF``.
"""

from __future__ import annotations

import math
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor
from transformers import AutoConfig

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.functional.call import trainable
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.learners.base import BaseLearner, episode_loss
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.adapters import is_adapted, peft_restores
from fewshot_nlp.models.backbone import reader
from fewshot_nlp.models.model import PREFIX
from fewshot_nlp.types import Episode
from tests.contracts.double import KeepDouble
from tests.contracts.families import FAMILIES, Family
from tests.pretend import DEVICE, Accelerator
from tests.tiny import random_batch, random_episode

#: Settings of each adapter, by the name it has in tables.
SHELF: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"adapter": "prompt_tuning"},
    "prefix_tuning": {"adapter": "prefix_tuning"},
    "p_tuning": {"adapter": "p_tuning"},
    "lora": {"adapter": "lora"},
    "lora, rank-stabilised": {"adapter": "lora", "use_rslora": True},
    "lora, dora": {"adapter": "lora", "use_dora": True},
    "ia3": {"adapter": "ia3"},
    "bitfit": {"adapter": "bitfit"},
    "layernorm": {"adapter": "layernorm"},
    "full": {"adapter": "full"},
    "none": {"adapter": "none"},
}
LEARNERS = ("maml", "reptile", "protonet")
COUNTS = [1, 2]
PROMPTS = ("prompt_tuning", "prefix_tuning", "p_tuning")

NO_CACHE = ("distilbert", "deberta-v2", "mpnet", "modernbert", "albert", "t5", "umt5")
NO_BIASES = ("llama", "modernbert", "t5", "umt5")
#: Why a pair is refused, and what the message offers instead, by family and adapter.
REFUSED: dict[tuple[str, str], str] = {
    **{(name, "prefix_tuning"): "earlier tokens; .* does not.*Use adapter='prompt_tuning'" for name in NO_CACHE},
    **{
        (name, adapter): "takes pixel_values. Use adapter='lora'"
        for name, family in FAMILIES.items()
        for adapter in PROMPTS
        if family.kind == "image"
    },
    **{(name, "bitfit"): "trains biases, .* has none. Use adapter='layernorm'" for name in NO_BIASES},
}
SUPPORTED = [(name, adapter) for name in FAMILIES for adapter in SHELF if (name, adapter) not in REFUSED]


def takes(adapter: str, learner: str) -> bool:
    """Whether a learner has something to change: gradient learners need an adapter."""
    return adapter != "none" or learner == "protonet"


def settings(folder: str, adapter: str, learner: str = "maml", **more: Any) -> FewShotConfig:
    return FewShotConfig(
        model_name_or_path=folder,
        learner=learner,
        **{
            "num_virtual_tokens": 2,
            "lora_r": 2,
            "inner_steps": 2,
            "inner_learning_rate": 0.05,
            "head_scale": 4.0,
            **SHELF[adapter],
            **more,
        },
    )


class Cell:
    """A model of one family with one adapter, with parameters as training might leave them, and a task.

    Args:
        family: of the backbone.
        adapter: a key of ``SHELF``.
        folder: of the backbone.
        peft_config: to build in place of the adapter that the settings name.
    """

    def __init__(self, family: Family, adapter: str, folder: str, peft_config: peft.PeftConfig | None = None) -> None:
        self.family, self.adapter, self.folder = family, adapter, folder
        self.model = FewShotModel.build(settings(folder, adapter), peft_config)
        self.inputs = random_batch([2, 2], seed=4, kind=family.kind, dtype=torch.float32).inputs

    def learner(self, name: str) -> Any:
        return build_learner(settings(self.folder, self.adapter, name), self.model)

    def params(self, learner: BaseLearner, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Away from starts such as LoRA's zero, where half of the gradients vanish."""
        rng = torch.Generator().manual_seed(1)
        return {
            name: (value.double() + 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float64)).to(dtype)
            for name, value in learner.init_params().items()
        }

    def episode(self, dtype: torch.dtype = torch.float32) -> Episode:
        return random_episode(COUNTS, seed=0, kind=self.family.kind, dtype=dtype)

    def trained(self) -> int:
        """How many numbers the adapter trains."""
        return sum(value.numel() for value in self.model.init_params().values())


@cache
def cell(family: str, adapter: str, folder: str) -> Cell:
    """Loaded once: no check may leave a trace."""
    return Cell(FAMILIES[family], adapter, folder)


def meta_gradient_is_exact(cell: Cell, name: str) -> None:
    """In float64: that of MAML, step by step, and of prototypes is the slope of the query loss after adaptation;
    Reptile's is the start minus the end of a loop written out by hand."""
    cell.model.module.double()
    try:
        with KeepDouble():
            learner = cell.learner(name)
            learner.chunk = 1
            params, episode = cell.params(learner, torch.float64), cell.episode(torch.float64)
            found = learner.meta_grad(params, [episode]).grads
            if name == "reptile":
                _is_start_minus_end(learner, params, episode, found)
            else:
                _is_the_slope(learner, params, episode, found)
    finally:
        cell.model.module.float()


def _is_the_slope(learner: Any, params: dict[str, Tensor], episode: Episode, found: dict[str, Tensor]) -> None:
    def loss(scale: float) -> Tensor:
        moved = {name: value + scale * direction[name] for name, value in params.items()}
        state = learner.adapt(moved, episode.support)
        with torch.no_grad():
            return episode_loss(learner.predict(moved, state, episode.query), episode.query.labels)

    norm = math.sqrt(sum(float(grad.square().sum()) for grad in found.values()))
    assert norm > 1e-4
    rng, step = torch.Generator().manual_seed(2), 1e-6
    for _ in range(2):
        direction = {n: torch.randn(v.shape, generator=rng, dtype=torch.float64) for n, v in params.items()}
        # A random direction is nearly orthogonal to a gradient of many parameters: so part of it goes along.
        direction = {n: v / math.sqrt(sum(d.numel() for d in direction.values())) for n, v in direction.items()}
        direction = {n: v + found[n] / norm for n, v in direction.items()}
        slope = sum(float((grad * direction[n]).sum()) for n, grad in found.items())
        measured = float(loss(step) - loss(-step)) / (2 * step)
        assert abs(measured - slope) < 1e-6 * norm, f"{measured} by differences, {slope} by the meta-gradient"


def _is_start_minus_end(learner: Any, params: dict[str, Tensor], episode: Episode, found: dict[str, Tensor]) -> None:
    """Nichol et al. 2018, by hand: gradient steps on adapter and head, each from the support set's logits."""
    support, rate = episode.support, learner.config.inner_learning_rate
    with torch.no_grad():
        head = learner.head.start(params, learner.features(params, support.inputs), support.labels, support.n_way)
    fast = {**{name: value for name, value in params.items() if name.startswith(PREFIX)}, **head}
    for _ in range(learner.config.inner_steps):
        fast = {name: value.detach().requires_grad_() for name, value in fast.items()}
        features = learner.features({**params, **fast}, support.inputs)
        loss = episode_loss(learner.head.logits(params, fast, features), support.labels)
        grads = torch.autograd.grad(loss, list(fast.values()), materialize_grads=True)
        fast = {name: value - rate * grad for (name, value), grad in zip(fast.items(), grads, strict=True)}
    for name, value in params.items():
        expected = value - fast[name] if name in fast else torch.zeros_like(value)
        torch.testing.assert_close(found[name], expected.detach(), rtol=1e-8, atol=1e-12)
    assert any(grad.abs().max() > 1e-6 for grad in found.values())


def nothing_is_left_behind(cell: Cell, name: str) -> None:
    """Adaptation, answers and meta-gradients change no parameter, nothing in the module and no generator, and come out
    the same again."""
    learner = cell.learner(name)
    params, episode = cell.params(learner), cell.episode()
    kept = {n: v.clone() for n, v in params.items()}
    own = {n: v.clone() for n, v in cell.model.module.state_dict().items()}
    generator = torch.get_rng_state()

    def everything() -> list[Tensor]:
        state = learner.adapt(params, episode.support)
        part = learner.meta_grad(params, [episode])
        cell.model.frozen_features(cell.inputs)
        return [learner.predict(params, state, episode.query).detach(), part.loss, *part.grads.values()]

    assert all(torch.equal(a, b) for a, b in zip(everything(), everything(), strict=True))
    assert all(torch.equal(value, kept[n]) for n, value in params.items())
    assert all(torch.equal(value, own[n]) for n, value in cell.model.module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generator)
    assert trainable(cell.model.module) == cell.model.trainable


def an_accelerator_changes_nothing(cell: Cell) -> None:
    """In float64: neither to MAML's gradient of two tasks, which go in one stack, nor to features."""
    here, there = (FewShotModel.build(settings(cell.folder, cell.adapter)) for _ in range(2))
    with KeepDouble():
        expected = _of_two_tasks(cell, here, torch.device("cpu"))
        with Accelerator():
            found = _of_two_tasks(cell, there, DEVICE)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-7, atol=1e-9)


def _of_two_tasks(cell: Cell, model: FewShotModel, device: torch.device) -> list[Tensor]:
    model.module.double()
    model.to(device)
    learner: Any = build_learner(settings(cell.folder, cell.adapter), model)
    params = {name: value.to(device) for name, value in cell.params(cell.learner("maml"), torch.float64).items()}
    tasks = [random_episode(COUNTS, seed=seed, kind=cell.family.kind).to(device) for seed in (0, 1)]
    frozen = model.frozen_features(tasks[0].query.inputs)
    assert device.type == "cpu" or learner.tasks_at_once(tasks) == 2, learner._trials
    part = learner.meta_grad(params, tasks)
    return [frozen, *part.grads.values(), *part.logits]


def saved_and_loaded_it_answers_the_same(cell: Cell, name: str) -> None:
    """To the bit, in a learner that is made anew from the folder."""
    first = FewShotAdapter(learner := cell.learner(name), cell.params(learner))
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        second = FewShotAdapter.from_pretrained(folder)
    assert torch.equal(answers(first, cell.episode()), answers(second, cell.episode()))


def answers(adapter: FewShotAdapter, episode: Episode) -> Tensor:
    """Logits of the queries."""
    state = adapter.learner.adapt(adapter.params, episode.support)
    return adapter.learner.predict(adapter.params, state, episode.query).detach()


def a_text_is_read_alone(cell: Cell) -> None:
    """Features of a text depend neither on its batch nor on padding to its right, which the contract of pooling joins
    by padding to its left."""
    params = cell.params(cell.learner("protonet"))
    together = cell.model.features(params, cell.inputs).detach()
    padded = {name: torch.nn.functional.pad(value, (0, 3)) for name, value in cell.inputs.items()}
    torch.testing.assert_close(cell.model.features(params, padded).detach(), together, rtol=1e-4, atol=1e-5)
    for i, length in enumerate(cell.inputs["attention_mask"].sum(1).tolist()):
        row = {name: value[i : i + 1, :length] for name, value in cell.inputs.items()}
        torch.testing.assert_close(cell.model.features(params, row).detach()[0], together[i], rtol=1e-4, atol=1e-5)


def the_trunk_changes_nothing(cell: Cell) -> None:
    """Features through the layers below the first trained one, run once, and through all of them."""
    learner = cell.learner("maml")
    params, trunk = cell.params(learner), cell.model.trunk
    assert trunk is not None and trunk.depth == 1
    found = cell.model.features(params, cell.inputs).detach()
    cell.model.trunk = None
    try:
        expected = cell.model.features(params, cell.inputs).detach()
    finally:
        cell.model.trunk = trunk
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def plain_libraries_read_it(cell: Cell) -> None:
    """What is saved gives the same hidden states in plain PEFT or, of a full model, in plain transformers."""
    learner = cell.learner("protonet" if cell.adapter == "none" else "maml")
    params = cell.params(learner)
    with tempfile.TemporaryDirectory() as folder:
        FewShotAdapter(learner, params).save_pretrained(folder)
        plain = plain_model(cell.folder, folder, cell.adapter)
    with torch.no_grad(), cell.model.holding(params) as module:
        expected, found = module(**cell.inputs).last_hidden_state, plain(**cell.inputs).last_hidden_state
    if "attention_mask" in cell.inputs:
        real = cell.inputs["attention_mask"].bool()
        # A soft prompt's own rows come first.
        expected, found = (states[:, -real.shape[1] :][real] for states in (expected, found))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def plain_model(backbone: str, folder: str | Path, adapter: str) -> Any:
    """The model in ``folder`` by transformers and PEFT alone."""
    config = AutoConfig.from_pretrained(backbone)
    if adapter == "full":
        return reader(config).from_pretrained(folder, attn_implementation="eager").eval()
    # Of CLIP, the images' half is the backbone; of T5, the encoder.
    base = reader(config).from_pretrained(
        backbone, config=getattr(config, "vision_config", config), attn_implementation="eager"
    )
    return base.eval() if adapter == "none" else peft.PeftModel.from_pretrained(base, folder).eval()


def peft_alone_restores(cell: Cell) -> bool:
    """Whether PEFT's own files bring back every trained tensor, to be adapted further."""
    return is_adapted(cell.model.module) and peft_restores(cell.model.module)
