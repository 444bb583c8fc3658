"""Tests that need a process of their own."""
import os
import subprocess
import sys
from pathlib import Path


def pass_in_the_interpreter(path, some):
    """The tests of a file that `-k some` chooses pass where Triton interprets its kernels,
    which has to be decided before Triton is imported."""
    path = Path(path)
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-k", some, "-p", "no:cacheprovider", path.name],
                          cwd=path.parent, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-4000:] + done.stderr[-2000:]
