"""Layers below the first trained one are run once, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, BertConfig, GPT2Config, LlamaConfig, ModernBertConfig

from fewshot_nlp.functional.call import trainable
from fewshot_nlp.functional.trunk import find_trunk
from tests.tiny import tiny_resnet

SMALL = {"vocab_size": 12, "hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
CONFIGS = {
    "bert": BertConfig(**SMALL),
    "gpt2": GPT2Config(vocab_size=12, n_embd=8, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(**SMALL),
    "modernbert": ModernBertConfig(
        **SMALL, pad_token_id=0, cls_token_id=1, sep_token_id=2, attn_implementation="eager"
    ),
}
LAYERS = {"bert": "encoder.layer", "gpt2": "h", "llama": "layers", "modernbert": "layers"}
INPUTS = {
    "input_ids": torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
}


@pytest.fixture
def some_threads():
    """A test may set the number of torch's threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def build(shape, first):
    """A model whose layers from ``first`` on are trained."""
    torch.manual_seed(0)
    module = AutoModel.from_config(CONFIGS[shape]).eval()
    for name, value in module.named_parameters():
        place = name.removeprefix(f"{LAYERS[shape]}.")
        value.requires_grad_(place != name and int(place.split(".")[0]) >= first)
    return module


@pytest.mark.parametrize("shape", CONFIGS)
@pytest.mark.parametrize("first", [1, 2])
def test_features_and_gradients_are_those_of_the_whole_model(shape, first):
    module = build(shape, first)
    names, own = trainable(module), dict(module.named_parameters())
    trunk = find_trunk(module, names)
    assert trunk is not None
    assert trunk.depth == first

    def both():
        hidden = module(**INPUTS).last_hidden_state[INPUTS["attention_mask"].bool()]
        return hidden.detach(), torch.autograd.grad(hidden.pow(3).sum(), [own[name] for name in names])

    hidden, grads = both()
    for _ in range(2):
        with trunk.skipped(INPUTS):
            again, again_grads = both()
        torch.testing.assert_close(again, hidden)
        for found, expected in zip(again_grads, grads, strict=True):
            torch.testing.assert_close(found, expected)
    after = both()[0]
    assert torch.equal(after, hidden), "the module is whole again"


def counting(module):
    """The module's trunk, and a list that grows with every run of it."""
    runs = []
    module.encoder.layer[0].register_forward_hook(lambda *_: runs.append(1))
    return find_trunk(module, trainable(module)), runs


def test_a_text_goes_through_the_trunk_once():
    module = build("bert", 2)
    trunk, runs = counting(module)
    cut = {name: tensor[:, :4] for name, tensor in INPUTS.items()}
    turned = {name: tensor.flip(0) for name, tensor in INPUTS.items()}
    # Both texts make one group. Of the cut batch, only the first text is another one: the second is shorter than that.
    for inputs, expected in ((INPUTS, 1), (INPUTS, 1), (turned, 1), (cut, 2), (INPUTS, 2)):
        with trunk.skipped(inputs):
            module(**inputs)
        assert len(runs) == expected
    trunk.forget()
    with trunk.skipped(INPUTS):
        module(**INPUTS)
    assert len(runs) == 3


def test_texts_go_through_in_groups_of_one_shape():
    module, shapes = build("bert", 2), []
    module.encoder.layer[0].register_forward_hook(lambda layer, args, output: shapes.append(tuple(output.shape[:2])))
    lengths = torch.tensor([3, 7, 8, *[5] * 7, 17, 20])
    mask = (torch.arange(20) < lengths[:, None]).long()
    ids = torch.randint(3, 12, mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    inputs = {"input_ids": ids, "attention_mask": mask}
    for longest, expected in (
        (None, [(8, 8)] * 3 + [(8, 24)]),
        (20, [(8, 8)] * 3 + [(8, 20)] * 2),
    ):
        trunk = find_trunk(module, trainable(module), longest=longest)
        shapes.clear()
        with trunk.skipped(inputs):
            found = module(**inputs).last_hidden_state
        assert sorted(shapes[: len(expected)]) == expected
        torch.testing.assert_close(found[mask.bool()], module(**inputs).last_hidden_state[mask.bool()])


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", ["bert", "gpt2", "llama"])
def test_what_is_kept_of_a_text_depends_on_nothing_else(shape, threads, some_threads):
    """To the bit, whatever its company, its place and its padding; products are large enough to be cut into blocks."""
    torch.set_num_threads(threads)
    config = CONFIGS[shape].to_dict() | {"hidden_size": 96, "intermediate_size": 384, "n_embd": 96, "vocab_size": 200}
    torch.manual_seed(0)
    module = AutoModel.from_config(type(CONFIGS[shape])(**config)).eval()
    for name, value in module.named_parameters():
        value.requires_grad_(name.startswith(f"{LAYERS[shape]}.2."))
    trunk, rng = find_trunk(module, trainable(module)), torch.Generator().manual_seed(1)
    for length in (3, 7, 8, 13):
        text, kept = torch.randint(1, 200, (1, length), generator=rng), []
        for place, company, width in ((0, 0, length), (0, 3, length), (3, 3, 16), (2, 9, 24), (6, 7, 16), (1, 1, 13)):
            lengths = torch.randint(1, width + 1, (company + 1,), generator=rng)
            lengths[place] = length
            mask = (torch.arange(width) < lengths[:, None]).long()
            ids = torch.randint(1, 200, mask.shape, generator=rng)
            ids[place, :length] = text
            trunk.forget()
            with trunk.skipped({"input_ids": ids * mask, "attention_mask": mask}):
                first = getattr(module, LAYERS[shape].split(".")[0])
                first = first.layer[0] if shape == "bert" else first[0]
                kept.append(first(None)[place, :length].clone())
        assert all(torch.equal(one, kept[0]) for one in kept), length


def test_other_weights_and_another_precision_are_not_mistaken():
    module = build("bert", 2)
    trunk, runs = counting(module)
    with trunk.skipped(INPUTS):
        pass
    with trunk.skipped(INPUTS, "bfloat16"):
        pass
    assert len(runs) == 2
    with torch.no_grad():
        module.encoder.layer[0].output.dense.weight.add_(1.0)
    with trunk.skipped(INPUTS):
        pass
    assert len(runs) == 3
    module.double()
    with trunk.skipped(INPUTS):
        assert module(**INPUTS).last_hidden_state.dtype == torch.float64
    with torch.no_grad():
        module.encoder.layer[2].output.dense.weight.add_(1.0)
    before = len(runs)
    with trunk.skipped(INPUTS):
        pass
    assert len(runs) == before, "a layer above changes nothing below"


def replaced(layer):
    layer.weight = nn.Parameter(layer.weight * 1.5, requires_grad=False)


def pointed_elsewhere(layer):
    layer.weight.data = layer.weight.data * 1.5


def loaded(layer):
    layer.load_state_dict({n: v * 1.5 for n, v in layer.state_dict().items()}, assign=True)
    layer.requires_grad_(False)


@pytest.mark.parametrize("change", [replaced, pointed_elsewhere, loaded])
def test_weights_in_another_place_are_not_mistaken(change):
    module = build("bert", 2)
    trunk, _ = counting(module)
    for _ in range(4):
        # The allocator gives out the same places again.
        change(module.encoder.layer[0].output.dense)
        with trunk.skipped(INPUTS):
            found = module(**INPUTS).last_hidden_state[INPUTS["attention_mask"].bool()]
        torch.testing.assert_close(found, module(**INPUTS).last_hidden_state[INPUTS["attention_mask"].bool()])
    before, twin = trunk.top.moves, copy.deepcopy(trunk)
    with trunk.skipped(INPUTS):
        pass
    assert trunk.top.moves == before == 4 and twin.top.weights == ([], []), "a copy has a memory of its own"


class Telling(nn.Module):
    """Three layers that hand on more than their hidden states."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layers[0].requires_grad_(False)
        self.layers[0].register_forward_hook(lambda layer, args, output: (output, output))
        self.runs = 0

    def forward(self, input_ids, attention_mask):
        self.runs += 1
        hidden, more = self.layers[0](input_ids[..., None].expand(-1, -1, 4).float())
        return self.layers[2](self.layers[1](hidden + more))


def test_a_layer_that_hands_on_more_has_no_trunk_after_the_first_try():
    module = Telling()
    trunk, expected = find_trunk(module, trainable(module)), module(**INPUTS)
    module.runs = 0
    for runs in (2, 3, 4):
        with trunk.skipped(INPUTS):
            torch.testing.assert_close(module(**INPUTS), expected)
        assert module.runs == runs and not trunk.works and trunk.known.bytes == 0


def test_padding_on_the_left_keeps_batches_whole():
    module = build("bert", 2)
    trunk, runs = counting(module)
    left = {name: tensor.flip(1) for name, tensor in INPUTS.items()}
    for _ in range(2):
        with trunk.skipped(left):
            module(**left)
    assert len(runs) == 1


def test_the_layers_come_back_after_an_error():
    module = build("bert", 2)
    trunk, before = find_trunk(module, trainable(module)), list(module.encoder.layer)
    with pytest.raises(ZeroDivisionError), trunk.skipped(INPUTS):
        raise ZeroDivisionError
    assert list(module.encoder.layer) == before


def test_what_is_known_in_inference_mode_can_be_recorded_later():
    module = build("bert", 2)
    trunk = find_trunk(module, trainable(module))
    with torch.inference_mode():
        inputs = {name: tensor.clone() for name, tensor in INPUTS.items()}
        with trunk.skipped(inputs):
            module(**inputs)
    with trunk.skipped(INPUTS):
        module(**INPUTS).last_hidden_state.sum().backward()


def test_there_is_none_where_the_lowest_part_is_trained():
    assert find_trunk(build("bert", 0), trainable(build("bert", 0))) is None
    module = build("bert", 2)
    assert find_trunk(module, [*trainable(module), "embeddings.LayerNorm.weight"]) is None
    assert find_trunk(module, []) is None
    assert find_trunk(nn.Linear(2, 2), ["weight"]) is None


class Squares(nn.Module):
    """Three layers on images, the second and third of which are trained; counts what goes through the first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))
        self.layers[0].requires_grad_(False)
        self.seen = 0
        self.layers[0].register_forward_hook(lambda layer, args, output: self.count(len(output)))

    def count(self, images):
        self.seen += images

    def forward(self, pixel_values):
        for layer in self.layers:
            pixel_values = layer(pixel_values).square()
        return pixel_values


@pytest.mark.parametrize("alone", [True, False])
def test_an_image_goes_through_the_trunk_once(alone):
    """Whatever its company; where an image's features depend on that, the whole batch is what is kept."""
    module = Squares()
    trunk = find_trunk(module, trainable(module), alone)
    images = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for batch, seen in ((images, (3, 3)), (images.flip(0), (3, 6)), (images[1:], (3, 8)), (images, (3, 8))):
        with trunk.skipped({"pixel_values": batch}):
            found = module(pixel_values=batch)
        counted, module.seen = module.seen, 0
        torch.testing.assert_close(found, module(pixel_values=batch))
        module.seen = counted
        assert counted == seen[0 if alone else 1]


def test_a_hole_in_a_mask_cuts_no_text():
    module = build("bert", 1)
    trunk = find_trunk(module, trainable(module))
    inputs = {**INPUTS, "attention_mask": torch.tensor([[1, 1, 0, 1, 1], [1, 1, 1, 0, 0]])}
    with torch.no_grad():
        expected = module(**inputs).last_hidden_state
        with trunk.skipped(inputs):
            found = module(**inputs).last_hidden_state
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[kept], expected[kept])


def test_a_buffer_that_is_written_to_makes_what_is_kept_old(tmp_path):
    module = AutoModel.from_pretrained(tiny_resnet(tmp_path)).eval().requires_grad_(False)
    module.encoder.stages[1].requires_grad_(True)
    trunk = find_trunk(module, trainable(module))
    inputs = {"pixel_values": torch.randn(2, 1, 16, 16)}
    for _ in range(2):
        with torch.no_grad():
            expected = module(**inputs).last_hidden_state
            with trunk.skipped(inputs):
                torch.testing.assert_close(module(**inputs).last_hidden_state, expected)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.add_(0.5)
