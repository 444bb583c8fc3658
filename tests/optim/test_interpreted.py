"""The kernels where there is no GPU, by Triton's interpreter. The tests stand in the files that are named here; they need a
process that has chosen the interpreter before it imports Triton. Two, for each imports torch anew, which takes seconds."""
from pathlib import Path

import pytest
import torch

from flashoptim_nb.optim.backend import INTERPRETED
from processes import pass_in_the_interpreter

KERNELS = {"test_adamw.py": "kernel", "test_momentum.py": "kernel", "test_rounding.py": "kernel"}  # what is marked `kernel`
OPTIMIZERS = {
    "test_muon.py": "fused_is_the_reference and cpu", "test_optim.py": "no_longer_fit",
    "test_host.py": "test_same_bits and release and max_norm",
    "test_layouts.py": "(fused-torch.bfloat16-FlashAdamW and column) or (place-fused-contiguous and transposed) "
                       "or (state and fused-exp_avg)"}  # as many as take a few seconds


@pytest.mark.skipif(torch.cuda.is_available() or INTERPRETED, reason="the kernels run in this process")
@pytest.mark.parametrize("chosen", [KERNELS, OPTIMIZERS], ids=["kernels", "optimizers"])
def test_kernels_in_the_interpreter(chosen):
    pass_in_the_interpreter(Path(__file__).parent, chosen)
