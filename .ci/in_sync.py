"""Exports into an empty package beside the committed one and compares: stale, missing and edited modules all differ."""
import filecmp
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def files(root):
    return {p.relative_to(root) for p in root.rglob("*") if p.is_file() and p.suffix in (".py", ".ipynb") and "_book" not in p.parts}


with tempfile.TemporaryDirectory() as scratch:
    copy = Path(scratch) / "repo"
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, tracked):
        if name.split("/")[0] in ("nbs", "settings.ini", "setup.py", "README.md") and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    package = copy / "flashoptim_nb"
    package.mkdir()
    shutil.copy2(ROOT / "flashoptim_nb/__init__.py", package)
    scripts = Path(sys.executable).parent
    for command in ("nbdev_export", "nbdev_clean"):
        subprocess.run([scripts / command], cwd=copy, check=True)
    differing = []
    for folder in ("flashoptim_nb", "nbs"):
        ours, fresh = files(ROOT / folder), files(copy / folder)
        differing += [f"{folder}/{p}" for p in ours ^ fresh]
        differing += [f"{folder}/{p}" for p in ours & fresh if not filecmp.cmp(ROOT / folder / p, copy / folder / p, shallow=False)]
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if any(c.get("outputs") for c in json.loads(p.read_text())["cells"])]
    differing += [f"{p} has outputs" for p in notebooks]

if differing:
    sys.exit("not in sync; run nbdev_export and nbdev_clean, delete modules without a notebook, and commit:\n  " + "\n  ".join(sorted(differing)))
print("in sync")
