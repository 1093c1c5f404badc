"""Whether a backbone reads a text by itself, behind a prompt, before padding, and with an attention from outside: found
by giving it one, before any training."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import MODEL_MAPPING, PreTrainedModel

from fewshot_nlp.checks import first_line
from fewshot_nlp.models.positions import position_limit

#: Tokens of the text that is tried, and of the padding. Some models take no shorter texts than four.
TRIED, PADDING = 8, 4
#: What models call a sound or an image.
BESIDE = ("input_features", "input_values", "pixel_values")
#: What may change in a text's states, in roundings of their norm, and is no difference.
ROUNDINGS = 1000


@torch.no_grad()
def fault_in_reading(module: Any, length: int, result: str = "last_hidden_state") -> Exception | None:
    """What ``module`` raises when it is given a text of ``length`` tokens; ``None`` where it makes ``result`` of it."""
    ids = torch.ones(1, length, dtype=torch.long, device=next(module.parameters()).device)
    try:
        output = module(input_ids=ids, attention_mask=torch.ones_like(ids))
        return None if torch.is_tensor(getattr(output, result, None)) else TypeError(f"there is no {result}")
    except Exception as error:  # hundreds of models raise what they like
        return error


@torch.no_grad()
def sees_padding(module: Any, pad: int | None) -> bool:
    """Whether masked padding behind a text changes what ``module`` makes of it, as convolutions over tokens and Fourier
    transforms do, which know no mask.

    Args:
        module: backbone.
        pad: token that texts are padded with; the backbone's own if not given.
    """
    ids, n = _padded_text(module, pad)
    try:
        return _differ(_states(module, ids[:, :n], n), _states(module, ids, n))
    except Exception:  # hundreds of models raise what they like
        return False


@torch.no_grad()
def attends_as(module: Any, attention: str) -> bool:
    """Whether ``module`` makes of a text what it would with another ``attention``, by transformers' name of it. Models
    tell attention more and more, and one from outside does not hear of it."""
    own = module.config._attn_implementation
    if own == attention:
        return True
    ids, n = _padded_text(module)
    try:
        states = _states(module, ids, n)
        module.set_attn_implementation(attention)
        return not _differ(states, _states(module, ids, n))
    except Exception:  # hundreds of models raise what they like
        return True
    finally:
        module.set_attn_implementation(own)


def _padded_text(module: Any, pad: int | None = None) -> tuple[Tensor, int]:
    """A text of unlike tokens with padding behind it, ``[1, length]``, and how many tokens are its own."""
    pad = getattr(module.config, "pad_token_id", None) or 0 if pad is None else pad
    total = min(TRIED + PADDING, position_limit(module) or TRIED + PADDING)
    n, device = total * TRIED // (TRIED + PADDING), next(module.parameters()).device
    # CANINE reads any character, and has no vocabulary.
    others = max(getattr(module.config, "vocab_size", None) or TRIED + 1, 2) - 1
    ids = torch.full((1, total), pad, device=device)
    ids[:, :n] = (pad + 1 + torch.arange(n, device=device) % others) % (others + 1)
    return ids, n


def _states(module: Any, ids: Tensor, n: int) -> Tensor:
    """Of the first ``n`` tokens, beyond which all is padding; or the logits that follow from them."""
    mask = (torch.arange(ids.shape[1], device=ids.device) < n).long()[None]
    return next(iter(module(input_ids=ids, attention_mask=mask).values()))[:, :n]


def _differ(states: Tensor, others: Tensor) -> bool:
    """By more than rounding."""
    return bool((others - states).norm() > ROUNDINGS * torch.finfo(states.dtype).eps * states.norm())


def check_reads(module: Any, speaks: bool = False) -> None:
    """Raise ``ValueError`` where a backbone of texts wants more than a text, such as an image or a decoder's beginning,
    and where one takes neither texts nor images, but sounds, for example.

    Args:
        module: backbone.
        speaks: logits are asked of it, and not states.
    """
    takes, fault = module.main_input_name, None
    if takes == "pixel_values":
        return
    if takes == "input_ids":
        length = min(TRIED, position_limit(module) or TRIED)
        fault = fault_in_reading(module, length, "logits" if speaks else "last_hidden_state")
        if fault is None and hasattr(module.config, "hidden_size"):
            return
    name, parts = module.name_or_path, _parts(module)
    why = first_line(fault).rstrip(".") if fault else "its configuration has no hidden_size"
    remedy = "Use a backbone of texts alone, such as BERT, or of images alone, such as ViT"
    if parts:
        why = "it is made of several models"
        known = " or ".join(f"{place} ({type(part).__name__})" for place, part in parts.items())
        remedy = (
            f"Save the one that you mean, {known}, to a folder, and its tokenizer or image processor beside it, and "
            f"give that folder: AutoModel.from_pretrained({name!r}).{next(iter(parts))}.save_pretrained(folder)"
        )
    elif takes != "input_ids":
        why = f"it takes {takes}, and neither tokens nor pixels"
    elif beside := next((each for each in BESIDE if each in inspect.signature(module.forward).parameters), None):
        why = f"it takes {beside} beside tokens ({why})"
    elif module.config.is_encoder_decoder:
        why = f"its decoder must be told where to begin ({why})"
        remedy = (
            "Use an encoder such as BERT, a decoder such as GPT-2, T5, of which the encoder is read, or BART, whose "
            "decoder begins at the text"
        )
    raise ValueError(
        f"The backbone {name!r} ({type(module).__name__}) makes no features of a text by itself: {why}. {remedy}."
    )


def _parts(module: Any) -> dict[str, PreTrainedModel]:
    """The models in a model that ``AutoModel`` can load by themselves, by their places."""
    return {
        place: part
        for place, part in module.named_modules()
        if place
        and isinstance(part, PreTrainedModel)
        and type(part.config) in MODEL_MAPPING
        and type(part) is MODEL_MAPPING[type(part.config)]
    }
