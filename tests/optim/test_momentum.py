"""SGD and Lion: reference against torch and float64, kernel against reference by the factor of two, optimizers against torch's.

The kernel's tests run on CUDA where there is one, and else in Triton's interpreter, in a process of their own."""
import copy

import pytest
import torch
import triton

from flashoptim_nb.base.compare import assert_2x
from flashoptim_nb.optim.codec import dequantize_m
from flashoptim_nb.optim.multi_tensor import TensorList, Operands, new_operands
from flashoptim_nb.optim.momentum_kernel import MomentumScalars, momentum_fused, momentum_reference
from flashoptim_nb.optim.split import decode
from flashoptim_nb.optim import FlashAdam, FlashAdamW, FlashLion, FlashSGD, FlashSGDW, OptionError

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernel = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA, or TRITON_INTERPRET=1: see test_interpreted.py")

LR = 1e-2
RULES = {"plain": MomentumScalars(LR, weight_decay=0.1), "momentum": MomentumScalars(
             LR, momentum=0.9, grad_weight=0.7, l2=0.2), "nesterov": MomentumScalars(LR, momentum=0.9, nesterov=True),
         "lion": MomentumScalars(LR, "lion", momentum=0.99, grad_weight=0.01, beta1=0.9, weight_decay=0.1)}


def values(x):
    "Weights and moment, unpacked, in their widest form."
    theta = x.param if x.error_bits is None else decode(x.param, x.error_bits)
    return theta, None if x.m is None else x.m if x.m_scale is None else dequantize_m(x.m, x.m_scale)


def clone(x): return Operands(*(t if t is None else t.clone() for t in x[:-1]), x.place)


def exact(theta, m, g, h, t):
    "One step in float64."
    theta, g = theta.double(), g.double() * (-1 if h.maximize else 1)
    g = g + h.l2 * theta
    if h.rule == "lion":
        m = m.double()
        u, m = (h.beta1 * m + (1 - h.beta1) * g).sign(), h.momentum * m + h.grad_weight * g
    elif m is None: u = g
    else:
        m = h.momentum * m.double() + (1.0 if t == 1 else h.grad_weight) * g
        u = g + h.momentum * m if h.nesterov else m
    return theta * (1 - h.lr * h.weight_decay) - h.lr * u, m


def aged(n, dtype, bits, quantize, h):
    "A tensor in mid-training."
    x = new_operands(torch.randn(n, device=DEVICE).to(dtype), None, bits, quantize, moments=0 if h.momentum == 0 else 1)
    for t in range(1, 4): momentum_reference([x._replace(grad=torch.randn(n, device=DEVICE).to(dtype))], h, t)
    return x


def decided(x, g, h):
    "The gradient; another where Lion's two terms cancel so far that the rounding of fp32 would choose the sign."
    if h.rule != "lion": return g
    m = values(x)[1].double()
    return torch.where((h.beta1 * m + (1 - h.beta1) * g.double()).abs() < 1e-5 * m.abs(), m.sign().to(g.dtype), g)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "dtype,bits,quantize", [(torch.float32, None, False), (torch.bfloat16, 8, True), (torch.float16, 16, False)])
def test_reference_against_float64(rule, dtype, bits, quantize, rng_seed):
    h = RULES[rule]
    for t in 1, 4:
        x = aged(1000, dtype, bits, quantize, h)
        g, (theta, m) = torch.randn(1000, device=DEVICE).to(dtype), values(x)
        before = theta.clone(), m if m is None else m.clone()
        momentum_reference([x._replace(grad=g)], h, t)
        new, moment = exact(*before, g, h, t)
        ours, ours_m = values(x)
        limit = 1e-6 if bits is None else 2.0**-15 if bits == 8 else 2.0**-20  # the master's own rounding
        # a sign may tip in fp32
        assert ((ours.double() - new).abs() <= limit * new.abs().clamp(min=1)).float().mean() > 0.999
        if moment is not None:
            assert (ours_m.double() - moment).abs().max() <= (0.01 if quantize else 1e-6) * moment.abs().max()


@kernel
@pytest.mark.parametrize("dithered", [False, True])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype,bits,quantize",
                         [(torch.bfloat16, 8, True), (torch.bfloat16, 16, False), (torch.float16, 8, True),
                          (torch.float32, None, True), (torch.float32, None, False)])
def test_kernel_errs_at_most_twice_as_much(rule, dtype, bits, quantize, dithered, rng_seed):
    h, sizes = RULES[rule]._replace(dithered=dithered), [5000, 4096, 48, 33, 1, 2048]
    xs = [aged(n, dtype, bits, quantize, h) for n in sizes]
    gs = [decided(x, torch.randn(n, device=DEVICE).to(dtype), h) for x, n in zip(xs, sizes)]
    ours, same = [clone(x) for x in xs], [clone(x)._replace(grad=g) for x, g in zip(xs, gs)]
    tensors = TensorList(ours)
    momentum_fused(tensors, tensors.grad_pointers(gs), h, torch.full((), 3.0, device=DEVICE))
    momentum_reference(same, h, 4)
    for x, g, a, b in zip(xs, gs, ours, same):
        for before, mine, torchs, ref in zip(values(x), values(a), values(b), exact(*values(x), g, h, 4)):
            # where terms cancel, in a tensor of one value, their rounding is left
            if ref is not None:
                assert_2x(mine, torchs, ref, floor=1e-6 * max(1.0, float(before.norm() / ref.norm())))


PAIRS = [(FlashSGD, torch.optim.SGD, dict(lr=0.05)),
         (FlashSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, weight_decay=0.1)),
         (FlashSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, dampening=0.5, maximize=True)),
         (FlashSGD, torch.optim.SGD, dict(lr=0.05, momentum=0.9, nesterov=True)),
         (FlashAdam, torch.optim.Adam, dict(lr=1e-2, weight_decay=0.1)),
         (FlashAdamW, torch.optim.AdamW, dict(lr=1e-2, weight_decay=0.1))]


def problem(dtype=torch.float32):
    "A weight, and gradients that pull it about."
    return torch.nn.Parameter(torch.linspace(-1, 1, 77).to(dtype)), [torch.randn(77).to(dtype) for _ in range(30)]


@pytest.mark.parametrize("ours,torchs,kw", PAIRS)
def test_trajectories_of_torch(ours, torchs, kw, rng_seed):
    "fp32 weights and states: torch's own path; its state dict loads half way, and ours goes back."
    p, grads = problem()
    q = torch.nn.Parameter(p.detach().clone())
    a, b = ours([p], quantize=False, master_weight_bits=None, **kw), torchs([q], **kw)
    for t, g in enumerate(grads):
        p.grad, q.grad = g.clone(), g.clone()
        a.step(); b.step()
        if t == 10: a.load_state_dict(b.state_dict())
        if t == 20: b.load_state_dict(copy.deepcopy(a.state_dict()))  # torch does not copy
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls,kw", [(FlashSGD, dict(momentum=0.9)), (FlashSGDW, dict(momentum=0.9, weight_decay=0.1)),
                                    (FlashLion, dict(weight_decay=0.1)), (FlashAdam, {})])
def test_a_saved_run_goes_on_to_the_bit(cls, kw, rng_seed):
    p, grads = problem(torch.bfloat16)
    a = cls([p], lr=1e-3, **kw)
    for g in grads[:10]: p.grad = g; a.step()
    q = torch.nn.Parameter(p.detach().clone())
    b = cls([q], lr=1e-3, **kw)
    b.load_state_dict(a.state_dict())
    for g in grads[10:]:
        p.grad, q.grad = g, g
        a.step(); b.step()
    assert torch.equal(p, q) and all(torch.equal(t, b.state[q][k]) for k, t in a.state[p].items())


def test_decay_is_decoupled_where_the_name_says_so():
    "With momentum, a decay that is part of the gradient outlives its step."
    for cls, second in (FlashSGDW, 0.9025), (FlashSGD, 0.9025 - 0.045):
        p = torch.nn.Parameter(torch.ones(32)); p.grad = torch.zeros(32)
        opt = cls([p], lr=0.1, weight_decay=0.5, momentum=0.9, quantize=False)
        opt.step(); opt.step()
        torch.testing.assert_close(p.detach(), torch.full((32,), second))
    with pytest.raises(OptionError, match="with a W"): FlashSGD([p], decouple_lr=True)


def test_mixed_dtypes_count_their_own_steps():
    "Parameters of one group that go to different launches: each counts every step once."
    ps = [torch.nn.Parameter(torch.ones(40, dtype=d)) for d in (torch.bfloat16, torch.float32, torch.float16)]
    opt = FlashAdamW(ps, lr=1e-2)
    for _ in range(3):
        for p in ps: p.grad = torch.ones_like(p)
        opt.step()
    assert [float(opt.state[p]["step"]) for p in ps] == [3.0] * 3
    for p in ps: torch.testing.assert_close(p.float(), ps[1].detach(), rtol=0, atol=2e-2)


def test_replaced_states_and_weights_are_noticed():
    "What is remembered from step to step gives way to what somebody put in its place."
    p = torch.nn.Parameter(torch.zeros(64).bfloat16())
    opt = FlashLion([p], lr=0.125, betas=(0.0, 0.5))
    p.grad = torch.ones_like(p)
    opt.step()
    old = {k: t.clone() for k, t in opt.state[p].items()}
    for k, t in old.items(): opt.state[p][k] = t
    opt.step()
    assert opt.state[p]["exp_avg::quantized"] is old["exp_avg::quantized"]
    assert 0.75 <= old["exp_avg::scales"][0] <= 0.75 * (1 + 2.0**-9)  # a dithered code's scale is rounded up
    p.data = torch.full((64,), 2.0).bfloat16()
    opt.step()
    assert torch.equal(p.detach().float(), torch.full((64,), 1.875))


def test_a_nan_is_seen(rng_seed):
    "torch's sign of NaN is 0: a Lion that took it would hold the weight still and never tell."
    p = torch.nn.Parameter(torch.randn(64).bfloat16())
    optimizer = FlashLion([p], lr=0.1)
    p.grad = torch.randn(64).bfloat16()
    p.grad[3] = float("nan")
    optimizer.step()
    assert p[3].isnan() and p.isnan().sum() == 1
