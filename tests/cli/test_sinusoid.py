"""The recipe and the benchmark of the sinusoids run, and leave what they say."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from fewshot_nlp.hub import FewShotAdapter

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a recipe with arguments; everything goes to ``tmp_path / "out"``."""

    def start(name, *argv):
        AcceleratorState._reset_state(reset_partial_state=True)
        spec = importlib.util.spec_from_file_location(Path(name).stem, RECIPES / name)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        monkeypatch.setattr(sys, "argv", [name, *argv, "--output_dir", str(tmp_path / "out")])
        script.main()
        return tmp_path / "out"

    yield start
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_recipe_leaves_a_picture_and_a_network(run, capsys):
    out = run("sinusoid.py", "--max_steps", "2", "--test_episodes", "3")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("MAML") and line.count("±") == 3 for line in lines)
    assert (out / "sinusoid.png").stat().st_size > 10_000
    assert FewShotAdapter.from_pretrained(out).config.task == "regression"


def test_the_recipe_replaces_no_folder_unasked(run):
    argv = ("--max_steps", "1", "--test_episodes", "2")
    before = (run("sinusoid.py", *argv) / "fewshot_params.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"error: .* holds another run .* overwrite_output_dir: true beside"):
        run("sinusoid.py", *argv, "--seed", "1")
    out = run("sinusoid.py", *argv, "--seed", "1", "--overwrite_output_dir", "true")
    assert (out / "fewshot_params.safetensors").read_bytes() != before


def test_the_benchmark_measures_a_method_once(run, capsys):
    argv = ("--methods", "maml", "meta_sgd", "--max_steps", "2", "--test_episodes", "3", "--meta_batch_size", "2")
    argv = (*argv, "--validation_episodes", "1")
    out = run("benchmarks/sinusoid.py", *argv)
    table = capsys.readouterr().out.split("\n| method")[1]
    assert "| Meta-SGD |" in table and "| 0.53 ± 0.09 |" in table
    before = (out / "maml.json").read_bytes()
    assert {*json.loads(before)["test"]} == {"1-step", "10-step"}
    run("benchmarks/sinusoid.py", *argv)
    assert capsys.readouterr().out.split("\n| method")[1] == table
    run("benchmarks/sinusoid.py", "--methods", "maml", *argv[3:], "--seed", "1")
    assert (out / "maml.json").read_bytes() != before
