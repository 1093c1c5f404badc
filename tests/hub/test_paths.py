"""A published path says what a reader needs, and nothing of the author's machine."""

import pytest

from fewshot_nlp.hub.info import AdapterInfo
from fewshot_nlp.hub.paths import public_path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "jane"))
    (tmp_path / "jane" / "work").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "jane" / "work")
    return tmp_path / "jane" / "work"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("{here}/data/x.csv", "data/x.csv"),
        ("~/work/x.csv", "x.csv"),
        ("~/secret/x.csv", ".../x.csv"),
        ("{here}/../secret/x.csv", "../secret/x.csv"),
        ("/srv/clients/acme/data/", ".../data"),
        ("{here}", "."),
        ("/", "/"),
        ("data/x.csv", "data/x.csv"),
        ("someone/model", "someone/model"),
        (".../x.csv", ".../x.csv"),
    ],
)
def test_a_path_as_a_stranger_may_read_it(here, given, shown):
    assert public_path(given.format(here=here)) == shown
    assert AdapterInfo(datasets=[given.format(here=here)]).datasets == [shown]


def test_below_the_root_all_would_be_inside_the_current_folder(monkeypatch):
    monkeypatch.chdir("/")
    assert public_path("/home/jane/x") == ".../x"


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("run --split_file /srv/acme/split.json --n 5", "run --split_file .../split.json --n 5"),
        ("run --output_dir={here}/out ~/x.yaml", "run --output_dir=out .../x.yaml"),
        ("run --data '/srv/my data/x y.csv' --text \"a 'b'\"", "run --data '.../x y.csv' --text \"a 'b'\""),
        ("run --data /srv/my\\ data/x\\ y.csv", "run --data '.../x y.csv'"),
        ("A=/srv/a run && cat 'a/b' https://x.org/y | tee 1/2", "A=.../a run && cat 'a/b' https://x.org/y | tee 1/2"),
        ("run 'never closed /srv/acme/x", "run 'never closed .../x"),
        ("run \\", "run \\"),
    ],
)
def test_the_command_names_no_private_folder(here, given, shown):
    command = AdapterInfo(command=given.format(here=here)).command
    assert command == shown
    assert AdapterInfo(command=command).command == shown
