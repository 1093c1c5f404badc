"""``fewshot-nlp plan`` on a tiny BERT."""

import json
import re
import signal

import pytest

from fewshot_nlp.cli.parser import parse
from fewshot_nlp.cli.plan import predict
from fewshot_nlp.cli.train import main
from fewshot_nlp.training.interrupts import Interrupted


@pytest.mark.slow
def test_plan_prints_what_a_run_would_take(tiny, tmp_path, capsys):
    main(["plan", *tiny, "--learner", "maml", "--adapter", "lora", "--inner_steps", "4", "--memory_gb", "50"])
    shown = capsys.readouterr().out
    assert "2 episodes a step, up to 2-way 1-shot with 2 queries a class, texts of " in shown
    assert (
        len(re.findall(r"^[* ] exact, \d inner steps in memory: \d+\.\d\d GB, \d+\.\d\d s a step$", shown, re.M)) == 3
    )
    assert re.search(r"^Within 50 GB: exact, 4 inner steps", shown, re.M)
    assert not (tmp_path / "out").exists(), "planning leaves nothing"


def test_a_budget_that_nothing_fits_is_one_line(tiny, monkeypatch):
    monkeypatch.setattr("fewshot_nlp.cli.plan.plan", lambda *_, **__: _least())
    with pytest.raises(SystemExit, match=r"error: Nothing fits memory_gb=0\.001"):
        main(["plan", *tiny, "--memory_gb", "0.001"])
    with pytest.raises(SystemExit, match=r"error: .*inner_stepz"):
        main(["plan", *tiny, "--inner_stepz", "3"])


def test_a_plan_that_is_told_to_leave_says_so(tiny, monkeypatch, capsys):
    monkeypatch.setattr("fewshot_nlp.cli.plan.plan", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        main(["plan", *tiny])
    assert "SIGTERM: left without a plan." in capsys.readouterr().err


def _least():
    from fewshot_nlp.learners.planner import Option, Plan

    only = Option("exact", None, 1.0, 1.0)
    return Plan(only, (only,))


def test_the_largest_episode_and_the_texts_of_the_data(tiny, monkeypatch):
    seen = {}
    monkeypatch.setattr("fewshot_nlp.cli.plan.plan", lambda config, **shape: seen.update(shape) or _least())
    argv = [*tiny, "--max_k_shot", "3", "--max_n_way", "4", "--gradient_accumulation_steps", "3"]
    predict(parse([*argv, "--use_label_names", "true"]))
    assert {**seen, "tokens": None} == {
        "n_way": 4,
        "k_shot": 3,
        "n_query": 2,
        "tokens": None,
        "meta_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "device": "cpu",
    }
    # Five words and a number, between two special tokens.
    assert set(seen["tokens"]) == {8}


@pytest.mark.parametrize("learner", ["maml", "protonet"])
def test_a_run_that_reads_class_names_says_so(tiny, tmp_path, learner):
    main([*tiny, "--learner", learner, "--use_label_names", "true", "--eval_k_shots", "1", "--eval_strategy", "no",
          "--save_strategy", "no", "--load_best_model_at_end", "false"])  # fmt: skip
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"]["uses_label_names"] is True
    assert "names of the classes" in (tmp_path / "out" / "README.md").read_text()
