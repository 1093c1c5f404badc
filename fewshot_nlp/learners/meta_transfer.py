"""Meta-transfer learning: Sun, Liu, Chua and Schiele, CVPR 2019 (arXiv:1812.02403).

The weights of a pre-trained body stay frozen. Meta-learned are a scale ``Φ1`` and a shift ``Φ2`` for every output
channel of its linear and convolutional layers, which start at 1 and 0; a task adapts its head alone::

    y = (Φ1 ∘ W) x + (b + Φ2),   Φ1 [out, 1 ...], W [out, in ...], Φ2 and b [out]
    w_{k+1} = w_k - β ∇_w S(w_k; Φ),   meta-gradient = dQ(w_K; Φ) / dΦ

Scaled are all frozen layers in the stack of blocks (BERT: query, key, value, three dense ones a block), or those that
``target_modules`` names; a layer without a bias is not shifted. In a convolution the paper scales each pair of input
and output channels; in a linear layer that would be every weight, so that output channels are scaled here in both. Its
head starts at learned weights for a fixed number of classes; here it starts where ``head_init`` says, which favours no
class. An adapter, if there is one, is trained beside; ``adapter="none"`` is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.cache import FixedModel
from fewshot_nlp.types import Params


@dataclass
class MetaTransferOptions:
    """``target_modules``: last parts of the names of the layers to scale and shift; all in the blocks if not given."""

    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        names = self.target_modules
        if names is not None and (not isinstance(names, list) or not all(isinstance(n, str) for n in names)):
            raise ValueError(f"target_modules={names!r} must be a list of names of layers, such as [query, value].")


class ScaleAndShift(nn.Module):
    """``scale`` and ``shift`` of all layers, one after another.

    Args:
        shapes: of the frozen tensors, ``<layer>.weight`` and, where the layer has one, ``<layer>.bias``.
    """

    def __init__(self, shapes: Mapping[str, torch.Size]) -> None:
        super().__init__()
        self.weights, self.biases = ([n for n in shapes if n.endswith(end)] for end in (".weight", ".bias"))
        self.scale = nn.Parameter(torch.ones(sum(shapes[name][0] for name in self.weights)))
        if self.biases:
            self.shift = nn.Parameter(torch.zeros(sum(shapes[name][0] for name in self.biases)))

    def forward(self, frozen: Params) -> dict[str, Tensor]:
        """The tensors ``frozen``, scaled and shifted."""
        scales = self.scale.split([len(frozen[name]) for name in self.weights])
        changed = {
            name: frozen[name] * scale.view(-1, *[1] * (frozen[name].dim() - 1))
            for name, scale in zip(self.weights, scales, strict=True)
        }
        if self.biases:
            shifts = self.shift.split([len(frozen[name]) for name in self.biases])
            changed |= {name: frozen[name] + shift for name, shift in zip(self.biases, shifts, strict=True)}
        return changed


class MetaTransfer(GradientLearner):
    """Scales and shifts of a frozen body are learned across tasks; a task adapts its head."""

    title = "meta-transfer learning by scales and shifts ([Sun et al. 2019](https://arxiv.org/abs/1812.02403))"
    fast_body = False
    keeps_trunk = False
    Options: ClassVar[type] = MetaTransferOptions

    def build_networks(self) -> dict[str, nn.Module]:
        frozen = self._frozen()
        if not frozen:
            named = self.options.target_modules
            raise ValueError(
                f"learner='meta_transfer' scales and shifts frozen layers, and there are none"
                f"{f' called {named}' if named else ''} with adapter={self.config.adapter!r}. Use adapter='none'"
                f"{', or other target_modules' if named else ''}."
            )
        return {"modulation": ScaleAndShift({name: value.shape for name, value in frozen.items()})}

    def _frozen(self) -> dict[str, Tensor]:
        """What is scaled and shifted, by the names of the module."""
        module, found = self.model.module, {}
        blocks = tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, nn.ModuleList))
        for name, layer in module.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d) or layer.weight.requires_grad:
                continue
            # PEFT calls a layer that it changes by the name of the layer and "base_layer".
            own = name.removesuffix(".base_layer").rsplit(".", 1)[-1]
            named = self.options.target_modules
            if own in named if named else name.startswith(blocks):
                # A bias that an adapter trains moves by itself.
                found.update({f"{name}.{n}": v.detach() for n, v in layer.named_parameters() if not v.requires_grad})
        return found

    def _modulated(self, params: Params) -> dict[str, Tensor]:
        with self.model.turn:
            return self.networks("modulation", params, self._frozen())

    def bare_features(self, params: Params, inputs: dict[str, Tensor]) -> Tensor:
        # What is fixed has them in it.
        frozen = {} if self.model.fixed else self._modulated(params)
        return self.model.features(params, inputs, frozen)

    def fixed(self, params: Params) -> MetaTransfer:
        if self.model.transductive:
            return self
        return self._on(FixedModel(self.model, params, self._modulated(params)))
