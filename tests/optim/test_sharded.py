"""FSDP2, with and without gradient release, distributed checkpoints and ZeroRedundancyOptimizer:
two processes step shards, uneven and empty ones too, as one process steps the whole."""
import pytest

from processes import on_ranks, ranks_agree

RANK = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from flashoptim_nb import optim

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

# dithers know the place in the whole: shards of whole groups have the codes of the whole, and others its error bits
from flashoptim_nb.optim.rounding import Place
from flashoptim_nb.optim.shards import first_place
for rows, columns, quantize, dim in ((5, 64, True, 0), (1, 32, True, 0), (7, 5, False, 0), (5, 128, True, 1), (7, 5, False, 1)):
    torch.manual_seed(1)
    start, grads = torch.randn(rows, columns, device=kind).bfloat16(), torch.randn(4, rows, columns, device=kind).bfloat16()
    p, q = nn.Parameter(distribute_tensor(start, mesh, [Shard(dim)])), nn.Parameter(start.clone())
    a, b = (optim.FlashAdamW([x], lr=1e-3, rounding="dithered", quantize=quantize) for x in (p, q))
    near = p.to_local().shape[1]
    assert first_place(p) == (Place(rank * (columns - near), near, columns) if dim else 0 if rank == 0 or rows == 1 else (rows + 1) // 2 * columns)
    for g in grads:
        p.grad, q.grad = distribute_tensor(g, mesh, [Shard(dim)]), g
        a.step(), b.step()
    assert torch.equal(p.full_tensor(), q), (rows, dim)
    for key in sorted(a.state[p].keys() - {"step"}):
        if not key.endswith("scales"): assert torch.equal(a.state[p][key].full_tensor(), b.state[q][key]), (rows, key)

# one bad gradient on one rank: nobody steps
model = sharded(torch.float32)
opt = optim.FlashAdamW(model.parameters(), lr=1e-3, max_norm=1.0)
model(torch.randn(8, 37, device=kind)).sum().backward()
before = [p.clone() for p in whole(model)]
if rank == 0: next(model.parameters()).grad.to_local()[0, 0] = torch.nan
opt.step()
assert opt.skipped_steps.item() == 1 and all(torch.equal(p, q) for p, q in zip(before, whole(model)))
print("rank", rank, "agrees")
dist.destroy_process_group()
"""


RELEASE = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from flashoptim_nb.optim import FlashAdamW, enable_gradient_release
from flashoptim_nb.optim.states import scale_moments

kind, where = sys.argv[1:]
dist.init_process_group("gloo" if kind == "cpu" else "nccl")
rank = dist.get_rank()
if kind == "cuda": torch.cuda.set_device(rank)
flat, replicated = init_device_mesh(kind, (2,)), init_device_mesh(kind, (2, 1), mesh_dim_names=("copies", "shards"))

class Net(nn.Module):
    "Three layers: 7 and 6 rows, 3 and 2, and one whose only row leaves the second rank nothing."
    def __init__(self, checkpointed=False, twice=False):
        super().__init__(); torch.manual_seed(0)
        self.a, self.b, self.c, self.d = nn.Linear(37, 13), nn.Linear(13, 5), nn.Linear(5, 5), nn.Linear(5, 1)
        self.checkpointed, self.twice = checkpointed, twice
    def forward(self, x):
        x = checkpoint(self.a, x, use_reentrant=False) if self.checkpointed else self.a(x)
        x = self.c(self.b(x.tanh()).tanh())
        return self.d(self.c(x) if self.twice else x)

def sharded(dtype, mesh=flat, whole=(), how={}, **net):
    model = Net(**net).to(kind, dtype)
    for part in (model.a, model.b, model.c, model.d, model): fully_shard(part, mesh=mesh, **how)
    return model

def train(model, opt, steps, dtype, handle=None, micros=1, sync=False, first=0, on=lambda loss: loss):
    norms, held = [], 0
    for n in range(first, first + steps):
        for k in range(micros):
            torch.manual_seed(100 * n + 10 * k + rank)
            loss = 100 * model(torch.randn(8, 37).to(kind, dtype)).float().square().mean()
            last = k == micros - 1
            if sync: model.set_requires_gradient_sync(last)
            if handle is not None and not last and not sync:
                with handle.accumulate(): loss.backward()
            else: on(loss).backward()
        held = max(held, sum(p.grad is not None for p in model.parameters()))
        opt.step(); opt.zero_grad()
        norms.append(opt.grad_norm)
    return norms, held

def shards(model): return [p.to_local().clone() if isinstance(p, DTensor) else p.detach().clone() for p in model.parameters()]
def counters(model, opt): return torch.tensor([float(opt.state[p]["step"]) for p in model.parameters()])
def agreed(t):
    both = [torch.empty_like(t.to(kind)) for _ in range(2)]
    dist.all_gather(both, t.to(kind))
    return torch.equal(*both)

# released, each shard takes the ordinary step, bit for bit, and no gradient outlives the backward pass
low = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for dtype, mesh, how, net in ((torch.bfloat16, flat, {}, {}), (torch.float32, flat, dict(reshard_after_forward=False), {}), (torch.float32, flat, dict(mp_policy=low), {}),
                              (torch.bfloat16, replicated, {}, {}), (torch.bfloat16, flat, {}, dict(checkpointed=True, twice=True))):
    for micros, sync in ((1, False), (2, False), (2, True)):
        a, b = sharded(dtype, mesh, how=how, **net), sharded(dtype, mesh, how=how, **net)
        o, r = (FlashAdamW(m.parameters(), lr=1e-2, skip_nonfinite=True) for m in (a, b))
        handle = enable_gradient_release(b, r)
        norms, _ = train(a, o, 4, dtype, micros=micros, sync=sync)
        released, held = train(b, r, 4, dtype, handle, micros=micros, sync=sync)
        case = (dtype, mesh.ndim, how, net, micros, sync)
        apart = [(x - y).abs().max().item() if x.numel() else 0.0 for x, y in zip(shards(a), shards(b))]
        assert not any(apart), (case, apart, norms, released, counters(a, o), counters(b, r), o.skipped_steps, r.skipped_steps)
        torch.testing.assert_close(torch.stack(norms), torch.stack(released), msg=str(case))
        assert held == 0 and torch.equal(counters(a, o), counters(b, r)), case

# clipping by the norm of the step before, of all shards, each counted once; in as many all-reduces as there are meshes
calls, reduce = [], dist.all_reduce
for mesh in flat, replicated:
    a, b = sharded(torch.float32, mesh), sharded(torch.float32, mesh)
    kw = dict(lr=1e-2, quantize=False)
    o, r = FlashAdamW(a.parameters(), **kw), FlashAdamW(b.parameters(), max_norm=5.0, **kw)
    handle, before = enable_gradient_release(b, r), None
    for n in range(4):
        torch.manual_seed(n + rank)
        x = torch.randn(8, 37, device=kind)
        (100 * a(x).square().mean()).backward()
        norm = nn.utils.get_total_norm([p.grad for p in a.parameters()]).full_tensor()
        scale = None if before is None else (5.0 / (before + 1e-6)).clamp(max=1.0)
        for p in a.parameters(): o.step_param(p, o.param_groups[0], scale)
        if before is None:  # the first step is clipped afterwards, by its moments
            for p in a.parameters(): scale_moments(o, o.param_groups[0], p, (5.0 / (norm + 1e-6)).clamp(max=1.0))
        o.zero_grad(); before = norm
        (100 * b(x).square().mean()).backward()
        dist.all_reduce = lambda *args, **how: calls.append(args[0].numel()) or reduce(*args, **how)
        r.step(); dist.all_reduce = reduce
        torch.testing.assert_close(r.grad_norm, norm)
        assert norm > 5.0 and agreed(handle.clip), (n, handle.clip)
    for p, q in zip(shards(a), shards(b)): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
assert calls == [1, 8] * 8, calls  # a sum of squares, and the counters of eight parameters

# a gradient that is not finite in one rank's shard alone: that shard stays, the others move, and all ranks say the same
m = sharded(torch.float32); opt = FlashAdamW(m.parameters(), lr=1e-2, max_norm=1.0)
bad = set()
def spoil(p, group):
    if any(p is q for q in bad) and p.to_local().numel(): p.grad.to_local().view(-1)[0] = torch.nan
    return True
handle = enable_gradient_release(m, opt, pre_step=spoil)
train(m, opt, 2, torch.float32, handle); clip, before = handle.clip.clone(), shards(m)
if rank == 0: bad = {m.a.weight, m.d.weight}
else: bad = {m.b.weight}
train(m, opt, 1, torch.float32, handle, first=2)
stays = [torch.equal(p, q) or not p.numel() for p, q in zip(before, shards(m))]
names = [n for n, _ in m.named_parameters()]
assert [n for n, s in zip(names, stays) if s] == (["a.weight", "d.weight"] if rank == 0 else ["b.weight", "d.weight", "d.bias"]), (rank, stays)
assert counters(m, opt).tolist() == [2.0 if n == "d.weight" else 3.0 for n in names], counters(m, opt)  # nobody moved the only row of d
assert int(opt.skipped_steps) == 1 and not opt.grad_norm.isfinite() and torch.equal(clip, handle.clip)
bad = set(); train(m, opt, 1, torch.float32, handle, first=3)
assert opt.grad_norm.isfinite() and int(opt.skipped_steps) == 1 and agreed(counters(m, opt)) and agreed(handle.clip)
assert counters(m, opt).tolist() == [3.0 if n == "d.weight" else 4.0 for n in names]

# a loss that is not finite on one rank: nobody moves, nobody counts
before, counted = shards(m), counters(m, opt)
train(m, opt, 1, torch.float32, handle, first=4, on=lambda loss: loss * torch.nan if rank else loss)
assert all(map(torch.equal, before, shards(m))) and torch.equal(counted, counters(m, opt)) and int(opt.skipped_steps) == 2

# a state of None is none: a parameter that a pass leaves out stays without one, and one that steps begins anew,
# on one rank by itself with the count of the others
m = sharded(torch.float32); opt = FlashAdamW(m.parameters(), lr=1e-2, max_norm=1.0)
left, anew, alone, wanted = m.a.weight, m.b.weight, m.c.weight, True
handle = enable_gradient_release(m, opt, pre_step=lambda p, group: wanted or p is not left)
train(m, opt, 2, torch.float32, handle)
for p in left, anew, *[alone] * (rank == 0): opt.state[p] = None
wanted = False; train(m, opt, 1, torch.float32, handle, first=2)
assert opt.state[left] is None
for p in {*m.parameters()} - {left}: assert opt.state[p]["step"] == (1 if p is anew else 3), (p.shape, opt.state[p]["step"])
wanted = True; train(m, opt, 1, torch.float32, handle, first=3)
assert counters(m, opt).tolist() == [1.0 if p is left else 2.0 if p is anew else 4.0 for p in m.parameters()], counters(m, opt)

# parameters that are sharded and parameters that are not, in one optimizer: each counts once in the norm of either step
torch.manual_seed(0)
whole, cut = nn.Linear(6, 6).to(kind), nn.Linear(6, 6).to(kind)
fully_shard(cut, mesh=flat)
for release in (False, True):
    opt = FlashAdamW([*whole.parameters(), *cut.parameters()], lr=0.0, skip_nonfinite=True)
    if release: enable_gradient_release(nn.ModuleList([whole, cut]), opt)
    cut(whole(torch.ones(3, 6, device=kind))).square().sum().backward()
    if not release: want = nn.utils.get_total_norm([p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for g in opt.param_groups for p in g["params"]])
    opt.step(); opt.zero_grad()
    torch.testing.assert_close(opt.grad_norm, want)
print("rank", rank, "agrees")
dist.destroy_process_group()
"""


ZERO = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from flashoptim_nb.optim import FlashAdamW, OptionError

kind, _ = sys.argv[1:]
dist.init_process_group("gloo" if kind == "cpu" else "nccl")
rank = dist.get_rank()
if kind == "cuda": torch.cuda.set_device(rank)

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).to(kind)

# each rank steps its share, and the whole is as one process steps it, after states were gathered and dealt out again too
ours, alone = net(), net()
both = DistributedDataParallel(ours)
opt, plain = ZeroRedundancyOptimizer(ours.parameters(), FlashAdamW, lr=1e-2, master_weight_bits=32), FlashAdamW(alone.parameters(), lr=1e-2)
for t in range(6):
    torch.manual_seed(t)
    x = torch.randn(4, 8).to(kind)
    for model, o in (both, opt), (alone, plain): model(x).square().mean().backward(); o.step(); o.zero_grad()
    if t == 2:
        opt.consolidate_state_dict(0)
        kept = [opt.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(kept, 0)
        opt.load_state_dict(kept[0])
for p, q in zip(ours.parameters(), alone.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

try: ZeroRedundancyOptimizer(ours.parameters(), FlashAdamW, lr=1e-2, max_norm=1.0)
except OptionError as error: assert "own share" in str(error)
else: raise AssertionError("each rank would have clipped by a norm of its own")
print("rank", rank, "agrees")
dist.destroy_process_group()
"""


TENSOR_PARALLEL = """
import copy, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from flashoptim_nb.optim import FlashAdamW
from flashoptim_nb.optim.shards import local

kind, where = sys.argv[1:]
dist.init_process_group("gloo" if kind == "cpu" else "nccl")
if kind == "cuda": torch.cuda.set_device(dist.get_rank())
mesh = init_device_mesh(kind, (2, 2), mesh_dim_names=("data", "tensor"))
torch.manual_seed(0)
whole = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)).to(kind)
parts = copy.deepcopy(whole)
parallelize_module(parts, mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
fully_shard(parts, mesh=mesh["data"])
a, b = (FlashAdamW(model.parameters(), lr=1e-2, max_norm=1.0) for model in (parts, whole))
x = torch.randn(8, 32, device=kind)
for _ in range(3):
    for model, opt in ((parts, a), (whole, b)): model(x).square().sum().backward(); opt.step(); opt.zero_grad()
    assert abs(a.grad_norm - b.grad_norm) < 1e-3 * b.grad_norm, (a.grad_norm, b.grad_norm)

kept = [{k: local(t).clone() for k, t in a.state[p].items()} for p in parts.parameters()]
dcp.save(dict(opt=get_optimizer_state_dict(parts, a)), checkpoint_id=where)
c = FlashAdamW(parts.parameters(), lr=1e-2)
state = get_optimizer_state_dict(parts, c)
dcp.load(dict(opt=state), checkpoint_id=where)
set_optimizer_state_dict(parts, c, state)
for p, own in zip(parts.parameters(), kept): assert all(torch.equal(local(c.state[p][k]), t) for k, t in own.items()), (p.placements, p.shape)
print("rank", dist.get_rank(), "agrees")
dist.destroy_process_group()
"""


@on_ranks(4)
def test_rows_cut_by_tensor_parallelism_and_again_by_fsdp2(kind, tmp_path):
    "The norm counts the gradients of all ranks, and a checkpoint has the scales of all."
    ranks_agree(TENSOR_PARALLEL, 4, kind, tmp_path)


@on_ranks(2)
@pytest.mark.parametrize("ranks", [RANK, RELEASE, ZERO], ids=["step", "release", "zero"])
def test_two_ranks_step_as_one(ranks, kind, tmp_path): ranks_agree(ranks, 2, kind, tmp_path)
