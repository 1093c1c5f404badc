"""Files that were good until a stranger had them."""

from __future__ import annotations

import os
import pickle
import shutil

import datasets
import pytest

from fewshot_nlp.hub import AdapterInfo, FewShotAdapter
from fewshot_nlp.learners import build_learner
from tests.tiny import tiny_config


class Bomb:
    """Whoever unpickles this makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def marker(tmp_path):
    """The folder that is made where a bomb went off."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


@pytest.fixture
def bomb(marker):
    """A pickle that makes ``marker``."""
    content = pickle.dumps(Bomb(marker))
    pickle.loads(content)
    marker.rmdir()
    return content


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Hugging Face's data set cache, away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="session")
def good(bert_folder, tmp_path_factory):
    """Folders of sound adapters, by kind."""
    found = {}
    for kind in ("lora", "full"):
        learner = build_learner(tiny_config(bert_folder, adapter=kind))
        found[kind] = tmp_path_factory.mktemp(kind)
        info = AdapterInfo(label_names=["on", "off"], results={"test": {"1-shot": {"accuracy": 0.5}}})
        FewShotAdapter(learner, learner.init_params(), info).save_pretrained(found[kind])
    return found


@pytest.fixture
def lora(good, tmp_path):
    return shutil.copytree(good["lora"], tmp_path / "lora")


@pytest.fixture
def full(good, tmp_path):
    return shutil.copytree(good["full"], tmp_path / "full")
