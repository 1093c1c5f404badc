import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewshot_nlp.data import EpisodeMixture, EpisodeSampler, episodes_hash, load_episodes, save_episodes
from fewshot_nlp.data.episodes import spec_from_dict
from tests.data.toy_data import CLASSES, make_pool


def make_sampler(pool=None, **settings):
    pool = pool or make_pool(dict.fromkeys(CLASSES, 12))
    return EpisodeSampler(pool, **{"n_way": 3, "k_shot": 2, "n_query": 2, "num_episodes": 5, **settings})


@pytest.fixture
def sampler():
    return make_sampler(n_out_of_scope=2)


@pytest.fixture
def path(tmp_path, sampler):
    save_episodes(tmp_path / "lists" / "episodes.jsonl", sampler)
    return tmp_path / "lists" / "episodes.jsonl"


def test_a_list_comes_back_as_it_was(path, sampler):
    assert load_episodes(path) == list(sampler)
    assert load_episodes(path, sampler) == list(sampler)
    assert load_episodes(path, sampler.pool) == list(sampler)
    assert sorted(file.name for file in path.parent.iterdir()) == ["episodes.jsonl"]


def test_the_first_line_says_what_the_list_is(path, sampler):
    header = json.loads(path.read_text(encoding="utf-8").splitlines()[0])
    assert header["settings"] == sampler.settings
    assert header["pools"] == {"toy/train": sampler.pool.fingerprint}
    assert header["num_episodes"] == 5
    assert header["hash"] == episodes_hash(sampler)


def test_a_mixture_is_saved_with_its_pools(tmp_path):
    other = make_pool(dict.fromkeys("äöü", 9), name="umlauts")
    mixture = EpisodeMixture([make_sampler(), make_sampler(other)], num_episodes=5)
    save_episodes(tmp_path / "mixed.jsonl", mixture)
    specs = load_episodes(tmp_path / "mixed.jsonl", mixture)
    assert specs == list(mixture)
    assert {spec.pool for spec in specs} == {"toy", "umlauts"}


def test_the_hash_follows_settings_data_and_episodes(sampler):
    base = episodes_hash(sampler)
    assert episodes_hash(make_sampler(n_out_of_scope=2)) == base
    assert episodes_hash(list(sampler), sampler.pool, sampler.settings) == base
    assert episodes_hash(make_sampler(n_out_of_scope=2, seed=1)) != base
    assert episodes_hash(make_sampler(n_out_of_scope=2, num_episodes=4)) != base
    assert episodes_hash(list(sampler), sampler.pool, {**sampler.settings, "note": "other"}) != base
    # The same rows of other data: twelve more sentences in a class that sorts last.
    more = make_pool({**dict.fromkeys(CLASSES, 12), "zebra": 1})
    assert episodes_hash(list(sampler), more, sampler.settings) != base


def test_an_older_file_is_replaced_only_by_a_whole_one(path, sampler, monkeypatch):
    before = path.read_text(encoding="utf-8")

    def fail(spec):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(
        "fewshot_nlp.data.episodes.asdict", lambda spec: fail(spec) if spec.index == 3 else asdict(spec)
    )
    monkeypatch.setattr("fewshot_nlp.data.episodes._hash", lambda *_: "0")
    with pytest.raises(RuntimeError, match="disk on fire"):
        save_episodes(path, sampler)
    assert path.read_text(encoding="utf-8") == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["episodes.jsonl"]


def test_saving_errors(tmp_path, sampler):
    path = tmp_path / "episodes.jsonl"
    with pytest.raises(ValueError, match="The sampler is endless"):
        save_episodes(path, make_sampler(num_episodes=None))
    with pytest.raises(ValueError, match="Which data are these episodes of"):
        save_episodes(path, list(sampler))
    with pytest.raises(ValueError, match="no episodes to save"):
        save_episodes(path, [], sampler.pool)
    with pytest.raises(ValueError, match="episodes of toy/train, which is not among the pools"):
        save_episodes(path, list(sampler), make_pool({"a": 3}, name="other"))
    assert not path.exists()


def test_other_data_is_an_error(path, sampler):
    other = make_pool({**dict.fromkeys(CLASSES, 12), "zebra": 1})
    with pytest.raises(ValueError, match=r"was drawn from other data: toy/train has the fingerprint"):
        load_episodes(path, other)
    with pytest.raises(ValueError, match="episodes of toy/train, which is not among the pools"):
        load_episodes(path, make_pool({"a": 3}, name="other"))


def test_rows_of_another_class_are_an_error(tmp_path, sampler):
    spec = sampler[0]
    wrong = replace(spec, classes=spec.classes[::-1])
    save_episodes(tmp_path / "wrong.jsonl", [wrong], sampler.pool)
    with pytest.raises(ValueError, match=f"toy/train/0 has rows that are not of its class '{wrong.classes[0]}'"):
        load_episodes(tmp_path / "wrong.jsonl", sampler.pool)


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines(keepends=True)


def test_tampering_is_an_error(path):
    lines = lines_of(path)
    swapped = [lines[0], lines[2], lines[1], *lines[3:]]
    path.write_text("".join(swapped), encoding="utf-8")
    with pytest.raises(ValueError, match="has been changed: its content hashes to"):
        load_episodes(path)
    path.write_text("".join(lines[:-1]), encoding="utf-8")
    with pytest.raises(ValueError, match="holds 4 of 5 episodes"):
        load_episodes(path)
    header = json.loads(lines[0])
    for change in ({"settings": {}}, {"pools": {"toy/train": "0"}}, {"hash": None}):
        path.write_text("".join([json.dumps({**header, **change}) + "\n", *lines[1:]]), encoding="utf-8")
        with pytest.raises(ValueError, match="has been changed"):
            load_episodes(path)


def test_files_that_are_no_lists_are_errors(tmp_path, path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl' does not exist"):
        load_episodes(tmp_path / "nothing.jsonl")
    header = json.loads(lines_of(path)[0])
    cases = {
        "": "is empty",
        '{"text": "no list"}\n': "line 1: not an episode list",
        "[]\n": "line 1: not an episode list",
        json.dumps({**header, "extra": 1}): "line 1: the first line must hold the keys",
        json.dumps({**header, "pools": []}): "line 1: pools must be an object",
        json.dumps({**header, "settings": 3}): "line 1: settings must be an object",
    }
    for content, message in cases.items():
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            load_episodes(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": "abc"}, "classes must be a list"),
        ({"classes": []}, "classes must be a list"),
        ({"classes": [1, 2, 3]}, "classes must be a list"),
        ({"classes": ["a", "a", "b"]}, "a class is listed twice"),
        ({"support": [[1]]}, "support must hold one list of rows for each of the 3 classes"),
        ({"support": {"0": [1]}}, "support must hold one list"),
        ({"support": [[1], [2], []]}, "a class has no support example"),
        ({"query": [[1], [2], [True]]}, "query must hold lists of row numbers"),
        ({"query": [[1], [2], [-3]]}, "query must hold lists of row numbers"),
        ({"query": [[1], [2], 3]}, "query must hold lists of row numbers"),
        ({"query": [[1], [2], [2.0]]}, "query must hold lists of row numbers"),
        ({"out_of_scope": None}, "out_of_scope must hold lists of row numbers"),
        ({"out_of_scope": [7, 7]}, "a row is used twice"),
        ({"index": -1}, "index=-1 must be an int"),
        ({"index": "0"}, "index='0' must be an int"),
        ({"split": 3}, "split=3 must be text"),
        ({"pool": None}, "pool=None must be text"),
        ({"extra": 1}, "an episode must be an object with the keys"),
    ],
)
def test_a_malformed_episode_is_an_error_with_its_line(path, change, message):
    lines = lines_of(path)
    lines[2] = json.dumps({**json.loads(lines[2]), **change}) + "\n"
    path.write_text("".join(lines), encoding="utf-8")
    with pytest.raises(ValueError, match=f"line 3: {message}"):
        load_episodes(path)


@pytest.mark.parametrize(
    "line", [b"{nonsense\n", b"\xff\xfe\n", b"[" * 200_000 + b"\n", b"null\n", b"9" * 10_000 + b"\n"]
)
def test_a_hostile_line_is_an_error_with_its_number(path, line):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], line, *lines[4:]]))
    with pytest.raises(ValueError, match="line 4: "):
        load_episodes(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(st.sampled_from(["split", "index", "pool", "classes", "support", "query", "out_of_scope"]), JSON)
def test_any_value_gives_an_episode_or_a_value_error(key, value):
    good = json.loads(json.dumps(asdict(make_sampler()[0])))
    try:
        spec = spec_from_dict({**good, key: value})
    except ValueError:
        return
    assert spec_from_dict(json.loads(json.dumps(asdict(spec)))) == spec
