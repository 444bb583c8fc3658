"""The AdamW step: reference against float64 and torch, kernel against reference by the factor of two.

The kernel's tests run on CUDA where there is one, and else in Triton's interpreter, in a process of their own
(TRITON_INTERPRET is read when kernels are defined)."""
import subprocess
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from flashoptim_nb.base.compare import assert_2x
from flashoptim_nb.optim.adamw_kernel import AdamWScalars, adamw_fused, adamw_reference
from flashoptim_nb.optim.codec import dequantize_m, dequantize_v
from flashoptim_nb.optim.multi_tensor import COLUMNS, TYPES, TensorList, Operands, new_operands
from flashoptim_nb.optim.split import decode, round_narrow

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernel = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA, or TRITON_INTERPRET=1: see test_interpreted.py")

B1, B2, LR, WD, EPS = 0.9, 0.95, 1e-2, 0.1, 1e-8


def scalars(eps=EPS, weight_decay=WD, **kw):
    return AdamWScalars(LR, B1, B2, eps, weight_decay, **kw)


def fused(xs, h, t, multiplier=None, skip=None):
    "One step of the kernel as step number t."
    tensors = TensorList(xs)
    adamw_fused(tensors, tensors.grad_pointers([x.grad for x in xs]), h, torch.full((), t - 1.0, device=DEVICE),
                multiplier, skip)


def values(x):
    "What operands stand for: weights and moments, unpacked, in their widest form."
    theta = x.param if x.error_bits is None else decode(x.param, x.error_bits)
    m = x.m if x.m_scale is None else dequantize_m(x.m, x.m_scale)
    v = x.v if x.v_scale is None else dequantize_v(x.v, x.v_scale)
    return theta, m, v


def clone(x):
    return Operands(*(t if t is None else t.clone() for t in x[:-1]), x.place)


def random_operands(n, dtype, bits, quantize, size=1.0):
    "A tensor in mid-training: weights and moments of some age."
    x = new_operands(
        (torch.randn(n, device=DEVICE) * size).to(dtype), torch.empty(n, device=DEVICE, dtype=dtype), bits, quantize)
    for t in range(1, 4):
        adamw_reference([x._replace(grad=(torch.randn(n, device=DEVICE) * size).to(dtype))], scalars(), t)
    return x


def exact(x, g, t):
    "One step in float64, from what the operands stand for."
    theta, m, v = (y.double() for y in values(x))
    m, v = B1 * m + (1 - B1) * g.double(), B2 * v + (1 - B2) * g.double() ** 2
    return theta * (1 - LR * WD) - LR / (1 - B1**t) * m / ((v / (1 - B2**t)).sqrt() + EPS), m, v


@pytest.mark.parametrize("maximize", [False, True])
def test_reference_is_torch_adamw(maximize, rng_seed):
    "fp32 weights and moments: torch.optim.AdamW, over 200 steps."
    torch.manual_seed(rng_seed)
    p = torch.nn.Parameter(torch.randn(1000))
    x = new_operands(p.detach().clone(), p.detach(), None, False)
    opt = torch.optim.AdamW([p], lr=LR, betas=(B1, B2), eps=EPS, weight_decay=WD, maximize=maximize)
    for t in range(1, 201):
        p.grad = torch.randn(1000)
        opt.step(); adamw_reference([x._replace(grad=p.grad)], scalars(maximize=maximize), t)
    torch.testing.assert_close(x.param, p.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.v, opt.state[p]["exp_avg_sq"], rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("dithered", [False, True])
def test_packing_and_chunks_change_nothing(dithered, rng_seed):
    torch.manual_seed(rng_seed)
    h = scalars(dithered=dithered)
    sizes = [32, 1, 0, 64, 33, 4096, 200_000, 96]
    xs = [random_operands(n, torch.bfloat16, 8, True) for n in sizes]
    gs = [torch.randn(n, device=DEVICE).bfloat16() for n in sizes]
    alone = [clone(x) for x in xs]
    adamw_reference([x._replace(grad=g) for x, g in zip(xs, gs)], h, 4)
    for x, g in zip(alone, gs): adamw_reference([x._replace(grad=g)], h, 4)
    for x, y in zip(xs, alone):
        for name in COLUMNS: assert torch.equal(getattr(x, name), getattr(y, name)), name


@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("dtype,bits", [(torch.bfloat16, 8), (torch.float16, 8), (torch.float32, None)])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_never_nan_from_finite_gradients(dtype, bits, quantize, eps, rng_seed):
    "Gradients of 1e-30 to 1e30, one huge among tiny, zeros, subnormals; a thousand steps of silence after."
    torch.manual_seed(rng_seed)
    top = torch.finfo(dtype).max
    x = new_operands(torch.randn(4096).to(dtype), torch.empty(4096, dtype=dtype), bits, quantize)
    for t in range(1, 40):
        g = (torch.randn(4096) * 10.0 ** torch.randint(-38, 31, (4096,))).clamp(-top, top)
        if t % 3 == 0: g[::32] = min(top, 1e30)
        if t > 20: g.zero_()
        adamw_reference([x._replace(grad=g.to(dtype))], scalars(eps), t)
        assert all(y.isfinite().all() for y in values(x)[:2]), t
    assert not values(x)[2].isnan().any()


def test_vanished_second_moment_takes_no_giant_step(rng_seed):
    "A value whose root rounds to nothing beside its group's: its step stays of Adam's size."
    torch.manual_seed(rng_seed)
    g = torch.full((32,), 1e-6); g[0] = 1.0
    x = new_operands(torch.zeros(32).bfloat16(), g.bfloat16())
    for t in range(1, 50):
        before = decode(x.param, x.error_bits)
        adamw_reference([x._replace(grad=g.bfloat16())], scalars(), t)
        assert (decode(x.param, x.error_bits) - before).abs().max() <= 1.2 * LR


KINDS = [
    (torch.bfloat16, 8, True), (torch.bfloat16, 16, True), (torch.bfloat16, None, True), (torch.bfloat16, 8, False),
    (torch.float16, 8, True), (torch.float16, 16, False), (torch.float32, None, True), (torch.float32, None, False)]


@kernel
@pytest.mark.parametrize("dtype,bits,quantize", KINDS)
@pytest.mark.parametrize("places", [None, (0, 32, 48, 4096, 0, 2**33), (0, 7, 33, 16, 0, 2**33 + 1)])
def test_kernel_errs_at_most_twice_as_much(dtype, bits, quantize, places, rng_seed):
    "Rounded to the nearest, and with the dithers of whole parameters and of shards that begin anywhere."
    torch.manual_seed(rng_seed)
    sizes, h = [5000, 4096, 33, 1, 0, 2048], scalars(dithered=places is not None)
    xs = [random_operands(n, dtype, bits, quantize)._replace(place=place) for n, place in zip(sizes, places or 6 * [0])]
    gs = [torch.randn(n, device=DEVICE).to(dtype) for n in sizes]
    ours, same = ([clone(x)._replace(grad=g) for x, g in zip(xs, gs)],
                  [clone(x)._replace(grad=g) for x, g in zip(xs, gs)])
    fused([x for x in ours if x.param.numel()], h, 4)
    adamw_reference(same, h, 4)
    for x, g, a, b in zip(xs, gs, ours, same):
        for before, mine, torchs, ref in zip(values(x), values(a), values(b), exact(x, g, 4)):
            # where terms cancel, in a tensor of one value, their rounding is left
            assert_2x(mine, torchs, ref, floor=1e-6 * max(1.0, float(before.norm() / ref.norm())))
        if quantize:  # at most one code apart, and seldom
            for p, q in ((a.m, b.m), (a.v, b.v)):
                off = (p.int() - q.int()).abs()
                assert off.numel() == 0 or (off.max() <= 1 and (off > 0).float().mean() <= 0.01 + 1 / off.numel())


@kernel
def test_kernel_multiplier_skip_and_maximize(rng_seed):
    torch.manual_seed(rng_seed)
    x = random_operands(3000, torch.bfloat16, 8, True)
    g, half = torch.randn(3000, device=DEVICE).bfloat16(), torch.tensor(0.5, device=DEVICE)
    for how in dict(maximize=True), dict(l2=0.3, weight_decay=0.0):
        a, b = clone(x), clone(x)
        fused([a._replace(grad=g)], scalars(**how), 4, half, torch.zeros((), device=DEVICE))
        adamw_reference([b._replace(grad=g)], scalars(**how), 4, half)
        torch.testing.assert_close(values(a)[0], values(b)[0], rtol=1e-4, atol=1e-5)
    still, step = clone(x), torch.full((), 3.0, device=DEVICE)
    tensors = TensorList([still])
    adamw_fused(tensors, tensors.grad_pointers([g]), scalars(), step, half, torch.ones((), device=DEVICE))
    assert step == 3  # a skipped step does not count
    for name in COLUMNS: assert torch.equal(getattr(still, name), getattr(x, name)), name


@kernel
def test_kernel_unaligned_views(rng_seed):
    "Views at odd offsets of one buffer, as gradient buckets make them."
    torch.manual_seed(rng_seed)
    x = random_operands(2100, torch.bfloat16, 8, True)
    buffer = torch.randn(2103, device=DEVICE).bfloat16()
    a, b = clone(x)._replace(grad=buffer[3:]), clone(x)._replace(grad=buffer[3:].clone())
    for y in a, b: fused([y], scalars(), 4)
    for name in COLUMNS: assert torch.equal(getattr(a, name), getattr(b, name)), name


@kernel
def test_kernel_extremes(rng_seed):
    torch.manual_seed(rng_seed)
    x = new_operands(torch.randn(4096, device=DEVICE).bfloat16(), torch.empty(0))
    for t in range(1, 12):
        g = torch.randn(4096, device=DEVICE) * 10.0 ** torch.randint(-38, 31, (4096,), device=DEVICE)
        if t > 8: g.zero_()
        fused([x._replace(grad=g.bfloat16())], scalars(eps=0.0 if t % 2 else EPS), t)
        assert all(y.isfinite().all() for y in values(x)), t


@triton.jit
def _round_both(x, a, b, DTYPE: tl.constexpr):
    at = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    value = tl.load(x + at)
    tl.store(a + at, round_narrow(value, DTYPE, False))
    tl.store(b + at, round_narrow(value, DTYPE, True))


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled under the interpreter")
@pytest.mark.parametrize("param,bits,quantize", [("bf16", 8, True), ("fp16", 16, True), ("fp32", 0, False)])
@pytest.mark.parametrize("dithered", [False, True])
def test_compiles_for_hopper_without_spills(param, bits, quantize, dithered, tmp_path):
    "Triton brings its own assembler: no GPU is needed to see what one would run."
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from flashoptim_nb.optim.adamw_kernel import adamw_kernel
    from flashoptim_nb.optim.multi_tensor import BLOCK, WARPS

    dtype = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[param]
    flags = dict(PARAM=dtype, GRAD=dtype, BITS=bits, QUANTIZED=quantize, COMPANDED=True, L2=False, MAXIMIZE=False,
                 FLOOR=False, DITHERED=dithered, SHIFTED=False, ALIGNED=True, MASK=0, BLOCK=BLOCK)
    types = (dict(rows="*i64", grads="*i64", blocks="*i32", step_scalars="*fp32")
             | dict.fromkeys(("weight1", "beta1", "weight2", "beta2", "eps", "l2"), "fp32"))
    signature = types | dict.fromkeys(flags, "constexpr")
    source = ASTSource(fn=adamw_kernel, signature=signature,
                       constexprs={(list(signature).index(k),): v for k, v in flags.items()}, attrs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=WARPS))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists(): pytest.skip("this build of Triton has no cuobjdump")
    (tmp_path / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([tool, "-res-usage", tmp_path / "kernel.cubin"], capture_output=True, text=True).stdout
    assert "STACK:0" in usage and "LOCAL:0" in usage, usage


@pytest.mark.cuda
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_both_ways_of_rounding_agree_on_the_gpu(narrow, rng_seed):
    "Hardware rounding (used on the GPU) and rounding on the bits (used in the interpreter)."
    x = torch.randint(-(2**31), 2**31, (1 << 20,), device="cuda", dtype=torch.int64).int().view(torch.float32)
    a, b = torch.empty_like(x, dtype=narrow), torch.empty_like(x, dtype=narrow)
    _round_both[(1 << 10,)](x, a, b, TYPES[narrow])
    same = (a == b) | (a.isnan() & b.isnan())  # of the two zeros, either will do
    assert same.all()
