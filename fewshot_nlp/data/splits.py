"""Class-disjoint train, validation and test splits: which class belongs to which."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from fewshot_nlp.checks import nearest, shown

SPLITS = ("train", "validation", "test")

#: Names that data sets give to their splits.
_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}

DEFAULT_FRACTIONS = (0.5, 0.25, 0.25)


class TooFewClasses(ValueError):
    """A split that would be without a class."""


def random_splits(
    classes: Collection[str], seed: int = 0, fractions: Sequence[float] = DEFAULT_FRACTIONS
) -> dict[str, list[str]]:
    """Deal ``classes`` to train, validation and test. Depends on the class names and the seed alone.

    A split of fraction 0 is left out.

    Raises:
        ValueError: the fractions are not three that add up to 1, or (``TooFewClasses``) a split would have no class.
    """
    check_fractions(fractions)
    # Ordered by hash rather than shuffled, so that one class more or less moves few of the others.
    ordered = sorted(classes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    ends = [round(sum(fractions[: i + 1]) * len(ordered)) for i in range(3)]
    splits: dict[str, list[str]] = {}
    for split, fraction, start, end in zip(SPLITS, fractions, [0, *ends], ends, strict=False):
        if fraction and start == end:
            raise TooFewClasses(
                f"The {split} split would have no class: {fraction:g} of {len(ordered)} classes. "
                f"Use data with more classes, or other split_fractions, of which 0 leaves a split out."
            )
        if fraction:
            splits[split] = sorted(ordered[start:end])
    return splits


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ``ValueError`` unless ``fractions`` are three that add up to 1."""
    numbers = isinstance(fractions, Sequence) and all(isinstance(each, int | float) for each in fractions)
    # What is compared to NaN is false.
    if not (numbers and len(fractions) == 3 and min(fractions) >= 0 and abs(sum(fractions) - 1) <= 1e-6):
        raise ValueError(
            f"split_fractions={shown(fractions)} must be three fractions that add up to 1, such as {DEFAULT_FRACTIONS}."
        )


def read_split_file(path: str | Path) -> dict[str, list[str]]:
    """The lists of class names in a JSON file such as ``{"train": [...], "validation": [...], "test": [...]}``.

    Raises as ``read_class_lists``.
    """
    return read_class_lists("split_file", path, f" with the lists {', '.join(SPLITS)}")


def read_class_lists(setting: str, path: str | Path, form: str) -> dict[str, list[str]]:
    """Lists of class names by what they are for, from a JSON object, in the order of the file.

    Args:
        setting: what the file was given as.
        path: the file.
        form: what the object must be like, for the error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{setting}={str(path)!r} does not exist. Name a JSON file with lists of class names.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{setting}={str(path)!r} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{setting}={str(path)!r} must hold an object{form}.")
    return content


def check_splits(splits: Mapping[str, Sequence[str]], classes: Collection[str]) -> dict[str, list[str]]:
    """``splits`` as sorted lists, once they are known to be class-disjoint lists of known classes.

    Raises:
        ValueError: a split or class is unknown, a split is empty, or a class is listed twice.
    """
    known = set(classes)
    owner: dict[str, str] = {}
    for split, names in splits.items():
        if split not in SPLITS:
            raise ValueError(f"The splits have an unknown name {shown(split)}. Use: {', '.join(SPLITS)}.")
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise ValueError(f"The {split} split must be a list of class names, not {shown(names)}.")
        for name in map(str, names):
            if name not in known:
                raise ValueError(
                    f"The {split} split lists {shown(name)}, which is none of the {len(known)} classes of the data."
                    f"{nearest(name, known)}"
                )
            if name in owner:
                raise ValueError(
                    f"The class {name!r} is listed in {owner[name]} and in {split}. Each class may be listed once."
                )
            owner[name] = split
    if not owner:
        raise ValueError(f"The splits are empty. List class names under {', '.join(SPLITS)}.")
    return {split: sorted(map(str, splits[split])) for split in SPLITS if split in splits}


def own_splits(classes_by_split: Mapping[str, Collection[str]]) -> dict[str, list[str]] | None:
    """A data set's own splits, where they are two or more and share no class; otherwise None."""
    named: dict[str, set[str]] = {}
    for split, classes in classes_by_split.items():
        named.setdefault(_ALIASES.get(split, split), set()).update(classes)
    total = sum(len(classes) for classes in named.values())
    disjoint = len(set().union(*named.values())) == total
    if len(named) < 2 or not disjoint or not set(named) <= set(SPLITS):
        return None
    return {split: sorted(named[split]) for split in SPLITS if split in named}
