"""Optimizers that step one parameter at a time in its own shape, with states of any shape:
rows, columns, one number, none."""
import copy
import io

import pytest
import torch
from torch import nn

from flashoptim_nb.optim import FlashOptimizer, OptionError, StateError, enable_gradient_release

BF16 = torch.bfloat16


class Shapes(FlashOptimizer):
    "A momentum in codes, the mean squares of rows and of columns, and one number."
    moments = {"momentum": torch.int8}

    def __init__(self, params, lr=1e-2, weight_decay=0.0, maximize=False, **options):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, maximize=maximize), **options)

    def _state_shapes(self, p): return {"row": p.shape[:1], "column": p.shape[1:], "largest": ()} if p.ndim == 2 else {}

    def _update_one(self, theta, grad, state, group, t):
        m = state["momentum"].lerp_(grad, 0.1)
        if theta.ndim == 2:
            state["row"].lerp_(grad.square().mean(1), 0.1); state["column"].lerp_(grad.square().mean(0), 0.1)
            state["largest"] = torch.maximum(state["largest"], grad.abs().max())  # in place, or replaced
            m = m / (torch.outer(state["row"], state["column"]) / state["row"].mean()).sqrt().clamp(min=1e-8)
        theta.sub_(m, alpha=group["lr"])


def net(dtype=BF16, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(33, 40), nn.Tanh(), nn.Linear(40, 5)).to(dtype)


def train(model, opt, first, last):
    for t in range(first, last):
        x = torch.randn(16, 33, generator=torch.Generator().manual_seed(t)).to(model[0].weight.dtype)
        opt.zero_grad(); model(x).float().square().mean().backward(); opt.step()


def on_disk(x):
    torch.save(x, f := io.BytesIO()); f.seek(0)
    return torch.load(f, weights_only=True)


def assert_alike(a, opt_a, b, opt_b):
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q) and opt_a.state[p].keys() == opt_b.state[q].keys()
        for key, t in opt_a.state[p].items(): assert torch.equal(t, opt_b.state[q][key]), key


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("quantize", [True, False])
@pytest.mark.parametrize("compress", [True, False])
def test_resume_is_exact(dtype, quantize, compress):
    whole = net(dtype)
    opt = Shapes(whole.parameters(), quantize=quantize, compress_state_dict=compress)
    train(whole, opt, 0, 4)
    again = net(dtype, 1); again.load_state_dict(whole.state_dict())
    other = Shapes(again.parameters(), quantize=quantize, compress_state_dict=compress)
    other.load_state_dict(on_disk(opt.state_dict()))
    if quantize and not compress: return  # coded anew: close, not the same
    train(whole, opt, 4, 7); train(again, other, 4, 7)
    assert_alike(whole, opt, again, other)
    assert {k: tuple(opt.state[whole[0].weight][k].shape) for k in ("row", "column", "largest")} == dict(
        row=(40,), column=(33,), largest=())


def test_in_fp32_it_is_the_plain_loop():
    model, opt = (m := net(torch.float32)), Shapes(m.parameters(), quantize=False)
    twin = copy.deepcopy(model); states = {p: {} for p in twin.parameters()}
    for t in range(1, 4):
        train(model, opt, t, t + 1)
        twin.zero_grad()
        twin(torch.randn(16, 33, generator=torch.Generator().manual_seed(t))).square().mean().backward()
        for p in twin.parameters():
            if not states[p]:
                states[p] = ({"momentum": torch.zeros_like(p)}
                             | {k: torch.zeros(s) for k, s in opt._state_shapes(p).items()})
            with torch.no_grad(): opt._update_one(p, p.grad.clone(), states[p], dict(lr=1e-2), float(t))
    for p, q in zip(model.parameters(), twin.parameters()): torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_release_steps_alike():
    a, b = net(), net()
    plain, released = Shapes(a.parameters()), Shapes(b.parameters())
    enable_gradient_release(b, released)
    train(a, plain, 0, 3); train(b, released, 0, 3)
    assert_alike(a, plain, b, released)


def test_clipping_ascent_and_skipped_steps_are_the_bases():
    up, down = net(), net()
    ascent, descent = Shapes(up.parameters(), maximize=True, max_norm=0.1), Shapes(down.parameters(), max_norm=0.1)
    for m, sign, opt in (up, 1, ascent), (down, -1, descent):
        for p in m.parameters(): p.grad = torch.full_like(p, sign)
        opt.step()
    for p, q in zip(up.parameters(), down.parameters()): assert torch.equal(p, q)
    before = copy.deepcopy(up), copy.deepcopy(ascent.state_dict())
    up[0].weight.grad[0, 0] = torch.nan
    ascent.step()
    assert ascent.skipped_steps == 1 and all(torch.equal(p, q) for p, q in zip(up.parameters(), before[0].parameters()))
    assert all(
        torch.equal(t, before[1]["state"][i][k]) for i, s in ascent.state_dict()["state"].items() for k, t in s.items())


def test_states_that_do_not_fit_are_refused():
    model = net(); opt = Shapes(model.parameters()); train(model, opt, 0, 1)
    saved = opt.state_dict()
    for wrong in torch.zeros(7), None:
        bad = copy.deepcopy(saved); bad["state"][0]["row"] = wrong
        with pytest.raises(StateError, match="parameter 0: row"): opt.load_state_dict(bad)
    opt.state[model[0].weight]["column"] = torch.zeros(7)
    with pytest.raises(OptionError, match="column is torch.float32 of shape .7,."): train(model, opt, 1, 2)


def test_a_state_that_was_taken_out_begins_anew():
    model = net(); opt = Shapes(model.parameters()); train(model, opt, 0, 2)
    del opt.state[model[0].weight]["row"]
    train(model, opt, 2, 3)
    assert opt.state[model[0].weight]["row"].shape == (40,)


def test_what_a_parameter_costs():
    model = nn.Linear(64, 64, bias=False).bfloat16(); opt = Shapes(model.parameters())
    model.weight.grad = torch.ones_like(model.weight); opt.step()
    cost = opt.bytes_per_parameter()
    assert cost["masters"] == 1 and cost["states"] == 1 + 4 * (64 + 64 + 1) / 64**2
