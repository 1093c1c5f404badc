"""Disks that are full or read-only, data that go away, gradients that explode: one clear error, and nothing is lost."""

from __future__ import annotations

import resource
import subprocess

import pytest
import torch
from datasets import Dataset

from fewshot_nlp.data import EpisodeSampler, load_pools
from fewshot_nlp.learners import build_learner
from fewshot_nlp.training import FewShotTrainer, read_checkpoint
from fewshot_nlp.training.accelerator import SHARDED, build_accelerator
from fewshot_nlp.training.faults import LostProcess, UnreadableEpisode, together
from fewshot_nlp.training.metrics_log import read_reports
from tests.tiny import random_episode, tiny_config
from tests.training.test_resume import SAVING
from tests.training.toy import ToyLearner, ToySampler, toy_args, toy_reader, toy_trainer

RUN = {**SAVING, "logging_steps": 1, "max_steps": 12}


class Large(ToyLearner):
    """Half a megabyte of parameters, of which the last ones are never used."""

    def init_params(self):
        return {**super().init_params(), "head.unused": torch.zeros(100_000)}

    def meta_grad(self, params, episodes):
        part = super().meta_grad({"head.w": params["head.w"]}, episodes)
        part.grads["head.unused"] = torch.zeros(100_000)
        return part


@pytest.fixture
def disk(tmp_path):
    """Mounts a small disk of its own; skipped where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def check_what_is_left(folder, last, steps):
    assert read_checkpoint(folder / f"checkpoint-{last}").state["global_step"] == last
    assert [path.name for path in folder.glob(".*")] == []
    assert [entry["step"] for entry in read_reports(folder)] == list(range(1, steps + 1))


def test_a_full_disk_stops_the_run_in_one_line_and_it_goes_on_when_there_is_room(disk):
    # Each checkpoint takes 1.2 MB: two find room.
    with pytest.raises(OSError, match=r"checkpoint-6 cannot be written .*No space left.* MB free .*checkpoint-4 and"):
        toy_trainer(disk, Large(), **RUN).train()
    check_what_is_left(disk, last=4, steps=6)
    subprocess.run(["mount", "-o", "remount,size=30m", disk], check=True)
    assert toy_trainer(disk, Large(), **RUN).train(resume_from_checkpoint=True).global_step == 12
    check_what_is_left(disk, last=12, steps=12)


def test_a_disk_that_turns_read_only_stops_the_run_in_one_line(disk):
    class Closing(ToyLearner):
        def meta_grad(self, params, episodes):
            if episodes[0].spec.index == 15:
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            return super().meta_grad(params, episodes)

    with pytest.raises(OSError, match=r"metrics\.jsonl cannot be written: Read-only.*before step 6 are in it"):
        toy_trainer(disk, Closing(), **RUN).train()
    check_what_is_left(disk, last=4, steps=5)
    with pytest.raises(ValueError, match=r"output_dir=.* cannot be written.*Read-only"):
        toy_args(disk)


def test_a_limit_of_file_sizes_stops_the_run_in_one_line(tmp_path):
    """What a full disk is where no disk can be mounted."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    class Limiting(Large):
        def meta_grad(self, params, episodes):
            if episodes[0].spec.index == 9:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            return super().meta_grad(params, episodes)

    try:
        with pytest.raises(OSError, match=r"checkpoint-4 cannot be written .*checkpoint-2 and what was logged"):
            toy_trainer(tmp_path, Limiting(), **RUN).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    check_what_is_left(tmp_path, last=2, steps=4)


def test_a_row_that_becomes_unreadable_is_named_and_the_run_can_go_on(tmp_path):
    def broken(spec):
        if spec.index == 14:
            raise OSError("image file is truncated (3 bytes not processed).")
        return toy_reader(spec)

    trainer = FewShotTrainer(ToyLearner(), toy_args(tmp_path, **RUN), ToySampler(), broken)
    with pytest.raises(UnreadableEpisode, match=r"toy/train/14 cannot be read: image file is truncated.*put them back"):
        trainer.train()
    check_what_is_left(tmp_path, last=4, steps=4)
    assert toy_trainer(tmp_path, **RUN).train(resume_from_checkpoint=True).global_step == 12


def test_a_validation_that_cannot_be_read_is_named_too(tmp_path):
    def broken(spec):
        if spec.split == "validation":
            raise ValueError("the row is gone.")
        return toy_reader(spec)

    args = toy_args(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer = FewShotTrainer(ToyLearner(), args, ToySampler(), broken, {"1-shot": ToySampler("validation")})
    with pytest.raises(UnreadableEpisode, match="toy/validation/0 cannot be read: the row is gone"):
        trainer.train()


@pytest.mark.parametrize("vanishes", [True, False])
def test_a_data_file_that_is_cut_short_is_an_error_and_one_that_vanishes_is_none(tmp_path, vanishes):
    """Arrow files are mapped into memory: reading beyond the end of one kills the process (SIGBUS)."""
    rows = {"text": [f"{i} {'word ' * 40}" for i in range(4000)], "label": [f"class {i % 8}" for i in range(4000)]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "data")
    pools = load_pools(tmp_path / "data")
    pool = pools["train"]
    last = [rows[-1] for rows in pool.rows_by_class.values()]
    before = pool.texts(last)
    (file,) = (tmp_path / "data").glob("*.arrow")
    if vanishes:
        file.unlink()
        assert pool.texts(last) == before
        return
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size // 2)
    with pytest.raises(OSError, match=rf"\.arrow had {size} bytes when it was opened, and has {size // 2}"):
        pool.texts(last)


@pytest.mark.parametrize("learner", ["maml", "fomaml", "reptile"])
def test_an_inner_loop_that_diverges_is_reported_by_step_and_can_be_replayed(tmp_path, bert_folder, learner):
    settings = {"learner": learner, "inner_steps": 4, "adapter": "lora", "inner_learning_rate": 1e20}
    config = tiny_config(bert_folder, **settings)
    first = build_learner(config)
    episode = random_episode([2, 2], seed=0)
    # By hand: the shortest inner loop that ends at weights that are not finite.
    shortest = next(
        steps
        for steps in range(1, 5)
        if not all(
            bool(value.isfinite().all())
            for name, value in build_learner(tiny_config(bert_folder, **{**settings, "inner_steps": steps}))
            .adapt(first.init_params(), episode.support)
            .items()
        )
    )
    assert first.first_divergence(first.init_params(), episode.support) == shortest
    calm = build_learner(tiny_config(bert_folder, **{**settings, "inner_learning_rate": 0.1}))
    assert calm.first_divergence(calm.init_params(), episode.support) is None

    args = toy_args(tmp_path, meta_batch_size=1, max_steps=1)
    trainer = FewShotTrainer(first, args, ToySampler(), lambda spec: episode)
    with pytest.warns(UserWarning, match=rf"random/train/0 \(its inner loop diverges at step {shortest}\)"):
        trainer.train()


def test_an_address_of_a_warning_gives_the_episode_again():
    rows = {"text": [f"text {i}" for i in range(60)], "label": [f"class {i % 6}" for i in range(60)]}
    pools = load_pools(Dataset.from_dict(rows), name="some/set")
    sampler = EpisodeSampler(pools["train"], n_way=2, k_shot=1, n_query=2)
    assert sampler.at(sampler[17].address) == sampler[17]
    for wrong in ("some/set/test/17", "other/train/17", "some/set/train/-1", "some/set/train/x", "17", ""):
        with pytest.raises(ValueError, match="There is no episode"):
            sampler.at(wrong)


@pytest.mark.parametrize("variable", SHARDED)
def test_what_shards_a_model_is_refused_with_the_reason(tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=rf"{variable} is set, but .* whole parameters.*data parallelism"):
        build_accelerator(toy_args(tmp_path))


def test_processes_that_do_not_find_one_another_are_refused(tmp_path, monkeypatch):
    accelerator = build_accelerator(toy_args(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr("fewshot_nlp.training.accelerator.Accelerator", lambda **options: accelerator)
    with pytest.raises(ValueError, match=r"started 3 processes .* knows of 1: .*torchrun --nproc_per_node 3"):
        build_accelerator(toy_args(tmp_path))


def test_a_lost_process_is_told_from_other_errors(tmp_path):
    class Two:
        num_processes, process_index = 2, 0

    found = r"within ddp_timeout=7 seconds, as process 0 of 2 found: Connection closed by peer\. Its own"
    with pytest.raises(LostProcess, match=found), together(Two(), 7):
        raise RuntimeError("[/gloo/transport/tcp/pair.cc:547] Connection closed by peer. GLHF\nmore")
    with pytest.raises(RuntimeError, match="shapes"), together(Two(), 7):
        raise RuntimeError("shapes")
