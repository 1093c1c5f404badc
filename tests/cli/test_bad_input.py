"""What cannot be run is one line, before any training, and leaves nothing behind."""

from __future__ import annotations

import json
import sys

import datasets
import pytest

from fewshot_nlp.cli.train import main


@pytest.fixture
def refused(tiny, tmp_path, capsys):
    """Call with arguments of a run that must not start; returns its one line."""

    def run(*argv):
        with pytest.raises(SystemExit) as stopped:
            main([*tiny, *argv])
        line = str(stopped.value)
        assert line.startswith("error: ")
        assert len(line.splitlines()) == 1
        assert capsys.readouterr().out == ""
        assert not list(tmp_path.glob("out/*"))
        return line

    return run


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_way", "50"], "fewer than n_way=50. Lower n_way"),
        (["--eval_n_way", "9"], "fewer than eval_n_way=9. Lower eval_n_way"),
        (
            ["--eval_k_shots", "20"],
            "(eval_k_shots=20 + eval_n_query=2). Lower eval_k_shots or eval_n_query, or leave such classes out, with "
            "min_examples=22.",
        ),
        (["--eval_n_out_of_scope", "99"], "Lower eval_n_out_of_scope."),
        (["--split_fractions", "0.8", "0.2", "0"], "The data set has no test classes"),
        (["--split_fractions", "0.5", "0.5"], "split_fractions=[0.5, 0.5] must be three fractions"),
        (["--eval_k_shots", "0", "1"], "Set use_label_names, without names_in_training_alone, or leave 0 out"),
        (
            ["--eval_k_shots", "0", "1", "--use_label_names", "true", "--names_in_training_alone", "true"],
            "without names_in_training_alone",
        ),
        (["--head", "verbalizer"], "Use head='linear' with head_init='names'"),
        (["--template", "{text} {mask}"], "read by head='verbalizer' alone"),
        (["--n_query", "50"], "too few examples"),
        (["--text_column_name", "sentence"], "sentence"),
        (["--dataset_name", "nowhere/at_all.csv"], "nowhere/at_all.csv"),
        (["--model_name_or_path", "nowhere"], "nowhere"),
        (["--learnig_rate", "1"], "Did you mean 'learning_rate'"),
        (["--output_dir", "/proc/self/out"], "output_dir='/proc/self/out'"),
        (["--report_to", "tensorbord"], "report_to='tensorbord'"),
        (["--resume_from_checkpoint", "true"], "no sound checkpoint"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere"),
        (["--learner", "anil", "--head", "prototype"], "head='prototype'"),
        (["--metric_for_best_model", "f1"], "metric_for_best_model='f1'"),
        (["--lora_target_modules", "nothing", "--adapter", "lora"], "nothing"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--max_length", "129", "--adapter", "lora"], "max_length=129 exceeds the 128 positions"),
        (
            ["--max_length", "127", "--adapter", "prompt_tuning"],
            "num_virtual_tokens=2 and max_length=127 together exceed the 128 positions",
        ),
    ],
)
def test_bad_settings(refused, argv, message):
    assert message in refused(*argv)


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"train": ["play stop", "play music"], "test": ["play music"]}, "'play music' is listed in train and in test"),
        ({"train": ["play stop", "play musik"]}, "Did you mean 'play music'?"),
        ({"train": []}, "The train split must be a list of class names, not []"),
        ("train", "must hold an object with the lists train, validation, test"),
    ],
)
def test_a_bad_split_file(refused, tmp_path, splits, message):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(splits))
    assert message in refused("--split_file", str(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "data.jsonl",
            '{"text": "a", "label": "x"}\n{"text": " ", "label": "y"}\n',
            "Row 1 has an empty text (text=' ')",
        ),
        ("data.jsonl", '{"text": "a", "label": "x"}\n{"text": null, "label": "y"}\n', "Row 1 has an empty text"),
        ("data.csv", "text,label\na,x\nb,\n", "Row 1 has no label"),
        ("data.jsonl", '{"text": "a", "label": "x"}\n{"text": \n', "data.jsonl' cannot be read"),
        ("data.csv", 'text,label\na,x\n"b,x\n', "data.csv' cannot be read"),
        ("data.parquet", "no parquet", "data.parquet' cannot be read"),
    ],
)
def test_a_bad_data_file(refused, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    assert message in refused("--dataset_name", str(path))


def test_a_tracker_that_is_not_installed(refused, monkeypatch):
    monkeypatch.setattr("fewshot_nlp.training.accelerator.get_available_trackers", list)
    line = refused("--report_to", "wandb")
    assert "report_to='wandb' needs a package that is not installed. Run `pip install wandb`." in line


@pytest.mark.parametrize("module", ["hassil.intents", "home_assistant_intents"])
def test_an_embedded_set_without_its_packages(refused, tmp_path, monkeypatch, module):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setitem(sys.modules, module, None)
    line = refused("--dataset_name", "home_intents")
    assert "home_intents needs " in line
    assert 'Run: pip install "fewshot_nlp[offline]"' in line
    assert not (tmp_path / "cache").exists()


def test_nothing_at_all_starts_no_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"No recipe and no setting is given. Use fewshot-nlp <recipe.yaml>"):
        main([])
    assert not list(tmp_path.iterdir())
