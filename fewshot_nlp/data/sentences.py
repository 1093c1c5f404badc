"""Sentences drawn from hassil templates, their slots filled from word lists.

A template such as ``<turn> on [<the>] {name}`` stands for a tree of choices that can hold millions of sentences, so
they are drawn rather than listed: one random choice at every branch.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hassil.expression import Expression, Sentence
    from hassil.intents import IntentData, Intents

WORD_LISTS = Path(__file__).with_name("word_lists")

#: Left over from a template: an unfilled slot or markup.
_MARKUP = re.compile(r"[{}<>\[\]|()]")


@dataclass(frozen=True)
class Words:
    """What fills the slots of one language.

    Attributes:
        names: values of ``{name}`` for each kind of device, such as ``light`` or ``media_player``.
        lists: values of every other slot, by the name of its list.
        unnatural: regular expressions of sentences that a template allows and nobody would say. In them ``{area}``
            stands for any value of the list, and ``{light}`` for any name of such a device.
    """

    names: dict[str, list[str]]
    lists: dict[str, list[str]]
    unnatural: list[str] = field(default_factory=list)

    @classmethod
    def load(cls, language: str) -> Words:
        """The word lists of ``language``; English words stand in for what it lacks."""
        english = json.loads((WORD_LISTS / "en.json").read_text(encoding="utf-8"))
        if language == "en":
            return cls(**english)
        # Number words are of one language, digits are of all.
        lists = {
            name: [value for value in values if value[0].isdigit()] or values
            for name, values in english["lists"].items()
        }
        path = WORD_LISTS / f"{language}.json"
        own = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(
            {**english["names"], **own.get("names", {})}, {**lists, **own.get("lists", {})}, own.get("unnatural", [])
        )


class SentenceSampler:
    """Draws the sentences of an intent.

    Args:
        intents: the grammar of one language.
        words: what fills its slots.
    """

    def __init__(self, intents: Intents, words: Words) -> None:
        self.intents = intents
        self.words = words
        values = {**words.names, **words.lists}
        self._unnatural = [
            re.compile(re.sub(r"{([a-z_]+)}", lambda m: _alternatives(values[m[1]]), pattern), re.IGNORECASE)
            for pattern in words.unnatural
        ]

    def sample(self, intent: str, count: int, max_draws: int = 4000) -> list[str]:
        """Up to ``count`` distinct sentences (ignoring case) of ``intent``, the same in every process."""
        # A string seed goes through SHA-512, and random() keeps its sequence over Python versions; choice() does not.
        rng = random.Random(f"{self.intents.language}/{intent}")
        blocks = [block for block in self.intents.intents[intent].data if block.sentences]
        found: dict[str, str] = {}
        seen = set()
        for _ in range(max_draws if blocks else 0):
            block = _choose(rng, blocks)
            sentence = self._draw_sentence(rng, block, _choose(rng, block.sentences))
            if sentence is None or sentence in seen:
                continue
            seen.add(sentence)
            if self._is_natural(sentence):
                found.setdefault(sentence.casefold(), sentence)
                if len(found) == count:
                    break
        return list(found.values())

    def _is_natural(self, sentence: str) -> bool:
        return bool(sentence) and not any(pattern.search(sentence) for pattern in self._unnatural)

    def _draw_sentence(self, rng: random.Random, block: IntentData, template: Sentence) -> str | None:
        """One sentence, or None where the template needs a list that nobody has words for."""
        try:
            text = " ".join(self._draw(rng, block, template.expression).split())
        except LookupError:
            return None
        return None if _MARKUP.search(text) else text

    def _draw(self, rng: random.Random, block: IntentData, expression: Expression) -> str:
        from hassil.expression import Alternative, Group, ListReference, Permutation, RuleReference, TextChunk

        if isinstance(expression, TextChunk):
            return expression.original_text
        if isinstance(expression, Alternative):
            return self._draw(rng, block, _choose(rng, expression.items))
        if isinstance(expression, Permutation):
            items = sorted(expression.items, key=lambda _: rng.random())
            return " ".join(self._draw(rng, block, item) for item in items)
        if isinstance(expression, Group):
            return "".join(self._draw(rng, block, item) for item in expression.items)
        if isinstance(expression, RuleReference):
            rules = {**self.intents.expansion_rules, **block.expansion_rules}
            return self._draw(rng, block, rules[expression.rule_name].expression)
        if isinstance(expression, ListReference):
            return self._fill(rng, block, expression.list_name)
        raise TypeError(f"hassil has a new kind of expression, {type(expression).__name__}. Install an older hassil.")

    def _fill(self, rng: random.Random, block: IntentData, list_name: str) -> str:
        from hassil.intents import RangeSlotList, TextSlotList

        if list_name == "name":
            return _choose(rng, self._names(block))
        own = {**self.intents.slot_lists, **block.slot_lists}.get(list_name)
        if isinstance(own, TextSlotList) and own.values:
            return self._draw(rng, block, _choose(rng, own.values).text_in)
        if isinstance(own, RangeSlotList) and list_name not in self.words.lists:
            return str(_choose(rng, list(own.get_numbers())))
        return _choose(rng, self.words.lists[list_name])

    def _names(self, block: IntentData) -> list[str]:
        """Names of the kinds of device that a block is about; of any device where it does not say."""
        domains: Any = block.requires_context.get("domain") or block.slots.get("domain") or ()
        domains = [domains] if isinstance(domains, str) else list(domains)
        known = [name for domain in domains for name in self.words.names.get(domain, [])]
        return known or [name for names in self.words.names.values() for name in names]


def _choose(rng: random.Random, items: list[Any]) -> Any:
    return items[int(rng.random() * len(items))]


def _alternatives(values: list[str]) -> str:
    return f"({'|'.join(map(re.escape, values))})"
