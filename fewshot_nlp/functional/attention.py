"""Attention written in plain tensor operations, so that it can be differentiated twice.

The fused kernels behind ``scaled_dot_product_attention`` have no second derivative; every exact second-order
method raises on them. Softmax(QKᵀ)V in four operations is as fast at the lengths few-shot text has.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention (Vaswani et al. 2017).

    Args:
        query: ``[batch, heads, queries, size]``.
        key, value: ``[batch, key heads, keys, size]``; fewer key heads than heads are shared in groups.
        mask: additive, broadcastable to ``[batch, heads, queries, keys]``.
        scaling: factor of QKᵀ, usually ``size ** -0.5``.
        dropout: probability of dropping a weight.
        softcap: bound of the scores, ``c · tanh(score / c)`` (Gemma 2).
        sinks: ``[heads]``, score of a key that gives nothing (GPT-OSS).

    Returns:
        Output ``[batch, queries, heads, size]`` and weights ``[batch, heads, queries, keys]``.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask[..., : key.shape[-2]]
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    weights = weights[..., : key.shape[-2]]
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return (weights @ value).transpose(1, 2).contiguous(), weights
