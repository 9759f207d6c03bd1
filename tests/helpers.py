"""What several test files build alike."""
import copy
import functools

from prunebook.models import tiny_model as build_model


@functools.cache
def _built(family, seed, config): return build_model(family, seed, **dict(config))


def tiny_model(family, seed=0, **config):
    "A copy of a random model that is built once; a quarter of the time."
    return copy.deepcopy(_built(family, seed, tuple(sorted(config.items()))))
