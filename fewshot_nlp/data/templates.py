"""Texts inside a template, for language models that are to say what a text is about."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from fewshot_nlp.data.columns import readable
from fewshot_nlp.data.encode import TextEncoder


class TemplateEncoder(TextEncoder):
    """Writes a text into a template, and names of classes as the words that the template leaves open.

    The parts of a template are tokenized one by one and joined, so that a text that is too long is cut and the template
    never is. A space before the open place belongs to the words that fill it, as most vocabularies have it.

    Args:
        tokenizer: as for ``TextEncoder``.
        max_length: longest text in tokens, with its template; longer texts are cut.
        template: such as ``"{text} This is about {mask}."``, or ``"{text}\\nThis is about {label}"``.
        slot: what the model fills: ``"mask"``, or ``"label"``, which must come last.
        words: what is said for a label, by label, where it is not its name.

    Raises:
        ValueError: as ``TextEncoder``; a template with another slot, or that leaves no room for a text; several phrases
            for a label where the model says one.
    """

    def __init__(
        self,
        tokenizer: Any,
        max_length: int,
        template: str,
        slot: str,
        words: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(tokenizer, max_length)
        self.slot = slot
        self.words = {readable(name): list(said) for name, said in (words or {}).items()}
        if f"{{{slot}}}" not in template:
            models = {"mask": "fills in masked words", "label": "goes on with a text"}
            raise ValueError(
                f"template={template!r} has no {{{slot}}}, and the model {models[slot]}. Put {{{slot}}} where the name "
                f"of the class is to stand."
            )
        pieces = re.split(r"(\{text\}|\{mask\}|\{label\})", template)
        place = pieces.index(f"{{{slot}}}")
        if slot == "label":
            if place < pieces.index("{text}") or "".join(pieces[place + 1 :]).strip():
                raise ValueError(f"template={template!r} must end with {{label}}, behind {{text}}. Put it last.")
            many = next((name for name, said in self.words.items() if len(said) > 1), None)
            if many is not None:
                raise ValueError(
                    f"verbalizer says {self.words[many]} for {many!r}, and a model that goes on with a text scores one "
                    f"phrase a label. Give one."
                )
        self._space = " " if pieces[place - 1].endswith(" ") else ""
        pieces[place - 1] = pieces[place - 1].rstrip(" ")
        before, after = self._specials()
        self._parts: list[list[int] | None] = [before]
        for piece in pieces:
            if piece == "{text}":
                self._parts.append(None)
            elif piece == "{mask}":
                self._parts.append([tokenizer.mask_token_id])
            elif piece and piece != "{label}":
                self._parts.append(self._bare([piece])[0])
        # A text that the model goes on with has no end yet.
        self._parts += [after] if slot == "mask" else []
        self._room = max_length - sum(len(part) for part in self._parts if part is not None)
        if self._room < 1:
            raise ValueError(
                f"max_length={max_length} leaves no room for a text beside the {max_length - self._room} tokens of "
                f"template={template!r}. Use a longer max_length, or a shorter template."
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text in the template."""
        cut = [ids[: self._room] for ids in self._bare(self._checked(texts))]
        return [[i for part in self._parts for i in (text if part is None else part)] for text in cut]

    def encode_names(self, names: Sequence[str]) -> list[list[int]]:
        """Token ids of what is said for each name, without anything around it."""
        said = [self.words.get(readable(name), [name]) for name in names]
        every = iter(self._bare([self._space + word for each in said for word in each]))
        return [[i for _ in each for i in next(every)][: self.max_length] for each in said]

    def _bare(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids without special tokens; what a text says of the blank itself is not read as one."""
        blank = self.tokenizer.mask_token_id
        found = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [[i for i in ids if i != blank] for ids in found]

    def _specials(self) -> tuple[list[int], list[int]]:
        """The special tokens before and after a text."""
        found = self.tokenizer("a", return_special_tokens_mask=True)
        ids, mask = found["input_ids"], found["special_tokens_mask"]
        start, end = (len(list(takewhile(bool, each))) for each in (mask, mask[::-1]))
        return ids[:start], ids[len(ids) - end :]
