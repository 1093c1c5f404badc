"""One exact second-order MAML step as this package, a plain loop, higher and TorchOpt take it (for `meta_step.py`).

The plain loop is what learn2learn does: transformers' eager attention, `torch.func.functional_call`,
`torch.autograd.grad(create_graph=True)`. higher and TorchOpt take a module whose every weight is adapted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cross_entropy, normalize
from transformers import BertConfig, BertModel

from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.learners import build_learner
from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.backbone import ATTENTION
from fewshot_nlp.types import Batch, Episode, EpisodeSpec

N_WAY, SHOTS, STEPS, RATE, SCALE = 5, 5, 5, 0.05, 10.0
SETTINGS = {
    "lora": "LoRA, all layers",
    "lora_top": "LoRA, top third of the layers",
    "full": "full fine-tuning",
}


#: Of MiniLM.
SHAPE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


def build_module(setting: str, attention: str, device: torch.device) -> Any:
    """A random BERT of ``SHAPE``, the same one for every contender."""
    torch.manual_seed(0)
    config = BertConfig(**SHAPE, hidden_act="gelu")
    config._attn_implementation = attention
    # Drawn on the CPU, where random numbers are the same for every device.
    module = BertModel(config, add_pooling_layer=False).eval()
    if setting == "full":
        return module.requires_grad_(True).to(device)
    layers = [4, 5] if setting == "lora_top" else None
    lora = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], layers_to_transform=layers, init_lora_weights=False
    )
    return get_peft_model(module.requires_grad_(False), lora).eval().to(device)


def build_episodes(lengths: list[int], tasks: int, device: str) -> list[Episode]:
    """Tasks whose sentences have the given numbers of tokens, in turn."""
    rng = torch.Generator().manual_seed(1)
    endless = iter(lengths * 1000)

    def batch() -> Batch:
        labels = torch.arange(N_WAY).repeat_interleave(SHOTS)
        own = torch.tensor([next(endless) for _ in labels])
        mask = (torch.arange(int(own.max()))[None] < own[:, None]).long()
        ids = torch.randint(1000, 30000, mask.shape, generator=rng) * mask
        return Batch({"input_ids": ids, "attention_mask": mask}, labels, N_WAY)

    specs = [EpisodeSpec("train", i, "random", tuple("abcde"), (), ()) for i in range(tasks)]
    return [Episode(spec, batch(), batch()).to(device) for spec in specs]


def device_of(episodes: list[Episode]) -> torch.device:
    return episodes[0].query.labels.device


Gradient = Callable[[], dict[str, Tensor]]


def ours(
    setting: str,
    episodes: list[Episode],
    dtype: torch.dtype,
    graph_memory_gb: float | None = None,
    frozen_dtype: str = "float32",
    seen: bool = False,
    stacking: bool | None = None,
) -> Gradient:
    """This package's learner; the gradient by name without the prefix ``model.``. ``seen``: the texts were trained or
    evaluated on before, so that what the layers below the first adapter make of them is known."""
    if stacking is False and graph_memory_gb is None and device_of(episodes).type == "cpu":
        raise CannotTake("on a CPU, tasks of this size are in no stack")
    if setting == "full" and frozen_dtype != "float32":
        raise CannotTake("nothing is frozen")
    if setting != "lora_top" and seen:
        raise CannotTake("the lowest layer is trained")
    config = FewShotConfig(
        learner="maml", head="linear", head_init="zero", inner_steps=STEPS, inner_learning_rate=RATE, head_scale=SCALE,
        frozen_dtype=frozen_dtype, graph_memory_gb=graph_memory_gb,
    )  # fmt: skip
    module = build_module(setting, ATTENTION, device_of(episodes)).to(dtype)
    learner = build_learner(config, FewShotModel(module, None, config))
    learner.stacking = stacking
    params = {name: value.to(dtype) for name, value in learner.init_params().items()}

    def gradient() -> dict[str, Tensor]:
        if learner.model.trunk is not None and not seen:
            learner.model.trunk.forget()
        grads = learner.meta_grad(params, episodes).grads
        return {name.removeprefix("model."): grad for name, grad in grads.items() if name.startswith("model.")}

    return gradient


def loss_of(forward: Callable[..., Any], head: list[Tensor], batch: Batch) -> Tensor:
    hidden = forward(**batch.inputs).last_hidden_state
    mask = batch.inputs["attention_mask"][..., None].to(hidden.dtype)
    features = normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return cross_entropy(SCALE * (features @ head[0].T + head[1]), batch.labels)


def new_head(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    shapes = (N_WAY, SHAPE["hidden_size"]), (N_WAY,)
    return [torch.zeros(*shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]


def plain_loop(setting: str, episodes: list[Episode], dtype: torch.dtype) -> Gradient:
    """The whole inner loop in one graph."""
    module = build_module(setting, "eager", device_of(episodes)).to(dtype)
    names = [name for name, value in module.named_parameters() if value.requires_grad]
    start = [dict(module.named_parameters())[name] for name in names]

    def gradient() -> dict[str, Tensor]:
        total = [torch.zeros_like(value) for value in start]
        for episode in episodes:
            body, head = start, new_head(dtype, device_of(episodes))
            for _ in range(STEPS):
                call = partial(functional_call, module, dict(zip(names, body, strict=True)))
                loss = loss_of(lambda call=call, **inputs: call(args=(), kwargs=inputs), head, episode.support)
                grads = torch.autograd.grad(loss, [*body, *head], create_graph=True)
                body = [value - RATE * grad for value, grad in zip(body, grads[: len(body)], strict=True)]
                head = [value - RATE * grad for value, grad in zip(head, grads[len(body) :], strict=True)]
            call = partial(functional_call, module, dict(zip(names, body, strict=True)))
            loss = loss_of(lambda call=call, **inputs: call(args=(), kwargs=inputs), head, episode.query)
            for sum_, grad in zip(total, torch.autograd.grad(loss, start), strict=True):
                sum_ += grad
        return dict(zip(names, total, strict=True))

    return gradient


class CannotTake(Exception):
    """Why a library has no answer in a setting; it stands in the table."""


class WithHead(torch.nn.Module):
    """Backbone and head in one module, as higher and TorchOpt want them."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module
        own = next(module.parameters())
        self.weight, self.bias = (torch.nn.Parameter(value.detach()) for value in new_head(own.dtype, own.device))

    def forward(self, batch: Batch) -> Tensor:
        return loss_of(self.module, [self.weight, self.bias], batch)


def by_higher(setting: str, episodes: list[Episode], dtype: torch.dtype) -> Gradient:
    import higher

    if setting != "full":
        raise CannotTake("cannot take a PEFT model")
    model = WithHead(build_module(setting, "eager", device_of(episodes))).to(dtype)

    def gradient() -> dict[str, Tensor]:
        model.zero_grad()
        for episode in episodes:
            optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
            with higher.innerloop_ctx(model, optimiser, copy_initial_weights=False) as (fast, inner):
                for _ in range(STEPS):
                    inner.step(fast(episode.support))
                fast(episode.query).backward()
        return {name: value.grad.clone() for name, value in model.module.named_parameters()}

    return gradient


def by_torchopt(setting: str, episodes: list[Episode], dtype: torch.dtype) -> Gradient:
    import torchopt

    if setting != "full":
        raise CannotTake("MetaSGD fails on frozen parameters")
    model = WithHead(build_module(setting, "eager", device_of(episodes))).to(dtype)
    names = [name for name, _ in model.module.named_parameters()]
    start = list(model.module.parameters())

    def gradient() -> dict[str, Tensor]:
        total = [torch.zeros_like(value) for value in start]
        for episode in episodes:
            optimiser = torchopt.MetaSGD(model, lr=RATE)
            before = torchopt.extract_state_dict(model, by="reference")
            for _ in range(STEPS):
                optimiser.step(model(episode.support))
            grads = torch.autograd.grad(model(episode.query), start)
            for sum_, grad in zip(total, grads, strict=True):
                sum_ += grad
            torchopt.recover_state_dict(model, before)
        return dict(zip(names, total, strict=True))

    return gradient


CONTENDERS: dict[str, Callable[..., Gradient]] = {
    "plain loop": plain_loop,
    "fewshot_nlp": ours,
    "fewshot_nlp, step by step": partial(ours, graph_memory_gb=0.0, stacking=False),
    "fewshot_nlp, one task at a time": partial(ours, stacking=False),
    "fewshot_nlp, texts seen before": partial(ours, seen=True),
    "fewshot_nlp, bfloat16": partial(ours, frozen_dtype="bfloat16"),
    "fewshot_nlp, bfloat16, texts seen before": partial(ours, frozen_dtype="bfloat16", seen=True),
    "higher": by_higher,
    "TorchOpt": by_torchopt,
}
