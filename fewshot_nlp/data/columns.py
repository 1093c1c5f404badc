"""Which column holds the texts or images, which the labels, and what the classes are called."""

from __future__ import annotations

import hashlib
import math
import re
import warnings
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow

from fewshot_nlp.checks import first_line, hidden_character, shown
from fewshot_nlp.data.images import checked_image
from fewshot_nlp.data.leakage import image_key

TEXT_NAMES = ("text", "sentence", "utterance", "query", "question", "headline", "content", "review", "tweet", "message")
LABEL_NAMES = ("label", "intent", "category", "labels", "class", "target", "topic", "coarse_label", "fine_label")

_BATCH = 10_000
#: Longest name of a class. What is longer is a text.
MAX_NAME = 1000


def find_columns(
    features: Features, text: str | None = None, label: str | None = None, image: str | None = None
) -> tuple[str, str]:
    """Names of the column of texts, or of images, and of the label column.

    A name that is given must exist. Otherwise labels are the one ``ClassLabel`` column, or the first column of a
    usual name (``LABEL_NAMES``) that holds strings or ints, or else floats, which ints beside a missing one become in a
    table of pandas. Images, where there are any, win over texts: they are the
    one ``Image`` column. Texts are the one string column of a usual name (``TEXT_NAMES``), or the only string column
    left.

    Raises:
        ValueError: a column is unknown, of a wrong type, or cannot be told from others; text and image are both given.
    """
    if text is not None and image is not None:
        raise ValueError(f"text_column_name={text!r} and image_column_name={image!r} are both given. Give one.")
    for option, name in (("text_column_name", text), ("image_column_name", image), ("label_column_name", label)):
        if name is not None and name not in features:
            raise ValueError(f"{option}={name!r} is not a column. Use one of: {_describe(features)}.")
    if len(features) == 1:
        raise ValueError(
            f"The data set has one column alone, {_describe(features)}, and examples and labels are two. A csv file is "
            f"read with commas between columns, a tsv file with tabs: save it so, or add the column that is missing."
        )
    if text is None and image is None:
        image = _find_image(features)
    kind, given = ("text", text) if image is None else ("image", image)
    label = _find_label(features, excluded=given) if label is None else label
    column = _find_text(features, excluded=label) if given is None else given
    if column == label:
        raise ValueError(
            f"{kind}_column_name and label_column_name are both {column!r}. Name two of: {_describe(features)}."
        )
    if not (_is_string(features[column]) if kind == "text" else is_image(features[column])):
        held = "strings" if kind == "text" else "images"
        raise ValueError(f"{kind}_column_name={column!r} does not hold {held}. Columns: {_describe(features)}.")
    kinds = (_is_string, _is_int, _is_float)
    if not (isinstance(features[label], ClassLabel) or any(is_kind(features[label]) for is_kind in kinds)):
        raise ValueError(
            f"label_column_name={label!r} holds neither ClassLabel, strings nor ints. Columns: {_describe(features)}."
        )
    return column, label


def class_names(dataset: Dataset, column: str, first_row: int = 0) -> list[str]:
    """Class name of every row. ``first_row`` is what errors call row 0.

    Raises:
        ValueError: a row has no label, or one that is no name.
    """
    names: list[str] = []
    sound: set[str] = set()
    for row, (value, name) in enumerate(_named_values(dataset, column)):
        if name is None:
            raise ValueError(
                f"Row {first_row + row} has no label ({column}={value!r}). Remove such rows, for example with "
                f"dataset.filter(lambda row: row[{column!r}] not in (None, '', -1))."
            )
        if isinstance(value, float) and not value.is_integer():
            raise ValueError(
                f"Row {first_row + row} has a label that is no whole number ({column}={value!r}). Name another column "
                f"as label_column_name, or make strings of this one's values."
            )
        if name not in sound:
            _check_name(name, first_row + row, column)
            sound.add(name)
        names.append(name)
    return names


def _check_name(name: str, row: int, column: str) -> None:
    """Raise ``ValueError`` where a class is called what no line of a page or a terminal can show."""
    if not name.strip():
        raise ValueError(
            f"Row {row} has a blank label ({column}={shown(name)}). Give the class a name, or remove such rows with "
            f"dataset.filter."
        )
    if len(name) > MAX_NAME:
        raise ValueError(
            f"Row {row} has a label of {len(name):,} characters ({column}={shown(name)}). Labels have {MAX_NAME:,} at "
            f"most: name another column as label_column_name."
        )
    if hidden := hidden_character(name):
        raise ValueError(
            f"Row {row} has the character {hidden!r}, which is not seen, in its label ({column}={shown(name)}). Clean "
            f"the labels, for example with dataset.map."
        )


def readable(name: str) -> str:
    """A class name as words: ``card_arrival`` and ``CardArrival`` become ``card arrival``.

    What has no letters or digits stays as it is.
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return " ".join(re.sub(r"[\W_]+", " ", words).lower().split()) or name


def has_words(name: str) -> bool:
    """Whether a class name tells a reader anything: ``lost_card`` does, ``17`` does not."""
    return any(map(str.isalpha, name))


def remarks(dataset: Dataset, column: str) -> list[str]:
    """What ``column`` says about every row; ``""`` where it says nothing."""
    return [(name or "").strip() for _, name in _named_values(dataset, column)]


def checked_texts(dataset: Dataset, column: str) -> list[str]:
    """Every text.

    Raises:
        ValueError: a text is missing or blank.
    """
    texts = list(_values(dataset, column))
    for row, text in enumerate(texts):
        if text is None or not text.strip():
            raise ValueError(
                f"Row {row} has an empty text ({column}={shown(text)}). Remove such rows, for example with "
                f"dataset.filter(lambda row: (row[{column!r}] or '').strip())."
            )
    return texts


def check_targets(dataset: Dataset, column: str, first_row: int = 0) -> None:
    """Raise ``ValueError`` unless ``column`` is there and holds a finite number in every row. ``first_row`` is what
    errors call row 0."""
    if column not in dataset.features:
        raise ValueError(f"target_column_name={column!r} is not a column. Use one of: {_describe(dataset.features)}.")
    feature = dataset.features[column]
    if not (_is_int(feature) or _is_float(feature)):
        raise ValueError(
            f"target_column_name={column!r} does not hold numbers. Columns: {_describe(dataset.features)}."
        )
    for row, value in enumerate(_values(dataset, column)):
        if value is None or not math.isfinite(value):
            raise ValueError(
                f"Row {first_row + row} has no target ({column}={value!r}). Remove such rows, for example with "
                f"dataset.filter(lambda row: row[{column!r}] is not None)."
            )


def checked_images(dataset: Dataset, column: str) -> list[str]:
    """What tells each image from others: a hash of its file. Raises as ``_stored_images``."""
    return [hashlib.sha256(content).hexdigest() for _, content in _stored_images(dataset, column)]


def image_keys(dataset: Dataset, column: str) -> list[str]:
    """What is equal for images that are the same, by row; see ``leakage``.

    Raises:
        ValueError: an image is missing, cannot be read, has more than 8 bits a value, or unpacks to more pixels than
            Pillow takes for safe.
        OSError: its file is missing.
    """
    keys = []
    for row, (path, content) in enumerate(_stored_images(dataset, column)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Pillow.DecompressionBombWarning)
                with Pillow.open(BytesIO(content)) as picture:
                    keys.append(image_key(checked_image(picture, "it")))
        except (OSError, ValueError, SyntaxError, Pillow.DecompressionBombError, Warning) as error:
            reason = first_line(error).rstrip(".")
            raise ValueError(
                f"Row {row} has an image that cannot be read ({path or column}): {reason}. Remove or repair it."
            ) from error
    return keys


def _stored_images(dataset: Dataset, column: str) -> Iterator[tuple[str | None, bytes]]:
    """Path, if there is one, and content of each image's file.

    Raises:
        ValueError: an image is missing.
        OSError: its file is.
    """
    stored = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    for row, image in enumerate(_values(stored, column)):
        if image is None:
            raise ValueError(f"Row {row} has no image ({column}=None). Remove such rows with dataset.filter.")
        yield image["path"], Path(image["path"]).read_bytes() if image["bytes"] is None else image["bytes"]


def is_image(feature: object) -> bool:
    """Whether a column of this type holds images."""
    return isinstance(feature, Image)


def _named_values(dataset: Dataset, column: str) -> Iterator[tuple[Any, str | None]]:
    """Each value, and it as text; ``None`` for one that is missing."""
    feature = dataset.features[column]
    for value in _values(dataset, column):
        if value is None or value == "" or (isinstance(feature, ClassLabel) and value < 0):
            yield value, None
        elif isinstance(feature, ClassLabel):
            yield value, feature.names[value]
        else:
            yield value, str(int(value) if isinstance(value, float) and value.is_integer() else value)


def _values(dataset: Dataset, column: str) -> Iterator:
    # dataset[column] is a lazy column that decodes row by row; batches are ten times as fast.
    for batch in dataset.select_columns([column]).with_format(None).iter(batch_size=_BATCH):
        yield from batch[column]


def _find_label(features: Features, excluded: str | None) -> str:
    class_labels = [name for name in features if isinstance(features[name], ClassLabel) and name != excluded]
    if len(class_labels) == 1:
        return class_labels[0]
    if class_labels:
        return _one_of("label", LABEL_NAMES, class_labels, features)
    others = [name for name in features if name != excluded]
    usable = [name for name in others if _is_string(features[name]) or _is_int(features[name])]
    if not any(name.lower() in LABEL_NAMES for name in usable):
        usable = [name for name in others if _is_float(features[name])]
    return _one_of("label", LABEL_NAMES, usable, features)


def _find_image(features: Features) -> str | None:
    """The one column of images; ``None`` where there is none."""
    images = [name for name in features if is_image(features[name])]
    if len(images) < 2:
        return images[0] if images else None
    raise ValueError(
        f"Cannot tell which column holds the images: it could be any of {images}. Set image_column_name to one of: "
        f"{_describe(features)}."
    )


def _find_text(features: Features, excluded: str) -> str:
    strings = [name for name in features if _is_string(features[name]) and name != excluded]
    if len(strings) == 1:
        return strings[0]
    return _one_of("text", TEXT_NAMES, strings, features)


def _one_of(kind: str, usual: tuple[str, ...], candidates: list[str], features: Features) -> str:
    found = [name for name in candidates if name.lower() in usual]
    if len(found) == 1:
        return found[0]
    reason = f"it could be any of {found}" if found else "no column has a usual name and type"
    raise ValueError(
        f"Cannot tell which column holds the {kind}s: {reason}. Set {kind}_column_name to one of: "
        f"{_describe(features)}."
    )


def _is_string(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def _is_int(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith(("int", "uint"))


def _is_float(feature: object) -> bool:
    return isinstance(feature, Value) and feature.dtype.startswith("float")


def _describe(features: Features) -> str:
    kinds = {name: getattr(feature, "dtype", None) or type(feature).__name__ for name, feature in features.items()}
    return ", ".join(
        f"{name} ({'ClassLabel' if isinstance(features[name], ClassLabel) else kind})" for name, kind in kinds.items()
    )
