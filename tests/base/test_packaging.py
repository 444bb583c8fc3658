"""What is installed: the optimizers need torch, Triton and numpy; an extra brings what its modules import; what is
built works in an empty folder."""
import ast
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser

import pytest

from flashoptim_nb.base.errors import EXTRAS, UserError, install_line
from flashoptim_nb.base.machine import repo_root, skip_without

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


def test_how_to_install_is_said_in_one_place():
    "An extra is named by a command that works: the clone's, or that of where the package came from."
    said = re.compile(r"pip install '(\.|flashoptim_nb)\[|\(pip install \{")
    found = [path.relative_to(REPO).as_posix() for path in (REPO / "flashoptim_nb").rglob("*.py")
             if said.search(path.read_text())]
    assert found == ["flashoptim_nb/base/errors.py"]
    with pytest.raises(UserError) as told: skip_without("os", "no_such_package")
    assert str(told.value).endswith(f"the package no_such_package, which is not installed; {install_line('all')}")


@pytest.mark.parametrize("absent, extra, words",
                         [("rich", "study", ["run", "h1", "--scale", "laptop", "--dry-run"]),
                          ("yaml", "book", ["book"])])
def test_the_command_says_which_extra_is_missing(absent, extra, words):
    # as if it were not installed
    code = (f"import sys; sys.modules[{absent!r}] = None; from flashoptim_nb.cli.main import main; "
            f"sys.exit(main({words}))")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ) | {"PYTHONPATH": str(REPO)})
    assert (done.returncode == 2 and f"needs the package {absent}" in done.stderr
            and f"pip install '.[{extra}]'" in done.stderr), done.stderr


def test_versions_of_python_that_are_promised_are_the_same_everywhere():
    settings = ConfigParser(delimiters=["="])
    settings.read(REPO / "settings.ini")
    cfg = settings["DEFAULT"]
    promised = re.findall(r"Python :: (3\.\d+)", cfg["classifiers"])
    assert promised[0] == cfg["min_python"] and promised == sorted(promised, key=lambda v: int(v[2:]))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The package as pip installs it from a source distribution, in a folder of its own; nothing is fetched."
    clone, built, target = (tmp_path_factory.mktemp(name) for name in ("clone", "built", "target"))
    hidden = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("flashoptim_nb", "data"): shutil.copytree(REPO / name, clone / name, ignore=hidden)
    for name in ("setup.py", "settings.ini", "MANIFEST.in", "README.md", "LICENSE", "NOTICE", "CITATION.cff",
                 "CHANGELOG.md"):
        shutil.copy(REPO / name, clone)
    def done(*words, at): subprocess.run([sys.executable, *words], cwd=at, check=True, capture_output=True)
    done("setup.py", "-q", "sdist", "--formats", "tar", "-d", built, at=clone)
    shutil.unpack_archive(next(built.glob("*.tar")), built)
    (source,) = (path for path in built.iterdir() if path.is_dir())
    done("-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--target", target, source,
         at=built)
    return target


# the folder of the test stands for everywhere outside a clone: neither the clone nor its installation is found
OUTSIDE = """
import sys
sys.modules.update(dict.fromkeys({absent!r}))  # as if they were not installed
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in repr(finder)]
"""
MAIN = """
from flashoptim_nb.cli.main import main
for words in {commands!r}:
    print("$", *words)
    try: status = main(words)
    except SystemExit as end: status = end.code
    print("status", status)
"""


def outside(installed, folder, code, *absent):
    "What the code prints in an empty folder, after the package was installed and with some modules out of reach."
    env = {key: value for key, value in os.environ.items() if not key.startswith("FLASHOPTIM_")}
    done = subprocess.run(
        [sys.executable, "-c", OUTSIDE.format(absent=absent) + code], cwd=folder, capture_output=True, text=True,
        env=env | dict(PYTHONPATH=str(installed), PYTHONSAFEPATH="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def test_commands_work_outside_a_clone(installed, tmp_path):
    commands = [["doctor"], ["fit", "--params", "1B"], ["verdict", "h1"],
                *[["run", h, "--preset", "laptop", "--dry-run"] for h in ("h1", "h2")], ["bench", "memory", "--dry-run"],
                ["check", str(installed / "flashoptim_nb/data/records/bench-gpu-nvidia-h200")], ["book"]]
    out, error = outside(installed, tmp_path, MAIN.format(commands=commands))
    told = [part.rsplit("status ", 1) for part in out.split("$ ")[1:]]
    assert [int(status) for _, status in told] == [0] * 7 + [2], out + error
    assert "0 problems" in told[6][0] and "clone the repository" in error and not any(tmp_path.iterdir())


def test_without_extras_a_command_works_or_names_all_that_it_lacks(installed, tmp_path):
    commands = [["doctor"], ["fit", "--params", "1B"], ["fit", "--help"], ["quality", "--help"], ["verdict", "h1"],
                ["run", "h1", "--preset", "laptop", "--dry-run"], ["check"], ["bench"]]
    modules = {name for names in EXTRAS.values() for name in names} | {"fastcore", "triton"}
    out, error = outside(installed, tmp_path, MAIN.format(commands=commands), *modules)
    assert re.findall(r"^status (\w+)", out, re.M) == ["0"] * 4 + ["2"] * 4, out + error
    assert "pandas, scipy" in error and "pip install 'flashoptim_nb[lm] @ git+https://" in error and "flashoptim_nb[study]" in out
    assert "Next: flashoptim-nb fit --params 7B" in out
