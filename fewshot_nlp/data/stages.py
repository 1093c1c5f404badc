"""A stream of tasks: groups of classes or whole data sets that arrive one after another, each with held-out texts.

A stage's classes are trained on, so what is held out are texts. They are chosen by the hash of the text itself, and a
text that is held out of one class is left out of training in every class of every stage, however it is spelt there (see
``leakage``): there is no seed, no overlap of stages and no repeated sentence by which a stage could be tested on what
was trained on. Images are held out in the same way, by the hash of their files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fewshot_nlp.data.pool import Pool
from fewshot_nlp.data.splits import SPLITS, check_splits, read_class_lists


@dataclass(frozen=True)
class Stage:
    """One part of a stream.

    Attributes:
        name: of the stage, and of its pools.
        pools: ``"train"``, ``"validation"`` and ``"test"``: other texts of the same classes.
    """

    name: str
    pools: Mapping[str, Pool]

    @property
    def label_names(self) -> list[str]:
        """The classes."""
        return self.pools["train"].label_names


def hold_out(pools: Sequence[Pool], share: float = 0.2, seed: int = 0) -> list[Stage]:
    """Stages of the classes of ``pools``, of which the test and the validation texts are ``share`` of each class each.

    Texts are dealt by the hash of ``seed`` and the text. A text that is tested in one class is neither validated nor
    trained on in any; one that is validated is not trained on in any.

    Args:
        pools: one a stage, of different names.
        share: of the different texts of a class, rounded, one or more; a class needs three different texts.
        seed: which texts.

    Raises:
        ValueError: two pools of one name, a share out of range, or a class that has no text left for a split.
    """
    if not 0 < share < 0.5:
        raise ValueError(f"held_out={share!r} is out of range. Use a share above 0 and below 0.5.")
    names = [pool.name for pool in pools]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"Two stages are called {twice[0]!r}. Name them apart.")
    taken: dict[str, set[str]] = {"validation": set(), "test": set()}
    for pool in pools:
        for rows in pool.rows_by_class.values():
            key_of = dict(zip(pool.contents(rows), pool.keys(rows), strict=True))
            texts = sorted(key_of, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())
            count = max(1, round(share * len(texts)))
            taken["test"].update(key_of[text] for text in texts[:count])
            taken["validation"].update(key_of[text] for text in texts[count : 2 * count])

    def split_of(key: str) -> str:
        return next((split for split in ("test", "validation") if key in taken[split]), "train")

    return [Stage(pool.name, _dealt(pool, split_of)) for pool in pools]


def _dealt(pool: Pool, split_of: Callable[[str], str]) -> dict[str, Pool]:
    dealt: dict[str, dict[str, tuple[int, ...]]] = {split: {} for split in SPLITS}
    for name, rows in pool.rows_by_class.items():
        splits = [split_of(key) for key in pool.keys(rows)]
        for split in SPLITS:
            dealt[split][name] = tuple(row for row, own in zip(rows, splits, strict=True) if own == split)
            if not dealt[split][name]:
                raise ValueError(
                    f"The class {name!r} of stage {pool.name!r} has {len(rows)} {pool.kind}s and none left for "
                    f"{split}. Leave such classes out with a higher min_examples, or change held_out."
                )
    return {split: replace(pool, split=split, rows_by_class=rows) for split, rows in dealt.items()}


def all_classes(pools: Mapping[str, Pool]) -> Pool:
    """The classes of all splits in one pool."""
    first = next(iter(pools.values()))
    joined = {name: rows for pool in pools.values() for name, rows in pool.rows_by_class.items()}
    names = {name: words for pool in pools.values() for name, words in pool.readable_names.items()}
    remarks = {name: words for pool in pools.values() for name, words in pool.descriptions.items()}
    return replace(
        first,
        split="train",
        rows_by_class={name: joined[name] for name in sorted(joined)},
        readable_names=names,
        descriptions=remarks,
    )


def group_classes(pool: Pool, groups: Mapping[str, Sequence[str]]) -> list[Pool]:
    """A pool for each group of classes, named ``<pool>-<group>``; a class may be in several groups or in none.

    Raises:
        ValueError: no group, or one without classes, with an unknown class, or with a class twice.
    """
    if not groups:
        raise ValueError("There is no group of classes. Name one or more.")
    found = []
    for name, classes in groups.items():
        try:
            kept = check_splits({"train": classes}, pool.rows_by_class)["train"]
        except ValueError as error:
            raise ValueError(
                f"Stage {name!r}: {str(error).replace('The train split', 'its list of classes')}"
            ) from None
        rows = {each: pool.rows_by_class[each] for each in kept}
        found.append(replace(pool, name=f"{pool.name}-{name}", rows_by_class=rows))
    return found


def deal_classes(pool: Pool, count: int, seed: int = 0) -> dict[str, list[str]]:
    """``count`` groups of classes of nearly equal size, named ``"1"`` on; they follow from the names and the seed.

    Raises:
        ValueError: fewer than two classes a group.
    """
    classes = pool.label_names
    if count < 1 or len(classes) < 2 * count:
        raise ValueError(
            f"num_stages={count} does not fit the {len(classes)} classes of {pool.name!r}: a stage needs two or more. "
            f"Use a value from 1 to {len(classes) // 2}."
        )
    ordered = sorted(classes, key=lambda name: hashlib.sha256(f"{seed}/{name}".encode()).digest())
    return {str(i + 1): sorted(ordered[i::count]) for i in range(count)}


def read_groups(path: str | Path) -> dict[str, list[str]]:
    """Lists of class names by stage, from a JSON object, in the order of the file. Raises as ``read_class_lists``."""
    return read_class_lists("stage_file", path, ', such as {"first": [...], "second": [...]}')
