import datasets
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from fewshot_nlp.data import TextEncoder, load_pools
from tests.data.toy_data import CLASSES, make_dataset, make_pool

WORDS = [*CLASSES, *map(str, range(40)), *"abcd", "sentence", "number", "hello", "there", "you", "all"]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """Hugging Face's data set cache, away from the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield folder


@pytest.fixture
def dataset():
    return make_dataset()


@pytest.fixture
def pools(dataset):
    return load_pools(dataset, name="toy")


@pytest.fixture
def pool():
    return make_pool(dict.fromkeys(CLASSES, 12))


@pytest.fixture
def tokenizer():
    """One token for each word of the toy data, so that different texts have different ids."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )  # fmt: skip


@pytest.fixture
def encoder(tokenizer):
    return TextEncoder(tokenizer, max_length=16)
