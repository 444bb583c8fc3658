"""Properties that hold for every shape and every value that hypothesis can think of."""
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashoptim_nb.optim.codec import (GROUP, dequantize_m, dequantize_v, m_error_bound, quantize_m, quantize_v,
                                       v_error_bound)
from flashoptim_nb.optim.split import HALF_FORMATS, MAX_CODE, decode, encode
from every import MAKERS

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered")
settings.register_profile("here", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")

anything = st.floats(width=32)  # NaN, infinities, subnormals, both zeros
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
modest = st.floats(-1e4, 1e4, width=32)
shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)
narrow = st.sampled_from(list(HALF_FORMATS))
widths = st.sampled_from([8, 16])


def tensors(values, shape=hnp.array_shapes(min_dims=1, max_dims=1, min_side=1, max_side=130)):
    return hnp.arrays(np.float32, shape, elements=values).map(lambda a: torch.from_numpy(np.array(a)))


@given(tensors(anything), narrow, widths)
def test_a_split_weight_stands_for_its_number(theta, dtype, bits):
    f, back = HALF_FORMATS[dtype], decode(*encode(theta, dtype, bits))
    assert torch.equal(back.isnan(), theta.isnan()), "NaN stays, and nothing else becomes one"
    assert not back.isinf().any(), "what is too large saturates"
    x, y = (t[~theta.isnan()].double() for t in (theta.clamp(-f.bound, f.bound), back))
    exponent = x.abs().clamp(min=2.0 ** (f.e_min - 127)).frexp().exponent - 1
    half_ulp = torch.ldexp(torch.ones_like(x), exponent - f.p + 1)  # of the 16-bit number above, at most
    bound = half_ulp / (2 * MAX_CODE[bits]) + x.abs() * 2.0**-24 + 2.0**-149
    inside = x.abs() <= f.max
    assert ((y - x).abs() <= bound)[inside].all()
    assert ((y - x).abs() <= f.bound - f.max + bound)[~inside].all()


@given(tensors(finite), narrow, widths)
def test_order_survives_the_split(theta, dtype, bits):
    back = decode(*encode(theta.sort().values, dtype, bits))
    assert (back.diff() >= 0).all()


@given(tensors(finite), narrow, widths)
def test_encoding_what_was_decoded_changes_nothing(theta, dtype, bits):
    "But for a value midway to a power of two, where the spacing doubles: it moves by half a code, once."
    beside = 2.0 ** torch.arange(-10, 11) * (1 - torch.finfo(dtype).eps / 4)
    once = encode(torch.cat([theta, beside, -beside * (1 - 2.0**-20)]), dtype, bits)
    twice = encode(decode(*once), dtype, bits)
    moved = decode(*twice) != decode(*once)
    assert (twice[0].float()[moved].frexp().mantissa.abs() == 0.5).all()
    code = torch.finfo(dtype).eps / (4 * MAX_CODE[bits])
    assert ((decode(*twice) - decode(*once)).abs() <= code * decode(*once).abs() * (1 + 2.0**-6))[moved].all()
    assert torch.equal(decode(*encode(decode(*twice), dtype, bits)), decode(*twice))


@given(tensors(finite), st.booleans())
def test_moments_stay_within_their_bounds(x, companded):
    (q, s), (r, t) = quantize_m(x, companded), quantize_v(x.abs(), companded)
    m, v = dequantize_m(q, s, companded), dequantize_v(r, t, companded)
    assert m.isfinite().all() and v.isfinite().all() and (v >= 0).all()
    assert (m * x >= 0).all(), "no moment changes its sign"
    if companded:
        each = lambda scale: scale.repeat_interleave(GROUP)[: len(x)]
        assert ((m.double() - x).abs() <= m_error_bound(x, each(s)) * (1 + 1e-5) + 2.0**-25).all()
        assert ((v.double() - x.abs()).abs() <= v_error_bound(x.abs(), each(t)) * (1 + 1e-5) + 2.0**-47).all()


@given(tensors(modest), st.randoms())
def test_a_group_does_not_know_the_order_of_its_values(x, random):
    x = x[:GROUP]
    order = list(range(len(x)))
    random.shuffle(order)
    for quantize in quantize_m, lambda t: quantize_v(t.abs()):
        (q, s), (p, u) = quantize(x), quantize(x[order])
        assert torch.equal(q[order], p) and torch.equal(s, u)


makers = st.sampled_from(list(MAKERS))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def params_like(given, dtype):
    made = [torch.nn.Parameter(torch.linspace(-1, 2, g.numel()).reshape(g.shape).to(dtype)) for g in given]
    for p, g in zip(made, given): p.grad = g.to(dtype)
    return made


def copies(params):
    made = [torch.nn.Parameter(p.detach().clone()) for p in params]
    for p, q in zip(made, params): p.grad = q.grad.clone()
    return made


gradients = st.lists(tensors(modest, shapes), min_size=1, max_size=4)
wild = st.lists(tensors(finite, shapes), min_size=1, max_size=4)


def bits_of(opt, params): return [params, [list(opt.state[p].values()) for p in params]]


def assert_equal(a, b):
    if isinstance(a, torch.Tensor): assert torch.equal(a.detach(), b.detach())
    else:
        for x, y in zip(a, b, strict=True): assert_equal(x, y)


@given(makers, gradients, dtypes, st.booleans())
def test_a_parameter_steps_alone_as_it_does_among_others(name, grads, dtype, quantize):
    together = params_like(grads, dtype)
    alone = copies(together)
    opt = MAKERS[name](together, lr=1e-2, weight_decay=0.1, quantize=quantize)
    opts = [MAKERS[name]([p], lr=1e-2, weight_decay=0.1, quantize=quantize) for p in alone]
    for _ in range(2):
        opt.step()
        for one in opts: one.step()
    assert_equal(bits_of(opt, together), [alone, [list(one.state[p].values()) for one, p in zip(opts, alone)]])


@given(makers, wild, dtypes)
def test_finite_gradients_never_make_a_weight_that_is_not_a_number(name, grads, dtype):
    params = params_like([g.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max) for g in grads], dtype)
    opt = MAKERS[name](params, lr=1e-3)
    for _ in range(3): opt.step()
    for p in params: assert not p.isnan().any()
    for t in (t for p in params for t in opt.state[p].values() if t.is_floating_point()): assert t.isfinite().all()


@given(makers, gradients, dtypes)
def test_descent_of_the_negated_gradient_is_ascent(name, grads, dtype):
    up = params_like(grads, dtype)
    down = copies(up)
    for p in down: p.grad.neg_()
    for opt in (MAKERS[name](up, lr=1e-2, maximize=True), MAKERS[name](down, lr=1e-2)): opt.step()
    assert_equal(up, down)


@given(makers, gradients, dtypes, st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_a_skipped_step_changes_no_bit(name, grads, dtype, bad):
    params = params_like(grads, dtype)
    opt = MAKERS[name](params, lr=1e-2, max_norm=1.0)
    opt.step()
    before = [p.detach().clone() for p in params], [[t.clone() for t in opt.state[p].values()] for p in params]
    hit = next((p for p in params if p.numel()), None)
    if hit is None: return
    hit.grad.view(-1)[-1] = bad
    opt.step()
    assert_equal(before, bits_of(opt, params))
    assert int(opt.skipped_steps) == 1


@given(makers, gradients, dtypes, st.booleans(), st.booleans())
def test_a_state_dict_is_the_state(name, grads, dtype, quantize, compress):
    params = params_like(grads, dtype)
    # dithered codes that go out in fp32 are coded anew, within half a code: see test_state_dict
    rounding = "nearest" if quantize and not compress else "dithered"
    make = lambda ps: MAKERS[name](
        ps, lr=1e-2, quantize=quantize, compress_state_dict=compress, rounding=rounding)
    opt = make(params)
    opt.step()
    twins = copies(params)
    again = make(twins)
    again.load_state_dict(opt.state_dict())
    if compress or not quantize: assert_equal(bits_of(opt, params), bits_of(again, twins))
    for one in opt, again: one.step()
    for p, q in zip(params, twins): torch.testing.assert_close(p.detach(), q.detach(), rtol=0.02, atol=1e-3)
