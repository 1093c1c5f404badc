"""fewshot_config.json: what is written is read, and what is wrong is refused by name."""

import json

import pytest

from fewshot_nlp.config import CONFIG_NAME, FewShotConfig
from fewshot_nlp.hub.info import AdapterInfo, read_manifest, without_tokens, write_manifest


@pytest.fixture
def folder(tmp_path):
    info = AdapterInfo(["a", "b"], ["home_intents"], {"test": {}}, "run", ["en"], "mit", versions={"torch": "2"})
    info.hub_datasets = ["someone/intents"]
    write_manifest(tmp_path, FewShotConfig(learner="reptile", head_init="zero"), info)
    return tmp_path


def change(folder, **changes):
    path = folder / CONFIG_NAME
    content = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        if value is None:
            del content[key]
        else:
            content[key] = value
    path.write_text(json.dumps(content), encoding="utf-8")


def test_round_trip(folder):
    config, info = read_manifest(folder)
    assert config == FewShotConfig(learner="reptile", head_init="zero")
    assert info == AdapterInfo(
        label_names=["a", "b"],
        datasets=["home_intents"],
        hub_datasets=["someone/intents"],
        results={"test": {}},
        command="run",
        language=["en"],
        license="mit",
        versions={"torch": "2"},
    )
    assert FewShotConfig.from_json_file(folder / CONFIG_NAME) == config


def test_unknown_keys_are_refused(folder):
    change(folder, label_nmaes=[])
    with pytest.raises(ValueError, match=r"'label_nmaes'\. Did you mean 'label_names'"):
        read_manifest(folder)


@pytest.mark.parametrize("key", ["results", "learning_curve"])
def test_fields_kept_elsewhere_are_unknown_keys(folder, key):
    change(folder, **{key: {}})
    with pytest.raises(ValueError, match=f"unknown key {key!r}"):
        read_manifest(folder)


def test_unknown_settings_are_refused(folder):
    change(folder, config={"learnr": "maml"})
    with pytest.raises(ValueError, match=r"'learnr'\. Did you mean 'learner'"):
        read_manifest(folder)


def test_settings_are_checked(folder):
    change(folder, config={"learner": "magic"})
    with pytest.raises(ValueError, match="learner='magic'"):
        read_manifest(folder)


def test_a_later_format_asks_for_an_upgrade(folder):
    change(folder, format_version=2, library_version="9.9")
    with pytest.raises(ValueError, match=r"format_version=2.*fewshot_nlp 9\.9: upgrade"):
        read_manifest(folder)


@pytest.mark.parametrize("found", [None, "1", True, 0])
def test_a_bad_format_version_is_refused(folder, found):
    change(folder, format_version=found)
    with pytest.raises(ValueError, match="format_version="):
        read_manifest(folder)


def test_missing_settings_are_refused(folder):
    change(folder, config=None)
    with pytest.raises(ValueError, match="no key 'config'"):
        read_manifest(folder)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe", b"[" * 100_000], ids=["cut", "empty", "bytes", "deep"])
@pytest.mark.parametrize("name", [CONFIG_NAME, "results.json"])
def test_damaged_json_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged"):
        read_manifest(folder)


def test_json_of_another_kind_is_refused(folder):
    (folder / CONFIG_NAME).write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="must hold a JSON object, not list"):
        read_manifest(folder)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("label_names", "abc"),
        ("datasets", [1]),
        ("hub_datasets", [None]),
        ("license", 3),
        ("versions", []),
        ("results", []),
    ],
)
def test_fields_of_the_wrong_kind_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        AdapterInfo(**{field: value})


@pytest.mark.parametrize(
    "text",
    [
        "x hf_0123456789abcdef",
        "--token s3cret",
        "--hub-token=s3cret",
        "--hub_token 's3cret'",
        'token "x" --token "s3cret"',
    ],
)
def test_tokens_are_removed_wherever_they_are(text):
    cleaned = json.dumps(without_tokens({"a": [text], text: 1}))
    assert "s3cret" not in cleaned and "0123456789" not in cleaned and "***" in cleaned


def test_other_arguments_stay():
    command = "train.py --num_virtual_tokens 8 --lr 1e-3"
    assert without_tokens(command) == command
