"""What a user does to groups and states between two steps is what the next step steps, as in torch.optim,
or is refused with nothing changed."""
import copy
import gc
import math
import os
import pickle
from collections import defaultdict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from every import MAKERS
from flashoptim_nb.optim import FlashAdamW, FlashLion, FlashSGD, GradientError, OptionError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAIRS = {"AdamW": (lambda ps: FlashAdamW(ps, lr=1e-2, weight_decay=0.1, quantize=False),
                   lambda ps: torch.optim.AdamW(ps, lr=1e-2, weight_decay=0.1)),
         "SGD": (lambda ps: FlashSGD(ps, lr=1e-2, momentum=0.9, dampening=0.3, quantize=False),
                 lambda ps: torch.optim.SGD(ps, lr=1e-2, momentum=0.9, dampening=0.3))}
SHAPES = [(4, 3), (5,), (), (2, 2, 3), (1,), (7, 2)]


def parameters():
    return [nn.Parameter(torch.linspace(-1, 1, torch.Size(s).numel(), device=DEVICE).reshape(s) + 0.5) for s in SHAPES]


def feed(ps, t, absent=()):
    for i, p in enumerate(ps):
        rng = torch.Generator().manual_seed(1000 * t + i)
        p.grad = None if i in absent else torch.randn(p.shape, generator=rng).to(p.device)


def close(ours, theirs):
    for p, q in zip(ours, theirs, strict=True): torch.testing.assert_close(p, q, rtol=2e-5, atol=2e-6)


# Each edit takes optimizer, all parameters, and two numbers that say which. It does the same to torch's optimizer.

def where(opt, p): return next((g for g in opt.param_groups if any(q is p for q in g["params"])), None)


def out(opt, p):
    if (g := where(opt, p)) is not None: g["params"] = [q for q in g["params"] if q is not p]


def append(opt, ps, i, j):
    if where(opt, ps[i]) is None: opt.param_groups[j % len(opt.param_groups)]["params"].append(ps[i])


def remove(opt, ps, i, j):
    g = where(opt, ps[i])
    if g is not None: del g["params"][next(n for n, q in enumerate(g["params"]) if q is ps[i])]


def exchange(opt, ps, i, j):
    g = where(opt, ps[i])
    if g is not None and where(opt, ps[j]) is None:
        g["params"][next(n for n, q in enumerate(g["params"]) if q is ps[i])] = ps[j]


def deal_out(opt, ps, i, j):
    out(opt, ps[i])
    opt.param_groups[j % len(opt.param_groups)]["params"].append(ps[i])


def new_group(opt, ps, i, j):
    out(opt, ps[i])
    opt.param_groups.append({**opt.param_groups[0], "params": [ps[i]], "lr": 2e-2})


def added_group(opt, ps, i, j):
    if where(opt, ps[i]) is None: opt.add_param_group(dict(params=[ps[i]], lr=3e-2))


def reversed_order(opt, ps, i, j): opt.param_groups[j % len(opt.param_groups)]["params"].reverse()


def one_group(opt, ps, i, j):
    opt.param_groups = [{**opt.param_groups[0], "params": [p for g in opt.param_groups for p in g["params"]]}]


def pop(opt, ps, i, j): opt.state.pop(ps[i], None)


def empty(opt, ps, i, j): opt.state[ps[i]] = {}


def look(opt, ps, i, j): opt.state[ps[i]]


def clear(opt, ps, i, j): opt.state.clear()


def count(opt, ps, i, j):
    if "step" in opt.state.get(ps[i], ()) and "exp_avg" in opt.state[ps[i]]:
        opt.state[ps[i]]["step"] = torch.tensor(float(j))


def zero(opt, ps, i, j):
    keys = sorted(opt.state.get(ps[i], {}).keys() - {"step"})
    if keys: opt.state[ps[i]][keys[j % len(keys)]] = torch.zeros_like(ps[i])


def strided(opt, ps, i, j):
    for k, t in opt.state.get(ps[i], {}).items():
        if k != "step": opt.state[ps[i]][k] = torch.stack([t, t], -1)[..., 0]


def in_place(opt, ps, i, j):
    for k, t in opt.state.get(ps[i], {}).items():
        if k != "step": t.mul_(0.5)


def exchanged_data(opt, ps, i, j):
    "Of all states, as offloading does."
    for s in opt.state.values():
        for k, t in s.items():
            if k != "step": t.data = t.data * 0.5


def another_dict(opt, ps, i, j):
    if ps[i] in opt.state: opt.state[ps[i]] = dict(opt.state[ps[i]])


def all_anew(opt, ps, i, j):
    opt.state = defaultdict(dict, {p: {k: t.clone() if isinstance(t, torch.Tensor) else t for k, t in s.items()}
                                   for p, s in opt.state.items()})


def weights(opt, ps, i, j): ps[i].data = ps[i].data * 0.5


def transposed(opt, ps, i, j):
    if ps[i].ndim > 1: ps[i].data = ps[i].data.transpose(0, -1).contiguous().transpose(0, -1)


def rate(opt, ps, i, j): opt.param_groups[j % len(opt.param_groups)]["lr"] = 1e-3 * (1 + i)


def again(opt, ps, i, j):
    for p in [p for p in opt.state if where(opt, p) is None]: del opt.state[p]
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))


EDITS = [append, remove, exchange, deal_out, new_group, added_group, reversed_order, one_group, pop, empty, look, clear,
         count, zero, strided, in_place, exchanged_data, another_dict, all_anew, weights, transposed, rate, again]
some = st.integers(0, len(SHAPES) - 1)
sequences = st.lists(st.tuples(st.lists(st.tuples(st.sampled_from(EDITS), some, some), max_size=3),
                               st.frozensets(some, max_size=2)), min_size=2, max_size=6)


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sequences)
def test_any_edits_give_what_torch_gives(name, sequence):
    sides = []
    for make in PAIRS[name]:
        ps = parameters()
        sides.append((make(ps[:4]), ps))
    for t, (edits, absent) in enumerate([([], ()), *sequence]):
        for opt, ps in sides:
            for edit, i, j in edits: edit(opt, ps, i, j)
            feed(ps, t, absent)
            opt.step()
        close(sides[0][1], sides[1][1])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("edit", EDITS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("i,j", [(0, 1), (3, 5), (5, 0)])
def test_each_edit_counts_at_the_next_step(name, edit, i, j):
    sides = []
    for make in PAIRS[name]:
        ps = parameters()
        opt = make(ps[:4])
        for t in range(6):
            if t == 3: edit(opt, ps, i, j)
            feed(ps, t)
            opt.step()
        sides.append(ps)
    close(*sides)


QUANTIZED = ["exp_avg::quantized", "exp_avg::scales", "exp_avg_sq::quantized", "exp_avg_sq::scales", "error_bits"]


@pytest.mark.parametrize("key", QUANTIZED)
@pytest.mark.parametrize("which", [0, 1])
def test_a_replaced_code_is_as_good_as_one_changed_in_place(key, which):
    ends = []
    for replace in False, True:
        ps = [nn.Parameter(torch.ones(64, device=DEVICE).bfloat16()) for _ in range(2)]
        opt = FlashAdamW(ps, lr=1e-2)
        for t in range(6):
            if t == 3:
                s = opt.state[ps[which]]
                if replace: s[key] = torch.zeros_like(s[key])
                else: s[key].zero_()
            for p in ps: p.grad = torch.full_like(p, 1.0 if t < 3 else -0.7)
            opt.step()
        ends.append(([p.detach().clone() for p in ps], opt.state_dict()["state"]))
    for p, q in zip(ends[0][0], ends[1][0]): assert torch.equal(p, q)
    for i, s in ends[0][1].items():
        for k, t in s.items(): assert torch.equal(t, ends[1][1][i][k]), k


def three(**options):
    ps = [nn.Parameter(torch.ones(8, device=DEVICE)) for _ in range(3)]
    for p in ps: p.grad = torch.ones_like(p)
    opt = FlashAdamW(ps[:2], lr=1e-2, quantize=False, **options)
    opt.step()
    return opt, ps


@pytest.mark.parametrize("one", [lambda ps: ps[0], lambda ps: nn.Parameter(torch.ones(3, dtype=torch.float64)),
                                 lambda ps: 3.0, lambda ps: ps[2] * 2, lambda ps: nn.Parameter(ps[0].data),
                                 lambda ps: nn.Parameter(torch.ones(1, device=DEVICE).expand(4))],
                         ids=["twice", "float64", "no tensor", "computed", "of another's memory", "expanded"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_what_add_param_group_refuses_is_refused_in_a_list(one, elsewhere):
    opt, ps = three()
    if elsewhere: opt.add_param_group(dict(params=[ps[2]]))
    opt.param_groups[-1]["params"].append(one(ps))
    before = [p.detach().clone() for p in ps]
    for _ in range(2):
        with pytest.raises(OptionError): opt.step()
    assert all(torch.equal(p, b) for p, b in zip(ps, before)) and all(s["step"] == 1 for s in opt.state.values())
    opt.param_groups[-1]["params"].pop()
    opt.step()
    assert not torch.equal(ps[0], before[0])


@pytest.mark.parametrize("group", [lambda ps: dict(params=[ps[2]]), lambda ps: dict(lr=1.0), lambda ps: [ps[2]],
                                   lambda ps: dict(params=iter([ps[2]])), lambda ps: dict(params=ps[2])],
                         ids=["without options", "without params", "a list", "an iterator", "a tensor"])
def test_a_group_put_in_the_list_must_be_whole(group):
    opt, ps = three()
    opt.param_groups.append(group(ps))
    before = ps[0].detach().clone()
    with pytest.raises(OptionError, match="add_param_group"): opt.step()
    assert torch.equal(ps[0], before)


@pytest.mark.parametrize("options", [dict(lr=float("nan")), dict(lr=-1.0), dict(betas=(0.9, 1.0)), dict(betas=0.9),
                                     dict(eps=float("inf")), dict(weight_decay="0.1"), dict(amsgrad=True)], ids=str)
def test_an_option_that_cannot_work_is_refused_by_the_next_step(options):
    opt, ps = three()
    kept = {k: opt.param_groups[0][k] for k in options}
    opt.param_groups[0].update(options)
    before = ps[0].detach().clone()
    for _ in range(2):
        with pytest.raises(OptionError): opt.step()
    assert torch.equal(ps[0], before)
    opt.param_groups[0].update(kept)
    opt.step()


@pytest.mark.parametrize(
    "key,wrong",
    [("exp_avg", lambda t: t.bfloat16()), ("exp_avg", lambda t: t[:4]), ("exp_avg_sq", lambda t: t.to("meta")),
     ("exp_avg_sq", lambda t: None), ("exp_avg", lambda t: 0.0), ("exp_avg", lambda t: t.to_sparse()),
     ("step", lambda t: "3"), ("step", lambda t: -1.0), ("step", lambda t: torch.ones(2)),
     ("step", lambda t: torch.tensor(float("nan"))), ("step", lambda t: True)])
@pytest.mark.parametrize("which", [0, 1])
def test_a_state_that_does_not_fit_is_refused(key, wrong, which):
    opt, ps = three()
    opt.state[ps[which]][key] = wrong(opt.state[ps[which]][key])
    before = [p.detach().clone() for p in ps]
    with pytest.raises(OptionError, match=key): opt.step()
    assert all(torch.equal(p, b) for p, b in zip(ps, before))


@pytest.mark.parametrize("step",
                         [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor(7.0, dtype=torch.float64),
                          torch.tensor(7.0).bfloat16(), nn.Parameter(torch.tensor(7.0), requires_grad=False)], ids=repr)
def test_a_number_of_steps_in_any_form(step):
    opt, ps = three()
    opt.state[ps[1]]["step"] = step
    opt.step()
    assert [float(opt.state[p]["step"]) for p in ps[:2]] == [2, 8] and float(step) == 7
    assert [float(s["step"]) for s in opt.state_dict()["state"].values()] == [2, 8]


def test_a_counter_that_groups_share_runs_once():
    opt, ps = three()
    opt.add_param_group(dict(params=[opt.param_groups[0]["params"].pop()], lr=1e-3))
    opt.add_param_group(dict(params=[ps[2]], lr=1e-3))
    for _ in range(2): opt.step()
    assert [float(opt.state[p]["step"]) for p in ps] == [3, 3, 2]
    same = torch.tensor(5.0, device=DEVICE)
    for p in ps: opt.state[p]["step"] = same
    opt.step(); opt.step()
    assert [float(opt.state[p]["step"]) for p in ps] == [7, 7, 7]
    opt.param_groups = [{**opt.param_groups[0], "params": ps}]
    opt.step_param(ps[0])
    opt.step()
    assert [float(opt.state[p]["step"]) for p in ps] == [9, 8, 8]


SHARED = {"the whole dict": lambda a, b, p, q: setattr(b, "state", a.state),
          "states": lambda a, b, p, q: b.state.update({p: a.state[p]}),
          "another's state": lambda a, b, p, q: b.state.update({q: a.state[p]}),
          "tensors": lambda a, b, p, q: b.state.update({p: dict(a.state[p])}),
          "loaded": lambda a, b, p, q: b.load_state_dict(a.state_dict())}


@pytest.mark.parametrize("share", SHARED)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("quantize", [True, False])
def test_two_optimizers_never_step_one_state(share, first, quantize):
    "Each goes on as if it were alone, from a copy that is taken where it steps next."
    def run(copied):
        gc.collect()
        ps = [nn.Parameter(torch.linspace(-1, 1, 40, device=DEVICE)) for _ in range(2)]
        both = [FlashAdamW(ps, lr=1e-2, quantize=quantize) for _ in range(2)]
        grads = [torch.randn(40, generator=torch.Generator().manual_seed(i)).to(DEVICE) for i in range(2)]

        def step(opt):
            for p, g in zip(ps, grads): p.grad = g
            opt.step()
        step(both[0])
        SHARED[share](*both, *ps)
        for n in (first, 1 - first, first, 1 - first):
            if copied and n == 1:
                both[1].state, copied = defaultdict(
                    dict, {p: {k: t.clone() for k, t in s.items()} for p, s in both[1].state.items()}), False
            step(both[n])
        return [*ps, *(t for o in both for p in ps for t in o.state[p].values())]
    for x, y in zip(run(False), run(True), strict=True): assert torch.equal(x, y)


def test_two_optimizers_never_advance_one_counter():
    opt, ps = three()
    other = FlashAdamW([ps[2]])
    other.step()
    for _ in range(2):
        other.state[ps[2]]["step"] = opt.state[ps[0]]["step"]
        other.step(); opt.step()
    assert [float(o.state[p]["step"]) for o, p in ((opt, ps[0]), (opt, ps[1]), (other, ps[2]))] == [3, 3, 3]


def test_a_copy_of_an_optimizer_is_one_of_its_own():
    opt, ps = three()
    other = copy.deepcopy(opt)
    other.step() if all(p.grad is not None for p in other.param_groups[0]["params"]) else None
    other.state[other.param_groups[0]["params"][0]] = opt.state[ps[0]]
    kept = {k: t.clone() for k, t in opt.state[ps[0]].items()}
    for p in other.param_groups[0]["params"]: p.grad = torch.ones_like(p)
    other.step()
    assert all(torch.equal(t, kept[k]) for k, t in opt.state[ps[0]].items())


def test_one_tensor_in_two_places_of_a_state():
    "Each place has its own from the next step on."
    opt, ps = three()
    z = torch.zeros(8, device=DEVICE)
    for p in ps[:2]: opt.state[p].update(exp_avg=z, exp_avg_sq=z)
    twins = [nn.Parameter(p.detach().clone()) for p in ps[:2]]
    torchs = torch.optim.AdamW(twins, lr=1e-2)
    for p in twins:
        p.grad = torch.ones_like(p)
        torchs.state[p] = dict(step=torch.tensor(1.0), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
    opt.step(); torchs.step()
    close(ps[:2], twins)
    opt.state[ps[0]]["exp_avg"] = ps[0].grad  # what somebody does who begins with the gradient
    torchs.state[twins[0]]["exp_avg"] = twins[0].grad.clone()
    for _ in range(2): opt.step(); torchs.step()
    close(ps[:2], twins)
    assert torch.equal(ps[0].grad, torch.ones(8, device=DEVICE))


def test_a_state_dict_of_edited_groups_and_states():
    opt, ps = three()
    opt.state.pop(ps[0])
    opt.state[ps[1]] = {}
    assert opt.state_dict()["state"] == {}
    opt.param_groups[0]["params"] = [ps[0], ps[2]]  # ps[1] has left
    opt.step()
    assert opt.state_dict()["state"].keys() == {0, 1} and ps[1] in opt.state
    again = FlashAdamW([ps[0], ps[2]], quantize=False)
    again.load_state_dict(opt.state_dict())
    opt.state[ps[0]]["step"] = 3
    assert opt.state_dict()["state"][0]["step"] == 3


def test_a_plain_dict_of_states():
    opt, ps = three()
    opt.state = {}
    opt.step()
    assert opt.state.keys() == {*ps[:2]} and opt.state[ps[0]]["step"] == 1
    opt.state = {ps[0]: opt.state[ps[0]], ps[1]: 3}
    with pytest.raises(OptionError, match="a int"): opt.step()


def test_a_learning_rate_that_a_scheduler_changes_makes_nothing_anew(monkeypatch):
    opt, ps = three()
    opt.step()
    made = opt._cached[None].made[0][0]
    for lr in 1e-3, 2e-3:
        opt.param_groups[0]["lr"] = lr
        opt.step()
        assert opt._cached[None].made[0][0] is made
    opt.state[ps[0]]["exp_avg"] = opt.state[ps[0]]["exp_avg"].clone()
    opt.step()
    assert opt._cached[None].made[0][0] is not made


def test_step_param_and_step_take_turns():
    "Each sees what the other did."
    sides = []
    for alone in False, True:
        ps = parameters()[:3]
        opt = (FlashAdamW(ps, lr=1e-2, quantize=False) if not alone
               else [FlashAdamW([p], lr=1e-2, quantize=False) for p in ps])
        for t in range(8):
            feed(ps, t)
            for i, p in enumerate(ps):
                if t % 2 or t == 4 and i: opt[i].step() if alone else opt.step_param(p)
            if t % 2 == 0 and t != 4:
                for o in opt if alone else [opt]: o.step()
        sides.append(ps)
    close(*sides)


@pytest.mark.parametrize("cls", [FlashAdamW, FlashLion])
def test_error_bits_know_their_dtype_when_others_were_stepped_since(cls):
    "bf16 and fp16 error bits look the same."
    ps = [nn.Parameter(torch.ones(8, device=DEVICE).bfloat16()) for _ in range(2)]
    opt = cls(ps, lr=1e-2)
    for p in ps: p.grad = torch.ones_like(p)
    opt.step()
    ps[1].grad = None
    opt.step()
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(3, device=DEVICE))]))
    ps[1].data = ps[1].data.half()
    ps[1].grad = torch.ones_like(ps[1])
    with pytest.raises(OptionError, match="another shape or dtype"): opt.step()


def test_gradients_of_another_layout_or_dtype(recwarn):
    p = nn.Parameter(torch.ones(4, 4, device=DEVICE))
    q = nn.Parameter(torch.ones(4, 4, device=DEVICE))
    opt, torchs = FlashAdamW([p], quantize=False, lr=1e-2), torch.optim.AdamW([q], lr=1e-2)
    for t, form in enumerate([lambda g: g, lambda g: g.t().contiguous().t(), lambda g: g, lambda g: g[:1].expand(4, 4),
                              lambda g: torch._neg_view(-g), lambda g: g]):
        g = torch.randn(4, 4, generator=torch.Generator().manual_seed(t)).to(DEVICE)
        p.grad, q.grad = form(g), form(g).clone()
        opt.step(); torchs.step()
        close([p], [q])
    p.grad.data = p.grad.data.double()
    opt.step(); torchs.step()
    close([p], [q])
    p.grad.data = torch.ones(2, 2, device=DEVICE)
    with pytest.raises(GradientError, match="zero_grad"): opt.step()


@pytest.mark.parametrize("taken", [["step"], ["exp_avg::quantized"], ["exp_avg_sq::scales"],
                                   ["exp_avg::quantized", "exp_avg::scales", "exp_avg_sq::quantized",
                                    "exp_avg_sq::scales"], ["error_bits"]], ids="+".join)
def test_a_checkpoint_of_a_state_of_which_something_was_taken_out(taken):
    "It goes on as the optimizer itself does."
    p = nn.Parameter(torch.linspace(-1, 1, 70).bfloat16())
    step = lambda p, opt: (setattr(p, "grad", torch.linspace(2, -1, 70).bfloat16()), opt.step())
    opt = FlashAdamW([p], lr=1e-2)
    for _ in range(3): step(p, opt)
    for key in taken: del opt.state[p][key]
    q = nn.Parameter(p.detach().clone())
    again = FlashAdamW([q], lr=1e-2)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for _ in range(2): step(p, opt); step(q, again)
    assert torch.equal(p, q) and opt.state[p]["step"] == again.state[q]["step"]


def test_a_checkpoint_after_a_momentum_was_given():
    p = nn.Parameter(torch.ones(8))
    opt = FlashSGD([p], lr=0.1)
    p.grad = torch.ones(8); opt.step()
    opt.param_groups[0]["momentum"] = 0.9
    FlashSGD([p], lr=0.1).load_state_dict(opt.state_dict())


def test_no_state_at_all_of_one_that_does_not_step():
    ps = [nn.Parameter(torch.ones(8)) for _ in range(2)]
    opt = FlashAdamW(ps)
    for p in ps: p.grad = torch.ones(8)
    opt.step()
    opt.state[ps[1]] = ps[1].grad = None
    opt.step()
    assert list(opt.state_dict()["state"]) == [0] and opt.state[ps[0]]["step"] == 2


def test_a_state_of_none_is_none_wherever_states_are_read():
    "`opt.state[p] = None` starts a parameter anew, and what reads states without stepping takes it so, too."
    model = nn.Linear(4, 3).bfloat16()
    opt = FlashAdamW(model.parameters(), check_numerics=True)
    def step():
        for p in model.parameters(): p.grad = torch.ones_like(p)
        opt.step()
    step()
    whole = opt.bytes_per_parameter()
    opt.state[model.weight] = None
    assert list(opt.state_dict()["state"]) == [1]
    assert 0 < opt.bytes_per_parameter()["masters"] < whole["masters"]
    assert torch.equal(opt.get_fp32_model_state_dict(model)["weight"], model.weight.float())
    assert list(copy.deepcopy(opt).state_dict()["state"]) == [1]
    step()
    assert opt.state[model.weight]["step"] == 1 and opt.state[model.bias]["step"] == 2
    assert opt.bytes_per_parameter() == whole


def test_options_beside_a_learning_rate_in_a_tensor_are_looked_at():
    p = nn.Parameter(torch.ones(8))
    opt = FlashAdamW([p], lr=torch.tensor(1e-2))
    p.grad = torch.ones(8); opt.step()
    opt.param_groups[0]["betas"] = (1.5, 0.9)
    with pytest.raises(OptionError, match="betas"): opt.step()


def test_who_watches_a_step_sees_it():
    "Hooks of one optimizer and of all, a profiler, and torch.compile around a training step."
    from torch.optim.optimizer import register_optimizer_step_post_hook
    opt, ps = three()
    seen = []
    handles = [opt.register_step_pre_hook(lambda *a: seen.append("before")), opt.register_step_post_hook(
                   lambda *a: seen.append("after")), register_optimizer_step_post_hook(lambda *a: seen.append("all"))]
    try: opt.step()
    finally: [h.remove() for h in handles]
    opt.step()
    assert seen == ["before", "after", "all"] and opt.state[ps[0]]["step"] == 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched: opt.step()
    assert "Optimizer.step#FlashAdamW.step" in {e.key for e in watched.key_averages()}

    def train(opt, ps):
        (ps[0] * ps[1]).sum().backward()
        opt.step()
        opt.zero_grad()
    ends = []
    for run in train, torch.compile(train, backend="eager"):
        opt, ps = three()
        for _ in range(3): run(opt, ps)
        ends.append(ps[:2])
    close(*ends)
    torch.compiler.reset()


def stepped(**options):
    p = nn.Parameter(torch.linspace(-1, 1, 64).bfloat16())
    opt = FlashAdamW([p], lr=1e-2, **options)
    p.grad = torch.ones_like(p); opt.step()
    return p, opt


@pytest.mark.parametrize(
    "name, value", [("max_norm", "x"), ("max_norm", math.nan), ("max_norm", -1.0), ("max_norm", 0),
                    ("max_norm", torch.tensor(1.0)), ("skip_nonfinite", 1), ("check_numerics", "yes"),
                    ("compress_state_dict", None), ("fused", 0), ("master_weight_bits", 24.5), ("quantize", None)])
def test_an_option_set_later_is_checked_as_one_given_at_once(name, value):
    p, opt = stepped()
    before = getattr(opt, name)
    with pytest.raises(OptionError, match=f"{name}="): setattr(opt, name, value)
    with pytest.raises(OptionError, match=f"{name}="): FlashAdamW([p], **{name: value})
    assert getattr(opt, name) == before


@pytest.mark.parametrize("name, value", [("quantize", False), ("master_weight_bits", 32), ("master_weight_bits", None),
                                         ("companded", False), ("decouple_lr", True)])
def test_what_states_are_made_by_stays(name, value):
    p, opt = stepped()
    with pytest.raises(OptionError, match="load this one's state_dict"): setattr(opt, name, value)
    setattr(opt, name, getattr(opt, name))  # the same is no change
    new = FlashAdamW([p], lr=1e-2, **{name: value}); new.load_state_dict(opt.state_dict()); new.step()
    assert getattr(new, name) == value


def test_a_limit_of_the_norm_set_later_holds_from_the_next_step():
    (p, opt), (q, twin) = stepped(), stepped(max_norm=1e6)
    opt.max_norm = twin.max_norm = 0.5
    for x, o in (p, opt), (q, twin): x.grad = torch.full_like(x, 3.0); o.step()
    assert opt.grad_norm == twin.grad_norm == 24.0 and torch.equal(p, q)
    opt.max_norm, opt.skip_nonfinite = None, None
    assert opt.skip_nonfinite is False
    p.grad.fill_(torch.nan); opt.step()
    assert p.isnan().all()


@pytest.mark.parametrize("name, value", [("max_norm", 1.0), ("skip_nonfinite", True), ("quantize", False),
                                         ("companded", False), ("master_weight_bits", 32), ("check_numerics", True)])
def test_an_option_of_the_whole_optimizer_written_into_a_group_is_refused(name, value):
    p, opt = stepped()
    opt.param_groups[0][name] = value
    with pytest.raises(OptionError, match=f"{name} in a group"): opt.step()
    assert opt.state[p]["step"] == 1


def test_an_option_in_a_loaded_group_is_not_the_new_optimizers():
    p, opt = stepped()
    # as a wrapper saves it that hands options to groups
    saved = opt.state_dict()
    saved["param_groups"][0]["max_norm"] = 1e-3
    new = FlashAdamW([p], max_norm=1e3); new.load_state_dict(saved); new.step()
    assert "max_norm" not in new.param_groups[0] and new.grad_norm == 8.0


@pytest.mark.parametrize(
    "key, value", [("lr", torch.tensor(torch.nan)), ("lr", torch.tensor(-1.0)), ("lr", torch.tensor([1e-3, 2e-3])),
                   ("lr", torch.tensor(True)), ("lr", torch.tensor(1j)), ("weight_decay", torch.tensor(torch.nan)),
                   ("eps", torch.tensor(1e-8)), ("amsgrad", torch.tensor(True))])
def test_a_tensor_that_is_no_such_number_is_refused_wherever_it_is_given(key, value):
    p, opt = stepped()
    with pytest.raises(OptionError, match=key): FlashAdamW([p], **{key: value})
    with pytest.raises(OptionError, match=key):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(3))], key: value})
    before = p.detach().clone()
    opt.param_groups[0][key] = value
    with pytest.raises(OptionError, match=key): opt.step()
    assert torch.equal(p, before) and len(opt.param_groups) == 1


@pytest.mark.parametrize(
    "lr", [torch.tensor(0.02), torch.tensor([0.02]), torch.tensor(0.02, dtype=torch.float64)], ids=str)
def test_a_learning_rate_in_a_tensor_is_the_number(lr):
    (p, opt), (q, twin) = stepped(), stepped()
    opt.param_groups[0]["lr"], twin.param_groups[0]["lr"] = lr, 0.02
    for o in (opt, twin): o.step()
    assert torch.equal(p, q)


@pytest.mark.skipif(DEVICE == "cpu" and not os.environ.get("TRITON_INTERPRET"), reason="needs the kernels")
def test_other_memory_for_a_state_in_the_middle_is_seen_after_invalidate():
    def train(change):
        ps = [nn.Parameter(torch.linspace(-1, 1, 64, device=DEVICE)) for _ in range(5)]
        opt = FlashAdamW(ps, lr=1e-2, quantize=False)
        for t in range(2): feed(ps, t); opt.step()
        change(opt, opt.state[ps[2]]["exp_avg"])
        feed(ps, 2); opt.step()
        return ps
    def exchanged(opt, t): t.data = t.data * 0.5; opt.invalidate()
    for p, q in zip(train(exchanged), train(lambda opt, t: t.mul_(0.5)), strict=True): assert torch.equal(p, q)


@pytest.mark.parametrize("cls", [FlashAdamW, FlashLion, FlashSGD])
@pytest.mark.parametrize("later", [False, True])
def test_a_slip_in_an_options_name_is_answered_and_a_key_of_ones_own_is_kept(cls, later):
    "As in torch.optim a group has what keys a user likes, but not what was meant for an option."
    def made(**more):
        group = dict(params=[nn.Parameter(torch.ones(3, device=DEVICE))], **more)
        if not later: return cls([group])
        opt = cls([nn.Parameter(torch.ones(3, device=DEVICE))])
        opt.add_param_group(group)
        return opt
    for wrong, meant in {"weight_decy": "weight_decay", "weigth_decay": "weight_decay", "lrr": "lr", "LR": "lr",
                         "quantise": "quantize"}.items():
        with pytest.raises(OptionError, match=f"{wrong!r} in a group: did you mean {meant!r}"): made(**{wrong: 0.1})
    own = dict(name="norms", layer_id=3, initial_lr=1.0, max_lr=2.0, lr_scale=0.5, base_momentum=0.8, max_momentum=0.9)
    opt = made(**own)
    assert opt.param_groups[-1].items() >= own.items()
    torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, 10, cycle_momentum=cls is not FlashSGD)


def test_each_public_class_and_function_says_how_it_is_used():
    import flashoptim_nb.optim as optim
    named = [x for name, x in vars(optim).items() if name.startswith("Flash") and x is not optim.FlashOptimizer]
    for x in (*named, optim.AveragedMasters, optim.cast_model, optim.enable_gradient_release, optim.muon_groups):
        assert f"{x.__name__}(" in x.__doc__, x


def copied(groups): return [{**group, "params": [*group["params"]]} for group in groups]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("options, odd", [
    ({}, dict(lr=-1.0)), ({}, dict(lr="fast")), ({}, dict(weight_decay=float("nan"))), ({}, dict(lrr=1.0)),
    ({}, dict(twice=True)), (dict(decouple_lr=True, weight_decay=0.1), dict(lr=0.0))], ids=str)
def test_a_group_that_is_refused_changes_nothing(name, options, odd):
    "Neither the optimizer nor the dict that was given."
    p, q = (torch.nn.Parameter(torch.ones(3, 2)) for _ in "pq")
    try: opt = MAKERS[name]([p], lr=0.1, **options)
    except OptionError: pytest.skip("it has no decay apart from its gradient")
    group = dict(params=iter([p if odd.get("twice") else q]), weight_decay=0.1) | odd
    keys, before = group.keys() - {"params"}, copied(opt.param_groups)
    stated = {key: group[key] for key in keys}
    if "twice" in odd: group.pop("twice"), stated.pop("twice")
    with pytest.raises((OptionError, TypeError, ValueError)): opt.add_param_group(group)
    assert copied(opt.param_groups) == before and group.keys() - {"params"} == stated.keys()
    assert all(group[key] is stated[key] for key in stated) and len(group["params"]) == 1
    opt.add_param_group(dict(params=[q], lr=0.1))
    assert len(opt.param_groups) == 2


def test_a_group_that_is_called_muons_afterwards_is_refused():
    p = nn.Parameter(torch.ones(4, 4))
    opt = FlashAdamW([p])
    p.grad = torch.ones(4, 4)
    opt.step()
    opt.param_groups[0]["algorithm"] = "muon"
    with pytest.raises(OptionError, match="use FlashMuon"): opt.step()


@pytest.mark.parametrize("check_numerics", [False, True])
def test_a_schedule_that_ends_at_zero_may_end_below_it_by_its_rounding(check_numerics):
    "torch's LinearLR from a third to 0 ends at -3e-20; what is truly negative is refused by a step and by a load."
    def train(cls, **also):
        p = nn.Parameter(torch.ones(64))
        opt = cls([p], lr=1e-3, **also)
        schedule = torch.optim.lr_scheduler.LinearLR(opt, start_factor=1 / 3, end_factor=0.0, total_iters=10)
        for _ in range(12):
            p.grad = torch.ones(64); opt.step(); schedule.step()
        return p, opt
    (p, opt), (q, _) = train(FlashAdamW, quantize=False, check_numerics=check_numerics), train(torch.optim.AdamW)
    assert -1e-12 < opt.param_groups[0]["lr"] < 0
    close([p], [q])
    again = FlashAdamW([nn.Parameter(torch.ones(64))], lr=1e-3)
    again.load_state_dict(opt.state_dict())
    opt.param_groups[0]["lr"] = -1e-11
    with pytest.raises(OptionError, match="0 or more"): opt.step()
    with pytest.raises(OptionError, match="decouple_lr=True with lr=0"):  # which it would be divided by
        FlashAdamW([nn.Parameter(torch.ones(4))], lr=-3e-20, weight_decay=0.1, decouple_lr=True)


def test_what_setstate_is_not_given_stays():
    "As torch.optim's own load does, and people who throw all states away: `rounding` fell back to an old pickle's."
    opt, ps = three()
    feed(ps, 0); opt.step()
    opt.max_norm, opt.rounding = 2.0, "dithered"
    groups = opt.param_groups
    opt.__setstate__(dict(state=defaultdict(dict)))
    assert (opt.rounding, opt.max_norm) == ("dithered", 2.0) and opt.param_groups is groups
    feed(ps, 1); opt.step()
    assert all(opt.state[p]["step"] == 1 for g in opt.param_groups for p in g["params"])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))], ids=["deepcopy", "pickle"])
def test_a_copy_takes_a_state_for_a_parameter_without_one(copied):
    opt = copied(FlashAdamW([nn.Parameter(torch.ones(4))]))
    (p,) = opt.param_groups[0]["params"]
    opt.state[p]["slow"] = p.detach().clone()
    p.grad = torch.ones(4); opt.step()
    assert {"slow", "step"} <= opt.state[p].keys()


@pytest.mark.parametrize("check_numerics", [False, True])
def test_a_counter_that_others_share_is_not_written_into(check_numerics):
    "The idiom that begins one layer afresh began its whole group afresh; in torch each parameter counts by itself."
    def both():
        for make in (FlashAdamW, torch.optim.AdamW):
            also = dict(quantize=False, check_numerics=check_numerics) if make is FlashAdamW else {}
            yield make(ps := parameters(), lr=1e-2, **also), ps
    (ours, mine), (theirs, its) = both()
    def step(*pairs, t):
        for opt, ps in pairs: feed(ps, t); opt.step()
    step((ours, mine), (theirs, its), t=0)
    def reset(opt, ps):
        for p in ps:
            for x in opt.state[p].values(): x.zero_()
    reset(ours, mine); reset(theirs, its)  # all of them: each is written into once
    step((ours, mine), (theirs, its), t=1)
    close(mine, its)
    for opt, ps in (ours, mine), (theirs, its):  # a program that writes into each tensor once means all of them, and says so
        for x in {id(x): x for p in ps for x in opt.state[p].values()}.values(): x.zero_()
    feed(mine, 2)
    with pytest.raises(OptionError, match="invalidate"): ours.step()
    ours.invalidate()
    step((ours, mine), (theirs, its), t=2)
    close(mine, its)
    reset(ours, mine[1:3])
    before = [p.detach().clone() for p in mine]
    feed(mine, 3)
    for _ in range(2):
        with pytest.raises(OptionError, match="share"): ours.step()
    assert all(map(torch.equal, mine, before))
    reset(theirs, its[1:3])
    for p in mine[1:3]: ours.state[p]["step"] = torch.zeros(())
    for p in mine[:1] + mine[3:]: ours.state[p]["step"] = torch.full((), 1.0)
    step((ours, mine), (theirs, its), t=3)
    ours.state[mine[0]].clear(); theirs.state[its[0]].clear()
    step((ours, mine), (theirs, its), t=4)
    close(mine, its)


def test_steps_under_inference_mode_go_on():
    "Where torch counts no writes into a tensor."
    ours, theirs = parameters(), parameters()
    for opt, ps in (FlashAdamW(ours, lr=1e-2, quantize=False), ours), (torch.optim.AdamW(theirs, lr=1e-2), theirs):
        with torch.inference_mode():
            for t in range(3): feed(ps, t); opt.step()
    close(ours, theirs)
