import pytest

from fewshot_nlp.data import load_pools
from tests.data.toy_data import CLASSES, make_dataset, make_pool


@pytest.fixture
def dataset():
    return make_dataset()


@pytest.fixture
def pools(dataset):
    return load_pools(dataset, name="toy")


@pytest.fixture
def pool():
    return make_pool(dict.fromkeys(CLASSES, 12))
