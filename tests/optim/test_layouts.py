"""Parameters, gradients and states wherever they lie in memory:
the step is that of a contiguous copy, nothing else is written, or it is refused."""
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.optim.split import INTERPRETED
from flashoptim_nb.optim import FlashAdamW, FlashSGD, OptionError
from every import MAKERS

DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
CUTS = {"every other column": lambda b: b[:, ::2], "a column": lambda b: b[:, 3], "every other row": lambda b: b[::2],
        "transposed": lambda b: b.t(), "a window": lambda b: b[1:, 1:6], "rows": lambda b: b[3:7],
        "one value": lambda b: b[2, 5], "values apart": lambda b: b.view(-1)[1::7], "a row": lambda b: b[5],
        "no value": lambda b: b[:0], "channels last": lambda b: b.view(2, 5, 4, 10).permute(0, 3, 1, 2),
        "a diagonal": lambda b: b.diagonal(), "an odd offset": lambda b: b.view(-1)[7:107].view(10, 10),
        "one wide": lambda b: b[:, 2:3], "a square's transpose": lambda b: b[:10].t()}
GRADS = {"contiguous": lambda g: g, "like the parameter": None,
         "transposed": lambda g: g.transpose(0, -1).contiguous().transpose(0, -1) if g.ndim else g,
         "apart": lambda g: torch.stack([g, -g], -1)[..., 0],
         "expanded": lambda g: g.reshape(-1)[:1].squeeze().expand(g.shape) if g.numel() else g,
         "negated view": lambda g: torch._neg_view(-g)}


def noise(shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def values(opt, p): return [p.detach().clone(), *(t.clone() for k, t in opt.state[p].items())]


def check(name, dtype, cut, grad, options, steps=2):
    base = noise((40, 10), 0, dtype)
    p = nn.Parameter(cut(base))
    assert not p.numel() or p.data_ptr() == cut(base).data_ptr()
    inside = torch.zeros_like(base, dtype=torch.bool)
    cut(inside).fill_(True)
    before, twin = base.clone(), nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    opts = [MAKERS[name]([x], lr=1e-2, weight_decay=0.1, **options) for x in (p, twin)]
    for t in range(steps):
        g = noise(p.shape, t, dtype)
        p.grad = (torch.empty_strided(p.shape, p.stride(), dtype=dtype, device=DEVICE).copy_(g) if grad is None
                  else grad(g))
        twin.grad = p.grad.clone(memory_format=torch.contiguous_format)
        for opt in opts: opt.step()
    for x, y in zip(values(opts[0], p), values(opts[1], twin), strict=True): assert torch.equal(x, y)
    assert torch.equal(base[~inside], before[~inside]), "memory that is not the parameter's"


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_parameter_that_is_a_view(name, dtype, cut, fused):
    check(name, dtype, CUTS[cut], GRADS["contiguous"], dict(fused=fused))


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("cut", ["every other column", "transposed", "a window", "one value", "rows"])
@pytest.mark.parametrize("options", [{}, dict(quantize=False), dict(max_norm=0.5), dict(fused=False)], ids=str)
def test_a_gradient_that_is_a_view(cut, grad, options):
    check("FlashAdamW", torch.bfloat16, CUTS[cut], GRADS[grad], options)


def test_parameters_between_each_others_values():
    base, whole = noise((6, 5), 0, torch.float32), noise((6, 5), 0, torch.float32)
    columns, p = [nn.Parameter(base[:, i]) for i in range(5)], nn.Parameter(whole)
    a, b = (FlashAdamW(x, lr=1e-2, quantize=False) for x in (columns, [p]))
    for t in range(3):
        p.grad = noise((6, 5), t, torch.float32)
        for i, c in enumerate(columns): c.grad = p.grad[:, i]
        a.step(); b.step()
    assert torch.equal(base, whole)


SHARING = {"the same": lambda b: [b, b.view(-1)], "rows": lambda b: [b[:4], b[3:]], "a column": lambda b: [b, b[:, 1]],
           "columns": lambda b: [b[:, ::2], b[:, 2:]], "one value": lambda b: [b[0], b[0, 0], b[1]],
           "expanded": lambda b: [b[:1].expand(6, 5)], "windows": lambda b: [b.view(-1).unfold(0, 3, 1)]}


@pytest.mark.parametrize("share", SHARING)
def test_parameters_that_share_values_are_refused(share):
    ps = [nn.Parameter(t) for t in SHARING[share](torch.ones(6, 5, device=DEVICE))]
    with pytest.raises(OptionError, match="memory|in one place"): FlashAdamW(ps)
    if len(ps) == 1: return
    with pytest.raises(OptionError, match="memory"): FlashAdamW([dict(params=[p]) for p in ps])
    opt = FlashAdamW([nn.Parameter(p.detach().clone()) for p in ps])
    for p, q in zip(opt.param_groups[0]["params"], ps): p.grad = torch.ones_like(p)
    opt.step()
    for p, q in zip(opt.param_groups[0]["params"], ps): p.data = q.data  # tied later
    with pytest.raises(OptionError, match="memory"): opt.step()
    assert all((q == 1).all() for q in ps)


def test_tied_weights_are_one_parameter():
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    FlashAdamW(nn.ModuleList([a, b]).parameters())
    FlashAdamW(nn.Linear(4, 4, device="meta").parameters())


CHANGES = {"elsewhere": lambda d: d.clone(), "transposed in place": lambda d: d.t(),
           "transposed elsewhere": lambda d: d.t().contiguous().t(),
           "a view of a larger one": lambda d: torch.stack([d, d], -1)[..., 0],
           "another block's": lambda d: torch.cat([d, d])[8:], "contiguous": lambda d: d.contiguous(),
           "negated view": lambda d: torch._neg_view(-d)}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("start", ["contiguous", "transposed"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("same", [True, False], ids=["gradient at its place", "another gradient"])
def test_a_parameter_whose_memory_is_exchanged(change, start, fused, same):
    "After some steps, so that its place is remembered; at the same address in one case."
    p = nn.Parameter(noise((8, 8), 0, torch.bfloat16))
    if start == "transposed": p.data = p.data.t()
    twin = nn.Parameter(p.detach().clone(memory_format=torch.contiguous_format))
    opts = [FlashAdamW([x], lr=1e-2, fused=fused) for x in (p, twin)]
    for t in range(6):
        if t == 3:
            p.data = CHANGES[change](p.data)
            twin.data = p.data.clone(memory_format=torch.contiguous_format)
        g = noise((8, 8), t, torch.bfloat16)
        if same and t: p.grad.copy_(g)
        else: p.grad = g
        twin.grad = g.clone()
        for opt in opts: opt.step()
    for x, y in zip(values(opts[0], p), values(opts[1], twin), strict=True): assert torch.equal(x, y)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_gradient_that_is_another_parameters_memory(fused):
    "All gradients are read before any weight is written."
    ps = [nn.Parameter(torch.full((3000,), float(i + 1), device=DEVICE)) for i in range(2)]
    opt = FlashSGD(ps, lr=0.5, fused=fused, quantize=False)
    for _ in range(2):
        before = [p.detach().clone() for p in ps]
        for p, q in zip(ps, reversed(ps)): p.grad = q.data
        opt.step()
        for p, b, c in zip(ps, before, reversed(before)): assert torch.equal(p, b - 0.5 * c)


@pytest.mark.parametrize("key", ["exp_avg::quantized", "exp_avg_sq::quantized", "exp_avg::scales", "error_bits"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_a_state_that_is_a_view(key, fused):
    ps = [nn.Parameter(noise((16, 16), 0, torch.bfloat16)) for _ in range(2)]
    opts = [FlashAdamW([p], lr=1e-2, fused=fused) for p in ps]
    for t in range(5):
        if t == 2:
            state = opts[0].state[ps[0]]
            wide = torch.stack([state[key], state[key] + 1], -1)
            state[key] = wide[..., 0]
        if t == 4: opts[0].state[ps[0]][key].data = opts[0].state[ps[0]][key].data.clone()
        for p, opt in zip(ps, opts):
            p.grad = noise((16, 16), t, torch.bfloat16)
            opt.step()
    for x, y in zip(*(values(opt, p) for opt, p in zip(opts, ps)), strict=True): assert torch.equal(x, y)
    assert torch.equal(wide[..., 1].float(), (wide[..., 0] + 1).float())


@pytest.mark.parametrize("what", ["parameter", "gradient", "state"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@pytest.mark.parametrize("empty", [True, False], ids=["beside an empty one", "alone"])
def test_memory_that_was_freed_is_not_stepped(what, fused, empty):
    p = nn.Parameter(torch.ones(300, device=DEVICE))
    opt = FlashAdamW([p, *[nn.Parameter(torch.ones(0, device=DEVICE))] * empty], fused=fused, quantize=False)
    for q in opt.param_groups[0]["params"]: q.grad = torch.ones_like(q)
    for _ in range(2): opt.step()
    freed = {"parameter": p.data, "gradient": p.grad, "state": opt.state[p]["exp_avg"]}[what].untyped_storage()
    kept = freed.clone()
    freed.resize_(0)
    for _ in range(2):
        with pytest.raises(UserError, match="without values|another shape"): opt.step()
    assert opt.state[p]["step"] == 2
    freed.resize_(kept.nbytes())
    freed.copy_(kept)
    opt.step()
    assert opt.state[p]["step"] == 3


SHARDS = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from flashoptim_nb.optim import FlashAdamW, GradientError, OptionError
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
mesh, base = init_device_mesh("cpu", (1,)), torch.randn(6, 8)
shard = lambda t, place=Shard(1): DTensor.from_local(t, mesh, [place], run_check=False)
for fused in True, False:
    mine = base.clone()
    p, q = nn.Parameter(shard(mine[:, ::2])), nn.Parameter(base[:, ::2].clone())
    a, b = (FlashAdamW([x], lr=0.1, fused=fused) for x in (p, q))
    for _ in range(3):
        g = torch.randn(6, 4)
        p.grad, q.grad = shard(g.t().contiguous().t()), g.clone()
        a.step(); b.step()
    assert torch.equal(p.to_local(), q) and torch.equal(mine[:, 1::2], base[:, 1::2])
    p.grad = None
    p.grad = shard(g, Replicate())
    try: a.step()
    except GradientError as error: assert "sharded alike" in str(error)
    else: raise AssertionError("a gradient with other placements")
    p.grad = shard(g)
    a.state[p]["exp_avg::quantized"] = torch.zeros(6, 4, dtype=torch.int8)
    try: a.step()
    except OptionError as error: assert "exp_avg::quantized" in str(error)
    else: raise AssertionError("a state that is not sharded")
print("right")
"""


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_a_shard_that_is_a_view(interpret):
    done = subprocess.run(
        [sys.executable, "-c", SHARDS], env=os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True)
    assert "right" in done.stdout, done.stderr[-2000:]
