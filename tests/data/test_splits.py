import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewshot_nlp.data.splits import check_splits, own_splits, random_splits, read_split_file

CLASSES = [f"class {i}" for i in range(20)]


@given(st.sets(st.text(min_size=1), min_size=8, max_size=40), st.integers(0, 100), st.randoms())
def test_random_splits_part_the_classes_and_ignore_their_order(classes, seed, shuffle):
    splits = random_splits(classes, seed)
    assert sorted(name for names in splits.values() for name in names) == sorted(classes)
    assert list(splits) == ["train", "validation", "test"]
    assert all(splits.values())
    shuffled = list(classes)
    shuffle.shuffle(shuffled)
    assert random_splits(shuffled, seed) == splits


def test_random_splits_follow_seed_and_fractions():
    assert random_splits(CLASSES, 0) != random_splits(CLASSES, 1)
    splits = random_splits(CLASSES, 0, (0.6, 0.1, 0.3))
    assert [len(names) for names in splits.values()] == [12, 2, 6]
    assert random_splits(CLASSES, 0, (0.5, 0.0, 0.5)).keys() == {"train", "test"}


def test_random_splits_are_what_they_were():
    """Published results depend on it: a change of the rule must not pass unseen."""
    assert random_splits(CLASSES[:6], 0, (1 / 3, 1 / 3, 1 / 3)) == {
        "train": ["class 0", "class 2"],
        "validation": ["class 1", "class 3"],
        "test": ["class 4", "class 5"],
    }


def test_random_splits_errors():
    with pytest.raises(ValueError, match=r"train split would have no class: 0.5 of 1 classes"):
        random_splits(["only"])
    nan = float("nan")
    for fractions in [(0.5, 0.5), (0.5, 0.6, -0.1), (0.5, 0.2, 0.2), (nan, 0.5, 0.5), (0.5, 0.5, nan), "abc", None]:
        with pytest.raises(ValueError, match="three fractions that add up to 1"):
            random_splits(CLASSES, 0, fractions)


def test_split_file(tmp_path):
    path = tmp_path / "split_1.json"
    path.write_text(json.dumps({"train": ["a"], "test": ["b"]}))
    assert read_split_file(path) == {"train": ["a"], "test": ["b"]}
    with pytest.raises(FileNotFoundError, match=r"split_file='.*nothing.json' does not exist"):
        read_split_file(tmp_path / "nothing.json")
    for content in ["[1]", "{", "[" * 100_000]:
        path.write_text(content)
        with pytest.raises(ValueError, match="split_file="):
            read_split_file(path)


def test_checked_splits_are_sorted_text_in_the_usual_order():
    assert check_splits({"test": [3, "1"], "train": ["2"]}, {"1", "2", "3"}) == {"train": ["2"], "test": ["1", "3"]}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["class 1"], "test": ["class 2", "class 1"]}, "'class 1' is listed in train and in test"),
        ({"train": ["class 1", "class 1"]}, "'class 1' is listed in train and in train"),
        ({"train": ["clas 1"]}, "'clas 1', which is none of the 20 classes.*Did you mean 'class 1'"),
        ({"training": ["class 1"]}, "unknown name 'training'. Use: train, validation, test"),
        ({"train": "class 1"}, "must be a list of class names, not 'class 1'"),
        ({"train": []}, r"must be a list of class names, not \[\]"),
        ({"train": None}, "must be a list of class names, not None"),
        ({}, "splits are empty"),
    ],
)
def test_bad_splits_are_errors(splits, message):
    with pytest.raises(ValueError, match=message):
        check_splits(splits, CLASSES)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"train": {"a"}, "test": {"b"}}, {"train": ["a"], "test": ["b"]}),
        ({"train": {"a"}, "dev": {"c"}, "test": {"b"}}, {"train": ["a"], "validation": ["c"], "test": ["b"]}),
        ({"train": {"a", "b"}, "test": {"b"}}, None),
        ({"train": {"a"}}, None),
        ({"train": {"a"}, "extra": {"b"}}, None),
        ({"val": {"a"}, "validation": {"c"}, "test": {"b"}}, {"validation": ["a", "c"], "test": ["b"]}),
    ],
)
def test_own_splits_are_used_when_they_share_no_class(parts, expected):
    assert own_splits(parts) == expected
