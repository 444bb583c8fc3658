"""Every public optimizer of the package, for the tests of what all of them do:
a new class is tested as soon as it is there."""
import inspect
from functools import partial

import torch

import flashoptim_nb.optim as optim

# FlashMuon steps matrices alone, and others as AdamW does: its own tests are in test_muon.py
CLASSES = [x for x in vars(optim).values() if isinstance(x, type) and issubclass(x, optim.FlashOptimizer)
           and x not in (optim.FlashOptimizer, optim.FlashMuon)]
# with all its moments
OPTIONS = {cls: dict(momentum=0.9) if "momentum" in inspect.signature(cls).parameters else {} for cls in CLASSES}


def muon(params, **options):
    "FlashMuon over parameters of any shapes: matrices by Muon, the others by AdamW."
    params = list(params)
    if any(not isinstance(p, torch.Tensor) for p in params): return optim.FlashMuon(params, **options)
    groups = [dict(params=[p for p in params if p.ndim == 2]),
              dict(params=[p for p in params if p.ndim != 2], algorithm="adamw")]
    return optim.FlashMuon([group for group in groups if group["params"]], **options)


MAKERS = {cls.__name__: partial(cls, **options) for cls, options in OPTIONS.items()} | {"FlashMuon": muon}
