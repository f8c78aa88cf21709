"""What every test shares: one thread, seeds, and the toys, built once."""

import gc
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from functools import cache

import pytest
import torch

from probe import Example, Subject, load
from tests import toys

torch.set_num_threads(1)


@cache
def _subject(family: str) -> Subject:
    return load(toys.build(family))


@pytest.fixture(scope="session")
def toy() -> Callable[[str], Subject]:
    """toy("llava"): a Subject of that family, shared by all tests; no test may leave it changed."""
    return _subject


@pytest.fixture
def pair() -> list[Example]:
    """Two examples of different length and picture, so that a batch of them is padded."""
    return [
        Example("a", "what color is the ball ?", (toys.picture(),), suffix="yes no"),
        Example("b", "is there a dog in the park ?", (toys.picture(30, 50, 1),), suffix="one"),
    ]


def pytest_collection_finish(session: pytest.Session) -> None:
    """What was imported stays to the end: the collector need not look at it again and again (a third of a second each time)."""
    gc.freeze()
