"""What holds on a CPU holds on a GPU, and on an accelerator that is but pretended to be there."""

import pytest
import torch
from accelerate import PartialState

from fewshot_nlp import plan
from fewshot_nlp.classifier import FewShotClassifier
from fewshot_nlp.evaluation import evaluate
from fewshot_nlp.hub.adapter import FewShotAdapter
from fewshot_nlp.learners import build_learner
from fewshot_nlp.training import FewShotTrainer
from fewshot_nlp.types import MetaGrad
from tests.cli.test_benchmarks import load
from tests.learners.test_stacking import SETTINGS, assert_same, in_double_precision
from tests.pretend import DEVICE, Accelerator
from tests.tiny import random_episode, tiny_config
from tests.training.toy import ToySampler, toy_args

#: Of a stack's settings, those that are tried in every run.
FEW = ("LoRA", "clipping and decay")


@pytest.fixture(params=["pretend", "cuda"])
def device(request, monkeypatch, fresh_accelerator):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")
        yield torch.device("cuda")
        return
    monkeypatch.setattr(PartialState, "default_device", DEVICE)
    with Accelerator():
        yield DEVICE


def sent(params, where):
    return {name: value.to(where) for name, value in params.items()}


@pytest.mark.parametrize(
    ("device", "settings"),
    [
        # The contracts go over learners and adapters where an accelerator is pretended.
        pytest.param(
            name, settings, id=f"{name}-{kind}", marks=[] if name == "cuda" or kind in FEW else pytest.mark.full
        )
        for name in ("pretend", "cuda")
        for kind, settings in SETTINGS.items()
    ],
    indirect=["device"],
)
def test_the_gradient_of_a_stack_is_that_of_the_cpu(device, bert_folder, settings):
    settings = {"learner": "maml", "inner_steps": 4, "inner_learning_rate": 0.2, **settings}
    learner, params = in_double_precision(build_learner(tiny_config(bert_folder, **settings)))
    episodes = [random_episode([2, 1], seed=seed, names="use_label_names" in settings) for seed in range(5)]
    learner.stacking = False
    expected = learner.meta_grad(params, episodes)
    learner, _ = in_double_precision(build_learner(tiny_config(bert_folder, **settings)))
    learner.model.to(device)
    params, episodes = sent(params, device), [episode.to(device) for episode in episodes]
    assert learner.tasks_at_once(episodes) == 5, learner._trials
    for learner.chunk in (None, 1):
        found = learner.meta_grad(params, episodes)
        back = [each.cpu() for each in (found.loss, found.accuracy)]
        assert_same(expected, MetaGrad(sent(found.grads, "cpu"), *back, 5, [each.cpu() for each in found.logits]))


def reader(spec):
    return random_episode([2, 2], seed=spec.index, dtype=torch.float32)


def trained(folder, where, precision, steps, resume=None):
    learner = build_learner(tiny_config(folder, learner="maml", inner_steps=3))
    settings = {"max_steps": steps, "meta_batch_size": 4, "save_strategy": "steps", "save_steps": 3, "use_cpu": False}
    args = toy_args(where, **settings, learning_rate=0.01, bf16=precision == "bf16")
    trainer = FewShotTrainer(learner, args, ToySampler(), reader)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_run_on_a_gpu_resumes(device, bert_folder, tmp_path, precision):
    if device == DEVICE and precision == "bf16":
        pytest.skip("needs a GPU, which casts")
    whole = trained(bert_folder, tmp_path / "whole", precision, 6)
    assert whole.accelerator.device.type == device.type
    # The schedule is that of the whole run: what was kept at its third step is gone on from.
    trained(bert_folder, tmp_path / "whole", precision, 6, str(tmp_path / "whole" / "checkpoint-3"))
    resumed = trained(bert_folder, tmp_path / "whole", precision, 6, str(tmp_path / "whole" / "checkpoint-3"))
    for name, value in whole.params.items():
        assert torch.isfinite(value).all()
        assert torch.equal(resumed.params[name], value)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("setting", ["lora", "lora_top"])
def test_of_sixteen_tasks_a_tenth_of_a_loops_operations_is_asked(setting, monkeypatch):
    contenders = load("contenders", monkeypatch)
    # How wide the network is does not matter.
    narrow = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 96}
    monkeypatch.setattr(contenders, "SHAPE", narrow)

    def asked(way, tasks):
        with Accelerator() as accelerator:
            gradient = way(setting, contenders.build_episodes([16], tasks, DEVICE), torch.float32)
            # Once before: whether tasks can be stacked is tried.
            gradient()
            accelerator.asked.clear()
            gradient()
        return accelerator.asked.total()

    loop, stack = 16 * asked(contenders.plain_loop, 1), asked(contenders.ours, 16)
    print(f"{setting}: {loop:,} operations by a plain loop, {stack:,} by one stack, {loop / stack:.1f} times fewer")
    assert stack < loop / 10


@pytest.mark.parametrize("settings", [{"learner": "maml"}, {"learner": "protonet", "head": "prototype"}])
def test_answers_are_those_of_the_cpu(device, bert_folder, settings):
    specs = [ToySampler("test", 2)[i] for i in range(20)]
    learner = build_learner(tiny_config(bert_folder, **settings))
    params = learner.init_params()
    learner.stacking = False
    expected = evaluate(learner, params, specs, reader)
    learner = build_learner(tiny_config(bert_folder, **settings))
    learner.model.to(device)
    found = evaluate(learner, sent(params, device), specs, reader, device=device)
    assert found.references == expected.references
    assert sum(a != b for a, b in zip(found.predictions, expected.predictions, strict=True)) <= 1
    assert found.losses == pytest.approx(expected.losses, rel=1e-3)


def test_a_classifier_moves_to_the_gpu(device, bert_folder):
    learner = build_learner(tiny_config(bert_folder, learner="maml"))
    adapter = FewShotAdapter(learner, learner.init_params())
    texts, labels = ["light on", "lamp warm", "play music", "stop the music"], ["light", "light", "music", "music"]
    classifier = FewShotClassifier(adapter, device="cpu").fit(texts, labels)
    here = classifier.predict_proba(texts)
    there = FewShotClassifier(adapter, device=device).fit(texts, labels).predict_proba(texts)
    assert there == pytest.approx(here, abs=1e-3)
    assert classifier.predict_proba(texts) == pytest.approx(here, abs=1e-6), "of a backbone that has left"


@pytest.mark.parametrize("device", ["cuda"], indirect=True)
def test_a_plan_is_made_for_the_gpu(device, bert_folder):
    config = tiny_config(bert_folder, learner="maml", inner_steps=8)
    found = plan(config, k_shot=2, n_query=2, tokens=6, meta_batch_size=4)
    assert found.chosen.tasks_at_once == 4
    assert 0 < found.chosen.seconds < 60
