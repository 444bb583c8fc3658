"""Dithered rounding: a function of step and place alone, whose errors cancel over steps, and optimizers that follow."""
import copy
import warnings

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from flashoptim_nb.optim import FlashAdamW, FlashLion, FlashSGD, OptionError
from flashoptim_nb.optim.adamw_kernel import AdamWScalars, adamw_fused, adamw_reference
from flashoptim_nb.optim.codec import SCALE_MAX, _code_m, _code_root, quantize_m, quantize_v
from flashoptim_nb.optim.multi_tensor import COLUMNS, Operands, TensorList, new_operands
from flashoptim_nb.optim.rounding import Place, dither_tile, dithers, run_turn, step_turn
from flashoptim_nb.optim.split import decode, encode
from every import MAKERS

settings.register_profile("rounding", deadline=None, max_examples=40)
settings.load_profile("rounding")

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
kernel = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED, reason="needs CUDA, or TRITON_INTERPRET=1: see test_interpreted.py")
places = st.one_of(st.integers(0, 100), st.integers(0, 2**35))
steps = st.integers(1, 2**24 - 1)


@triton.jit
def _dithers(out, t, place, SHIFTED: tl.constexpr):
    at = tl.arange(0, 16)[:, None] * 32 + tl.arange(0, 32)[None, :]
    place = tl.load(place)
    begins = (place & 15).to(tl.int32) if SHIFTED else 0
    a, b, c = dither_tile(run_turn(step_turn(tl.load(t)), place), begins + at)
    tl.store(out + at, a)
    tl.store(out + 512 + at, b)
    tl.store(out + 1024 + at, c)


@kernel
@given(steps, places)
def test_the_kernel_has_the_same_dithers(t, place):
    for shifted in {True, bool(place % 16)}:
        out = torch.empty(3, 512, device=DEVICE)
        _dithers[(1,)](out, torch.tensor(float(t), device=DEVICE), torch.tensor(place, device=DEVICE), shifted)
        assert torch.equal(out - 1.5, dithers(t, [(place, 512)], DEVICE))


@given(steps, st.lists(st.tuples(places, st.integers(1, 100)), min_size=1, max_size=4), st.data())
def test_a_part_has_the_dithers_of_the_whole(t, spans, data):
    whole = dithers(t, spans)
    assert whole.shape == (3, sum(n for _, n in spans)) and whole.abs().max() <= 0.5
    first, n = spans[0]
    cut = data.draw(st.integers(1, n))
    assert torch.equal(whole[:, :cut], dithers(t, [(first, cut)]))
    if cut < n: assert torch.equal(whole[:, cut:n], dithers(t, [(first + cut, n - cut)]))


@given(places, st.floats(0.001, 0.999))
def test_a_value_is_rounded_up_as_often_as_it_should_be(place, fraction):
    "Over 1,000 steps: weights by a sequence that never strays, moments as by chance; neither knows of the other."
    up = torch.cat([dithers(t, [(place, 1)]) for t in range(1, 1001)], 1) >= 0.5 - fraction
    chance = 4.5 * (fraction * (1 - fraction) / 1000) ** 0.5 + 1e-3
    off = (up.double().mean(1) - fraction).abs()
    assert off[0] < 0.006 and off[1:].max() < chance, off
    rates = [(up[a] & up[b]).double().mean().item() for a, b in ((0, 1), (0, 2), (1, 2))]
    assert max(abs(rate - fraction**2) for rate in rates) < 2 * chance + 5e-3, rates


def test_moments_have_no_memory():
    "A state that comes back soon must not meet the same dither: no lag up to 50 steps is correlated, nor any place."
    d = torch.stack([dithers(t, [(0, 640)]) for t in range(1, 2001)])[:, 1:, ::16].double()  # (steps, 2, runs)
    d /= d.std(0)
    for lag in range(1, 51): assert (d[lag:] * d[:-lag]).mean(0).abs().max() < 0.12, lag
    for apart in range(1, 40): assert (d[..., apart:] * d[..., :-apart]).mean(0).abs().max() < 0.12, apart
    assert (d[:, 0] * d[:, 1]).mean(0).abs().max() < 0.12


@given(steps, places)
def test_first_moments_of_neighbours_do_not_err_together(t, place):
    d = dithers(t, [(2 * place, 320)])[1].view(-1, 2)
    assert (d.sum(1) == 0).all()


@given(st.floats(2.0**-24, 60000.0, width=32), steps)
def test_codes_stay_in_range_and_scales_cover(size, t):
    torch.manual_seed(t)
    x = torch.randn(320) * size
    _, m_dither, v_dither = dithers(t, [(0, 320)])
    (m, s), (v, r) = _code_m(x, dither=m_dither), _code_root(x.abs(), m_dither)
    assert m.abs().max() <= 127 and v.min() >= 1 and v.max() <= 255
    peak = x.view(-1, 32).abs().amax(1)
    for scale in s, r: assert ((scale.float() >= peak) | (scale == SCALE_MAX)).all()
    assert (s.float() <= peak * (1 + 2.0**-9) + 2.0**-24).all()


@given(steps)
def test_zero_stays_zero(t):
    "And what was never touched beside what was: no dither makes a moment out of nothing."
    x = torch.zeros(320)
    x[::32] = 1.0
    d = dithers(t, [(0, 320)])
    assert (quantize_m(x, dither=d[1])[0].view(-1, 32)[:, 1:] == 0).all()
    assert (quantize_m(0 * x, dither=d[1])[0] == 0).all() and (quantize_v(0 * x, dither=d[2])[1] == 0).all()


def bits(params, opt): return [*params, *(t for p in params for t in opt.state[p].values())]


def fed(params, seed):
    torch.manual_seed(seed)
    for p in params: p.grad = (torch.randn(p.shape) * 10.0 ** torch.randint(-4, 1, p.shape)).to(p.dtype)


def new_params(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((64, 33), (7,), (96,), (5, 32), (33,))]


@pytest.mark.parametrize("name", MAKERS)
def test_neither_order_nor_company_matter(name):
    "Together, in another order, one after the other, as gradient release does it, or from the host: the same bits."
    make = lambda params, **kw: MAKERS[name](params, lr=1e-2, rounding="dithered", **kw)
    a, b, c, d = (new_params() for _ in range(4))
    oa, ob, oc, od = make(a), make(b[::-1]), make(c), make(d, offload_states=True)
    for n in range(6):
        for params in a, b, c, d: fed(params, n)
        oa.step(), ob.step(), od.step()
        for p in c: oc.step_param(p)
    for x, *others in zip(bits(a, oa), bits(b, ob), bits(c, oc), bits(d, od)):
        assert all(torch.equal(x, y) for y in others)


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_goes_on_bit_for_bit(name):
    a, b = new_params(), new_params()
    oa, ob = (MAKERS[name](params, lr=1e-2, rounding="dithered") for params in (a, b))
    for n in range(3): fed(a, n); oa.step()
    with torch.no_grad():
        for p, q in zip(a, b): q.copy_(p)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ob.load_state_dict(copy.deepcopy(oa.state_dict()))
    for n in range(3, 6):
        for params, opt in ((a, oa), (b, ob)): fed(params, n); opt.step()
    assert all(torch.equal(x, y) for x, y in zip(bits(a, oa), bits(b, ob)))


@pytest.mark.parametrize("before,after", [("nearest", "dithered"), ("dithered", "nearest")])
def test_a_resume_that_changes_the_rounding_says_so(before, after):
    params = new_params()
    old, new = (FlashAdamW(params, rounding=rounding) for rounding in (before, after))
    fed(params, 0); old.step()
    with pytest.warns(UserWarning, match=f"rounding='{before}'"): new.load_state_dict(old.state_dict())
    assert new.rounding == after
    public = old.public_state_dict()  # of a package that does not say how it rounds: nor does loading
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.load_state_dict(public)


@pytest.mark.parametrize("before,after,said", [
    (dict(max_norm=0.5), {}, "max_norm=0.5, and this optimizer goes on with max_norm=None"),
    ({}, dict(max_norm=2), "max_norm=None, and this optimizer goes on with max_norm=2.0"),
    (dict(decouple_lr=True), {}, "decouple_lr=True, and this optimizer goes on with decouple_lr=False"),
    (dict(max_norm=1), dict(max_norm=1.0), None)])
def test_a_resume_that_changes_what_steps_go_by_says_so(before, after, said):
    params = new_params()
    old, new = (FlashAdamW(params, **options) for options in (before, after))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        new.load_state_dict(old.state_dict())  # no step was taken yet
        fed(params, 0); old.step()
        saved = old.state_dict()
        new.load_state_dict(copy.deepcopy(saved))
        for group in saved["param_groups"]: group["state_format"] = group["state_format"].split(" ")[0]
        new.load_state_dict(saved)  # as it was written before it said so
    assert len(told) == (said is not None) and all(f"saved under {said}:" in str(one.message) for one in told)


def test_where_no_code_is_rounded_nothing_is_said():
    params = new_params(torch.float32)
    old, new = (FlashAdamW(params, quantize=False, rounding=rounding) for rounding in ("nearest", "dithered"))
    fed(params, 0); old.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new.load_state_dict(old.state_dict())


@pytest.mark.parametrize("name", MAKERS)
def test_the_dither_is_the_default(name):
    a, b = new_params(), new_params()
    oa, ob = MAKERS[name](a, lr=1e-2), MAKERS[name](b, lr=1e-2, rounding="dithered")
    for params, opt in ((a, oa), (b, ob)): fed(params, 0); opt.step()
    assert oa.rounding == "dithered" and all(torch.equal(x, y) for x, y in zip(bits(a, oa), bits(b, ob)))


def test_unknown_roundings_are_refused_and_pickles_of_before_go_on():
    opt = FlashAdamW(new_params())
    with pytest.raises(OptionError, match="'nearest' or 'dithered'"): FlashAdamW(new_params(), rounding="up")
    with pytest.raises(OptionError): opt.rounding = None
    state = opt.__getstate__()
    del state["rounding"]
    old = FlashAdamW.__new__(FlashAdamW)
    old.__setstate__(state)
    assert old.rounding == "nearest"
    assert opt.state_dict()["param_groups"][0]["state_format"].startswith("companded+dithered-24")


H = AdamWScalars(1e-2, 0.9, 0.99, 1e-8, 0.1, dithered=True)


@given(st.integers(1, 30), st.integers(1, 30), st.booleans())
def test_shards_step_as_the_whole(a, b, quantize):
    "Cut at whole groups codes, scales and error bits are the same; with fp32 moments error bits are, wherever it is cut."
    torch.manual_seed(a + 31 * b)
    a, n = (32 * a, 32 * (a + b)) if quantize else (a, a + b)
    whole = new_operands(torch.randn(n).bfloat16(), None, quantize=quantize)
    cut = lambda x, i, j: Operands(*(t if t is None else t[i // 32:j // 32].clone() if name.endswith("scale") else t[i:j].clone()
                                     for name, t in zip(Operands._fields, x[:-1])), i)
    parts = [cut(whole, 0, a), cut(whole, a, n)]
    for t in range(1, 5):
        g = torch.randn(n).bfloat16()
        adamw_reference([whole._replace(grad=g)], H, t)
        adamw_reference([parts[0]._replace(grad=g[:a]), parts[1]._replace(grad=g[a:])], H, t)
    for name in COLUMNS:
        if (t := getattr(whole, name)) is not None:
            assert torch.equal(t, torch.cat([getattr(x, name) for x in parts])), name


@kernel
@pytest.mark.parametrize("rows,columns,a,b,quantize", [(9, 128, 32, 96, True), (2, 2176, 64, 2144, True), (20, 33, 5, 33, False)])
def test_columns_step_as_in_the_whole(rows, columns, a, b, quantize):
    "A shard of columns, its rows shorter or longer than a block: by the reference and by the kernel."
    torch.manual_seed(0)
    whole = new_operands(torch.randn(rows * columns, device=DEVICE).bfloat16(), None, quantize=quantize)
    def columns_of(t, width=1):
        return t if t is None else t.view(rows, -1)[:, a // width:b // width].reshape(-1)
    part = Operands(*(columns_of(t, 32 if name.endswith("scale") else 1) for name, t in zip(Operands._fields, whole[:-1])),
                    Place(a, b - a, columns))
    fused, full = (Operands(*(t if t is None else t.clone() for t in x[:-1]), x.place) for x in (part, whole))
    tensors, counts = [TensorList([x]) for x in (fused, full)], [torch.zeros((), device=DEVICE) for _ in "ab"]
    for t in (1, 2):
        g = torch.randn(rows * columns, device=DEVICE).bfloat16()
        adamw_reference([whole._replace(grad=g)], H, t)
        adamw_reference([part._replace(grad=columns_of(g))], H, t)
        for x, grad, count in zip(tensors, (columns_of(g), g), counts): adamw_fused(x, x.grad_pointers([grad]), H, count)
    for name in COLUMNS:
        for small, large in (part, whole), (fused, full):
            if (x := getattr(small, name)) is not None:
                assert torch.equal(x, columns_of(getattr(large, name), 32 if name.endswith("scale") else 1)), name


@given(st.integers(0, 2**31 - 1), st.sampled_from([torch.bfloat16, torch.float16]), st.sampled_from([24, 32]))
def test_a_weight_that_is_not_moved_rests(seed, dtype, width):
    "At lr 0, as a warm-up begins, masters stay bit for bit, for ever: those that no tie beside a power of two moves at first."
    torch.manual_seed(seed)
    theta = torch.randn(256) * 10.0 ** torch.randint(-4, 4, (256,))
    narrow, error_bits = encode(decode(*encode(theta, dtype, width - 16)), dtype, width - 16)
    p = torch.nn.Parameter(narrow.clone())
    opt = FlashAdamW([p], lr=0.0, weight_decay=0.1, master_weight_bits=width, rounding="dithered")
    p.grad = torch.randn(256).to(dtype)
    opt.step()
    opt.state[p]["error_bits"].copy_(error_bits)
    before = decode(p.detach(), opt.state[p]["error_bits"])
    for _ in range(20): opt.step()
    assert torch.equal(decode(p.detach(), opt.state[p]["error_bits"]), before)


def walked(make, gradient, n=32, steps=3000, start=0.0, dtype=torch.float32):
    "Weights after steps with the gradients `gradient(t)`, as the masters have them."
    p = torch.nn.Parameter(torch.full((n,), start, dtype=dtype))
    opt = make([p])
    for t in range(steps): p.grad = gradient(t).to(dtype); opt.step()
    error_bits = opt.state[p].get("error_bits")
    return p.detach().float() if error_bits is None else decode(p.detach(), error_bits)


def dithered(cls): return lambda ps, **kw: cls(ps, rounding="dithered", **kw)


@pytest.mark.parametrize("ours,theirs,kw", [
    (FlashAdamW, torch.optim.AdamW, dict(weight_decay=0.0)), (FlashSGD, torch.optim.SGD, dict(momentum=0.9))])
def test_a_value_whose_gradient_has_ended_comes_to_rest(ours, theirs, kw):
    def gradient(t):
        g = torch.ones(32)
        g[1:] = 0.3 if t < 20 else 0.0
        return g
    got, want = (walked(lambda ps: cls(ps, lr=1e-3, **kw), gradient)[1:] for cls in (dithered(ours), theirs))
    assert (got.mean() / want.mean() - 1).abs() < 0.05 and got.abs().max() < 1.5 * want.abs().max()


def test_lion_stands_still_when_its_moment_has_died():
    "Where fp32 steps on by the sign of a moment as small as you like, codes end it within the moment's own memory."
    gradient = lambda t: torch.cat([torch.ones(1), torch.full((31,), 1.0 if t < 20 else 0.0)])
    kept = [walked(lambda ps: FlashLion(ps, lr=1e-3, rounding=r), gradient, steps=3000)[1:] for r in ("nearest", "dithered")]
    assert kept[0].mean() < -2.9 and kept[1].mean() > -0.8


@pytest.mark.slow
def test_the_second_moment_comes_down():
    "Half of a group's gradients halves at beta2 = 0.999: their steps are AdamW's again."
    def gradient(t):
        g = 1.0 + 0.1 * torch.randn(64, generator=rng)
        if t >= 300: g[::2] *= 0.5
        return g
    far = []
    for cls in dithered(FlashAdamW), torch.optim.AdamW:
        rng, seen = torch.Generator().manual_seed(1), []
        make = lambda ps: cls(ps, lr=1e-3, weight_decay=0.0)
        p = torch.nn.Parameter(torch.zeros(64))
        opt = make([p])
        for t in range(7000):
            if t == 6800: before = p.detach().clone()
            p.grad = gradient(t); opt.step()
        far.append((before - p.detach())[::2] / 200 / 1e-3)
    assert far[0].mean() >= 0.95 and (far[0] / far[1] - 1).abs().max() < 0.25, (far[0].mean(), far[0].std(), far[1].mean())


@pytest.mark.parametrize("lr,decay,grad", [(1e-5, 0.0, 1.0), (1e-5, 0.0, -1.0), (5e-6, 0.0, 1.0), (3e-5, 0.1, 0.0)])
def test_a_norms_weight_moves_at_a_small_rate(lr, decay, grad):
    make = lambda cls: lambda ps: cls(ps, lr=lr, weight_decay=decay)
    gradient = lambda t: torch.full((64,), grad)
    got = walked(make(dithered(FlashAdamW)), gradient, 64, 300, 1.0, torch.bfloat16) - 1
    want = walked(make(torch.optim.AdamW), gradient, 64, 300, 1.0) - 1
    assert (got.mean() / want.mean() - 1).abs() < 0.05 and (got / want - 1).abs().max() < 0.08, (got.mean(), got.std())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95)])
@pytest.mark.parametrize("size", [1e-8, 1e-7, 1e-6, 1e-5, 1.0, 1e4, 5e4])
def test_gradients_of_any_size_step_as_adamws_do(betas, size):
    ways = []
    for cls in dithered(FlashAdamW), torch.optim.AdamW:
        rng = torch.Generator().manual_seed(3)
        ways.append(walked(lambda ps: cls(ps, lr=1e-3, weight_decay=0.0, betas=betas),
                           lambda t: torch.randn(1024, generator=rng) * size, 1024, 200))
    assert abs(ways[0].norm() / ways[1].norm() - 1) < 0.1
