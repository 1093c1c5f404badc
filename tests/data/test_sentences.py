import importlib.util
import random
import re

import pytest

from fewshot_nlp.data.sentences import SentenceSampler, Words

pytestmark = [
    pytest.mark.offline,
    pytest.mark.skipif(importlib.util.find_spec("hassil") is None, reason="needs the offline extra"),
]

GRAMMAR = {
    "language": "en",
    "lists": {
        "state": {"values": [{"in": "(open|ajar)", "out": "on"}, {"in": "closed", "out": "off"}]},
        "level": {"range": {"from": 1, "to": 3}},
        "item": {"wildcard": True},
        "unheard_of": {"wildcard": True},
    },
    "expansion_rules": {"the": "(the|my)"},
    "intents": {
        "Name": {
            "data": [
                {"sentences": ["[<the> ]{name} on"], "requires_context": {"domain": ["light", "fan"]}},
                {"sentences": ["lock {name}"], "slots": {"domain": "lock"}},
            ]
        },
        "AnyName": {"data": [{"sentences": ["where is {name}"]}]},
        "List": {"data": [{"sentences": ["is it {state}"]}]},
        "Range": {"data": [{"sentences": ["level {level}"]}]},
        "Wildcard": {"data": [{"sentences": ["add {item:thing}"]}]},
        "Permutation": {"data": [{"sentences": ["(volume;[the] tv) up"]}]},
        "Unknown": {"data": [{"sentences": ["say {unheard_of}", "say {not_even_declared}", "hush"]}]},
        "LocalRule": {"data": [{"sentences": ["<verb> it"], "expansion_rules": {"verb": "(stop|halt)"}}]},
        "Case": {"data": [{"sentences": ["(Stop|stop)  [right ]now"]}]},
        "None": {"data": [{"sentences": []}]},
    },
}
WORDS = Words(
    names={"light": ["lamp"], "fan": ["breeze"], "lock": ["gate"]}, lists={"item": ["milk", "eggs"]}
)  # fmt: skip


def sampler(words=WORDS):
    from hassil.intents import Intents

    return SentenceSampler(Intents.from_dict(GRAMMAR), words)


@pytest.mark.parametrize(
    ("intent", "expected"),
    [
        ("Name", {"lamp on", "the lamp on", "my lamp on", "breeze on", "the breeze on", "my breeze on", "lock gate"}),
        ("AnyName", {"where is lamp", "where is breeze", "where is gate"}),
        ("List", {"is it open", "is it ajar", "is it closed"}),
        ("Range", {"level 1", "level 2", "level 3"}),
        ("Wildcard", {"add milk", "add eggs"}),
        ("Permutation", {"volume tv up", "volume the tv up", "tv volume up", "the tv volume up"}),
        ("Unknown", {"hush"}),
        ("LocalRule", {"stop it", "halt it"}),
        ("None", set()),
    ],
)
def test_every_sentence_of_a_template_is_found(intent, expected):
    assert set(sampler().sample(intent, 100)) == expected


def test_the_grammar_allows_every_sentence_that_is_drawn():
    """hassil's own enumeration, with the same words in the slots."""
    from hassil.intents import TextSlotList
    from hassil.sample import sample_intents

    lists = {"item": TextSlotList.from_strings(WORDS.lists["item"], name="item")}
    drawn = sampler()
    for intent in ("List", "Wildcard", "Permutation", "LocalRule", "Case"):
        listed = sample_intents(drawn.intents, lists, intent_names={intent}, exclude_sentences_with_wildcards=False)
        assert {s.casefold() for s in drawn.sample(intent, 100)} == {" ".join(s.split()).casefold() for _, s in listed}


def test_words_win_over_a_number_range():
    words = Words(WORDS.names, {"level": ["one", "two"]})
    assert set(sampler(words).sample("Range", 10)) == {"level one", "level two"}


def test_case_and_spaces_make_no_new_sentence():
    found = sampler().sample("Case", 100)
    assert {sentence.casefold() for sentence in found} == {"stop now", "stop right now"}
    assert len(found) == 2


def test_unnatural_sentences_are_left_out():
    words = Words(WORDS.names, WORDS.lists, ["^my ", "{light} on$", "ADD {item}"])
    assert set(sampler(words).sample("Name", 100)) == {"breeze on", "the breeze on", "lock gate"}
    assert sampler(words).sample("Wildcard", 100) == []


def test_a_count_ends_the_drawing_and_leaves_the_global_generator_alone():
    state = random.getstate()
    assert sampler().sample("Name", 3) == sampler().sample("Name", 7)[:3]
    assert random.getstate() == state


def test_english_words_are_whole():
    words = Words.load("en")
    assert all(values and all(v == v.strip() != "" for v in values) for values in words.lists.values())
    assert all(len(set(values)) == len(values) for values in (*words.lists.values(), *words.names.values()))
    for pattern in words.unnatural:
        re.compile(pattern)


def test_another_language_gets_english_names_and_digits():
    english, other = Words.load("en"), Words.load("xx")
    assert other.names == english.names
    assert other.lists["area"] == english.lists["area"]
    assert all(value[0].isdigit() for value in other.lists["timer_minutes"])
    assert any(not value[0].isdigit() for value in english.lists["timer_minutes"])
    assert other.unnatural == []
