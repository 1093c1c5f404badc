"""``glyphs``: characters of many alphabets, drawn from the fonts that matplotlib ships. An Omniglot that needs no Hub.

A class is a character, its alphabet decides its split, and its drawings are those of the faces that have it. Few
alphabets are in a dozen faces, so that every drawing, of every character, is turned, slanted, scaled, shifted and
thickened a little, too: which, follows from the character and the number of the drawing alone.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import random
import unicodedata
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps, features
from scipy.spatial.distance import cdist

from fewshot_nlp.data.cache import cache_root, read_splits, write_splits

SIZE = 28
DRAWINGS = 20
#: Part of the cache key: raise it when the code below would draw something else.
BUILD = 2
#: First and last code points of each alphabet, by split. Latin, Cyrillic and Greek share forms, and a split.
ALPHABETS: dict[str, dict[str, tuple[tuple[int, int], ...]]] = {
    "train": {
        "Latin": ((0x41, 0x5A), (0x61, 0x7A)),
        "Greek": ((0x391, 0x3A9), (0x3B1, 0x3C9)),
        "Cyrillic": ((0x410, 0x44F),),
        "Arabic": ((0x621, 0x64A),),
        "Lao": ((0xE81, 0xEAE),),
        "Maths": ((0x2200, 0x22FF),),
        "Symbols": ((0x2600, 0x26B1),),
    },
    "validation": {"Hebrew": ((0x5D0, 0x5EA),), "Georgian": ((0x10A0, 0x10C5), (0x10D0, 0x10F0))},
    "test": {
        "Armenian": ((0x531, 0x556), (0x561, 0x586)),
        "Tifinagh": ((0x2D30, 0x2D65),),
        "N'Ko": ((0x7C0, 0x7EA),),
        "Old Italic": ((0x10300, 0x10323),),
    },
}
FACES = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
)
#: Two characters whose ink differs by less than this share of it look the same.
ALIKE = 0.27
#: Drawn this many times larger, then made small: Pillow's own smoothing is coarser.
_LARGER = 3


def glyphs(cache_dir: str | Path | None = None) -> DatasetDict:
    """Drawings of characters, 28×28, grey, ink white (255) on black (0), 20 of each.

    Columns: ``image``, ``label`` (a ``ClassLabel`` such as ``Greek/greek small letter alpha``, the same in all splits)
    and ``label_name``, without the alphabet. No alphabet is in two splits, and no two characters look alike: of those
    that do, within an alphabet or across (Latin A, Greek Alpha, Cyrillic A), the first one alone is there. The same
    versions of Pillow, FreeType and matplotlib make the same pixels.

    Args:
        cache_dir: where to keep the built set; Hugging Face's data set cache if not given.
    """
    versions = [importlib.metadata.version(name) for name in ("matplotlib", "pillow")]
    versions.append(str(features.version("freetype2")))
    told = [BUILD, SIZE, DRAWINGS, ALPHABETS, FACES, ALIKE, versions]
    folder = cache_root(cache_dir) / f"glyphs-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]}"
    if not folder.is_dir():
        write_splits(build_glyphs(), folder)
    return read_splits(folder, tuple(ALPHABETS))


def build_glyphs() -> DatasetDict:
    """As ``glyphs``, in memory."""
    found = characters()
    classes = ClassLabel(names=[name for by_name in found.values() for name in by_name])
    columns = Features({"image": ImageFeature(), "label": classes, "label_name": Value("string")})
    splits = {}
    for split, by_name in found.items():
        rows: dict[str, list[Any]] = {name: [] for name in columns}
        for name, character in by_name.items():
            rows["image"] += [draw(character, i) for i in range(DRAWINGS)]
            rows["label"] += [classes.str2int(name)] * DRAWINGS
            rows["label_name"] += [name.split("/")[1]] * DRAWINGS
        splits[split] = Dataset.from_dict(rows, features=columns)
    return DatasetDict(splits)


def characters() -> dict[str, dict[str, str]]:
    """The characters of each split by ``alphabet/name``: those that a face has, each form once."""
    candidates = [
        (split, alphabet, chr(code))
        for split, alphabets in ALPHABETS.items()
        for alphabet, ranges in alphabets.items()
        for first, last in ranges
        for code in range(first, last + 1)
        if _is_drawn(chr(code))
    ]
    forms = np.stack([_form(character).ravel() for *_, character in candidates])
    ink, apart = forms.sum(1), cdist(forms, forms, "cityblock")
    # Of the ink of both together, the share that is in one alone.
    differences = 2 * apart / (ink + ink[:, None] + apart)
    found: dict[str, dict[str, str]] = {split: {} for split in ALPHABETS}
    kept: list[int] = []
    for i, (split, alphabet, character) in enumerate(candidates):
        if (differences[i, kept] >= ALIKE).all():
            kept.append(i)
            found[split][f"{alphabet}/{unicodedata.name(character).lower()}"] = character
    return found


def _is_drawn(character: str) -> bool:
    """Whether a face has it, and it is neither a mark on other characters nor one with a mark."""
    marked = unicodedata.category(character).startswith("M") or len(unicodedata.normalize("NFD", character)) > 1
    return not marked and bool(faces_with(character))


def draw(character: str, i: int) -> Image.Image:
    """Drawing ``i`` of a character."""
    rng = random.Random(f"glyphs/{ord(character)}/{i}")
    faces = faces_with(character)
    turn, slant, wide, high = (low + (high - low) * rng.random() for low, high in _RANGES)
    thick = int(3 * rng.random())
    side = SIZE * _LARGER
    # The largest that stays inside when it is turned and slanted.
    ink = _ink(character, faces[i % len(faces)], 2 * side // 3, thick)
    canvas = Image.new("L", (side, side))
    canvas.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    cosine, sine = math.cos(turn), math.sin(turn)
    shift = [(rng.random() - 0.5) * side / 10 for _ in range(2)]
    # From places of the drawing to places of the ink, about the middle.
    rows = ((cosine / wide, (sine + slant) / wide), (-sine / high, cosine / high))
    middle = side / 2
    matrix = [v for (a, b), s in zip(rows, shift, strict=True) for v in (a, b, middle - (a + b) * middle + s)]
    moved = canvas.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return moved.resize((SIZE, SIZE), Image.Resampling.BOX)


#: Turn and slant, in radians and shares; width and height.
_RANGES = ((-0.2, 0.2), (-0.2, 0.2), (0.8, 1.1), (0.8, 1.1))


@cache
def faces_with(character: str) -> tuple[str, ...]:
    """The faces that have a character, in the order of ``FACES``."""
    return tuple(face for face in FACES if ord(character) in _charmap(face))


def _path(face: str) -> str:
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf")


@cache
def _charmap(face: str) -> frozenset[int]:
    return frozenset(FT2Font(_path(face)).get_charmap())


@cache
def _font(face: str, points: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_path(face), points, layout_engine=ImageFont.Layout.BASIC)


def _ink(character: str, face: str, side: int, thick: int = 0) -> Image.Image:
    """A character cut out along its ink, its longer edge ``side``, strokes ``thick`` pixels thicker on each side."""
    font = _font(face, 2 * side)
    left, top, right, bottom = font.getbbox(character)
    canvas = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(canvas).text((4 - left, 4 - top), character, font=font, fill=255)
    ink = ImageOps.contain(canvas.crop(canvas.getbbox()), (side - 2 * thick, side - 2 * thick))
    if not thick:
        return ink
    padded = ImageOps.expand(ink, thick)
    return Image.fromarray(_thickened(np.asarray(padded), thick))


def _thickened(pixels: np.ndarray, thick: int) -> np.ndarray:
    """The largest value within ``thick`` pixels up, down and to the sides."""
    height, width = pixels.shape
    around = np.pad(pixels, thick)
    places = range(2 * thick + 1)
    return np.max([around[y : y + height, x : x + width] for y in places for x in places], axis=0)


def _form(character: str) -> np.ndarray:
    """What a character looks like upright, in its first face, in the middle and a little blurred: in [0, 1]."""
    ink = _ink(character, faces_with(character)[0], SIZE)
    framed = ImageOps.expand(ImageOps.pad(ink, (SIZE, SIZE)), 4)
    return np.asarray(framed.filter(ImageFilter.GaussianBlur(1.2)), dtype=np.float32) / 255
