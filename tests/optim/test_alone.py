"""The optimizers stand alone: torch, numpy and the standard library are enough,
and a GPU's kernels need Triton beside them."""
import subprocess
import sys

ALONE = r'''
import importlib.metadata as metadata, re, sys, warnings

def plain(name): return re.sub(r"[-_.]+", "-", name).lower()


def needed(name):
    "A distribution's own requirements, whatever they are: they come with it."
    found, todo = set(), [name]
    while todo:
        if (name := plain(todo.pop())) in found: continue
        found.add(name)
        try: requires = metadata.requires(name) or []
        except metadata.PackageNotFoundError: continue
        todo += [re.match(r"[\w.-]+", r)[0] for r in requires if "extra ==" not in r]
    return found

installed, kept = metadata.packages_distributions(), needed("torch") | {"numpy"}
blocked = {module for module, names in installed.items() if not set(map(plain, names)) & kept} - {"flashoptim_nb"} | {"triton"}

class Alone:
    "Finds nothing but torch, what torch needs, numpy and the standard library."
    finders = sys.meta_path[:]

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked: return None
        ours = re.match(r"flashoptim_nb\.(.*)", name)
        if ours and not re.match(r"optim\b|base$|base\.(errors|patch)$", ours[1]): raise AssertionError(f"the optimizers import {name}")
        return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)


sys.meta_path[:] = [Alone()]
before = set(sys.modules)
import flashoptim_nb.base.errors
beyond = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names) - {"flashoptim_nb"}
assert not beyond, f"base.errors imports {beyond}"

import torch
import flashoptim_nb.optim as optim
classes = [c for c in vars(optim).values() if isinstance(c, type) and issubclass(c, optim.FlashOptimizer) and c is not optim.FlashOptimizer]
def parameters(cls, model): return optim.muon_groups(model) if cls is optim.FlashMuon else model.parameters()

with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for cls in classes:
        models = [torch.nn.Linear(40, 8) for _ in range(2)]
        for model in models: optim.cast_model(model)
        opt, again = [cls(parameters(cls, model), lr=1e-2) for model in models]
        x = torch.ones(2, 40, dtype=torch.bfloat16)
        models[0](x).square().mean().backward()
        opt.step()
        models[1].load_state_dict(models[0].state_dict())
        again.load_state_dict(opt.state_dict())
        for model, one in zip(models, (opt, again)):
            one.zero_grad(); model(x).square().mean().backward(); one.step()
        assert all(torch.equal(p, q) for p, q in zip(*[model.parameters() for model in models])), cls
        assert opt.get_fp32_model_state_dict(models[0])["weight"].dtype == torch.float32
assert sum("Triton is not installed" in str(w.message) for w in told) == 1, [str(w.message) for w in told]
assert "triton" not in sys.modules
print(*[cls.__name__ for cls in classes])
'''


def test_torch_numpy_and_the_standard_library_are_enough():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "FlashAdamW" in done.stdout.split()
