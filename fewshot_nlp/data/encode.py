"""From texts to tensors, and from episode specs to episodes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fewshot_nlp.checks import at_least, choice
from fewshot_nlp.config import LABEL_TEXTS, FewShotConfig
from fewshot_nlp.data.pool import Pool
from fewshot_nlp.data.sampler import draw, generator
from fewshot_nlp.types import OUT_OF_SCOPE, Batch, Episode, EpisodeSpec

#: Pool, split, and the row of an example or the name of a class.
Key = tuple[str, str, int | str]


class Encoder(Protocol):
    """From examples to what a backbone takes, in two steps, as the first one's work can be kept."""

    @property
    def kind(self) -> str:
        """What an example is: ``"text"`` or ``"image"``."""
        ...

    @property
    def cache_size(self) -> int:
        """How many encoded examples may be kept in memory, unless somebody says otherwise."""
        ...

    def __call__(self, examples: Sequence[Any], /) -> dict[str, Tensor]:
        """Both steps: inputs by name, each ``[len(examples), ...]``."""
        ...

    def encode(self, examples: Sequence[Any], /) -> Sequence[Any]:
        """Each example alone, as small as can be."""
        ...

    def collate(self, encoded: Sequence[Any], /) -> dict[str, Tensor]:
        """Encoded examples as one batch."""
        ...


class TextEncoder:
    """Tokenizes texts and pads them to the longest of the batch.

    Only ``input_ids`` and ``attention_mask`` are returned. ``token_type_ids`` are all zero for single texts, which is
    what backbones assume without them, and PEFT prompts lengthen the other inputs but not these.

    Args:
        tokenizer: a transformers tokenizer with a padding token.
        max_length: longest text in tokens, special tokens included; longer ones are cut.

    Raises:
        ValueError: no padding token, or a ``max_length`` that the tokenizer cannot keep.
    """

    kind = "text"
    #: 100,000 texts of 20 tokens take some 40 MB.
    cache_size = 100_000

    def __init__(self, tokenizer: Any, max_length: int = 64) -> None:
        at_least("max_length", max_length, 1)
        if tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no padding token. Set tokenizer.pad_token = tokenizer.eos_token.")
        special = tokenizer.num_special_tokens_to_add()
        if not special < max_length <= tokenizer.model_max_length:
            raise ValueError(
                f"max_length={max_length} is out of range. The tokenizer adds {special} special tokens and takes at "
                f"most {tokenizer.model_max_length}: use a value from {special + 1} to {tokenizer.model_max_length}."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask``, both int64 ``[len(texts), longest]``."""
        return self.collate(self.encode(texts))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, special tokens included, cut but not padded."""
        encoded = self.tokenizer(
            self._checked(texts),
            truncation=True,
            max_length=self.max_length,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        return encoded["input_ids"]

    def encode_names(self, names: Sequence[str]) -> list[list[int]]:
        """The same of names of classes, which are texts like others."""
        return self.encode(names)

    @staticmethod
    def _checked(texts: Sequence[str]) -> list[str]:
        if isinstance(texts, str) or not texts:
            raise ValueError(f"texts={texts!r} must be a list of one or more texts.")
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"texts[{i}]={text!r} is empty or no text. Remove it.")
        return list(texts)

    def collate(self, token_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """Stack token ids, padding on the tokenizer's side."""
        longest = max(map(len, token_ids))
        left = self.tokenizer.padding_side == "left"
        padding = [longest - len(ids) for ids in token_ids]

        def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
            return torch.tensor(
                [[value] * n + [*row] if left else [*row] + [value] * n for row, n in zip(rows, padding, strict=True)]
            )

        return {
            "input_ids": pad(token_ids, self.tokenizer.pad_token_id),
            "attention_mask": pad([[1] * len(ids) for ids in token_ids], 0),
        }


class HasPools(Protocol):
    """A sampler or a mixture."""

    @property
    def pools(self) -> Mapping[str, Pool]: ...


class EpisodeReader:
    """Reads the examples of a spec and encodes them.

    Encoded examples are kept by row, as episodes come back to the same rows again and again.

    Args:
        pools: a pool, several, what ``load_pools`` returns, a sampler or a mixture. One reader may serve all splits.
        encoder: how texts or images become tensors.
        cache_size: how many rows to keep, the latest used; by default what the encoder says.
        use_label_names: give the readable names of the classes with the support set.
        names_in_training_alone: give them with training episodes alone.
        label_texts: what is given for a name: ``"name"``, or ``"description"``, the pool's sentence about the class.
        unlabelled: texts of the domain that is to be answered for, given without labels beside training episodes.
        n_unlabelled: how many of them an episode has; which ones follows from its address.

    Raises:
        ValueError: two pools of one address, pools that the encoder does not take, names that it cannot read, classes
            without a description, too few unlabelled texts, or such of a split that is evaluated.
    """

    def __init__(
        self,
        pools: Pool | HasPools | Mapping[str, Pool] | Sequence[Pool],
        encoder: Encoder,
        cache_size: int | None = None,
        use_label_names: bool = False,
        label_texts: str = "name",
        unlabelled: Pool | None = None,
        n_unlabelled: int = 0,
        names_in_training_alone: bool = False,
    ) -> None:
        at_least("n_unlabelled", n_unlabelled, 0)
        if n_unlabelled > (0 if unlabelled is None else len(unlabelled)):
            raise ValueError(
                f"n_unlabelled={n_unlabelled} texts are more than the {0 if unlabelled is None else len(unlabelled)} "
                f"given as unlabelled. Lower it, or give a larger pool."
            )
        self.encoder = encoder
        self.cache_size = encoder.cache_size if cache_size is None else cache_size
        at_least("cache_size", self.cache_size, 0)
        self.use_label_names, self.names_in_training_alone = use_label_names, names_in_training_alone
        choice("label_texts", label_texts, LABEL_TEXTS)
        self.label_texts = label_texts
        self.unlabelled, self.n_unlabelled = unlabelled, n_unlabelled
        self._pools = pools_by_address(pools)
        if unlabelled is not None and unlabelled.split != "train":
            raise ValueError(
                f"The unlabelled texts are of the {unlabelled.split} split of {unlabelled.name!r}, which is evaluated. "
                f"Give the train split's."
            )
        if unlabelled is not None:
            # What is encoded is kept by address.
            pools_by_address([*self._pools.values(), unlabelled])
            self._unlabelled_rows = [row for rows in unlabelled.rows_by_class.values() for row in rows]
        for pool in [*self._pools.values(), *([] if unlabelled is None else [unlabelled])]:
            if pool.kind != encoder.kind:
                raise ValueError(
                    f"The pool {pool.name}/{pool.split} holds {pool.kind}s, and the encoder takes {encoder.kind}s. Use "
                    f"a backbone for {pool.kind}s, or other data."
                )
        for pool in self._pools.values():
            if self._names(pool.split):
                _check_names(pool, label_texts)
        self._encoded: OrderedDict[Key, Any] = OrderedDict()

    @classmethod
    def from_config(
        cls,
        config: FewShotConfig,
        pools: Pool | HasPools | Mapping[str, Pool] | Sequence[Pool],
        encoder: Encoder,
        **options: Any,
    ) -> EpisodeReader:
        """One that tells of classes what a learner of ``config`` is to know; ``options``, ``Raises``: as above."""
        return cls(
            pools,
            encoder,
            use_label_names=config.use_label_names,
            names_in_training_alone=config.names_in_training_alone,
            label_texts=config.label_texts,
            **options,
        )

    def __call__(self, spec: EpisodeSpec) -> Episode:
        """The episode at ``spec``: examples class by class, queries out of scope last. Labels are classes, or where the
        pool has targets, those.

        Raises:
            ValueError: the spec is of another pool, or has neither examples nor names.
        """
        pool = self._pools.get((spec.pool, spec.split))
        if pool is None:
            known = ", ".join("/".join(address) for address in self._pools)
            raise ValueError(f"The episode {spec.address} is of none of the reader's pools: {known}.")
        support: list[int | str] = [row for rows in spec.support for row in rows]
        query: list[int | str] = [*(row for rows in spec.query for row in rows), *spec.out_of_scope]
        support_labels = [label for label, rows in enumerate(spec.support) for _ in rows]
        names = list(spec.classes) if self._names(spec.split) else []
        if not support and not names:
            raise ValueError(f"{spec.address} has no examples. Use k_shot of at least 1, or use_label_names=True.")
        query_labels = [label for label, rows in enumerate(spec.query) for _ in rows]
        query_labels += [OUT_OF_SCOPE] * len(spec.out_of_scope)
        return Episode(
            spec,
            self._batch(pool, support, support_labels, spec, names),
            self._batch(pool, query, query_labels, spec),
            self._without_labels(spec),
        )

    def _names(self, split: str) -> bool:
        """Whether episodes of ``split`` come with the names of their classes."""
        return self.use_label_names and (split == "train" or not self.names_in_training_alone)

    def _without_labels(self, spec: EpisodeSpec) -> Batch | None:
        if self.unlabelled is None or not self.n_unlabelled or spec.split != "train":
            return None
        rng = generator("unlabelled", spec.address)
        rows: list[int | str] = draw(rng, self._unlabelled_rows, self.n_unlabelled)
        return self._batch(self.unlabelled, rows, [OUT_OF_SCOPE] * len(rows), spec)

    def _batch(
        self, pool: Pool, examples: list[int | str], labels: list[int], spec: EpisodeSpec, names: Sequence[str] = ()
    ) -> Batch:
        keys: list[Key] = [(pool.name, pool.split, example) for example in [*examples, *names]]
        missing = list(dict.fromkeys(key for key in keys if key not in self._encoded))
        fresh: dict[Key, Any] = {}
        if missing:
            rows = [row for *_, row in missing if isinstance(row, int)]
            if rows and not 0 <= min(rows) <= max(rows) < pool.dataset.num_rows:
                raise ValueError(f"The episode {spec.address} has rows beyond the {pool.dataset.num_rows} of its pool.")
            said = [_label_text(pool, each, self.label_texts) for *_, each in missing if isinstance(each, str)]
            # Examples come first, as in ``keys``.
            fresh = dict(zip(missing, encode_with_names(self.encoder, pool.examples(rows), said), strict=True))
        inputs = self.encoder.collate([fresh[key] if key in fresh else self._encoded[key] for key in keys])
        self._remember(keys, fresh)
        if pool.target_column_name is not None:
            # One group makes the task, and its place among the classes, 0, says nothing.
            targets = torch.tensor(pool.targets([row for row in examples if isinstance(row, int)]))
            return labelled(inputs, targets, 1)
        return labelled(inputs, torch.tensor(labels, dtype=torch.int64), spec.n_way)

    def _remember(self, keys: list[Key], fresh: dict[Key, Any]) -> None:
        self._encoded.update(fresh)
        for key in keys:
            self._encoded.move_to_end(key)
        while len(self._encoded) > self.cache_size:
            self._encoded.popitem(last=False)


def encode_with_names(encoder: Encoder, examples: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """Encoded ``examples``, then ``names`` of classes, of either of which there may be none."""
    encoded = list(encoder.encode(examples)) if len(examples) else []
    return encoded + (encoder.encode_names(names) if isinstance(encoder, TextEncoder) and names else [])


def labelled(inputs: dict[str, Tensor], labels: Tensor, n_way: int) -> Batch:
    """A batch of the first rows of ``inputs``, one a label; rows beyond them are the names of the classes."""
    n = len(labels)
    names = {name: rows[n:] for name, rows in inputs.items()} if len(next(iter(inputs.values()))) > n else None
    return Batch({name: rows[:n] for name, rows in inputs.items()}, labels, n_way, names)


def _label_text(pool: Pool, label_name: str, label_texts: str) -> str:
    return pool.descriptions[label_name] if label_texts == "description" else pool.readable_name(label_name)


def _check_names(pool: Pool, label_texts: str) -> None:
    if pool.kind != "text":
        raise ValueError(f"use_label_names reads words, and {pool.name!r} holds {pool.kind}s. Leave it out.")
    for name in pool.label_names:
        if label_texts == "description":
            if name not in pool.descriptions:
                raise ValueError(
                    f"The class {name!r} of {pool.name!r} has no description, and label_texts='description' reads it. "
                    f"Add a column label_description with a sentence about each class, or use label_texts='name'."
                )
        elif not any(map(str.isalpha, pool.readable_name(name))):
            raise ValueError(
                f"The class {name!r} of {pool.name!r} has no words in its name, and use_label_names reads them. Add a "
                f"column label_name with what it is called, or leave use_label_names out."
            )


def pools_by_address(pools: Pool | HasPools | Mapping[str, Pool] | Sequence[Pool]) -> dict[tuple[str, str], Pool]:
    """Pools by (name, split), whichever way they are given.

    Raises:
        ValueError: two different pools have one address.
    """
    if isinstance(pools, Pool):
        given = [pools]
    elif isinstance(pools, Sequence):
        given = list(pools)
    else:
        given = list((pools if isinstance(pools, Mapping) else pools.pools).values())
    found: dict[tuple[str, str], Pool] = {}
    for pool in given:
        other = found.setdefault((pool.name, pool.split), pool)
        if other is not pool and other.fingerprint != pool.fingerprint:
            raise ValueError(
                f"Two different pools are called {pool.name}/{pool.split}. Name them apart: load_pools(..., name=...)."
            )
    return found
