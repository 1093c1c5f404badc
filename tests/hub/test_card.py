"""The model card: the Hub's own parser reads it back, and nothing on it is invented or can break the page."""

import re

import pytest
import yaml
from huggingface_hub import ModelCard

from fewshot_nlp.config import ADAPTERS, LEARNERS, FewShotConfig
from fewshot_nlp.hub.card import ADAPTER_NAMES, SHORT_ADAPTER_NAMES, method_name, model_card
from fewshot_nlp.hub.info import AdapterInfo
from fewshot_nlp.hub.markup import plain
from fewshot_nlp.learners import learner_class

NASTY = "a|b`c\n\x1b[31m<script>alert(1)</script> *x* [l](u) \u202e"
RESULTS = {
    "protocol": {"dataset": "home_intents", "split": "test", "n_way": 5, "episodes": 600, "classes": ["a", NASTY]},
    "test": {
        "1-shot": {
            "accuracy": 0.9312,
            "ci95": 0.0041,
            "episodes": 600,
            "baselines": {"prototypes": {"accuracy": 0.91, "ci95": 0.0052}},
            "paired_gain": {"mean": 0.0212, "ci95": 0.003},
        },
        "5-shot": {"accuracy": 0.98, "ci95": None, "episodes": 1, "baselines": {}},
    },
}


def info(**changes):
    known = {"label_names": ["HassTurnOn", NASTY], "datasets": ["home_intents"], "language": ["en"]}
    return AdapterInfo(**known | {"command": "accelerate launch recipes/prompt_maml.py"} | changes)


def reload(card, tmp_path):
    card.save(tmp_path / "README.md")
    return ModelCard.load(tmp_path / "README.md")


def test_metadata_survives_the_hubs_own_parser(tmp_path):
    card = model_card(FewShotConfig(), info(results=RESULTS))
    data = reload(card, tmp_path).data
    assert data.library_name == "fewshot_nlp"
    assert data.base_model == "sentence-transformers/all-MiniLM-L6-v2"
    assert data.base_model_relation == "adapter"
    assert data.get("datasets") is None
    assert data.language == ["en"]
    assert {"few-shot", "peft", "maml", "prompt-tuning"} <= set(data.tags)
    assert data.metrics == ["accuracy"]
    assert data.get("license") is None
    one, five = data.eval_results
    assert (one.metric_value, one.metric_type, one.dataset_type, one.dataset_split) == (
        0.9312,
        "accuracy",
        "local",
        "test",
    )
    assert one.metric_name == "accuracy, 5-way 1-shot"
    assert one.metric_args == {"episodes": 600, "ci95": 0.0041}
    assert five.metric_value == 0.98
    assert data.to_dict() == card.data.to_dict()


def test_the_table_shows_intervals_baselines_and_gain():
    text = model_card(FewShotConfig(), info(results=RESULTS)).text
    assert "| 1-shot | **93.12 ± 0.41** | 91.00 ± 0.52 |\n| gain, 1-shot |  | +2.12 ± 0.30 |" in text
    assert "| 5-shot | **98.00** | - |\n\n" in text


def test_only_the_best_is_bold_and_fewer_episodes_are_said():
    tuned = {"accuracy": 0.95, "ci95": 0.02, "episodes": 10}
    baselines = {**RESULTS["test"]["1-shot"]["baselines"], "fine_tuning": tuned}
    entry = {**RESULTS["test"]["1-shot"], "baselines": baselines}
    protocol = {**RESULTS["protocol"], "baselines": {"fine_tuning": {"inner_rule": "adam", "inner_steps": 10}}}
    text = model_card(FewShotConfig(), info(results={"protocol": protocol, "test": {"1-shot": entry}})).text
    assert "| 1-shot | 93.12 ± 0.41 | 91.00 ± 0.52 | 95.00 ± 2.00 (first 10) |\n" in text
    assert "| gain, 1-shot |  | +2.12 ± 0.30 | - |\n" in text
    assert "- baselines: fine\\_tuning (inner rule adam, inner steps 10)" in text


@pytest.mark.parametrize(("gain", "bold"), [(-0.01, False), (0.02, True), (-6e-18, True)])
def test_the_best_is_found_on_the_same_episodes(gain, bold):
    """Fewer episodes may be easier ones: not means, but what is paired says which is better."""
    tuned = {"accuracy": 0.95 if bold else 0.90, "ci95": 0.02, "episodes": 10}
    known = RESULTS["test"]["1-shot"]
    gains = {"prototypes": known["paired_gain"], "fine_tuning": {"mean": gain, "ci95": 0.01, "episodes": 10}}
    entry = {**known, "baselines": {**known["baselines"], "fine_tuning": tuned}, "paired_gains": gains}
    text = model_card(FewShotConfig(), info(results={"test": {"1-shot": entry}})).text
    assert ("| **93.12 ± 0.41** |" in text) == bold


def test_the_gain_over_every_baseline_is_shown():
    baselines = {
        name: {"accuracy": 0.9, "episodes": count} for name, count in (("prototypes", 600), ("fine_tuning", 9))
    }
    gains = {name: {"mean": 0.03, "ci95": 0.01, "episodes": each["episodes"]} for name, each in baselines.items()}
    entry = {**RESULTS["test"]["1-shot"], "baselines": baselines, "paired_gains": gains}
    text = model_card(FewShotConfig(), info(results={"test": {"1-shot": entry}})).text
    assert "|  | this adapter | prototypes | fine tuning |\n" in text
    assert "| gain, 1-shot |  | +3.00 ± 1.00 | +3.00 ± 1.00 (first 9) |" in text
    assert "A gain, of this adapter over each of the others, is paired" in text


def test_no_gain_is_none_also_where_rounding_left_it_below_zero():
    gain = {"mean": -6e-18, "ci95": 0.01, "episodes": 600}
    entry = {**RESULTS["test"]["1-shot"], "paired_gain": gain, "paired_gains": {"prototypes": gain}}
    text = model_card(FewShotConfig(), info(results={"test": {"1-shot": entry}})).text
    assert "| gain, 1-shot |  | +0.00 ± 1.00 |" in text


def test_the_averaging_of_f1_is_named():
    entry = {**RESULTS["test"]["1-shot"], "metrics": {"accuracy": 0.9312, "macro_f1": 0.9205}}
    text = model_card(FewShotConfig(), info(results={"test": {**RESULTS["test"], "1-shot": entry}})).text
    assert "| this adapter | its macro F1 | prototypes |" in text
    assert "| 92.05 | 91.00 ± 0.52 |\n| gain, 1-shot |  |  | +2.12 ± 0.30 |" in text
    assert "| 5-shot | **98.00** | - | - |" in text
    assert "Macro F1, in percent too, is the mean over classes" in text
    assert "F1" not in model_card(FewShotConfig(), info(results=RESULTS)).text


def test_hashes_of_episodes_are_shown_by_shots():
    protocol = {**RESULTS["protocol"], "episodes_hash": {"1-shot": "0f" * 32, "5-shot": "a1" * 32}}
    text = model_card(FewShotConfig(), info(results={**RESULTS, "protocol": protocol})).text
    assert f"- episodes hash: 1-shot {'0f' * 32}, 5-shot {'a1' * 32}\n" in text


def test_without_results_no_figure_is_shown(tmp_path):
    card = reload(model_card(FewShotConfig(), info()), tmp_path)
    assert "No results were recorded" in card.text
    assert card.data.eval_results is None
    assert card.data.get("metrics") is None
    section = card.text.split("## Results")[1].split("##")[0]
    assert not re.search(r"\d", section)


def test_labels_cannot_break_the_page(tmp_path):
    card = model_card(FewShotConfig(), info(results=RESULTS, command=f"run --text '{NASTY}' ```"))
    text = reload(card, tmp_path).text
    prose = text.split("Made by:")[0]
    assert "<script" not in prose
    assert "\x1b" not in text and "\u202e" not in text
    assert r"a\|b\`c\\u000a" in prose
    assert text.count("````bash") == 1, "the fence must be longer than the backticks in the command"
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1


def test_plain_cuts_long_names():
    assert plain("x" * 500) == "x" * 79 + "…"
    assert plain("naïve 数字") == "naïve 数字"


def test_long_lists_are_cut():
    text = model_card(FewShotConfig(), info(label_names=[f"class{i}" for i in range(100)])).text
    assert "100 classes seen in training: class0, class1" in text
    assert "class59 and 40 more" in text and "class60" not in text


def test_a_local_backbone_and_data_file_are_not_published_as_hub_ids(tmp_path):
    backbone = tmp_path / "private" / "tiny_bert"
    card = model_card(
        FewShotConfig(model_name_or_path=str(backbone)), info(datasets=[str(tmp_path / "mine.csv")], results=RESULTS)
    )
    assert card.data.get("base_model") is None and card.data.get("datasets") is None
    assert str(tmp_path) not in str(card)
    assert r"tiny\_bert" in card.text and "mine.csv" in card.text


def test_only_data_from_the_hub_are_published_under_a_hub_id(tmp_path):
    """A file of ours, or an embedded set, may have the very name of someone's data set."""
    known = {"datasets": ["banking77", "someone/intents"], "hub_datasets": ["someone/intents"]}
    local = reload(model_card(FewShotConfig(), info(**known, results=RESULTS)), tmp_path)
    assert local.data.datasets == ["someone/intents"]
    assert "- data: banking77, someone/intents\n" in local.text
    assert {(one.dataset_type, one.dataset_name) for one in local.data.eval_results} == {("local", "home_intents")}
    protocol = {**RESULTS["protocol"], "dataset": "theirs", "hub_id": "someone/intents"}
    measured = reload(model_card(FewShotConfig(), info(**known, results={**RESULTS, "protocol": protocol})), tmp_path)
    found = {(one.dataset_type, one.dataset_name) for one in measured.data.eval_results}
    assert found == {("someone/intents", "theirs")}
    assert "- hub id: someone/intents" in measured.text
    protocol["hub_id"] = None
    assert "hub id" not in model_card(FewShotConfig(), info(**known, results={**RESULTS, "protocol": protocol})).text


def test_no_evaluation_entry_without_a_known_data_set():
    results = {"test": RESULTS["test"]}
    card = model_card(FewShotConfig(), info(results=results, datasets=["a", "b"]))
    assert card.data.eval_results is None
    assert "93.12 ± 0.41" in card.text


def test_usage_names_the_repository_and_plain_peft():
    text = model_card(FewShotConfig(), info(), repo_id="me/prompt").text
    assert 'FewShotClassifier.from_pretrained("me/prompt")' in text
    assert 'AutoModel.from_pretrained("sentence-transformers/all-MiniLM-L6-v2"), "me/prompt")' in text
    full = model_card(FewShotConfig(adapter="full"), info(), repo_id="me/full")
    assert "from peft" not in full.text and "peft" not in full.data.tags
    assert full.data.base_model_relation == "finetune"


def test_the_curve_and_the_licence_appear_only_when_known():
    assert "learning_curve.png" not in model_card(FewShotConfig(), info()).text
    card = model_card(FewShotConfig(), info(learning_curve="somewhere/curve.png", license="apache-2.0"))
    assert "](learning_curve.png)" in card.text
    assert card.data.license == "apache-2.0" and "No licence" not in card.text


def test_tokens_are_removed():
    card = str(model_card(FewShotConfig(), info(command="train.py --hub_token=s3cret --x hf_abcdefghijklmnop --lr 1")))
    assert "s3cret" not in card and "hf_abc" not in card
    assert "--hub_token=*** --x *** --lr 1" in card


def test_every_learner_and_adapter_has_a_name():
    assert all(learner_class(name).title for name in LEARNERS)
    assert set(ADAPTER_NAMES) == set(SHORT_ADAPTER_NAMES) == set(ADAPTERS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter": "prompt_tuning"}, "MAML, soft prompt"),
        ({"adapter": "full"}, "MAML, all weights"),
        ({"adapter": "lora", "learner": "fomaml"}, "First-order MAML, LoRA"),
        ({"adapter": "lora", "use_dora": True, "learner": "reptile"}, "Reptile, DoRA"),
        ({"adapter": "none", "learner": "protonet"}, "Prototypical networks, head alone"),
        ({"adapter": "bitfit", "learner": "imaml"}, "iMAML, biases"),
    ],
)
def test_a_title_names_method_and_adapter_in_words(settings, words):
    assert method_name(FewShotConfig(**settings)) == words


@pytest.mark.parametrize("test", [{"1-shot": {"accuracy": "high"}}, {"1-shot": 0.9}, ["1-shot"]])
def test_results_of_another_form_are_refused(test):
    with pytest.raises(ValueError, match=r"results\['test'\]"):
        model_card(FewShotConfig(), info(results={"test": test}))


def test_the_yaml_block_is_plain_yaml():
    content = str(model_card(FewShotConfig(), info(results=RESULTS)))
    assert isinstance(yaml.safe_load(content.split("---\n")[1]), dict)


@pytest.mark.parametrize(("tested", "claimed"), [(["x"], True), (["x", "HassTurnOn"], False), (None, False)])
def test_unseen_classes_are_claimed_only_where_it_is_known(tested, claimed):
    results = {**RESULTS, "protocol": {"dataset": "home_intents", "classes": tested}}
    text = model_card(FewShotConfig(), info(results=results)).text
    assert ("on classes that were not seen in training" in text) is claimed


@pytest.mark.parametrize(("settings", "protocol"), [({"batch_norm": "transductive"}, {}), ({}, {"transductive": True})])
def test_answers_that_depend_on_one_another_are_said(settings, protocol):
    assert "depends on the others" not in model_card(FewShotConfig(), info(results=RESULTS)).text
    results = {**RESULTS, "protocol": {**RESULTS["protocol"], **protocol}}
    text = model_card(FewShotConfig(**settings), info(results=results, kind="image")).text
    assert "- Transductive: the images of one call of `predict` are answered together" in text


def test_the_first_sentence_has_its_article():
    assert "\n\nAn encoder (all weights trained) for" in str(model_card(FewShotConfig(adapter="full"), info()))
    assert "\n\nA LoRA adapter for" in str(model_card(FewShotConfig(adapter="lora"), info()))
