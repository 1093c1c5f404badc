import json
from types import SimpleNamespace

from fewshot_nlp.data import EpisodeSampler, save_episodes
from fewshot_nlp.evaluation import build_protocol, split_hash
from tests.data.toy_data import make_pool


def pool(split, names):
    return SimpleNamespace(
        name="animals", split=split, label_names=names, fingerprint=f"hash of {split}", hub_id="someone/animals",
        config_name="wild", num_dropped=1, num_shared=2,
    )  # fmt: skip


def test_protocol():
    pools = {"train": pool("train", ["bus", "car"]), "test": pool("test", ["dog", "eel"])}
    training = {"train": pools["train"], "more": pool("train", ["fly"])}
    shape = {"n_way": 2, "shots": [1, 5], "n_query": 5, "episodes": 600, "seed": 7}
    protocol = build_protocol(pools, **shape, transductive=False, uses_label_names=True, training=training)
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol | {"split_hash": "", "interval": ""} == {
        "dataset": "animals",
        "dataset_config_name": "wild",
        "hub_id": "someone/animals",
        "split": "test",
        # Of three pools; the one that is in both places counts once.
        "leakage": {"dropped": 3, "kept": 6},
        "split_hash": "",
        "pool_fingerprint": "hash of test",
        "classes": ["dog", "eel"],
        "n_way": 2,
        "shots": [1, 5],
        "n_query": 5,
        "n_out_of_scope": 0,
        "episodes": 600,
        "seed": 7,
        "episodes_hash": {},
        "transductive": False,
        "uses_label_names": True,
        "baselines": {},
        "trained_on": [{"dataset": "animals", "dataset_config_name": "wild"}] * 2,
        "unlabelled": [],
        "interval": "",
    }


def test_the_episodes_of_each_run_are_known_by_the_hash_of_their_list(tmp_path):
    pools = {"test": make_pool(dict.fromkeys("abcd", 9), split="test")}
    shape = {"n_way": 3, "n_query": 2, "seed": 4}
    samplers = {f"{k}-shot": EpisodeSampler(pools["test"], k_shot=k, **shape) for k in (1, 5)}
    protocol = build_protocol(pools, **shape, shots=[1, 5], episodes=6, transductive=False, samplers=samplers)
    assert json.loads(json.dumps(protocol)) == protocol
    for k in (1, 5):
        saved = save_episodes(tmp_path / "list.jsonl", EpisodeSampler(pools["test"], k_shot=k, **shape, num_episodes=6))
        assert protocol["episodes_hash"][f"{k}-shot"] == saved
    assert len(set(protocol["episodes_hash"].values())) == 2


def test_split_hash_is_of_sets():
    split = {"train": ["bus", "car"], "test": ["dog", "eel"]}
    assert split_hash(split) == split_hash({"test": ["eel", "dog"], "train": ["car", "bus"]})
    assert split_hash(split) != split_hash({"train": ["bus", "dog"], "test": ["car", "eel"]})
    assert split_hash(split) != split_hash({"train": ["bus"], "test": ["dog", "eel"]})
