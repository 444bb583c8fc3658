"""The sum over triplets: kernels against the reference by the factor of two, gradients against finite differences, and graphs that are nearly none.

The kernel's tests run on CUDA where there is one, and else in Triton's interpreter, in a process of their own."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton

from flashoptim_nb.base.compare import assert_2x
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.surrogates.domains.molecules.geometry import Geometry
from flashoptim_nb.surrogates.domains.molecules.bases import spherical_radial, spherical_radial_reference
from flashoptim_nb.surrogates.domains.molecules.gathered import gated_sum, gated_sum_reference
from flashoptim_nb.surrogates.domains.molecules.triplets import (
    Edges, meeting, triplet_errors, triplet_sum, triplet_sum_reference)
from processes import pass_in_the_interpreter

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernel = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA, or TRITON_INTERPRET=1: see test_kernel_in_the_interpreter")


def cloud(n, share=0.6, symmetric=False, device="cpu", fill=0):
    "A random directed graph of n atoms; `fill` edges at the end stand in no atom's list."
    pos, near = torch.randn(n, 3), (torch.rand(n, n) < share) & ~torch.eye(n, dtype=torch.bool)
    if symmetric: near = near & near.T
    target, source = near.nonzero(as_tuple=True)
    unit = F.normalize(pos[target] - pos[source], dim=-1)
    rows = lambda end: F.pad(torch.bincount(end, minlength=n).cumsum(0), (1, 0)).int()
    order = torch.argsort(source, stable=True).int()
    g = Edges(F.pad(source, (0, fill), value=n - 1), F.pad(target, (0, fill), value=n - 1),
              F.pad(unit, (0, 0, 0, fill), value=3**-0.5), rows(target), rows(source), F.pad(order, (0, fill)))
    return Edges(*(t.to(device) for t in g))


@kernel
@pytest.mark.parametrize(
    "n,share,symmetric,fill,tile", [(7, 0.7, False, 0, 16), (6, 1.0, True, 5, 16), (20, 0.9, False, 3, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_errs_at_most_twice_as_much(n, share, symmetric, fill, tile, dtype, rng_seed):
    C, B, L = (64, 8, 7) if n == 7 else (24, 5, 3)
    g = cloud(n, share, symmetric, DEVICE, fill)
    for name, (ours, same, exact) in triplet_errors(g, dtype, C, B, L, tile).items():
        assert ours.dtype == dtype
        assert_2x(ours, same, exact, floor=1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)
        if fill and name != "dw2": assert not ours[-fill:].any()


@kernel
@pytest.mark.parametrize("n", [1, 2, 3])
def test_kernel_of_few_atoms(n, rng_seed):
    g = cloud(n, 1.0, device=DEVICE)
    E = len(g.source)
    x, q, w2 = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((E, 16), (E, 14), (16, 2)))
    out = triplet_sum(x, q, w2, g)
    grads = torch.autograd.grad(out.sum() + 0 * x.sum(), (x, q, w2))
    if n < 3: assert not out.any() and not any(t.any() for t in grads)  # two atoms have edges, and no triplets
    else: torch.testing.assert_close(out, triplet_sum_reference(x, q, w2, g.unit, *meeting(g)))


@kernel
def test_kernel_repeats_to_the_bit(rng_seed):
    g = cloud(8, device=DEVICE)
    E = len(g.source)
    x, q, w2 = (torch.randn(*s, device=DEVICE, requires_grad=True) for s in ((E, 16), (E, 14), (16, 2)))
    runs = [torch.autograd.grad(triplet_sum(x, q, w2, g).square().sum(), (x, q, w2)) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("H", [24, 128, 200])
def test_kernel_of_gated_sums(dtype, H, rng_seed):
    g = cloud(5, device=DEVICE)
    E, N = len(g.source), len(g.incoming) - 1
    x, e, w = (torch.randn(*s, device=DEVICE).to(dtype) for s in ((E, H), (E, 6), (H, 6)))
    def run(f, *given):
        leaves = [t.detach().requires_grad_() for t in given]
        out = f(*leaves)
        return out.detach(), *torch.autograd.grad(out.float().cos().sum(), leaves)
    plain = lambda *a: gated_sum_reference(*a, g.target, N)
    for ours, same, exact in zip(run(lambda *a: gated_sum(*a, g.target, g.incoming), x, e, w), run(plain, x, e, w),
                                 run(plain, *(t.double() for t in (x, e, w)))):
        assert ours.dtype == dtype
        assert_2x(ours, same, exact, floor=1e-6 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernel_of_the_spherical_basis(dtype, rng_seed):
    dist = torch.cat([0.7 + 4.5 * torch.rand(50), torch.tensor([5.0, 6.0])]).to(DEVICE)
    exact = spherical_radial_reference(dist.double())
    ours = spherical_radial(dist, dtype=dtype, columns=48)
    assert ours.dtype == dtype and not ours[:, 42:].any() and not ours[-2:].any()
    assert_2x(ours[:, :42], spherical_radial_reference(dist).to(dtype), exact)


@kernel
def test_kernel_in_the_network(rng_seed):
    "The fused form, padded, against the plain one, gradients included."
    from flashoptim_nb.surrogates.domains.molecules.dimenet import DimeNetConfig, DimeNetPP
    counts = np.array([5, 1, 3])
    pos = torch.randn(9, 3) * 1.5
    g = Geometry(torch.randint(1, 9, (9,)), pos, counts, device=DEVICE).batch(
        np.arange(3), torch.zeros(3, 1)).with_triplets()
    model = DimeNetPP(DimeNetConfig(hidden=16, blocks=1, int_emb=8, basis_emb=4, out_emb=16)).to(DEVICE)
    for output in model.output_blocks: torch.nn.init.normal_(output.lin.weight)
    found = []
    for interaction, batch in (("triplets", g), ("fused", g.pad(12, 40, 200))):
        model.interaction = interaction
        model.zero_grad()
        out = model(batch)
        out.square().sum().backward()
        found.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for a, b in zip(*found): torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4 * float(a.abs().max()) + 1e-6)


def spoiled(g):
    "Edges and lists of which one number is wrong, each with what is wrong."
    E, N = len(g.source), len(g.incoming) - 1
    def put(name, at, value):
        return g._replace(**{name: getattr(g, name).index_fill(0, torch.tensor([at], device=g.source.device), value)})
    last = int((g.target == g.target[0]).sum())  # the second atom's first incoming edge
    yield from ((put(name, 1, wrong), name) for name in ("source", "target") for wrong in (N, -1, 2**40))
    yield from ((put("out_edge", 1, wrong), "out_edge") for wrong in (E, -1, 2**31 - 1, int(g.out_edge[0])))
    yield from ((put(name, 1, wrong), name) for name in ("incoming", "outgoing") for wrong in (-1, E + 1, 2**31 - 1))
    yield from ((put(name, N, E + 1), name) for name in ("incoming", "outgoing"))
    yield put("target", last, int(g.target[0])), "an edge in another atom's list"
    yield g._replace(source=g.source.flip(0)), "sources that the lists do not know"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernel_is_never_given_lists_that_point_elsewhere(dtype, rng_seed):
    "Under the interpreter too, where a kernel would read whatever lies there."
    g = cloud(9, 0.8)
    E = len(g.source)
    x, q, w2 = (torch.randn(*s, dtype=dtype) for s in ((E, 16), (E, 14), (16, 2)))
    e, w = torch.randn(E, 3, dtype=dtype), torch.randn(16, 3, dtype=dtype)
    triplet_sum(x, q, w2, g), gated_sum(x, e, w, g.target, g.incoming)
    for wrong, what in spoiled(g):
        with pytest.raises(UserError): print(what), triplet_sum(x, q, w2, wrong)
        if what in ("target", "incoming"):
            with pytest.raises(UserError): gated_sum(x, e, w, wrong.target, wrong.incoming)
    for wrong in (g._replace(source=g.source[1:]), g._replace(outgoing=g.outgoing[1:]), g._replace(unit=g.unit[:, :2]),
                  g._replace(target=g.target.double()), g._replace(source=g.source.to("meta"))):
        with pytest.raises(UserError): triplet_sum(x, q, w2, wrong)
    with pytest.raises(UserError): triplet_sum(x[1:], q[1:], w2, g)
    for args in ((x[1:], e, w, g.target, g.incoming), (x, e[1:], w, g.target, g.incoming),
                 (x, e, w[1:], g.target, g.incoming), (x, e, w, g.target[:, None], g.incoming)):
        with pytest.raises(UserError): gated_sum(*args)


@kernel
def test_kernel_takes_lists_however_they_lie(rng_seed):
    g = cloud(8, device=DEVICE)
    E = len(g.source)
    x, q, w2, e, w = (torch.randn(*s, device=DEVICE) for s in ((E, 16), (E, 14), (16, 2), (E, 3), (16, 3)))
    apart = Edges(*(torch.stack([t, t + 7], -1)[..., 0] for t in g))  # strides of two
    wide = apart._replace(**{name: getattr(apart, name).long() for name in ("incoming", "outgoing", "out_edge")})
    for same in (apart, wide):
        assert torch.equal(triplet_sum(x, q, w2, same), triplet_sum(x, q, w2, g))
        assert torch.equal(gated_sum(x, e, w, same.target, same.incoming), gated_sum(x, e, w, g.target, g.incoming))


REFUSED_ON_THE_DEVICE = """
import sys, torch
sys.path[:0] = [sys.argv[3], sys.argv[3] + "/.."]
from test_triplets import cloud, gated_sum, spoiled, triplet_sum
g, what = [(w.__class__(*(t.cuda() for t in w)), what) for w, what in spoiled(cloud(9, 0.8))][int(sys.argv[1])]
E = len(g.source)
x, q, w2, e, w = (torch.randn(*s, device="cuda") for s in ((E, 16), (E, 14), (16, 2), (E, 3), (16, 3)))
torch.cuda.synchronize()
torch.cuda.set_sync_debug_mode("error")  # nothing waits
try:
    triplet_sum(x, q, w2, g) if sys.argv[2] == "triplets" else gated_sum(x, e, w, g.target, g.incoming)
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
except RuntimeError as error:  # the first call after the device has come to it, whichever that is
    if "called a synchronizing" in str(error): raise
    sys.exit(0)
sys.exit(f"accepted: {what}")
"""


@pytest.mark.cuda
@pytest.mark.parametrize("number, sums", [(0, "triplets"), (1, "triplets"), (6, "triplets"), (9, "triplets"),
                                          (11, "triplets"), (18, "triplets"), (3, "gated"), (11, "gated")])
def test_lists_that_point_elsewhere_are_refused_on_the_device(number, sums):
    "In a process of its own, which such an assertion ends."
    done = subprocess.run([sys.executable, "-c", REFUSED_ON_THE_DEVICE, str(number), sums, str(Path(__file__).parent)],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "Assertion `" in done.stderr, done.stderr


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="the tests above run the kernel here")
def test_kernel_in_the_interpreter():
    "The tests above that are marked `kernel`, where there is no GPU."
    pass_in_the_interpreter(Path(__file__).parent, {"test_triplets.py": "kernel"})


def test_reference_has_the_gradients_of_finite_differences(rng_seed):
    g = cloud(5)
    E = len(g.source)
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((E, 3), (E, 6), (3, 2))]
    assert torch.autograd.gradcheck(lambda *a: triplet_sum(*a, g), leaves)


@pytest.mark.cuda
def test_in_a_cuda_graph(rng_seed):
    g = cloud(40, device="cuda")
    E = len(g.source)
    x, q, w2 = (torch.randn(*s, device="cuda", requires_grad=True) for s in ((E, 64), (E, 56), (64, 8)))
    def run(): return torch.autograd.grad(triplet_sum(x, q, w2, g).square().sum(), (x, q, w2))
    eager = run()
    graph = torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph): captured = run()
    graph.replay()
    assert all(map(torch.equal, eager, captured))
