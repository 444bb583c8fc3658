"""FSDP2 and distributed checkpoints: two processes step uneven shards, some of them empty, as one process steps the whole."""
import subprocess
import sys
import textwrap

import pytest
import torch

RANK = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from flashoptim_nb import optim
from flashoptim_nb.base.errors import UserError

kind, where = sys.argv[1:]
dist.init_process_group("gloo" if kind == "cpu" else "nccl")
rank = dist.get_rank()
if kind == "cuda": torch.cuda.set_device(rank)
mesh = init_device_mesh(kind, (2,))

def net(dtype, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(37, 13), nn.Tanh(), nn.Linear(13, 1)).to(kind, dtype)  # 7 and 6 rows; 1 and 0

def sharded(dtype):
    model = net(dtype)
    for part in (model[0], model[2], model): fully_shard(part, mesh=mesh)
    return model

def train(model, opt, steps, dtype, first=0):
    for n in range(first, first + steps):
        torch.manual_seed(n)
        x = torch.randn(8, 37).to(kind, dtype)
        (100 * model(x).float().square().mean()).backward()
        opt.step(); opt.zero_grad()

def whole(model): return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]

def same(a, b): return all(torch.equal(getattr(x, "_local_tensor", x), getattr(y, "_local_tensor", y)) for p, q in zip(a.state.values(), b.state.values()) for x, y in zip(p.values(), q.values()))

for name, options in (("FlashAdamW", {}), ("FlashSGD", dict(momentum=0.9)), ("FlashLion", {})):
    for dtype, close, how in ((torch.float32, 1e-6, dict(quantize=False)), (torch.bfloat16, 2e-2, {})):
        make = lambda model: getattr(optim, name)(model.parameters(), lr=1e-3, max_norm=1.0, **options, **how)
        a, b = sharded(dtype), net(dtype)
        oa, ob = make(a), make(b)
        train(a, oa, 5, dtype); train(b, ob, 5, dtype)
        assert abs(oa.grad_norm - ob.grad_norm) <= close * ob.grad_norm, (name, dtype, oa.grad_norm, ob.grad_norm)
        for p, q in zip(whole(a), whole(b)): assert (p - q).abs().max() <= close * q.abs().max() + close * 1e-2, (name, dtype, (p - q).abs().max())
        full = oa.get_fp32_model_state_dict(a)
        for key, t in ob.get_fp32_model_state_dict(b).items(): assert (full[key].full_tensor() - t).abs().max() <= close * t.abs().max() + close * 1e-2

        # a checkpoint, read into a new optimizer, goes on bit for bit
        kept = [p.clone() for p in whole(a)]
        dcp.save(dict(opt=get_optimizer_state_dict(a, oa)), checkpoint_id=f"{where}/{name}-{dtype}")
        oc = make(a)
        state = get_optimizer_state_dict(a, oc)
        dcp.load(dict(opt=state), checkpoint_id=f"{where}/{name}-{dtype}")
        set_optimizer_state_dict(a, oc, state)
        assert same(oa, oc), name
        assert all(torch.equal(p, q) for p, q in zip(kept, whole(a))), "loading a state moved the weights"

# one bad gradient on one rank: nobody steps
model = sharded(torch.float32)
opt = optim.FlashAdamW(model.parameters(), lr=1e-3, max_norm=1.0)
model(torch.randn(8, 37, device=kind)).sum().backward()
before = [p.clone() for p in whole(model)]
if rank == 0: next(model.parameters()).grad.to_local()[0, 0] = torch.nan
opt.step()
assert opt.skipped_steps.item() == 1 and all(torch.equal(p, q) for p, q in zip(before, whole(model)))
try: optim.enable_gradient_release(model, opt)
except UserError as error: assert "FSDP2" in str(error)
else: raise AssertionError("release of shards was not refused")
print("rank", rank, "agrees")
dist.destroy_process_group()
"""


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")])])
def test_two_ranks_step_as_one(kind, tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(RANK))
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), kind, str(tmp_path)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("agrees") == 2
