"""Companded 8-bit states: bounds, edges, never a NaN."""
import pytest
import torch

from flashoptim_nb.optim.codec import (GROUP, SCALE_MAX, SCALE_MIN, dequantize_m, dequantize_v, m_error_bound,
                                       quantize_m, quantize_v, v_error_bound)


def spread(scale, n):
    "The scale of each of n values."
    return scale.repeat_interleave(GROUP)[:n]


@pytest.mark.parametrize("n", [1, 31, 32, 33, 1000, 4096])
def test_error_bounds(n, rng_seed):
    torch.manual_seed(rng_seed)
    for size in torch.logspace(-6, 4, 21):
        m, v = torch.randn(n) * size, (torch.randn(n) * size).square()
        code, scale = quantize_m(m)
        assert ((dequantize_m(code, scale).double() - m).abs() <= m_error_bound(m, spread(scale, n)) * (1 + 1e-4)).all()
        code, scale = quantize_v(v)
        assert ((dequantize_v(code, scale).double() - v).abs() <= v_error_bound(v, spread(scale, n)) * (1 + 1e-4)).all()


def test_every_code_is_a_fixed_point():
    "What a code decodes to is encoded as that code again, beside the value that sets the scale."
    for scale in 1.0, 3e-3, 512.0:
        q = torch.zeros(255, GROUP, dtype=torch.int8)
        q[:, 0], q[:, 1] = torch.arange(-127, 128), 127
        s = torch.full((255,), scale).half()
        code, s_again = quantize_m(dequantize_m(q, s))
        assert torch.equal(s, s_again) and torch.equal(q, code)
        q = torch.ones(255, GROUP, dtype=torch.uint8)
        q[:, 0], q[:, 1] = torch.arange(1, 256), 255
        code, s_again = quantize_v(dequantize_v(q, s))
        assert torch.equal(s, s_again) and torch.equal(q, code)


def test_scale_is_the_nearest_fp16(rng_seed):
    torch.manual_seed(rng_seed)
    peak = (torch.rand(5000, 1) + 0.5) * torch.logspace(-9, 4.9, 5000)[:, None]
    m = torch.cat([peak, torch.zeros(5000, GROUP - 1)], 1)
    expected = peak[:, 0].clamp(max=SCALE_MAX).half()
    assert torch.equal(quantize_m(m)[1], expected)
    assert torch.equal(quantize_v(m.square())[1], expected.clamp(min=SCALE_MIN))


def test_a_lone_second_moment_decays():
    "The scale must be able to fall at beta2 = 0.999: rounded up it never would."
    v, code, scale = torch.ones(1), *quantize_v(torch.ones(1))
    for _ in range(2000): v, (code, scale) = v * 0.999, quantize_v(dequantize_v(code, scale) * 0.999)
    assert abs(dequantize_v(code, scale).sqrt() / v.sqrt() - 1) < 0.5


@pytest.mark.parametrize("companded", [True, False])
def test_finite_in_finite_out(companded, rng_seed):
    "1e-45 to 3e38, one huge among tiny, subnormal groups, zeros."
    torch.manual_seed(rng_seed)
    x = torch.randn(400, GROUP).clamp(-3, 3) * torch.logspace(-45, 38, 400)[:, None]  # 3.4e38 is fp32's largest
    x[::7, 3], x[::5] = 3e38, x[::5] * 1e-30
    x[::11] = 0
    for value, code, back in (x, quantize_m, dequantize_m), (x.abs(), quantize_v, dequantize_v):
        out = back(*code(value, companded), companded)
        assert out.isfinite().all() and (out[::11] == 0).all()
        assert (out * value >= 0).all()  # never the wrong sign
    inf = torch.full((GROUP,), torch.inf)
    assert quantize_v(inf)[1].item() == SCALE_MAX and dequantize_v(*quantize_v(inf)).isfinite().all()


def test_a_live_second_moment_never_vanishes(rng_seed):
    torch.manual_seed(rng_seed)
    v = torch.rand(100, GROUP) ** 40 * torch.logspace(-12, 6, 100)[:, None]
    code, scale = quantize_v(v)
    assert (code >= 1).all() and (dequantize_v(code, scale) > 0)[v.amax(1) > 0].all()
    tiny = torch.full((GROUP,), 1e-30)
    assert quantize_v(tiny)[1].item() == SCALE_MIN and quantize_m(tiny)[0].abs().max() == 0


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 3, 11), (64,)])
def test_shapes(shape):
    x = torch.randn(shape)
    for code, scale in quantize_m(x), quantize_v(x.square()):
        assert code.shape == x.shape and scale.shape == (-(-x.numel() // GROUP),)
    assert dequantize_m(*quantize_m(x)).shape == x.shape


def test_groups_do_not_depend_on_what_follows():
    x = torch.randn(100)
    whole, part = quantize_m(x), quantize_m(x[:64])
    assert torch.equal(whole[0][:64], part[0]) and torch.equal(whole[1][:2], part[1])
