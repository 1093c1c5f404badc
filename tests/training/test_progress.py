"""What a run shows while it runs."""

from __future__ import annotations

from tests.training.toy import toy_trainer


def test_bar_shows_loss_accuracy_speed_and_validation(tmp_path, capsys):
    toy_trainer(
        tmp_path, disable_tqdm=False, logging_steps=100, max_steps=4, eval_strategy="steps", eval_steps=2
    ).train()
    captured = capsys.readouterr()
    bar, lines = captured.err, captured.out + captured.err
    for piece in ("4/4", "loss=", "accuracy=", "episodes/s="):
        assert piece in bar
    assert "step 2: validation accuracy" in lines
    assert "(1-shot " in lines


def test_lines_replace_the_bar(tmp_path, capsys):
    toy_trainer(tmp_path, disable_tqdm=True, logging_steps=2, max_steps=4).train()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert "loss " in lines[0]
    assert "accuracy " in lines[0]
    assert captured.err == ""
