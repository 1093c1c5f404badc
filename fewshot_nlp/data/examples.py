"""Examples as a user gives them: texts, or images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

import numpy as np
from PIL.Image import Image

from fewshot_nlp.checks import shown
from fewshot_nlp.data.images import checked_image


def listed(X: Any, least: int = 1) -> list[Any]:
    """``X`` as a list of ``least`` examples or more; ``ValueError`` for anything else."""
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
        raise ValueError("X has 0 texts. Pass at least 1, or the labels to tell apart by their names as classes.")
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
