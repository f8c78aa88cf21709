"""What every test shares: one thread, seeds, and the toys, built once."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from functools import cache

import pytest

# What is slow to import is imported where it is used: the process that only hands tests to the others then starts at once.


@cache
def _subject(family):
    from probe import load
    from tests import toys

    return load(toys.build(family))


@pytest.fixture(scope="session")
def toy():
    """toy("llava"): a Subject of that family, shared by all tests; no test may leave it changed."""
    return _subject


@pytest.fixture
def pair():
    """Two examples of different length and picture, so that a batch of them is padded."""
    from probe import Example
    from tests import toys

    return [
        Example("a", "what color is the ball ?", (toys.picture(),), suffix="yes no"),
        Example("b", "is there a dog in the park ?", (toys.picture(30, 50, 1),), suffix="one"),
    ]


def pytest_collection_finish(session: pytest.Session) -> None:
    """One thread; and what was imported stays to the end: the collector need not look at it again and again (a third of a second each time)."""
    import torch

    torch.set_num_threads(1)
    gc.freeze()
