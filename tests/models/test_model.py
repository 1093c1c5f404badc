"""A backbone with its adapter as a function; batches without padding; features that no task changes."""

import pytest
import torch

from fewshot_nlp.models import FewShotModel
from fewshot_nlp.models.buckets import CALL_COST, length_buckets
from fewshot_nlp.models.cache import FeatureCache, FixedModel, FrozenFeatures
from fewshot_nlp.models.pooling import pool, right_padded
from tests.tiny import HIDDEN, random_batch, tiny_config


@pytest.fixture(scope="module")
def model(bert_folder):
    return FewShotModel.build(tiny_config(bert_folder, adapter="prompt_tuning", num_virtual_tokens=2))


def mask_of(lengths, longest=None):
    longest = longest or max(lengths)
    return (torch.arange(longest)[None] < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda params: {}, "missing"),
        (lambda params: {**params, "model.other": torch.ones(1)}, r"unknown \['other'\]"),
        (lambda params: {name.removeprefix("model."): value for name, value in params.items()}, "missing"),
    ],
)
def test_parameters_must_fit(model, change, message):
    with pytest.raises(KeyError, match=message):
        model.features(change(model.init_params()), random_batch([2, 2]).inputs)


def test_parameters_of_head_and_rule_are_let_pass(model):
    inputs, params = random_batch([2, 2]).inputs, model.init_params()
    more = {**params, "head.weight": torch.ones(1), "rule.rate": torch.ones(1)}
    assert torch.equal(model.features(more, inputs), model.features(params, inputs))


def test_load_params(model):
    start = model.init_params()
    moved = {name: value + 1 for name, value in start.items()}
    model.load_params(moved)
    assert all(torch.equal(value, moved[name]) for name, value in model.init_params().items())
    model.load_params(start)


def test_frozen_features_carry_no_graph(model):
    features = model.frozen_features(random_batch([2, 2]).inputs)
    assert features.shape == (4, HIDDEN) and not features.requires_grad


def test_buckets_change_nothing(model, monkeypatch):
    """Long and short texts in one batch go through in parts, and come back in order."""
    # Texts in a row of their own, or buckets would have nothing to do.
    monkeypatch.setattr("fewshot_nlp.models.model.packing_for", lambda inputs: None)
    batch = random_batch([40, 40], length=30)
    assert len(length_buckets(batch.inputs["attention_mask"])) > 1
    params = model.init_params()
    with torch.no_grad():
        hidden = model.module(**batch.inputs).last_hidden_state
    expected = pool(hidden, batch.inputs["attention_mask"], "mean")
    torch.testing.assert_close(model.features(params, batch.inputs).detach(), expected, rtol=1e-5, atol=2e-6)


def test_features_under_autocast_are_single_precision(model):
    """Also where a backbone ends in half precision, which NumPy does not know."""
    inputs = random_batch([2, 2]).inputs
    hook = model.module.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=output.last_hidden_state.bfloat16())
    )
    try:
        assert model.features(model.init_params(), inputs).dtype == torch.float32
    finally:
        hook.remove()


def test_left_padding_is_no_part_of_a_text(bert_folder):
    """BERT's positions would count it."""
    model = FewShotModel.build(tiny_config(bert_folder, adapter="none"))
    inputs = random_batch([3, 2]).inputs
    lengths = inputs["attention_mask"].sum(1).tolist()
    left = {n: torch.stack([row.roll(-k) for row, k in zip(v, lengths, strict=True)]) for n, v in inputs.items()}
    assert not left["attention_mask"][:, 0].all()
    torch.testing.assert_close(model.features({}, left), model.features({}, inputs))


def test_a_hole_in_a_mask_stays_where_it_is():
    mask = torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
    found = right_padded(
        {"input_ids": torch.tensor([[9, 1, 2, 3], [1, 2, 9, 9], [9, 9, 9, 1]]), "attention_mask": mask}
    )
    assert found["attention_mask"].tolist() == [[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]
    assert found["input_ids"].tolist() == [[1, 2, 3, 9], [1, 2, 9, 9], [1, 9, 9, 9]]


def test_buckets_pay():
    """Never more work than one call, counting what a call costs; and much less where lengths are far apart."""

    def cost(lengths):
        return sum(len(rows) * longest + CALL_COST for rows, longest in length_buckets(mask_of(lengths)))

    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = torch.randint(1, 40, (25,), generator=rng).tolist()
        assert cost(lengths) <= len(lengths) * max(lengths) + CALL_COST
    assert cost([100] + [5] * 50) < 0.1 * 51 * 100
    assert len(length_buckets(mask_of([5] * 50))) == 1


def test_a_mask_with_a_hole_keeps_what_comes_after_it():
    ((_, longest),) = length_buckets(torch.tensor([[1, 0, 1, 0]]))
    assert longest == 3


class Counting:
    """Features that count the texts they are asked for."""

    def __init__(self):
        self.texts = 0

    def __call__(self, inputs):
        self.texts += len(inputs["input_ids"])
        real = inputs["input_ids"] * inputs["attention_mask"]
        return torch.stack([real.sum(1), inputs["attention_mask"].sum(1)], dim=1).float()


def test_padding_is_no_part_of_a_text():
    compute = Counting()
    cache = FeatureCache(compute)
    cache({"input_ids": torch.tensor([[2, 3]]), "attention_mask": mask_of([2])})
    cache({"input_ids": torch.tensor([[2, 3, 9, 9]]), "attention_mask": mask_of([2], 4)})
    assert compute.texts == 1
    cache({"input_ids": torch.tensor([[2, 3, 9, 9]]), "attention_mask": mask_of([3], 4)})
    assert compute.texts == 2


def test_frozen_features_have_unit_length(model):
    inputs = random_batch([3, 2]).inputs
    found = FrozenFeatures(model)(inputs)
    plain = model.frozen_features(inputs)
    torch.testing.assert_close(found, plain / plain.norm(dim=1, keepdim=True))


def test_a_fixed_model_keeps_its_parameters(model):
    inputs, params = random_batch([3, 2]).inputs, model.init_params()
    moved = {name: value + 1 for name, value in params.items()}
    fixed = FixedModel(model, moved)
    expected = model.features(moved, inputs).detach()
    for given in (moved, params):
        torch.testing.assert_close(fixed.features(given, inputs), expected)
    torch.testing.assert_close(fixed.frozen_features(inputs), model.frozen_features(inputs))
