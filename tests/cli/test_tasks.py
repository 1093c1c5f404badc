"""Where the tasks of a run come from, as the command line says it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset, DatasetDict, load_dataset
from huggingface_hub import ModelCard

from fewshot_nlp.cli import train
from fewshot_nlp.cli.parser import parse
from fewshot_nlp.cli.train import execute, main, prepare
from fewshot_nlp.data import loading
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.learners.centring import WHITENING, centred

PROTONET = ["--learner", "protonet", "--head", "prototype"]
SAVING = ["--save_strategy", "steps", "--save_steps", "2"]


def prepared(argv):
    AcceleratorState._reset_state(reset_partial_state=True)
    return prepare(parse(argv))


def test_queries_out_of_scope_in_training_and_in_evaluation(tiny):
    run = prepared([*tiny, "--n_out_of_scope", "3", "--eval_n_out_of_scope", "1"])
    assert {len(run.trainer.train_sampler[i].out_of_scope) for i in range(20)} == {3}
    validation = [spec for specs in run.trainer.eval_specs.values() for spec in specs]
    test = [sampler[i] for sampler in run.test.values() for i in range(4)]
    assert {len(spec.out_of_scope) for spec in [*validation, *test]} == {1}


def test_without_being_asked_for_there_are_none(tiny):
    run = prepared(tiny)
    specs = [run.trainer.train_sampler[0], *(spec for specs in run.trainer.eval_specs.values() for spec in specs)]
    assert not any(spec.out_of_scope for spec in specs)


def test_results_name_the_queries_out_of_scope(tiny, tmp_path):
    main([*tiny, "--n_out_of_scope", "2", "--eval_n_out_of_scope", "1"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["protocol"]["n_out_of_scope"] == 1
    assert all(0 <= entry["accuracy"] <= 1 for entry in results["test"].values())


def test_the_revision_of_a_data_set_is_asked_of_the_hub(tiny, data_file, monkeypatch):
    asked = []

    def hub(name, config_name=None, revision=None):
        asked.append((name, config_name, revision))
        return load_dataset("json", data_files=str(data_file))

    monkeypatch.setattr(
        loading, "load_dataset_builder", lambda *_, **__: SimpleNamespace(config=SimpleNamespace(name="default"))
    )
    monkeypatch.setattr(loading, "load_dataset", hub)
    run = prepared([*tiny, "--dataset_name", "someone/intents", "--dataset_revision", "v1.2"])
    assert asked == [("someone/intents", None, "v1.2")]
    assert run.pools["train"].name == "someone/intents"


def write(path, classes, count=8, text="{name} number {i}"):
    lines = [{"text": text.format(name=name, i=i), "label": name} for name in classes for i in range(count)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def other_file(tmp_path):
    return write(tmp_path / "animals.jsonl", ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen"])


def pools_of(run, count=60):
    return [run.trainer.train_sampler[i].pool for i in range(count)]


def test_a_mixture_trains_on_all_and_evaluates_on_the_first(tiny, other_file, tmp_path, capsys):
    main([*tiny, "--mixture_dataset_names", str(other_file), "--duplicates", "drop"])
    assert "training tasks from sentences (6 classes), animals (4 classes)" in capsys.readouterr().out
    out = tmp_path / "out"
    manifest = json.loads((out / "fewshot_config.json").read_text())
    assert manifest["datasets"] == ["sentences", "animals"]
    assert len(manifest["label_names"]) == 10
    protocol = json.loads((out / "results.json").read_text())["protocol"]
    assert protocol["dataset"] == "sentences"
    assert set(manifest["label_names"]).isdisjoint(protocol["classes"])
    run = prepared([*tiny, "--mixture_dataset_names", str(other_file), "--output_dir", str(tmp_path / "again")])
    assert set(pools_of(run)) == {"sentences", "animals"}
    for specs in run.trainer.eval_specs.values():
        assert {spec.pool for spec in specs} == {"sentences"}
    assert {sampler.pool.name for sampler in run.test.values()} == {"sentences"}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [(["9", "1"], {"sentences", "animals"}), (["1", "0"], {"sentences"}), (["0", "1"], {"animals"})],
)
def test_weights_say_how_often(tiny, other_file, weights, expected):
    run = prepared([*tiny, "--mixture_dataset_names", str(other_file), "--mixture_weights", *weights])
    drawn = pools_of(run)
    assert set(drawn) == set(run.training) == expected
    if len(expected) == 2:
        assert drawn.count("sentences") > 2 * drawn.count("animals")


def test_one_data_set_is_drawn_as_without_a_mixture(tiny, other_file):
    alone, weighed = (
        prepared([*tiny, *argv]).trainer.train_sampler
        for argv in ([], ["--mixture_dataset_names", str(other_file), "--mixture_weights", "1", "0"])
    )
    assert [alone[i] for i in range(20)] == [weighed[i] for i in range(20)]


def test_files_of_one_name_are_told_apart(tiny, data_file, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    same_name = write(tmp_path / "elsewhere" / data_file.name, ["ant", "bee", "cat", "dog"])
    run = prepared([*tiny, "--mixture_dataset_names", str(same_name)])
    assert list(run.training) == ["sentences", "sentences-2"]
    specs = [run.trainer.train_sampler[i] for i in range(20)]
    episode = run.trainer.reader(next(spec for spec in specs if spec.pool == "sentences-2"))
    assert set(episode.spec.classes) <= {"ant", "bee", "cat", "dog"}


def test_what_is_evaluated_is_not_learned_from_a_mixture(tiny, tmp_path):
    pools = prepared([*tiny, "--duplicates", "drop"]).pools
    tested, validated = pools["test"].label_names[0], pools["validation"].label_names[0]
    (text, *_) = pools["test"].texts(pools["test"].rows_by_class[tested])
    others = ["ant", "bee", "cat"]
    path = write(tmp_path / "own_splits.jsonl", [*others, tested, validated])
    with path.open("a") as file:
        file.write("\n" + json.dumps({"text": text, "label": "ant"}))
    folder = tmp_path / "own"
    folder.mkdir()
    path.rename(folder / "train.jsonl")
    write(folder / "test.jsonl", ["x", "y"])
    argv = [*tiny, "--mixture_dataset_names", str(folder), "--duplicates"]
    with pytest.raises(ValueError, match=r"would train on what is evaluated: a text of 'ant', the class '\w+ \w+'"):
        prepared([*argv, "error"])
    run = prepared([*argv, "drop"])
    pool = run.training["own"]
    assert pool.label_names == others
    assert {len(rows) for rows in pool.rows_by_class.values()} == {8}
    assert pool.num_dropped == 17
    assert len(prepared([*argv, "keep"]).training["own"].label_names) == 5


@pytest.mark.parametrize("classes", [["bad", "good"], ["no", "perhaps", "yes"]])
def test_a_data_set_of_few_classes_gives_all_of_them_to_training(tiny, tmp_path, classes):
    path = write(tmp_path / "reviews.jsonl", classes)
    run = prepared([*tiny, "--mixture_dataset_names", str(path), "--duplicates", "drop"])
    assert run.training["reviews"].label_names == classes
    assert "reviews" in pools_of(run)
    with pytest.raises(ValueError, match=rf"'reviews' has {len(classes)} training classes, fewer than n_way=5\. Low"):
        prepared([*tiny, "--mixture_dataset_names", str(path), "--n_way", "5", "--duplicates", "drop"])
    # Alone it has nothing to be evaluated on.
    with pytest.raises(ValueError, match=rf"split would have no class: 0\.25 of {len(classes)} classes"):
        prepared([*tiny, "--dataset_name", str(path)])


def test_without_training_classes_a_data_set_is_only_evaluated_on(tiny, other_file, tmp_path):
    names = [name for pool in prepared(tiny).pools.values() for name in pool.label_names]
    split_file = tmp_path / "split.json"
    split_file.write_text(json.dumps({"validation": names[:6], "test": names[6:]}))
    argv = [*tiny, "--split_file", str(split_file), "--mixture_dataset_names", str(other_file)]
    with pytest.raises(ValueError, match=r"sentences.jsonl' has no training classes, only validation, test"):
        prepared(argv)
    run = prepared([*argv, "--mixture_weights", "0", "1"])
    assert list(run.training) == ["animals"]


def test_languages_are_named_of_what_was_learned_and_of_what_was_tested(tiny, tmp_path, monkeypatch):
    def sentences(language="en"):
        splits = {"train": "abcd", "validation": "efgh", "test": "ijkl"}
        # No class is of both languages.
        classes = {split: [f"{language} {name}" for name in names] for split, names in splits.items()}
        rows = {split: [(f"{c} {i}", c) for c in names for i in range(6)] for split, names in classes.items()}
        return DatasetDict(
            {split: Dataset.from_dict({"text": [t for t, _ in found], "label": [c for _, c in found]})
             for split, found in rows.items()}
        )  # fmt: skip

    monkeypatch.setitem(loading.EMBEDDED, "home_intents", sentences)
    monkeypatch.setattr(loading, "home_intents", sentences)
    argv = [*tiny, "--learner", "domain_adversarial", "--head", "prototype", "--dataset_name", "home_intents"]
    argv += ["--dataset_config_name", "de", "--mixture_dataset_names", "home_intents", "--mixture_weights", "0", "1"]
    main([*argv, "--n_unlabelled", "4", "--adapter", "lora"])
    protocol = json.loads((tmp_path / "out" / "results.json").read_text())["protocol"]
    assert (protocol["dataset"], protocol["dataset_config_name"]) == ("home_intents", "de")
    assert protocol["trained_on"] == [{"dataset": "home_intents-en", "dataset_config_name": "en"}]
    assert protocol["unlabelled"] == [{"dataset": "home_intents", "dataset_config_name": "de"}]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    for line in (
        "- dataset config name: de",
        r"- trained on: home\_intents-en (en)",
        r"- unlabelled: home\_intents (de)",
        r"- data: home\_intents-en",
    ):
        assert f"\n{line}\n" in card.text
    assert card.data.language == ["de", "en"]
    assert {each.dataset_config for each in card.data.eval_results} == {"de"}


def test_classes_that_are_numbers_are_not_compared(tiny, tmp_path):
    files = [write(tmp_path / f"{kind}.jsonl", range(8), text=f"{kind} {{name}} {{i}}") for kind in ("a", "b")]
    argv = [*tiny, "--dataset_name", str(files[0]), "--mixture_dataset_names", str(files[1]), "--duplicates", "error"]
    assert len(prepared(argv).training["b"].label_names) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mixture_dataset_names", "nowhere/at_all.csv"], "nowhere/at_all.csv"),
        (["--mixture_dataset_names", "OTHER", "--text_column_name", "utterance"], "text_column_name='utterance'"),
        (["--mixture_weights", "1", "2"], "mixture_weights=[1.0, 2.0] weighs nothing. Set mixture_dataset_names"),
        (["--mixture_dataset_names", "OTHER", "--mixture_weights", "1"], "must be a list of 2 weights"),
        (["--mixture_dataset_names", "OTHER", "--mixture_weights", "1", "-1"], "mixture_weights=-1.0 is out of range"),
        (["--mixture_dataset_names", "OTHER", "--mixture_weights", "0", "0"], "must not be all zero"),
        (["--mixture_dataset_names", "OTHER", "--n_way", "5"], "'animals' has 4 training classes, fewer than n_way=5"),
        (["--dataset_revision", "v1.2"], "sentences.jsonl' is not on the Hub and has no revision 'v1.2'"),
        (["--dataset_name", "home_intents", "--dataset_revision", "v1.2"], "dataset='home_intents' is not on the Hub"),
        (["--n_out_of_scope", "-1"], "n_out_of_scope=-1 is out of range"),
        (["--eval_n_out_of_scope", "-1"], "eval_n_out_of_scope=-1 is out of range"),
        (["--n_out_of_scope", "99"], "The train pool of 'sentences' cannot give n_out_of_scope=99 queries"),
        (["--eval_n_out_of_scope", "1", "--eval_n_way", "3"], "The validation pool of 'sentences' has 3 classes"),
    ],
)
def test_bad_tasks_are_one_line_before_training(tiny, tmp_path, other_file, argv, message, capsys):
    argv = [str(other_file) if item == "OTHER" else item for item in argv]
    with pytest.raises(SystemExit) as stopped:
        main([*tiny, *argv])
    assert message in str(stopped.value)
    assert str(stopped.value).startswith("error: ")
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--n_out_of_scope", "2"], r"train_sampler\.n_out_of_scope=0, and this run has .*n_out_of_scope=2"),
        (["--mixture_dataset_names", "OTHER"], r"train_pools={'sentences': '\w+'}, and this run has .*'animals': "),
    ],
)
def test_a_run_on_other_tasks_is_not_resumed(tiny, other_file, argv, message, capsys):
    main([*tiny, *SAVING])
    capsys.readouterr()
    argv = [str(other_file) if item == "OTHER" else item for item in argv]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main([*tiny, *SAVING, *argv, "--resume_from_checkpoint", "true"])
    assert capsys.readouterr().out == ""


def test_training_tasks_of_clusters(tiny):
    clusters = ["--clusters_per_class", "2", "--min_examples", "1"]
    run = prepared([*tiny, *clusters])
    specs = [run.trainer.train_sampler[i] for i in range(20)]
    classes = run.pools["train"].label_names
    assert {name.rpartition("/")[0] for spec in specs for name in spec.classes} <= set(classes)
    assert {name.rpartition("/")[2] for spec in specs for name in spec.classes} == {"0", "1"}
    # What is evaluated, and what is reported, are the data set's own classes.
    validation = {name for each in run.trainer.eval_specs.values() for spec in each for name in spec.classes}
    assert validation <= set(run.pools["validation"].label_names)
    assert run.training["sentences"].label_names == classes
    assert run.clusters == len(run.trainer.train_sampler.pool.label_names)
    again = prepared([*tiny, *clusters])
    assert [again.trainer.train_sampler[i] for i in range(20)] == specs


def test_more_clusters_in_an_episode_than_there_are_classes(tiny):
    n_way = 2 * len(prepared(tiny).pools["train"].label_names)
    argv = [*tiny, "--n_way", str(n_way), "--eval_n_way", "2", "--n_query", "1"]
    with pytest.raises(ValueError, match=f"n_way={n_way}"):
        prepared(argv)
    run = prepared([*argv, "--clusters_per_class", "3"])
    assert len(run.trainer.train_sampler[0].classes) == n_way


def test_a_run_on_clusters_goes_on_where_it_was(tiny, tmp_path, capsys):
    argv = [*tiny, "--clusters_per_class", "2", *SAVING]
    main(argv)
    assert "clusters of the training classes" in capsys.readouterr().out
    whole = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    AcceleratorState._reset_state(reset_partial_state=True)
    main([*argv, "--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")])
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == whole


def test_the_covariance_is_of_what_training_made(tiny, tmp_path, monkeypatch):
    answering = []
    monkeypatch.setattr(train, "tested", lambda *given: answering.append(given[2].params) or {})
    argv = [*tiny, "--center_features", "true", "--whiten_features", "0.5", "--clusters_per_class", "2", *PROTONET]
    run = prepared(argv)
    pools = list(run.training.values())
    # Where training begins it is that of the training classes, and not of their clusters.
    begun = centred(run.learner, run.learner.init_params(), pools, run.settings.args.seed)
    assert torch.equal(run.trainer.params[WHITENING], begun[WHITENING])
    execute(run)
    trained = run.trainer.detached_params()
    kept = FewShotAdapter.from_pretrained(tmp_path / "out").params
    found = centred(run.learner, trained, pools, run.settings.args.seed)
    assert all(torch.equal(kept[name], found[name]) for name in found)
    assert all(torch.equal(answering[0][name], found[name]) for name in found)
    assert not torch.equal(kept[WHITENING], trained[WHITENING])


def test_features_that_training_made_alike_are_said_in_one_line(tiny, monkeypatch):
    run = prepared([*tiny, "--whiten_features", "0.5", *PROTONET])

    def alike(*_):
        raise ValueError("no class here has two examples that differ")

    monkeypatch.setattr(train, "centred", alike)
    with pytest.raises(FloatingPointError, match="Training made all features alike"):
        execute(run)


def test_clusters_are_told_by_the_names_of_their_classes(tiny):
    run = prepared([*tiny, "--clusters_per_class", "2", "--use_label_names", "true"])
    sampler, reader = run.trainer.train_sampler, run.trainer.reader
    said = {sampler.pool.readable_name(name) for name in sampler.pool.label_names}
    assert said == {run.pools["train"].readable_name(name) for name in run.pools["train"].label_names}
    assert reader(sampler[0]).support.names is not None


def test_clusters_cannot_be_answered_by_name(tiny):
    with pytest.raises(ValueError, match="clusters_per_class=2"):
        prepared([*tiny, "--clusters_per_class", "2", "--head", "verbalizer"])


def test_a_target_that_no_training_task_is_of_is_refused(tiny):
    argv = [*tiny, "--learner", "joint", "--learner_kwargs"]
    assert prepared([*argv, '{"target": "sentences"}']).learner.options.target == "sentences"
    with pytest.raises(ValueError, match=r"target='sentence' is none of the data sets .* Use one of: sentences\."):
        prepared([*argv, '{"target": "sentence"}'])
    with pytest.raises(ValueError, match=r"target='sentences' is none .*: sentences-\d+-clusters\."):
        prepared([*argv, '{"target": "sentences"}', "--clusters_per_class", "2"])
