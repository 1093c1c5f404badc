"""Where the tasks of a run come from, as the command line says it."""

from __future__ import annotations

import json

import pytest
from accelerate.state import AcceleratorState
from datasets import load_dataset

from fewshot_nlp.cli.parser import parse
from fewshot_nlp.cli.train import main, prepare
from fewshot_nlp.data import loading

SAVING = ["--save_strategy", "steps", "--save_steps", "2"]


def prepared(argv):
    AcceleratorState._reset_state(reset_partial_state=True)
    return prepare(parse(argv))


def test_queries_out_of_scope_in_training_and_in_evaluation(tiny):
    run = prepared([*tiny, "--n_out_of_scope", "3", "--eval_n_out_of_scope", "1"])
    assert {len(run.trainer.train_sampler[i].out_of_scope) for i in range(20)} == {3}
    validation = [spec for specs in run.trainer.eval_specs.values() for spec in specs]
    test = [sampler[i] for sampler in run.test.values() for i in range(4)]
    assert {len(spec.out_of_scope) for spec in [*validation, *test]} == {1}


def test_without_being_asked_for_there_are_none(tiny):
    run = prepared(tiny)
    specs = [run.trainer.train_sampler[0], *(spec for specs in run.trainer.eval_specs.values() for spec in specs)]
    assert not any(spec.out_of_scope for spec in specs)


def test_results_name_the_queries_out_of_scope(tiny, tmp_path):
    main([*tiny, "--n_out_of_scope", "2", "--eval_n_out_of_scope", "1"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"]["n_out_of_scope"] == 1
    assert all(0 <= entry["accuracy"] <= 1 for entry in results["test"].values())


def test_the_revision_of_a_data_set_is_asked_of_the_hub(tiny, data_file, monkeypatch):
    asked = []

    def hub(name, config_name=None, revision=None):
        asked.append((name, config_name, revision))
        return load_dataset("json", data_files=str(data_file))

    monkeypatch.setattr(loading, "load_dataset", hub)
    run = prepared([*tiny, "--dataset_name", "someone/intents", "--dataset_revision", "v1.2"])
    assert asked == [("someone/intents", None, "v1.2")]
    assert run.pools["train"].name == "someone/intents"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset_revision", "v1.2"], "sentences.jsonl' is not on the Hub and has no revision 'v1.2'"),
        (["--dataset_name", "home_intents", "--dataset_revision", "v1.2"], "dataset='home_intents' is not on the Hub"),
        (["--n_out_of_scope", "-1"], "n_out_of_scope=-1 is out of range"),
        (["--eval_n_out_of_scope", "-1"], "eval_n_out_of_scope=-1 is out of range"),
        (["--n_out_of_scope", "99"], "The train pool of 'sentences' cannot give n_out_of_scope=99 queries"),
        (["--eval_n_out_of_scope", "1", "--eval_n_way", "3"], "The validation pool of 'sentences' has 3 classes"),
    ],
)
def test_bad_tasks_are_one_line_before_training(tiny, tmp_path, argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*tiny, *argv])
    assert message in str(stopped.value)
    assert str(stopped.value).startswith("error: ")
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [(["--n_out_of_scope", "2"], "other episodes")],
)
def test_a_run_on_other_tasks_is_not_resumed(tiny, argv, message):
    main([*tiny, *SAVING])
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(ValueError, match=message):
        main([*tiny, *SAVING, *argv, "--resume_from_checkpoint", "true"])
