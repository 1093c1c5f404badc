"""From a command line to a folder that can be loaded, on a tiny BERT and made-up sentences."""

from __future__ import annotations

import itertools
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from fewshot_nlp.cli import push, train
from fewshot_nlp.cli.parser import parse, read_yaml
from fewshot_nlp.cli.train import main
from fewshot_nlp.config import LEARNERS
from fewshot_nlp.data import evaluation_tasks, load_pools_from_config, training_tasks
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.training import resume
from tests.hub.hub_server import HubServer, Repo

ROOT = Path(__file__).parents[2]
#: Those that run ``cli.train``; a recipe of another story has tests of its own.
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.py") if "cli.train import main" in path.read_text())
#: What they leave is in test_images.py.
ON_IMAGES = (ROOT / "recipes" / "image_maml.py",)
SETTINGS = sorted((ROOT / "recipes" / "learners").glob("*.yaml"))


def elsewhere(settings, data_file):
    """Made-up sentences for settings that train on another data set than they test on."""
    return ["--mixture_dataset_names", str(data_file)] if "mixture_dataset_names" in read_yaml(settings) else []


@pytest.mark.parametrize("recipe", [each for each in RECIPES if each not in ON_IMAGES], ids=lambda path: path.stem)
def test_recipe_leaves_everything(recipe, tiny, tmp_path, data_file, language_folders, monkeypatch, capsys):
    settings = read_yaml(recipe.with_suffix(".yaml"))
    tiny = [*tiny, *elsewhere(recipe.with_suffix(".yaml"), data_file)]
    adapted, speaks = settings["adapter"] != "none", settings.get("head") == "verbalizer"
    if speaks:
        tiny += [
            "--model_name_or_path",
            language_folders("gpt2"),
            "--eval_strategy",
            "steps",
            "--save_strategy",
            "best",
        ]
    monkeypatch.setattr(sys, "argv", [str(recipe), *tiny])
    runpy.run_path(str(recipe), run_name="__main__")
    out = tmp_path / "out"
    names = {path.name for path in out.iterdir()}
    assert ({"adapter_config.json", "adapter_model.safetensors"} <= names) == adapted
    assert {
        "tokenizer.json", "tokenizer_config.json", "fewshot_config.json", "fewshot_params.safetensors", "README.md",
        "results.json", "learning_curve.png",
    } <= names  # fmt: skip

    results = json.loads((out / "results.json").read_text())
    assert set(results["test"]) == {"1-shot", "3-shot"}
    for entry in results["test"].values():
        assert 0 <= entry["accuracy"] <= 1
        assert entry["ci95"] >= 0
        assert entry["episodes"] == 4
        # Without an adapter there is nothing to fine-tune.
        methods = {"prototypes", "logistic_regression", *["fine_tuning"] * adapted, *["untrained"] * speaks}
        assert set(entry["baselines"]) == methods
        assert set(entry["paired_gain"]) >= {"mean", "ci95"}
        gain = entry["accuracy"] - entry["baselines"]["prototypes"]["accuracy"]
        assert entry["paired_gain"]["mean"] == pytest.approx(gain)
    assert results["training"]["steps"] == 4
    assert set(results["protocol"]["episodes_hash"]) == {"1-shot", "3-shot"}
    assert not adapted or results["protocol"]["baselines"]["fine_tuning"]["inner_steps"] == 10

    manifest = json.loads((out / "fewshot_config.json").read_text())
    assert manifest["command"].startswith(f"accelerate launch recipes/{recipe.name} --model_name_or_path")
    assert set(manifest["label_names"]).isdisjoint(results["protocol"]["classes"])
    assert "--dataset_name .../sentences.jsonl" in manifest["command"]
    assert str(tmp_path.parent) not in (out / "README.md").read_text()
    assert ModelCard.load(out / "README.md").data.get("datasets") is None
    adapter = FewShotAdapter.from_pretrained(out)
    told = parse(tiny, recipe.with_suffix(".yaml")).config
    # What was left to the backbone is written out.
    assert adapter.config == replace(told, pooling=adapter.learner.model.pooling, head_scale=told.logit_scale)
    assert list(out.glob("checkpoint-*"))

    shown = capsys.readouterr().out
    # A metric learner has one way to its gradient, and nothing to say of it.
    assert (" gradient  " in shown) == (recipe.stem not in ("protonet", "domain_adversarial"))
    for piece in ("trained parameters", "prototypes", "gain over prototypes", "±", f'from_pretrained("{out}")'):
        assert piece in shown


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda path: path.stem)
def test_settings_of_every_learner_train(settings, tiny, tmp_path, data_file):
    """Two steps of each file in recipes/learners, with what its learner needs."""
    given = [*tiny, *elsewhere(settings, data_file), "--max_steps", "2", "--inner_steps", "2"]
    given += ["--head_init", "prototype", "--eval_n_way", "2"]
    told = parse([*given, "--config", str(settings)], ROOT / "recipes" / "train.yaml")
    assert told.config.learner in LEARNERS
    main([*given, "--config", str(settings)], ROOT / "recipes" / "train.yaml")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["training"]["steps"] == 2 and results["training"]["train_skipped_steps"] == 0
    assert FewShotAdapter.from_pretrained(tmp_path / "out").config.learner == told.config.learner


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda path: path.stem)
def test_the_default_data_are_enough_for_every_learner(settings):
    episodes = parse(["--config", str(settings)], ROOT / "recipes" / "train.yaml").episodes
    pools = load_pools_from_config(episodes)
    training_tasks(episodes, [pools["train"]])
    for split, shot in itertools.product(("validation", "test"), episodes.eval_k_shots):
        evaluation_tasks(episodes, pools[split], shot)


def test_every_learner_has_settings():
    assert {read_yaml(path)["learner"] for path in SETTINGS} == set(LEARNERS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_how_to_run_it(recipe):
    header = recipe.read_text().split('"""')[1]
    assert f"accelerate launch recipes/{recipe.name}" in header
    assert "Prints" in header
    assert len(recipe.read_text().splitlines()) < 40
    settings = parse([], recipe.with_suffix(".yaml"))
    assert settings.args.output_dir == f"output/{recipe.stem}"
    # A decoder takes seconds for a task.
    assert settings.args.test_episodes == (60 if recipe.stem == "gpt_prompt_maml" else 600)


def test_saved_parameters_are_those_of_the_best_validation(tiny, tmp_path):
    main([*tiny, "--adapter", "lora", "--save_strategy", "best", "--load_best_model_at_end", "--learning_rate", "0.1"])
    out = tmp_path / "out"
    best = json.loads((out / "results.json").read_text())["training"]["best_step"]
    saved = load_file(out / f"checkpoint-{best}" / "params.safetensors")
    adapter = FewShotAdapter.from_pretrained(out)
    assert saved.keys() == adapter.params.keys()
    assert all(torch.equal(saved[name], adapter.params[name]) for name in saved)
    start = adapter.learner.init_params()
    assert any(not torch.equal(saved[name], start[name]) for name in saved)


def test_resumed_run_ends_with_the_same_files(tiny, tmp_path, monkeypatch):
    saving = ["--save_strategy", "steps", "--save_steps", "2", "--adapter", "lora"]
    main([*tiny, *saving])
    adapter = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "adapter_model.safetensors").unlink()
    found, find = [], resume.find_checkpoint
    monkeypatch.setattr(resume, "find_checkpoint", lambda folder: found.append(find(folder)) or found[-1])
    main([*tiny, *saving, "--resume_from_checkpoint", "true"])
    assert found == [tmp_path / "out" / "checkpoint-2"]
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter


def test_without_test_episodes_nothing_is_claimed(tiny, tmp_path, data_file, capsys):
    classes = sorted({json.loads(line)["label"] for line in data_file.read_text().splitlines()})
    (tmp_path / "split.json").write_text(json.dumps({"train": classes}))
    main([*tiny, "--split_file", str(tmp_path / "split.json"), "--test_episodes", "0", "--eval_strategy", "no"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["test"] == results["protocol"] == {}
    assert "gain over" not in capsys.readouterr().out


def test_folder_of_another_run_or_model_is_refused_before_training(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    main([*tiny, "--save_strategy", "steps"])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match="overwrite_output_dir: true"):
        main(tiny)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert capsys.readouterr().out == ""
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*tiny, "--overwrite_output_dir", "--max_steps", "2", "--save_strategy", "steps"])
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]


def test_recipe_replaces_its_own_folder_and_no_other(tiny, tmp_path, monkeypatch):
    """The newcomer's command works twice in a row, and leaves alone what another command line points it to."""
    monkeypatch.chdir(tmp_path)
    at = tiny.index("--output_dir")
    quick = [*tiny[:at], *tiny[at + 2 :], "--test_episodes", "2", "--max_steps", "1", "--eval_on_start", "false"]
    recipe = ROOT / "recipes" / "protonet.yaml"
    for seed in ("0", "1"):
        main([*quick, "--seed", seed], recipe)
        AcceleratorState._reset_state(reset_partial_state=True)
    results = tmp_path / "output" / "protonet" / "results.json"
    before = results.read_bytes()
    with pytest.raises(SystemExit, match=r"holds another run .* overwrite_output_dir: true beside that output_dir"):
        main([*quick, "--output_dir", str(tmp_path / "output" / "protonet")], recipe)
    assert results.read_bytes() == before


@pytest.mark.parametrize("name", ["README.md", "results.json", "adapter_model.safetensors"])
def test_files_of_others_are_not_replaced(tiny, tmp_path, name):
    path = tmp_path / "out" / name
    path.parent.mkdir()
    path.write_text("mine")
    for recipe in (None, ROOT / "recipes" / "lora_maml.yaml"):
        with pytest.raises(SystemExit, match=f"files that the run would replace .{name}"):
            main(tiny, recipe)
    assert path.read_text() == "mine"
    assert [each.name for each in path.parent.iterdir()] == [name]


def test_console_script_takes_a_recipe(tiny, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("learner: protonet\nhead: prototype\nadapter: none\nmax_steps: 1\nlearning_rate: 1e-2\n")
    at = tiny.index("--max_steps")
    main([str(recipe), *tiny[:at], *tiny[at + 2 :], "--test_episodes", "2"])
    manifest = json.loads((tmp_path / "out" / "fewshot_config.json").read_text())
    assert manifest["config"]["learner"] == "protonet"
    assert json.loads((tmp_path / "out" / "results.json").read_text())["training"]["steps"] == 1
    assert manifest["command"].startswith("fewshot-nlp .../mine.yaml ")


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "present", "refusal"),
    [
        ("hf_writewritewrite", None, None),
        ("hf_writewritewrite", ["fewshot_config.json"], None),
        ("hf_readreadread", None, "403"),
        ("hf_readreadread", ["fewshot_config.json"], "error: The token may not write to 'tester/mine': 403"),
        ("hf_writewritewrite", ["config.json"], "error: 'tester/mine' holds another model (config.json)"),
    ],
)
def test_push_at_the_end_or_refusal_before_the_start(tiny, tmp_path, token, present, refusal):
    """In a process of its own, as huggingface_hub reads where the Hub is when it is imported."""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    name = "mine" if present is None else "tester/mine"
    pushing = ["--push_to_hub", "--hub_model_id", name, "--hub_token", token]
    with HubServer({"hf_writewritewrite": "write", "hf_readreadread": "read"}) as hub:
        if present is not None:
            hub.repos["tester/mine"] = Repo(private=False)
            hub.repos["tester/mine"].commit("main", dict.fromkeys(present, b"{}"), "what was there")
        command = [sys.executable, str(ROOT / "recipes" / "prompt_maml.py"), *tiny, *pushing]
        environment["HF_ENDPOINT"] = hub.url
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        if refusal is not None:
            assert done.returncode == 1
            assert refusal in done.stderr
            assert "Traceback" not in done.stderr
            assert done.stdout == ""
        else:
            assert done.returncode == 0, done.stderr
            assert 'from_pretrained("tester/mine")' in done.stdout
            assert {"README.md", "fewshot_config.json", "results.json"} <= set(hub.files("tester/mine"))
    assert token not in done.stdout + done.stderr
    for path in (tmp_path / "out").rglob("*"):
        assert not path.is_file() or token.encode() not in path.read_bytes(), path


def test_a_push_that_fails_takes_nothing_away(tiny, tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise RuntimeError("The line is dead.")

    monkeypatch.setattr(train, "claim_repository", lambda args: "me/mine")
    monkeypatch.setattr(FewShotAdapter, "push_to_hub", refuse)
    out = tmp_path / "out"
    pushed_by_hand = rf"whole in '{out}'.*from_pretrained\('{out}'\)\.push_to_hub\('me/mine'\)"
    with pytest.raises(SystemExit, match=rf"error: The push to 'me/mine' failed .*The line is dead.*{pushed_by_hand}"):
        main([*tiny, "--push_to_hub"])
    assert "gain over prototypes" in capsys.readouterr().out
    assert FewShotAdapter.from_pretrained(out).info.results is not None


def test_a_hub_that_cannot_be_reached_is_one_line(tiny, monkeypatch):
    class Unreachable:
        def __init__(self, token):
            pass

        def create_repo(self, *args, **kwargs):
            raise RuntimeError("No route to host.")

    monkeypatch.setattr(push, "HfApi", Unreachable)
    with pytest.raises(SystemExit, match=r"error: The Hub cannot be asked for 'out': No route to host\. Check"):
        main([*tiny, "--push_to_hub"])


@pytest.mark.processes
@pytest.mark.slow
def test_on_two_ranks_one_writes_and_prints(tiny, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, str(ROOT / "recipes" / "lora_maml.py"), *tiny, "--disable_tqdm"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "cpu, 2 processes" in done.stdout
    assert done.stdout.count("gain over prototypes") == done.stdout.count("step 4/4: loss") == 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    main([*tiny, "--config", str(ROOT / "recipes" / "lora_maml.yaml"), "--output_dir", str(tmp_path / "alone")])
    alone = json.loads((tmp_path / "alone" / "results.json").read_text())
    for shots, entry in alone["test"].items():
        assert results["test"][shots]["accuracy"] == pytest.approx(entry["accuracy"])
        assert results["test"][shots]["baselines"]["prototypes"]["loss"] == pytest.approx(
            entry["baselines"]["prototypes"]["loss"], rel=1e-5
        )


@pytest.mark.processes
@pytest.mark.slow
def test_two_ranks_draw_from_the_same_clusters(tiny, tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finer = [*tiny, "--clusters_per_class", "2", "--disable_tqdm"]
    command = [sys.executable, *torchrun, str(ROOT / "recipes" / "protonet.py"), *finer]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("clusters of the training classes") == 1
    main([*finer, "--config", str(ROOT / "recipes" / "protonet.yaml"), "--output_dir", str(tmp_path / "alone")])
    ours, alone = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "alone"))
    for name, value in alone.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-3, atol=1e-6)
