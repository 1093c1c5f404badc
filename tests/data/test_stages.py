"""Stages of a stream: which classes they have, and which of their texts are held out."""

from __future__ import annotations

import pytest
from datasets import Dataset

from fewshot_nlp.data import load_pools
from fewshot_nlp.data.stages import all_classes, deal_classes, group_classes, hold_out, read_groups
from tests.tiny import WORDS


def toy_pool(name="toy"):
    """Six classes of twelve sentences; "shared" is a sentence of all of them, and each has a repeat of its own."""
    rows = []
    for i in range(6):
        words = WORDS[i]
        rows += [{"text": f"{words} {WORDS[j]} {j}", "label": words} for j in range(10)]
        rows += [{"text": "shared", "label": words}, {"text": f"{words} {WORDS[0]} 0", "label": words}]
    return all_classes(load_pools(Dataset.from_list(rows), name=name, duplicates="keep"))


def texts_of(pool):
    return {text for rows in pool.rows_by_class.values() for text in pool.texts(rows)}


@pytest.mark.parametrize("seed", range(8))
def test_no_text_that_is_tested_was_trained_on_in_any_stage(seed):
    """Also where stages share classes, classes share texts, and texts are repeated."""
    pool = toy_pool()
    names = pool.label_names
    stages = hold_out(group_classes(pool, {"a": names[:4], "b": names[2:]}), 0.2, seed)
    parts = {split: set().union(*(texts_of(stage.pools[split]) for stage in stages)) for split in stages[0].pools}
    assert not parts["train"] & parts["test"]
    assert not parts["train"] & parts["validation"]
    assert not parts["validation"] & parts["test"]
    assert parts["train"] | parts["validation"] | parts["test"] == texts_of(pool)
    for stage in stages:
        assert stage.label_names == stage.pools["test"].label_names
        rows = [row for part in stage.pools.values() for own in part.rows_by_class.values() for row in own]
        assert len(rows) == len(set(rows)) == 48
        assert {part.split for part in stage.pools.values()} == {"train", "validation", "test"}


def test_classes_are_dealt_whole_and_evenly():
    groups = deal_classes(toy_pool(), 3)
    assert sorted(name for names in groups.values() for name in names) == toy_pool().label_names
    assert {len(names) for names in groups.values()} == {2}
    assert deal_classes(toy_pool(), 3, seed=1) != groups


def test_bad_stages_are_refused(tmp_path):
    pool = toy_pool()
    with pytest.raises(ValueError, match="num_stages=4 does not fit the 6 classes"):
        deal_classes(pool, 4)
    with pytest.raises(ValueError, match=r"Stage 'a'.*'musik'.*Did you mean 'music'"):
        group_classes(pool, {"a": ["play", "musik"]})
    with pytest.raises(ValueError, match="Two stages are called 'toy'"):
        hold_out([pool, pool])
    with pytest.raises(ValueError, match=r"held_out=0\.5"):
        hold_out([pool], 0.5)
    with pytest.raises(ValueError, match="has 2 texts and none left for"):
        few = Dataset.from_list([{"text": f"{c} {i}", "label": c} for c in "ab" for i in range(2)])
        hold_out([all_classes(load_pools(few, splits={"train": ["a", "b"]}))], 0.4)
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object"):
        read_groups(tmp_path / "list.json")
    with pytest.raises(FileNotFoundError, match="stage_file"):
        read_groups(tmp_path / "none.json")
