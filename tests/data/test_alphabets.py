"""Drawn characters: enough of them, no two alike, the same every time."""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from fewshot_nlp.data import alphabets, glyphs, load_pools
from fewshot_nlp.data.alphabets import ALPHABETS, FACES, build_glyphs, characters, draw, faces_with


@pytest.fixture(scope="module")
def found():
    return characters()


def test_there_are_enough_and_alphabets_are_in_one_split(found):
    by_split = {split: Counter(name.split("/")[0] for name in names) for split, names in found.items()}
    assert all(not by_split[a].keys() & by_split[b].keys() for a, b in combinations(by_split, 2))
    sizes = {split: sum(counts.values()) for split, counts in by_split.items()}
    assert sum(sizes.values()) >= 600 and sizes["validation"] >= 60 and sizes["test"] >= 120
    assert sum(len(counts) for counts in by_split.values()) == 13
    assert min(count for counts in by_split.values() for count in counts.values()) >= 15
    names = [name for each in found.values() for name in each]
    assert len(names) == len(set(names))


#: Capital A, small O, capital H and capital Z of Latin, Greek and Cyrillic.
ALIKE = (
    "\N{LATIN CAPITAL LETTER A}\N{GREEK CAPITAL LETTER ALPHA}\N{CYRILLIC CAPITAL LETTER A}",
    "\N{LATIN SMALL LETTER O}\N{GREEK SMALL LETTER OMICRON}\N{CYRILLIC SMALL LETTER O}",
    "\N{LATIN CAPITAL LETTER H}\N{GREEK CAPITAL LETTER ETA}\N{CYRILLIC CAPITAL LETTER EN}",
    "\N{LATIN CAPITAL LETTER Z}\N{GREEK CAPITAL LETTER ZETA}",
)


def test_characters_that_look_alike_are_there_once(found):
    every = {character for each in found.values() for character in each.values()}
    for alike in ALIKE:
        assert len(every & set(alike)) <= 1
    assert {"A", "Ω", "Ж", "ש", "Ֆ"} <= every
    assert all(not unicodedata.combining(character) for character in every)


def test_a_drawing_follows_from_its_number_alone():
    first, again, other = draw("Ω", 3), draw("Ω", 3), draw("Ω", 4)
    assert first.size == (28, 28) and first.mode == "L"
    assert first.tobytes() == again.tobytes() != other.tobytes()


def test_drawings_are_ink_inside_the_picture(found):
    characters_ = [each for names in found.values() for each in list(names.values())[::9]]
    for character in characters_:
        pictures = [np.asarray(draw(character, i)) for i in range(0, 20, 4)]
        for pixels in pictures:
            assert 0.01 < (pixels > 127).mean() < 0.7
            edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
            assert edge.mean() < 60, character
        assert len({pixels.tobytes() for pixels in pictures}) == len(pictures)


def test_faces_are_all_that_have_it():
    assert faces_with("A") == FACES and len(FACES) == 16
    assert set(faces_with("ש")) == {name for name in FACES if name.startswith("DejaVuSans") and "Mono" not in name}
    assert faces_with("一") == ()


@pytest.fixture
def few(monkeypatch, tmp_path):
    """A set of a second: two alphabets a split, cut short, and three drawings."""
    short = {split: dict(list(each.items())[:1]) for split, each in ALPHABETS.items()}
    short["train"] = {"Latin": ((0x41, 0x46),)}
    short["validation"] = {"Hebrew": ((0x5D0, 0x5D4),)}
    short["test"] = {"Tifinagh": ((0x2D30, 0x2D36),)}
    monkeypatch.setattr(alphabets, "ALPHABETS", short)
    monkeypatch.setattr(alphabets, "DRAWINGS", 3)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)


def test_it_is_a_data_set_by_name(few):
    pools = load_pools("glyphs")
    assert list(pools) == ["train", "validation", "test"] and pools["train"].kind == "image"
    assert pools["train"].label_names[0] == "Latin/latin capital letter a"
    assert pools["test"].readable_name("Tifinagh/tifinagh letter yab") == "tifinagh letter yab"
    image = pools["train"].examples([1])[0]
    assert isinstance(image, Image.Image) and image.tobytes() == draw("A", 1).tobytes()
    built = build_glyphs()
    assert {split: part.num_rows for split, part in glyphs().items()} == built.num_rows
    with pytest.raises(ValueError, match="dataset='glyphs' has no configuration 'greek'"):
        load_pools("glyphs", dataset_config_name="greek")


def test_it_is_built_once(few, monkeypatch):
    first = glyphs()
    monkeypatch.setattr(alphabets, "draw", None)
    assert glyphs()["test"].num_rows == first["test"].num_rows
