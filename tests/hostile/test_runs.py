"""Folders that runs write to and go on from, and tokens, which are in none of them."""

from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save, save_file

from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.training import FewShotTrainingArguments
from fewshot_nlp.training.checkpoint import FILES, MANIFEST, DamagedCheckpoint, find_checkpoint, read_checkpoint
from tests.hostile.test_adapters import LIES
from tests.training.toy import toy_trainer

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    toy_trainer(folder, **SAVING).train()
    return folder


@pytest.fixture
def run(saved, tmp_path):
    """A run of two checkpoints, of which the newer is at hand for a stranger."""
    return shutil.copytree(saved, tmp_path / "run")


def put(folder, name, content):
    """``content`` in place of a file, with a manifest that agrees."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_pickle_in_place_of_a_file_of_a_checkpoint(run, bomb, name):
    folder = run / "checkpoint-4"
    if name == MANIFEST:
        (folder / name).write_bytes(bomb)
    else:
        put(folder, name, bomb)
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoint-4 is damaged: {name}"):
        read_checkpoint(folder)


@pytest.mark.parametrize("lie", LIES)
def test_a_header_of_a_checkpoint_that_lies(run, lie):
    put(run / "checkpoint-4", "params.safetensors", LIES[lie])
    with pytest.raises(DamagedCheckpoint, match=r"params\.safetensors cannot be read"):
        read_checkpoint(run / "checkpoint-4")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(run, value):
    put(run / "checkpoint-4", "params.safetensors", save({"head.w": torch.full((4, 3), value)}))
    with pytest.raises(DamagedCheckpoint, match=r"'head.w' holds values that are not finite"):
        toy_trainer(run, **SAVING).train(resume_from_checkpoint=run / "checkpoint-4")


@pytest.mark.parametrize("name", ["trainer_state.json", "progress.json"])
@pytest.mark.parametrize("content", [b"[]", b"{}", b'{"run": 5}', b"[" * 100_000, b'{"run": {}, "meter": []}'])
def test_a_state_that_is_none(run, name, content):
    put(run / "checkpoint-4", name, content)
    if (name, content) == ("trainer_state.json", b"{}"):
        # Every field of transformers' state has a default.
        return
    with pytest.raises(ValueError, match="checkpoint-4"):
        toy_trainer(run, **SAVING).train(resume_from_checkpoint=run / "checkpoint-4")


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_link_out_of_a_checkpoint(run, tmp_path, name):
    (run / "checkpoint-4" / name).rename(tmp_path / "elsewhere")
    (run / "checkpoint-4" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedCheckpoint, match="is a link out of its folder"):
        read_checkpoint(run / "checkpoint-4")
    with pytest.warns(UserWarning, match="checkpoint-4 is damaged"):
        assert find_checkpoint(run).name == "checkpoint-2"


@pytest.mark.parametrize("best", ["../../etc", "/", ""])
def test_the_best_checkpoint_of_a_stranger_is_a_name_alone(run, tmp_path, best):
    folder = run / "checkpoint-4"
    state = json.loads((folder / "trainer_state.json").read_text())
    put(folder, "trainer_state.json", json.dumps(state | {"best_model_checkpoint": best}).encode())
    mine = tmp_path / "etc"
    mine.mkdir()
    toy_trainer(run, **{**SAVING, "max_steps": 6}, save_total_limit=1).train(resume_from_checkpoint=folder)
    assert mine.is_dir()


@pytest.mark.parametrize("name", ["checkpoint-2", "learning_curve.png", ".checkpoint-2.partial", "README.md"])
def test_a_run_does_not_write_through_a_link(tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(outside)
    with pytest.raises(ValueError, match=rf"holds {name}, a link by which the run might write to"):
        toy_trainer(tmp_path / "run", **SAVING, overwrite_output_dir=True).train()
    assert [path.name for path in outside.iterdir()] == ["mine"]


#: Of the Hub's form; and of one that only who is logged in can tell.
TOKENS = ["hf_FAKEfakeFAKEfakeFAKEfakeFAKEfake12", "s3cret-of-another-hub"]


@pytest.fixture(params=TOKENS, ids=["hub", "other"])
def token(request, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", request.param)
    return request.param


def everything(folder, capsys):
    """All that was printed, and all that lies in ``folder``."""
    printed = capsys.readouterr()
    files = [path for path in folder.rglob("*") if path.is_file()]
    return b"".join([printed.out.encode(), printed.err.encode(), *(path.read_bytes() for path in files)])


def test_a_token_is_in_nothing_that_an_adapter_leaves(lora, tmp_path, token, capsys):
    adapter = FewShotAdapter.from_pretrained(lora, token=token)
    adapter.info = type(adapter.info)(
        [f"a {token}"],
        [token],
        {"test": {}, "protocol": {"dataset": token}},
        f"x --hub_token {token} --hub_token={token}",
    )
    adapter.save_pretrained(tmp_path / "out")
    assert token.encode() not in everything(tmp_path / "out", capsys)
    assert token not in repr(adapter) + repr(adapter.config) + repr(adapter.info) + repr(vars(adapter.learner.model))


def test_a_token_is_in_nothing_that_settings_say(tmp_path, token):
    args = FewShotTrainingArguments(str(tmp_path), hub_token=token)
    said = repr(args), str(args), args.to_json_string(), repr(args.to_sanitized_dict()), repr(args.to_dict())
    assert token not in "".join(said)
    for wrong in ([token], {token: 1}):
        with pytest.raises(ValueError, match="hub_token=") as caught:
            FewShotTrainingArguments(str(tmp_path), hub_token=wrong)
        assert token not in str(caught.value)


def test_a_token_is_in_nothing_that_a_checkpoint_holds(tmp_path, token, capsys):
    toy_trainer(tmp_path, **SAVING, hub_token=token).train()
    assert token.encode() not in everything(tmp_path, capsys)


def test_a_checkpoint_holds_no_other_tensors_than_those_of_a_run(run):
    save_file({"head.w": torch.ones(2, 2)}, run / "checkpoint-4" / "params.safetensors")
    put(run / "checkpoint-4", "params.safetensors", (run / "checkpoint-4" / "params.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"holds head\.w of shape \(2, 2\)"):
        toy_trainer(run, **SAVING).train(resume_from_checkpoint=run / "checkpoint-4")
