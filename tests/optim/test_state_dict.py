"""State dicts: what is stored is read as what it is, whichever package wrote it, or refused with nothing changed;
and weights in fp32."""
import copy
import importlib.util
import io
import json
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from flashoptim_nb.optim.codec import dequantize_m, dequantize_v
from flashoptim_nb.optim.split import decode
from every import OPTIONS
from flashoptim_nb.optim import (
    AveragedMasters, FlashAdamW, FlashLion, FlashSGD, StateError, cast_model, enable_gradient_release, state_dict)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KINDS = ({cls.__name__.removeprefix("Flash"): (cls, options) for cls, options in OPTIONS.items()}
         | {"plain SGD": (FlashSGD, {})})
TORCHS = {
    "AdamW": (torch.optim.AdamW, {}), "Adam": (torch.optim.Adam, {}), "SGD": (torch.optim.SGD, dict(momentum=0.9))}


def weights(dtypes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(40, 33 - n, generator=g).to(dtype)) for n, dtype in enumerate(dtypes)]


def take_steps(params, opt, steps, first=0):
    for t in range(first, first + steps):
        g = torch.Generator().manual_seed(t)
        for p in params: p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        opt.step()


def stepped(cls, dtypes=(BF16,), steps=4, **options):
    params = weights(dtypes)
    opt = cls(params, lr=1e-3, **options)
    take_steps(params, opt, steps)
    return params, opt


def on_disk(state_dict):
    torch.save(state_dict, f := io.BytesIO()); f.seek(0)
    return torch.load(f, weights_only=True)


def same_states(a, b, but=()):
    for p, q in zip(*([p for g in opt.param_groups for p in g["params"]] for opt in (a, b))):
        assert a.state[p].keys() == b.state[q].keys()
        for key, t in a.state[p].items():
            if key not in but: assert t.dtype == b.state[q][key].dtype and torch.equal(t, b.state[q][key]), key


def copies(params): return [nn.Parameter(p.detach().clone()) for p in params]


def public_layout(opt, compress):
    "A checkpoint as the public package writes it, put together from its description and not by the code under test."
    state, groups, number = {}, [], 0
    for group in opt.param_groups:
        numbers = []
        for p in group["params"]:
            s, out = opt.state[p], {}
            if "error_bits" in s:
                out["error_bits"] = (s["error_bits"].to(p.dtype) if s["error_bits"].dtype == torch.int8
                                     else s["error_bits"].view(p.dtype))
            for key, decoded in (
                    ("exp_avg", dequantize_m), ("exp_avg_sq", dequantize_v), ("momentum_buffer", dequantize_m)):
                if f"{key}::quantized" not in s: continue
                q, scales = s[f"{key}::quantized"], s[f"{key}::scales"]
                out |= ({f"{key}::quantized": q, f"{key}::scales": scales.view(BF16) if p.dtype == BF16 else scales}
                        if compress else {key: decoded(q, scales)})
            if "exp_avg_sq::quantized" in s: out["step"] = torch.tensor(int(s["step"]))  # the others count no steps
            if out: state[number] = out
            numbers.append(number); number += 1
        known = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening")
        groups.append({k: group[k] for k in known if k in group}
                      | dict(initial_lr=1e-3, master_bytewidth={None: 0, 24: 3, 32: 4}[opt.master_weight_bits],
                             quantize=True, params=numbers))
    return copy.deepcopy(dict(state=state, param_groups=groups))


# the public package's checkpoints

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", [(BF16,), (FP16,), (FP32,), (BF16, FP32, FP16)], ids=str)
@pytest.mark.parametrize("bits", [24, 32, None])
@pytest.mark.parametrize("compress", [True, False])
def test_the_public_packages_checkpoints_load_bit_for_bit(kind, dtypes, bits, compress):
    cls, options = KINDS[kind]
    params, opt = stepped(cls, dtypes, master_weight_bits=bits, rounding="nearest", **options)  # as that package does
    public = on_disk(public_layout(opt, compress))
    twins = copies(params)
    again = cls(twins, lr=1.0, master_weight_bits=bits, **options)
    again.load_state_dict(public)
    missing = [p for i, p in enumerate(twins) if i not in public["state"]]
    assert not any(again.state.get(p) for p in missing)  # plain SGD of fp32 weights keeps nothing
    if not missing: same_states(opt, again, but=("step",))
    if "Adam" in kind: assert all(s["step"] == 4 for s in again.state.values())
    group = again.param_groups[0]
    assert group["lr"] == 1e-3 and not {"master_bytewidth", "quantize"} & group.keys()
    assert again.state_dict()["param_groups"][0].keys() == opt.state_dict()["param_groups"][0].keys() | {"initial_lr"}


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("mine", [24, 32])
def test_a_public_checkpoint_of_another_width_is_converted(bits, mine):
    params, opt = stepped(FlashAdamW, master_weight_bits=bits)
    twins = copies(params)
    again = FlashAdamW(twins, master_weight_bits=mine)
    again.load_state_dict(public_layout(opt, True))
    before, after = (decode(p.detach(), o.state[p]["error_bits"]) for p, o in ((params[0], opt), (twins[0], again)))
    off = (before - after).abs()
    if mine < bits: assert (off <= before.abs() * 1.01 * 2.0**-8 / 254).all()  # half a code, of each weight its own
    else: assert off.max() <= before.abs().max() * 2.0**-23
    assert again.state[twins[0]]["error_bits"].dtype == {24: torch.int8, 32: torch.int16}[mine]


def test_public_codes_of_channels_last_weights_are_grouped_as_they_lie():
    "That package codes a weight in the order of its memory and saves codes with their strides."
    cls, seen = FlashLion, torch.randn(6, 5, 3, 3).to(BF16)
    p = nn.Parameter(seen.clone())
    flat = nn.Parameter(seen.permute(0, 2, 3, 1).contiguous().view(-1))  # the same values as they lie
    inner = cls([flat], lr=1e-3)
    take_steps([flat], inner, 3)
    public = public_layout(inner, True)
    as_seen = lambda t: t.view(6, 3, 3, 5).permute(0, 3, 1, 2)
    s = public["state"][0]
    s |= {"exp_avg::quantized": as_seen(s["exp_avg::quantized"]), "error_bits": as_seen(s["error_bits"])}
    opt = cls([p], lr=1e-3)
    opt.load_state_dict(public)
    take_step = lambda o, q, g: (setattr(q, "grad", g), o.step())
    wanted = as_seen(dequantize_m(inner.state[flat]["exp_avg::quantized"], inner.state[flat]["exp_avg::scales"]))
    found = dequantize_m(opt.state[p]["exp_avg::quantized"], opt.state[p]["exp_avg::scales"])
    assert (found - wanted).abs().max() <= wanted.abs().max() / 100
    assert torch.equal(opt.state[p]["error_bits"], as_seen(inner.state[flat]["error_bits"]))
    take_step(opt, p, torch.ones_like(p))


def test_what_a_public_checkpoint_cannot_mean_is_refused():
    params, opt = stepped(FlashAdamW)
    good = public_layout(opt, True)
    for damage in (lambda s, g: g.update(master_bytewidth=5), lambda s, g: g.update(master_bytewidth=0),
                   lambda s, g: s.update(error_bits=s["error_bits"] + 0.5),
                   lambda s, g: s.update(error_bits=s["error_bits"] * 4),
                   lambda s, g: s.update(error_bits=s["error_bits"].to(FP16)),
                   lambda s, g: g.update(master_bytewidth=4) or s.update(error_bits=s["error_bits"].to(torch.int8)),
                   lambda s, g: g.pop("master_bytewidth"), lambda s, g: g.update(foreach=None),
                   lambda s, g: s.update({"exp_avg::quantized": s["exp_avg::quantized"].float() + 0.5}),
                   lambda s, g: s.update({"exp_avg::scales": s["exp_avg::scales"].float()})):
        bad = copy.deepcopy(good)
        damage(bad["state"][0], bad["param_groups"][0])
        before = copy.deepcopy(opt.state_dict())
        with pytest.raises(StateError): opt.load_state_dict(bad)
        after = opt.state_dict()
        assert (after["param_groups"] == before["param_groups"]
                and all(torch.equal(t, after["state"][0][k]) for k, t in before["state"][0].items()))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "SGDW"])
@pytest.mark.parametrize("bits", [24, 32, None])
@pytest.mark.parametrize("compress", [True, False])
def test_a_state_dict_for_the_public_package(kind, bits, compress):
    cls, options = KINDS[kind]
    _, opt = stepped(cls, (BF16, FP32, FP16), master_weight_bits=bits, compress_state_dict=compress, **options)
    written, described = opt.public_state_dict(), public_layout(opt, compress)
    for i, s in described["state"].items():
        for key, t in s.items():
            assert written["state"][i][key].dtype == t.dtype and torch.equal(
                written["state"][i][key].view(torch.uint8) if t.dim() else written["state"][i][key],
                t.view(torch.uint8) if t.dim() else t), (key)
    assert {k: v for k, v in written["param_groups"][0].items() if k != "nesterov"} == described["param_groups"][0]
    with pytest.raises(StateError, match="companded"): FlashLion(weights([BF16]), companded=False).public_state_dict()


def test_what_the_public_package_rounds_is_told():
    "It keeps unquantized moments in the weights' dtype."
    with pytest.warns(UserWarning, match="rounds these"): stepped(FlashAdamW, quantize=False)[1].public_state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for cls, dtype, options in (FlashAdamW, FP32, dict(quantize=False)), (FlashSGD, BF16, dict(quantize=False)), (FlashAdamW, BF16, {}):
            assert stepped(cls, (dtype,), **options)[1].public_state_dict()["state"]
        FlashAdamW(weights([BF16]), quantize=False).public_state_dict()  # has no moments yet
        narrow, wide = weights([BF16, FP32])
        opt = FlashAdamW([narrow.requires_grad_(False), wide], quantize=False)
        take_steps([wide], opt, 1)
        opt.public_state_dict()  # nor has what is frozen
    _, opt = stepped(FlashSGD, momentum=0.9, quantize=False)
    opt.param_groups[0]["momentum"] = 0.0  # for now
    with pytest.warns(UserWarning, match="rounds these"): opt.public_state_dict()


@pytest.mark.skipif(importlib.util.find_spec("flashoptim") is None,
                    reason="the public package is not here: pip install --no-deps flashoptim==0.1.4")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("bits", [24, 32])
def test_the_public_package_itself_reads_ours_and_writes_its_own(kind, dtype, bits, monkeypatch):
    import flashoptim
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # its constructor asks; nothing here runs on a GPU
    cls, options = KINDS[kind]
    if not hasattr(flashoptim, cls.__name__): pytest.skip(f"the public package has no {cls.__name__}")
    params, opt = stepped(cls, (dtype,), master_weight_bits=bits, **options)
    theirs = getattr(flashoptim, cls.__name__)(copies(params), lr=1.0, master_weight_bits=bits, **options)
    theirs.load_state_dict(on_disk(opt.public_state_dict()))
    (state,), s = theirs.state.values(), opt.state[params[0]]
    assert torch.equal(state["error_bits"], s["error_bits"]) and theirs.param_groups[0]["lr"] == 1e-3
    for key in opt._moments_of(opt.param_groups[0]):
        assert (torch.equal(state[key].quantized, s[f"{key}::quantized"])
                and torch.equal(state[key].scales, s[f"{key}::scales"]))
    again = cls(copies(params), master_weight_bits=bits, **options)
    again.load_state_dict(on_disk(theirs.state_dict()))
    same_states(opt, again, but=() if "Adam" in kind else ("step",))


@pytest.mark.cuda
@pytest.mark.skipif(importlib.util.find_spec("flashoptim") is None,
                    reason="the public package is not here: pip install --no-deps flashoptim==0.1.4")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("compress", [True, False])
def test_what_the_public_package_saves_after_steps_of_its_own(kind, bits, compress):
    import flashoptim
    cls, options = KINDS[kind]
    params = [nn.Parameter(p.detach().cuda()) for p in weights([BF16])]
    theirs = getattr(flashoptim, cls.__name__)(
        params, lr=1e-3, master_weight_bits=bits, compress_state_dict=compress, **options)
    for t in range(4):
        for p in params: p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t)).to(p)
        theirs.step()
    again = cls([nn.Parameter(p.detach().cpu()) for p in params], master_weight_bits=bits, **options)
    again.load_state_dict(on_disk(theirs.state_dict()))
    (s,), (kept,) = again.state.values(), theirs.state.values()
    assert torch.equal(s["error_bits"], kept["error_bits"].cpu())
    for key, code in again._moments_of(again.param_groups[0]).items():
        q, scales = kept[key].quantized.cpu(), kept[key].scales.cpu()
        if compress: assert torch.equal(s[f"{key}::quantized"], q) and torch.equal(s[f"{key}::scales"], scales)
        else:
            # coded again from fp32; a code of ours is 1 where theirs is 0
            assert (s[f"{key}::quantized"].int() - q.int()).abs().max() <= 1


@pytest.mark.cuda
def test_states_and_weights_from_another_device():
    params, opt = stepped(FlashAdamW, (BF16, FP32, FP16))
    for saved in opt.state_dict(), opt.public_state_dict():
        there = [nn.Parameter(p.detach().cuda()) for p in params]
        again = FlashAdamW(there)
        again.load_state_dict(saved)
        for p, q in zip(params, there):
            assert all(t.is_cuda and torch.equal(t.cpu(), opt.state[p][key]) for key, t in again.state[q].items())
        full, model = opt.get_fp32_model_state_dict(nn.ParameterList(params)), nn.ParameterList(there)
        again.set_fp32_model_state_dict(model, full)
        # ties of a half spacing go either way
        for key, w in again.get_fp32_model_state_dict(model).items():
            torch.testing.assert_close(w.cpu(), full[key], rtol=2.0**-15 if key == "0" else 2.0**-17, atol=0)


# our own

@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("marked", [True, False])
def test_small_error_bits_of_32_bit_masters_stay_small(dtype, marked):
    "A warm-up's first steps leave all error bits within a byte, and the next step goes on from there."
    params = [nn.Parameter((0.02 * (1 + torch.rand(64, 64))).to(dtype))]
    opt = FlashAdamW(params, lr=1e-7, weight_decay=0.0, master_weight_bits=32)
    take_steps(params, opt, 2)
    error_bits = opt.state[params[0]]["error_bits"]
    if dtype == BF16: assert error_bits.any() and error_bits.abs().max() <= 127
    saved = on_disk(opt.state_dict())
    if not marked: del saved["param_groups"][0]["state_format"]  # as written before there was one
    again = FlashAdamW(copies(params), master_weight_bits=32)
    again.load_state_dict(saved)
    same_states(opt, again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [24, 32, None])
def test_old_state_dicts_without_a_format_load(kind, bits):
    cls, options = KINDS[kind]
    params, opt = stepped(cls, (BF16, FP16, FP32), master_weight_bits=bits, **options)
    saved = on_disk(opt.state_dict())
    for group in saved["param_groups"]: del group["state_format"]
    again = cls(copies(params), master_weight_bits=bits, **options)
    again.load_state_dict(saved)
    same_states(opt, again)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wide_error_bits_that_nothing_explains_are_refused(dtype):
    params, opt = stepped(FlashAdamW)
    for marked in True, False:
        saved = copy.deepcopy(opt.state_dict())
        saved["state"][0]["error_bits"] = saved["state"][0]["error_bits"].to(dtype)
        if not marked: del saved["param_groups"][0]["state_format"]
        with pytest.raises(StateError, match="error_bits is torch.int"): opt.load_state_dict(saved)


def test_error_bits_that_a_tool_cast_are_refused():
    "Loading in place copies int16 into int8 without a word; the group then says 32 bits."
    params, opt = stepped(FlashAdamW, master_weight_bits=32)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["error_bits"] = saved["state"][0]["error_bits"].to(torch.int8)
    with pytest.raises(StateError, match="error_bits"): FlashAdamW(copies(params)).load_state_dict(saved)


def test_error_bits_of_weights_of_another_dtype_are_refused():
    params, opt = stepped(FlashAdamW)
    again = FlashAdamW([nn.Parameter(params[0].detach().half())])
    with pytest.raises(StateError, match="made for bfloat16 weights"): again.load_state_dict(opt.state_dict())
    saved = copy.deepcopy(opt.state_dict())
    del saved["state"][0]["error_bits"]
    again.load_state_dict(saved)
    assert not again.state[again.param_groups[0]["params"][0]]["error_bits"].any()


@pytest.mark.parametrize("saves,loads", [(True, False), (False, True)])
@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Lion"])
def test_linear_codes_are_not_read_as_companded_ones(kind, saves, loads):
    cls, options = KINDS[kind]
    params, opt = stepped(cls, companded=saves, **options)
    again = cls(copies(params), companded=loads, **options)
    again.load_state_dict(on_disk(opt.state_dict()))
    assert (again.companded is loads
            and again.state_dict()["param_groups"][0]["state_format"].startswith("companded" if loads else "linear"))
    for key, code in opt.moments.items():
        decoded = dequantize_m if code == torch.int8 else dequantize_v
        a, b = (decoded(s[f"{key}::quantized"], s[f"{key}::scales"], o.companded) for o in (opt, again)
                for s in o.state.values())
        assert (a - b).abs().max() <= a.abs().max() / 60
    same = cls(copies(params), companded=saves, **options)
    same.load_state_dict(opt.state_dict())
    same_states(opt, same)


@pytest.mark.parametrize("rounding", ["nearest", "dithered"])
@pytest.mark.parametrize("kind", KINDS)
def test_states_with_and_without_codes_are_exchanged(kind, rounding):
    "What was rounded to the nearest comes back as it was; dithered codes are coded anew, to the nearest."
    cls, options = KINDS[kind]
    options = options | dict(rounding=rounding)
    params, opt = stepped(cls, (BF16, FP32), **options)
    plain = cls(copies(params), quantize=False, **options)
    plain.load_state_dict(opt.state_dict())
    assert not any("::" in key for s in plain.state.values() for key in s)
    again = cls(copies(params), **options)
    again.load_state_dict(plain.state_dict())
    codes = {f"{key}::{part}" for key in opt.moments for part in ("quantized", "scales")}
    same_states(opt, again, but=codes if rounding == "dithered" else ())
    for key, code in opt.moments.items():
        decoded = dequantize_m if code == torch.int8 else dequantize_v
        pairs = [(s, t) for s, t in zip(opt.state.values(), again.state.values()) if f"{key}::scales" in s]
        for a, b in ((decoded(s[f"{key}::quantized"], s[f"{key}::scales"]) for s in pair) for pair in pairs):
            assert (a - b).abs().max() <= a.abs().max() / 120


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compress", [True, False])
def test_nothing_of_one_optimizer_is_tied_to_another(kind, compress):
    cls, options = KINDS[kind]
    params = weights([BF16, FP32])
    opt = cls(params, lr=torch.tensor(1e-3), compress_state_dict=compress, **options)
    take_steps(params, opt, 3)
    twins = copies(params)
    again = cls(twins, lr=0.5, **options)
    saved = opt.state_dict()
    for s in saved["state"].values(): s["mine"] = torch.zeros(3)
    again.load_state_dict(saved)
    known = {t.data_ptr() for o in (opt, saved) for s in (o.state if o is opt else o["state"]).values()
             for t in s.values() if isinstance(t, torch.Tensor)}
    known |= {opt.param_groups[0]["lr"].data_ptr()}
    assert not known & {t.data_ptr() for s in again.state.values() for t in s.values()} | known & {
        again.param_groups[0]["lr"].data_ptr()}
    before = copy.deepcopy(opt.state_dict())
    take_steps(twins, again, 2)
    again.param_groups[0]["lr"].mul_(0.5)
    after = opt.state_dict()
    assert opt.param_groups[0]["lr"] == torch.tensor(1e-3)
    for i, s in before["state"].items(): assert all(torch.equal(t, after["state"][i][k]) for k, t in s.items())


@pytest.mark.parametrize(
    "step", [4, 4.0, torch.tensor(4), torch.tensor(4.0), torch.tensor([4.0]), torch.tensor([[4]])], ids=str)
def test_a_step_in_any_form(step):
    params = weights([BF16, BF16])
    opt = FlashAdamW([dict(params=[p]) for p in params])
    take_steps(params, opt, 4)
    saved = opt.state_dict()
    for s in saved["state"].values(): s["step"] = step
    opt.load_state_dict(saved)
    take_steps(params, opt, 2)
    assert [float(opt.state[p]["step"]) for p in params] == [6.0, 6.0]  # two groups, each with a counter of its own


def test_a_state_that_was_only_looked_at_is_not_saved():
    params, opt = stepped(FlashAdamW, steps=0)
    assert not opt.state[params[0]] and opt.state_dict()["state"] == {}


@pytest.mark.parametrize("kind", TORCHS)
@pytest.mark.parametrize("bits", [24, 32, None])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("wide", [True, False], ids=["torch on fp32 weights", "torch on the 16-bit weights"])
def test_the_way_through_torch_and_back(kind, bits, compress, wide):
    (cls, options), (torchs, torch_options) = KINDS[kind], TORCHS[kind]
    params, opt = stepped(cls, master_weight_bits=bits, compress_state_dict=compress, **options)
    between = [nn.Parameter(p.detach().float() if wide else p.detach().clone()) for p in params]
    middle = torchs(between, lr=1.0, **torch_options)
    middle.load_state_dict(copy.deepcopy(opt.state_dict()))
    if not compress: take_steps(between, middle, 2)
    elif kind != "SGD":
        with pytest.raises(KeyError, match="exp_avg"): take_steps(between, middle, 1)
    ends = [nn.Parameter(p.detach().to(BF16)) for p in between]
    again = cls(ends, master_weight_bits=bits, **options)
    again.load_state_dict(on_disk(middle.state_dict()))
    (s,), (before,) = again.state.values(), opt.state.values()
    if bits: assert not s["error_bits"].any()  # torch stepped the weights without it
    if compress and wide: assert all(torch.equal(t, before[key]) for key, t in s.items() if "::" in key)
    if not compress and kind != "SGD": assert s["step"] == 6
    if not compress:
        key = next(iter(opt.moments))
        kept = list(middle.state.values())[0][key].float()
        assert (dequantize_m(s[f"{key}::quantized"], s[f"{key}::scales"]) - kept).abs().max() <= kept.abs().max() / 100
    take_steps(ends, again, 1, first=9)


def test_a_momentum_that_torch_began_anew_is_the_one_that_counts():
    "torch.optim.SGD does not know codes; it leaves them beside its own momentum."
    params, opt = stepped(FlashSGD, (FP32,), momentum=0.9)
    middle = torch.optim.SGD(copies(params), lr=1e-3, momentum=0.9)
    middle.load_state_dict(copy.deepcopy(opt.state_dict()))
    take_steps(middle.param_groups[0]["params"], middle, 1)
    again = FlashSGD(copies(params), momentum=0.9, quantize=False)
    again.load_state_dict(middle.state_dict())
    (s,), (kept,) = again.state.values(), middle.state.values()
    assert ({"momentum_buffer", "momentum_buffer::quantized"} < kept.keys()
            and torch.equal(s["momentum_buffer"], kept["momentum_buffer"]))


@pytest.mark.parametrize(
    "damage",
    [lambda s: s["param_groups"][0].update(params=[0, 0]), lambda s: s["param_groups"][0].update(lr=float("nan")),
     lambda s: s["param_groups"][0].update(state_format="cubic-24-bfloat16"), lambda s: s["state"][1].update(
         error_bits=torch.zeros(40, 32)[None].to(torch.int8)), lambda s: s["state"][1].update(
         error_bits=torch.zeros(40, 32, dtype=torch.bool)), lambda s: s["state"][1].pop("exp_avg::scales"),
     lambda s: s["state"][1].update({"exp_avg::scales": torch.full((40,), 1e-9)})])
def test_a_state_dict_that_is_refused_changes_nothing(damage):
    params, opt = stepped(FlashAdamW, (BF16, BF16))
    before, bad = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.state_dict())
    bad["param_groups"][0]["weight_decay"] = 0.7
    damage(bad)
    with pytest.raises(ValueError): opt.load_state_dict(bad)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, s in before["state"].items(): assert all(torch.equal(t, after["state"][i][k]) for k, t in s.items())


# torch.distributed.checkpoint

def net(dtype=BF16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3)).to(dtype)


def trained(model, cls=FlashAdamW, steps=3, **options):
    opt = cls(model.parameters(), lr=1e-2, **options)
    take_steps(list(model.parameters()), opt, steps)
    return opt


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("bits", [24, 32])
def test_distributed_checkpoints_carry_the_format(flatten, bits, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = net(); opt = trained(model, master_weight_bits=bits)
    dcp.save(get_optimizer_state_dict(model, opt, options=options), checkpoint_id=tmp_path, no_dist=True)

    def loaded(**given):
        twin = copy.deepcopy(model)
        again = FlashAdamW(twin.parameters(), **given)
        dcp.load(state := get_optimizer_state_dict(twin, again, options=options), checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(twin, again, state, options=options)
        return again

    same_states(opt, loaded(master_weight_bits=bits))
    if bits == 32:
        # cast in place on the way
        with pytest.raises(StateError, match="error_bits is torch.int8"):
            loaded(master_weight_bits=24)
    linear = loaded(master_weight_bits=bits, companded=False)
    (a, *_), (b, *_) = opt.state.values(), linear.state.values()
    whole = dequantize_m(a["exp_avg::quantized"], a["exp_avg::scales"])
    assert ((dequantize_m(b["exp_avg::quantized"], b["exp_avg::scales"], False) - whole).abs().max()
            <= whole.abs().max() / 100)


@pytest.mark.parametrize("flatten", [True, False])
def test_distributed_checkpoints_carry_the_clip_coefficient(flatten, tmp_path):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = net(); opt = FlashAdamW(model.parameters(), max_norm=1e-3); enable_gradient_release(model, opt)
    model(torch.ones(2, 8, dtype=BF16)).sum().backward(); opt.step()
    dcp.save(get_optimizer_state_dict(model, opt, options=options), checkpoint_id=tmp_path, no_dist=True)
    again = FlashAdamW(model.parameters(), max_norm=1e-3)
    dcp.load(state := get_optimizer_state_dict(model, again, options=options), checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(model, again, state, options=options)
    assert 0 < again._next_clip < 1 and again._next_clip == opt._next_clip


# weights in fp32

def masters(model, opt):
    return {name: decode(p.detach(), opt.state[p]["error_bits"]) for name, p in model.named_parameters()}


@pytest.mark.parametrize("pause", ["", "copied", "loaded"])
def test_masters_after_a_cast_of_the_model(pause):
    model = net(); opt = trained(model)
    if pause == "copied": model, opt = copy.deepcopy((model, opt))
    if pause == "loaded": opt.load_state_dict(opt.state_dict())
    kept = masters(model, opt)
    for wider in (model.float, model.double):
        for name, t in opt.get_fp32_model_state_dict(wider()).items():
            assert t.dtype == FP32 and torch.equal(t, kept[name])
        with pytest.raises(StateError, match="make the optimizer anew"): opt.set_fp32_model_state_dict(model, kept)
        with pytest.raises(ValueError, match="make the optimizer anew|dtype torch.float64"):
            take_steps(list(model.parameters()), opt, 1)
    assert opt.state_dict()["param_groups"][0]["state_format"].split()[0] == "companded+dithered-24-bfloat16"
    model.bfloat16()
    for name, t in opt.get_fp32_model_state_dict(model).items(): assert torch.equal(t, kept[name])
    model.half()
    with pytest.raises(StateError, match="made for torch.bfloat16"): opt.get_fp32_model_state_dict(model)
    with pytest.raises(ValueError, match="make the optimizer anew"): take_steps(list(model.parameters()), opt, 1)
    with torch.no_grad(): model.float()[0].weight.add_(1e-4)
    with pytest.raises(StateError, match="0.weight is torch.float32"): opt.get_fp32_model_state_dict(model)


class Tied(nn.Module):
    def __init__(self, twice):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False, dtype=BF16), nn.Linear(6, 6, bias=False, dtype=BF16)
        self.b.weight = nn.Parameter(self.a.weight.data) if twice else self.a.weight


@pytest.mark.parametrize("twice", [False, True], ids=["one parameter", "two parameters, one memory"])
@pytest.mark.parametrize("which", ["a", "b"])
def test_tied_weights(twice, which):
    model = Tied(twice)
    opt = FlashAdamW([getattr(model, which).weight])
    take_steps([getattr(model, which).weight], opt, 3)
    full = opt.get_fp32_model_state_dict(model)
    assert torch.equal(full["a.weight"], full["b.weight"]) and not torch.equal(full["a.weight"], model.a.weight.float())
    other = Tied(twice); again = FlashAdamW([getattr(other, which).weight])
    again.set_fp32_model_state_dict(other, full)
    assert all(torch.equal(t, full[name]) for name, t in again.get_fp32_model_state_dict(other).items())
    before = other.a.weight.detach().clone()
    with pytest.raises(StateError, match="a.weight and b.weight are one tensor"):
        again.set_fp32_model_state_dict(other, full | {"b.weight": full["b.weight"] + 1})
    assert torch.equal(other.a.weight, before)


class Odd(nn.Module):
    "Entries of every kind."

    def __init__(self, dtype=BF16):
        super().__init__()
        self.weight, self.frozen = (nn.Parameter(torch.randn(5, 4).to(dtype)),
                                    nn.Parameter(torch.randn(4).to(dtype), requires_grad=False))
        self.turn = nn.Parameter(torch.randn(3, dtype=torch.complex64), requires_grad=False)
        self.register_buffer("mean", torch.randn(4).to(dtype))
        self.register_buffer("seen", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.note = "first"

    def get_extra_state(self): return dict(note=self.note)

    def set_extra_state(self, state): self.note = state["note"]


def test_entries_of_every_kind_come_and_go():
    model = Odd(); opt = FlashAdamW([model.weight, model.frozen]); take_steps([model.weight], opt, 2)
    full = opt.get_fp32_model_state_dict(model)
    assert {k: v.dtype for k, v in full.items() if k != "_extra_state"} == dict(
        weight=FP32, frozen=FP32, turn=torch.complex64, mean=FP32, seen=torch.int64, mask=torch.bool)
    other = Odd(); other.note = "second"; again = FlashAdamW([other.weight, other.frozen])
    # as the public package writes integers, too
    floats = {k: v.double() if isinstance(v, torch.Tensor) and not v.is_complex() else v for k, v in full.items()}
    again.set_fp32_model_state_dict(other, floats)
    assert other.note == "first" and all(
        torch.equal(t, full[k]) for k, t in again.get_fp32_model_state_dict(other).items() if k != "_extra_state")
    shared = [again.state[p]["step"].data_ptr() for p in (other.weight, other.frozen)]
    assert shared[0] == shared[1]  # one launch steps them both
    assert all(t.data_ptr() not in {x.data_ptr() for x in other.state_dict().values() if isinstance(x, torch.Tensor)}
               for k, t in full.items() if k != "_extra_state")


@pytest.mark.parametrize(
    "change,says", [
        (dict(weight=torch.full((5, 4), 1e5)), "20 values"),
        (dict(weight=torch.full((5, 4), 1e300, dtype=torch.float64)), "20 values"),
        (dict(mean=torch.full((4,), -7e4)), "4 values"), (dict(frozen=torch.full((4,), 7e4)), "4 values"),
        (dict(weight=torch.randn(5, 4, dtype=torch.complex64)), "imaginary"),
        (dict(seen=torch.tensor(3.5)), "1 values"), (dict(mask=torch.tensor([2, 0])), "1 values"),
        (dict(weight=torch.zeros(5, 4, device="meta")), "dense"),
        (dict(weight=torch.zeros(5, 4).to_sparse()), "dense"), (dict(weight=[[0.0] * 4] * 5), "differ"),
        (dict(weight=torch.zeros(4, 5)), "differ"), (dict(more=torch.zeros(1)), "differ"),
        (dict(weight=None), "differ")])
def test_fp32_weights_that_the_model_cannot_hold_change_nothing(change, says):
    model = Odd(FP16); opt = FlashAdamW([model.weight, model.frozen]); take_steps([model.weight], opt, 2)
    before, states = copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict())
    full = opt.get_fp32_model_state_dict(model)
    given = ({k: torch.ones_like(t) if isinstance(t, torch.Tensor) else dict(note="other") for k, t in full.items()}
             | change)
    with pytest.raises(StateError, match=says): opt.set_fp32_model_state_dict(model, given)
    with pytest.raises(StateError, match="a int in place"): opt.set_fp32_model_state_dict(model, 3)
    assert (model.note == "first"
            and all(torch.equal(t, before[k]) for k, t in model.state_dict().items() if k != "_extra_state"))
    assert (all(torch.equal(t, states["state"][0][k]) for k, t in opt.state_dict()["state"][0].items())
            and len(opt.state) == 1)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_what_is_not_finite_stays_what_it_is(dtype):
    model = nn.Linear(3, 1, bias=False, dtype=dtype); opt = FlashAdamW(model.parameters())
    with pytest.warns(UserWarning, match="weight has values that are not finite"):
        opt.set_fp32_model_state_dict(model, {"weight": torch.tensor([[torch.nan, -torch.inf, 0.1]])})
    for found in (model.weight.detach(), opt.get_fp32_model_state_dict(model)["weight"]):
        assert found[0, 0].isnan() and found[0, 1] == -torch.inf
    assert (opt.get_fp32_model_state_dict(model)["weight"][0, 2] - 0.1).abs() < 1e-4


def test_masters_of_a_weight_of_another_shape_are_refused():
    model = net(); opt = trained(model); full = opt.get_fp32_model_state_dict(model)
    model[1].bias.data = torch.zeros(2, 3, dtype=BF16)
    with pytest.raises(StateError, match="1.bias is"): opt.get_fp32_model_state_dict(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="1.bias is"):
        opt.set_fp32_model_state_dict(model, {k: t.float() + 1 for k, t in before.items()})
    assert (all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
            and torch.equal(opt.state[model[0].bias]["error_bits"], opt.state_dict()["state"][1]["error_bits"]))


def test_a_second_optimizer_asks_for_itself():
    model = net(); first, second = FlashAdamW(model[0].parameters()), FlashLion(model[1].parameters(), lr=1e-4)
    for opt in first, second: take_steps([p for g in opt.param_groups for p in g["params"]], opt, 2)
    full = (first.get_fp32_model_state_dict(model)
            | {k: t for k, t in second.get_fp32_model_state_dict(model).items() if k.startswith("1.")})
    other = net(seed=4); again = FlashAdamW(other[0].parameters()), FlashLion(other[1].parameters())
    for opt in again: opt.set_fp32_model_state_dict(other, full)
    for opt, part in zip(again, "01"):
        assert all(
            torch.equal(t, full[k]) for k, t in opt.get_fp32_model_state_dict(other).items() if k.startswith(part))


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("bits", [24, 32])
def test_what_the_cast_cast_error_bits_is_saved_before_the_first_step(bits, steps, tmp_path):
    def make(seed):
        cast_model(model := net(FP32, seed))
        return model, FlashAdamW(model.parameters(), lr=1e-4, master_weight_bits=bits)

    (whole, opt), (half, before), (again, resumed) = make(0), make(0), make(1)
    for p, q in zip(whole.parameters(), half.parameters()): p.requires_grad_(p.ndim > 1); q.requires_grad_(q.ndim > 1)
    take_steps([p for p in whole.parameters() if p.ndim > 1], opt, 3)
    take_steps([p for p in half.parameters() if p.ndim > 1], before, steps)
    torch.save((half.state_dict(), before.state_dict()), tmp_path / "kept")
    weights, states = torch.load(tmp_path / "kept", weights_only=True)
    again.load_state_dict(weights); resumed.load_state_dict(states)
    take_steps([p for p in again.parameters() if p.ndim > 1], resumed, 3 - steps, steps)
    a, b = (o.get_fp32_model_state_dict(m) for o, m in ((opt, whole), (resumed, again)))
    for name, t in a.items(): assert torch.equal(t, b[name]), name


def test_weights_changed_from_outside_begin_anew_without_their_corrections():
    model, fp32 = net(), net(FP32, 1).state_dict()
    opt = trained(model); steps = [s["step"].item() for s in opt.state.values()]
    model.load_state_dict({k: t.to(BF16) for k, t in fp32.items()})
    off = opt.get_fp32_model_state_dict(model)
    for name, p in model.named_parameters():
        # half a spacing
        assert 0 < (off[name] - p).abs().max() and ((off[name] - p).abs() <= 2.0**-8 * p.abs()).all(), name
    for state in opt.state.values(): state.pop("error_bits", None)
    for name, t in opt.get_fp32_model_state_dict(model).items():
        assert torch.equal(t, model.state_dict()[name].float()), name
    twin = copy.deepcopy((model, opt))
    opt.set_fp32_model_state_dict(model, fp32)
    for name, t in opt.get_fp32_model_state_dict(model).items():
        torch.testing.assert_close(t, fp32[name], rtol=2.0**-16, atol=0)
    model, opt = twin
    take_steps(list(model.parameters()), opt, 1)
    assert ([s["step"].item() for s in opt.state.values()] == [n + 1 for n in steps]
            and all("error_bits" in s for s in opt.state.values()))


def named(order, **options):
    model = net()
    return FlashAdamW([(n, p) for n, p in sorted(model.named_parameters(), reverse=order)], lr=1e-2, **options)


def test_named_parameters_in_another_order_are_refused():
    opt = named(False)
    take_steps([p for g in opt.param_groups for p in g["params"]], opt, 1)
    with pytest.raises(StateError, match="0.bias is parameter 0 of the state dict and 3 of the optimizer"):
        named(True).load_state_dict(opt.state_dict())
    named(False).load_state_dict(opt.state_dict())
    for change in (lambda g: g.pop("param_names"),
                   lambda g: g.update(param_names=[f"module.{n}" for n in g["param_names"]])):
        saved = opt.state_dict(); change(saved["param_groups"][0])
        named(False).load_state_dict(saved)
    with pytest.raises(StateError): named(True).load_state_dict(opt.state_dict())


def test_a_state_that_was_only_looked_at_keeps_what_the_cast_cast_error_bits():
    model = nn.Linear(16, 16); exact = model.weight.detach().clone(); cast_model(model)
    opt = FlashAdamW(model.parameters()); assert not opt.state[model.weight]
    assert (opt.get_fp32_model_state_dict(model)["weight"] - exact).abs().max() < 0.02 * (
        model.weight.float() - exact).abs().max()


def test_whole_and_sharded_weights(tmp_path):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        plain = net(); opt = trained(plain)
        full = opt.get_fp32_model_state_dict(plain)
        split = net(seed=5)
        for layer in split:
            for name, p in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
        for given in (full, {k: distribute_tensor(t, mesh, [Shard(0)]) for k, t in full.items()},
                      {k: distribute_tensor(t, mesh, [Replicate()]) for k, t in full.items()}):
            again = FlashAdamW(split.parameters())
            again.set_fp32_model_state_dict(split, given)
            found = again.get_fp32_model_state_dict(split)
            assert all(isinstance(t, DTensor) and torch.equal(t.full_tensor(), full[k]) for k, t in found.items())
        other = net(seed=6); whole = FlashAdamW(other.parameters())
        whole.set_fp32_model_state_dict(other, found)
        assert all(torch.equal(t, full[k]) for k, t in whole.get_fp32_model_state_dict(other).items())
        public = FlashAdamW(split.parameters()); public.load_state_dict(again.public_state_dict())
        assert all(torch.equal(public.state[p]["error_bits"].to_local(), again.state[p]["error_bits"].to_local())
                   for p in split.parameters())
    finally: dist.destroy_process_group()


@pytest.mark.parametrize("rounding,coding", [("nearest", "companded"), ("dithered", "companded+dithered")])
def test_the_format_is_plain_data(rounding, coding):
    _, opt = stepped(FlashAdamW, (BF16, FP16), rounding=rounding)
    groups = json.loads(json.dumps(opt.state_dict()["param_groups"]))
    assert groups[0]["state_format"].split()[0] == f"{coding}-24-bfloat16+float16"


def test_the_lr_that_decoupled_decay_refers_to_reaches_the_public_package():
    "Its `initial_lr` is that, whatever the lr is now and wherever a scheduler began."
    p = nn.Parameter(torch.ones(32, dtype=BF16))
    opt = FlashAdamW([p], lr=1e-2, decouple_lr=True)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=10)
    p.grad = torch.ones_like(p); opt.step()
    (group,) = opt.public_state_dict()["param_groups"]
    assert group["initial_lr"] == 1e-2 and "reference_lr" not in group
    again = FlashAdamW([p], lr=1.0, decouple_lr=True)
    with pytest.warns(UserWarning, match="lr / 0.01, the initial_lr of the state dict, and not by lr / 1 "):
        again.load_state_dict(opt.public_state_dict())
    assert again.param_groups[0]["reference_lr"] == 1e-2


def test_a_first_rate_of_a_scheduler_is_not_what_decoupled_decay_refers_to():
    "A checkpoint whose steps did not go by it has none, and its `initial_lr` is where a warm-up began."
    p = nn.Parameter(torch.ones(32, dtype=BF16))
    opt = FlashAdamW([p], lr=1e-2)
    torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=1e-2, total_steps=10)
    p.grad = torch.ones_like(p); opt.step()
    again = FlashAdamW([p], lr=2e-2, decouple_lr=True)
    with pytest.warns(UserWarning, match="decouple_lr=False"): again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["reference_lr"] == 2e-2


@pytest.mark.parametrize("bits", [24, 32])
def test_a_model_that_changed_its_dtype_is_not_for_the_public_package(bits):
    model = nn.Linear(8, 8).to(BF16)
    opt = FlashAdamW(model.parameters(), master_weight_bits=bits)
    model.weight.grad = torch.ones_like(model.weight); opt.step()
    model.float()
    with pytest.raises(StateError, match="was made for torch.bfloat16"): opt.public_state_dict()


def test_groups_that_share_a_learning_rate_go_on_sharing_it():
    lr, ps = torch.tensor(1e-2), [nn.Parameter(torch.ones(4)) for _ in range(2)]
    opt = FlashAdamW([dict(params=[p], lr=lr) for p in ps])
    opt.load_state_dict(opt.state_dict())
    a, b = opt.param_groups
    assert a["lr"] is b["lr"] and a["lr"] is not lr


def stepped_layer(**options):
    cast_model(model := nn.Linear(8, 8))
    opt = FlashAdamW(model.parameters(), lr=1e-2, **options)
    for _ in range(3):
        model(torch.randn(4, 8, dtype=torch.bfloat16)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    return model, opt


def test_fp32_weights_after_the_model_was_widened():
    "In place they are known; a model with new parameters is not this optimizer's."
    model, opt = stepped_layer()
    weights = opt.get_fp32_model_state_dict(model)
    widened = opt.get_fp32_model_state_dict(model.float())
    assert all(torch.equal(weights[name], t) for name, t in widened.items())
    with pytest.raises(StateError, match="steps none of the model's parameters"):
        opt.get_fp32_model_state_dict(copy.deepcopy(model))


@pytest.mark.parametrize("wrote, reads", [(False, True), (True, False)])
def test_a_state_dict_says_how_its_codes_are_to_be_read(wrote, reads):
    (_, ours), (other, theirs) = stepped_layer(companded=wrote), stepped_layer(companded=reads)
    theirs.load_state_dict(ours.state_dict())
    wide, again = (FlashAdamW(torch.nn.Linear(8, 8).parameters(), quantize=False) for _ in "ab")
    for one, held in (wide, ours), (again, theirs): one.load_state_dict(held.state_dict())
    for p, q in zip(*([p for p in one.param_groups[0]["params"]] for one in (wide, again))):
        m, n = wide.state[p]["exp_avg"], again.state[q]["exp_avg"]
        assert m.abs().max() > 0 and (m - n).abs().max() < 0.02 * m.abs().max()


def ones_stepped(opt, p, times):
    for _ in range(times):
        p.grad = torch.ones_like(p)
        opt.step()


def test_momentum_that_rests_is_saved_and_loaded():
    p = torch.nn.Parameter(torch.ones(64))
    opt = FlashSGD([p], lr=0.1, momentum=0.9)
    ones_stepped(opt, p, 5)
    opt.param_groups[0]["momentum"] = 0.0
    ones_stepped(opt, p, 1)
    q = torch.nn.Parameter(p.detach().clone())
    other = FlashSGD([q], lr=0.1, momentum=0.9)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for one, x in ((opt, p), (other, q)):
        one.param_groups[0]["momentum"] = 0.9
        ones_stepped(one, x, 2)
    assert torch.equal(p, q)


@pytest.mark.parametrize("key", ["alpha", "rho", "momentum", "history_size"])
def test_a_group_may_have_keys_of_its_user(key):
    p = torch.nn.Parameter(torch.ones(64))
    opt = FlashAdamW([{"params": [p], key: 3}])
    ones_stepped(opt, p, 2)
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.param_groups[0][key] == 3
    with pytest.raises(StateError, match="another kind"): FlashSGD([p], lr=0.1).load_state_dict(opt.state_dict())


def test_a_step_number_that_nobody_reaches_is_damage():
    p = torch.nn.Parameter(torch.ones(64))
    opt = FlashAdamW([p])
    ones_stepped(opt, p, 1)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["step"] = torch.tensor(1e30)
    with pytest.raises(StateError, match="damaged"): opt.load_state_dict(saved)


def test_averages_in_the_weights_place_are_not_stepped():
    model = torch.nn.Linear(8, 8)
    opt = FlashAdamW(model.parameters())
    averages = AveragedMasters(opt, model)
    model.weight.grad = torch.ones_like(model.weight)
    opt.step()
    averages.update()
    with averages.applied(), pytest.raises(StateError, match="averages"):
        model.weight.grad = torch.ones_like(model.weight)
        opt.step_param(model.weight)


@pytest.mark.parametrize("rows, codes, fits", [(96, True, False), (128, True, True), (24, True, True), (96, False, True)])
def test_groups_of_codes_that_another_number_of_ranks_cuts_are_refused(monkeypatch, rows, codes, fits):
    p = torch.nn.Parameter(torch.ones(rows, 1 if rows > 24 else 64))
    opt = FlashAdamW([p], compress_state_dict=codes)
    ones_stepped(opt, p, 1)
    opt.state[p]["mine::scales"] = 7  # its user's, in groups of nothing
    monkeypatch.setattr(state_dict, "_ranks_of", lambda group: 2)
    saved = copy.deepcopy(opt.state_dict())
    assert saved["param_groups"][0]["state_format"].endswith("ranks=2")
    monkeypatch.setattr(state_dict, "_ranks_of", lambda group: 4)
    if fits: opt.load_state_dict(saved)
    else:
        with pytest.raises(StateError, match="saved over 2 ranks and is loaded over 4"): opt.load_state_dict(saved)


def test_a_graph_that_kept_a_stepped_weight_says_so():
    weight = torch.nn.Parameter(torch.randn(16, 16, device="cuda" if torch.cuda.is_available() else "cpu"))
    opt = FlashAdamW([weight])
    loss = (torch.randn(4, 16, device="cuda" if torch.cuda.is_available() else "cpu") @ weight @ weight).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="inplace"): loss.backward()


@pytest.mark.parametrize("dtype", (BF16, torch.float16))
@pytest.mark.parametrize("bits", (24, 32))
def test_exported_weights_and_the_own_states_together_are_the_same_masters(bits, dtype):
    "A code at its end lies halfway to a neighbour, or beyond below a power of two: the export rounds back all the same."
    def made(weights=None):
        model = nn.Sequential(nn.Linear(256, 256))
        if weights: model.load_state_dict(weights)
        cast_model(model, dtype)
        return model, FlashAdamW(model.parameters(), master_weight_bits=bits)

    torch.manual_seed(0)
    model, opt = made()
    for _ in range(5):
        for p in model.parameters(): p.grad = torch.randn_like(p)
        opt.step()
    weights, states = opt.get_fp32_model_state_dict(model), copy.deepcopy(opt.state_dict())
    for name, p in model.named_parameters(): assert torch.equal(weights[name].to(dtype), p)
    again, other = made(weights)
    other.load_state_dict(states)
    for name, t in other.get_fp32_model_state_dict(again).items(): assert torch.equal(t, weights[name])


def test_weights_that_would_go_into_copies_are_refused():
    model = nn.Sequential(nn.Linear(8, 8))
    cast_model(model)
    opt = FlashAdamW(model.parameters())
    weights = opt.get_fp32_model_state_dict(model)
    model.register_state_dict_post_hook(lambda module, state, prefix, local: state.update({k: v.clone() for k, v in state.items()}))
    with pytest.raises(StateError, match="take off the hooks"): opt.set_fp32_model_state_dict(model, weights)


def _clone(module, state, prefix, local): state[prefix + "weight"] = state[prefix + "weight"].clone()


def _cut(module, state, prefix, local):
    for i, part in enumerate(state.pop(prefix + "weight").chunk(2)): state[f"{prefix}part{i}"] = part


@pytest.mark.parametrize("hook", [_clone, _cut])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_state_dict_with_one_copied_parameter_is_refused_by_whoever_looks_for_its_master(hook, steps):
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2))
    model[2].weight.requires_grad_(False)
    cast_model(model)
    opt = FlashAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    average = AveragedMasters(opt, model)
    take_steps([p for p in model.parameters() if p.requires_grad], opt, steps)
    average.update()
    weights = opt.get_fp32_model_state_dict(model)
    # of what it does not step nothing but the weights is known
    off = model[2].register_state_dict_post_hook(hook)
    assert torch.equal(opt.get_fp32_model_state_dict(model)["0.weight"], weights["0.weight"])
    opt.set_fp32_model_state_dict(model, opt.get_fp32_model_state_dict(model))
    average.model_state_dict()
    off.remove()
    model[1].register_state_dict_post_hook(hook)
    given = {name: t.float() for name, t in model.state_dict().items()}
    for ask in (lambda: opt.get_fp32_model_state_dict(model), lambda: opt.set_fp32_model_state_dict(model, given),
                average.model_state_dict):
        with pytest.raises(StateError, match="such as 1.weight, are not in the model's state dict"): ask()
    # parameters of another model, in the same optimizer, ask nothing of this one
    assert opt.get_fp32_model_state_dict(model[0]).keys() == {"weight", "bias"}


@pytest.mark.parametrize("value, dtype", [(65519.99609375, torch.float16), (3.0238e38, BF16), (-65519.99609375, torch.float16)])
def test_the_largest_weights_are_exported_within_their_range(value, dtype):
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(value)
    cast_model(model, dtype)
    exported = FlashAdamW(model.parameters()).get_fp32_model_state_dict(model)["weight"]
    assert torch.equal(exported.to(dtype), model.weight)
    torch.testing.assert_close(exported, torch.full((1, 1), value), rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_optimizers_state_dict_that_was_kept_resets_it(kind):
    cls, options = KINDS[kind]
    def begun():
        torch.manual_seed(0)
        cast_model(model := nn.Sequential(nn.Linear(33, 8), nn.LayerNorm(8)))
        return [*model.parameters()], cls(model.parameters(), lr=1e-3, **options)
    (params, opt), (others, new) = begun(), begun()
    initial, weights = opt.state_dict(), [p.detach().clone() for p in params]
    assert not opt.state  # saving begins nothing
    take_steps(params, opt, 5)
    for p, w in zip(params, weights): p.data.copy_(w)
    opt.load_state_dict(initial)
    for ps, one in ((params, opt), (others, new)): take_steps(ps, one, 3, first=9)
    for p, q in zip(params, others): assert torch.equal(p, q)
    same_states(opt, new)


def test_weights_that_come_after_a_save_begin_without_the_casts_lower_bits():
    cast_model(layer := nn.Linear(33, 8))
    opt = FlashAdamW(layer.parameters(), lr=1e-3)
    opt.state_dict()
    with torch.no_grad(): layer.weight.copy_(torch.randn(8, 33))
    assert torch.equal(opt.get_fp32_model_state_dict(layer)["weight"], layer.weight.float())


def _own(model, opt): return opt.state_dict()  # put back as it is: what Accelerate's prepare() does
def _torchs(model, opt):
    adamw = torch.optim.AdamW(params := [p.detach().float().requires_grad_() for p in model.parameters()], lr=0.0, weight_decay=0.0)
    take_steps(params, adamw, 2)
    return adamw.state_dict()


@pytest.mark.parametrize("bits", [24, 32])
@pytest.mark.parametrize("dict_of", [_own, _torchs])
def test_states_that_are_loaded_before_the_weights_leave_the_casts_lower_bits_to_the_weights(dict_of, bits):
    exact = (model := nn.Linear(33, 8)).weight.detach().clone()
    cast_model(model)
    opt = FlashAdamW(model.parameters(), lr=0.0, weight_decay=0.0, master_weight_bits=bits)
    opt.load_state_dict(states := dict_of(model, opt))
    for t in (t for s in states["state"].values() for t in s.values()): t.zero_()  # the caller's own
    average = AveragedMasters(opt, model); average.update()
    kept = copy.deepcopy((model.state_dict(), opt.state_dict()))
    near = 0.02 * (model.weight.float() - exact).abs().max()
    def master(): return opt.get_fp32_model_state_dict(model)["weight"]
    for found in master(), average.average["weight"]: assert (found - exact).abs().max() < near
    with torch.no_grad(): model.weight.copy_(other := torch.randn(8, 33).bfloat16())
    assert torch.equal(master(), other.float())
    model.load_state_dict(kept[0])
    for states in dict(state={}), {}:  # a reset, and a checkpoint of before the first step
        opt.load_state_dict(kept[1] | states)
        assert (master() - exact).abs().max() < near
    take_steps([*model.parameters()], opt, 1)
    assert (master() - exact).abs().max() < near and opt.state[model.weight]["error_bits"].any()
    with torch.no_grad(): model.weight.copy_(other)
    assert not torch.equal(master(), other.float())  # from the first step on they are the state's


@pytest.mark.parametrize("kind", KINDS)
def test_what_its_user_put_into_a_state_comes_back_as_it_does_in_torch(kind):
    cls, options = KINDS[kind]
    params, opt = stepped(cls, **options)
    opt.state[params[0]] |= dict(seen=7, mine=(mine := torch.linspace(0, 1, 5)), names=["a"])
    take_steps(params, opt, 1)
    saved = on_disk(opt.state_dict())
    again = cls(copies(params), lr=1e-3, **options)
    again.load_state_dict(saved)
    kept = again.state[again.param_groups[0]["params"][0]]
    assert kept["seen"] == 7 and kept["names"] == ["a"] and torch.equal(kept["mine"], mine)
    for x in kept["mine"], saved["state"][0]["names"]: x.clear() if isinstance(x, list) else x.zero_()
    assert kept["names"] == ["a"] and torch.equal(saved["state"][0]["mine"], mine)  # copies
    assert again.bytes_per_parameter()["total"] > 0  # where not all are tensors
    for one in opt, again: take_steps(one.param_groups[0]["params"], one, 2, first=9)
    for p, q in zip(params, again.param_groups[0]["params"]): assert torch.equal(p, q)


@pytest.mark.parametrize("kind", KINDS)
def test_what_its_user_put_into_a_state_may_be_named_after_what_is_there(kind):
    "It is told from the optimizer's own by its whole name."
    cls, options = KINDS[kind]
    params, opt = stepped(cls, **options)
    names = [f"{name}::mine" for name in ("step", "error_bits", "momentum_buffer", "exp_avg", "exp_avg_sq")]
    mine = dict.fromkeys([*names, "mine::scales"], torch.linspace(0, 1, 5)) | {"more::scales": "of no tensor"}
    opt.state[params[0]] |= mine
    take_steps(params, opt, 1)
    public = on_disk(opt.public_state_dict())
    for saved in on_disk(opt.state_dict()), public:
        again = cls(copies(params), lr=1e-3, **options)
        again.load_state_dict(saved)
        for kept in saved["state"][0], again.state[again.param_groups[0]["params"][0]]:
            assert kept["more::scales"] == mine["more::scales"]
            for name in [*names, "mine::scales"]: assert torch.equal(kept[name], mine[name]), name


def test_what_its_user_calls_scales_is_no_moments():
    params, opt = stepped(FlashAdamW, check_numerics=True)
    opt.state[params[0]] |= {"mine::scales": torch.full((3,), 1e6), "more::scales": "of no tensor"}
    take_steps(params, opt, 1)
    assert opt.state[params[0]]["step"] == 5


def test_fp32_weights_begin_the_states_of_all_that_is_trained():
    cast_model(model := nn.Sequential(nn.Linear(33, 8), nn.BatchNorm1d(8), nn.Linear(8, 2).requires_grad_(False)))
    opt = FlashAdamW(model.parameters(), lr=1e-3)
    opt.set_fp32_model_state_dict(model, {name: t.float() if t.is_floating_point() else t for name, t in model.state_dict().items()})
    assert {*opt.state} >= {p for p in model.parameters() if p.requires_grad} and model[1].weight.dtype == FP32
    take_steps([p for p in model.parameters() if p.requires_grad], opt, 2)
    assert {float(opt.state[p]["step"]) for p in model.parameters() if p.requires_grad} == {2.0}


@pytest.mark.parametrize("asked", ["get", "set", "average"])
def test_what_another_optimizer_trains_is_told_of(asked):
    cast_model(model := nn.Sequential(nn.Linear(33, 8), nn.Linear(8, 8)))
    opt, other = FlashAdamW(model[0].parameters(), lr=1e-3), FlashAdamW(model[1].parameters(), lr=1e-3)
    fp32 = {name: t.float() for name, t in model.state_dict().items()}
    ask = {"get": lambda: opt.get_fp32_model_state_dict(model), "set": lambda: opt.set_fp32_model_state_dict(model, fp32),
           "average": lambda: AveragedMasters(opt, model)}[asked]
    with pytest.warns(UserWarning, match="2 trained parameters of the model, such as 1.weight, are not this optimizer's"): ask()
    model[1].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ask()


def test_what_a_hook_takes_out_of_a_state_dict_stays_in_the_optimizer():
    (p,), opt = stepped(FlashAdamW)
    before = {**opt.state[p]}
    def taken_out(opt, saved):
        for state in saved["state"].values(): del state["error_bits"]
    opt.register_state_dict_post_hook(taken_out)
    assert "error_bits" not in opt.state_dict()["state"][0] and opt.state[p] == before
