"""Examples as a user gives them, texts or images, and their labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Set
from numbers import Integral
from typing import Any

import numpy as np
from PIL.Image import Image
from sklearn.utils.validation import column_or_1d

from fewshot_nlp.checks import shown
from fewshot_nlp.data.images import checked_image


def listed(X: Any, least: int = 1, remedy: str = "Pass at least 1.") -> list[Any]:
    """``X`` as a list of ``least`` examples or more; ``ValueError`` for anything else, with ``remedy`` for too few."""
    if isinstance(X, str | bytes):
        raise ValueError(f"X={X!r} is one text. Pass a list of texts: [{X!r}].")
    # An array of images has a dimension for each image's height and width, and one for its colours.
    images = isinstance(X, np.ndarray) and X.ndim in (3, 4)
    if isinstance(X, Mapping | Set) or not isinstance(X, Iterable) or not (images or getattr(X, "ndim", 1) == 1):
        raise ValueError(
            f"X of type {type(X).__name__} must be one-dimensional: a list, array or column of texts, or of images."
        )
    examples = list(X)
    if len(examples) < least:
        raise ValueError(f"X has {len(examples)} examples. {remedy}")
    return examples


def check_examples(examples: list[Any], kind: str) -> None:
    """Raise ``ValueError`` unless all are of the ``kind`` that the backbone takes."""
    for i, example in enumerate(examples):
        given = "text" if isinstance(example, str) else "image" if isinstance(example, Image | np.ndarray) else None
        if given is not None and given != kind:
            raise ValueError(
                f"X[{i}] is of type {type(example).__name__}, and the backbone takes {kind}s. Pass {kind}s, or use an "
                f"adapter or model_name_or_path for {given}s."
            )
        if kind == "image":
            checked_image(example, f"X[{i}]")
        elif not isinstance(example, str):
            raise ValueError(f"X[{i}]={example!r} is of type {type(example).__name__}. Pass texts as str.")
        elif not example.strip():
            raise ValueError(f"X[{i}]={example!r} is an empty text. Remove it, and its label.")
        else:
            check_pairs(f"X[{i}]", example)


def check_pairs(place: str, text: str) -> None:
    """Raise ``ValueError`` where ``text`` holds half a surrogate pair, which tokenizers do not take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"The surrogate pair in {place}={shown(text)} is invalid. Repair the text, or remove it."
        ) from error


def check_classes(classes: Any) -> list[Any]:
    """The labels to tell apart; an iterator has them for the first fit alone, and a string is its letters."""
    is_list = isinstance(classes, Iterable) and not isinstance(classes, str | bytes | Mapping | Iterator)
    known = list(classes) if is_list and getattr(classes, "ndim", 1) == 1 else []
    _check_types("classes", known)
    if len(set(known)) < 2:
        raise ValueError(f"classes={shown(classes)} must be at least 2 labels. Use a list of them, or leave it out.")
    return known


def check_each_has_one(classes: np.ndarray, labels: np.ndarray, kind: str) -> None:
    """Raise ``ValueError`` where one of ``classes`` ``[n_classes]`` is none of ``labels``, their numbers ``[n]``."""
    without = [label for i, label in enumerate(classes.tolist()) if i not in labels]
    if without:
        raise ValueError(
            f"The class {without[0]!r} has no {kind}, and the backbone takes {kind}s, among which no name can be read. "
            f"Use at least 1 {kind} of each class, or leave the class out."
        )


def check_label_texts(label_texts: Any) -> None:
    """Raise ``ValueError`` unless there are none, or a mapping."""
    if label_texts is not None and not isinstance(label_texts, Mapping):
        raise ValueError(f"label_texts={shown(label_texts)} must be a mapping. Use {{label: text}}, or leave it out.")


def _check_types(name: str, labels: list[Any]) -> None:
    """Raise ``ValueError`` unless ``labels`` are strings, or all of them numbers that stand for classes."""
    for i, label in enumerate(labels):
        place, remedy = f"{name}[{i}]={label!r}", "Use strings, integers or booleans."
        if not isinstance(label, str | Integral | np.bool_ | float | np.floating):
            raise ValueError(f"{place} is of type {type(label).__name__}. {remedy}")
        if isinstance(label, float | np.floating) and not float(label).is_integer():
            problem = "missing" if np.isnan(label) else "continuous"
            raise ValueError(f"Unknown label type: {place} is {problem}. {remedy}")
    if len({isinstance(label, str) for label in labels}) > 1:
        raise ValueError(f"{name} mixes strings and numbers. Use labels of one type.")


def check_labels(y: Any, n: int, known: list[Any] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The sorted classes ``[n_classes]``, and the class number of each label, int64 ``[n]``; ``known``: all classes."""
    if y is None:
        raise ValueError("FewShotClassifier requires y to be passed, but the target y is None. Pass one label a text.")
    if isinstance(y, str | bytes | Mapping | Set) or not isinstance(y, Iterable):
        raise ValueError(f"y={y!r} must be a list, array or column of labels, one a text.")
    # A list is read before NumPy sees it: it turns [1, "a"] into strings, and NaN beside strings into "nan".
    labels = column_or_1d(np.asarray(y), warn=True) if hasattr(y, "ndim") else list(y)
    if len(labels) != n:
        raise ValueError(f"X and y have unequal lengths, {n} and {len(labels)}. Pass one label a text.")
    if known is not None:
        unknown = [label for label in labels if label not in known]
        if unknown:
            raise ValueError(f"The label {unknown[0]!r} is none of classes={known}. Add it, or leave classes out.")
        labels = [*labels, *known]
    _check_types("y", labels)
    classes, numbers = np.unique(np.asarray(labels), return_inverse=True)
    if classes.tolist() != sorted(set(labels)):
        # NumPy cuts null characters off the ends of strings, and rounds large integers of unlike signs.
        classes, numbers = np.unique(np.asarray(labels, dtype=object), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(f"y has only one class, {classes.tolist()[0]!r}. Pass examples of at least 2 classes.")
    return classes, numbers[:n].astype(np.int64)
