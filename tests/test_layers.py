"""The package keeps its shape: data flows one way, and each name is where its layer says."""
import ast
from pathlib import Path

import pytest

import flashoptim_nb

LAYERS = ["base", "data", "kernels", "optim", "models", "train", "amortize", "measure", "judge", "report", "cli"]
PACKAGE = Path(flashoptim_nb.__file__).parent
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE)


def imported(path):
    "The package's own modules that a module imports, as (layer, name), also inside functions."
    here = path.relative_to(PACKAGE).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.level else tuple((node.module or "").split("."))
            if not node.level and full[0] != "flashoptim_nb":
                continue
            full = full if node.level else full[1:]
            yield from [full] if full and full[0] in LAYERS else []
        elif isinstance(node, ast.Import):
            yield from [tuple(a.name.split(".")[1:]) for a in node.names if a.name.startswith("flashoptim_nb.")]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_only_from_layers_above(path):
    layer = path.relative_to(PACKAGE).parts[0]
    assert layer in LAYERS, f"{layer} is no layer"
    below = [m for m in imported(path) if LAYERS.index(m[0]) > LAYERS.index(layer)]
    assert not below, f"{path.name} in {layer} imports from later layers: {below}"


def test_train_knows_neither_measures_nor_verdicts():
    seen = {m[0] for path in MODULES if path.parent.name == "train" for m in imported(path)}
    assert seen and not seen & {"measure", "judge", "report", "cli"}


def test_each_folder_of_notebooks_is_a_layer():
    folders = {p.name.split("_", 1)[1] for p in (PACKAGE.parent / "nbs").glob("[0-9][0-9]_*") if any(p.glob("*.ipynb"))}
    assert folders == {p.relative_to(PACKAGE).parts[0] for p in MODULES}
