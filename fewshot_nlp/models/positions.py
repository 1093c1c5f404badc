"""How many positions a backbone has, and whether texts fit into them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

#: What transformers calls a table with a row for each position.
POSITION_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "positions_embed", "wpe")


def position_limit(module: nn.Module) -> int | None:
    """Longest input, in tokens, that the backbone's table of positions holds.

    ``None`` where it has none: relative and rotary positions go on beyond any length, whatever ``config.json`` says.
    """
    limits = []
    for name, part in module.named_modules():
        table = getattr(part, "weight", None)
        if name.rsplit(".", 1)[-1] in POSITION_TABLES and isinstance(table, Tensor):
            # RoBERTa and its kin number positions from behind the padding index.
            padding = getattr(part, "padding_idx", None)
            limits.append(table.shape[0] - (0 if padding is None else padding + 1))
    # BART, Nystromformer and others leave rows of the table unused.
    stated = getattr(module.config, "max_position_embeddings", None) or 0
    return min([*limits, stated] if stated > 0 else limits) if limits else None


def check_length(module: Any, max_length: int, num_virtual_tokens: int = 0) -> None:
    """Raise ``ValueError`` where texts of ``max_length`` tokens, behind a prompt, outrun the backbone's positions."""
    limit = position_limit(module) if module.main_input_name == "input_ids" else None
    if limit is None or num_virtual_tokens + max_length <= limit:
        return
    place = f"the {limit} positions of the backbone {module.name_or_path!r}"
    if num_virtual_tokens:
        raise ValueError(
            f"num_virtual_tokens={num_virtual_tokens} and max_length={max_length} together exceed {place}. "
            f"Lower their sum to {limit} or less."
        )
    raise ValueError(f"max_length={max_length} exceeds {place}. Lower it to {limit} or less.")
