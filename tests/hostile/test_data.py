"""Data sets, lists and settings from a stranger."""

from __future__ import annotations

import json
import sys

import pytest
from datasets import Dataset

from fewshot_nlp.cli.errors import refusal
from fewshot_nlp.cli.parser import read_yaml
from fewshot_nlp.data import load_episodes, load_pools
from fewshot_nlp.data.columns import MAX_NAME
from fewshot_nlp.data.splits import read_split_file
from fewshot_nlp.data.stages import read_groups


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "arrow", "pkl", "npy", "pt"])
def test_a_pickle_in_place_of_a_data_file(tmp_path, bomb, kind):
    (tmp_path / f"data.{kind}").write_bytes(bomb)
    with pytest.raises(ValueError, match=rf"data\.{kind}|Cannot tell which column"):
        load_pools(tmp_path / f"data.{kind}")


@pytest.mark.parametrize("file", ["dataset_info.json", "state.json", "data-00000-of-00001.arrow"])
def test_a_pickle_in_place_of_a_file_of_a_saved_data_set(tmp_path, bomb, file):
    Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]}).save_to_disk(tmp_path / "set")
    (tmp_path / "set" / file).write_bytes(bomb)
    with pytest.raises(ValueError, match="set' cannot be read"):
        load_pools(tmp_path / "set")


@pytest.mark.parametrize("name", ["../outside.arrow", "/etc/passwd", 5])
def test_rows_somewhere_else(tmp_path, name):
    Dataset.from_dict({"text": ["a", "b"], "label": ["x", "y"]}).save_to_disk(tmp_path / "set")
    state = tmp_path / "set" / "state.json"
    (tmp_path / "set" / "data-00000-of-00001.arrow").rename(tmp_path / "outside.arrow")
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_data_files": [{"filename": name}]}))
    with pytest.raises(ValueError, match="which is no file beside it"):
        load_pools(tmp_path / "set")


@pytest.mark.parametrize("name", ["more.csv", "deep/more.csv", "folder"])
def test_a_link_out_of_a_folder_of_data(tmp_path, name):
    outside, folder = tmp_path / "outside", tmp_path / "set"
    for place in (outside, folder / "deep"):
        place.mkdir(parents=True)
    rows = "text,label\n" + "".join(f"text {i},{'abcd'[i % 4]}\n" for i in range(8))
    (outside / "secret.csv").write_text(rows)
    (folder / "train.csv").write_text(rows)
    (folder / name).symlink_to(outside if name == "folder" else outside / "secret.csv")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        load_pools(folder)
    (folder / name).unlink()
    (folder / "train.csv").rename(folder / "deep" / "own.csv")
    (folder / "train.csv").symlink_to(folder / "deep" / "own.csv")
    load_pools(folder, duplicates="keep")


def test_a_loading_script_is_not_run(tmp_path, marker):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "set.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    with pytest.raises(ValueError, match="set' cannot be read"):
        load_pools(folder)
    (folder / "train.jsonl").write_text("".join(f'{{"text": "{i}", "label": "{"abcd"[i % 4]}"}}\n' for i in range(8)))
    try:
        load_pools(folder)
    except ValueError as error:
        assert "set' cannot be read" in str(error)


@pytest.mark.parametrize("read", [read_split_file, read_groups, load_episodes, read_yaml])
def test_a_pickle_in_place_of_a_list_or_settings(tmp_path, bomb, read):
    (tmp_path / "file").write_bytes(bomb)
    with pytest.raises(ValueError, match="file"):
        read(tmp_path / "file")


LABELS = {
    "an escape": ("\x1b[2J", "character '\\x1b'"),
    "a null": ("a\0b", "character '\\x00'"),
    "a line end": ("a\nb", "character '\\n'"),
    "letters that turn around": ("a\u202eb", "character '\\u202e'"),
    "another line end": ("a\u2028b", "character '\\u2028'"),
    "ten megabytes": ("a" * 10_000_000, "a label of 10,000,000 characters"),
    "one more than may be": ("a" * (MAX_NAME + 1), "a label of 1,001 characters"),
}


@pytest.mark.parametrize("name", LABELS)
def test_a_label_that_cannot_be_shown(name):
    label, message = LABELS[name]
    with pytest.raises(ValueError) as caught:
        load_pools(Dataset.from_dict({"text": list("1234"), "label": ["x", "y", label, "z"]}))
    assert message in str(caught.value) and "Row 2" in str(caught.value)
    assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


@pytest.mark.parametrize(
    "label",
    [
        "<b>",
        "[x](y)",
        "a | b",
        "r\u00e9sum\u00e9",
        "\u06a9\u062a\u0627\u0628\u200c\u0647\u0627",
        "\U0001f469\u200d\U0001f680",
        "a" * MAX_NAME,
    ],
)
def test_a_label_of_markup_or_another_script_is_a_label(label):
    pools = load_pools(Dataset.from_dict({"text": list("1234"), "label": ["x", "y", label, "z"]}))
    assert label in [name for pool in pools.values() for name in pool.label_names]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
YAML = {
    "laughs": (BOMB, "aliases are not read"),
    "an alias": ("learner: &x maml\nhead: *x\n", "aliases are not read"),
    "a merge": ("a: &x {learner: maml}\n<<: *x\n", "aliases are not read"),
    "an endless list": ("learner: &x [*x]\n", "aliases are not read"),
    "brackets": ("learner: " + "[" * 5000, "is not valid YAML"),
    "an object": ("learner: !!python/object/apply:os.mkdir [MARKER]\n", "could not determine a constructor"),
    "a module": ("learner: !!python/module:os\n", "could not determine a constructor"),
    "no date": ("learner: 2024-99-99\n", "is not valid YAML"),
    "no number": ("learner: !!int x\n", "is not valid YAML"),
    "no truth": ("learner: !!bool x\n", "is not valid YAML"),
    "a list for a key": ("[1]: 2\n", "unhashable key"),
    "an unknown key of any length": ("? " + "x" * 50_000 + "\n: 1\n", "unknown key"),
    "ten thousand keys": ("".join(f"k{i}: 1\n" for i in range(9_000)), "unknown key 'k0'"),
    "a key twice": ("learner: maml\nlearner: maml\n", "the key 'learner' stands twice"),
    "no text": ("\xff\xfe\x00", "YAML"),
    "ten megabytes": ("learner: " + "a" * 10_000_000, "10,000,009 bytes"),
}


@pytest.mark.parametrize("name", YAML)
def test_settings_in_yaml(tmp_path, name, marker):
    content, message = YAML[name]
    (tmp_path / "run.yaml").write_bytes(content.replace("MARKER", str(marker)).encode("latin-1"))
    with pytest.raises(ValueError) as caught:
        read_yaml(tmp_path / "run.yaml")
    assert message in str(caught.value) and "run.yaml" in str(caught.value) and len(str(caught.value)) < 1000


def test_json_on_the_command_line_and_deep_lists_are_refused(tmp_path):
    (tmp_path / "split.json").write_text("[" * sys.getrecursionlimit() * 10)
    with pytest.raises(ValueError, match=r"split_file=.* is not JSON"):
        read_split_file(tmp_path / "split.json")
    (tmp_path / "split.json").write_text(json.dumps({"train": ["x" * 1_000_000]}))
    with pytest.raises(ValueError, match="which is none of the 2 classes") as caught:
        load_pools(Dataset.from_dict({"text": ["1", "2"], "label": ["a", "b"]}), split_file=tmp_path / "split.json")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("\x1b[2Jgone", "error: \\u001b[2Jgone"),
        ("one\ntwo", "error: one\ntwo"),
        ("token hf_abcdefghij and https://me:secret@hub/x", "error: token *** and https://***@hub/x"),
        ("x" * 10_000, "error: " + "x" * 1999 + "…"),
    ],
    ids=["escape", "lines", "token", "long"],
)
def test_what_the_terminal_is_given(said, shown):
    assert str(refusal(ValueError(said))) == shown
