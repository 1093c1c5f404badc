import os
import subprocess
import sys

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given
from hypothesis import strategies as st

from fewshot_nlp.data import EpisodeSampler, load_pools, load_pools_from_config
from fewshot_nlp.data.config import EpisodeConfig
from tests.data.toy_data import CLASSES, make_dataset, make_pool

HALVES = {"train": CLASSES[:4], "validation": CLASSES[4:5], "test": CLASSES[5:]}


def test_a_pool_knows_its_classes_rows_and_texts(dataset):
    pools = load_pools(dataset, splits=HALVES, name="fruit")
    assert list(pools) == ["train", "validation", "test"]
    pool = pools["train"]
    assert (pool.name, pool.split, pool.label_names, len(pool)) == ("fruit", "train", CLASSES[:4], 48)
    rows = pool.rows_by_class["banana"]
    assert pool.texts(rows[:2]) == ["banana sentence number 0", "banana sentence number 1"]
    assert pool.texts(rows[1::-1]) == ["banana sentence number 1", "banana sentence number 0"]
    assert pool.texts([]) == []


def test_random_splits_are_class_disjoint_and_complete(dataset):
    pools = load_pools(dataset)
    owners = [name for pool in pools.values() for name in pool.label_names]
    assert sorted(owners) == CLASSES
    rows = [row for pool in pools.values() for rows in pool.rows_by_class.values() for row in rows]
    assert sorted(rows) == list(range(len(dataset)))


@given(st.permutations(range(24)), st.integers(0, 50))
def test_splits_depend_on_class_names_and_seed_alone(order, seed):
    dataset = make_dataset(per_class=3)
    expected = {split: pool.label_names for split, pool in load_pools(dataset, split_seed=seed).items()}
    found = load_pools(dataset.select(order), split_seed=seed)
    assert {split: pool.label_names for split, pool in found.items()} == expected


@pytest.mark.parametrize("kind", ["ClassLabel", "int", "string"])
def test_label_types_give_the_same_pools_up_to_names(dataset, kind):
    if kind == "int":
        dataset = dataset.cast_column("label", Value("int64"))
    elif kind == "string":
        dataset = dataset.map(
            lambda row: {"intent": CLASSES[row["label"]]}, remove_columns=["label"], load_from_cache_file=False
        )
    names = [str(i) for i in range(8)] if kind == "int" else CLASSES
    pools = load_pools(dataset, splits={"train": names[:6], "test": names[6:]})
    assert pools["test"].label_names == names[6:]
    assert pools["test"].texts(pools["test"].rows_by_class[names[7]][:1]) == ["honey sentence number 0"]


def test_own_class_disjoint_splits_are_kept():
    own = DatasetDict(train=make_dataset(CLASSES[:3]), dev=make_dataset(CLASSES[3:5]), test=make_dataset(CLASSES[5:]))
    pools = load_pools(own)
    assert {split: pool.label_names for split, pool in pools.items()} == {
        "train": CLASSES[:3],
        "validation": CLASSES[3:5],
        "test": CLASSES[5:],
    }
    assert pools["test"].texts(pools["test"].rows_by_class["fig"][:1]) == ["fig sentence number 0"]


def test_a_part_without_rows_counts_for_none():
    """It is what the remedy of a test part without labels leaves."""
    parts = DatasetDict(train=make_dataset(), test=make_dataset().select([]))
    assert {s: p.label_names for s, p in load_pools(parts).items()} == {
        s: p.label_names for s, p in load_pools(make_dataset()).items()
    }
    with pytest.raises(ValueError, match="The data set 'dataset' has no rows"):
        load_pools(DatasetDict(train=make_dataset().select([])))


@pytest.mark.parametrize("style", [{"type": "numpy", "columns": ["label"]}, {"type": "arrow"}])
def test_a_format_of_the_users_changes_nothing(dataset, style):
    pool, plain = (load_pools(each)["train"] for each in (dataset.with_format(**style), dataset))
    rows = pool.rows_by_class[pool.label_names[0]]
    assert [type(text) for text in pool.examples(rows)] == [str] * 12
    assert pool.fingerprint == plain.fingerprint


def test_a_transform_is_refused(dataset):
    with pytest.raises(ValueError, match=r"train part of 'dataset' has a transform.*Use dataset\.map"):
        load_pools(dataset.with_transform(lambda rows: rows))


def test_parts_may_hold_values_of_different_widths():
    wide = Features({"text": Value("large_string"), "label": Value("string"), "score": Value("float32")})
    parts = DatasetDict(
        train=Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"], "score": [1, 2]}),
        test=Dataset.from_dict({"text": ["c"], "label": ["z"], "score": [0.5]}, features=wide),
    )
    pools = load_pools(parts, target_column_name="score")
    assert pools["train"].texts([0, 1, 2]) == ["a", "b", "c"] and pools["test"].targets([0, 2]) == [1.0, 0.5]


def test_one_example_of_a_class_cannot_be_lowered():
    texts = Dataset.from_dict({"text": ["a", "b", "A", "B", "c"], "label": ["x", "y", "z", "z", "z"]})
    with pytest.raises(ValueError, match=r"No class of the train split.*Later splits hold them all\. Use other splits"):
        load_pools(texts, splits={"train": ["x", "y"], "test": ["z"]}, duplicates="drop")


def test_splits_that_share_classes_are_put_together_and_split_by_class():
    pools = load_pools(DatasetDict(train=make_dataset(per_class=8), test=make_dataset(per_class=4, start=8)))
    whole = load_pools(make_dataset())
    assert {s: p.label_names for s, p in pools.items()} == {s: p.label_names for s, p in whole.items()}
    assert all(len(rows) == 12 for pool in pools.values() for rows in pool.rows_by_class.values())


def test_parts_may_number_their_classes_differently():
    first = make_dataset(CLASSES[:4])
    second = Dataset.from_dict({"text": ["honey a", "honey b"], "label": ["honey", "honey"]})
    second = second.cast_column("label", ClassLabel(names=["honey", "apple"]))
    pools = load_pools(DatasetDict(train=first, test=second))
    assert pools["test"].label_names == ["honey"]
    assert pools["test"].texts(pools["test"].rows_by_class["honey"]) == ["honey a", "honey b"]


def test_readable_names_and_descriptions_come_along():
    dataset = Dataset.from_dict(
        {
            "text": ["one", "two", "three"],
            "label": ["a", "b", "a"],
            "label_name": ["the letter a", "the letter b", "the letter a"],
            "label_description": ["First.", "Second.", "First."],
        }
    )
    pools = load_pools(dataset, splits={"train": ["a"], "test": ["b"]})
    assert pools["train"].readable_names == {"a": "the letter a"}
    assert pools["test"].descriptions == {"b": "Second."}
    assert make_pool({"a": 1}).descriptions == {}


@pytest.mark.parametrize("nothing", [None, "", " "])
def test_a_class_without_a_readable_name_keeps_its_own(nothing):
    dataset = Dataset.from_dict(
        {
            "text": ["one", "two", "three", "four"],
            "label": ["a", "b", "a", "c"],
            "label_name": [nothing, nothing, "the letter a", "the letter c"],
            "label_description": [nothing, "Second.", nothing, nothing],
        }
    )
    pool = load_pools(dataset, splits={"train": ["a", "b", "c"]})["train"]
    assert pool.readable_names == {"a": "the letter a", "c": "the letter c"}
    assert pool.descriptions == {"b": "Second."}


def test_an_empty_column_of_readable_names_in_a_file_is_none(tmp_path):
    (tmp_path / "data.csv").write_text("text,label,label_name\none,a,\ntwo,b,\n")
    pool = load_pools(tmp_path / "data.csv", splits={"train": ["a", "b"]})["train"]
    assert pool.readable_names == {}


def test_min_examples_leaves_small_classes_out(dataset):
    small = dataset.select(range(len(dataset) - 1))  # One "honey" less.
    assert "honey" not in load_pools(small, splits=HALVES, min_examples=12)["test"].label_names
    assert "honey" in load_pools(small, splits=HALVES, min_examples=11)["test"].label_names
    with pytest.raises(ValueError, match="No class of the train split has min_examples=13 examples"):
        load_pools(small, splits=HALVES, min_examples=13)


def shared_text_dataset():
    """The text of row 0 (a, train) is also in row 3 (c, test), and twice in class d."""
    return Dataset.from_dict({"text": ["same", "x", "y", "same", "twice", "twice"], "label": list("aabcdd")})


SHARED = {"train": ["a"], "validation": ["b"], "test": ["c", "d"]}


def test_a_text_in_two_splits_is_an_error():
    message = r"1 texts of the train split .*'same' \(row 0 in train, row 3 in test\).*duplicates='drop'"
    with pytest.raises(ValueError, match=message):
        load_pools(shared_text_dataset(), splits=SHARED)


def test_a_text_in_two_splits_can_be_dropped_from_the_earlier():
    pools = load_pools(shared_text_dataset(), splits=SHARED, duplicates="drop")
    assert {split: pool.num_dropped for split, pool in pools.items()} == {"train": 1, "validation": 0, "test": 0}
    assert pools["train"].rows_by_class == {"a": (1,)}
    assert pools["test"].rows_by_class == {"c": (3,), "d": (4, 5)}


def test_a_class_that_is_too_small_without_its_shared_texts_is_left_out():
    splits = {"train": ["a", "b"], "test": ["c", "d"]}
    data = Dataset.from_dict({"text": list("1234516789"), "label": list("aabbbccddd")})
    assert load_pools(data, splits=splits, duplicates="drop")["train"].rows_by_class == {"a": (1,), "b": (2, 3, 4)}
    pools = load_pools(data, splits=splits, duplicates="drop", min_examples=2)
    assert pools["train"].rows_by_class == {"b": (2, 3, 4)}


def test_a_text_in_two_splits_can_be_kept():
    pools = load_pools(shared_text_dataset(), splits=SHARED, duplicates="keep")
    assert pools["train"].rows_by_class == {"a": (0, 1)}
    assert pools["train"].num_dropped == 0


def test_errors_name_the_value_and_the_remedy(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"duplicates='ignore' is not known. Use one of: error, drop, keep"):
        load_pools(dataset, duplicates="ignore")
    with pytest.raises(ValueError, match="Both splits and split_file"):
        load_pools(dataset, splits=HALVES, split_file=tmp_path / "split.json")
    with pytest.raises(ValueError, match="has no rows"):
        load_pools(dataset.select([]))
    with pytest.raises(ValueError, match="'apple' is listed in train and in test"):
        load_pools(dataset, splits={"train": ["apple"], "test": ["apple"]})
    with pytest.raises(ValueError, match=r"'aple', which is none of the 8 classes.*'apple'"):
        load_pools(dataset, splits={"train": ["aple"]})
    with pytest.raises(ValueError, match="label_column_name='intent' is not a column"):
        load_pools(dataset, label_column_name="intent")
    with pytest.raises(ValueError, match="Row 1 has an empty text"):
        load_pools(Dataset.from_dict({"text": ["a", " ", "c"], "label": ["x", "y", "z"]}), splits={"train": ["x"]})
    other = make_dataset(column="intent")
    with pytest.raises(ValueError, match="label_column_name='label' is not a column"):
        load_pools(DatasetDict(train=dataset, test=other))


def test_the_fingerprint_follows_the_data():
    same = make_pool({"a": 3, "b": 3})
    assert same.fingerprint == make_pool({"a": 3, "b": 3}, split="test", name="other").fingerprint
    assert same.fingerprint != make_pool({"a": 3, "c": 3}).fingerprint
    assert same.fingerprint != make_pool({"a": 3, "b": 4}).fingerprint
    # Rows are what episodes name, so a new order is new data.
    dataset = make_dataset(CLASSES[:2])
    splits = {"train": CLASSES[:2]}
    reordered = load_pools(dataset.select(range(23, -1, -1)), splits=splits)["train"]
    assert load_pools(dataset, splits=splits)["train"].fingerprint != reordered.fingerprint


def test_the_fingerprint_is_known():
    """It is written into episode lists: a change of the rule would disown them all."""
    expected = "aca9aeea2d28f541a0277acff456f7c46feb75e72e4123110717d213a2a7c47a"
    assert make_pool({"a": 3, "b": 3}).fingerprint == expected


@pytest.mark.processes
@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_another_process_finds_the_same(tmp_path, hash_seed):
    make_dataset().to_json(tmp_path / "data.jsonl")
    code = (
        "import sys; from fewshot_nlp.data import EpisodeSampler, load_pools\n"
        "pools = load_pools(sys.argv[1], splits=None, split_fractions=(0.75, 0, 0.25))\n"
        "sampler = EpisodeSampler(pools['train'], n_way=2, max_n_way=4, k_shot=1, max_k_shot=3, n_query=2,"
        " n_out_of_scope=3)\n"
        "print(pools['train'].fingerprint, [sampler[0], sampler[7]])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "data.jsonl")],
        env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pools = load_pools(str(tmp_path / "data.jsonl"), split_fractions=(0.75, 0, 0.25))
    sampler = EpisodeSampler(
        pools["train"], n_way=2, max_n_way=4, k_shot=1, max_k_shot=3, n_query=2, n_out_of_scope=3
    )  # fmt: skip
    assert out.strip() == f"{pools['train'].fingerprint} {[sampler[0], sampler[7]]}"


def test_settings_reach_the_pools(tmp_path):
    make_dataset(column="kind").rename_column("text", "said").to_csv(tmp_path / "data.csv", index=False)
    (tmp_path / "split.json").write_text('{"train": ["0", "1", "2"], "test": ["3", "4"]}')
    config = EpisodeConfig(
        dataset_name=str(tmp_path / "data.csv"),
        text_column_name="said",
        label_column_name="kind",
        split_file=str(tmp_path / "split.json"),
    )
    pools = load_pools_from_config(config, name="from config")
    assert {split: pool.label_names for split, pool in pools.items()} == {"train": ["0", "1", "2"], "test": ["3", "4"]}
    assert pools["train"].name == "from config"
    config.split_file, config.split_seed = None, 5
    expected = load_pools(config.dataset_name, text_column_name="said", label_column_name="kind", split_seed=5)
    assert load_pools_from_config(config)["test"].label_names == expected["test"].label_names


def test_settings_say_what_to_leave_out(tmp_path):
    shared_text_dataset().to_csv(tmp_path / "data.csv", index=False)
    (tmp_path / "split.json").write_text('{"train": ["a"], "validation": ["b"], "test": ["c", "d"]}')
    config = EpisodeConfig(dataset_name=str(tmp_path / "data.csv"), split_file=str(tmp_path / "split.json"))
    with pytest.raises(ValueError, match="duplicates='drop'"):
        load_pools_from_config(config)
    config.duplicates = "drop"
    assert load_pools_from_config(config)["train"].num_dropped == 1
    assert load_pools_from_config(config, duplicates="keep")["train"].num_dropped == 0
    config.min_examples = 2
    with pytest.raises(ValueError, match="No class of the validation split has min_examples=2"):
        load_pools_from_config(config)
    with pytest.raises(ValueError, match="duplicates='x' is not known"):
        EpisodeConfig(duplicates="x")
    config = EpisodeConfig(dataset_name=str(tmp_path / "data.csv"), split_fractions=[0.5, 0, 0.5], duplicates="keep")
    assert list(load_pools_from_config(config)) == ["train", "test"]
    with pytest.raises(ValueError, match=r"split_fractions=\[0.5, 0.25\] must be three fractions"):
        EpisodeConfig(split_fractions=[0.5, 0.25])
    with pytest.raises(ValueError, match="min_examples=0 is out of range"):
        EpisodeConfig(min_examples=0)
    with pytest.raises(ValueError, match="min_examples=0 is out of range"):
        load_pools(make_dataset(), min_examples=0)
