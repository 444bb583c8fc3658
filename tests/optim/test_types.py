"""A type checker reads the package's annotations as a user's editor does:
what is right passes, what is wrong is found in its line."""
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import flashoptim_nb

SCRIPT = """
import torch
from flashoptim_nb.optim import AveragedMasters, FlashAdamW, FlashLion, FlashSGD, cast_model, enable_gradient_release

model = torch.nn.Linear(64, 64)
cast_model(model)
optimizer = FlashAdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, max_norm=1.0)
handle = enable_gradient_release(model, optimizer)
with handle.accumulate(): pass
optimizer.step()
FlashSGD(model.parameters(), lr=0.1, momentum=0.9, master_weight_bits=32)
FlashLion(model.parameters(), betas="fast")  # wrong
FlashAdamW(model.parameters(), master_weight_bits="24")  # wrong
FlashAdamW(model.parameters(), learning_rate=1e-3)  # wrong
handle.acumulate()  # wrong
enable_gradient_release(model, handle)  # wrong
"""


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_a_type_checker_reads_the_public_optimizers(tmp_path):
    (tmp_path / "user.py").write_text(SCRIPT)
    # torch's own annotations would take a minute to read; what is asked here are ours
    (tmp_path / "mypy.ini").write_text("[mypy]\n"
                                       "follow_imports = silent\n"
                                       "[mypy-torch.*,triton.*,numpy.*]\n"
                                       "follow_imports = skip\n"
                                       "follow_imports_for_stubs = True\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py"], cwd=tmp_path, capture_output=True,
        text=True, env={"MYPYPATH": str(Path(flashoptim_nb.__file__).parents[1]), "PATH": ""})
    found = {int(line.split(":")[1]) for line in done.stdout.splitlines() if ": error:" in line}
    assert (found == {n for n, line in enumerate(SCRIPT.splitlines(), 1)
                      if line.endswith("# wrong")}), done.stdout + done.stderr
