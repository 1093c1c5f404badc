"""The recipe of a stream, on a tiny BERT and made-up sentences."""

from __future__ import annotations

import importlib.util
import json
import runpy
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from fewshot_nlp.cli import lifelong
from fewshot_nlp.cli.lifelong import main, parse_stream, prepare
from fewshot_nlp.hub import FewShotAdapter, files
from fewshot_nlp.training.interrupts import Interrupted
from tests.tiny import WORDS, tiny_vit

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiny(tmp_path, bert_folder):
    path = tmp_path / "data.jsonl"
    path.write_text(
        "\n".join(
            json.dumps({"text": f"{a} {b} {i}", "label": a}) for a in WORDS[:8] for i, b in enumerate(WORDS)
        )
    )  # fmt: skip
    settings = {
        "model_name_or_path": bert_folder, "dataset_name": path, "n_way": 2, "num_stages": 2, "min_examples": 1,
        "eval_n_query": 1, "n_query": 1, "max_k_shot": 2, "meta_batch_size": 2, "max_steps": 2, "test_episodes": 3,
        "ewc_episodes": 2, "logging_steps": 1, "output_dir": tmp_path / "out",
    }  # fmt: skip
    return [item for name, value in settings.items() for item in (f"--{name}", str(value))] + ["--use_cpu"]


@pytest.mark.parametrize("variant", ["naive", "replay", "ewc"])
def test_the_recipe_leaves_an_adapter_a_matrix_and_its_figures(variant, tiny, tmp_path, monkeypatch, capsys):
    recipe = ROOT / "recipes" / "lifelong.py"
    monkeypatch.setattr(sys, "argv", [str(recipe), *tiny, "--variant", variant, "--eval_k_shots", "1", "2"])
    runpy.run_path(str(recipe), run_name="__main__")
    out = tmp_path / "out"
    results = json.loads((out / "results.json").read_text())
    single = json.loads((out / "episode_accuracies.json").read_text())
    for shots in ("1-shot", "2-shot"):
        found = results["lifelong"][shots]
        assert np.asarray(found["matrix"]).shape == (2, 2) and np.asarray(single[shots]).shape == (3, 2, 3)
        np.testing.assert_allclose(np.asarray(single[shots]).mean(2), [found["start"], *found["matrix"]], atol=1e-4)
        assert (out / f"accuracy_matrix_{shots}.png").stat().st_size > 0
    assert results["variant"] == variant
    assert FewShotAdapter.from_pretrained(out).info.label_names == sorted(WORDS[:8])
    assert "forgetting" in capsys.readouterr().out


def test_the_recipe_says_how_to_run_it():
    recipe = ROOT / "recipes" / "lifelong.py"
    header = recipe.read_text().split('"""')[1]
    assert "accelerate launch recipes/lifelong.py" in header and "Prints" in header
    settings = parse_stream([], recipe.with_suffix(".yaml"))
    assert settings.args.output_dir == "output/lifelong" and settings.lifelong.variant == "replay"


@pytest.fixture
def benchmark(tmp_path, tiny, monkeypatch):
    """Runs the script on two stages of the made-up sentences; tells how often it trained."""
    path = ROOT / "recipes" / "benchmarks" / "lifelong.py"
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location("lifelong_benchmark", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    kept = [item for pair in zip(tiny[::2], tiny[1::2], strict=False) for item in pair if pair[0] != "--output_dir"]
    monkeypatch.setattr(script, "COMMON", shlex.join([*kept, "--use_cpu"]))
    monkeypatch.setattr(script, "DOMAINS", {"first": " ".join(WORDS[:4]), "second": " ".join(WORDS[4:8])})
    trained = []
    monkeypatch.setattr(script, "execute", lambda run, execute=script.execute: trained.append(run) or execute(run))

    def start(*argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        folders = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "bench")]
        monkeypatch.setattr(sys, "argv", [str(path), *folders, *argv])
        script.main()
        return len(trained)

    return start


def test_the_benchmark_measures_once_and_never_mixes_settings(benchmark, capsys):
    assert benchmark("--variants", "naive", "replay") == 2
    table = capsys.readouterr().out.split("\nUntrained")[1]
    assert "Half of what naive forgets, minus what replay forgets" in table
    assert benchmark("--variants", "naive", "replay") == 2
    assert capsys.readouterr().out.split("\nUntrained")[1] == table
    with pytest.raises(SystemExit, match=r"other settings than learning_rate=0\.5.*--overwrite_output_dir true"):
        benchmark("--variants", "naive", "--learning_rate", "0.5")


def test_a_stream_needs_no_classes_for_three_splits(tiny, tmp_path):
    for name, words in (("data", WORDS[:2]), ("more", WORDS[2:4])):
        rows = [json.dumps({"text": f"{a} {b}", "label": a}) for a in words for b in WORDS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    told = [*tiny, "--num_stages", "1", "--stream_dataset_names", str(tmp_path / "more.jsonl"), "--eval_k_shots", "1"]
    run = prepare(parse_stream(told, ROOT / "recipes" / "lifelong.yaml"))
    assert [stage.label_names for stage in run.stages] == [sorted(WORDS[:2]), sorted(WORDS[2:4])]


def test_the_domains_are_ten_of_fifteen_different_intents(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "recipes" / "benchmarks")
    spec = importlib.util.spec_from_file_location("lifelong_benchmark", ROOT / "recipes" / "benchmarks" / "lifelong.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.stages("domains", Path())
    assert [len(names) for names in found.values()] == [15] * 10
    assert len({name for names in found.values() for name in names}) == 150


def test_bad_input_has_one_line_to_say(tiny):
    with pytest.raises(SystemExit, match=r"error: Unknown argument '--replay_sise'\. Did you mean 'replay_size'"):
        main([*tiny, "--replay_sise", "3"])
    with pytest.raises(SystemExit, match="error: num_stages=9 does not fit the 8 classes"):
        main([*tiny, "--num_stages", "9", "--eval_strategy", "no", "--save_strategy", "no"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--test_episodes", "0"], "test_episodes=0"),
        (["--eval_k_shots", "0"], r"eval_k_shots=\[0\] has tasks without examples.*Set use_label_names"),
        (["--learner", "domain_adversarial"], "learner='domain_adversarial' reads .* Use another learner"),
        (["--task", "regression", "--head", "linear"], "task='regression' is not for this command"),
        (
            ["--learner", "joint", "--head", "linear", "--learner_kwargs", '{"target": "data"}'],
            "target='data' is none of .*-1, .*-2",
        ),
    ],
)
def test_what_no_stream_can_do_is_said_before_it_is_learned(given, message, tiny):
    with pytest.raises(ValueError, match=message):
        prepare(parse_stream(["--eval_k_shots", "1", *tiny, *given], ROOT / "recipes" / "lifelong.yaml"))


def test_a_stream_of_images(tiny, tmp_path):
    """Those that are held out are in no training split, in whatever files they are."""
    for label in range(4):
        (tmp_path / "pictures" / str(label)).mkdir(parents=True)
        for i in range(6):
            picture = Image.new("L", (16, 16), 60 * label)
            picture.putpixel((i, i), 255)
            picture.save(tmp_path / "pictures" / str(label) / f"{i}.png")
            picture.save(tmp_path / "pictures" / str(label) / f"{i}.bmp")
    images = ["--dataset_name", str(tmp_path / "pictures"), "--model_name_or_path", tiny_vit(tmp_path / "vit")]
    images += ["--eval_k_shots", "1", "--max_steps", "1"]
    stages = prepare(parse_stream([*tiny, *images], ROOT / "recipes" / "lifelong.yaml")).stages
    keys = [{k for s in stages for rows in s.pools[split].rows_by_class.values() for k in s.pools[split].keys(rows)}
            for split in ("train", "validation", "test")]  # fmt: skip
    assert sum(map(len, keys)) == len(set().union(*keys)) == 24 and all(keys)
    main([*tiny, *images], ROOT / "recipes" / "lifelong.yaml")
    assert FewShotAdapter.from_pretrained(tmp_path / "out").info.kind == "image"
    with pytest.raises(SystemExit, match="holds images, and the encoder takes texts"):
        main([*tiny, *images[:2], "--output_dir", str(tmp_path / "other")], ROOT / "recipes" / "lifelong.yaml")


@pytest.mark.parametrize("part", ["hold_out", "learn_stream"])
def test_a_stream_that_is_told_to_leave_says_so(part, tiny, monkeypatch, capsys):
    monkeypatch.setattr(f"fewshot_nlp.cli.lifelong.{part}", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        main(tiny, ROOT / "recipes" / "lifelong.yaml")
    assert "SIGTERM: left " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"), [("clusters_per_class", "2"), ("whiten_features", "0.1"), ("center_features", "True")]
)
def test_a_stream_has_no_clusters_no_centre_and_no_covariance(name, value, tiny):
    with pytest.raises(SystemExit, match=f"{name}={value} is not for a stream"):
        main([*tiny, f"--{name}", value])


def test_a_stream_does_not_leave_a_mixture_out_unasked(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"mixture_dataset_names is not for a stream.*stream_dataset_names"):
        prepare(parse_stream([*tiny, "--mixture_dataset_names", str(tmp_path / "data.jsonl")]))


@pytest.mark.parametrize("given", [["--names_in_training_alone"], ["--label_texts", "description"]])
def test_a_stream_is_told_of_its_classes_as_its_learner_is_to_be(given, tiny, tmp_path, monkeypatch):
    path, told = tmp_path / "data.jsonl", []
    rows = map(json.loads, path.read_text().splitlines())
    path.write_text("\n".join(json.dumps({**row, "label_description": f"set {row['label']}"}) for row in rows))
    learn = lifelong.learn_stream

    def looking(learner, args, settings, training, reader, held_out, *more):
        stage = next(iter(training))
        for spec in (training[stage][0], held_out["1-shot"][stage][0]):
            names = reader(spec).support.names
            said = names and learner.model.tokenizer.batch_decode(names["input_ids"], skip_special_tokens=True)
            told.append((said, list(spec.classes)))
        return learn(learner, args, settings, training, reader, held_out, *more)

    monkeypatch.setattr(lifelong, "learn_stream", looking)
    options = ["--learner", "protonet", "--eval_k_shots", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    lifelong.execute(prepare(parse_stream([*tiny, *options, "--use_label_names", *given])))
    (in_training, classes), (held_out, others) = told
    if "--label_texts" in given:
        assert (in_training, held_out) == ([f"set {name}" for name in classes], [f"set {name}" for name in others])
    else:
        assert (in_training, held_out) == (classes, None)


def test_a_matrix_that_cannot_be_drawn_takes_nothing_with_it(tiny, tmp_path, monkeypatch, capsys):
    def half(path, *args):
        path.write_bytes(b"half")
        raise OSError(27, "File too large")

    monkeypatch.setattr(lifelong, "draw_matrix", half)
    with pytest.warns(UserWarning, match=r"accuracy_matrix_1-shot\.png cannot be drawn: .*File too large"):
        main([*tiny, "--eval_k_shots", "1"], ROOT / "recipes" / "lifelong.yaml")
    assert "forgetting" in capsys.readouterr().out and not list((tmp_path / "out").glob("*.png"))


def test_a_disk_that_is_full_at_the_end_is_one_line(tiny, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.shutil, "copymode", full)
    with pytest.raises(SystemExit, match=r"^error: The adapter cannot be saved to .*No space left on device"):
        main(tiny, ROOT / "recipes" / "lifelong.yaml")
