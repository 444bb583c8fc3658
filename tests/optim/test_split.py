"""Split weights: every bf16 value, every exponent, every edge."""
from fractions import Fraction

import pytest
import torch

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.optim.split import HALF_FORMATS, MAX_CODE, compute_ecc_bits, decode, encode, reconstruct_fp32_param

WIDTHS = [(torch.bfloat16, 8), (torch.bfloat16, 16), (torch.float16, 8), (torch.float16, 16)]


def every_value(dtype):
    "All finite numbers of a 16-bit format."
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def half_ulp(narrow):
    "Half the spacing above |narrow|, exactly, in float64: for a subnormal the smallest normal's."
    f, info = HALF_FORMATS[narrow.dtype], torch.finfo(narrow.dtype)
    _, e = torch.frexp(narrow.double().abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.ones_like(e, dtype=torch.float64), e - 1 - f.p)


def reachable(narrow, error_bits, N):
    "Pairs that an encode of their own value gives back: inside the rounding interval of `narrow`, ties to even."
    bits = narrow.view(torch.int16).int()
    mantissa = bits & ((1 << (HALF_FORMATS[narrow.dtype].p - 1)) - 1)
    exponent = (bits & 0x7FFF) >> (HALF_FORMATS[narrow.dtype].p - 1)
    outward = error_bits.int() * torch.where(bits < 0, -1, 1)  # away from zero is positive
    tie_is_mine = (bits & 1) == 0
    low = torch.where((mantissa == 0) & (exponent > 1), (N + 1) // 2 - 1, N)  # below a power of two the spacing halves
    largest = (bits & 0x7FFF) == ((bits & 0x7FFF).max())
    return (((outward < N) | tie_is_mine) & ((-outward < low) | ((-outward == low) & (tie_is_mine | (low < N))))
            & ~(largest & (outward == N)))


@pytest.mark.parametrize("dtype,bits", WIDTHS)
def test_round_trip_of_reachable_pairs(dtype, bits):
    "8 bits: every value with all its error bits. 16 bits: every value with error bits at the edges and in between."
    N = MAX_CODE[bits]
    if bits == 16 and dtype == torch.float16:
        pytest.skip("an fp32 cannot tell fp16's 16-bit error bits apart: see test_fp16_with_16_bits_is_exact")
    codes = (range(-N, N + 1) if bits == 8
             else [0, 1, -1, 77, 8191, 8192, -8192, 16382, 16383, -16383, N // 3, -N // 3, N - 1, 1 - N, N, -N])
    narrow = every_value(dtype)
    for code in codes:
        error_bits = torch.full(narrow.shape, code, dtype=torch.int8 if bits == 8 else torch.int16)
        again, bits_again = encode(decode(narrow, error_bits), dtype, bits)
        keep = reachable(narrow, error_bits, N) & (narrow != 0)
        keep &= ~((narrow.abs().float() < 2.0**-125) & (bits == 16))  # steps of fp32's own subnormals
        # a step of the error bits is less than fp32's least number
        if dtype == torch.bfloat16:
            keep &= ~(narrow.abs().float() < 2.0**-118)
        assert torch.equal(again[keep], narrow[keep]) and torch.equal(bits_again[keep], error_bits[keep]), code


@pytest.mark.parametrize("dtype,bits", WIDTHS)
def test_error_bound_in_every_binade(dtype, bits, rng_seed):
    "Half a step of error bits, and half a unit of fp32: over every exponent, significands drawn afresh."
    torch.manual_seed(rng_seed)
    exponents = torch.arange(0, 255).repeat_interleave(512)
    theta = ((exponents << 23) | torch.randint(0, 1 << 23, exponents.shape)).int().view(torch.float32)
    theta = torch.where(torch.rand(theta.shape) < 0.5, theta, -theta)
    theta = theta[theta.abs() <= HALF_FORMATS[dtype].max]
    narrow, error_bits = encode(theta, dtype, bits)
    step = half_ulp(narrow) / MAX_CODE[bits]
    ulp32 = torch.ldexp(torch.ones_like(theta, dtype=torch.float64),
                        (torch.frexp(theta.double().abs().clamp(min=2.0**-126))[1] - 24).int())
    error = (decode(narrow, error_bits).double() - theta.double()).abs()
    bound = step / 2 + ulp32 * (1.0 if bits == 16 else 0.5) + 2.0**-149
    assert (error <= bound * (1 + 2.0**-20)).all(), (error / bound).max()


def test_fp16_with_16_bits_is_exact(rng_seed):
    torch.manual_seed(rng_seed)
    theta = torch.randn(100_000) * torch.logspace(-4, 4, 100_000)
    theta = theta[theta.abs() >= 2.0**-14]  # fp16's normal range
    assert torch.equal(decode(*encode(theta, torch.float16, 16)), theta)


@pytest.mark.parametrize("dtype,bits", [(torch.bfloat16, 8), (torch.float16, 8)])
def test_order(dtype, bits):
    "Decoded values grow with error bits within one value, and do not cross between neighbours."
    narrow = every_value(dtype).sort().values
    narrow = narrow[(narrow.float().abs() > 2.0**-110)]
    N = MAX_CODE[bits]
    levels = [decode(narrow, torch.full(narrow.shape, c, dtype=torch.int8)) for c in (-N, -N + 1, -1, 0, 1, N - 1, N)]
    for low, high in zip(levels, levels[1:]): assert (low < high).all()
    error_bits = torch.full(narrow.shape, N, dtype=torch.int8)
    # least reachable on the low side
    lows = torch.where(reachable(narrow, -error_bits, N), -N, -((N + 1) // 2 - 1)).to(torch.int8)
    outward = narrow > 0
    top = decode(narrow, error_bits)[outward][:-1]
    bottom = decode(narrow, lows)[outward][1:]
    assert (top <= bottom).all()


@pytest.mark.parametrize("dtype,bits", [(torch.bfloat16, 8), (torch.bfloat16, 16), (torch.float16, 8)])
def test_the_formula_itself(dtype, bits, rng_seed):
    "Against exact rational arithmetic, ties to even."
    torch.manual_seed(rng_seed)
    theta = torch.cat([torch.randn(1500) * torch.logspace(-6, 4, 1500), 1 - torch.rand(300) * 2.0**-8,
                       torch.tensor([1 - 2.0**-9, 1 + 2.0**-8])])
    narrow, error_bits = encode(theta, dtype, bits)
    for t, n, r, h in zip(theta.tolist(), narrow.tolist(), error_bits.tolist(), half_ulp(narrow).tolist()):
        assert r == round((Fraction(t) - Fraction(n)) / Fraction(h) * MAX_CODE[bits]), (t, n, r)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 16])
def test_edges(dtype, bits):
    big = HALF_FORMATS[dtype].max
    theta = torch.tensor([torch.inf, -torch.inf, 3.4e38, torch.nan, 0.0, -0.0, 1e-45, -1e-40, big])
    narrow, error_bits = encode(theta, dtype, bits)
    back = decode(narrow, error_bits)
    assert back[:3].isfinite().all() and (back[:3].abs() >= big).all()
    assert back[3].isnan() and error_bits[3] == 0 and (back[4:6] == 0).all()
    assert (back[6:8] - theta[6:8]).abs().max() <= 2.0**-24 * (1 if dtype == torch.float16 else 2.0**-100)
    assert back[8] == big
    given = torch.tensor([torch.inf, torch.nan]).to(dtype)
    assert torch.equal(compute_ecc_bits(torch.ones(2), given), torch.zeros(2, dtype=torch.int16))


def test_public_signatures():
    theta = torch.randn(10)
    narrow = theta.bfloat16()
    assert compute_ecc_bits(theta, narrow).dtype == torch.int16
    error_bits = compute_ecc_bits(theta, narrow, master_bytewidth=3)
    assert (error_bits.dtype == torch.int8
            and torch.equal(reconstruct_fp32_param(narrow, error_bits), decode(narrow, error_bits)))
    for bad in [lambda: compute_ecc_bits(theta, theta), lambda: compute_ecc_bits(theta, narrow, 2),
                lambda: compute_ecc_bits(theta[:3], narrow), lambda: reconstruct_fp32_param(theta, error_bits),
                lambda: reconstruct_fp32_param(narrow, narrow), lambda: encode(theta, torch.float32)]:
        with pytest.raises(UserError): bad()
