"""What is installed: the optimizers need torch, Triton and numpy; an extra brings what its modules import."""
import ast
import os
import re
import subprocess
import sys
from configparser import ConfigParser

import pytest

from flashoptim_nb.base.errors import EXTRAS
from flashoptim_nb.base.machine import repo_root

REPO = repo_root()
# of a module, where the names differ
DISTRIBUTION = dict(pysat="python-sat", vl_convert="vl-convert-python", z3="z3-solver", IPython="ipykernel",
                    gpytorch="botorch", huggingface_hub="datasets", yaml="jupyter-book")
SLICE_EXTRAS = dict(base=["study"], optim=[], measure=["study"], lm=["lm"], surrogates=["surrogates"],
                    study=["study", "book"], report=["book", "surrogates"], cli=["all"])
# guarded where they are imported
OPTIONAL = {"flash_attn", "transformers", "flashoptim", "bitsandbytes", "torchao", "qm9pack"}


def distribution(module): return DISTRIBUTION.get(module, module).replace("_", "-").lower()


def required(extra=None):
    """The distributions of an extra, or without one those that are always installed,
    with what is asked of their versions."""
    settings = ConfigParser(delimiters=["="])
    settings.read(REPO / "settings.ini")
    lines = settings["DEFAULT"][f"{extra}_requirements" if extra else "requirements"].split("\n")
    found = (re.match(r"([\w.-]+)([^;]*)", line.strip()) for line in lines if line.strip())
    return {one[1].lower().replace("_", "-"): one[2].strip() for one in found}


def imported(path):
    "The top-level modules that are not ours and not Python's, that a module imports, also inside functions."
    for node in ast.walk(ast.parse(path.read_text())):
        names = ([a.name for a in node.names] if isinstance(node, ast.Import)
                 else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else [])
        yield from ({name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"flashoptim_nb"})


def test_without_extras_three_packages_are_installed():
    assert set(required()) == {"torch", "triton", "numpy"}
    assert all(re.fullmatch(r">=[\d.]+", required()[name])
               for name in ("torch", "triton", "numpy")), "lower bounds only: a newer torch stays"


@pytest.mark.parametrize("folder, extras", SLICE_EXTRAS.items())
def test_an_extra_brings_what_its_modules_import(folder, extras):
    given = set(required()).union(*map(required, extras))
    for path in (REPO / "flashoptim_nb" / folder).rglob("*.py"):
        absent = {name for name in set(imported(path)) - OPTIONAL if distribution(name) not in given}
        assert not absent, (f"{path.relative_to(REPO)} imports {absent}, "
                            f"which {extras or 'the requirements'} do not bring")


def test_a_missing_module_is_named_with_its_extra():
    for extra, modules in EXTRAS.items():
        for name in modules:
            assert distribution(name) in required(extra), name


@pytest.mark.parametrize("absent, extra, words",
                         [("rich", "all", ["run", "h1", "--scale", "laptop", "--dry-run"]), ("yaml", "book", ["book"])])
def test_the_command_says_which_extra_is_missing(absent, extra, words):
    # as if it were not installed
    code = (f"import sys; sys.modules[{absent!r}] = None; from flashoptim_nb.cli.main import main; "
            f"sys.exit(main({words}))")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ) | {"PYTHONPATH": str(REPO)})
    assert (done.returncode == 2 and f"needs the package {absent}" in done.stderr
            and f"pip install 'flashoptim_nb[{extra}]'" in done.stderr), done.stderr
