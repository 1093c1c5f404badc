"""The recipe of a stream, on a tiny BERT and made-up sentences."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from fewshot_nlp.cli.lifelong import main, parse_stream
from fewshot_nlp.hub import FewShotAdapter
from tests.tiny import WORDS

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


def test_bad_input_has_one_line_to_say(tiny):
    with pytest.raises(SystemExit, match=r"error: Unknown argument '--replay_sise'\. Did you mean 'replay_size'"):
        main([*tiny, "--replay_sise", "3"])
    with pytest.raises(SystemExit, match="error: num_stages=9 does not fit the 8 classes"):
        main([*tiny, "--num_stages", "9", "--eval_strategy", "no", "--save_strategy", "no"])
