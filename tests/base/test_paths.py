"""What lies in the working directory is a user's, not the program's: none of it is run."""
import os
import subprocess
import sys

import pytest

from flashoptim_nb.base.machine import repo_root

NAMES = ("pysat", "jupyter_book", "sphinx", "multiprocessing", "torch", "json", "runpy", "sitecustomize")
DRIVE = """
import os, pathlib, sys
sys.path[:] = [p for p in sys.path if p]
from flashoptim_nb.base import machine
from flashoptim_nb.base.errors import UserError
"""
USES = dict(
    solver="""
from flashoptim_nb.surrogates.domains.independent_sets.exact import largest_containing
from flashoptim_nb.surrogates.domains.independent_sets.graphs import random_3sat
print(largest_containing(random_3sat(30, 1), (), "rc2", 30))
""",
    sphinx="""
from flashoptim_nb.report.book import run_sphinx
try: run_sphinx(pathlib.Path("none"), pathlib.Path("aside"))
except UserError as error: print(error)
""",
    notebooks="""
if __name__ == "__main__":
    import json
    from flashoptim_nb.report import notebooks
    notebooks.PRELOADED[:] = []
    nb = pathlib.Path("notebooks/a.ipynb"); nb.parent.mkdir()
    nb.write_text(json.dumps(dict(cells=[dict(cell_type="code", source="import json, torch", metadata={}, outputs=[], execution_count=None, id="a")], metadata={}, nbformat=4, nbformat_minor=5)))
    print(notebooks.execute_all([notebooks.Job("a", nb.absolute(), pathlib.Path("a.out").absolute(), {})]))
""",
    workers="""
if __name__ == "__main__":
    import multiprocessing
    with machine.safe_path():
        process = multiprocessing.get_context("spawn").Process(target=print, args=("done",))
        process.start()
    process.join()
""",
    programs="""
from flashoptim_nb.surrogates.domains.aerodynamics.solvers import Xfoil
print(machine.commit(), machine.provenance("cpu")["driver"], machine._driver(), machine.capabilities()["compile"])
try: Xfoil(); print("xfoil")
except UserError as error: print(error)
""",
)


@pytest.mark.parametrize("use", USES)
def test_nothing_in_the_working_directory_is_run(use, tmp_path):
    here, ran = tmp_path / "here", tmp_path / "ran"
    here.mkdir(), ran.mkdir()
    for name in NAMES:
        (here / name).mkdir()
        (here / name / "__init__.py").write_text(f"open({str(ran / name)!r}, 'w')\n")
    for name in ("git", "nvidia-smi", "xfoil", "gcc", "cc", "g++"):
        (here / name).write_text(f"#!/bin/sh\ntouch {ran / name}\n")
        (here / name).chmod(0o755)
    # a script's own folder is on its path, the working directory is not
    (tmp_path / "drive.py").write_text(DRIVE + USES[use])
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONSAFEPATH", "FLASHOPTIM_COMMIT", "CXX")}
    env |= dict(PYTHONPATH=str(repo_root()), PATH=os.pathsep.join([".", "", env["PATH"]]))
    done = subprocess.run(
        [sys.executable, tmp_path / "drive.py"], cwd=here, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert not sorted(path.name for path in ran.iterdir()), done.stdout


def test_a_checkout_that_was_given_runs_no_program_of_its_own(tmp_path):
    if subprocess.run(["git", "--version"], capture_output=True).returncode: pytest.skip("needs git")
    given, ran = tmp_path / "given", tmp_path / "ran"
    given.mkdir()
    def git(*words):
        subprocess.run(
            ["git", "-C", given, "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)
    git("init")
    (given / "flashoptim_nb").mkdir()
    (given / "flashoptim_nb" / "a.py").write_text("1\n")
    git("add", "."), git("commit", "-m", "a")
    (given / "hook").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (given / "hook").chmod(0o755)
    git("config", "core.fsmonitor", str(given / "hook"))
    git("config", "core.hooksPath", str(given))
    code = ("from flashoptim_nb.base import machine; import pathlib; machine.repo_root = lambda: "
            f"pathlib.Path({str(given)!r}); print(machine.commit())")
    ran.unlink(missing_ok=True)
    told = subprocess.run(
        [sys.executable, "-c", code], env={k: v for k, v in os.environ.items() if k != "FLASHOPTIM_COMMIT"},
        capture_output=True, text=True, check=True).stdout
    assert len(told.strip()) >= 40 and not ran.exists()
