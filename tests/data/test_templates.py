"""Texts in a template are what the tokenizer makes of the whole sentence, but for what is cut."""

from __future__ import annotations

import pytest

from fewshot_nlp.config import DEFAULT_BACKBONE
from fewshot_nlp.data.encode import encode_with_names
from fewshot_nlp.data.templates import TemplateEncoder
from fewshot_nlp.models import load_backbone, packaged_backbone
from fewshot_nlp.models.backbone import SMOLLM2
from tests.tiny import tiny_tokenizer

TEXTS = ["play the music", "lamp on"]


def words(encoder, ids):
    return encoder.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{text} set {mask}", "[CLS] play the music set [MASK] [SEP]"),
        ("the {mask} timer {text} off", "[CLS] the [MASK] timer play the music off [SEP]"),
        ("{mask}{text}", "[CLS] [MASK] play the music [SEP]"),
    ],
)
def test_the_blank_may_stand_anywhere(template, expected):
    encoder = TemplateEncoder(tiny_tokenizer(), 16, template, "mask")
    assert words(encoder, encoder.encode(TEXTS)[0]) == expected.split()


def test_names_have_nothing_around_them():
    encoder = TemplateEncoder(tiny_tokenizer(), 16, "{text} set {mask}", "mask", {"warm_lamp": ["red", "lamp on"]})
    names = encoder.encode_names(["music", "warm lamp"])
    assert [words(encoder, ids) for ids in names] == [["music"], ["red", "lamp", "on"]]
    both = encode_with_names(encoder, TEXTS, ["music"])
    assert both == [*encoder.encode(TEXTS), names[0]]
    assert encode_with_names(encoder, [], ["music"]) == [names[0]]


@pytest.mark.parametrize(
    ("max_length", "expected"),
    [(6, "[CLS] play set [MASK] off [SEP]"), (7, "[CLS] play the set [MASK] off [SEP]")],
)
def test_the_text_is_cut_and_the_template_is_not(max_length, expected):
    encoder = TemplateEncoder(tiny_tokenizer(), max_length, "{text} set {mask} off", "mask")
    assert words(encoder, encoder.encode(["play the music"])[0]) == expected.split()


def test_an_empty_text_is_an_error():
    with pytest.raises(ValueError, match=r"texts\[0\]=' ' is empty"):
        TemplateEncoder(tiny_tokenizer(), 16, "{text} {mask}", "mask").encode([" "])


@pytest.mark.offline
class TestRealTokenizers:
    SENTENCE = "Is it, as they say, raining in Oslo?"

    @pytest.mark.skipif(packaged_backbone(DEFAULT_BACKBONE) is None, reason="needs the offline extra")
    def test_word_pieces(self):
        _, tokenizer = load_backbone(DEFAULT_BACKBONE)
        encoder = TemplateEncoder(tokenizer, 64, "Well: {text} This is about {mask}.", "mask")
        whole = f"Well: {self.SENTENCE} This is about {tokenizer.mask_token}."
        assert encoder.encode([self.SENTENCE]) == [tokenizer(whole)["input_ids"]]

    @pytest.mark.skipif(packaged_backbone(SMOLLM2) is None, reason="needs data_scripts/smollm2.py")
    def test_byte_pairs(self):
        _, tokenizer = load_backbone(SMOLLM2)
        encoder = TemplateEncoder(tokenizer, 64, "{text}\nThis is about {label}", "label")
        text, name = encode_with_names(encoder, [self.SENTENCE], ["the weather"])
        assert text + name == tokenizer(f"{self.SENTENCE}\nThis is about the weather")["input_ids"]
