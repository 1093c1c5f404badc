"""From any data set to pools: texts or images by class, in class-disjoint splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Image, Value, concatenate_datasets

from fewshot_nlp.checks import at_least, choice
from fewshot_nlp.data.columns import (
    check_targets,
    checked_images,
    checked_texts,
    class_names,
    find_columns,
    image_keys,
    is_image,
    readable,
    remarks,
)
from fewshot_nlp.data.config import DUPLICATES, EpisodeConfig
from fewshot_nlp.data.leakage import refuse_shared, shared_with_later, text_key
from fewshot_nlp.data.loading import open_dataset
from fewshot_nlp.data.splits import (
    DEFAULT_FRACTIONS,
    check_splits,
    own_splits,
    random_splits,
    read_split_file,
)


@dataclass(frozen=True, eq=False)
class Pool:
    """The examples of one split, by class. They stay in the data set's file until they are asked for.

    Attributes:
        name: name of the data set.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        rows_by_class: rows of ``dataset`` of each class, ascending; classes in alphabetical order.
        dataset: all rows of the data set, also those of other splits.
        column_name: column of ``dataset`` that holds the texts or images.
        target_column_name: column of ``dataset`` that holds the numbers of a regression. Its "classes" are the groups
            that tasks are made of, such as topics or annotators.
        readable_names: what to call a class, where its own name is an id and the data set has a better one.
        descriptions: one sentence about a class, where the data set has it.
        num_dropped: rows left out because a later split, or one that is evaluated, holds the same text, image or class.
        num_shared: such rows that were kept.
        hub_id: id of the data set, if it was loaded from the Hub. A local file may have the name of another's data.
        config_name: configuration of the data set, if it is one of several; of ``home_intents`` the language.
    """

    name: str
    split: str
    rows_by_class: Mapping[str, tuple[int, ...]]
    dataset: Dataset = field(repr=False)
    column_name: str = "text"
    target_column_name: str | None = None
    readable_names: Mapping[str, str] = field(default_factory=dict, repr=False)
    descriptions: Mapping[str, str] = field(default_factory=dict, repr=False)
    num_dropped: int = 0
    num_shared: int = 0
    hub_id: str | None = None
    config_name: str | None = None

    @property
    def label_names(self) -> list[str]:
        """The classes."""
        return list(self.rows_by_class)

    def __len__(self) -> int:
        return sum(map(len, self.rows_by_class.values()))

    @property
    def kind(self) -> str:
        """What an example is: ``"text"`` or ``"image"``."""
        return "image" if is_image(self.dataset.features[self.column_name]) else "text"

    def examples(self, rows: Sequence[int]) -> list[Any]:
        """What ``rows`` hold, in their order: texts, or Pillow images.

        Raises:
            OSError: a mapped file was cut short, beyond whose end reading would kill the process without a word.
        """
        for path, size in self._sizes.items():
            left = path.stat().st_size if path.exists() else size
            if left < size:
                raise OSError(f"{path} had {size} bytes when it was opened, and has {left}.")
        return list(self.dataset[list(rows)][self.column_name]) if rows else []

    def contents(self, rows: Sequence[int]) -> list[str]:
        """What tells the examples of ``rows`` from others: the text itself, or a hash of the image's file."""
        return checked_images(self.dataset.select(rows), self.column_name) if self.kind == "image" else self.texts(rows)

    def keys(self, rows: Sequence[int]) -> list[str]:
        """What is equal for examples that are the same up to spelling or file format; see ``leakage``."""
        if self.kind == "image":
            return image_keys(self.dataset.select(rows), self.column_name)
        return [text_key(text) for text in self.texts(rows)]

    def texts(self, rows: Sequence[int]) -> list[str]:
        """The texts of ``rows``, in their order.

        Raises:
            TypeError: the pool holds images.
        """
        if self.kind != "text":
            raise TypeError(f"The pool {self.name}/{self.split} holds {self.kind}s, not texts. Ask for its examples.")
        return self.examples(rows)

    def targets(self, rows: Sequence[int]) -> list[float]:
        """The numbers of ``rows``, in their order; only where there is a ``target_column_name``."""
        return [float(target) for target in self.dataset[list(rows)][self.target_column_name]] if rows else []

    def readable_name(self, label_name: str) -> str:
        """What to call a class in words: what the data set calls it, or else its own name without underscores."""
        return self.readable_names.get(label_name) or readable(label_name)

    @cached_property
    def _sizes(self) -> dict[Path, int]:
        """Bytes of each file of the data set. One that is deleted stays readable as long as it is mapped."""
        paths = [Path(file["filename"]) for file in self.dataset.cache_files]
        return {path: path.stat().st_size for path in paths if path.exists()}

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the classes, their rows and contents: the same for the same data in any process, on any machine."""
        digest = hashlib.sha256()
        for name, rows in self.rows_by_class.items():
            digest.update(json.dumps([name, rows, self.contents(rows)]).encode())
            if self.target_column_name is not None:
                digest.update(json.dumps(self.targets(rows)).encode())
        return digest.hexdigest()


def load_pools(
    dataset: str | Path | Dataset | DatasetDict,
    *,
    name: str | None = None,
    dataset_config_name: str | None = None,
    revision: str | None = None,
    text_column_name: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    target_column_name: str | None = None,
    splits: Mapping[str, Sequence[str]] | None = None,
    split_file: str | Path | None = None,
    split_seed: int = 0,
    split_fractions: Sequence[float] = DEFAULT_FRACTIONS,
    min_examples: int = 1,
    duplicates: str = "error",
) -> dict[str, Pool]:
    """Pools of a data set by split, no class in two of them.

    The splits are, in this order: ``splits`` or ``split_file``; the data set's own, where they are named train,
    validation and test and share no class; else all rows together are split by class at random. Most data sets have
    the same classes in train and test, so theirs are put together and split anew. A part without rows counts for none.

    Args:
        dataset: ``"home_intents"``, ``"glyphs"``, a Hub id, a csv, tsv, json, jsonl, parquet or arrow file, a
            folder of such, one written by ``save_to_disk`` or one of class folders of images, a ``Dataset`` or a
            ``DatasetDict``.
        name: name of the pools; by default that of the data set.
        dataset_config_name: configuration of a Hub data set; the language of ``home_intents``.
        revision: branch, tag or commit of a Hub data set.
        text_column_name, image_column_name, label_column_name: columns, found by type and name if not given. Where
            there are both, examples are the images.
        target_column_name: column of the numbers that a regression answers with. A task is then one class of
            ``label_column_name``, its group of examples, and splits share no group.
        splits: lists of class names under ``train``, ``validation``, ``test``; classes in none are left out.
        split_file: JSON file of the same.
        split_seed: seed of the random splits, which depend on it and the class names alone.
        split_fractions: shares of classes in train, validation and test; 0 leaves a split out.
        min_examples: leave out classes with fewer examples.
        duplicates: what to do with a text, image or class that is in two splits, also where it is spelt or stored in
            another way (see ``leakage``). ``"error"``; ``"drop"`` it from the earlier split, so that the test split
            stays what it is; ``"keep"``. The pools count it. Repeats inside a split are always kept.

    Raises:
        ValueError, FileNotFoundError, TypeError, ImportError: bad input, named with the remedy.
    """
    choice("duplicates", duplicates, DUPLICATES)
    at_least("min_examples", min_examples, 1)
    if splits is not None and split_file is not None:
        raise ValueError("Both splits and split_file are given. Give one.")
    opened, found_name, hub_id, config_name = open_dataset(dataset, dataset_config_name, revision)
    for part_name, part in opened.items():
        if part.format["type"] == "custom":
            raise ValueError(
                f"The {part_name} part of {found_name!r} has a transform, which would change what was checked. Use "
                f"dataset.map in its place, or take it off by dataset.with_format(None)."
            )
    # Whatever format the user reads it in, here are texts and images.
    parts = {part_name: part.with_format(None) for part_name, part in opened.items() if part.num_rows}
    if not parts:
        raise ValueError(f"The data set {found_name!r} has no rows.")

    first = next(iter(parts.values()))
    column, label_column = find_columns(first.features, text_column_name, label_column_name, image_column_name)
    kind = "image" if is_image(first.features[column]) else "text"
    labels_by_part = _labels_by_part(parts, kind, column, label_column)
    labels = [label for part_labels in labels_by_part.values() for label in part_labels]
    rows_by_class: dict[str, list[int]] = {}
    for row, label in enumerate(labels):
        rows_by_class.setdefault(label, []).append(row)
    columns: dict[str, Any] = {column: Image() if kind == "image" else Value("large_string")}
    if target_column_name is not None:
        for first_row, part in zip(accumulate(map(len, parts.values()), initial=0), parts.values(), strict=False):
            check_targets(part, target_column_name, first_row)
        columns[target_column_name] = Value("float64")
    merged = _joined([part.select_columns(list(columns)) for part in parts.values()], columns)
    texts = checked_texts(merged, column) if kind == "text" else None
    keys = image_keys(merged, column) if texts is None else [text_key(text) for text in texts]

    if split_file is not None:
        splits = read_split_file(split_file)
    if splits is not None:
        chosen = check_splits(splits, rows_by_class)
    else:
        own = own_splits({part_name: set(part_labels) for part_name, part_labels in labels_by_part.items()})
        chosen = own or random_splits(rows_by_class, split_seed, split_fractions)
    split_rows = _large_enough(
        {split: {c: rows_by_class[c] for c in classes} for split, classes in chosen.items()}, min_examples
    )
    shared = shared_with_later(keys, split_rows, texts)
    if duplicates == "error":
        refuse_shared(shared, kind)
    dropped = {split: found.rows if duplicates == "drop" else frozenset() for split, found in shared.items()}
    # Once more, as a class may have had enough examples only with those that were dropped.
    split_rows = _large_enough(
        {
            split: {c: [row for row in rows if row not in dropped[split]] for c, rows in by_class.items()}
            for split, by_class in split_rows.items()
        },
        min_examples,
    )
    readable = _by_class(parts, label_column, "label_name", labels)
    described = _by_class(parts, label_column, "label_description", labels)
    return {
        split: Pool(
            name=name or found_name,
            split=split,
            rows_by_class={c: tuple(rows) for c, rows in by_class.items()},
            dataset=merged,
            column_name=column,
            target_column_name=target_column_name,
            readable_names={c: readable[c] for c in by_class if c in readable},
            descriptions={c: described[c] for c in by_class if c in described},
            num_dropped=len(dropped[split]),
            num_shared=len(shared[split].rows - dropped[split]),
            hub_id=hub_id,
            config_name=config_name,
        )
        for split, by_class in split_rows.items()
    }


def load_pools_from_config(config: EpisodeConfig, **options: Any) -> dict[str, Pool]:
    """``load_pools`` with the settings of ``config``; ``options`` add to them or win over them."""
    settings = {
        "dataset_config_name": config.dataset_config_name,
        "revision": config.dataset_revision,
        "text_column_name": config.text_column_name,
        "image_column_name": config.image_column_name,
        "label_column_name": config.label_column_name,
        "split_file": config.split_file,
        "split_seed": config.split_seed,
        "split_fractions": config.split_fractions,
        "min_examples": config.min_examples,
        "duplicates": config.duplicates,
    }
    return load_pools(config.dataset_name, **{**settings, **options})


def _labels_by_part(parts: Mapping[str, Dataset], kind: str, column: str, label_column: str) -> dict[str, list[str]]:
    """Class names of the rows of each part, which may number its classes in its own way."""
    labels: dict[str, list[str]] = {}
    first_row = 0
    for name, part in parts.items():
        find_columns(part.features, label=label_column, **{kind: column})
        labels[name] = class_names(part, label_column, first_row)
        first_row += part.num_rows
    return labels


def _joined(parts: list[Dataset], widest: Mapping[str, Any]) -> Dataset:
    """All rows; a column of unlike types in ``parts``, such as strings and large strings, becomes ``widest``."""
    for column, feature in widest.items():
        if any(part.features[column] != parts[0].features[column] for part in parts):
            parts = [part.cast_column(column, feature) for part in parts]
    return concatenate_datasets(parts)


def _large_enough(split_rows: Mapping[str, Mapping[str, list[int]]], count: int) -> dict[str, dict[str, list[int]]]:
    """The classes of each split with at least ``count`` rows; ``ValueError`` where a split keeps none."""
    kept = {
        split: {name: rows for name, rows in by_class.items() if len(rows) >= count}
        for split, by_class in split_rows.items()
    }
    for split, by_class in kept.items():
        if not by_class:
            # With one, only what duplicates='drop' took can be missing.
            remedy = "Lower it" if count > 1 else "Later splits hold them all. Use other splits, or duplicates='keep'"
            raise ValueError(f"No class of the {split} split has min_examples={count} examples. {remedy}.")
    return kept


def _by_class(parts: Mapping[str, Dataset], label_column: str, column: str, labels: list[str]) -> dict[str, str]:
    """What ``column`` first says about each class, where every part has it and it says anything."""
    if label_column == column or not all(column in part.features for part in parts.values()):
        return {}
    said: dict[str, str] = {}
    for label, remark in zip(labels, (r for part in parts.values() for r in remarks(part, column)), strict=True):
        if remark:
            said.setdefault(label, remark)
    return said
