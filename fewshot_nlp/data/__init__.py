"""Tasks from any data set: pools, samplers, mixtures, and the way from texts to tensors."""

from fewshot_nlp.data.embedded import home_intents
from fewshot_nlp.data.encode import EpisodeReader, TextEncoder
from fewshot_nlp.data.pool import Pool, load_pools, load_pools_from_config
from fewshot_nlp.data.sampler import EpisodeSampler

__all__ = [
    "EpisodeReader",
    "EpisodeSampler",
    "Pool",
    "TextEncoder",
    "home_intents",
    "load_pools",
    "load_pools_from_config",
]
