"""Data sets that need no Hub: built on the user's machine from packages, cached where Hugging Face caches.

``home_intents``: sentences that people say to a voice assistant at home, from the templates of Home Assistant's own
(packages ``home-assistant-intents`` and ``hassil``), the slots filled from the word lists beside this file.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from fewshot_nlp.data.cache import cache_root, read_splits, write_splits
from fewshot_nlp.data.sentences import WORD_LISTS, SentenceSampler, Words
from fewshot_nlp.data.splits import SPLITS, random_splits

MIN_SENTENCES = 20
MAX_SENTENCES = 200
#: Part of the cache key: raise it when the code below would build something else.
BUILD = 2

#: First match wins: intents of one subject stay together, so that no test intent has a sibling in training. Every split
#: has families of siblings (timers; lists; media), which make its episodes hard, and intents that stand alone.
SUBJECTS = {
    "Media": "test",
    "Volume": "test",
    "Vacuum": "test",
    "Broadcast": "test",
    "List": "validation",
    "LawnMower": "validation",
    "Weather": "validation",
    "CurrentDate": "validation",
    "CurrentTime": "validation",
}


def home_intents(language: str = "en", cache_dir: str | Path | None = None) -> DatasetDict:
    """Sentences to a voice assistant at home, labelled with what is wanted.

    Every intent with at least 20 distinct sentences, at most 200 of each, no sentence twice (ignoring case). The
    splits are class-disjoint, and intents of one subject (timers, lists, ...) are in one split. Columns: ``text``,
    ``label`` (a ``ClassLabel`` of intent ids, the same in all splits), ``label_name`` (such as "pause a timer") and
    ``label_description`` (one sentence), the last two in English.

    Args:
        language: a language of ``home_assistant_intents``. Rooms and devices are named in English where this package
            has no word list for the language; numbers, colours and states are the language's own.
        cache_dir: where to keep the built set; Hugging Face's data set cache if not given.

    Raises:
        ImportError: a package of the ``offline`` extra is missing.
        ValueError: the language is unknown, or has too few intents for three splits.
    """
    versions = {name: _version(name) for name in ("home-assistant-intents", "hassil")}
    words = sorted((path.name, path.read_text(encoding="utf-8")) for path in WORD_LISTS.glob("*.json"))
    key = hashlib.sha256(json.dumps([BUILD, language, versions, words, SUBJECTS]).encode()).hexdigest()[:12]
    name = f"home_intents-{re.sub(r'[^A-Za-z-]', '_', language)}-{versions['home-assistant-intents']}-{key}"
    folder = cache_root(cache_dir) / name
    if not folder.is_dir():
        write_splits(build_home_intents(language), folder)
    return read_splits(folder, SPLITS)


def build_home_intents(language: str) -> DatasetDict:
    """As ``home_intents``, in memory."""
    try:
        import home_assistant_intents
        from hassil.intents import Intents
    except ImportError as error:
        raise _unusable(f"its packages ({error})") from error
    known = sorted(home_assistant_intents.get_languages())
    templates = home_assistant_intents.get_intents(language) if language in known else None
    if templates is None:
        raise ValueError(f"language={language!r} is not in home_assistant_intents. Use one of: {', '.join(known)}.")
    grammar = Intents.from_dict(templates)
    sampler = SentenceSampler(grammar, Words.load(language))
    # Some more than are kept, as those that two intents share are dropped.
    drawn = {intent: sampler.sample(intent, MAX_SENTENCES + 50) for intent in sorted(grammar.intents)}
    owners = Counter(text.casefold() for texts in drawn.values() for text in texts)
    kept = {
        intent: [text for text in texts if owners[text.casefold()] == 1][:MAX_SENTENCES]
        for intent, texts in drawn.items()
    }
    kept = {intent: texts for intent, texts in kept.items() if len(texts) >= MIN_SENTENCES}
    if len(kept) < 6:
        raise ValueError(
            f"language={language!r} has {len(kept)} intents with at least {MIN_SENTENCES} sentences, and three splits "
            f"need 6. Use a language with more, such as 'en', 'de' or 'fr'."
        )
    splits = split_intents(kept)
    described = json.loads((WORD_LISTS / "intents.json").read_text(encoding="utf-8"))
    return DatasetDict({split: _to_dataset(intents, kept, described) for split, intents in splits.items()})


def describe_intent(intent: str) -> tuple[str, str]:
    """A readable name and a description made from an intent id, for intents newer than the word lists."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", intent.removeprefix("Hass")).lower()
    return words, f"Asks the assistant for: {words}."


def split_intents(intents: Collection[str]) -> dict[str, list[str]]:
    """Intents of one subject in one split; dealt at random where a language has too few subjects for that."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for intent in sorted(intents):
        splits[next((split for subject, split in SUBJECTS.items() if subject in intent), "train")].append(intent)
    return splits if min(map(len, splits.values())) >= 2 else random_splits(intents, fractions=(1 / 3, 1 / 3, 1 / 3))


def _to_dataset(intents: list[str], kept: dict[str, list[str]], described: dict[str, list[str]]) -> Dataset:
    features = Features(
        {
            "text": Value("string"),
            "label": ClassLabel(names=list(kept)),
            "label_name": Value("string"),
            "label_description": Value("string"),
        }
    )
    columns: dict[str, list[Any]] = {name: [] for name in features}
    for intent in intents:
        name, description = described.get(intent) or describe_intent(intent)
        for text in kept[intent]:
            for column, value in zip(columns.values(), (text, intent, name, description), strict=True):
                column.append(value)
    columns["label"] = features["label"].str2int(columns["label"])
    return Dataset.from_dict(columns, features=features)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise _unusable(f"the package {package}") from error


def _unusable(needed: str) -> ImportError:
    return ImportError(f'home_intents needs {needed}. Run: pip install "fewshot_nlp[offline]"')
