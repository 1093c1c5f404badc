"""What was reported is on the disk, whatever happens next."""

from __future__ import annotations

import json
import os

import pytest

from fewshot_nlp.training.metrics_log import METRICS, append_report, read_reports, start_reports
from tests.training.test_resume import SAVING, Kill, Killed, resumable
from tests.training.toy import toy_trainer

LOGGING = {**SAVING, "logging_steps": 1, "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2}


def test_reports_after_the_last_checkpoint_outlive_the_run(tmp_path):
    with pytest.raises(Killed):
        toy_trainer(tmp_path, callbacks=[Kill(6)], **LOGGING).train()
    # Step 6 was killed before its report.
    assert [entry["step"] for entry in read_reports(tmp_path)] == [1, 2, 2, 3, 4, 4, 5]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3"]


def test_a_resumed_run_adds_to_the_reports_and_ends_with_those_of_a_whole_one(tmp_path):
    whole = toy_trainer(tmp_path / "whole", **LOGGING)
    whole.train()
    with pytest.raises(Killed):
        toy_trainer(tmp_path / "killed", callbacks=[Kill(6)], **LOGGING).train()
    before = (tmp_path / "killed" / METRICS).read_bytes()
    toy_trainer(tmp_path / "killed", **LOGGING).train(resume_from_checkpoint=True)
    assert (tmp_path / "killed" / METRICS).read_bytes().startswith(before)
    assert resumable(read_reports(tmp_path / "killed")) == resumable(whole.state.log_history)


def test_a_new_run_begins_a_new_log_and_one_in_another_folder_takes_its_past_along(tmp_path):
    toy_trainer(tmp_path / "a", **LOGGING).train()
    toy_trainer(tmp_path / "b", **LOGGING).train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-6")
    assert resumable(read_reports(tmp_path / "b")) == resumable(read_reports(tmp_path / "a"))
    toy_trainer(tmp_path / "a", **{**LOGGING, "max_steps": 1}, overwrite_output_dir=True).train()
    assert {entry["step"] for entry in read_reports(tmp_path / "a")} == {1}


def test_without_checkpoints_nothing_is_written(tmp_path):
    toy_trainer(tmp_path).train()
    assert list(tmp_path.iterdir()) == []


def test_half_a_line_is_passed_over_and_the_next_one_is_whole(tmp_path):
    append_report(tmp_path, {"step": 1, "loss": 0.5})
    with (tmp_path / METRICS).open("ab") as file:
        file.write(b'{"step": 2, "lo')
    assert read_reports(tmp_path) == [{"step": 1, "loss": 0.5}]
    append_report(tmp_path, {"step": 2, "loss": 0.25})
    append_report(tmp_path, {"step": 2, "eval_loss": 1.0})
    append_report(tmp_path, {"step": 2, "loss": 0.125})
    assert read_reports(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.125},
        {"step": 2, "eval_loss": 1.0},
    ]


def test_history_is_written_only_where_there_is_no_log(tmp_path):
    history = [{"step": 1, "loss": 0.5}]
    start_reports(tmp_path, history)
    start_reports(tmp_path, [{"step": 7, "loss": 9.0}])
    assert [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()] == history
    start_reports(tmp_path)
    assert not (tmp_path / METRICS).exists()


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="this system cannot tell a link when it opens one")
def test_a_link_is_not_written_through(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "run"
    folder.mkdir()
    outside.write_text("theirs\n")
    (folder / METRICS).symlink_to(outside)
    with pytest.raises(OSError, match="cannot be written"):
        append_report(folder, {"step": 1, "loss": 0.5})
    assert outside.read_text() == "theirs\n"
