"""The fuzzer reads what it starts from and finds what is wrong, and finds nothing here. The campaign is a script."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "recipes" / "benchmarks"


@pytest.fixture(scope="module")
def fuzz():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("fuzz_targets")


def names():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        return list(importlib.import_module("fuzz").SHARES)


def test_all_targets_have_their_share(fuzz):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        shares = importlib.import_module("fuzz").SHARES
    assert shares.keys() == fuzz.TARGETS.keys() and sum(shares.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", names())
def test_a_target_reads_its_files_and_survives_their_changes(fuzz, tmp_path, name):
    target = fuzz.TARGETS[name](tmp_path)
    for seed in target.seeds:
        target.read(seed)
    rng = random.Random(1)
    tried = [fuzz.tried(target, fuzz.changed(rng.choice(target.seeds), rng)) for _ in range(40)]
    assert [trace for _, trace in tried if trace] == []
    assert any(refused for refused, _ in tried)


def test_a_careless_loader_is_found_out(fuzz):
    def read(data: bytes) -> str:
        return json.loads(data)["config"]["learner"].lower()

    target = fuzz.Target([b'{"config": {"learner": "maml"}}'], read)
    rng = random.Random(0)
    traces = [fuzz.tried(target, fuzz.changed(target.seeds[0], rng))[1] or "" for _ in range(300)]
    for kind in ("KeyError", "TypeError", "AttributeError"):
        assert any(kind in trace for trace in traces)
