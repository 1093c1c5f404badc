import json
from types import SimpleNamespace

from fewshot_nlp.evaluation import build_protocol, split_hash


def pool(split, names):
    return SimpleNamespace(
        name="animals", split=split, label_names=names, fingerprint=f"hash of {split}", hub_id="someone/animals"
    )


def test_protocol():
    pools = {"train": pool("train", ["bus", "car"]), "test": pool("test", ["dog", "eel"])}
    protocol = build_protocol(
        pools, n_way=2, shots=[1, 5], n_query=5, episodes=600, seed=7, transductive=False, uses_label_names=True
    )
    assert json.loads(json.dumps(protocol)) == protocol
    assert protocol | {"split_hash": "", "interval": ""} == {
        "dataset": "animals",
        "hub_id": "someone/animals",
        "split": "test",
        "split_hash": "",
        "pool_fingerprint": "hash of test",
        "classes": ["dog", "eel"],
        "n_way": 2,
        "shots": [1, 5],
        "n_query": 5,
        "episodes": 600,
        "seed": 7,
        "transductive": False,
        "uses_label_names": True,
        "interval": "",
    }


def test_split_hash_is_of_sets():
    split = {"train": ["bus", "car"], "test": ["dog", "eel"]}
    assert split_hash(split) == split_hash({"test": ["eel", "dog"], "train": ["car", "bus"]})
    assert split_hash(split) != split_hash({"train": ["bus", "dog"], "test": ["car", "eel"]})
    assert split_hash(split) != split_hash({"train": ["bus"], "test": ["dog", "eel"]})
