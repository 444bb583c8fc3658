"""The notebooks as a reader runs them in Jupyter, on a machine without a GPU and without a network."""
import ast
import json
import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from flashoptim_nb.base.machine import repo_root
from flashoptim_nb.base.records import RECORDS
from flashoptim_nb.report.book import notebook_paths
from flashoptim_nb.report.notebooks import split_directives

NBS = repo_root() / "nbs"
ADDRESS = re.compile(r"https?://(?!www\.w3\.org/)[^\s\"'<>]+|cdn\.jsdelivr|unpkg\.com")  # but the names of SVG's own words


def code_of(name):
    return ["".join(cell["source"]) for cell in json.loads((NBS / name).read_text())["cells"]
            if cell["cell_type"] == "code"]


def asks_for_a_gpu(statement):
    return isinstance(statement, ast.If) and ast.unparse(statement.test) == "torch.cuda.is_available()"


def test_run_all_ends_on_a_cpu():
    "Jupyter knows no directives: a cell for a GPU asks for one itself, and no cell counts on not being run."
    for name in notebook_paths(NBS):
        for found, source in map(split_directives, code_of(name)):
            assert "eval" not in found, f"{name}: code that is only shown is prose"
            if "cuda" in found: assert all(map(asks_for_a_gpu, ast.parse(source).body)), f"{name}: {source}"


def test_every_chart_comes_from_the_place_that_draws_without_a_network():
    for name in notebook_paths(NBS):
        source = "\n".join(code_of(name))
        if re.search(r"^\s*(import|from) altair", source, re.M): assert "report.charts" in source, name


@pytest.mark.parametrize("name", ["report/03_charts.ipynb", "measure/01_timing.ipynb", "opt/01_step.ipynb"])
def test_what_a_kernel_shows_needs_no_network(name, tmp_path, monkeypatch):
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    # the benchmarks' records are all that these pages show, and a kernel reads what it is given anew
    monkeypatch.setenv(RECORDS, os.pathsep.join(map(str, (repo_root() / "data/records").glob("bench-*"))))
    notebook = nbformat.read(NBS / name, as_version=4)
    NotebookClient(notebook, timeout=300, resources=dict(metadata=dict(path=str((NBS / name).parent)))).execute()
    shown = [output.data for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    for data in shown: assert not ADDRESS.search(json.dumps(data)), data
    drawn = sum("image/svg+xml" in data for data in shown)
    assert not any(kind.startswith("application/vnd.vega") for data in shown for kind in data)
    assert drawn >= dict([("report/03_charts.ipynb", 5), ("opt/01_step.ipynb", 1)]).get(name, 0), drawn
