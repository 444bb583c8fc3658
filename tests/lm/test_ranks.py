"""Two ranks train as one does: every configuration, the same losses on the same batches, and a checkpoint of either
is gone on with by the other."""
from pathlib import Path

import numpy as np
import pytest

from flashoptim_nb.lm.batches import Windows
from flashoptim_nb.lm.gpt import GPTConfig
from flashoptim_nb.train.ranks import launch_ranks
from flashoptim_nb.lm.task import LMTask
from flashoptim_nb.train.config import LM_CONFIGS, Recipe, TrainConfig

# a width that two ranks divide and 32 does not: 8-bit groups lie otherwise on two ranks
MODEL = GPTConfig(n_layer=2, d_model=40, n_head=2, vocab_size=250, max_seq=16)
RECIPE = Recipe(steps=50, batch=8, micro=2, seq=16, lr=1e-2, clip=0.5)
EXACT = {"fp32": TrainConfig(autocast=""), "flash_fp32": TrainConfig(autocast="", optimizer="flash_adamw")}
KINDS = iter(("none", "selective", "full") * 9)  # of checkpointing, in turn
CONFIGS = EXACT | {name: config.replace(compile=False, checkpointing=next(KINDS))
                   for name, config in LM_CONFIGS.items()}


@pytest.fixture(autouse=True)
def found_by_ranks(monkeypatch):
    "Ranks import this file."
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=":")


def task_of(name, **recipe):
    tokens = np.random.default_rng(0).integers(250, size=2_000).astype(np.uint16)
    return LMTask(MODEL, CONFIGS[name], RECIPE.replace(**recipe), Windows(tokens, 16, 8, seed=0), seed=0)


def walked():
    "Loss and norm of the gradient in each of two steps, by configuration."
    found = {}
    for name in CONFIGS:
        task = task_of(name)
        found[name] = np.array([[row["loss"], row["grad_norm"]] for row in map(task.step, (1, 2))])
    return found


def test_every_configuration_trains_as_on_one_rank():
    one, two = walked(), launch_ranks(2, walked)
    for name in CONFIGS:
        off = np.abs(two[name] / one[name] - 1).max(0)
        assert (off < (1e-6 if name in EXACT else (1e-3, 2e-2))).all(), (name, off)
