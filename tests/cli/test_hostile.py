"""Whole runs on what a stranger wrote, with a token that must be found nowhere."""

from __future__ import annotations

import json

import pytest

from fewshot_nlp.cli.train import main

#: Of the Hub's form; and of one that only who is logged in can tell.
TOKENS = ["hf_FAKEfakeFAKEfakeFAKEfakeFAKEfake12", "s3cret-of-another-hub"]


def everything(folder, capsys):
    """All that was printed, and all that lies in ``folder``."""
    printed = capsys.readouterr()
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"".join([printed.out.encode(), printed.err.encode(), *(path.read_bytes() for path in files)])


@pytest.mark.parametrize("token", TOKENS, ids=["hub", "other"])
def test_a_token_is_in_nothing_that_a_run_prints_or_leaves(tiny, tmp_path, monkeypatch, capsys, token):
    monkeypatch.setenv("HF_TOKEN", token)
    main([*tiny, "--hub_token", token, "--learner", "protonet", "--max_steps", "2", "--save_steps", "1"])
    found = everything(tmp_path / "out", capsys)
    assert token.encode() not in found and b"--hub_token" in found
    leakage = json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]["leakage"]
    assert leakage["dropped"] == 0 and leakage["kept"] >= 0


@pytest.mark.parametrize("token", TOKENS, ids=["hub", "other"])
@pytest.mark.parametrize(
    "argv",
    [
        ["--push_to_hub", "true", "--hub_token", "TOKEN"],
        ["--push_to_hub", "true", "--hub_token", "TOKEN\n"],
        ["--hub_tokn=TOKEN"],
        ["--hub_token", "x", "TOKEN"],
        ["--dataset_name", "https://me:TOKEN@hub.example/x.csv"],
        ["--model_name_or_path", "/nowhere/TOKEN"],
        ["--n_way", "TOKEN"],
    ],
    ids=lambda argv: argv[0],
)
def test_a_token_is_in_nothing_that_a_refused_run_says(tiny, tmp_path, monkeypatch, capsys, token, argv):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(SystemExit) as stopped:
        main([*tiny, *(each.replace("TOKEN", token) for each in argv)])
    assert token not in str(stopped.value) and "error: " in str(stopped.value)
    assert token.encode() not in everything(tmp_path, capsys)


def test_a_name_does_not_drive_the_terminal(tiny, data_file, tmp_path, capsys):
    path = tmp_path / "\x1b[2Jgone\u202e.jsonl"
    path.write_bytes(data_file.read_bytes())
    main([*tiny, "--dataset_name", str(path), "--learner", "protonet", "--max_steps", "1", "--test_episodes", "2"])
    printed = capsys.readouterr().out
    assert "\\u001b[2Jgone" in printed and "\x1b" not in printed and "\u202e" not in printed
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "\x1b" not in card and "\u202e" not in card
