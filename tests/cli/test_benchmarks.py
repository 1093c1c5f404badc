"""The benchmark script measures once, and never passes off results of other settings."""

from __future__ import annotations

import importlib.util
import json
import random
import shlex
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from fewshot_nlp.cli.parser import parse
from tests.tiny import WORDS

FOLDER = Path(__file__).parents[2] / "recipes" / "benchmarks"


def load(name, monkeypatch):
    """A script, as a module; what it imports lies beside it."""
    monkeypatch.syspath_prepend(FOLDER)
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def benchmark(tmp_path, bert_folder, monkeypatch):
    """Runs the script on twelve classes of made-up sentences, with the settings given; tells how often it trained."""
    rng = random.Random(0)
    classes = [f"class {i}" for i in range(12)]
    lines = [{"text": f"{' '.join(rng.choices(WORDS, k=3))} {i} {c}", "label": c} for c in classes for i in range(6)]
    data = tmp_path / "data"
    data.mkdir()
    (data / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    splits = {"train": classes[:4], "validation": classes[4:8], "test": classes[8:]}
    (data / "split_1.json").write_text(json.dumps(splits))
    script = load("banking77", monkeypatch)
    monkeypatch.setattr(script, "COMMON", "--eval_n_way 2 --n_way 2 --n_query 2 --eval_n_query 1 --use_cpu")
    trained = []
    runs = importlib.import_module("runs")
    monkeypatch.setattr(runs, "execute", lambda run, execute=runs.execute: trained.append(run) or execute(run))

    def start(settings="", *argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        tiny = f"--model_name_or_path {bert_folder} --max_steps 1 --meta_batch_size 1 --max_k_shot none"
        tiny += " --test_episodes 2 --baseline_episodes 0"
        tiny += " --eval_strategy no --save_strategy no --load_best_model_at_end false"
        monkeypatch.setattr(script, "METHODS", {"protonet": ("protonet", f"{tiny} {settings}")})
        folder = ["--data_dir", str(data), "--output_dir", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", [script.__file__, *folder, *argv])
        script.main()
        return len(trained)

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


def test_results_of_the_same_settings_are_read(benchmark, capsys):
    assert benchmark() == 1
    table = capsys.readouterr().out.split("\n| method")[1]
    assert benchmark() == 1
    assert capsys.readouterr().out.split("\n| method")[1] == table


def test_results_of_other_settings_are_refused_and_kept(benchmark, tmp_path):
    benchmark()
    results = tmp_path / "out" / "protonet_1" / "results.json"
    before = results.read_bytes()
    for other in (("--learning_rate 0.5",), ("", "--learning_rate", "0.5")):
        with pytest.raises(SystemExit, match=r"other settings than learning_rate=0\.5.*--overwrite_output_dir true"):
            benchmark(*other)
    (results.parent / "arguments.json").unlink()
    with pytest.raises(SystemExit, match="other settings than"):
        benchmark()
    assert results.read_bytes() == before
    for argv in (["--overwrite_output_dir", "true"], []):
        assert benchmark("--learning_rate 0.5", *argv) == 2


def test_a_setting_that_was_added_since_had_its_default(benchmark, tmp_path):
    benchmark()
    beside = tmp_path / "out" / "protonet_1" / "arguments.json"
    known = json.loads(beside.read_text())
    del known["weight_decay"]
    beside.write_text(json.dumps(known))
    assert benchmark() == 1
    with pytest.raises(SystemExit, match=r"other settings than weight_decay=0\.5\. "):
        benchmark("--weight_decay 0.5")


def test_a_run_that_was_stopped_is_measured_anew(benchmark, tmp_path):
    folder = tmp_path / "out" / "protonet_1"
    benchmark()
    (folder / "results.json").unlink()
    assert benchmark() == 2
    assert (folder / "results.json").is_file()


@pytest.mark.parametrize("name", ["banking77", "huffpost"])
def test_every_method_says_whether_it_is_told_names(name, monkeypatch, tmp_path):
    script = load(name, monkeypatch)
    for method, (recipe, settings) in script.METHODS.items():
        argv = [*shlex.split(script.COMMON), *shlex.split(settings), "--output_dir", str(tmp_path / method)]
        config = parse(argv, FOLDER.parent / f"{recipe}.yaml").config
        assert config.tells_names == ("names" in method)


def test_what_was_trained_answers_otherwise(monkeypatch, tmp_path, bert_folder, data_file, capsys):
    """HuffPost's methods of one training: without names, and with."""
    script = load("huffpost", monkeypatch)
    classes = sorted({json.loads(line)["label"] for line in data_file.read_text().splitlines()})
    (tmp_path / "split_1.json").write_text(
        json.dumps({"train": classes[:6], "validation": classes[6:9], "test": classes[9:]})
    )
    (tmp_path / "data.jsonl").write_bytes(data_file.read_bytes())
    argv = [
        "huffpost.py", "--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--methods",
        "full_clusters_trainval", "full_clusters_euclidean_trainval", "full_clusters_names_trainval",
        "--model_name_or_path", bert_folder, "--n_way", "2",
        "--eval_n_way", "2", "--n_query", "2", "--eval_n_query", "2", "--max_steps", "2", "--test_episodes", "3",
        "--clusters_per_class", "2", "--eval_k_shots", "1", "2", "--use_cpu", "--duplicates", "keep",
        "--max_length", "16", "--min_examples", "1",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", argv)
    loaded, load_adapter = [], script.FewShotAdapter.from_pretrained
    monkeypatch.setattr(
        script.FewShotAdapter,
        "from_pretrained",
        lambda *given, **told: loaded.append(load_adapter(*given, **told)) or loaded[-1],
    )
    answering, tested = [], script.tested
    monkeypatch.setattr(script, "tested", lambda *given: answering.append(given[2]) or tested(*given))
    script.main()
    assert answering == loaded
    assert [each.config.tells_names for each in loaded] == [False, True]
    assert all(each.config.normalize_features and each.config.distance == "euclidean" for each in loaded)
    first = capsys.readouterr().out.rsplit("\n| method", 1)[1]
    found = json.loads((tmp_path / "out" / "full_clusters_names_trainval" / "results.json").read_text())["test"]
    assert found.keys() == {"1-shot", "2-shot"}
    assert all(entry["baselines"].keys() == {"prototypes", "logistic_regression"} for entry in found.values())
    monkeypatch.setattr(script, "prepare", None)
    script.main()
    assert capsys.readouterr().out.rsplit("\n| method", 1)[1] == first


@pytest.mark.parametrize("name", ["endurance", "kills", "wire"])
def test_what_a_script_did_not_make_is_not_deleted(name, monkeypatch, tmp_path):
    script, folder = load(name, monkeypatch), tmp_path / "out"

    class Begun(Exception):
        """The script has emptied its folder."""

    def begun(*args):
        raise Begun

    monkeypatch.setattr(script, "small_backbone", begun)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output_dir", str(folder)])
    for _ in range(2):
        with pytest.raises(Begun):
            script.main()
        (folder / "left").mkdir()
    (folder / f".{name}").unlink()
    with pytest.raises(SystemExit, match=rf"error: --output_dir {folder} holds what {name}\.py did not make"):
        script.main()
    assert (folder / "left").is_dir()
