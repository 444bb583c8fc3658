"The chunked head and loss against the two lines they replace."
import os
import subprocess
import sys

import pytest
import torch

from flashoptim_nb.base.compare import assert_2x
from flashoptim_nb.kernels.linear_ce import (chunk_rows_for, linear_cross_entropy, linear_cross_entropy_reference, softmax_minus_onehot_,
                                             softmax_minus_onehot_reference)

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
    for ours, ref in zip(*(loss_and_gradients(f, x.double(), w.double(), y, 3.7, **kw)
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
        assert_2x(o, s, e, floor=1e-6 if narrow == torch.float32 else 1e-3 if name == "loss" else torch.finfo(narrow).eps)


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


@pytest.mark.parametrize("n, v, gpu", [(1, 10, False), (1000, 2048, False), (16_384, 50_304, True), (131_072, 128_000, True)])
def test_chunks_cover_the_rows_evenly(n, v, gpu):
    rows = chunk_rows_for(n, v, gpu)
    chunks = -(-n // rows)
    assert rows % 128 == 0 and rows * v <= max(128 * v, 1.1 * (2**28 if gpu else 2**19)) and (chunks - 1) * rows < n


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("v", [1, 37, 4096, 50_257])
def test_the_kernel(dtype, v, rng_seed):
    z = (5 * torch.randn(33, v, device="cuda")).to(dtype)
    y = torch.randint(v, (33,), device="cuda")
    ours, same, exact = z.clone(), z.clone(), z.double()
    nll, nll_same, nll_exact = (f(t, y) for f, t in ((softmax_minus_onehot_, ours), (softmax_minus_onehot_reference, same), (softmax_minus_onehot_reference, exact)))
    assert_2x(ours, same, exact, floor=1e-6)
    assert_2x(nll, nll_same, nll_exact, floor=1e-6)


INTERPRETED = """
import torch
from flashoptim_nb.kernels import linear_ce as m
z, y = 4 * torch.randn(3, 300), torch.randint(300, (3,))
z[1, 250:] = -1e9
ours, ref, nll = z.clone(), z.clone(), torch.empty(3)
m._softmax_minus_onehot_kernel[(3,)](ours, y, nll, 300, V=300, BLOCK=128, num_warps=16)
torch.testing.assert_close(nll, m.softmax_minus_onehot_reference(ref, y))
torch.testing.assert_close(ours, ref)
"""


def test_the_kernel_interpreted():
    "The same kernel on the CPU, by Triton's interpreter, in fp32 where that is faithful."
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
