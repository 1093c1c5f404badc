"""Counting what a graph holds."""

import torch

from fewshot_nlp.functional.memory import graph_bytes


def test_what_a_product_keeps():
    """``x * w`` keeps both factors; ``exp`` its result; a sum nothing."""
    x, w = torch.ones(100, requires_grad=True), torch.ones(100, requires_grad=True)
    assert graph_bytes(lambda: x * w) == 2 * 400
    assert graph_bytes(lambda: x * w, own=[w]) == 400
    assert graph_bytes(lambda: w.exp()) == 400
    assert graph_bytes(lambda: w.sum()) == 0


def test_a_storage_counts_once():
    w = torch.ones(100, requires_grad=True)
    assert graph_bytes(lambda: w * w) == 400
    assert graph_bytes(lambda: w[:50] * w[50:]) == 400


def test_every_step_counts():
    matrix = torch.eye(10, requires_grad=True)

    def steps(count):
        x = torch.ones(10, 10)
        for _ in range(count):
            x = torch.tanh(x @ matrix)
        return x

    # Each step keeps its input and its output, which is the next one's input.
    assert graph_bytes(lambda: steps(5), own=[matrix]) == 6 * 400


def test_inner_gradients_count_where_they_are_differentiated():
    matrix = torch.randn(10, 10, generator=torch.Generator().manual_seed(0)).requires_grad_()
    x = torch.ones(10, 10)

    def gradient(create_graph):
        return torch.autograd.grad(torch.tanh(x @ matrix).sum(), matrix, create_graph=create_graph)

    assert graph_bytes(lambda: gradient(True)) > graph_bytes(lambda: gradient(False))
