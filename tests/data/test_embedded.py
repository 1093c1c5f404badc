import importlib.metadata
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from datasets import ClassLabel, DatasetDict, Value, load_from_disk

from fewshot_nlp.data import EpisodeSampler, embedded, home_intents, load_pools
from fewshot_nlp.data.embedded import SUBJECTS, describe_intent, split_intents
from fewshot_nlp.data.sentences import WORD_LISTS

PACKAGES = all(importlib.util.find_spec(name) for name in ("hassil", "home_assistant_intents"))
offline = [pytest.mark.offline, pytest.mark.skipif(not PACKAGES, reason="needs the offline extra")]
SCRIPT = Path(__file__).parents[2] / "data_scripts" / "home_intents.py"


@pytest.fixture(scope="module")
def english():
    return home_intents()


def by_class(dataset):
    rows = dataset[:]
    found = {}
    for text, label in zip(rows["text"], rows["label"], strict=True):
        found.setdefault(dataset.features["label"].int2str(label), []).append(text)
    return found


def subject(intent):
    return next((name for name in SUBJECTS if name in intent), "other")


class TestEnglish:
    pytestmark = offline

    def test_it_is_a_proper_dataset_dict(self, english):
        assert isinstance(english, DatasetDict)
        assert list(english) == ["train", "validation", "test"]
        labels = english["train"].features["label"]
        assert isinstance(labels, ClassLabel)
        for dataset in english.values():
            assert dataset.features["label"] == labels
            for column in ("text", "label_name", "label_description"):
                assert dataset.features[column] == Value("string")
        assert sorted(name for dataset in english.values() for name in by_class(dataset)) == sorted(labels.names)

    def test_splits_are_of_unlike_subjects(self, english):
        sizes = [len(by_class(dataset)) for dataset in english.values()]
        assert sizes[0] >= 14
        assert sizes[1] >= 6
        assert sizes[2] >= 12
        subjects = [{subject(intent) for intent in by_class(dataset)} for dataset in english.values()]
        assert not subjects[0] & subjects[1]
        assert not subjects[0] & subjects[2]
        assert not subjects[1] & subjects[2]

    def test_classes_have_20_to_200_distinct_sentences_of_their_own(self, english):
        owners = Counter()
        for dataset in english.values():
            for intent, texts in by_class(dataset).items():
                assert 20 <= len(texts) <= 200, intent
                owners.update(text.casefold() for text in texts)
        assert set(owners.values()) == {1}

    def test_no_intent_is_left_out_but_small_ones(self, english):
        from hassil.intents import Intents
        from hassil.sample import sample_intents
        from home_assistant_intents import get_intents

        grammar = Intents.from_dict(get_intents("en"))
        left_out = set(grammar.intents) - set(english["train"].features["label"].names)
        listed = sample_intents(grammar, intent_names=left_out, exclude_sentences_with_wildcards=False)
        sizes = Counter(intent for intent, _ in {(intent, text.strip().casefold()) for intent, text in listed})
        assert left_out
        assert all(sizes[intent] < 20 for intent in left_out), sizes

    def test_sentences_have_no_trace_of_their_templates(self, english):
        for dataset in english.values():
            for text in dataset["text"]:
                assert not set("{}<>[]()|;_") & set(text), text
                assert text == " ".join(text.split()), text
                assert 1 <= len(text.split()) <= 25, text

    def test_slots_are_filled_with_many_words(self, english):
        texts = " / ".join(text for dataset in english.values() for text in dataset["text"])
        assert sum(room in texts for room in ("kitchen", "bedroom", "office", "den", "study")) == 5
        assert sum(name in texts for name in ("pizza", "laundry", "roomba", "london")) == 4

    def test_every_label_is_named_and_described(self, english):
        described = json.loads((WORD_LISTS / "intents.json").read_text(encoding="utf-8"))
        names = english["train"].features["label"].names
        for dataset in english.values():
            for row in dataset:
                intent = names[row["label"]]
                expected = tuple(described.get(intent) or describe_intent(intent))
                assert (row["label_name"], row["label_description"]) == expected
        assert len({name for name, _ in described.values()}) == len(described)
        assert all(text[0].isupper() and text.endswith(".") for _, text in described.values())

    def test_it_gives_pools_and_episodes(self, english):
        pools = load_pools("home_intents")
        assert {split: len(pool) for split, pool in pools.items()} == english.num_rows
        assert pools["test"].name == "home_intents"
        assert pools["train"].readable_names["HassPauseTimer"] == "pause a timer"
        assert pools["train"].descriptions["HassPauseTimer"].startswith("Pauses a running timer")
        assert [pool.num_dropped for pool in pools.values()] == [0, 0, 0]
        for pool in pools.values():
            assert EpisodeSampler(pool, n_way=5, k_shot=5, n_query=5)[0].n_way == 5

    @pytest.mark.processes
    def test_another_process_builds_the_same(self, english, tmp_path):
        code = (
            "from fewshot_nlp.data import load_pools\n"
            "print(*(pool.fingerprint for pool in load_pools('home_intents').values()))"
        )
        environment = {**os.environ, "PYTHONHASHSEED": "7", "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        environment.pop("HF_DATASETS_CACHE", None)
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [pool.fingerprint for pool in load_pools("home_intents").values()]
        assert list(tmp_path.glob("datasets/fewshot_nlp/home_intents-en-*/test.arrow"))


class TestOtherLanguages:
    pytestmark = offline

    @pytest.mark.parametrize("language", ["de", "fr"])
    def test_a_language_is_built_on_request(self, language):
        splits = home_intents(language)
        assert all(len(by_class(dataset)) >= 5 for dataset in splits.values())
        texts = [text for dataset in splits.values() for text in dataset["text"]]
        assert any("minute" in text.casefold() for text in texts)
        assert not any(set("{}<>[]()|") & set(text) for text in texts)
        assert load_pools("home_intents", dataset_config_name=language).keys() == splits.keys()

    @pytest.mark.parametrize("language", ["xx", "", "../data/en", "EN"])
    def test_an_unknown_language_is_an_error(self, language):
        with pytest.raises(
            ValueError, match=f"language='{language}' is not in home_assistant_intents.*Use one of: .*de"
        ):
            home_intents(language)

    def test_a_language_with_few_intents_is_an_error(self, monkeypatch, tmp_path):
        monkeypatch.setattr("home_assistant_intents.get_intents", lambda language: small_grammar(5))
        with pytest.raises(ValueError, match=r"language='en' has 5 intents with at least 20 sentences.*need 6"):
            home_intents("en", tmp_path)
        assert list(tmp_path.glob("**/*")) == []

    def test_intents_newer_than_the_word_lists_are_named_after_their_id(self, monkeypatch, tmp_path):
        monkeypatch.setattr("home_assistant_intents.get_intents", lambda language: small_grammar(7))
        splits = home_intents("en", tmp_path)
        assert sum(len(by_class(dataset)) for dataset in splits.values()) == 7
        assert min(len(by_class(dataset)) for dataset in splits.values()) >= 2
        row = splits["train"][0]
        assert row["label_name"].startswith("brew coffee")
        assert row["label_description"] == f"Asks the assistant for: {row['label_name']}."


def small_grammar(intents):
    """``intents`` intents that nobody has heard of, of 25 sentences each, and one of 19."""

    def block(i, size):
        return {"data": [{"sentences": [f"brew {i} coffee {n}" for n in range(size)]}]}

    names = {f"HassBrewCoffee{'ABCDEFGH'[i]}": block(i, 25) for i in range(intents)}
    return {"language": "en", "lists": {}, "intents": {**names, "HassSmall": block("no", 19)}}


def test_intents_of_one_subject_stay_together():
    intents = ["HassMediaNext", "HassMediaPause", "HassListAddItem", "HassGetWeather", "HassTurnOn", "HassBrewCoffee"]
    assert split_intents(intents) == {
        "train": ["HassBrewCoffee", "HassTurnOn"],
        "validation": ["HassGetWeather", "HassListAddItem"],
        "test": ["HassMediaNext", "HassMediaPause"],
    }


def test_intents_of_too_few_subjects_are_dealt_at_random():
    splits = split_intents([f"HassMediaNext{i}" for i in range(6)])
    assert [len(intents) for intents in splits.values()] == [2, 2, 2]


class TestCache:
    pytestmark = offline

    @pytest.fixture
    def quick(self, monkeypatch):
        """A build of no time, counted."""
        built = []
        build = embedded.build_home_intents
        monkeypatch.setattr("home_assistant_intents.get_intents", lambda language: small_grammar(7))
        monkeypatch.setattr(embedded, "build_home_intents", lambda language: built.append(language) or build(language))
        return built

    def test_a_set_is_built_once(self, quick, tmp_path):
        first = home_intents("en", tmp_path)
        second = home_intents("en", tmp_path)
        assert quick == ["en"]
        assert {split: dataset.to_dict() for split, dataset in first.items()} == {
            split: dataset.to_dict() for split, dataset in second.items()
        }
        (folder,) = (tmp_path / "fewshot_nlp").iterdir()
        assert sorted(file.name for file in folder.iterdir()) == ["test.arrow", "train.arrow", "validation.arrow"]

    def test_another_release_or_language_is_another_set(self, quick, tmp_path, monkeypatch):
        home_intents("en", tmp_path)
        home_intents("de", tmp_path)
        monkeypatch.setattr(importlib.metadata, "version", lambda package: "2099.1.1")
        home_intents("en", tmp_path)
        assert quick == ["en", "de", "en"]
        names = sorted(folder.name for folder in (tmp_path / "fewshot_nlp").iterdir())
        assert [name.split("-")[1] for name in names] == ["de", "en", "en"]
        assert sum("2099.1.1" in name for name in names) == 1

    def test_a_build_that_breaks_off_leaves_nothing(self, quick, tmp_path, monkeypatch):
        def fail(*_):
            raise RuntimeError("out of space")

        with monkeypatch.context() as patch:
            patch.setattr("pyarrow.ipc.new_stream", fail)
            with pytest.raises(RuntimeError, match="out of space"):
                home_intents("en", tmp_path)
        assert list((tmp_path / "fewshot_nlp").iterdir()) == []
        assert home_intents("en", tmp_path).num_rows

    def test_two_processes_may_build_at_once(self, quick, tmp_path):
        splits = home_intents("en", tmp_path)
        (folder,) = (tmp_path / "fewshot_nlp").iterdir()
        embedded.write_splits(splits, folder)  # The other was first.
        assert [found.name for found in (tmp_path / "fewshot_nlp").iterdir()] == [folder.name]

    def test_a_cache_that_cannot_be_written_is_an_error(self, quick, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(OSError, match=r"Cannot write to .*file.*Set HF_HOME or cache_dir"):
            home_intents("en", tmp_path / "file")


@pytest.mark.parametrize("missing", ["home-assistant-intents", "hassil"])
def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch, missing):
    def version(package):
        if package == missing:
            raise importlib.metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=rf'needs the package {missing}\. Run: pip install "fewshot_nlp\[offline\]"'):
        home_intents()


class TestScript:
    pytestmark = offline

    def test_it_prints_classes_and_writes_a_folder(self, english, tmp_path, capsys):
        runpy.run_path(str(SCRIPT))["main"](["--output_dir", str(tmp_path / "out")])
        out = capsys.readouterr().out.splitlines()
        headings = [line for line in out if not line.startswith(" ")]
        counts = {split: len(by_class(dataset)) for split, dataset in english.items()}
        assert headings[:3] == [f"{s}: {n} classes, {english.num_rows[s]} sentences" for s, n in counts.items()]
        assert headings[3] == f"{sum(counts.values())} classes, {sum(english.num_rows.values())} sentences"
        assert sum(line.startswith(" ") for line in out) == sum(counts.values())
        assert any("HassPauseTimer" in line and 'pause a timer: "' in line for line in out)
        written = load_from_disk(tmp_path / "out")
        assert {split: dataset.to_dict() for split, dataset in written.items()} == {
            split: dataset.to_dict() for split, dataset in english.items()
        }
        assert load_pools(tmp_path / "out")["test"].fingerprint == load_pools("home_intents")["test"].fingerprint

    def test_an_unknown_option_ends_it(self, capsys):
        with pytest.raises(SystemExit):
            runpy.run_path(str(SCRIPT))["main"](["--lang", "de"])
        assert "unrecognized arguments: --lang" in capsys.readouterr().err
