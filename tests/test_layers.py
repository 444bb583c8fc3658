"""The package keeps its shape: three slices over one engine, and each imports only what its row of the table allows."""
import ast
import json
import re
from pathlib import Path

import pytest

import flashoptim_nb
from flashoptim_nb.report.book import SLICES, is_chapter, notebook_paths
from flashoptim_nb.surrogates.registry import domains

MAY_IMPORT = {
    "base": "",
    "optim": "base",
    "train": "base optim",
    "measure": "base optim train",
    "lm": "base optim train measure",
    "surrogates": "base optim train measure",
    "study": "base optim train measure lm surrogates",
    "report": "base optim train measure lm surrogates study",
    "cli": "base optim train measure lm surrogates study report",
}
PACKAGE = Path(flashoptim_nb.__file__).parent
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)


def place(path):
    "A module by its parts: study/h1/criteria.py -> (study, h1, criteria)."
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path):
    "The package's own modules that a module imports, by their parts, also inside functions."
    here = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            if not node.level:
                if full[0] != "flashoptim_nb":
                    continue
                full = full[1:]
            for name in node.names:
                yield (*full, name.name) if (PACKAGE.joinpath(*full, name.name).with_suffix(".py")).exists() else full
        elif isinstance(node, ast.Import):
            yield from [tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("flashoptim_nb.")]


def within(name, *folder): return name[: len(folder)] == folder


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_what_its_slice_may(path):
    slice_, *_ = here = place(path)
    assert slice_ in MAY_IMPORT, f"{slice_} is no slice"
    wrong = [".".join(m) for m in imported(path)
             if m and m[0] in MAY_IMPORT and m[0] != slice_ and m[0] not in MAY_IMPORT[slice_].split()]
    assert not wrong, f"{'.'.join(here)} imports {wrong}"
    if slice_ == "optim":
        beyond = [".".join(m) for m in imported(path) if m[:1] == ("base",) and m not in (("base", "errors"), ("base", "patch"))]
        assert not beyond, f"the optimizer stands alone; {'.'.join(here)} imports {beyond}"


ENGINE = ("statistics", "expression", "hypothesis", "evidence", "decisions", "consistency", "verdict")


@pytest.mark.parametrize("name", ENGINE)
def test_the_engine_that_judges_names_no_hypothesis(name):
    wrong = [".".join(m) for m in imported(PACKAGE / "study" / f"{name}.py")
             if within(m, "study") and m[1:] and m[1] not in ENGINE]
    assert not wrong, f"study.{name} imports {wrong}"


RUNS = ("checkpoint", "loop", "presets", "run", "experiment", "journal", "registration", "manifest",
        "runner")


@pytest.mark.parametrize("name", RUNS)
def test_the_engine_that_runs_names_no_study(name):
    wrong = [".".join(m) for m in imported(PACKAGE / "study" / f"{name}.py")
             if within(m, "study") and m[1:] and m[1] not in ENGINE + RUNS]
    assert not wrong, f"study.{name} imports {wrong}"


DOMAINS = ("surrogates", "domains")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nobody_reaches_into_a_domain(path):
    "Others find a domain by the registry, which imports folders by listing them; a domain knows no other."
    here = place(path)
    wrong = [".".join(m) for m in imported(path) if within(m, *DOMAINS) and m[:3] != here[:3]]
    assert not wrong, f"{'.'.join(here)} imports {wrong}"


@pytest.mark.parametrize("name", notebook_paths(PACKAGE.parent / "nbs"), ids=str)
def test_a_notebook_shows_its_own_domain_or_the_toy(name):
    "A chapter draws its domain's figures; other examples are of the toy domain."
    cells = json.loads((PACKAGE.parent / "nbs" / name).read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    found = {folder for folder in re.findall(r"surrogates\.domains\.(\w+)\.", code) if folder != "toy"}
    folder = Path(name).parent
    own = ({folder.name} if within(folder.parts, *DOMAINS) else found if folder.name == "h2" and len(found) == 1
           else set())
    assert found <= own, f"{name} reaches into {sorted(found - own)}"


def test_the_registry_has_every_folder():
    folders = sorted(path.parent.name for path in PACKAGE.joinpath(*DOMAINS).glob("*/spec.py"))
    assert len(folders) == len(domains()) and folders == sorted(
        path.name for path in PACKAGE.joinpath(*DOMAINS).iterdir() if path.is_dir() and path.name != "__pycache__")


def test_each_folder_of_notebooks_is_a_slice_or_holds_pages():
    folders = {Path(name).parent.as_posix() for name in notebook_paths(PACKAGE.parent / "nbs")}
    library = {folder for folder in folders if folder.partition("/")[0] in SLICES}
    assert set(SLICES) == set(MAY_IMPORT) and library == {
        path.parent.relative_to(PACKAGE).as_posix() for path in MODULES
        if path.name not in ("__init__.py", "_modidx.py")}
    assert all(is_chapter(f"{folder}/x.ipynb") or folder == "start" for folder in folders - library - {"."})
