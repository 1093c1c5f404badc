"""A csv file on a Hub is read as a local one is, over real HTTP: only an empty cell is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.hub.hub_server import HubServer, Repo

pytestmark = pytest.mark.processes
ROOT = Path(__file__).parents[2]
LABELS = ["NA", "None", "b", "c", "d", "nan"]
#: Pandas takes three of the classes, and the last text, for missing.
ROWS = [("text", "label", "score"), *((f"{label} {i}", label, i or "") for label in LABELS for i in range(2))]
ROWS += [("null", "d", "None")]


def table(separator=",", rows=ROWS):
    return "".join(separator.join(map(str, row)) + "\n" for row in rows).encode()


def card(text):
    return f"---\n{text}\n---\n".encode()


def other(label):
    return table(rows=[ROWS[0], *((f"{label}{i} x", f"{label}{i}", "") for i in range(4))])


TWO = card("configs:\n- config_name: one\n  data_files: one.csv\n- config_name: two\n  data_files: two.csv")
OWN = card("configs:\n- config_name: default\n  data_files: data.csv\n  keep_default_na: true\n  na_values: [b]")
TYPED = "dataset_info:\n  features:\n  - name: text\n    dtype: string\n  - name: label\n    dtype: string\n"
REPOS = {
    "plain": {"data.csv": table()},
    "tabs": {"data.tsv": table("\t")},
    "lines": {"data.jsonl": b"".join(json.dumps(dict(zip("ab", r, strict=False))).encode() + b"\n" for r in ROWS[1:])},
    "several": {"README.md": TWO, "one.csv": other("None"), "two.csv": other("b")},
    "own": {"README.md": OWN, "data.csv": table()},
    "typed": {"README.md": card(TYPED + "  - name: score\n    dtype: float64"), "data.csv": table()},
}
READ = """
import json, sys
import datasets
from fewshot_nlp.data import load_pools

def classes(name, **options):
    try:
        pools = load_pools(f"tester/{name}", **options)
    except ValueError as error:
        return str(error)
    return sorted(label for pool in pools.values() for label in pool.label_names)

def read():
    return {
        "plain": classes("plain"),
        "tabs": classes("tabs"),
        "lines": classes("lines", text_column_name="a", label_column_name="b"),
        "one": classes("several", dataset_config_name="one"),
        "two": classes("several", dataset_config_name="two"),
        "several": classes("several"),
        "own": classes("own"),
        "typed": classes("typed"),
    }

found = {"online": read()}
datasets.config.HF_HUB_OFFLINE = True
found["offline"] = read()
json.dump(found, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Classes, or the error, of each repository; once more with what was kept, when the Hub is out of reach."""
    folder = tmp_path_factory.mktemp("reader")
    with HubServer({}) as hub:
        for name, files in REPOS.items():
            hub.repos[f"tester/{name}"] = Repo(private=False)
            hub.repos[f"tester/{name}"].commit("main", files, "data")
        environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"NO_PROXY": "127.0.0.1", "HF_DATASETS_CACHE": str(folder / "datasets")}
        command = [sys.executable, "-c", READ, str(folder / "found.json")]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("when", ["online", "offline"])
@pytest.mark.parametrize("name", ["plain", "tabs", "lines"])
def test_words_that_pandas_takes_for_nothing_are_classes_and_texts(found, when, name):
    assert found[when][name] == LABELS


@pytest.mark.parametrize("when", ["online", "offline"])
def test_configurations_stay_apart(found, when):
    assert found[when]["one"] == [f"None{i}" for i in range(4)]
    assert found[when]["two"] == [f"b{i}" for i in range(4)]
    assert "'tester/several' cannot be loaded from the Hub" in found[when]["several"]


def test_what_a_repository_says_of_its_own_files_holds(found):
    assert "has no label (label=None)" in found["online"]["own"]
    # A column of numbers cannot hold the word.
    assert "has no label (label=None)" in found["online"]["typed"]
