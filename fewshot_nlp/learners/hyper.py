"""A hypernetwork that writes where MAML starts on a task: Vuorio et al., Multimodal Model-Agnostic Meta-Learning,
NeurIPS 2019 (arXiv:1910.13616), whose modulation is generated as in Ha, Dai and Le, HyperNetworks, ICLR 2017
(arXiv:1609.09106).

A task is described by the mean ``m`` of its support features, classes weighted alike, and the mean ``t`` of its class
names' features, zero where names are not given (``use_label_names``); both under the adapter's meta-parameters θ, of
unit length, ``[hidden_size]`` each. From the description a code ``e``, and from the code a change of rank one for each
tensor of the adapter, seen as a matrix ``[rows, columns]``::

    e = tanh(W [m; t] + b)  [code_size],   φ_0^(l) = θ^(l) + (U^(l) e) (V^(l) e)ᵀ

and MAML's inner loop goes on from ``φ_0``; with ``inner_steps=0`` what is written is all the adaptation there is. The
meta-gradient passes through the hypernetwork. All U start at zero, so that an untrained one is MAML from θ. Names that
are given are support examples, too, as for other learners.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fewshot_nlp.checks import at_least
from fewshot_nlp.learners.gradient import GradientLearner
from fewshot_nlp.models.heads import class_means
from fewshot_nlp.types import Batch, Params


@dataclass
class HyperOptions:
    """``code_size``: numbers that a task is described by."""

    code_size: int = 16

    def __post_init__(self) -> None:
        at_least("code_size", self.code_size, 1)


class HyperMAML(GradientLearner):
    """MAML from a start that is written for each task."""

    title = "MAML from a generated start ([Vuorio et al. 2019](https://arxiv.org/abs/1910.13616))"
    tasks = ("classification",)
    reads_names = True
    Options = HyperOptions

    def build_networks(self) -> dict[str, nn.Module]:
        shapes = [value.shape for value in self._body(self.model.init_params()).values()]
        return {"writer": _Writer(shapes, self.model.hidden_size, self.options.code_size)}

    def _check_estimator(self) -> None:
        super()._check_estimator()
        if self.estimator_name == "reptile":
            raise ValueError(
                f"estimator='reptile' trains no hypernetwork, which learner={self.config.learner!r} has. "
                f"Use learner='reptile', or estimator='exact' or 'first_order'."
            )

    def _known(self, support: Batch) -> Batch:
        support = support.recordable()
        return replace(support.with_names_as_examples(self.config.label_name_weight), names=support.names)

    def description(self, params: Params, support: Batch) -> Tensor:
        """``[2 * hidden_size]``: the task, whatever the order of its examples and classes."""
        features = normalize(self.features(params, support.inputs), dim=-1)
        examples = class_means(features, support.labels, support.n_way).mean(dim=0)
        if support.names is None:
            return torch.cat([normalize(examples, dim=0), torch.zeros_like(examples)])
        names = normalize(self.features(params, support.names), dim=-1).mean(dim=0)
        return torch.cat([normalize(examples, dim=0), normalize(names, dim=0)])

    def _start(self, params: Params, support: Batch) -> tuple[dict[str, Tensor], Tensor]:
        body = self._body(params)
        changes = self.networks("writer", params, self.description(params, support))
        written = {name: value + change for (name, value), change in zip(body.items(), changes, strict=True)}
        return super()._start({**params, **written}, support)


class _Writer(nn.Module):
    """From a description ``[2 * size]`` to a change for each of ``shapes``."""

    def __init__(self, shapes: list[torch.Size], size: int, code_size: int) -> None:
        super().__init__()
        self.shapes, self.size = shapes, size
        rows = [shape[0] if shape else 1 for shape in shapes]
        self.code = nn.Linear(2 * size, code_size)
        self.left = nn.ModuleList(nn.Linear(code_size, each, bias=False) for each in rows)
        self.right = nn.ModuleList(
            nn.Linear(code_size, shape.numel() // each, bias=False) for shape, each in zip(shapes, rows, strict=True)
        )
        for weight in self.left.parameters():
            nn.init.zeros_(weight)

    def forward(self, description: Tensor) -> list[Tensor]:
        # Of unit mean square, so that codes differ from task to task.
        code = torch.tanh(self.code(self.size**0.5 * description))
        pairs = zip(self.left, self.right, self.shapes, strict=True)
        return [torch.outer(left(code), right(code)).view(shape) for left, right, shape in pairs]
