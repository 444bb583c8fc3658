"""FlashAdamW as people use it: shapes, groups, schedulers, clipping, state dicts, bad input."""
import copy
import io
import pickle
import re
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.optim.split import decode
from every import CLASSES
from flashoptim_nb.optim import (AveragedMasters, FlashAdam, FlashAdamW, FlashLion, FlashMuon, FlashSGD, FlashSGDW,
                                 GradientError, NumericsError, OptionError, StateError, cast_model, enable_gradient_release)
from flashoptim_nb.optim.checks import check_options

KW = dict(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 33), nn.Tanh(), nn.LayerNorm(33), nn.Linear(33, 7)).to(dtype)


def run(model, opt, steps, first=0, schedule=None):
    dtype, losses = next(model.parameters()).dtype, []
    for t in range(first, first + steps):
        g = torch.Generator().manual_seed(t)
        loss = (model(torch.randn(32, 40, generator=g).to(dtype)).float() - 1).square().mean()
        loss.backward(); opt.step(); opt.zero_grad()
        if schedule: schedule.step()
        losses.append(loss.item())
    return losses


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def masters(model, opt):
    return [decode(p.detach(), opt.state[p]["error_bits"]) if "error_bits" in opt.state[p] else p.detach().float()
            for p in model.parameters()]


@pytest.mark.parametrize(
    "options", [dict(), dict(maximize=True), dict(betas=(0.0, 0.9)), dict(eps=1e-3), dict(weight_decay=0.0)])
def test_plain_adamw_is_torchs(options):
    a, b = net(), net()
    kw = KW | options
    run(a, FlashAdamW(a.parameters(), quantize=False, master_weight_bits=None, **kw), 50)
    run(b, torch.optim.AdamW(b.parameters(), **kw), 50)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "dtype,quantize,bits,allowed",
    [(torch.float32, True, None, 0.15), (torch.bfloat16, True, 24, 0.25), (torch.bfloat16, True, 32, 0.25),
     (torch.bfloat16, False, 24, 0.15), (torch.float16, True, 24, 0.15)])
def test_every_format_follows_fp32(dtype, quantize, bits, allowed):
    """Distance from fp32 AdamW's weights after 40 steps, as a share of how far those moved.
    All gradients come from fp32's own run."""
    a = net(dtype).float(); b = copy.deepcopy(a).to(dtype)
    start = [p.detach().clone() for p in a.parameters()]
    exact, flash = (torch.optim.AdamW(a.parameters(), **KW),
                    FlashAdamW(b.parameters(), quantize=quantize, master_weight_bits=bits, **KW))
    for t in range(40):
        torch.manual_seed(t)
        (a(torch.randn(32, 40)) - 1).square().mean().backward()
        for p, q in zip(a.parameters(), b.parameters()): q.grad = p.grad.to(dtype)
        exact.step(); flash.step(); exact.zero_grad()
    moved = sum((p - s).square().sum() for p, s in zip(a.parameters(), start)).sqrt()
    apart = sum((p - q).square().sum() for p, q in zip(a.parameters(), masters(b, flash))).sqrt()
    assert apart < allowed * moved, apart / moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_shape(dtype):
    shapes = [(), (0,), (1,), (31,), (3, 5, 7), (64, 32)]
    ps = [nn.Parameter(torch.randn(s).to(dtype)) for s in shapes]
    ps.append(nn.Parameter(torch.randn(6, 10).to(dtype).t()))  # not contiguous
    twin = nn.Parameter(ps[-1].detach().contiguous().clone())
    assert not ps[-1].is_contiguous()
    opt, other = FlashAdamW(ps, **KW), FlashAdamW([twin], skip_nonfinite=False, **KW)
    for _ in range(3):
        for p in ps: p.grad = torch.randn_like(p)
        twin.grad = ps[-1].grad.contiguous()
        opt.step(); other.step()
    assert all(p.isfinite().all() for p in ps)
    assert (torch.equal(ps[-1], twin)
            and torch.equal(opt.state[ps[-1]]["exp_avg::quantized"], other.state[twin]["exp_avg::quantized"]))


def test_groups_schedulers_closures_and_tensor_lr():
    a, b = net(), net()
    split = lambda m: [{"params": [p for p in m.parameters() if p.ndim > 1], "weight_decay": 0.3},
                       {"params": [p for p in m.parameters() if p.ndim < 2], "lr": 3e-3, "weight_decay": 0.0}]
    ours, theirs = FlashAdamW(split(a), lr=1e-2, quantize=False), torch.optim.AdamW(split(b), lr=1e-2)
    for m, o in (a, ours), (b, theirs): run(m, o, 30, schedule=torch.optim.lr_scheduler.CosineAnnealingLR(o, 30))
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)

    c, d = net(), net()
    run(c, FlashAdamW(c.parameters(), lr=torch.tensor(1e-2)), 3); run(d, FlashAdamW(d.parameters(), lr=1e-2), 3)
    for p, q in zip(c.parameters(), d.parameters()): torch.testing.assert_close(p, q)

    opt = FlashAdamW(c.parameters())
    def closure():
        opt.zero_grad(); loss = c(torch.ones(2, 40)).square().mean(); loss.backward(); return loss
    assert opt.step(closure).requires_grad


def test_decouple_lr():
    a, b = net(), net()
    run(a, FlashAdamW(a.parameters(), lr=1e-2, weight_decay=1e-3, decouple_lr=True, quantize=False), 10)
    run(b, torch.optim.AdamW(b.parameters(), lr=1e-2, weight_decay=1e-1), 10)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_clipping_matches_clip_grad_norm_and_leaves_gradients():
    a, b = net(), net()
    ours, theirs = (FlashAdamW(a.parameters(), max_norm=0.05, quantize=False, **KW),
                    torch.optim.AdamW(b.parameters(), **KW))
    for t in range(10):
        for m in a, b: torch.manual_seed(t); m(torch.randn(8, 40)).square().sum().backward()
        kept = [p.grad.clone() for p in a.parameters()]
        norm = nn.utils.clip_grad_norm_(b.parameters(), 0.05)
        ours.step(); theirs.step()
        torch.testing.assert_close(ours.grad_norm, norm)
        assert all(torch.equal(p.grad, k) for p, k in zip(a.parameters(), kept))
        ours.zero_grad(); theirs.zero_grad()
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gradient_skips_the_step(bad):
    m = net(torch.bfloat16); opt = FlashAdamW(m.parameters(), skip_nonfinite=True, **KW); run(m, opt, 3)
    before, state = [p.detach().clone() for p in m.parameters()], copy.deepcopy(opt.state_dict())
    m(torch.ones(2, 40).bfloat16()).sum().backward()
    list(m.parameters())[-1].grad[0] = bad
    opt.step(); opt.zero_grad()
    assert opt.skipped_steps == 1 and all(torch.equal(p, q) for p, q in zip(m.parameters(), before))
    for i, s in opt.state_dict()["state"].items():
        for k, t in s.items(): assert torch.equal(t, state["state"][i][k]), k
    run(m, opt, 1); assert opt.skipped_steps == 1


def test_grad_scaler_of_a_plain_loop():
    m = net(torch.float32)
    opt = FlashAdamW(m.parameters(), max_norm=1.0, **KW)
    plain = net()
    opt2 = FlashAdamW(plain.parameters(), max_norm=1.0, **KW)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(3):
        for mod, o, scale in (m, opt, True), (plain, opt2, False):
            torch.manual_seed(t); loss = mod(torch.randn(8, 40)).square().mean()
            (scaler.scale(loss) if scale else loss).backward()
            (scaler.step(o), scaler.update()) if scale else o.step()
            o.zero_grad()
        torch.testing.assert_close(opt.grad_norm, opt2.grad_norm)
    for p, q in zip(m.parameters(), plain.parameters()): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_parameters_that_miss_gradients_keep_their_own_count():
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    opt = FlashAdamW([p, q], quantize=False, **KW)
    ref_p, ref_q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    ref = torch.optim.AdamW([ref_p, ref_q], **KW)
    for t in range(12):
        for x, r in (p, ref_p), (q, ref_q):
            x.grad = r.grad = (None if (x is q and t % 3 == 1) or (x is p and t % 4 == 2)
                               else torch.full((4,), 0.1 * (t + 1)))
        opt.step(); ref.step()
    assert opt.state[p]["step"] == ref.state[ref_p]["step"] and opt.state[q]["step"] == ref.state[ref_q]["step"]
    torch.testing.assert_close(p, ref_p); torch.testing.assert_close(q, ref_q)


def test_same_inputs_same_bits():
    runs = []
    for _ in range(2):
        m = net(torch.bfloat16); o = FlashAdamW(m.parameters(), **KW); run(m, o, 10); runs.append((m, o))
    assert equal(runs[0][0], runs[1][0])


@pytest.mark.parametrize(
    "options", [dict(), dict(master_weight_bits=32), dict(quantize=False), dict(master_weight_bits=None)])
@pytest.mark.parametrize("how", ["disk", "deepcopy", "pickle"])
def test_resume_is_bit_identical(options, how):
    a = net(torch.bfloat16); o = FlashAdamW(a.parameters(), **KW, **options); run(a, o, 5)
    if how == "disk":
        torch.save({"m": a.state_dict(), "o": o.state_dict()}, f := io.BytesIO()); f.seek(0)
        saved = torch.load(f, weights_only=True)
        b = net(torch.bfloat16, seed=1)
        b.load_state_dict(saved["m"])
        r = FlashAdamW(b.parameters(), **KW, **options)
        r.load_state_dict(saved["o"])
    else:
        b, r = copy.deepcopy((a, o)) if how == "deepcopy" else pickle.loads(pickle.dumps((a, o)))
    run(a, o, 5, first=5); run(b, r, 5, first=5)
    assert equal(a, b)
    for p, q in zip(a.parameters(), b.parameters()):
        assert (o.state[p].keys() == r.state[q].keys()
                and all(torch.equal(t, r.state[q][k]) for k, t in o.state[p].items()))


def test_exchange_with_torch_both_ways():
    a = net(); theirs = torch.optim.AdamW(a.parameters(), **KW); run(a, theirs, 5)
    b = copy.deepcopy(a); ours = FlashAdamW(b.parameters(), quantize=False); ours.load_state_dict(theirs.state_dict())
    run(a, theirs, 5, first=5); run(b, ours, 5, first=5)
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    # torch does not copy
    c = copy.deepcopy(b)
    back = torch.optim.AdamW(c.parameters())
    back.load_state_dict(copy.deepcopy(ours.state_dict()))
    run(b, ours, 5, first=10); run(c, back, 5, first=10)
    for p, q in zip(b.parameters(), c.parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert back.param_groups[0]["betas"] == KW["betas"]


def test_fp32_weights_in_and_out():
    m = net(torch.bfloat16); o = FlashAdamW(m.parameters(), **KW); run(m, o, 5)
    sd = o.get_fp32_model_state_dict(m)
    for p, w in zip(m.parameters(), sd.values()):
        joined = decode(p.detach(), o.state[p]["error_bits"])
        assert w.dtype == torch.float32 and torch.equal(w.to(p.dtype), p)
        assert torch.equal(w, torch.where(joined.to(p.dtype) == p, joined, w))
    n = net(torch.bfloat16, seed=5); r = FlashAdamW(n.parameters(), **KW); r.set_fp32_model_state_dict(n, sd)
    for a, b in zip(sd.values(), r.get_fp32_model_state_dict(n).values()): assert torch.equal(a, b)


def test_seven_bytes_a_parameter():
    p = nn.Parameter(torch.randn(1024, 64).bfloat16()); p.grad = torch.randn_like(p)
    opt = FlashAdamW([p]); opt.step()
    assert opt.bytes_per_parameter() == {
        "weights": 2, "gradients": 2, "masters": 1, "states": 2, "scales": 0.125, "total": 7.125}
    saved = [t for k, t in opt.state_dict()["state"][0].items() if k != "step"] + [p]
    assert sum(t.numel() * t.element_size() for t in saved) / p.numel() == 5.125
    q = nn.Parameter(torch.randn(64)); q.grad = torch.randn(64)
    fp32 = FlashAdamW([q], quantize=False); fp32.step()
    assert fp32.bytes_per_parameter()["total"] == 16


def test_check_numerics():
    p = nn.Parameter(torch.full((8,), 3.0).bfloat16()); p.grad = torch.ones_like(p)
    FlashAdamW([p], lr=1e-3, check_numerics=True).step()
    before = p.detach().clone()
    with pytest.raises(NumericsError, match="at least"):
        FlashAdamW([p], lr=1e-3, master_weight_bits=None, check_numerics=True).step()
    for rounding, lost in ("nearest", 1e-6), ("dithered", 1e-8):
        with pytest.raises(NumericsError): FlashAdamW([p], lr=lost, rounding=rounding, check_numerics=True).step()
    assert torch.equal(p, before)
    opt = FlashAdamW([p], lr=1e-8, check_numerics=True); p.data.mul_(1e-4); opt.recompute_param_stats(); opt.step()


@pytest.mark.parametrize("make", [
                             lambda p: FlashAdamW([p], lr=-1), lambda p: FlashAdamW([p], betas=(1.0, 0.9)),
                             lambda p: FlashAdamW([p], eps=-1e-8), lambda p: FlashAdamW([p], weight_decay=-1),
                             lambda p: FlashAdamW([p], amsgrad=True), lambda p: FlashAdamW([p], differentiable=True),
                             lambda p: FlashAdamW([p], master_weight_bits=16),
                             lambda p: FlashAdamW([p], max_norm=0.0), lambda p: FlashAdamW([p], quantise=True),
                             lambda p: FlashAdamW([nn.Parameter(torch.zeros(2, dtype=torch.float64))]),
                             lambda p: FlashAdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])])
def test_arguments_that_cannot_work(make):
    with pytest.raises(UserError) as e: make(nn.Parameter(torch.zeros(3)))
    assert isinstance(e.value, ValueError)


def test_sparse_gradients_are_refused_with_everything_untouched():
    dense, sparse = nn.Parameter(torch.ones(4)), nn.Embedding(5, 3, sparse=True)
    opt = FlashAdamW([dense, sparse.weight])
    dense.grad = torch.ones(4); sparse(torch.tensor([1])).sum().backward()
    weight = sparse.weight.detach().clone()
    with pytest.raises(UserError, match="sparse=False") as e: opt.step()
    assert (isinstance(e.value, TypeError) and torch.equal(dense, torch.ones(4)) and torch.equal(sparse.weight, weight)
            and not opt.state)


def test_state_dicts_that_do_not_fit():
    m = net(torch.bfloat16); o = FlashAdamW(m.parameters(), **KW); run(m, o, 2)
    good = copy.deepcopy(o.state_dict())
    def spoil(change):
        sd = copy.deepcopy(good); change(sd); return sd
    for bad in (
            lambda sd: sd["param_groups"][0]["params"].pop(), lambda sd: sd["state"][0].pop("exp_avg_sq::quantized"),
            lambda sd: sd["state"][1].pop("exp_avg::scales"),
            lambda sd: sd["state"][2].update({"exp_avg::quantized": torch.zeros(3, dtype=torch.int8)}),
            lambda sd: sd["state"][0]["exp_avg::scales"].fill_(torch.inf),
            lambda sd: sd["state"][0].update({"error_bits": torch.zeros(2, dtype=torch.int8)}),
            lambda sd: sd["param_groups"][0].update(betas=(2.0, 0.9))):
        with pytest.raises(UserError): o.load_state_dict(spoil(bad))
    for i, s in o.state_dict()["state"].items():
        for k, t in s.items(): assert torch.equal(t, good["state"][i][k])
    sgd = torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9); run(m, sgd, 1)
    with pytest.raises(UserError, match="another kind"): o.load_state_dict(sgd.state_dict())


def test_cast_model_trains():
    m = nn.Sequential(nn.Linear(40, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 7))
    cast_model(m, full_precision_layers=["3"])
    assert [m[0].weight.dtype, m[1].weight.dtype, m[3].weight.dtype] == [torch.bfloat16, torch.float32, torch.float32]
    losses = run(m, FlashAdamW(m.parameters(), **KW), 40)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype,bits", [(torch.bfloat16, 24), (torch.float16, 32), (torch.float32, None)])
def test_cuda_and_cpu_agree(dtype, bits):
    a = net(dtype); b = copy.deepcopy(a).cuda()
    ours, gpu = (FlashAdamW(a.parameters(), master_weight_bits=bits, max_norm=1.0, **KW),
                 FlashAdamW(b.parameters(), master_weight_bits=bits, max_norm=1.0, **KW))
    for t in range(20):
        g = torch.Generator().manual_seed(t)
        for p, q in zip(a.parameters(), b.parameters()):
            p.grad = torch.randn(p.shape, generator=g).to(dtype); q.grad = p.grad.cuda()
            if t == 7: q.grad.view(-1)[0] = p.grad.view(-1)[0] = torch.nan
        ours.step(); gpu.step()
    assert ours.skipped_steps == 1 and gpu.skipped_steps.item() == 1
    for p, q in zip(masters(a, ours), masters(b, gpu)): torch.testing.assert_close(p, q.cpu(), rtol=2e-2, atol=2e-3)
    first = next(b.parameters())
    assert gpu.state[first]["step"].is_cuda and gpu.state[first]["step"] == 19


@pytest.mark.parametrize("dtype, options", [(torch.bfloat16, {}), (torch.bfloat16, dict(quantize=False)),
                                            (torch.float32, dict(quantize=False, master_weight_bits=None))])
def test_a_loaded_optimizer_goes_on_bit_for_bit(dtype, options, rng_seed):
    "With several groups, each with its own step counter; the next steps, not only the states, must be the same."
    def make():
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in [(40, 33), (64,), (7,)]]
        return (params, FlashAdamW([dict(params=params[:1], weight_decay=0.1),
                                    dict(params=params[1:], weight_decay=0.0)], max_norm=1.0, **options))
    (params, optimizer), (others, other) = make(), make()
    for n in range(6):
        if n == 3:
            with torch.no_grad():
                for p, q in zip(params, others): q.copy_(p)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p, q in zip(params, others): p.grad = q.grad = torch.randn_like(p)
        optimizer.step()
        if n >= 3: other.step()
    assert all(p.equal(q) for p, q in zip(params, others))
    assert all(a.equal(b) for p, q in zip(params, others)
               for a, b in zip(optimizer.state[p].values(), other.state[q].values()))


CHANGES = {"smaller": lambda p: torch.ones(4, 4, dtype=torch.bfloat16),
           "larger": lambda p: torch.ones(16, 16, dtype=torch.bfloat16), "its rows": lambda p: p[:4],
           "reshaped": lambda p: p.view(4, 16), "fp32": torch.Tensor.float, "fp16": torch.Tensor.half}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fresh", [True, False], ids=["new gradient", "old gradient"])
def test_weights_that_no_longer_fit_their_state(change, fresh):
    "Of two groups the second has changed: not even the first moves, and no state appears."
    p, q, late = (nn.Parameter(torch.ones(8, 8).bfloat16()) for _ in range(3))
    optimizer = FlashAdamW([dict(params=[q, late]), dict(params=[p])], lr=0.1)
    for x in p, q: x.grad = torch.ones_like(x)
    optimizer.step()
    if fresh: p.grad = None
    p.data = CHANGES[change](p.data)
    if fresh: p.grad = torch.ones_like(p)
    elif p.grad.dtype != p.dtype: p.grad.data = p.grad.to(p.dtype)  # what model.float() does
    late.grad = torch.ones_like(late)
    before, states = [x.detach().clone() for x in (p, q)], copy.deepcopy(optimizer.state_dict()["state"])
    for _ in range(2):
        with pytest.raises(OptionError, match="another shape or dtype"): optimizer.step()
    if change != "fp16":  # which only the last step of the same kind knows
        with pytest.raises(OptionError, match="another shape or dtype"): optimizer.step_param(p)
    assert all(torch.equal(x.detach(), b) for x, b in zip((p, q), before)) and late not in optimizer.state
    for i, s in optimizer.state_dict()["state"].items():
        for k, t in s.items(): assert torch.equal(t, states[i][k]), k


@pytest.mark.parametrize("change", CHANGES)
def test_one_weight_that_does_no_longer_fit_its_state(change):
    "The only one of its optimizer; on a GPU where there is one."
    p = nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16, device="cuda" if torch.cuda.is_available() else "cpu"))
    p.grad = torch.ones_like(p)
    optimizer = FlashAdamW([p], lr=0.1); optimizer.step()
    old, p.grad = (p.data, p.grad), None  # kept, so that the new ones lie elsewhere
    p.data = CHANGES[change](p.data).to(p.device)
    p.grad, before = torch.ones_like(p), p.detach().clone()
    with pytest.raises(OptionError, match="another shape or dtype"): optimizer.step()
    assert torch.equal(p.detach(), before)


def test_a_model_that_moved():
    p = nn.Parameter(torch.ones(8, 8).bfloat16()); p.grad = torch.ones_like(p)
    optimizer = FlashAdamW([p], lr=0.1); optimizer.step()
    optimizer.state[p] = {k: t.to("meta") for k, t in optimizer.state[p].items()}
    before = p.detach().clone()
    with pytest.raises(OptionError, match="another device"): optimizer.step()
    assert torch.equal(p.detach(), before)


def test_states_that_fit_any_dtype_and_shape():
    """Without error bits a state is no matter of dtype;
    without a moment either there is nothing to fit, but for the gradient."""
    p = nn.Parameter(torch.ones(8, 8)); p.grad = torch.ones_like(p)
    optimizer = FlashAdamW([p], lr=0.1); optimizer.step()
    p.grad, p.data = None, p.data.bfloat16()
    p.grad = torch.ones_like(p); optimizer.step()
    assert optimizer.state[p]["step"] == 2 and "error_bits" in optimizer.state[p] and p[0, 0] < 0.85

    q = nn.Parameter(torch.ones(8)); q.grad = torch.ones_like(q)
    plain = FlashSGD([q], lr=0.5); plain.step()
    q.data = torch.ones(4)
    with pytest.raises(GradientError, match="zero_grad"): plain.step()
    assert torch.equal(q.detach(), torch.ones(4))
    q.grad = None; q.grad = torch.ones(4); plain.step()
    assert torch.equal(q.detach(), torch.full((4,), 0.5))


def test_states_of_nothing_and_of_another_kind():
    p = nn.Parameter(torch.ones(8, 8).bfloat16())
    for nothing in ({}, None):
        with pytest.raises(UserError, match="param_groups"): FlashAdamW([p]).load_state_dict(nothing)
    adamw = FlashAdamW([p], lr=0.1)
    p.grad = torch.ones_like(p)
    adamw.step()
    lion = FlashLion([p], lr=0.01)
    with pytest.raises(UserError, match="another kind"): lion.load_state_dict(adamw.state_dict())
    assert not lion.state and lion.param_groups[0]["betas"] == (0.9, 0.99)


KINDS = {FlashAdam: "Adam", FlashAdamW: "Adam", FlashLion: "Lion", FlashSGD: "SGD", FlashSGDW: "SGD",
         torch.optim.Adam: "Adam", torch.optim.AdamW: "Adam", torch.optim.SGD: "SGD",
         **{getattr(torch.optim, name): name
            for name in ("NAdam", "RAdam", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD", "LBFGS")},
         torch.optim.Adafactor: "another kind"}


@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("loads", [FlashAdamW, FlashLion, FlashSGD])
@pytest.mark.parametrize("steps", [0, 2])
def test_state_dicts_of_another_family(saved, loads, steps):
    "Before a first step, too, when only the groups tell."
    p, q = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8, 8))
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    theirs, ours = saved([p], lr=0.25, **({"momentum": 0.9} if KINDS[saved] == "SGD" else {})), loads([q], lr=0.5)
    for _ in range(steps): theirs.step(lambda: p.sum()); ours.step()
    before = copy.deepcopy(ours.state_dict())
    if KINDS[saved] == KINDS[loads]:
        ours.load_state_dict(theirs.state_dict())
        assert ours.param_groups[0]["lr"] == 0.25
        return ours.step()
    with pytest.raises(StateError, match=f"saved by {KINDS[saved]}.*{loads.__name__}.*loads {KINDS[loads]}"):
        ours.load_state_dict(theirs.state_dict())
    after = ours.state_dict()
    assert after["param_groups"] == before["param_groups"] and after["state"].keys() == before["state"].keys()
    for i, s in after["state"].items(): assert all(torch.equal(t, before["state"][i][k]) for k, t in s.items())


@pytest.mark.parametrize("bad", [{}, {"state": {}}, {"param_groups": []}, {"state": {}, "param_groups": [{}]},
                                 {"state": {}, "param_groups": []}, [], None], ids=str)
def test_what_is_no_state_dict(bad):
    with pytest.raises(StateError, match="state dict|param_groups"):
        FlashAdamW([nn.Parameter(torch.ones(3))]).load_state_dict(bad)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    "cls,options", [(cls, {name: x}) for cls in CLASSES for name in ("lr", "weight_decay")
                    for x in (INF, NAN, True, "0.1", None, torch.tensor(INF), torch.tensor(True), torch.ones(2))]
        + [(FlashAdamW, {"betas": b}) for b in ((True, 0.9), (0.9, False), (0.9, NAN), ("0.9", 0.9), 0.9)]
        + [(FlashLion, {"betas": b}) for b in ((True, 0.9), (0.9, NAN), (0.9, 1.1))]
        + [(FlashAdamW, {"eps": x}) for x in (INF, NAN, True, "1e-8")]
        + [(FlashAdamW, {"max_norm": x}) for x in (INF, NAN, True, "1")]
        + [(FlashSGD, {name: x}) for name in ("momentum", "dampening") for x in (INF, NAN, True)], ids=str)
def test_options_that_are_no_numbers(cls, options):
    (name, x), = options.items()
    with pytest.raises(OptionError) as e: cls([nn.Parameter(torch.zeros(3))], **options)
    assert f"{name}={x!r}" in str(e.value)
    if name == "max_norm": return
    good = cls([nn.Parameter(torch.zeros(3))])  # and where a state dict brings them
    saved = good.state_dict(); saved["param_groups"][0].update(options)
    before = dict(good.param_groups[0])
    with pytest.raises(UserError): good.load_state_dict(saved)
    assert good.param_groups[0] == before


def test_a_learning_rate_in_a_tensor():
    "Its value is checked when the optimizer is made, and on a device by no step: reading it there would wait for it."
    p = nn.Parameter(torch.ones(3)); p.grad = torch.ones(3)
    for lr in torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64):
        optimizer = FlashSGD([p], lr=lr); optimizer.step()
        assert optimizer.param_groups[0]["lr"] is lr
        check_options(optimizer, [{**optimizer.param_groups[0], "lr": lr.to("meta")}])  # which cannot be read
    assert torch.allclose(p.detach(), torch.full((3,), -0.5))


# What a second user tried.

def stepped(optimizer_of, seed=0):
    torch.manual_seed(seed)
    model = nn.Linear(32, 32)
    optimizer = optimizer_of(model)
    model(torch.randn(4, 32, dtype=model.weight.dtype)).float().square().mean().backward()
    optimizer.step()
    return model, optimizer


def test_fused_none_is_torchs_default():
    model, optimizer = stepped(lambda m: FlashAdamW(m.parameters(), fused=None))
    for _ in range(2):
        model(torch.randn(4, 32)).square().mean().backward()
        optimizer.step()
    for name in ("fused", "quantize", "companded", "check_numerics"):
        with pytest.raises(OptionError, match=f"{name}='maybe'"): FlashAdamW(model.parameters(), **{name: "maybe"})


def test_a_refused_group_is_not_kept():
    model, optimizer = stepped(lambda m: FlashAdamW(m.parameters()))
    with pytest.raises(OptionError): optimizer.add_param_group(dict(params=[nn.Parameter(torch.zeros(4))], lr="x"))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("step", [float("nan"), -5.0, None, torch.zeros(3), "x"])
def test_a_damaged_step_is_refused(step):
    model, optimizer = stepped(lambda m: FlashAdamW(m.parameters()))
    saved = optimizer.state_dict()
    saved["state"][0]["step"] = step
    with pytest.raises(StateError, match="step is"): optimizer.load_state_dict(saved)


def test_states_that_no_group_names_are_refused():
    model, optimizer = stepped(lambda m: FlashAdamW(m.parameters()))
    saved = optimizer.state_dict()
    saved["state"] = {str(key): state for key, state in saved["state"].items()}
    with pytest.raises(StateError, match="none of its groups names"): optimizer.load_state_dict(saved)
    assert len(optimizer.state) == 2


def test_what_casting_rounds_away_survives_loading_torchs_state():
    model, adamw = stepped(lambda m: torch.optim.AdamW(m.parameters()))
    exact = model.weight.detach().clone()
    cast_model(model)
    optimizer = FlashAdamW(model.parameters())
    early = optimizer.get_fp32_model_state_dict(model)["weight"]
    optimizer.load_state_dict(adamw.state_dict())
    for found in (early, optimizer.get_fp32_model_state_dict(model)["weight"]):
        assert (found - exact).abs().max() < 0.02 * (model.weight.float() - exact).abs().max()
    assert model._cast_error_bits  # they know of which weights they are, and others may be loaded
    for p in model.parameters(): p.grad = torch.zeros_like(p)
    optimizer.step()
    assert not model._cast_error_bits


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_of_a_loaded_optimizer_has_what_the_cast_took(copied):
    model = nn.Linear(33, 8)
    exact = model.weight.detach().clone()
    cast_model(model)
    optimizer = FlashAdamW(model.parameters())
    optimizer.load_state_dict(optimizer.state_dict())
    state = copied(optimizer).state_dict()["state"][0]
    assert torch.equal(state["error_bits"], optimizer.state_dict()["state"][0]["error_bits"])
    assert (optimizer.get_fp32_model_state_dict(model)["weight"] - exact).abs().max() < 1e-5


@pytest.mark.parametrize("load", [False, True])
def test_weights_made_wider_before_the_first_step_are_exported_as_they_were_cast(load):
    model = nn.Linear(33, 8)
    exact = model.weight.detach().clone()
    cast_model(model)
    optimizer = FlashAdamW(model.parameters())
    if load: optimizer.load_state_dict(optimizer.state_dict())
    model.float()
    assert (optimizer.get_fp32_model_state_dict(model)["weight"] - exact).abs().max() < 1e-5
    model.half()
    with pytest.raises(StateError, match="take the fp32 weights before such a change"): optimizer.get_fp32_model_state_dict(model)


@pytest.mark.parametrize("saved, own", [(24, 32), (32, 24), (24, 24), (32, 32)])
def test_weights_loaded_after_a_first_state_of_another_width_begin_where_they_are(saved, own):
    def new(bits):
        torch.manual_seed(0)
        cast_model(model := nn.Linear(33, 8))
        return model, FlashAdamW(model.parameters(), master_weight_bits=bits)
    (_, first), (model, optimizer) = new(saved), new(own)
    optimizer.load_state_dict(first.state_dict())
    model.load_state_dict(weights := {name: torch.randn_like(t) for name, t in model.state_dict().items()})
    assert torch.equal(optimizer.get_fp32_model_state_dict(model)["weight"], weights["weight"].float())


@pytest.mark.parametrize("change", [lambda w: w.copy_(w.flip(0)), lambda w: w.data.copy_(w.data.flip(0)),
                                    lambda w: w.data.copy_(w.data.t().clone()), lambda w: w.data.mul_(2)])
def test_other_weights_after_the_cast_begin_where_they_are(change):
    model = nn.Linear(32, 32)
    cast_model(model)
    with torch.no_grad(): change(model.weight)
    optimizer = FlashAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    model(torch.randn(4, 32).bfloat16()).float().square().mean().backward()
    optimizer.step()
    assert not optimizer.state[model.weight]["error_bits"].any() and optimizer.state[model.bias]["error_bits"].any()


def test_a_cast_model_can_be_pickled():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    cast_model(model)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again[0].weight, model[0].weight)
    exact = [FlashAdamW(m.parameters()).get_fp32_model_state_dict(m)["0.weight"] for m in (model, again)]
    assert torch.equal(*exact) and not torch.equal(exact[0], model[0].weight.float())


@pytest.mark.parametrize("loads", CLASSES)
def test_adamaxs_state_is_refused(loads):
    "Its groups look like Adam's; its second moment has another name."
    _, adamax = stepped(lambda m: torch.optim.Adamax(m.parameters()))
    _, optimizer = stepped(lambda m: loads(m.parameters()))
    with pytest.raises(StateError, match="another kind"): optimizer.load_state_dict(adamax.state_dict())


A, B = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))


@pytest.mark.parametrize(
    "given,says", [(None, "params=None"), ([dict(params=None)], "params=None"),
                   ([dict(lr=1)], "without params (it has lr)"), ([], "no parameters"), (iter(()), "no parameters"),
                   ([1.0], "a float among"), (["a"], "a str among"), ("a", "params='a'"), (3, "params=3"),
                   ([dict(params=[A]), "a"], "a str in place of a group"),
                   ([dict(params=[A]), B], "a Parameter in place of a group"), ([A, dict(params=[B])], "a dict among"),
                   (dict(params=[A]), "params=a dict"), (A, "params=a Parameter"),
                   ([("a",)], "a tuple among"), ([dict(params={A})], "in a set"),
                   ([dict(params=nn.Linear(2, 2))], "params=a Linear"), ([A, A], "given twice"),
                   ([dict(params=[A]), dict(params=A)], "given twice"), ([("a", A), ("b", A)], "given twice")],
    ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_no_parameters(given, says):
    "Of the types that torch.optim raises, where it does."
    with pytest.raises(OptionError, match=re.escape(says)) as e: FlashAdamW(given)
    assert isinstance(e.value, ValueError if says in ("no parameters", "given twice") else TypeError)


@pytest.mark.parametrize("group", [None, "a", [B], {}, dict(params=None), dict(params=[A]), dict(params=[B, B]),
                                   dict(params=[B, 1.0])], ids=str)
def test_a_group_that_is_none_changes_nothing(group):
    optimizer = FlashAdamW([A])
    with pytest.raises(OptionError): optimizer.add_param_group(group)
    assert [g["params"] for g in optimizer.param_groups] == [[A]]


def test_a_group_without_parameters_yet():
    optimizer = FlashAdamW([dict(params=[]), dict(params=[B])], lr=0.5)
    B.grad = torch.ones(3)
    optimizer.step()
    assert (B < 0.6).all()
    optimizer.load_state_dict(optimizer.state_dict())


def a_stepped(cls=FlashAdamW, **options):
    p = torch.nn.Parameter(torch.randn(40))
    opt = cls([p], lr=1e-3, **options)
    p.grad = torch.randn(40)
    opt.step()
    return opt


@pytest.mark.parametrize(
    "damage", [
        lambda s: s | dict(param_groups=3), lambda s: s | dict(param_groups=[3]),
        lambda s: s | dict(param_groups=["params"]), lambda s: s | dict(state=None), lambda s: s | dict(state=[]),
        lambda s: s | dict(param_groups=[dict(s["param_groups"][0], params=5)]),
        lambda s: s | dict(param_groups=[dict(s["param_groups"][0], params=[[0]])]), lambda s: s | dict(state={0: 3}),
        lambda s: s | dict(state={0: s["state"][0] | {"exp_avg_sq::scales": -s["state"][0]["exp_avg_sq::scales"]}}),
        lambda s: s | dict(state={0: dict(step=1.0, exp_avg=torch.zeros(40), exp_avg_sq=-torch.ones(40))})])
def test_damaged_state_dicts_are_refused_in_words(damage):
    opt = a_stepped()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(StateError): opt.load_state_dict(damage(before))
    after = opt.state_dict()
    assert (after["param_groups"] == before["param_groups"]
            and all(torch.equal(x, after["state"][0][k]) for k, x in before["state"][0].items()))


def test_hooks_of_load_state_dict_run():
    opt, other, ran = a_stepped(), a_stepped(), []
    opt.register_load_state_dict_pre_hook(lambda o, state: ran.append("before") or other.state_dict())
    opt.register_load_state_dict_post_hook(lambda o: ran.append("after"))
    opt.load_state_dict(opt.state_dict())
    p, q = opt.param_groups[0]["params"][0], other.param_groups[0]["params"][0]
    assert (ran == ["before", "after"]
            and torch.equal(opt.state[p]["exp_avg::quantized"], other.state[q]["exp_avg::quantized"]))


def test_options_of_the_optimizer_are_refused_in_a_group():
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(OptionError, match="max_norm in a group"): FlashAdamW([dict(params=[p], max_norm=1.0)])
    with pytest.raises(OptionError, match="maximize='no'"): FlashAdamW([p], maximize="no")
    with pytest.raises(OptionError, match="in a set"): FlashAdamW({p})
    FlashAdamW([p], lr=np.float32(1e-3))


def test_a_stale_handle_of_release_changes_nothing():
    layer = torch.nn.Linear(4, 4)
    opt = FlashAdamW(layer.parameters(), max_norm=1.0)
    old = enable_gradient_release(layer, opt)
    old.remove()
    new = enable_gradient_release(layer, opt)
    old.remove()
    assert opt.release is new
    for wrong in dict(grad_scaler=3), dict(pre_step=3):
        new.remove()
        with pytest.raises(UserError, match=next(iter(wrong))): enable_gradient_release(layer, opt, **wrong)


@pytest.mark.parametrize("make", [
    FlashAdamW, FlashLion, lambda p, **k: FlashSGD(p, lr=0.1, momentum=0.9, **k), lambda p, **k: FlashAdamW(p, max_norm=1.0, **k)])
def test_a_step_under_autocast_is_the_same(make, rng_seed):
    def stepped(around):
        torch.manual_seed(rng_seed)
        ps = [torch.nn.Parameter(torch.randn(n).bfloat16()) for n in (64, 33)]
        opt = make(ps)
        for _ in range(3):
            for p in ps: p.grad = torch.randn_like(p)
            with around(): opt.step()
        return ps + [t for s in opt.state.values() for t in s.values()]
    plain = stepped(nullcontext)
    for dtype in torch.bfloat16, torch.float16:
        assert all(torch.equal(a, b) for a, b in zip(plain, stepped(lambda: torch.autocast("cpu", dtype))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_changes_nothing(dtype, rng_seed):
    def stepped():
        torch.manual_seed(rng_seed)
        p = torch.nn.Parameter(torch.randn(999, dtype=torch.float32).bfloat16())
        opt = FlashAdamW([p], max_norm=1.0)
        model = torch.nn.ParameterList([p])
        average = AveragedMasters(opt, model)
        for _ in range(3):
            p.grad = torch.randn(999, dtype=torch.float32).bfloat16()
            opt.step()
            average.update()
        return [p, *opt.state[p].values(), *average.average.values()]
    plain, before = stepped(), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try: other = stepped()
    finally: torch.set_default_dtype(before)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(plain, other))


@pytest.mark.parametrize("saves, loads", [
    (torch.optim.AdamW, FlashAdam), (FlashAdamW, FlashAdam), (torch.optim.Adam, FlashAdamW), (FlashAdam, FlashAdamW),
    (FlashSGDW, FlashSGD), (torch.optim.SGD, FlashSGDW)])
def test_weight_decay_of_the_other_kind_is_refused(saves, loads):
    p = torch.nn.Parameter(torch.ones(4))
    one, two = (make([p], lr=0.1, weight_decay=0.5) for make in (saves, loads))
    p.grad = torch.ones(4)
    one.step()
    before = copy.deepcopy(two.state_dict())
    with pytest.raises(StateError, match="decoupled_weight_decay="): two.load_state_dict(one.state_dict())
    assert two.state_dict() == before
    for group in one.param_groups: group["weight_decay"] = 0.0
    two.load_state_dict(one.state_dict())  # without decay they are one
    loads(one.param_groups, lr=0.1)
    with pytest.raises(OptionError, match="decoupled_weight_decay="):
        loads([dict(params=[p], weight_decay=0.1, decoupled_weight_decay=not loads.decoupled)], lr=0.1)
    two.param_groups[0] |= dict(weight_decay=0.1, decoupled_weight_decay=not loads.decoupled)
    p.grad = torch.ones(4)
    with pytest.raises(OptionError, match="decoupled_weight_decay="): two.step()  # edited where it lies


def test_groups_of_muon_are_refused_by_others():
    p = torch.nn.Parameter(torch.ones(4, 4))
    groups = [dict(params=[p], algorithm="muon")]
    with pytest.raises(OptionError, match="use FlashMuon"): FlashAdamW(groups, lr=0.1)
    FlashMuon(groups, lr=0.1)


def test_an_error_names_the_parameter():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    opts = [FlashAdamW(params, lr=0.1, check_numerics=True) for params in (model.parameters(), model.named_parameters())]
    for p in model.parameters(): p.grad = torch.full_like(p, torch.nan if p is model[1].weight else 1.0)
    for opt, name in zip(opts, ("parameter 2", "1.weight")):
        with pytest.raises(NumericsError, match=f"the gradient of {name} of shape"): opt.step()


def test_no_norm_is_told_of_a_step_that_formed_none():
    p = torch.nn.Parameter(torch.ones(4))
    opt = FlashAdamW([p], max_norm=1.0)
    p.grad = torch.ones(4)
    opt.step()
    assert opt.grad_norm == 2
    p.grad = None
    opt.step()
    assert opt.grad_norm is None
