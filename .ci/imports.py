"""Each module imports by itself: in a process of its own, forked from one that holds the libraries and nothing of ours.

Starting Python and torch anew for each would take five minutes. Sources are compiled first, with warnings about their syntax as errors."""
import importlib
import os
import sys
import traceback
import warnings
from pathlib import Path

warnings.filterwarnings("error", category=SyntaxWarning)
LIBRARIES = "torch triton numpy pandas scipy.stats altair torch_geometric datasets IPython fastcore.all nbdev"

root = Path(__file__).parents[1]
sources = sorted(p for p in (root / "flashoptim_nb").rglob("*.py") if p.name != "_modidx.py")
for source in sources: compile(source.read_text(), source, "exec")
names = [".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__") for p in sources]
for library in LIBRARIES.split():
    try: importlib.import_module(library)
    except ImportError: pass
if ours := [name for name in sys.modules if name.split(".")[0] == "flashoptim_nb"]: sys.exit(f"a library imports us: {ours}")

failed = []
for name in names:
    sys.stdout.flush(), sys.stderr.flush()
    if not (child := os.fork()):
        try: importlib.import_module(name)
        except BaseException: traceback.print_exc(), sys.stderr.flush(), os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]: failed.append(name)
if failed: sys.exit(f"{len(failed)} of {len(names)} modules do not import by themselves: {', '.join(failed)}")
print(f"{len(names)} modules import by themselves")
