from dataclasses import replace

import pytest
import torch

from fewshot_nlp.data import EpisodeMixture, EpisodeReader, EpisodeSampler, TextEncoder
from fewshot_nlp.types import OUT_OF_SCOPE
from tests.data.toy_data import CLASSES, make_pool


class CountingEncoder(TextEncoder):
    """Counts the texts that are tokenized."""

    texts = 0

    def encode(self, texts):
        self.texts += len(texts)
        return super().encode(texts)


def test_it_gives_what_the_tokenizer_gives_less_token_types(encoder, tokenizer):
    texts = ["hello there you", "hello", "apple sentence number " * 9]
    expected = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    inputs = encoder(texts)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    for name, tensor in inputs.items():
        assert tensor.dtype == torch.int64
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


def test_it_pads_to_the_longest_of_the_batch_and_cuts_at_max_length(encoder):
    assert encoder(["hello"])["input_ids"].shape[1] < encoder(["hello there you all"])["input_ids"].shape[1] <= 16
    assert encoder(["hello " * 50])["input_ids"].shape == (1, 16)


def test_it_pads_on_the_tokenizers_side(tokenizer):
    tokenizer.padding_side = "left"
    inputs = TextEncoder(tokenizer, max_length=16)(["hello", "hello there you"])
    assert inputs["attention_mask"][0, 0] == 0
    assert inputs["attention_mask"][0, -1] == 1
    assert inputs["input_ids"][0, 0] == tokenizer.pad_token_id
    torch.testing.assert_close(inputs["input_ids"], tokenizer(["hello", "hello there you"], padding=True,
                               return_tensors="pt")["input_ids"])  # fmt: skip


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], r"texts=\[\] must be a list of one or more texts"),
        ("turn on", "texts='turn on' must be a list"),
        (["fine", " "], r"texts\[1\]=' ' is empty or no text"),
        ([3], r"texts\[0\]=3 is empty or no text"),
    ],
)
def test_bad_texts_are_errors(encoder, texts, message):
    with pytest.raises(ValueError, match=message):
        encoder(texts)


def test_lengths_that_the_tokenizer_cannot_keep_are_errors(tokenizer):
    TextEncoder(tokenizer, 3)
    TextEncoder(tokenizer, tokenizer.model_max_length)
    for max_length in (2, tokenizer.model_max_length + 1):
        with pytest.raises(ValueError, match=rf"max_length={max_length} is out of range.*from 3 to"):
            TextEncoder(tokenizer, max_length)
    with pytest.raises(ValueError, match="max_length=0 is out of range"):
        TextEncoder(tokenizer, 0)


def test_a_tokenizer_without_padding_token_is_an_error(tokenizer):
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no padding token\. Set tokenizer\.pad_token = tokenizer\.eos_token"):
        TextEncoder(tokenizer)


def test_an_episode_is_read_class_by_class_with_out_of_scope_last(encoder, pool):
    sampler = EpisodeSampler(pool, n_way=3, k_shot=2, n_query=4, n_out_of_scope=5)
    spec = sampler[7]
    episode = EpisodeReader(pool, encoder)(spec)
    assert episode.spec is spec
    assert episode.support.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert episode.query.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [OUT_OF_SCOPE] * 5
    assert episode.support.labels.dtype == episode.query.labels.dtype == torch.int64
    assert episode.support.n_way == episode.query.n_way == 3
    support = [row for rows in spec.support for row in rows]
    query = [row for rows in spec.query for row in rows] + list(spec.out_of_scope)
    for batch, rows in ((episode.support, support), (episode.query, query)):
        assert len(batch) == len(rows)
        expected = encoder(pool.texts(rows))
        assert batch.inputs.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(batch.inputs[name], expected[name], rtol=0, atol=0)


def test_an_episode_without_examples_is_told_by_names(encoder, pool):
    (spec,) = EpisodeSampler(pool, n_way=3, k_shot=0, n_query=2, num_episodes=1)
    assert spec.support == ((), (), ())
    episode = EpisodeReader(pool, encoder, use_label_names=True)(spec)
    assert len(episode.support) == 0 and len(episode.query) == 6
    known = episode.support.with_names_as_examples(1)
    assert known.labels.tolist() == [0, 1, 2]
    expected = encoder([pool.readable_name(name) for name in spec.classes])
    assert torch.equal(known.inputs["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match=r"has no examples\. Use k_shot of at least 1, or use_label_names"):
        EpisodeReader(pool, encoder)(spec)


@pytest.mark.parametrize("cache_size", [0, 3, 1000])
def test_the_cache_changes_nothing_but_the_work(tokenizer, pool, cache_size):
    counting = CountingEncoder(tokenizer, max_length=16)
    reader = EpisodeReader(pool, counting, cache_size)
    fresh = EpisodeReader(pool, TextEncoder(tokenizer, max_length=16), 0)
    sampler = EpisodeSampler(pool, n_way=3, k_shot=1, n_query=2, num_episodes=200)
    for spec in sampler:
        for found, expected in zip(reader(spec).query.inputs.values(), fresh(spec).query.inputs.values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(reader._encoded) <= cache_size
    if cache_size == 0:
        assert counting.texts == 200 * 9
    if cache_size == 1000:
        assert counting.texts == len(pool)


def test_a_row_used_twice_is_tokenized_once(tokenizer, pool):
    counting = CountingEncoder(tokenizer, max_length=16)
    spec = EpisodeSampler(pool, n_way=2, k_shot=1, n_query=1)[0]
    twice = replace(spec, support=((spec.support[0][0],) * 2, spec.support[1]))
    assert EpisodeReader(pool, counting)(twice).support.inputs["input_ids"].shape[0] == 3
    assert counting.texts == 4


def test_one_reader_serves_all_splits(encoder, pools):
    reader = EpisodeReader(pools, encoder)
    for pool in pools.values():
        spec = EpisodeSampler(pool, n_way=2, k_shot=1, n_query=1)[0]
        (row,) = spec.support[0]
        expected = encoder(pool.texts([row, spec.support[1][0]]))
        torch.testing.assert_close(reader(spec).support.inputs["input_ids"], expected["input_ids"])


def test_one_reader_serves_samplers_and_mixtures(encoder, pool):
    letters = make_pool(dict.fromkeys("abcd", 9), name="letters")
    samplers = [EpisodeSampler(p, n_way=2, k_shot=1, n_query=1) for p in (pool, letters)]
    mixture = EpisodeMixture(samplers)
    reader = EpisodeReader(mixture, encoder)
    for index in range(10):
        assert len(reader(mixture[index]).query) == 2
    assert len(EpisodeReader(samplers[0], encoder)(samplers[0][0]).support) == 2
    with pytest.raises(ValueError, match=r"letters/train/0 is of none of the reader's pools: toy/train"):
        EpisodeReader(samplers[0], encoder)(samplers[1][0])


def test_rows_beyond_the_pool_are_an_error(encoder):
    spec = EpisodeSampler(make_pool(dict.fromkeys(CLASSES, 30)), n_way=8, k_shot=10, n_query=10)[0]
    with pytest.raises(ValueError, match="has rows beyond the 16 of its pool"):
        EpisodeReader(make_pool(dict.fromkeys(CLASSES, 2)), encoder)(spec)


def test_two_pools_of_one_address_are_an_error(encoder):
    first, second = make_pool({"a": 3}), make_pool({"b": 3})
    with pytest.raises(ValueError, match="Two different pools are called toy/train"):
        EpisodeReader({"one": first, "two": second}, encoder)
    EpisodeReader({"one": first, "two": make_pool({"a": 3})}, encoder)


def test_cache_size_is_checked(encoder, pool):
    with pytest.raises(ValueError, match="cache_size=-1 is out of range"):
        EpisodeReader(pool, encoder, cache_size=-1)


def test_class_names_come_with_the_support_set(encoder, tokenizer):
    pool = make_pool({"lost_card": 3, "topUp": 3, "refund": 3})
    pool = replace(pool, readable_names={"refund": "money back"})
    spec = replace(EpisodeSampler(pool, n_way=3, k_shot=1, n_query=1)[0], support=((0,), (3, 4), (6,)))
    spec = replace(spec, classes=("lost_card", "topUp", "refund"))
    without = EpisodeReader(pool, encoder)(spec)
    counting = CountingEncoder(tokenizer, max_length=16)
    reader = EpisodeReader(pool, counting, use_label_names=True)
    episode = reader(spec)
    assert episode.support.labels.tolist() == [0, 1, 1, 2]
    assert without.support.names is None and episode.query.names is None
    expected = encoder([*pool.texts([0, 3, 4, 6]), "lost card", "top up", "money back"])
    examples = episode.support.with_names_as_examples(2)
    assert examples.labels.tolist() == [0, 1, 1, 2, 0, 1, 2, 0, 1, 2] and examples.names is None
    for name in expected:
        torch.testing.assert_close(episode.support.inputs[name], expected[name][:4], rtol=0, atol=0)
        torch.testing.assert_close(episode.support.names[name], expected[name][4:], rtol=0, atol=0)
        twice = torch.cat([expected[name], expected[name][4:]])
        torch.testing.assert_close(examples.inputs[name], twice, rtol=0, atol=0)
        torch.testing.assert_close(episode.query.inputs[name], without.query.inputs[name], rtol=0, atol=0)
    before = counting.texts
    reader(spec)
    assert counting.texts == before, "names are kept as rows are"


def test_class_names_without_words_cannot_be_read(encoder):
    with pytest.raises(ValueError, match=r"The class '7' of 'toy' has no words .* column label_name"):
        EpisodeReader(make_pool({"a": 2, "7": 2}), encoder, use_label_names=True)
    EpisodeReader(replace(make_pool({"7": 2}), readable_names={"7": "refund"}), encoder, use_label_names=True)


def test_descriptions_in_place_of_names(encoder):
    pool = replace(make_pool({"a": 2, "b": 2}), descriptions={"a": "stop the music", "b": "warm light"})
    spec = EpisodeSampler(pool, n_way=2, k_shot=1, n_query=1)[0]
    episode = EpisodeReader(pool, encoder, use_label_names=True, label_texts="description")(spec)
    expected = encoder([*pool.texts([row for rows in spec.support for row in rows]), "stop the music", "warm light"])
    order = [2 + ["a", "b"].index(name) for name in spec.classes]
    for name in expected:
        torch.testing.assert_close(episode.support.names[name], expected[name][order], rtol=0, atol=0)


def test_a_class_without_a_description_is_an_error_where_it_is_read(encoder):
    pool = replace(make_pool({"a": 2, "b": 2}), descriptions={"a": "The first letter."})
    with pytest.raises(ValueError, match=r"The class 'b' of 'toy' has no description.*column label_description"):
        EpisodeReader(pool, encoder, use_label_names=True, label_texts="description")
    EpisodeReader(pool, encoder, label_texts="description")
    with pytest.raises(ValueError, match="label_texts='essay' is not known"):
        EpisodeReader(pool, encoder, label_texts="essay")
