import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import DatasetDict

from fewshot_nlp.data import load_pools
from fewshot_nlp.data.loading import EMBEDDED, open_dataset
from tests.data.toy_data import CLASSES, make_dataset

SHARED = Path(__file__).parents[3] / "shared" / "data"


def parquet_builder(*args, **options):
    """Of a data set of the Hub that is no csv file."""
    return SimpleNamespace(config=SimpleNamespace(name="default"))


def write(dataset, path):
    plain = dataset.to_pandas()
    plain["label"] = [CLASSES[i] for i in plain["label"]]
    if path.suffix == ".csv":
        plain.to_csv(path, index=False)
    elif path.suffix == ".tsv":
        plain.to_csv(path, index=False, sep="\t")
    elif path.suffix == ".json":
        path.write_text(json.dumps(plain.to_dict("records")))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in plain.to_dict("records")))
    else:
        dataset.to_parquet(path)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl", ".parquet"])
@pytest.mark.parametrize("kind", [str, Path])
def test_a_file_of_any_kind_gives_the_same_pools(dataset, tmp_path, suffix, kind):
    path = tmp_path / f"fruit{suffix}"
    write(dataset, path)
    pools = load_pools(kind(path))
    expected = load_pools(dataset)
    assert pools["train"].name == "fruit"
    for split, pool in pools.items():
        assert pool.label_names == expected[split].label_names
        assert pool.fingerprint == expected[split].fingerprint


@pytest.mark.parametrize(("name", "other"), [("mine [1]", "mine 1"), ("q?", "qa"), ("all*", "all but one")])
def test_a_name_is_no_pattern(tmp_path, name, other):
    """Also of a folder, where another would be read without a word."""
    for path, classes in ((tmp_path / name, CLASSES[:4]), (tmp_path / other, CLASSES[4:])):
        path.mkdir()
        write(make_dataset(classes), path / "train.csv")
        write(make_dataset(classes), path.with_suffix(".csv"))
    for path in (tmp_path / f"{name}.csv", tmp_path / name, tmp_path / name / "train.csv"):
        assert sorted(c for pool in load_pools(path).values() for c in pool.label_names) == CLASSES[:4]


def test_a_file_called_data_is_named_after_its_folder(dataset, tmp_path):
    (tmp_path / "fruit").mkdir()
    write(dataset, tmp_path / "fruit" / "data.jsonl")
    assert load_pools(tmp_path / "fruit" / "data.jsonl")["train"].name == "fruit"


def test_a_folder_written_by_save_to_disk(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "one")
    assert load_pools(tmp_path / "one")["test"].fingerprint == load_pools(dataset)["test"].fingerprint
    own = DatasetDict(train=make_dataset(CLASSES[:5]), test=make_dataset(CLASSES[5:]))
    own.save_to_disk(tmp_path / "two")
    pools = load_pools(str(tmp_path / "two"))
    assert {split: pool.label_names for split, pool in pools.items()} == {"train": CLASSES[:5], "test": CLASSES[5:]}


def test_a_folder_of_files_with_own_splits(tmp_path):
    folder = tmp_path / "fruit"
    folder.mkdir()
    write(make_dataset(CLASSES[:5]), folder / "train.csv")
    write(make_dataset(CLASSES[5:]), folder / "test.csv")
    pools = load_pools(folder)
    assert {split: pool.label_names for split, pool in pools.items()} == {"train": CLASSES[:5], "test": CLASSES[5:]}
    assert pools["test"].name == "fruit"


@pytest.mark.parametrize("names", [["data.jsonl"], ["data.csv"], ["train.jsonl", "more_train.jsonl"]])
def test_a_folder_with_split_files_beside_its_data(tmp_path, names):
    for i, name in enumerate(names):
        write(make_dataset(start=12 * i), tmp_path / name)
    for i in range(3):
        (tmp_path / f"split_{i}.json").write_text(json.dumps({"train": CLASSES[:5], "test": CLASSES[5:]}))
    pools = load_pools(tmp_path, split_file=tmp_path / "split_1.json")
    assert pools["test"].label_names == CLASSES[5:]
    assert sum(map(len, pools.values())) == 12 * 8 * len(names)


def test_data_sets_in_memory(dataset):
    parts, name, hub_id, config_name = open_dataset(dataset)
    assert (list(parts), name, hub_id, config_name) == (["train"], "dataset", None, None)
    whole = DatasetDict(train=dataset)
    assert open_dataset(whole)[0] is whole


def test_a_hub_id_is_known_only_of_what_came_from_the_hub(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def load(*args, **options):
        asked.append(args[0])
        return DatasetDict(train=dataset)

    monkeypatch.setattr("fewshot_nlp.data.loading.load_dataset_builder", parquet_builder)
    monkeypatch.setattr("fewshot_nlp.data.loading.load_dataset", load)
    for name in ("someone/intents", "banking77"):
        assert {pool.hub_id for pool in load_pools(name, name="ours").values()} == {name}
    dataset.save_to_disk("banking77")
    asked.clear()
    for local in ("banking77", dataset, DatasetDict(train=dataset)):
        assert {pool.hub_id for pool in load_pools(local).values()} == {None}
    assert not asked
    monkeypatch.setitem(EMBEDDED, "home_intents", lambda: DatasetDict(train=dataset))
    assert load_pools("home_intents")["train"].hub_id is None


def test_nothing_there_is_an_error(tmp_path):
    for missing in ("nothing.csv", "./nothing", str(tmp_path / "nothing"), tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=r"nothing.*' does not exist"):
            load_pools(missing)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"notes\.txt' is of an unknown kind\. Use one of: \.csv"):
        load_pools(tmp_path / "notes.txt")
    for wrong in (None, 3, [{"text": "a", "label": "b"}]):
        with pytest.raises(TypeError, match=f"not {type(wrong).__name__}"):
            load_pools(wrong)


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ValueError, match=r"'someone/something' is no file or folder, no embedded set \(home_intents, glyphs\)"
    ):
        load_pools("someone/something")


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_a_hub_data_set_that_cannot_be_loaded_is_one_clear_error(monkeypatch, error):
    def refuse(*args, **options):
        raise error("Dataset scripts are no longer supported, but found something.py.")

    monkeypatch.setattr("fewshot_nlp.data.loading.load_dataset_builder", parquet_builder)
    monkeypatch.setattr("fewshot_nlp.data.loading.load_dataset", refuse)
    with pytest.raises(ValueError, match=r"'someone/something' cannot be loaded .*something\.py.*dataset_config_name"):
        load_pools("someone/something")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "label": "b"}\n{nonsense\n', "cannot be read: JSON parse error"),
        ("a.csv", b'text,label\n"never closed,b\n', "cannot be read"),
        ("a.csv", b"", r"is empty\. Name a file with examples"),
        ("a.jsonl", b"", r"is empty\. Name a file with examples"),
        ("a.parquet", b"no parquet", "cannot be read"),
        ("a.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("a.csv", b"text,label\n", "has no rows|cannot be read"),
        ("a.csv", b"text;label\none;b\n", r"one column alone, text;label .* commas between columns"),
        (
            "a.csv",
            b"text,label\none, two,b\nthree, four,c\n",
            r"cannot be read: its rows have more cells than .* names",
        ),
        ("a.tsv", b"text,label\none,b\n", r"one column alone, text,label .* a tsv file with tabs"),
        ("a.csv", b"text,label\none,b\n,c\n", r"Row 1 has an empty text"),
        ("a.csv", b"text,label\none,b\ntwo,\n", r"Row 1 has no label"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_pools(tmp_path / name)


@pytest.mark.parametrize("name", ["data.csv", "data.tsv", "folder/data.csv", "folder/data.tsv", "fold[er]/data.csv"])
def test_a_class_or_text_may_be_a_word_that_pandas_takes_for_nothing(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (path.parent / "notes.md").write_text("")
    labels = ["NA", "None", "nan", "b", "c", "d"]
    rows = [("text", "label", "score"), *((f"{label} {i}", label, i) for label in labels for i in range(2))]
    rows += [("null", "d", ""), ("NULL", "d", "3")]
    path.write_text("".join(("\t" if path.suffix == ".tsv" else ",").join(map(str, row)) + "\n" for row in rows))
    pools = load_pools(path if path.parent == tmp_path else path.parent)
    assert sorted(c for pool in pools.values() for c in pool.label_names) == sorted(labels)
    (numbers,) = {str(open_dataset(path).parts["train"].features["score"].dtype)}
    assert numbers == "float64"


def test_one_missing_number_among_labels_is_named(tmp_path):
    (tmp_path / "data.csv").write_text("text,label\na,1\nb,\nc,2\n")
    with pytest.raises(ValueError, match=r"Row 1 has no label \(label=None\)"):
        load_pools(tmp_path / "data.csv")


def test_a_folder_of_several_kinds_is_an_error(dataset, tmp_path):
    """Only one would be read."""
    write(dataset, tmp_path / "one.csv")
    (tmp_path / ".hidden.jsonl").write_text("{}")
    (tmp_path / "split_1.json").write_text("{}")
    (tmp_path / "dataset_infos.json").write_text("{}")
    (tmp_path / "notes.md").write_text("")
    assert len(load_pools(tmp_path)) == 3
    write(dataset, tmp_path / "two.jsonl")
    with pytest.raises(ValueError, match=r"several kinds, such as one\.csv and two\.jsonl, .*\. Name one file"):
        load_pools(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"cannot be read: .*any data files"):
        load_pools(tmp_path)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("name", "sizes"), [("banking77", (25, 25, 27)), ("clinc150", (50, 50, 50)), ("huffpost", (20, 5, 16))]
)
def test_published_splits(name, sizes):
    folder = SHARED / name
    pools = load_pools(folder, split_file=folder / "split_1.json", duplicates="drop")
    assert tuple(len(pool.label_names) for pool in pools.values()) == sizes
    assert sum(pool.num_dropped for pool in pools.values()) == (3 if name == "clinc150" else 0)
