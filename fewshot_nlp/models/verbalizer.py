"""Label words and label phrases, spoken by the language model that a backbone was pre-trained as.

*Masked* models fill a blank (PET, Schick and Schütze 2021, arXiv:2001.07676). With a template around a text ``x``, the
head's transformed state ``h`` ``[size]`` at the blank, and output embeddings ``w`` ``[size]`` and biases ``b`` of a
label's words, averaged over the words' tokens, the class score is that of the model itself::

    s_c = h(x) · w_c + b_c

As features of a text are ``[h; 1]`` and those of a name ``[w; b]``, ``[size + 1]`` each, that is one inner product.

*Causal* models continue a text. A class scores the log-likelihood of its name's tokens ``t`` after the text, by the
token, so that long names are not at a disadvantage::

    s_c = 1/m_c · Σ_i log p(t_{c,i} | x, t_{c,<i})

and these scores ``[n_way]`` are a text's features. The text goes through once; the names go on from its keys and
values.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fewshot_nlp.functional.call import inputs_of
from fewshot_nlp.models.backbone import cache_argument
from fewshot_nlp.models.pooling import is_causal, pool
from fewshot_nlp.types import NAMES

TEMPLATES = {"mask": "{text} This is about {mask}.", "label": "{text}\nThis is about {label}"}


class Voice(Protocol):
    """What a model's features are when it speaks."""

    #: The template's slot that the model speaks in: ``"mask"`` or ``"label"``.
    slot: ClassVar[str]
    #: Whether texts are asked about names, and features are a score for each.
    scores_names: ClassVar[bool]
    #: Of a feature, where it is not a score for each name.
    size: int

    def read(self, module: Any, bare: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Features ``[n, size]`` of right-padded inputs; ``bare`` is the language model inside ``module``."""
        ...

    def read_frozen(self, bare: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Features of the language model alone, ``[n, size]``, for learners that compare texts with texts."""
        ...


class MaskedVoice(Voice):
    """Features ``[h; 1]`` of rows with a blank, and ``[w; b]`` of rows without one, which are the words of a name."""

    slot = "mask"
    scores_names = False

    def __init__(self, bare: Any, tokenizer: Any) -> None:
        output = bare.get_output_embeddings()
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"head='verbalizer' fills a blank, and the tokenizer of {bare.name_or_path!r} has no mask token. Use a "
                f"checkpoint that was pre-trained on masked words, or head='linear' with head_init='names'."
            )
        if not isinstance(output, nn.Linear) or output.out_features != bare.config.vocab_size:
            raise ValueError(
                f"head='verbalizer' reads the output embeddings of {bare.name_or_path!r}, which "
                f"{type(bare).__name__} does not keep in one layer. Use head='linear' with head_init='names'."
            )
        self.size = output.in_features + 1
        self.mask_token_id = int(tokenizer.mask_token_id)

    def read(self, module: Any, bare: Any, inputs: dict[str, Tensor]) -> Tensor:
        output = bare.get_output_embeddings()
        blank = (inputs["input_ids"] == self.mask_token_id) & inputs["attention_mask"].bool()
        asked = blank.any(dim=1)
        texts, names = asked.nonzero()[:, 0], (~asked).nonzero()[:, 0]
        parts = []
        if len(texts):
            rows = {name: tensor[texts] for name, tensor in inputs.items()}
            # Of more blanks than one the mean is read; a template has one.
            states = pool(inputs_of(output, lambda: module(**rows))[0], blank[texts].long(), "mean")
            parts.append(torch.cat([states, torch.ones_like(states[:, :1])], dim=1))
        if len(names):
            ids = inputs["input_ids"][names]
            vectors, bias = output.weight[ids], output.bias
            bias = vectors.new_zeros(ids.shape) if bias is None else bias[ids]
            words = torch.cat([vectors, bias[..., None]], dim=2)
            parts.append(pool(words, inputs["attention_mask"][names], "mean"))
        return torch.cat(parts)[torch.cat([texts, names]).argsort()]

    def read_frozen(self, bare: Any, inputs: dict[str, Tensor]) -> Tensor:
        return self.read(bare, bare, inputs)


class CausalVoice(Voice):
    """Features of a text are the scores ``[n_way]`` of the names that it is asked about (``Batch.asked``)."""

    slot = "label"
    scores_names = True

    def __init__(self, bare: Any) -> None:
        # Of frozen states. How many scores there are follows from the task.
        self.size = int(bare.config.hidden_size)

    def read(self, module: Any, bare: Any, inputs: dict[str, Tensor]) -> Tensor:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        words, real = (inputs[f"{NAMES}{name}"] for name in ("input_ids", "attention_mask"))
        lengths, length = mask.sum(dim=1), mask.shape[1]
        # Rows end in few different places, and only there the vocabulary is asked for. A prompt's own rows come first.
        ends, which = (lengths - 1 - length).unique(return_inverse=True)
        first = module(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=ends)
        after = _log_likelihood(first.logits[torch.arange(len(ids), device=ids.device), which])
        scores = after[:, words[:, 0]]
        long = (real.sum(dim=1) > 1).nonzero()[:, 0]
        if len(long):
            rest = self._rest(bare, first, mask, words[long], real[long])
            scores = scores.index_add(1, long, rest)
        return scores / real.sum(dim=1)

    def _rest(self, bare: Any, first: Any, mask: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Log-likelihood ``[n, names]`` of all tokens but the first of each name, after the texts that ``first``, an
        output of the model, is of."""
        n, count, argument = len(mask), len(words), cache_argument(bare)
        assert argument is not None, "a causal model goes on from a text"
        cache = getattr(first, argument)
        if cache is None:
            raise ValueError(
                "With gradient checkpointing transformers keeps no keys and values of a text, from which "
                "head='verbalizer' goes on to names of several tokens. Turn it off, give each class a word of one "
                "token as verbalizer, or use head='linear'."
            )
        cache.batch_repeat_interleave(count)
        # What stands before the texts, such as a soft prompt, was never padded.
        before = cache.get_seq_length() - mask.shape[1]
        seen = torch.cat([mask.new_ones(n, before), mask], dim=1).repeat_interleave(count, dim=0)
        given, follow, known = (each.repeat(n, 1) for each in (words[:, :-1], words[:, 1:], real[:, 1:]))
        start = (before + mask.sum(dim=1)).repeat_interleave(count)
        places = start[:, None] + torch.arange(given.shape[1], device=mask.device)
        logits = bare(
            input_ids=given,
            attention_mask=torch.cat([seen, real[:, :-1].repeat(n, 1)], dim=1),
            position_ids=places,
            **{argument: cache},
        ).logits
        found = _log_likelihood(logits).gather(2, follow[..., None])[..., 0]
        return (found * known).sum(dim=1).view(n, count)

    def read_frozen(self, bare: Any, inputs: dict[str, Tensor]) -> Tensor:
        return pool(bare.base_model(**inputs).last_hidden_state, inputs["attention_mask"], "last")


def _log_likelihood(logits: Tensor) -> Tensor:
    """Of each token, in single precision at least: half of it, as under autocast, leaves steps of a sixteenth."""
    return logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def find_voice(bare: Any, tokenizer: Any) -> Voice:
    """How the language model ``bare`` speaks.

    Raises:
        ValueError: it does not.
    """
    if bare.get_output_embeddings() is None:
        raise ValueError(
            f"head='verbalizer' needs a language model, and {type(bare).__name__} has no output embeddings. Build the "
            f"model with head='verbalizer', too, or use head='linear' with head_init='names'."
        )
    return CausalVoice(bare) if is_causal(bare) else MaskedVoice(bare, tokenizer)
