"""Nothing that is evaluated is trained on, however it is spelt or stored."""

from __future__ import annotations

import io
import unicodedata

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fewshot_nlp.data import EpisodeReader, TextEncoder, load_pools, training_tasks_from_config
from fewshot_nlp.data.config import EpisodeConfig
from fewshot_nlp.data.leakage import class_key, image_key, text_key
from fewshot_nlp.data.stages import hold_out
from fewshot_nlp.evaluation import build_protocol
from fewshot_nlp.evaluation.protocol import leakage
from tests.tiny import tiny_tokenizer

SPLITS = {"train": ["a"], "validation": ["b"], "test": ["c"]}


def dataset(train, test, labels="abc"):
    """A text of its own in each class, and one more in the first and in the last."""
    return Dataset.from_dict(
        {"text": ["one", train, "two", "three", test], "label": [labels[i] for i in (0, 0, 1, 2, 2)]}
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("same text", "same text"),
        ("Same Text", "sAME tEXT"),
        (" same\t text \n", "same text"),
        ("caf\u00e9", "cafe\u0301"),  # Composed and not.
        ("\ufb01ne", "fine"),  # A ligature.
        ("\uff33\uff41\uff4d\uff45", "same"),  # Full width.
        ("STRASSE", "stra\u00dfe"),
        ("sa\u200bme", "same"),  # A space of no width.
        ("sa\u00adme", "same"),  # A hyphen that is not seen.
        ("same\u00a0text", "same text"),  # A space that does not break.
    ],
)
def test_a_text_in_two_spellings_is_one(train, test):
    data = dataset(train, test)
    with pytest.raises(
        ValueError, match=r"1 texts of the train split .*row 1 in train, row 4 in test.*duplicates='drop'"
    ):
        load_pools(data, splits=SPLITS)
    dropped = load_pools(data, splits=SPLITS, duplicates="drop")
    assert {split: pool.num_dropped for split, pool in dropped.items()} == {"train": 1, "validation": 0, "test": 0}
    assert dropped["train"].rows_by_class == {"a": (0,)} and dropped["test"].rows_by_class == {"c": (3, 4)}
    kept = load_pools(data, splits=SPLITS, duplicates="keep")
    assert [(pool.num_dropped, pool.num_shared) for pool in kept.values()] == [(0, 1), (0, 0), (0, 0)]
    shape = {"n_way": 2, "shots": [1], "n_query": 1, "episodes": 1, "seed": 0, "transductive": False}
    assert build_protocol(dropped, **shape)["leakage"] == {"dropped": 1, "kept": 0}
    assert build_protocol(kept, **shape)["leakage"] == {"dropped": 0, "kept": 1}


@pytest.mark.parametrize(
    ("train", "test"),
    [("same text", "same texts"), ("to be", "be to"), ("now?", "now"), ("resume", "r\u00e9sum\u00e9"), ("ab", "a b")],
)
def test_what_differs_by_more_is_two(train, test):
    pools = load_pools(dataset(train, test), splits=SPLITS)
    assert all(pool.num_dropped == pool.num_shared == 0 for pool in pools.values())


@given(st.text(), st.integers(0, 2**32))
def test_keys_are_settled_and_blind_to_spelling(text, seed):
    key = text_key(text)
    assert text_key(key) == key
    assert text_key(f"  {text}\n") == key
    for form in ("NFC", "NFD", "NFKC", "NFKD"):
        assert text_key(unicodedata.normalize(form, text)) == key
    assert class_key(class_key(text)) == class_key(text) or not any(map(str.isalpha, text))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lost_card", "Lost Card"),
        ("LostCard", "lost-card"),
        ("refund", "Refund "),
        ("Caf\u00e9", "cafe\u0301"),
        ("cafe\u0301_bar", "Caf\u00e9 bar"),
        ("lost - card", "lost__card"),
        ("lost\uff3fcard", "lost card"),
    ],
)
def test_a_class_in_two_spellings_is_one(one, other):
    data = dataset("x", "y", (one, "b", other))
    splits = {"train": [one], "validation": ["b"], "test": [other]}
    with pytest.raises(ValueError, match=r"2 texts of the train split .* those of the class .*, which test calls"):
        load_pools(data, splits=splits)
    with pytest.raises(ValueError, match="No class of the train split"):
        load_pools(data, splits=splits, duplicates="drop")
    assert load_pools(data, splits=splits, duplicates="keep")["train"].num_shared == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "-1"),
        ("c++", "c#"),
        ("1.0", "10"),
        ("yes", "yes!"),
        ("_", "-"),
        ("B", "B-"),
        ("O", "-O"),
        ("B- to C", "B to C"),
        ("_x", "x"),
        ("ab", "a-b"),
    ],
)
def test_names_that_differ_by_more_are_two(one, other):
    pools = load_pools(dataset("x", "y", (one, "b", other)), splits={"train": [one], "test": [other]})
    assert pools["train"].num_shared == 0


def test_own_splits_whose_classes_differ_in_case_are_found():
    parts = DatasetDict(
        train=Dataset.from_dict({"text": ["1", "2"], "label": ["Refund", "other"]}),
        test=Dataset.from_dict({"text": ["3", "4"], "label": ["refund", "third"]}),
    )
    with pytest.raises(ValueError, match="'Refund', which test calls 'refund'"):
        load_pools(parts)
    pools = load_pools(parts, duplicates="drop")
    assert pools["train"].label_names == ["other"] and pools["train"].num_dropped == 1


def picture(seed, size=(6, 4)):
    return Image.frombytes("RGB", size, bytes((seed * 37 + i * 11) % 256 for i in range(size[0] * size[1] * 3)))


def test_an_image_in_two_files_is_one():
    def file(image, kind, **options):
        image.save(found := io.BytesIO(), kind, **options)
        return {"bytes": found.getvalue(), "path": None}

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    images = [file(picture(i), "PNG") for i in range(3)] + [file(picture(0), "BMP"), file(picture(9), "PNG")]
    assert images[0]["bytes"] != images[3]["bytes"]
    data = Dataset.from_dict({"image": images, "label": [0, 0, 1, 2, 2]}, features=features)
    with pytest.raises(ValueError, match=r"1 images of the train split .*row 0 in train, row 3 in test"):
        load_pools(data, splits=SPLITS)
    assert load_pools(data, splits=SPLITS, duplicates="drop")["train"].rows_by_class == {"a": (1,)}


def test_pixels_and_size_are_what_an_image_is():
    one = picture(1)
    assert image_key(one) == image_key(one.convert("RGBA")) != image_key(one.rotate(90, expand=True))
    assert image_key(Image.new("L", (2, 3), 7)) == image_key(Image.new("RGB", (2, 3), (7, 7, 7)))
    assert image_key(Image.new("L", (2, 3), 7)) != image_key(Image.new("L", (3, 2), 7))


@pytest.mark.parametrize("content", [b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_an_image_that_cannot_be_read_is_named_at_once(content):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "b", "c"])})
    good = io.BytesIO()
    picture(0).save(good, "PNG")
    rows = [{"bytes": each, "path": None} for each in (good.getvalue(), content, good.getvalue()[:-30])]
    data = Dataset.from_dict({"image": rows, "label": [0, 1, 2]}, features=features)
    with pytest.raises(ValueError, match=r"Row 1 has an image that cannot be read \(image\)"):
        load_pools(data)


def write(path, rows):
    Dataset.from_list([{"text": text, "label": label} for text, label in rows]).to_json(path)
    return str(path)


def test_a_mixture_does_not_learn_what_is_evaluated_in_another_spelling(tmp_path):
    own = write(tmp_path / "own.jsonl", [(f"{name} {i}", name) for name in "abcdefgh" for i in range(4)])
    more = [(f"{name} {i}", name) for name in ("ant", "bee", "cat", "Dog House") for i in range(4)]
    pools = load_pools(own)
    tested = pools["test"].texts(next(iter(pools["test"].rows_by_class.values())))[0]
    other = write(tmp_path / "other.jsonl", [*more, (f" {tested.upper()} ", "ant")])
    settings = {"dataset_name": own, "mixture_dataset_names": [other], "n_way": 2, "n_query": 1}
    # All classes of the other file are to be training's, so that the one text is.
    mixed = [load_pools(other, split_seed=seed)["train"].label_names for seed in range(50)]
    seed = next(i for i, names in enumerate(mixed) if "ant" in names)
    config = EpisodeConfig(**settings, split_seed=seed, min_examples=3)
    pools = load_pools(own, split_seed=0)
    with pytest.raises(ValueError, match="would train on what is evaluated: a text of 'ant'"):
        training_tasks_from_config(config, pools)
    config.duplicates = "drop"
    assert training_tasks_from_config(config, pools).pools["other"].num_dropped == 1
    config.duplicates = "keep"
    found = training_tasks_from_config(config, pools).pools["other"]
    assert (found.num_dropped, found.num_shared) == (0, 1)


@pytest.mark.parametrize("duplicates", ["drop", "keep"])
def test_what_a_mixture_shares_with_splits_of_its_own_counts_for_nothing(tmp_path, duplicates):
    """Those are not evaluated."""
    own = write(tmp_path / "own.jsonl", [(f"{name} {i}", name) for name in "abcdefgh" for i in range(4)])
    other = tmp_path / "other"
    other.mkdir()
    write(other / "train.jsonl", [*((f"{name} {i}", name) for name in ("ant", "bee") for i in range(4)), ("x", "ant")])
    write(other / "test.jsonl", [("x", "cat"), ("cat", "cat")])
    config = EpisodeConfig(own, mixture_dataset_names=[str(other)], duplicates=duplicates, n_way=2, n_query=1)
    pools = load_pools(own)
    training = training_tasks_from_config(config, pools).pools
    assert len(training["other"]) == (8 if duplicates == "drop" else 9)
    assert leakage([*pools.values(), *training.values()]) == {"dropped": 0, "kept": 0}


def test_unlabelled_texts_are_none_that_are_evaluated():
    texts = [f"{name} {i}" for name in "abcdef" for i in range(3)]
    data = Dataset.from_dict({"text": texts, "label": [text[0] for text in texts]})
    pools = load_pools(data, splits={"train": list("abc"), "test": list("def")})
    encoder = TextEncoder(tiny_tokenizer(), 8)
    assert EpisodeReader(pools["train"], encoder, unlabelled=pools["train"], n_unlabelled=2)
    with pytest.raises(ValueError, match=r"unlabelled texts are of the test split.*Give the train split's"):
        EpisodeReader(pools["train"], encoder, unlabelled=pools["test"], n_unlabelled=2)


def test_a_stream_holds_out_a_text_in_all_its_spellings():
    rows = [
        (f"{spelt(f'{name} {i}')}", name) for name in ("ant", "bee") for i in range(10) for spelt in (str, str.upper)
    ]
    rows += [(f"ANT {i}", "bee") for i in range(10)]
    data = Dataset.from_list([{"text": text, "label": label} for text, label in rows])
    pool = load_pools(data, splits={"train": ["ant", "bee"]})["train"]
    (stage,) = hold_out([pool])
    keys = {
        split: {text_key(text) for rows in part.rows_by_class.values() for text in part.texts(rows)}
        for split, part in stage.pools.items()
    }
    assert keys["train"].isdisjoint(keys["test"] | keys["validation"]) and keys["test"].isdisjoint(keys["validation"])


@given(st.data())
def test_dropped_and_kept_add_up_to_what_is_shared(data):
    """Against a count by brute force, over texts that often collide."""
    spellings = st.sampled_from(["x", "X", " x", "y", "Y ", "z", "\uff5a", "w"])
    texts = data.draw(st.lists(spellings, min_size=6, max_size=14))
    labels = [("a", "b", "c")[i % 3] for i in range(len(texts))]
    dataset = Dataset.from_dict({"text": texts, "label": labels})
    folded = [unicodedata.normalize("NFKC", text).lower().strip() for text in texts]
    later = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    expected = {
        name: sum(
            labels[i] == name and any(folded[i] == folded[j] and labels[j] in later[name] for j in range(len(texts)))
            for i in range(len(texts))
        )
        for name in later
    }
    kept = load_pools(dataset, splits=SPLITS, duplicates="keep")
    assert {next(iter(pool.rows_by_class)): pool.num_shared for pool in kept.values()} == expected
    counts = {name: labels.count(name) for name in later}
    if any(counts[name] == expected[name] for name in later):
        with pytest.raises(ValueError, match="No class of the"):
            load_pools(dataset, splits=SPLITS, duplicates="drop")
        return
    dropped = load_pools(dataset, splits=SPLITS, duplicates="drop")
    assert {next(iter(pool.rows_by_class)): pool.num_dropped for pool in dropped.values()} == expected
    seen: list[set[str]] = [
        {text_key(t) for rows in p.rows_by_class.values() for t in p.texts(rows)} for p in dropped.values()
    ]
    assert seen[0].isdisjoint(seen[1] | seen[2]) and seen[1].isdisjoint(seen[2])
