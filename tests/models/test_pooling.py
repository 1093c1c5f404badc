"""Pooling against arithmetic by hand."""

import pytest
import torch

from fewshot_nlp.models.pooling import pool

#: Two texts of four and two tokens; states count up, so that every mistake shows.
HIDDEN = torch.arange(24, dtype=torch.float64).reshape(2, 4, 3)
RIGHT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
LEFT = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])


def test_mean_is_over_real_tokens():
    torch.testing.assert_close(pool(HIDDEN, RIGHT, "mean"), torch.stack([HIDDEN[0].mean(0), HIDDEN[1, :2].mean(0)]))
    torch.testing.assert_close(pool(HIDDEN, LEFT, "mean"), torch.stack([HIDDEN[0].mean(0), HIDDEN[1, 2:].mean(0)]))


def test_cls_is_the_first_real_token():
    assert torch.equal(pool(HIDDEN, RIGHT, "cls"), HIDDEN[:, 0])
    assert torch.equal(pool(HIDDEN, LEFT, "cls"), torch.stack([HIDDEN[0, 0], HIDDEN[1, 2]]))


def test_last_is_the_last_real_token():
    assert torch.equal(pool(HIDDEN, RIGHT, "last"), torch.stack([HIDDEN[0, 3], HIDDEN[1, 1]]))
    assert torch.equal(pool(HIDDEN, LEFT, "last"), HIDDEN[:, 3])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_alone_as_in_a_batch(pooling, mask):
    together = pool(HIDDEN, mask, pooling)
    for i in range(2):
        real = mask[i].bool()
        alone = pool(HIDDEN[i : i + 1, real], mask[i : i + 1, real], pooling)
        torch.testing.assert_close(alone[0], together[i])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("mask", [RIGHT, LEFT], ids=["right", "left"])
def test_virtual_rows_in_front_are_left_out(pooling, mask):
    prompted = torch.cat([torch.full((2, 5, 3), 1e6, dtype=torch.float64), HIDDEN], dim=1)
    assert torch.equal(pool(prompted, mask, pooling), pool(HIDDEN, mask, pooling))


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_what_stands_in_padding_does_not_matter(pooling):
    noisy = HIDDEN.masked_fill(RIGHT[..., None] == 0, 1e6)
    torch.testing.assert_close(pool(noisy, RIGHT, pooling), pool(HIDDEN, RIGHT, pooling))


def test_half_precision_stays_half():
    assert pool(HIDDEN.bfloat16(), RIGHT, "mean").dtype == torch.bfloat16


def test_a_text_without_tokens_is_zero_and_not_nan():
    assert torch.equal(pool(HIDDEN, torch.zeros(2, 4, dtype=torch.int64), "mean"), torch.zeros(2, 3).double())
