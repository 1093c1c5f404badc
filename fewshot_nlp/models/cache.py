"""Features that no task changes, computed once for each distinct text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from fewshot_nlp.models.model import FewShotModel
from fewshot_nlp.types import Params, split_names


class FeatureCache:
    """Remembers the rows of ``compute(inputs)``.

    The key is all that is given of a text, without padding, or a hash of all that is given of an image, so an entry
    cannot be stale while ``compute`` stays the same.
    """

    def __init__(self, compute: Callable[[dict[str, Tensor]], Tensor]) -> None:
        self.compute = compute
        self.known: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        """``[n, size]`` from batch inputs."""
        keys = _keys(inputs)
        missing = [i for i, key in enumerate(keys) if key not in self.known]
        if missing:
            found = self.compute({name: tensor[missing] for name, tensor in inputs.items()})
            self.known.update(zip((keys[i] for i in missing), found, strict=True))
        return torch.stack([self.known[key] for key in keys])


def _keys(inputs: dict[str, Tensor]) -> list[bytes]:
    rows = {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in sorted(inputs.items())}
    names, count = " ".join(rows).encode(), len(next(iter(rows.values())))
    if "attention_mask" not in rows:
        return [
            hashlib.sha256(names + b"".join(row[i].tobytes() for row in rows.values())).digest() for i in range(count)
        ]
    # From the first token to the last: a mask may have holes.
    kept = [np.flatnonzero(row) for row in rows["attention_mask"]]
    spans = [slice(own[0], own[-1] + 1) if len(own) else slice(0) for own in kept]
    return [names + b"".join(row[i, span].tobytes() for row in rows.values()) for i, span in enumerate(spans)]


class FrozenFeatures(FeatureCache):
    """Unit features of the backbone without its adapter."""

    def __init__(self, model: FewShotModel) -> None:
        super().__init__(lambda inputs: normalize(model.frozen_features(inputs), dim=-1))
        self.model = model

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        # Where an input's features depend on the others beside it, none can be kept.
        return self.compute(inputs) if self.model.transductive else super().__call__(inputs)

    def embed(self, examples: Sequence[Any], batch_size: int = 64) -> np.ndarray:
        """``[len(examples), hidden_size]`` of texts or images, float32 in the host's memory; none of them is kept."""
        return embedded(self.model, self.compute, examples, batch_size).float().numpy()


@torch.no_grad()
def embedded(
    model: FewShotModel, compute: Callable[[dict[str, Tensor]], Tensor], examples: Sequence[Any], batch_size: int = 64
) -> Tensor:
    """``compute`` of texts or images as ``model`` takes them, ``[len(examples), size]`` in the host's memory."""
    encoder, found, order = model.encoder(), list[Tensor](), list(range(len(examples)))
    texts = encoder.encode(examples) if encoder.kind == "text" else None
    if texts is not None:
        # Texts of like length go together.
        order.sort(key=lambda i: len(texts[i]))
    for first in range(0, len(order), batch_size):
        rows = order[first : first + batch_size]
        # Images are large, and encoded some at a time.
        encoded = [texts[i] for i in rows] if texts is not None else encoder.encode([examples[i] for i in rows])
        inputs = encoder.collate(encoded)
        found.append(compute({name: value.to(model.device) for name, value in inputs.items()}).cpu())
    return torch.cat(found)[torch.tensor(order).argsort()]


class FixedModel(FewShotModel):
    """A model whose features are those of one set of parameters, whatever parameters it is given later."""

    fixed = True

    def __init__(self, model: FewShotModel, params: Params, frozen: Params = MappingProxyType({})) -> None:
        # All but its features are the model's, and what of its layers is kept.
        self.__dict__.update(model.__dict__)
        fixed, held = ({name: value.detach() for name, value in part.items()} for part in (params, frozen))
        self._cache = FeatureCache(lambda inputs: FewShotModel.features(self, fixed, inputs, held))

    def features(self, params: Params, inputs: dict[str, Tensor], frozen: Params = MappingProxyType({})) -> Tensor:
        # Scores of names are another task's for the same text.
        return self._cache.compute(inputs) if split_names(inputs)[1] else self._cache(inputs)
