"The chunked head and loss against the two lines they replace."
import os
import subprocess
import sys

import pytest
import torch

from flashoptim_nb.base.compare import assert_2x
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.lm.linear_ce import (IGNORE, chunk_rows_for, linear_cross_entropy, linear_cross_entropy_reference,
                                        softmax_minus_onehot_, softmax_minus_onehot_reference)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def loss_and_gradients(f, x, w, y, scale=1.0, **kw):
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = f(x, w, y, **kw)
    return loss.detach(), *torch.autograd.grad(scale * loss, (x, w))


def problem(device, rng_seed):
    n, d, v = (int(torch.randint(lo, hi, ())) for lo, hi in ((1, 700), (1, 90), (2, 1500)))
    print("N, D, V =", n, d, v)
    return 2 * torch.randn(n, d, device=device), torch.randn(v, d, device=device), torch.randint(v, (n,), device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [None, 1, 100, 10_000])
def test_float64_agrees_to_the_last_digits(device, rows, rng_seed):
    x, w, y = problem(device, rng_seed)
    for ours, ref in zip(
            *(loss_and_gradients(f, x.double(), w.double(), y, 3.7, **kw)
              for f, kw in ((linear_cross_entropy, dict(chunk_rows=rows)), (linear_cross_entropy_reference, {})))):
        torch.testing.assert_close(ours, ref, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_no_more_than_twice_the_error_of_the_reference(device, dtype, autocast, rng_seed):
    x, w, y = problem(device, rng_seed)
    x, w = x.to(dtype), w.to(dtype)
    exact = loss_and_gradients(linear_cross_entropy_reference, x.double(), w.double(), y)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        same = loss_and_gradients(linear_cross_entropy_reference, x, w, y)
        ours = loss_and_gradients(linear_cross_entropy, x, w, y, chunk_rows=128)
    narrow = torch.bfloat16 if autocast else dtype
    for name, o, s, e in zip(("loss", "dx", "dw"), ours, same, exact):
        assert o.dtype == (torch.float32 if name == "loss" else dtype)
        assert_2x(
            o, s, e, floor=1e-6 if narrow == torch.float32 else 1e-3 if name == "loss" else torch.finfo(narrow).eps)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_loss_scale_keeps_gradients_in_the_range_of_fp16(device, autocast):
    "A row's share of a mean over many rows is too small for fp16 until it is scaled."
    torch.manual_seed(0)
    n, d, v = 4096, 32, 500
    x, w, y = (torch.randn(n, d, device=device), 0.02 * torch.randn(v, d, device=device),
               torch.randint(v, (n,), device=device))
    exact = loss_and_gradients(linear_cross_entropy_reference, x.double(), w.double(), y)
    dtype, scale = torch.float32 if autocast else torch.float16, 2.0**16
    with torch.autocast(device, torch.float16, enabled=autocast):
        found = loss_and_gradients(linear_cross_entropy, x.to(dtype), w.to(dtype), y, scale)
    for g, e in zip(found[1:], exact[1:]):
        assert g.dtype == dtype and (g.double() / scale - e).norm() < 1e-3 * e.norm()


@pytest.mark.parametrize("device", DEVICES)
def test_the_share_of_a_row_is_not_rounded(device):
    "In bf16 a thousandth is 0.14 % too large, and every gradient would be."
    torch.manual_seed(0)
    x, w = (torch.randn(n, 64, device=device, dtype=torch.bfloat16) for n in (1000, 300))
    y = torch.randint(300, (1000,), device=device)
    for ours, whole in zip(*(loss_and_gradients(linear_cross_entropy, x, w, y, scale)[1:] for scale in (1.0, 1000 / 1024))):
        ours, whole = ours.double(), whole.double()  # the latter by 2 ** -10, which bf16 has
        assert float((ours * whole).sum() / whole.square().sum()) == pytest.approx(1024 / 1000, rel=2e-4)


def some_ignored(y, share):
    return torch.where(torch.rand(len(y), device=y.device) < share, IGNORE, y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("share", [0.3, 0.95, 1.0])
def test_ignored_targets_count_nowhere(device, share, rng_seed):
    "Loss and gradients are those of the other rows alone; without any, NaN and zeros, as torch has it."
    x, w, y = problem(device, rng_seed)
    x, w, y = x.double(), w.double(), some_ignored(y, share)
    torchs = lambda x, w, y: torch.nn.functional.cross_entropy(x @ w.T, y)
    exact = loss_and_gradients(torchs, x, w, y, 3.7)
    for f, kw in ((linear_cross_entropy, dict(chunk_rows=100)), (linear_cross_entropy, {}),
                  (linear_cross_entropy_reference, {})):
        for ours, theirs in zip(loss_and_gradients(f, x, w, y, 3.7, **kw), exact):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13, equal_nan=True)
    kept = y != IGNORE
    for ours, alone in zip(loss_and_gradients(linear_cross_entropy, x, w, y),
                           loss_and_gradients(linear_cross_entropy, x[kept], w, y[kept])):
        torch.testing.assert_close(ours[kept] if ours.shape == x.shape else ours, alone, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype, autocast", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)])
def test_ignored_targets_in_every_precision(device, dtype, autocast, rng_seed):
    x, w, y = problem(device, rng_seed)
    x, w, y = x.to(dtype), w.to(dtype), some_ignored(y, 0.5)
    y[0] = 0  # one is left
    exact = loss_and_gradients(linear_cross_entropy_reference, x.double(), w.double(), y)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        same = loss_and_gradients(linear_cross_entropy_reference, x, w, y)
        ours = loss_and_gradients(linear_cross_entropy, x, w, y, chunk_rows=128)
    narrow = torch.bfloat16 if autocast else dtype
    for name, o, s, e in zip(("loss", "dx", "dw"), ours, same, exact):
        assert_2x(
            o, s, e, floor=1e-6 if narrow == torch.float32 else 1e-3 if name == "loss" else torch.finfo(narrow).eps)
    assert not ours[1][y == IGNORE].any()


@pytest.mark.parametrize("f", [linear_cross_entropy, linear_cross_entropy_reference])
def test_other_targets_are_refused(f, rng_seed):
    x, w, y = torch.randn(9, 4), torch.randn(7, 4), torch.randint(7, (9,))
    for wrong in (7, -1, -99, -101, 2**40, -(2**62)):
        bad = y.clone()
        bad[int(torch.randint(9, ()))] = wrong
        with pytest.raises(UserError, match=f"targets have to be 0 to 6, .* given were {wrong}"): f(x, w, bad)
    for bad, words in ((y.float(), "float32"), (y.bool(), "bool"), (y[:-1], "shapes"), (y[:, None], "shapes"),
                       (y.to("meta"), "one device")):
        with pytest.raises(UserError, match=words): f(x, w, bad)
    with pytest.raises(UserError, match="shapes"): f(x, torch.randn(7, 5), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("f", [linear_cross_entropy, linear_cross_entropy_reference])
def test_targets_of_any_integer_type_and_layout(f, device, rng_seed):
    x, w, y = (torch.randn(40, 8, device=device), torch.randn(100, 8, device=device),
               torch.randint(100, (40,), device=device))
    exact = loss_and_gradients(f, x, w, y)
    strided = (
        torch.full((40, 3), 10**6, device=device).index_copy_(1, torch.tensor([1], device=device), y[:, None])[:, 1])
    for same in (y.to(torch.uint8), y.to(torch.int8), y.to(torch.int16), y.int(), strided, strided.int()):
        for a, b in zip(loss_and_gradients(f, x, w, same), exact): assert torch.equal(a, b)
    wide = torch.randn(40, 20, device=device)
    wide[:, 3:19:2] = x
    for a, b in zip(loss_and_gradients(f, wide[:, 3:19:2], w.T.contiguous().T, y), exact):
        torch.testing.assert_close(a, b)
    one = torch.full((40,), 17, device=device)
    for a, b in zip(loss_and_gradients(f, x, w, one[:1].expand(40)), loss_and_gradients(f, x, w, one)):
        assert torch.equal(a, b)
    loss, dx, dw = loss_and_gradients(f, x[:0], w, y[:0])
    assert loss.isnan() and dx.shape == (0, 8) and not dw.any()


REFUSED_ON_THE_DEVICE = """
import sys, torch
from flashoptim_nb.lm.linear_ce import linear_cross_entropy, linear_cross_entropy_reference
x, w, y = torch.randn(300, 8, device="cuda"), torch.randn(50, 8, device="cuda"), torch.randint(50, (300,), device="cuda")
y[7] = int(sys.argv[1])
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")  # nothing waits
try:
    {"fused": linear_cross_entropy, "plain": linear_cross_entropy_reference}[sys.argv[2]](x, w, y)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
except RuntimeError as error:  # the first call after the device has come to it, whichever that is
    if "called a synchronizing" in str(error): raise
    sys.exit(0)
sys.exit("accepted")
"""


@pytest.mark.cuda
@pytest.mark.parametrize("how", ["fused", "plain"])
@pytest.mark.parametrize("wrong", [50, -1])
def test_other_targets_are_refused_on_the_device(how, wrong):
    "In a process of its own, which such an assertion ends."
    done = subprocess.run(
        [sys.executable, "-c", REFUSED_ON_THE_DEVICE, str(wrong), how], capture_output=True, text=True)
    assert done.returncode == 0 and "Assertion `targets have to be" in done.stderr, done.stderr


def test_gradients_pass_on_what_is_needed_only(rng_seed):
    x, w, y = torch.randn(9, 4, requires_grad=True), torch.randn(7, 4), torch.randint(7, (9,))
    linear_cross_entropy(x, w, y).backward()
    assert x.grad is not None and w.grad is None
    with torch.no_grad(): assert not linear_cross_entropy(x, w, y).requires_grad


def test_a_weight_used_twice_gets_both_gradients(rng_seed):
    "A tied head: the embedding's gradient and the head's are added."
    w, ids, y = torch.randn(11, 5, dtype=torch.float64), torch.randint(11, (6,)), torch.randint(11, (6,))
    grads = []
    for f in (linear_cross_entropy, linear_cross_entropy_reference):
        leaf = w.clone().requires_grad_()
        f(leaf[ids].tanh(), leaf, y).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(*grads)


def test_a_number_that_is_none_stays_one(rng_seed):
    x, w, y = torch.randn(5, 4), torch.randn(7, 4), torch.randint(7, (5,))
    x[2, 1] = float("nan")
    loss, dx, dw = loss_and_gradients(linear_cross_entropy, x, w, y)
    assert loss.isnan() and dx[2].isnan().all() and dw.isnan().any()


@pytest.mark.parametrize(
    "n, v, gpu", [(1, 10, False), (1000, 2048, False), (16_384, 50_304, True), (131_072, 128_000, True)])
def test_chunks_cover_the_rows_evenly(n, v, gpu):
    rows = chunk_rows_for(n, v, gpu)
    chunks = -(-n // rows)
    assert rows % 128 == 0 and rows * v <= max(128 * v, 1.1 * (2**28 if gpu else 2**19)) and (chunks - 1) * rows < n


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [1, 37, 4096, 50_257])
def test_the_kernel(dtype, v, rng_seed):
    z = (5 * torch.randn(33, v, device="cuda")).to(dtype)
    y = torch.randint(v, (66,), device="cuda")[::2]  # strided
    y[::5] = IGNORE
    ours, same, exact = z.clone(), z.clone(), z.double()
    nll, nll_same, nll_exact = (f(t, y)
                                for f, t in ((softmax_minus_onehot_, ours), (softmax_minus_onehot_reference, same),
                                             (softmax_minus_onehot_reference, exact)))
    assert_2x(ours, same, exact, floor=1e-6)
    assert_2x(nll, nll_same, nll_exact, floor=1e-6)


INTERPRETED = """
import torch
from flashoptim_nb.lm import linear_ce as m
z, y = 4 * torch.randn(3, 300), torch.randint(300, (3,))
z[1, 250:] = -1e9
def both(z, y):
    ours, ref, nll = z.clone(), z.clone(), torch.empty(len(z))
    m._softmax_minus_onehot_kernel[(len(z),)](ours, y, nll, 300, V=300, BLOCK=128, num_warps=16)
    torch.testing.assert_close(nll, m.softmax_minus_onehot_reference(ref, y), equal_nan=True)
    torch.testing.assert_close(ours, ref, equal_nan=True)
    return nll, ours
both(z, y)
y[0], y[2] = -100, 2**40  # ignored; in nobody's memory
nll, grad = both(z, y)
assert nll[0] == 0 and not grad[0].any() and nll[1].isfinite() and nll[2].isnan() and grad[2].isnan().all()
"""


def test_the_kernel_interpreted():
    "The same kernel on the CPU, by Triton's interpreter, in fp32 where that is faithful."
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
