"Each attention kernel against the written-out softmax, in values, gradients and inside a compiled graph."
import pytest
import torch

from flashoptim_nb.base.compare import assert_2x
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.base.machine import capabilities
from flashoptim_nb.lm.attention import ATTENTION, attend, attention_backends, resolve_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
SHAPES = [(1, 1, 1, 8), (2, 3, 17, 16), (1, 2, 130, 64), (2, 2, 257, 40)]  # B H T D, ragged ends included


def outputs(name, q, k, v, g, dtype):
    q, k, v = (z.to(dtype).requires_grad_() for z in (q, k, v))
    o = attend(q, k, v, name)
    return o, *torch.autograd.grad(o, (q, k, v), g.to(dtype))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_no_kernel_errs_more_than_twice_the_formula(device, dtype, shape, rng_seed):
    q, k, v, g = torch.randn(4, *shape, device=device).to(dtype).double()
    exact, same = (outputs("eager", q, k, v, g, d) for d in (torch.float64, dtype))
    tried = [n for n, c in attention_backends(device, dtype, shape[-1]).items() if c.ok and n != "eager"]
    assert "math" in tried
    if shape[2] == 1 and "cudnn" in tried: tried.remove("cudnn")  # has no kernel for a single position
    # what is rounded on the way to a gradient that is 0
    single = max(4.0, (g.norm() * v.norm() * max(q.norm(), k.norm())).item())
    for name in tried:
        for what, ours, s, e in zip(("O", "dQ", "dK", "dV"), outputs(name, q, k, v, g, dtype), same, exact):
            # one position: the formula is exact there, and rounding to the dtype is all that can happen
            print(name, what)
            assert_2x(ours, s, e, floor=torch.finfo(dtype).eps * (single if shape[2] == 1 else 1 / 4))


@pytest.mark.parametrize("name", ["eager", "math", "flash"])
def test_nothing_is_seen_ahead_of_time(name, rng_seed):
    q, k, v = torch.randn(3, 2, 2, 33, 16)
    cut = int(torch.randint(1, 33, ()))
    before = attend(q, k, v, name)[:, :, :cut]
    k[:, :, cut:], v[:, :, cut:] = torch.randn(2, *k[:, :, cut:].shape) * 100
    torch.testing.assert_close(attend(q, k, v, name)[:, :, :cut], before)


@pytest.mark.parametrize("name", ["eager", "flash"])
def test_autocast_reaches_it(name, rng_seed):
    q, k, v = torch.randn(3, 1, 2, 24, 16)
    with torch.autocast("cpu", torch.bfloat16): out = attend(q, k, v, name)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), attend(q, k, v, "eager"), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("name", ["eager", "math", "flash"])
def test_it_compiles_as_one_graph(name, rng_seed):
    if not (able := capabilities()["compile"]).ok: pytest.skip(able.why)
    q, k, v = torch.randn(3, 1, 2, 40, 16)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v: attend(q, k, v, name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v), attend(q, k, v, name))


@pytest.mark.cuda
def test_a_compiled_graph_keeps_the_kernel_that_was_named(rng_seed):
    "What runs on the GPU, by the profiler: the named kernel, inside a compiled function too."
    q, k, v = torch.randn(3, 2, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    marks = {"flash": "flash", "cudnn": "cudnn"}
    for name, mark in marks.items():
        if not attention_backends("cuda", torch.bfloat16, 64)[name].ok: continue
        torch._dynamo.reset()
        compiled = torch.compile(lambda q, k, v, name=name: attend(q, k, v, name), fullgraph=True)
        compiled(q, k, v)
        with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]) as seen:
            compiled(q, k, v)
            torch.cuda.synchronize()
        ran = [event.key.lower() for event in seen.key_averages()]
        assert any(f"scaled_dot_product_{mark}" in key for key in ran), ran


@pytest.mark.cuda
def test_best_is_one_of_the_two():
    assert resolve_attention("best", "cuda", torch.bfloat16, 128) in ("flash", "cudnn")
    with pytest.raises(UserError, match="this machine can do"): resolve_attention("best", "cuda", torch.float64, 128)


def test_unavailable_and_unknown_are_told_apart():
    with pytest.raises(UserError, match="this machine can do: eager, math, flash"):
        resolve_attention("cudnn", "cpu", torch.float32, 32)
    with pytest.raises(UserError, match="choose one of: eager, math, flash, cudnn, flash_attn, best"):
        resolve_attention("fast", "cpu", torch.float32, 32)
    assert set(attention_backends("cpu", torch.float32, 32)) == set(ATTENTION)
    assert resolve_attention("best", "cpu", torch.bfloat16, 64) == "flash"
