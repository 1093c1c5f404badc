"""Tasks from any data set: pools, samplers, mixtures, and the way from texts to tensors."""

from fewshot_nlp.data.alphabets import glyphs
from fewshot_nlp.data.clusters import divide_classes, find_clusters
from fewshot_nlp.data.embedded import home_intents
from fewshot_nlp.data.encode import EpisodeReader, TextEncoder
from fewshot_nlp.data.episodes import episodes_hash, load_episodes, save_episodes
from fewshot_nlp.data.images import ImageEncoder, ProcessorEncoder, with_rotations
from fewshot_nlp.data.mixture import (
    EpisodeMixture,
    evaluation_tasks,
    training_pools_from_config,
    training_tasks,
    training_tasks_from_config,
)
from fewshot_nlp.data.pool import Pool, load_pools, load_pools_from_config
from fewshot_nlp.data.sampler import EpisodeSampler
from fewshot_nlp.data.sinusoids import SinusoidSampler, read_sinusoid

__all__ = [
    "EpisodeMixture",
    "EpisodeReader",
    "EpisodeSampler",
    "ImageEncoder",
    "Pool",
    "ProcessorEncoder",
    "SinusoidSampler",
    "TextEncoder",
    "divide_classes",
    "episodes_hash",
    "evaluation_tasks",
    "find_clusters",
    "glyphs",
    "home_intents",
    "load_episodes",
    "load_pools",
    "load_pools_from_config",
    "read_sinusoid",
    "save_episodes",
    "training_pools_from_config",
    "training_tasks",
    "training_tasks_from_config",
    "with_rotations",
]
