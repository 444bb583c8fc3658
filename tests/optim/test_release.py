"""Gradient release: the same bits as ordinary steps, gradients that do not outlive their use."""
import copy
import gc
import os
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from every import MAKERS
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.optim import FlashAdamW, FlashSGD, NumericsError, enable_gradient_release
from flashoptim_nb.optim.release import ReleaseError
from flashoptim_nb.optim.states import read_state, scale_moments

KW = dict(lr=1e-2, betas=(0.9, 0.95))


class Model(nn.Module):
    "An embedding tied to the head, and a layer that some micro-batches leave out."
    def __init__(self, dtype=torch.bfloat16):
        super().__init__(); torch.manual_seed(0)
        self.embed, self.mid, self.rare, self.head = (nn.Embedding(17, 32), nn.Linear(32, 32), nn.Linear(32, 32),
                                                      nn.Linear(32, 17, bias=False))
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, seed, rare=True):
        x = self.mid(self.embed(torch.randint(0, 17, (64,), generator=torch.Generator().manual_seed(seed)))).tanh()
        return self.head(x + self.rare(x) if rare else x).float().logsumexp(-1).mean()


def pair(**options):
    "Ordinary and releasing training of the same model."
    a, b = Model(), Model()
    o, r = FlashAdamW(a.parameters(), **KW, **options), FlashAdamW(b.parameters(), **KW, **options)
    return a, o, b, r, enable_gradient_release(b, r)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("options", [dict(), dict(quantize=False, master_weight_bits=None), dict(skip_nonfinite=False)])
def test_same_bits(options):
    a, o, b, r, handle = pair(**options)
    for t in range(6):
        a(t).backward(); o.step(); o.zero_grad()
        b(t).backward()
        assert all(p.grad is None for p in b.parameters())
        r.step(); r.zero_grad()
    assert equal(a, b)
    if not options: torch.testing.assert_close(o.grad_norm, r.grad_norm)


def test_few_gradients_live_at_once():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    opt, alive = FlashAdamW(layers.parameters()), []
    enable_gradient_release(
        layers, opt,
        pre_step=lambda p, group: alive.append(sum(q.grad is not None for q in layers.parameters())) or True)
    layers(torch.randn(4, 64)).sum().backward(); opt.step()
    assert len(alive) == 24 and max(alive) <= 2


def test_a_model_that_nobody_holds_any_more_is_freed():
    model, optimizer, handle = pair()[2:]
    model(0).backward(); optimizer.step()
    held = [weakref.ref(one) for one in (model, model.mid.weight, optimizer, handle)]
    del model, optimizer, handle
    gc.collect()
    assert [ref() for ref in held] == [None] * 4


def test_accumulation_with_a_layer_that_the_last_micro_batch_leaves_out():
    a, o, b, r, handle = pair()
    for t in range(4):
        a(2 * t).backward(); a(2 * t + 1, rare=False).backward(); o.step(); o.zero_grad()
        with handle.accumulate(): b(2 * t).backward()
        assert b.rare.weight.grad is not None
        b(2 * t + 1, rare=False).backward(); r.step()
        assert all(p.grad is None for p in b.parameters())
    assert equal(a, b)


def test_clipping_by_the_previous_norm():
    a, o, b, r, handle = pair(max_norm=0.02)
    previous = None
    plain = FlashAdamW(a.parameters(), **KW)
    for t in range(5):
        a(t).backward()
        norm = torch.stack([p.grad.float().norm() for p in a.parameters()]).norm()
        scale = None if previous is None else (0.02 / (previous + 1e-6)).clamp(max=1)
        for g in plain.param_groups:
            for p in g["params"]: plain.step_param(p, g, scale)
        if previous is None:  # the first step is clipped afterwards, by its moments
            for g in plain.param_groups:
                for p in g["params"]: scale_moments(plain, g, p, (0.02 / (norm + 1e-6)).clamp(max=1))
        plain.zero_grad()
        b(t).backward(); r.step()
        torch.testing.assert_close(r.grad_norm, norm, rtol=1e-3, atol=0)
        previous = r.grad_norm
    assert equal(a, b)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("factor", [0.2337123, 3e-6, 1e-12])
def test_moments_are_scaled_in_fp32(device, factor):
    "Also by a factor that fp16, in which scales are kept, has not."
    p = nn.Parameter(torch.zeros(33, 65, device=device))
    opt = FlashAdamW([p], lr=1e-3)
    p.grad = 1e3 * torch.randn_like(p)
    opt.step()
    scales = {key: opt.state[p][f"{key}::scales"].clone() for key in opt._moments_of(opt.param_groups[0])}
    scale_moments(opt, opt.param_groups[0], p, torch.tensor(factor, device=device))
    for key, before in scales.items():
        assert torch.equal(opt.state[p][f"{key}::scales"], (before.float() * torch.tensor(factor)).to(before.dtype)), key


def moments(opt):
    return [read_state(opt, g, p)[key].clone() for g in opt.param_groups for p in g["params"] for key in opt._moments_of(g)]


def releasing(m=None, load=None):
    m = m or Model(torch.float32)
    opt = FlashAdamW(m.parameters(), lr=1e-2, max_norm=0.01, rounding="nearest")
    if load: opt.load_state_dict(load)
    return m, opt, enable_gradient_release(m, opt)


def same(have, want, rtol=0.02):
    assert len(have) == len(want) > 0
    for x, y in zip(have, want): torch.testing.assert_close(x, y, rtol=rtol, atol=rtol * float(y.abs().max()))


def after_the_first(maker, released, stepping=True, **options):
    "A model and the moments after its first step, clipped to a tenth of the gradients' norm or less."
    m = Model(torch.float32)
    opt = MAKERS[maker](m.parameters(), lr=1e-2, max_norm=0.01, rounding="nearest", **options)
    if released: enable_gradient_release(m, opt)
    m(0).backward()
    if stepping: opt.step()
    saved = opt.state_dict()  # settles what a loop without step() has left open
    assert stepping or saved["state"]
    return m, opt, moments(opt)


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("maker", sorted(MAKERS))
def test_the_first_step_is_clipped_when_its_norm_is_known(maker, quantize):
    a, inside, want = after_the_first(maker, False, quantize=quantize)
    b, opt, have = after_the_first(maker, True, quantize=quantize)
    _, _, late = after_the_first(maker, True, stepping=False, quantize=quantize)
    assert inside.grad_norm > 0.1 and have
    for x, y, z in zip(want, have, late):
        assert torch.equal(y, z)
        torch.testing.assert_close(y, x, rtol=0.02 if quantize else 1e-4, atol=float(x.abs().max()) * (0.02 if quantize else 1e-5))
    if "SGD" in maker: return  # whose first change is as long as the gradient
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p, q, rtol=0, atol=2e-3)  # eps, and bf16 products


def test_a_first_step_that_is_not_finite_leaves_the_next_to_be_clipped_so():
    a, inside, want = after_the_first("FlashAdamW", False)
    m, opt, handle = releasing()
    (m(0) * torch.inf).backward(); opt.step()
    m(0).backward(); opt.step()
    same(moments(opt), want)
    assert 0 < handle.clip < 1 and not handle._unclipped


def test_states_that_were_there_are_not_clipped_again():
    m = Model(torch.float32); opt = FlashAdamW(m.parameters(), lr=1e-2, max_norm=0.01)
    m(0).backward(); opt.step(); opt.zero_grad()
    enable_gradient_release(m, opt)
    kept = {p: state["exp_avg_sq::scales"].clone() for p, state in opt.state.items()}
    m(1).backward(); opt.step()
    assert all((opt.state[p]["exp_avg_sq::scales"] >= 0.9 * scale).all() for p, scale in kept.items())


def interrupted(stop, kept, again=lambda saved: saved, stepping=True):
    "Models after six released steps in one go, and after as many with a checkpoint in between that `again` may change."
    def train(m, opt, steps):
        for t in steps:
            m(t).backward()
            if stepping: opt.step()
    *_, m, opt, handle = pair(max_norm=0.02)
    train(m, opt, range(6))
    *_, half, before, handle = pair(max_norm=0.02)
    train(half, before, range(stop))
    torch.save(dict(model=half.state_dict(), optimizer=before.state_dict()), kept)
    saved = torch.load(kept, weights_only=True)
    new = Model(); opt = FlashAdamW(new.parameters(), **KW, max_norm=0.02)
    new.load_state_dict(saved["model"]); opt.load_state_dict(again(saved["optimizer"]))
    enable_gradient_release(new, opt)
    train(new, opt, range(stop, 6))
    return m, new


@pytest.mark.parametrize("stepping", [True, False])
def test_a_resumed_run_is_clipped_as_one_that_was_not_stopped(stepping, tmp_path):
    m, new = interrupted(3, tmp_path / "kept", stepping=stepping)
    assert equal(m, new)


def test_a_state_dict_of_before_clipping_was_saved_loads_and_begins_unclipped(tmp_path):
    def older(saved):
        for group in saved["param_groups"]: group["state_format"] = "-".join(group["state_format"].split("-")[:3])
        return saved
    m, new = interrupted(3, tmp_path / "kept", older)
    assert not equal(m, new)


@pytest.mark.parametrize(
    "mark", ["companded-24-bfloat16-nan", "companded-24-bfloat16-2.0", "companded-24-bfloat16-much"])
def test_a_damaged_clip_coefficient_is_refused(mark):
    *_, b, r, handle = pair(max_norm=0.02)
    saved = r.state_dict(); saved["param_groups"][0]["state_format"] = mark
    with pytest.raises(UserError, match="state_format"): r.load_state_dict(saved)


def test_the_coefficient_goes_where_the_optimizer_goes_and_no_further(tmp_path):
    *_, b, r, handle = pair(max_norm=0.02)
    for t in range(2): b(t).backward(); r.step()
    twin = copy.deepcopy((b, r)); enable_gradient_release(*twin)
    for m, opt in (b, r), twin: m(2).backward(); opt.step()
    assert equal(b, twin[0])
    kept = r.state_dict()
    handle.remove()
    assert r._next_clip is None
    r.load_state_dict(kept); assert 0 < r._next_clip < 1
    b(3).backward(); r.step()  # an ordinary step in between
    assert r._next_clip is None
    r.load_state_dict(kept); r.max_norm = None; enable_gradient_release(b, r)
    plain = copy.deepcopy(b)
    ordinary = FlashAdamW(plain.parameters(), **KW, skip_nonfinite=True)
    ordinary.load_state_dict(kept)
    b.zero_grad(); plain.zero_grad()
    b(4).backward(); plain(4).backward(); ordinary.step()
    assert equal(b, plain)


def test_a_bad_gradient_leaves_its_parameter_and_counts_once():
    a, o, b, r, handle = pair(skip_nonfinite=True)
    b(0).backward(); r.step()
    before = {n: p.detach().clone() for n, p in b.named_parameters()}
    hook = b.mid.weight.register_hook(lambda g: g * torch.nan)
    b(1).backward(); r.step(); hook.remove()
    after = dict(b.named_parameters())
    assert (torch.equal(after["mid.weight"], before["mid.weight"])
            and not torch.equal(after["rare.weight"], before["rare.weight"]))
    assert r.skipped_steps == 1 and not r.grad_norm.isfinite()
    b(2).backward(); r.step()
    assert r.skipped_steps == 1 and not torch.equal(b.mid.weight, before["mid.weight"])


def test_with_a_loss_scaler():
    a, o, b, r, handle = pair(); handle.remove()
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    enable_gradient_release(b, r, grad_scaler=scalers[1])
    for t in range(4):
        for m, opt, s in (a, o, scalers[0]), (b, r, scalers[1]):
            s.scale(m(t)).backward(); s.step(opt); s.update(); opt.zero_grad()
    assert equal(a, b) and scalers[0].get_scale() == scalers[1].get_scale()


def test_remove_restores_ordinary_steps():
    a, o, b, r, handle = pair()
    handle.remove()
    for m, opt in (a, o), (b, r): m(0).backward(); opt.step()
    assert not handle.active and equal(a, b) and all(p.grad is not None for p in b.parameters())
    enable_gradient_release(b, r).remove()


def test_where_it_cannot_be_right():
    m = Model(); opt = FlashAdamW(m.parameters())
    enable_gradient_release(m, opt)
    for bad in (lambda: enable_gradient_release(m, opt),
                lambda: enable_gradient_release(m, torch.optim.AdamW(m.parameters())),
                lambda: enable_gradient_release(Model(), FlashAdamW([nn.Parameter(torch.zeros(2))]))):
        with pytest.raises(UserError): bad()


class Twice(nn.Module):
    "A layer that is used twice, under either kind of checkpointing, and perhaps once more outside of it."
    def __init__(self, reentrant, outside=False):
        super().__init__(); torch.manual_seed(0)
        self.first, self.layer, self.reentrant, self.outside = nn.Linear(16, 16), nn.Linear(16, 16), reentrant, outside

    def forward(self, x):
        x = self.first(x)
        for _ in range(2): x = x + checkpoint(lambda y: self.layer(y).tanh(), x, use_reentrant=self.reentrant)
        return self.layer(x) if self.outside else x


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("outside", [False, True])
def test_a_layer_used_twice_under_checkpointing(outside):
    a, b = Twice(False, outside), Twice(False, outside)
    o, r = (FlashAdamW(m.parameters(), lr=1e-2) for m in (a, b))
    enable_gradient_release(b, r)
    for t in range(4):
        torch.manual_seed(t); x = torch.randn(4, 16)
        for m, opt in (a, o), (b, r): m(x).square().mean().backward(); opt.step(); opt.zero_grad()
    assert equal(a, b) and {float(s["step"]) for s in r.state.values()} == {4.0}


def test_reentrant_checkpointing_is_refused_before_anything_moves():
    m = Twice(True); opt = FlashAdamW(m.parameters(), lr=1e-2); before = copies(m)
    handle = enable_gradient_release(m, opt)
    with pytest.raises(ReleaseError, match="use_reentrant=False"): m(torch.ones(4, 16)).sum().backward()
    assert all(torch.equal(p, q) for p, q in zip(before, m.parameters())) and not opt.state
    opt.zero_grad(); m.reentrant = False  # and the same handle goes on
    m(torch.ones(4, 16)).sum().backward(); opt.step()
    assert not any(torch.equal(p, q) for p, q in zip(before, m.parameters()))
    with handle.accumulate():  # where nothing is stepped, anything goes
        m.reentrant = True; m(torch.ones(4, 16)).sum().backward()
    opt.step()
    assert {float(s["step"]) for s in opt.state.values()} == {2.0}


class Failing(torch.autograd.Function):
    "An operation whose backward runs out of memory when told to."
    on = False
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g):
        if Failing.on: raise torch.OutOfMemoryError("in the backward pass")
        return g


@pytest.mark.parametrize("scale", [1e6, float("nan")])
@pytest.mark.parametrize("cleared", [False, True])
@pytest.mark.parametrize("options", [dict(max_norm=0.01), dict(skip_nonfinite=True)])
def test_a_backward_pass_that_raises_leaves_nothing_behind(scale, cleared, options, monkeypatch):
    torch.manual_seed(0)
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    net, x = nn.ModuleList([first, last]), torch.randn(4, 8)
    opt = FlashAdamW(net.parameters(), lr=0.0, **options)  # weights stay, so that norms do
    handle = enable_gradient_release(net, opt)
    def backward(scale=1.0): (last(Failing.apply(first(x))).square().mean() * scale).backward()
    backward(); opt.step()
    norm, clip = opt.grad_norm, handle.clip
    monkeypatch.setattr(Failing, "on", True)
    with pytest.raises(torch.OutOfMemoryError): backward(scale)
    monkeypatch.setattr(Failing, "on", False)
    if cleared: opt.zero_grad()
    backward(); opt.step()
    assert torch.equal(opt.grad_norm, norm) and opt.skipped_steps == 0
    assert clip is None or torch.equal(handle.clip, clip)


def test_a_step_right_after_a_backward_pass_that_raised(monkeypatch):
    first, last = nn.Linear(8, 8), nn.Linear(8, 8)
    net = nn.ModuleList([first, last]); opt = FlashAdamW(net.parameters(), lr=1e-2, max_norm=1.0)
    enable_gradient_release(net, opt)
    monkeypatch.setattr(Failing, "on", True)
    with pytest.raises(torch.OutOfMemoryError):
        (last(Failing.apply(first(torch.ones(4, 8)))).sum() * torch.nan).backward()
    opt.step()
    assert opt.skipped_steps == 0 and opt.grad_norm is None


def test_a_second_backward_pass_before_step_is_refused():
    a, o, b, r, handle = pair()
    b(0).backward(); b(1).backward()  # nothing tells yet that the loop calls step()
    with pytest.raises(ReleaseError, match="accumulate"): r.step()
    b(2).backward(); r.step(); r.zero_grad()
    b(3).backward(); before = copies(b)
    with pytest.raises(ReleaseError, match="accumulate"): b(4).backward()
    assert all(torch.equal(p, q) for p, q in zip(before, b.parameters()))
    r.step()


@pytest.mark.parametrize("step_inside", (False, True))
def test_gradients_that_come_after_the_release_are_refused(step_inside):
    a, o, b, r, handle = pair()
    b(0).backward()
    with handle.accumulate():  # all but the first, where it has to be all but the last
        b(1).backward()
        before = copies(b)
        if step_inside:
            with pytest.raises(ReleaseError, match="accumulate"): r.step()
    if not step_inside:
        with pytest.raises(ReleaseError, match="accumulate"): r.step()
    assert all(torch.equal(p, q) for p, q in zip(before, b.parameters()))
    r.zero_grad()
    b(2).backward(); r.step()


def test_what_pre_step_drops_and_what_a_loop_without_step_did_are_no_second_pass():
    m, x, wanted = nn.Linear(4, 4), torch.ones(2, 4), []
    opt = FlashAdamW(m.parameters())
    handle = enable_gradient_release(m, opt, pre_step=lambda p, group: bool(wanted))
    m(x).sum().backward(); wanted.append(True)
    with handle.accumulate(): m(x).sum().backward()
    opt.step()
    assert opt.state[m.weight]["step"] == 1
    m = nn.Linear(4, 4)
    opt = FlashAdamW(m.parameters())
    handle = enable_gradient_release(m, opt)
    for _ in range(3): m(x).sum().backward()
    with handle.accumulate():
        m(x).sum().backward()
        opt.step()
    assert opt.state[m.weight]["step"] == 4


def test_an_optimizer_whose_gradients_another_takes_says_so():
    m = nn.Linear(8, 8)
    handle = enable_gradient_release(m, FlashAdamW(m.parameters()))
    new = FlashAdamW(m.parameters())  # in place of the first, which the handle keeps alive
    m(torch.ones(4, 8)).square().mean().backward()
    with pytest.raises(ReleaseError, match="call remove"): new.step()
    handle.remove()
    m(torch.ones(4, 8)).square().mean().backward()
    before = copies(m)
    new.step()
    assert not any(torch.equal(p, q) for p, q in zip(before, m.parameters()))
    new.zero_grad(); new.step()  # no gradients at all are no fault


def test_a_copy_between_backward_and_step_has_the_first_step_clipped():
    m = nn.Linear(8, 8)
    opt = FlashAdamW(m.parameters(), max_norm=0.01)
    enable_gradient_release(m, opt)
    (1e3 * m(torch.ones(4, 8))).square().mean().backward()
    n, other = copy.deepcopy((m, opt))
    opt.step(); other.step()
    for p, q in zip(m.parameters(), n.parameters()):
        assert all(torch.equal(opt.state[p][key], other.state[q][key]) for key in opt.state[p])


def test_zero_grad_in_place_of_step_is_refused():
    "As where a generator's loss goes through a discriminator that is released."
    torch.manual_seed(0)
    made, judge = nn.Linear(4, 4), nn.Linear(4, 1)
    g, d = FlashAdamW(made.parameters(), lr=1e-2), FlashAdamW(judge.parameters(), lr=1e-2)
    handle = enable_gradient_release(judge, d)
    def iteration(frozen):
        d.zero_grad(); judge(made(torch.ones(2, 4)).detach()).sum().backward(); d.step()
        g.zero_grad(); judge.requires_grad_(not frozen)
        judge(made(torch.ones(2, 4))).sum().neg().backward(); judge.requires_grad_(True); g.step()
    for _ in range(3): iteration(frozen=True)
    assert {float(s["step"]) for s in d.state.values()} == {3.0}
    iteration(frozen=False)
    with pytest.raises(ReleaseError, match="requires_grad_"): iteration(frozen=True)


def test_two_losses_with_parameters_of_their_own_before_one_step():
    def both(release):
        torch.manual_seed(0)
        net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        opt = FlashAdamW(net.parameters(), lr=1e-2, max_norm=0.1)
        if release: enable_gradient_release(net, opt)
        norms = []
        for _ in range(3):
            for layer in net: layer(torch.ones(2, 4)).square().sum().backward()
            opt.step(); opt.zero_grad(); norms.append(opt.grad_norm)
        return norms[0], {float(s["step"]) for s in opt.state.values()}
    (a, counted), (b, counted_too) = both(False), both(True)
    torch.testing.assert_close(a, b)
    assert counted == counted_too == {3.0}


@pytest.mark.parametrize("options", [dict(), dict(max_norm=0.02)])
def test_a_loop_without_step_takes_one_a_backward_pass(options):
    a, o, b, r, handle = pair(**options); a, o, c, s, with_step = pair(**options)
    for t in range(5):
        b(t).backward()
        c(t).backward(); s.step()
    assert equal(b, c)
    assert len(handle._squares) <= len(list(b.parameters()))  # nothing piles up


def test_gradients_that_are_no_backward_pass_of_the_parameters():
    """A gradient penalty by autograd.grad, gradients set by hand, a frozen layer,
    a backward pass that stops at an input."""
    a, o, b, r, handle = pair()
    def train(m, opt, by_hand):
        m.rare.requires_grad_(False)
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
        penalty, = torch.autograd.grad(m.mid(x).float().square().sum(), x, create_graph=True)
        penalty.float().square().mean().backward(); opt.step(); opt.zero_grad()
        if by_hand:
            for p, g in zip(m.mid.parameters(), torch.autograd.grad(m(1), list(m.mid.parameters()))): p.grad = g
        else: m(1).backward(inputs=list(m.mid.parameters()))
        opt.step(); opt.zero_grad(); m.rare.requires_grad_(True)
    for hand in (False, True): train(a, o, False); train(b, r, hand)
    assert equal(a, b) and all(p.grad is None for p in b.parameters())


def test_create_graph_is_refused():
    a, o, b, r, handle = pair(); before = copies(b)
    with pytest.raises(ReleaseError, match="create_graph"): b(0).backward(create_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(before, b.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_a_weight_that_a_later_part_of_the_backward_pass_needs_as_it_was(fused, monkeypatch):
    """Detached, it feeds no gradient and so is stepped before that part;
    the graph has kept it, and torch says that it was changed."""
    if fused and not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")): pytest.skip("needs the kernels")
    layer = nn.Linear(8, 8, bias=False).to("cuda" if fused and torch.cuda.is_available() else "cpu")
    opt = FlashSGD(layer.parameters(), lr=1.0, fused=fused); enable_gradient_release(layer, opt)
    x = torch.ones(2, 8, device=layer.weight.device, requires_grad=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        layer(nn.functional.linear(x * 2, layer.weight.detach())).sum().backward()


def test_pre_step_decides():
    a, o, b, r, handle = pair(max_norm=100.0); handle.remove()
    seen = []
    def pre_step(p, group):
        seen.append(group is r.param_groups[0] and p.grad is not None)
        return p is not b.rare.weight
    enable_gradient_release(b, r, pre_step=pre_step)
    before = b.rare.weight.detach().clone()
    a.rare.weight.requires_grad_(False)
    for m, opt in (a, o), (b, r): m(0).backward(); opt.step()
    assert all(seen) and len(seen) == 5
    assert (equal(a, b) and torch.equal(b.rare.weight, before) and b.rare.weight.grad is None
            and b.rare.weight not in r.state)
    torch.testing.assert_close(o.grad_norm, r.grad_norm)  # of the gradients that were used
    for wrong in (lambda p: True), 3, (lambda p, group, more: True):
        with pytest.raises(UserError, match="pre_step"): enable_gradient_release(a, o, pre_step=wrong)
    enable_gradient_release(a, o, pre_step=lambda p, group: None)
    with pytest.raises(ReleaseError, match="True"): a(0).backward()


def test_two_optimizers_on_one_model():
    def train(release):
        m = Model()
        parts = [list(m.embed.parameters()) + list(m.mid.parameters()), list(m.rare.parameters())]
        opts = [FlashAdamW(parts[0], lr=1e-2, skip_nonfinite=True), FlashSGD(parts[1], lr=0.1, momentum=0.9)]
        handles = [enable_gradient_release(m, opt) for opt in opts] if release else []
        for t in range(3):
            m(t).backward()
            assert not release or all(p.grad is None for p in m.parameters())
            for opt in opts: opt.step(); opt.zero_grad()
        return m, opts, handles
    (a, plain, _), (b, opts, handles) = train(False), train(True)
    assert equal(a, b) and float(opts[0].state[b.mid.weight]["step"]) == 3
    torch.testing.assert_close(plain[0].grad_norm, opts[0].grad_norm)
    shared = FlashAdamW(list(b.rare.parameters()) + [nn.Parameter(torch.zeros(2))])
    with pytest.raises(ReleaseError, match="another optimizer"): enable_gradient_release(b, shared)
    handles[1].remove()
    enable_gradient_release(b, shared)


def _replaced(opt, m): opt.param_groups[0] = opt.param_groups[0] | dict(lr=0.5)
def _moved(opt, m):
    opt.param_groups[1]["params"].remove(m.rare.weight)
    opt.param_groups[0]["params"].append(m.rare.weight)


@pytest.mark.parametrize("change, says", [
    *((lambda opt, m, name=name, x=x: setattr(opt, name, x), f"{name} was changed") for name, x in dict(
        max_norm=0.5, skip_nonfinite=True, rounding="nearest", check_numerics=True, fused=False).items()),
    (_replaced, "lr of group 0 was changed .* stepped by 0.01 already; now it is 0.5"),
    (_moved, "lr of group 0 was changed .* stepped by 0.0 already; now it is 0.01")])
def test_what_steps_go_by_and_is_changed_between_backward_and_step_is_refused(change, says):
    m = Model()
    own = [*m.rare.parameters()]
    opt = FlashAdamW([dict(params=[p for p in m.parameters() if all(p is not q for q in own)]), dict(params=own, lr=0.0)],
                     lr=1e-2)
    enable_gradient_release(m, opt)
    for _ in range(2): m(0).backward(); opt.step()
    m(1).backward()
    change(opt, m)
    with pytest.raises(ReleaseError, match=says): opt.step()
    m(2).backward(); opt.step()  # by what it is now


def in_parts(release=True):
    "Two layers in groups of their own, each with a backward pass of its own before `step()`."
    torch.manual_seed(0)
    net = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    opt = FlashAdamW([dict(params=layer.parameters()) for layer in net], lr=1e-2)
    if release: enable_gradient_release(net, opt)
    return net, opt, lambda i: net[i](torch.ones(2, 4)).square().sum().backward()


def test_a_group_that_was_replaced_after_the_pass_that_stepped_it_is_refused_after_further_passes_too():
    net, opt, backward = in_parts()
    for _ in range(2): backward(0); backward(1); opt.step()
    backward(0)
    opt.param_groups[0] = opt.param_groups[0] | dict(lr=0.5)
    backward(1)
    with pytest.raises(ReleaseError, match="lr of group 0 was changed .* stepped by 0.01 already; now it is 0.5"): opt.step()
    backward(0); backward(1); opt.step()  # by what it is now


def test_a_rate_may_be_restored_after_a_pass_that_stepped_nothing_by_it():
    (a, o, whole), (b, r, released) = in_parts(release=False), in_parts()
    for opt, backward in (o, whole), (r, released):
        for _ in range(3):
            backward(0)
            opt.param_groups[0]["lr"] = 0.0
            backward(1)
            opt.param_groups[0]["lr"] = 0.01
            opt.step(); opt.zero_grad()
    assert equal(a, b)


def test_a_group_that_was_away_during_a_pass_is_held_to_what_it_stepped_by():
    net, opt, backward = in_parts()
    for _ in range(2): backward(0); backward(1); opt.step()
    backward(0)
    group = opt.param_groups.pop(0)
    backward(1)
    opt.param_groups.insert(0, group | dict(lr=0.5))
    with pytest.raises(ReleaseError, match="lr of group 0 was changed .* stepped by 0.01 already; now it is 0.5"): opt.step()


def test_a_rate_may_be_set_until_the_first_pass_that_steps_by_it():
    (a, o, whole), (b, r, released) = in_parts(release=False), in_parts()
    for n in range(3):
        for opt, backward in (o, whole), (r, released):
            for i in range(2):
                opt.param_groups[i]["lr"] = 0.1 / (1 + n + i)
                backward(i)
            opt.step(); opt.zero_grad()
    assert equal(a, b)


def test_what_no_step_goes_by_may_change_between_backward_and_step():
    m = Model()
    opt = FlashAdamW([dict(params=m.parameters(), name="all")], lr=1e-2)
    enable_gradient_release(m, opt)
    m(0).backward()
    opt.compress_state_dict = False
    opt.param_groups[0] = opt.param_groups[0] | dict(name="each")  # another dict that says the same
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], lr=0.5))
    opt.step()


def test_a_parameter_moved_to_another_group_or_out_of_the_optimizer():
    m = Model()
    opt = FlashAdamW(
        [dict(params=[m.embed.weight, *m.mid.parameters()]), dict(params=list(m.rare.parameters()), lr=0.0)], lr=1e-2)
    enable_gradient_release(m, opt)
    m(0).backward(); opt.step()
    moved, out = m.rare.weight, m.mid.weight
    opt.param_groups[0]["params"] = [p for p in opt.param_groups[0]["params"] if p is not out] + [moved]
    opt.param_groups[1]["params"] = [m.rare.bias]
    before = {p: p.detach().clone() for p in m.parameters()}
    m(1).backward(); opt.step()
    assert (not torch.equal(moved, before[moved]) and torch.equal(out, before[out]) and out.grad is not None
            and torch.equal(m.rare.bias, before[m.rare.bias]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_that_release_was_not_told_of(dtype, unscaled):
    layer = nn.Linear(4, 4).to(dtype)
    opt = FlashAdamW(layer.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    enable_gradient_release(layer, opt)
    scaler.scale(layer(torch.ones(2, 4, dtype=dtype)).float().sum()).backward()
    if unscaled: scaler.unscale_(opt)
    with pytest.raises(ReleaseError, match="grad_scaler="): scaler.step(opt)
    assert not hasattr(opt, "grad_scale") and not hasattr(opt, "found_inf")


def test_unscale_with_a_scaler_that_release_knows():
    a, o, b, r, handle = pair(); handle.remove()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    enable_gradient_release(b, r, grad_scaler=scaler)
    for t in range(3):
        a(t).backward(); o.step(); o.zero_grad()
        scaler.scale(b(t)).backward(); scaler.unscale_(r); scaler.step(r); scaler.update(); r.zero_grad()
    assert equal(a, b)


def test_wrappers_that_reduce_gradients_themselves(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inner = nn.Linear(2, 2)
        wrapped = nn.parallel.DistributedDataParallel(inner)
        opt = FlashAdamW(inner.parameters())
        for model in wrapped, nn.Sequential(wrapped):
            for kind in RuntimeError, UserError, TypeError:
                with pytest.raises(kind, match="DistributedDataParallel"): enable_gradient_release(model, opt)
        handle = enable_gradient_release(inner, opt)  # bare, but called through its wrapper
        with pytest.raises(ReleaseError, match="DistributedDataParallel"): wrapped(torch.ones(1, 2))
        inner(torch.ones(1, 2)).sum().backward(); opt.step(); handle.remove()
        wrapped(torch.ones(1, 2)).sum().backward()
    finally: torch.distributed.destroy_process_group()


def test_the_caller_waits_for_every_stream_that_a_hook_stepped_on(monkeypatch):
    "FSDP2 calls hooks on a stream of its own: what comes next reads what they wrote."
    waited = []
    class Stream:
        device = "cuda:0"
        def wait_stream(self, other): waited.append(other)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Stream())
    model = torch.nn.Linear(4, 4)
    handle = enable_gradient_release(model, FlashAdamW(model.parameters()))
    side = Stream()
    handle._streams.add(side)
    handle._join()
    assert waited == [side] and not handle._streams
    handle._streams.add(side)
    model(torch.ones(2, 4)).sum().backward()
    assert waited == [side, side], "at the end of a backward pass"
    handle._streams.add(side)
    handle.optimizer.step()
    assert waited == [side] * 3, "and at a step"


@pytest.mark.parametrize("steps", [True, False])
def test_what_is_thawed_or_added_later_is_released_too(steps):
    "In a loop that calls step(), and in one without."
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    start = [p.detach().clone() for p in model.parameters()]
    model[0].requires_grad_(False), model[2].requires_grad_(False)
    opt = FlashAdamW([*model[0].parameters(), *model[1].parameters()], lr=0.1)
    enable_gradient_release(model, opt)
    def moved(): return [not torch.equal(p, q) for p, q in zip(model.parameters(), start)]
    for n, later in enumerate((lambda: None, lambda: model[0].requires_grad_(True),
                               lambda: (model[2].requires_grad_(True), opt.add_param_group(dict(params=model[2].parameters()))))):
        later()
        for _ in range(2):
            model(torch.ones(2, 4)).square().sum().backward()
            assert all(p.grad is None for p in model.parameters())
            if steps: opt.step()
        assert moved() == [n > 0] * 2 + [True] * 2 + [n > 1] * 2


def test_a_parameter_in_a_group_of_its_own_is_released_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = FlashAdamW(model.parameters(), lr=1e-3)
    handle, group, own = enable_gradient_release(model, opt), opt.param_groups[0], list(model[1].parameters())
    group["params"] = [p for p in group["params"] if all(p is not q for q in own)]
    with pytest.raises(UserError): opt.add_param_group(dict(params=[*own, torch.ones(2)[0]], lr=-1.0))
    opt.add_param_group(dict(params=own, lr=1e-4))
    model(torch.ones(2, 4)).square().sum().backward()
    assert all(p.grad is None for p in model.parameters())
    other = FlashAdamW(nn.Linear(4, 4).parameters())
    enable_gradient_release(nn.ModuleList([nn.Module()]).append(nn.ParameterList(other.param_groups[0]["params"])), other)
    with pytest.raises(ReleaseError, match="to another optimizer already"): other.add_param_group(dict(params=own))
    assert len(other.param_groups) == 1
    handle.remove()


def test_two_optimizers_may_share_what_is_frozen():
    shared, heads = nn.Linear(4, 4).requires_grad_(False), [nn.Linear(4, 1) for _ in range(2)]
    for head in heads:
        model = nn.Sequential(shared, head)
        enable_gradient_release(model, opt := FlashAdamW(model.parameters(), lr=0.1))
        before = head.weight.detach().clone()
        model(torch.ones(2, 4)).square().sum().backward()
        opt.step()
        assert head.weight.grad is None and not torch.equal(head.weight, before)


def test_numbers_are_checked_as_gradients_are_released():
    "`check_numerics` refuses in the backward pass what it refuses in `step()`, and lets pass what is passed over."
    def trained(factor=1.0, **options):
        model = torch.nn.Linear(4, 4).bfloat16()
        opt = FlashAdamW(model.parameters(), check_numerics=True, rounding="nearest", **dict(lr=1e-2) | options)
        enable_gradient_release(model, opt)
        for _ in range(2):
            (factor * model(torch.ones(2, 4).bfloat16()).float().sum()).backward()
            opt.step()
        return opt
    for wrong in dict(factor=float("nan")), dict(factor=1e9), dict(lr=1e-12):
        with pytest.raises(NumericsError): trained(**wrong)
    trained()
    assert trained(factor=float("nan"), max_norm=1.0).skipped_steps == 2
    assert trained(factor=float("nan"), skip_nonfinite=True).skipped_steps == 2


def test_a_run_that_is_resumed_after_a_first_step_that_is_not_finite_goes_on_alike():
    a, one, _ = releasing()
    (a(0) * torch.inf).backward(); one.step()
    b, two, _ = releasing(copy.deepcopy(a), copy.deepcopy(one.state_dict()))
    for m, opt in (a, one), (b, two): m(1).backward(); opt.step()
    same(moments(two), moments(one), 0.0)


@pytest.mark.parametrize("bad", [False, True])
def test_moments_that_are_loaded_before_the_first_step_ends_stay(bad):
    a, one, _ = releasing()
    for t in range(3): a(t).backward(); one.step()
    b, two, _ = releasing()
    (b(9) * (torch.inf if bad else 1.0)).backward()
    if bad: two.step()
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    two.step()
    same(moments(two), moments(one), 0.0)


def test_release_that_is_taken_up_again_goes_on_clipping():
    (a, one, _), (b, two, handle) = releasing(), releasing()
    for t in range(6):
        if t == 3: handle.remove(); handle = enable_gradient_release(b, two)
        for m, opt in (a, one), (b, two): m(t).backward(); opt.step()
    same(moments(two), moments(one), 0.0)


def test_release_that_ends_before_the_step_does_has_clipped_it():
    a, inside, want = after_the_first("FlashAdamW", False)
    b, opt, handle = releasing()
    b(0).backward(); handle.remove()
    same(moments(opt), want)


def test_a_step_of_no_gradients_leaves_the_next_to_be_clipped_as_the_first():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    a, inside, want = after_the_first("FlashAdamW", False)
    b, opt, handle = releasing()
    get_optimizer_state_dict(b, opt)  # takes a step over zeros, to make the states
    assert handle.clip is None
    b(0).backward(); opt.step()
    same(moments(opt), want)


def test_compiled_autograd_is_refused_in_words():
    m = nn.Linear(4, 1); opt = FlashAdamW(m.parameters(), lr=1e-2); before = copies(m)
    handle = enable_gradient_release(m, opt)
    torch._dynamo.reset()
    def backward():
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")): m(torch.ones(2, 4)).sum().backward()
    with pytest.raises(ReleaseError, match="compiled autograd"): backward()
    assert all(torch.equal(p, q) for p, q in zip(m.parameters(), before)) and not opt.state
    opt.zero_grad()
    m(torch.ones(2, 4)).sum().backward(); opt.step()  # an ordinary one goes on
    assert float(opt.state[m.weight]["step"]) == 1
    handle.remove(); backward()  # and without release both
    assert m.weight.grad is not None
