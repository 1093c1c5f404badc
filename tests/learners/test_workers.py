"""Episodes side by side are answered as one after another."""

import pytest
import torch

from fewshot_nlp.evaluation import evaluate
from fewshot_nlp.evaluation.workers import side_by_side, workers_for
from fewshot_nlp.learners import build_learner
from fewshot_nlp.types import EpisodeSpec
from tests.tiny import random_episode, tiny_config

SPECS = [EpisodeSpec("test", i, "random", ("class 0", "class 1"), (), ()) for i in range(20)]


def reader(spec):
    return random_episode([1, 2], seed=spec.index)


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_two_workers_answer_as_one(bert_folder, two_threads):
    learner = build_learner(tiny_config(bert_folder, learner="maml", adapter="prompt_tuning", num_virtual_tokens=2))
    params = learner.init_params()
    assert workers_for(learner) == 2
    found = evaluate(learner, params, SPECS, reader)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    assert workers_for(learner) == 1
    alone = evaluate(learner, params, SPECS, reader)
    assert found.specs == alone.specs == SPECS
    assert found.predictions == alone.predictions and found.references == alone.references
    assert found.losses == alone.losses, "to the bit: an episode is one worker's"


def test_the_work_is_parted_and_the_threads_come_back(two_threads):
    class Learner:
        def __init__(self):
            self.worked = 0

    learner, seen = Learner(), []

    def work(mine, item):
        assert torch.get_num_threads() == 1
        if item == 30:
            raise ZeroDivisionError
        seen.append(mine)
        return item

    assert list(side_by_side(work, learner, range(25), 2)) == list(range(25))
    assert learner in seen
    with pytest.raises(ZeroDivisionError):
        list(side_by_side(work, learner, range(40), 2))
    assert torch.get_num_threads() == 2


def test_where_one_worker_is_best(bert_folder, two_threads):
    assert workers_for(object()) == 1
    assert workers_for(build_learner(tiny_config(bert_folder, learner="protonet", head="prototype"))) == 1
    learner = build_learner(tiny_config(bert_folder, learner="maml"))
    assert workers_for(learner) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert workers_for(learner) == 1
    top = build_learner(tiny_config(bert_folder, learner="maml", lora_layers_to_transform=[1]))
    assert workers_for(top) == 1
