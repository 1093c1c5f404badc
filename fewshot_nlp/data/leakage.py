"""What two splits must not share: classes, texts and images, also where they are spelt or stored in another way.

Two texts are the same where they are equal after Unicode's NFKC, case folding, and with white space squeezed and
characters that are not seen left out: what a reader, or a tokenizer of small letters, does not tell apart. Punctuation,
accents and word order count. Two images are the same where their pixels are, whatever their files. Two classes are the
same where their names are equal in that way, and with ``CamelCase``, and ``_`` and ``-`` between words, read as spaces:
``lost_card`` is ``Lost card``, but the grade ``B-`` is not ``B``. A name without letters is compared to the letter.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from PIL import Image as Pillow

from fewshot_nlp.checks import shown

#: Rows of each class, by split.
Rows = Mapping[str, Mapping[str, Sequence[int]]]


class Shared(NamedTuple):
    """What a split shares with later ones.

    Attributes:
        rows: of the split.
        example: one of them, or its class, in words.
    """

    rows: frozenset[int]
    example: str


def text_key(text: str) -> str:
    """What is equal for texts that are the same."""
    if not text.isascii():
        # Twice, as folding may leave a form that is not normal.
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        text = _seen(text)
    return " ".join(text.casefold().split())


def _seen(text: str) -> str:
    """``text`` without characters that are not seen."""
    return "".join(char for char in text if unicodedata.category(char) != "Cf")


def image_key(image: Pillow.Image) -> str:
    """What is equal for images of 8 bits a value that are the same: a hash of their size and pixels."""
    return hashlib.sha256(f"{image.size} ".encode() + image.convert("RGBA").tobytes()).hexdigest()


def class_key(name: str) -> str:
    """What is equal for the names of one class."""
    if not any(map(str.isalpha, name)):
        return name
    # Before signs are looked for: there are a wide _ and -, too.
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", _seen(unicodedata.normalize("NFKC", name)))
    return text_key(re.sub(r"(?<=[^\s_-])([_-]+|\s+[_-]+\s+)(?=[^\s_-])", " ", words))


def shared_with_later(keys: Sequence[str], split_rows: Rows, texts: Sequence[str] | None = None) -> dict[str, Shared]:
    """Of each split the rows that a later split holds too, and those of classes that a later split has.

    Args:
        keys: of the rows of the data set.
        split_rows: the splits in their order.
        texts: of the rows, to quote.
    """
    found: dict[str, Shared] = {}
    later: dict[str, tuple[str, int]] = {}
    classes: dict[str, tuple[str, str]] = {}
    for split in reversed(list(split_rows)):
        by_class = split_rows[split]
        rows = [row for each in by_class.values() for row in each]
        twice = [row for row in rows if keys[row] in later]
        same = [name for name in by_class if class_key(name) in classes]
        example = ""
        if twice:
            (other, other_row), row = later[keys[min(twice)]], min(twice)
            quoted = "one" if texts is None else shown(texts[row])
            example = f"{quoted} (row {row} in {split}, row {other_row} in {other})"
        if same:
            other, theirs = classes[class_key(same[0])]
            example = f"those of the class {same[0]!r}, which {other} calls {theirs!r}"
        found[split] = Shared(frozenset([*twice, *(row for name in same for row in by_class[name])]), example)
        later.update((keys[row], (split, row)) for row in rows)
        classes.update((class_key(name), (split, name)) for name in by_class)
    return found


def refuse_shared(shared: Mapping[str, Shared], kind: str) -> None:
    """Raise ``ValueError`` where splits share anything. ``kind`` is ``"text"`` or ``"image"``."""
    for split, (rows, example) in shared.items():
        if rows:
            raise ValueError(
                f"{len(rows)} {kind}s of the {split} split are in a later split too, such as {example}; spelling and "
                f"file format aside. Use duplicates='drop' to leave them out of {split}, or duplicates='keep'."
            )
