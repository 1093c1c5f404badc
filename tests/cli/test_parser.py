"""YAML, command line, and which of them wins."""

from __future__ import annotations

import re
import traceback
from dataclasses import fields

import pytest

from fewshot_nlp.cli.parser import NAMES, parse, read_yaml
from fewshot_nlp.cli.train import main
from fewshot_nlp.config import FewShotConfig
from fewshot_nlp.data.config import EpisodeConfig
from fewshot_nlp.training import FewShotTrainingArguments


@pytest.fixture
def yaml_file(tmp_path):
    def write(text, name="recipe.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def test_defaults_are_those_of_the_dataclasses():
    assert parse([]) == (FewShotConfig(), EpisodeConfig(), FewShotTrainingArguments())


def test_command_line_wins_over_config_wins_over_recipe(yaml_file):
    recipe = yaml_file("max_steps: 1\nseed: 1\nlora_r: 1\nn_query: 9")
    other = yaml_file("seed: 2\nlora_r: 2", "other.yaml")
    config, episodes, args = parse(["--lora_r", "3", "--config", str(other)], recipe)
    assert (args.max_steps, args.seed, config.lora_r, episodes.n_query) == (1, 2, 3, 9)


RECIPE = "output_dir: here\noverwrite_output_dir: true"


@pytest.mark.parametrize(
    ("config", "argv", "expected"),
    [
        ("", [], True),
        ("max_steps: 3", ["--seed", "1"], True),
        ("", ["--output_dir", "here"], True),
        ("output_dir: here", [], True),
        ("", ["--output_dir", "there"], False),
        ("", ["--output-dir=output"], False),
        ("output_dir: there", [], False),
        ("overwrite_output_dir: true", ["--output_dir", "there"], False),
        ("output_dir: there\noverwrite_output_dir: true", [], True),
        ("output_dir: there\noverwrite_output_dir: true", ["--output_dir", "here"], False),
        ("", ["--output_dir", "there", "--overwrite_output_dir"], True),
        ("", ["--output_dir", "there", "--overwrite_output_dir", "true"], True),
        ("overwrite_output_dir: false", [], False),
    ],
)
def test_leave_to_overwrite_holds_for_the_folder_it_was_given_with(yaml_file, config, argv, expected):
    given = ["--config", str(yaml_file(config, "other.yaml")), *argv]
    assert parse(given, yaml_file(RECIPE)).args.overwrite_output_dir is expected


def test_leave_to_overwrite_without_a_folder_holds_for_the_default(yaml_file):
    recipe = yaml_file("overwrite_output_dir: true")
    assert parse([], recipe).args.overwrite_output_dir
    assert not parse(["--output_dir", "there"], recipe).args.overwrite_output_dir


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-4", "learning_rate", 1e-4),
        ("learning_rate: 2", "learning_rate", 2.0),
        ("bf16: yes", "bf16", True),
        ("bf16: 'true'", "bf16", True),
        ("eval_k_shots: [2, 3]", "eval_k_shots", [2, 3]),
        ("report_to: none", "report_to", ["none"]),
        ("report_to: [tensorboard, wandb]", "report_to", ["tensorboard", "wandb"]),
        ("max_n_way: null", "max_n_way", None),
        ("head_learning_rate: 1e-2", "head_learning_rate", 0.01),
        ("lora_target_modules: [query]", "lora_target_modules", ["query"]),
        ("resume_from_checkpoint: true", "resume_from_checkpoint", "true"),
        ("hub_private_repo: true", "hub_private_repo", True),
        ("", "max_steps", 200),
        ("# nothing but a remark", "max_steps", 200),
    ],
)
def test_yaml_values(yaml_file, text, name, value):
    found = next(getattr(part, name) for part in parse([], yaml_file(text)) if hasattr(part, name))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--learning_rate", "1e-4"], "learning_rate", 1e-4),
        (["--learning-rate=1e-4"], "learning_rate", 1e-4),
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--eval_k_shots", "1", "2", "--seed", "3"], "eval_k_shots", [1, 2]),
        (["--max_n_way", "none"], "max_n_way", None),
        (["--max_n_way", "9", "--max_n_way", "none"], "max_n_way", None),
        (["--max_n_way=none", "--max_n_way", "9"], "max_n_way", 9),
        (["--max-n-way=null"], "max_n_way", None),
        (["--save_strategy", "no"], "save_strategy", "no"),
        (["--report_to", "none"], "report_to", ["none"]),
        (["--adapter", "none", "--learner", "protonet"], "adapter", "none"),
    ],
)
def test_command_line_values(yaml_file, argv, name, value):
    recipe = yaml_file("bf16: true\nmax_n_way: 7\neval_k_shots: [9]")
    found = next(getattr(part, name) for part in parse(argv, recipe) if hasattr(part, name))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnig_rate: 0.1", r"unknown key 'learnig_rate'\. Did you mean 'learning_rate'\?"),
        ("max-steps: 3", r"unknown key 'max-steps'\. Did you mean 'max_steps'\?"),
        ("zzzzzz: 3", r"unknown key 'zzzzzz'\. See --help"),
        ("3: 4", "unknown key 3"),
        ("max_steps: 3\nmax_steps: 4", "'max_steps' stands twice"),
        ("- max_steps", "must hold `name: value` lines, not a list"),
        ("max_steps: [", "not valid YAML"),
        ("max_steps: !!python/name:os.system", "not valid YAML"),
        ("max_steps: 1.5", r"max_steps=1\.5 must be of type int"),
        ("max_steps: many", "--max_steps.*invalid int value: 'many'"),
        ("learning_rate: fast", "--learning_rate.*invalid float value: 'fast'"),
        ("bf16: maybe", "--bf16.*maybe"),
        ("eval_k_shots: 1", "eval_k_shots=1 must be a list"),
        ("eval_k_shots: [1, x]", "eval_k_shots='x'"),
        ("max_steps: null", "max_steps=None"),
        ("split_file: 5", "split_file=5 must be of type str"),
        ("run_name: 2024-01-01", "run_name=.*must be of type str"),
        ("learner: mamal", "learner='mamal' .*maml"),
    ],
)
def test_bad_yaml_is_one_error(yaml_file, text, message):
    with pytest.raises(ValueError, match=message):
        parse([], yaml_file(text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hub_token: hidden: x", "mapping values are not allowed here, line 1, column 18"),
        ("seed: 1\nhub_token: 'hidden", "found unexpected end of stream, line 2, column 19"),
        ("hub_token: [hidden", "expected ',' or ']', but got '<stream end>', line 1, column 19"),
        ("hub_token: !hidden x", "could not determine a constructor for the tag ..., line 1, column 12"),
        ("hub_token: !hidden!a x", "found undefined tag handle ..., line 1, column 12"),
        ("hub_token: &hidden\nseed: &hidden 3", "found duplicate anchor ...; first occurrence"),
        ("hub_token: !!bool hidden", "the value is no bool, line 1, column 12"),
        ("hub_token: !!int hidden", "the value is no int, line 1, column 12"),
        ("hub_token: hidden\nseed: 2024-99-99", "the value is no timestamp, line 2, column 7"),
    ],
)
def test_bad_yaml_is_placed_and_not_quoted(yaml_file, text, message):
    """Its line may hold a token, which no traceback may show either."""
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        parse([], yaml_file(text))
    assert "hidden" not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learnig_rate", "1"], r"'--learnig_rate'\. Did you mean 'learning_rate'\?"),
        (["--learnig-rate=1"], r"Did you mean 'learning_rate'\?"),
        (["--max_step", "1"], r"'--max_step'\. Did you mean 'max_steps'\?"),
        (["--max_steps", "x"], "invalid int value: 'x'"),
        (["--max_steps"], "expected one argument"),
        (["--bf16", "maybe"], "maybe"),
        (["--max_steps", "none"], "invalid int value: 'none'"),
        (["stray"], "Unexpected argument 'stray'"),
        (["--learner", "mamal"], "learner='mamal'"),
        (["--k_shot", "0"], "k_shot=0 .*at least 1"),
    ],
)
def test_bad_command_line_is_one_error(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(argv)


def test_missing_file_is_named(tmp_path):
    for argv, recipe in (([], tmp_path / "no.yaml"), (["--config", str(tmp_path / "no.yaml")], None)):
        with pytest.raises(FileNotFoundError, match=r"no\.yaml"):
            parse(argv, recipe)


def test_every_setting_can_stand_in_both(yaml_file):
    """Each field round-trips through YAML and through the command line."""
    settings = parse([])
    for part in settings:
        for field in fields(part):
            value = getattr(part, field.name)
            if value is None:
                assert getattr(parse([f"--{field.name}=none"])[settings.index(part)], field.name) is None
                continue
            shown = [str(item) for item in value] if isinstance(value, list) else [str(value)]
            other = parse([f"--{field.name}", *shown])
            assert other == settings, field.name
    assert len(NAMES) == len(set(NAMES))


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as done:
        parse(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in (*NAMES, "config"))
    assert "[--config FILE] [--NAME VALUE ...]\n" in shown.splitlines(keepends=True)[0]


@pytest.mark.parametrize("argv", [["--help"], ["recipe.yaml", "-h"]])
def test_help_of_the_command_tells_of_recipes_and_of_plan(argv, yaml_file, monkeypatch, capsys):
    monkeypatch.chdir(yaml_file(RECIPE, "recipe.yaml").parent)
    with pytest.raises(SystemExit) as done:
        main(argv)
    assert done.value.code == 0
    said, settings = capsys.readouterr().out.split("options:")
    assert said.startswith(
        "usage: fewshot-nlp [RECIPE.yaml] [--config FILE] [--NAME VALUE ...]\n"
        "       fewshot-nlp plan [RECIPE.yaml] [--memory_gb X] [--NAME VALUE ...]\n"
    )
    assert "plan predicts" in " ".join(said.split()) and "--learner" in settings


def test_help_of_a_script_offers_no_other_recipe(yaml_file, capsys):
    with pytest.raises(SystemExit):
        main(["--help"], yaml_file(RECIPE))
    assert "RECIPE.yaml" not in capsys.readouterr().out


def test_yaml_is_read_as_it_is(yaml_file):
    assert read_yaml(yaml_file("max_steps: 3\noutput_dir: x")) == {"max_steps": 3, "output_dir": "x"}
