"""An adapter or a backbone from a stranger: refused in one sentence, and nothing of it is run or followed."""

from __future__ import annotations

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from fewshot_nlp.hub import AdapterInfo, FewShotAdapter
from fewshot_nlp.hub.card import model_card
from fewshot_nlp.models.backbone import load_backbone
from tests.hostile.conftest import Bomb
from tests.tiny import tiny_bert, tiny_config

BOTH = ["fewshot_config.json", "fewshot_params.safetensors", "results.json"]
LORA = [*BOTH, "adapter_config.json", "adapter_model.safetensors"]
FULL = [*BOTH, "config.json", "model.safetensors"]


def refused(folder):
    """The one sentence in which the adapter in ``folder`` is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        FewShotAdapter.from_pretrained(folder)
    message = str(caught.value)
    assert len(message) < 2000 and "\x1b" not in message
    return message


@pytest.mark.parametrize("file", LORA)
def test_a_pickle_in_place_of_a_file_of_an_adapter(lora, bomb, file):
    (lora / file).write_bytes(bomb)
    assert file in refused(lora)


@pytest.mark.parametrize("file", FULL)
def test_a_pickle_in_place_of_a_file_of_a_whole_model(full, bomb, file):
    (full / file).write_bytes(bomb)
    message = refused(full)
    assert file in message or f"The backbone in {full} cannot be read" in message


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_pickle_in_place_of_a_file_of_the_backbone(bert_folder, tmp_path, bomb, file):
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    (folder / file).write_bytes(bomb)
    with pytest.raises(OSError, match="Cannot load the backbone"):
        load_backbone(str(folder))


def test_pickled_weights_are_not_a_way_out(bert_folder, lora, full, tmp_path, marker):
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    for path, name in ((folder, "pytorch_model.bin"), (full, "pytorch_model.bin"), (lora, "adapter_model.bin")):
        torch.save(Bomb(marker), path / name)
        for file in path.glob("*model.safetensors"):
            file.unlink()
    with pytest.raises(OSError, match=r"no file named model.safetensors"):
        load_backbone(str(folder))
    assert "model.safetensors" in refused(full)
    assert "adapter_model.safetensors" in refused(lora)


def header(entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


LIES = {
    "longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "longer than any header": struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "a hundred megabytes of nothing": struct.pack("<Q", 100_000_001) + b" " * 1000,
    "too few bytes": header({"a": entry(offsets=(0, 8))}) + bytes(4),
    "bytes that nobody owns": header({"a": entry()}) + bytes(80),
    "overlap": header({"a": entry(), "b": entry(offsets=(4, 12))}) + bytes(12),
    "end before start": header({"a": entry(offsets=(8, 0))}) + bytes(8),
    "shape and size": header({"a": entry(shape=(3,))}) + bytes(8),
    "shape beyond count": header({"a": entry(shape=(1 << 62, 8))}) + bytes(8),
    "unknown dtype": header({"a": entry(dtype="PICKLE")}) + bytes(8),
    "no utf-8": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    "brackets": struct.pack("<Q", 50_000) + b"[" * 50_000,
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "fewshot_params.safetensors"])
def test_a_header_that_lies(lora, file, lie):
    (lora / file).write_bytes(LIES[lie])
    assert file in refused(lora)


@pytest.mark.parametrize("lie", LIES)
def test_a_header_of_a_backbone_that_lies(full, lie):
    (full / "model.safetensors").write_bytes(LIES[lie])
    assert f"{full}" in refused(full)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "fewshot_params.safetensors"])
@pytest.mark.parametrize("kind", ["nan", "int32", "bool", "float8_e4m3fn", "complex64"])
def test_values_that_are_no_finite_floats(lora, file, kind):
    tensors = load_file(lora / file)
    name = sorted(tensors)[0]
    changed = tensors[name] * float("nan") if kind == "nan" else tensors[name].to(getattr(torch, kind))
    save_file(tensors | {name: changed}, lora / file)
    message = refused(lora)
    assert name in message and ("not finite" if kind == "nan" else kind) in message


@pytest.mark.parametrize("file", LORA)
def test_a_link_out_of_the_folder(lora, tmp_path, file):
    (lora / file).rename(tmp_path / "elsewhere")
    (lora / file).symlink_to(tmp_path / "elsewhere")
    assert "is a link out of its folder" in refused(lora)


def test_a_link_inside_the_folder_and_the_cache_of_the_hub_are_read(lora, tmp_path):
    (lora / "real").mkdir()
    for file in LORA[1:]:
        (lora / file).rename(lora / "real" / file)
        (lora / file).symlink_to(Path("real") / file)
    FewShotAdapter.from_pretrained(lora)
    blobs, snapshot = tmp_path / "models--me--x" / "blobs", tmp_path / "models--me--x" / "snapshots" / "0"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(LORA):
        shutil.copyfile(lora / file, blobs / str(i))
        (snapshot / file).symlink_to(Path("../../blobs") / str(i))
    FewShotAdapter.from_pretrained(snapshot)


def test_no_file_but_a_pipe_that_never_answers(lora):
    (lora / "adapter_model.safetensors").unlink()
    os.mkfifo(lora / "adapter_model.safetensors")
    assert "is no file" in refused(lora)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "a/../../b", 5, None, ["x"]])
def test_weights_somewhere_else(full, shard):
    (full / "model.safetensors").rename(full.parent / "outside.safetensors")
    names = load_file(full.parent / "outside.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, shard)}
    (full / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "which is no file beside it" in refused(full)


EVIL = "import os\nos.mkdir({marker!r})\nraise ImportError"


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}},
        {"auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"_attn_implementation": "evil/kernel"},
        {"attn_implementation": "evil/kernel"},
        {"model_type": ["bert"]},
        {"hidden_size": "many"},
    ],
    ids=lambda settings: "-".join(settings),
)
@pytest.mark.parametrize("where", ["backbone", "adapter"])
def test_code_that_comes_with_a_model_is_not_run(bert_folder, full, tmp_path, monkeypatch, marker, settings, where):
    """And nobody is asked on the terminal whether it should be."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    folder = full if where == "adapter" else shutil.copytree(bert_folder, tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    (folder / "evil.py").write_text(EVIL.format(marker=str(marker)))
    monkeypatch.chdir(folder)
    try:
        FewShotAdapter.from_pretrained(folder) if where == "adapter" else load_backbone(str(folder))
    except (ValueError, OSError) as error:
        assert str(folder) in str(error)
    else:
        # Known code of transformers' own, with an attention of ours: what the file asks for plays no part.
        assert settings.keys() & {"auto_map", "_attn_implementation", "attn_implementation"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_kwargs": {"trust_remote_code": True}}, "asks for trust_remote_code"),
        ({"tokenizer_kwargs": {"proxies": {"https": "evil.org"}}}, "other files, servers or packages"),
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "other files, servers or packages"),
        ({"peft_type": "XLORA", "adapters": {"0": "../x"}}, "other files, servers or packages"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING", "prompt_tuning_init_state_dict_path": "x.bin"}, "other files"),
        ({"target_modules": "(.*)*!"}, "may not end"),
        ({"target_modules": ".*.*.*.*.*.*.*!"}, "may not end"),
        ({"rank_pattern": {"(a|a)+!": 4}}, "may not end"),
        ({"peft_type": "EVIL"}, "not a PEFT configuration"),
        ({"peft_type": ["LORA"]}, "not a PEFT configuration"),
        ({"r": "many"}, "PEFT cannot put"),
        ({"target_modules": 5}, "PEFT cannot put"),
        ({"task_type": {}}, "adapter_config.json"),
    ],
)
def test_settings_of_an_adapter_that_reach_further(lora, settings, message):
    path = lora / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    assert message in refused(lora)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learner": "../../evil"}, "learner='../../evil' is not known"),
        ({"learner": ["maml"]}, "learner=['maml'] must be of type str"),
        ({"learner": "os:system"}, "learner='os:system' is not known"),
        ({"pooling": {}}, "pooling={} must be of type str"),
        ({"head_scale": 10**400}, "head_scale"),
        ({"use_label_names": "yes"}, "use_label_names='yes' must be of type bool"),
        ({"lora_target_modules": "(.*)*"}, "lora_target_modules='(.*)*' must be a list"),
        ({"model_name_or_path": "../../nowhere"}, "Cannot load the backbone '../../nowhere'"),
        ({"model_name_or_path": "x\0y"}, "Cannot load the backbone"),
        ({"model_name_or_path": "\x1b[2Jx"}, "Cannot load the backbone"),
        ({"x" * 1_000_000: 1}, "unknown key"),
        ({"inner_rule": "y" * 1_000_000}, "inner_rule="),
    ],
    ids=lambda value: str(value)[:30].replace("\0", "0").replace("\x1b", "esc"),
)
def test_settings_of_a_learner_that_are_none(lora, change, message):
    path = lora / "fewshot_config.json"
    manifest = json.loads(path.read_text())
    manifest["config"] |= change
    path.write_text(json.dumps(manifest))
    assert message in refused(lora)


def test_an_adapter_for_another_backbone(lora, tmp_path):
    from transformers import BertConfig, BertModel

    wide = tmp_path / "wide"
    tiny_bert(wide)
    BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=19)).save_pretrained(
        wide
    )
    with pytest.raises(ValueError, match="They belong to another backbone"):
        FewShotAdapter.from_pretrained(lora, model_name_or_path=str(wide))


NASTY = [
    "---\nlicense: mit\n---\n# Owned",
    "a\n\n## Results\n\n100 %",
    "<script>alert(1)</script>",
    "[click](http://evil.org)",
    "https://evil.org www.evil.org me@evil.org",
    "![x](y) `x` | a | b |",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202egnp.exe",
    "half a pair \ud800",
    "x" * 9_000,
    "': !!python/object/apply:os.system ['x']",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_a_card_shows_what_a_stranger_wrote_and_obeys_none_of_it(text, tmp_path):
    """As a label, the name of a data set, licence, language, command and all of the results' names."""
    entry = {"accuracy": 0.5, "baselines": {text: {"accuracy": 0.4}}}
    protocol = {"dataset": text, "hub_id": text, "split": text, "n_way": 5, "classes": [text], text: text}
    info = AdapterInfo(
        [text], [text], {"test": {text: entry}, "protocol": protocol}, f"x {text}", [text[:2000]], text[:2000],
        hub_datasets=[text[:2000]], versions={text: text},
    )  # fmt: skip
    card = model_card(tiny_config("bert"), info)
    card.save(tmp_path / "README.md")
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert len(page) < 100_000
    content, data = ModelCard.load(tmp_path / "README.md").text, ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "fewshot_nlp" and data.tags[:2] == ["few-shot", "meta-learning"]
    assert data.license != "mit"
    outside_code = "".join(content.split("```")[::2])
    for markup in (
        "<script>",
        "[click](",
        "https://evil",
        "www.evil",
        "me@evil",
        "![x]",
        "\n# Owned",
        "\n## Results\n\n100",
    ):
        assert markup not in outside_code
    assert not any(char in page for char in "\x1b\x07\u202e")


def test_a_label_of_ten_megabytes(lora):
    path = lora / "fewshot_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label_names": ["a" * 10_000_000]}))
    assert "label_names holds a text of 10,000,000 characters" in refused(lora)
    with pytest.raises(ValueError, match="results holds a text of 10,000,001 characters"):
        AdapterInfo(results={"test": {"x" * 10_000_001: {"accuracy": 0.5}}})


def test_half_a_pair_of_a_character_is_saved_as_it_came(good, tmp_path):
    adapter = FewShotAdapter.from_pretrained(good["lora"])
    adapter.info.label_names = ["\ud800"]
    adapter.save_pretrained(tmp_path / "again")
    assert FewShotAdapter.from_pretrained(tmp_path / "again").info.label_names == ["\ud800"]


def test_a_save_follows_no_link(good, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    target = shutil.copytree(good["lora"], tmp_path / "target")
    for file in ("README.md", "adapter_model.safetensors"):
        (target / file).unlink()
        (outside / file).write_text("mine")
        (target / file).symlink_to(outside / file)
    FewShotAdapter.from_pretrained(good["lora"]).save_pretrained(target)
    assert {path.name: path.read_text() for path in outside.iterdir()} == {
        "README.md": "mine", "adapter_model.safetensors": "mine",
    }  # fmt: skip
    assert not (target / "README.md").is_symlink()
    assert FewShotAdapter.from_pretrained(target)
