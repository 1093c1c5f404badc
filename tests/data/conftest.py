import datasets
import pytest

from fewshot_nlp.data import load_pools
from tests.data.toy_data import CLASSES, make_dataset, make_pool


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
