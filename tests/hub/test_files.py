"""Files of a saved adapter: all or nothing on the way out, nothing unchecked on the way in."""

import pickle

import pytest

from fewshot_nlp.config import CONFIG_NAME
from fewshot_nlp.hub.files import check_token, read_tensors, replaced_files, resolve_folder


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")


def listing(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_files_appear_together(tmp_path):
    target = tmp_path / "a" / "b"
    with replaced_files(target) as staging:
        write(staging, fewshot_config__json="{}", adapter_config__json="{}")
        write(staging / "chat_templates", one__jinja="x")
        assert not (target / CONFIG_NAME).exists()
    assert listing(target) == ["adapter_config.json", "chat_templates/one.jinja", CONFIG_NAME]


def test_all_files_can_be_read_by_whom_the_folder_is_shared_with(tmp_path):
    with replaced_files(tmp_path / "a") as staging:
        write(staging, fewshot_config__json="{}", adapter_model__safetensors="x")
        (staging / CONFIG_NAME).chmod(0o644)
        (staging / "adapter_model.safetensors").chmod(0o600)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a").iterdir()} == {0o644}


def test_a_save_that_fails_leaves_the_good_one(tmp_path):
    write(tmp_path, fewshot_config__json="good", adapter_model__safetensors="good")
    with pytest.raises(RuntimeError, match="disk full"), replaced_files(tmp_path) as staging:
        write(staging, fewshot_config__json="half")
        raise RuntimeError("disk full")
    assert listing(tmp_path) == ["adapter_model.safetensors", CONFIG_NAME]
    assert (tmp_path / CONFIG_NAME).read_text(encoding="utf-8") == "good"


def test_a_save_that_fails_leaves_no_new_folder(tmp_path):
    with pytest.raises(RuntimeError, match="disk full"), replaced_files(tmp_path / "new"):
        raise RuntimeError("disk full")
    assert not (tmp_path / "new").exists()


def test_weights_of_an_earlier_save_go_and_other_files_stay(tmp_path):
    write(tmp_path, fewshot_config__json="old", config__json="{}", model__safetensors="old", notes__txt="mine")
    write(tmp_path, learning_curve__png="old")
    write(tmp_path / "checkpoint-10", model__safetensors="old")
    with replaced_files(tmp_path) as staging:
        write(staging, fewshot_config__json="new", adapter_config__json="{}", adapter_model__safetensors="new")
    expected = ["adapter_config.json", "adapter_model.safetensors", "checkpoint-10/model.safetensors", CONFIG_NAME]
    assert listing(tmp_path) == [*expected, "notes.txt"]


def test_another_model_is_not_overwritten(tmp_path):
    write(tmp_path, config__json="{}", model__safetensors="backbone")
    with pytest.raises(ValueError, match=r"holds another model \(config\.json\)"), replaced_files(tmp_path) as staging:
        write(staging, model__safetensors="new")
    assert (tmp_path / "model.safetensors").read_text(encoding="utf-8") == "backbone"


def test_a_file_is_no_save_directory(tmp_path):
    write(tmp_path, file="x")
    with pytest.raises(ValueError, match=r"is a file\. Name a folder"), replaced_files(tmp_path / "file"):
        pass


def test_an_unwritable_save_directory(tmp_path):
    write(tmp_path, file="x")
    with pytest.raises(ValueError, match=r"cannot be written \(Not a directory\)"), replaced_files(tmp_path / "file/a"):
        pass


def test_plain_peft_adapters_are_explained(tmp_path):
    write(tmp_path, adapter_config__json="{}")
    with pytest.raises(ValueError, match=r"plain PEFT adapter.*PeftModel\.from_pretrained"):
        resolve_folder(tmp_path)


def test_other_folders_are_no_adapters(tmp_path):
    with pytest.raises(ValueError, match=r"fewshot_config\.json is missing"):
        resolve_folder(tmp_path)


def test_a_file_is_no_adapter(tmp_path):
    write(tmp_path, file="x")
    with pytest.raises(ValueError, match="is a file"):
        resolve_folder(tmp_path / "file")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        resolve_folder(tmp_path / "missing")


def test_a_repository_that_is_not_cached(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not in the local cache.*Drop local_files_only"):
        resolve_folder("user/none", cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("token", ["hf_secret\n", "hf secret", "hf_sécret", "hf_secret\x00", ""])
def test_a_token_that_cannot_be_sent_is_not_shown(token):
    with pytest.raises(ValueError, match="token is empty or has") as caught:
        check_token(token)
    assert "secret" not in str(caught.value)


def test_tokens_that_can_be_sent():
    for token in ("hf_abc123", True, False, None):
        check_token(token)


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"w\.safetensors is missing in .*: the head"):
        read_tensors(tmp_path / "w.safetensors", "the head")


@pytest.mark.parametrize(
    "content", [b"", b"\x08\0\0\0\0\0\0\0{", pickle.dumps({"a": 1})], ids=["empty", "cut", "pickle"]
)
def test_damaged_weights_are_refused(tmp_path, content):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.safetensors is damaged"):
        read_tensors(tmp_path / "w.safetensors", "the head")
