"""Shared by all tests: the marks, and fresh random inputs that can be repeated."""
import os
import random

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than some seconds")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def rng_seed():
    "A fresh seed for torch and random; FLASHOPTIM_TEST_SEED repeats one. Pytest shows it when the test fails."
    seed = int(os.environ.get("FLASHOPTIM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"FLASHOPTIM_TEST_SEED={seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed
