"""The cast: what it leaves exact, what goes on running, and what reaches the masters, on one rank and on two."""
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.optim import AveragedMasters, FlashAdamW, FlashLion, FlashSGD, cast_model, enable_gradient_release
from processes import on_ranks, ranks_agree

HALF_FORMATS = [torch.bfloat16, torch.float16]


def masters(model): return FlashAdamW(model.parameters()).get_fp32_model_state_dict(model)


class Owner(nn.Module):
    "A module with one buffer, and a rule of how it is used."
    def __init__(self, value, use, **register):
        super().__init__()
        self.use = use
        self.register_buffer("value", value, **register)

    def forward(self, *x): return self.use(self.value, *x)


BUFFERS_ALONE = dict(
    positions=(torch.randn(16, 8), lambda v, x: x + v[: len(x)]),
    fourier=(torch.randn(8, 8), lambda v, x: (x @ v).cos()),
    codebook=(torch.randn(16, 8), lambda v, x: v[torch.cdist(x, v).argmin(1)]),
    standardize=(torch.rand(8) + 1, lambda v, x: x / v),
    mask=(torch.full((16, 8), torch.finfo(torch.float32).min).triu(1), lambda v, x: (x + v).softmax(-1)),
)


@pytest.mark.parametrize("dtype", HALF_FORMATS)
@pytest.mark.parametrize("kind", BUFFERS_ALONE)
@pytest.mark.parametrize("persistent", [True, False])
def test_a_module_of_buffers_alone_computes_exactly_and_the_model_runs(kind, dtype, persistent, rng_seed):
    value, use = BUFFERS_ALONE[kind]
    model = nn.Sequential(nn.Linear(8, 8), Owner(value.clone(), use, persistent=persistent), nn.Linear(8, 4))
    cast_model(model, dtype)
    assert torch.equal(model[1].value, value) and model[1].value.dtype == torch.float32
    x = torch.randn(16, 8).to(dtype)
    h = model[0](x)
    assert torch.equal(model[1](h), use(value, h.float()).to(dtype))
    assert model(x).dtype == dtype
    model(x).float().sum().backward()


@pytest.mark.parametrize("dtype", HALF_FORMATS)
def test_positions_stay_apart_and_counts_go_on(dtype):
    angles = Owner(1e4 ** -(torch.arange(0, 64, 2) / 64), lambda v, at: at[:, None] * v, persistent=False)
    model = nn.Sequential(angles, nn.Linear(32, 4))
    model.register_buffer("seen", torch.zeros(()))
    at = torch.arange(100_000)
    exact = angles(at)
    cast_model(model, dtype)
    assert torch.equal(angles(at), exact)
    for _ in range(3000): model.seen += 1
    assert model.seen == 3000


@pytest.mark.parametrize(
    "normalized",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
def test_parametrized_weights_train(normalized, rng_seed):
    model = nn.Sequential(normalized(nn.Linear(16, 16)), nn.Linear(16, 1))
    x = torch.randn(8, 16)
    for _ in range(50): model(x)  # power iterations
    exact = model.eval()(x)
    cast_model(model)
    assert (model(x.bfloat16()) - exact).abs().max() < 0.05
    optimizer = FlashAdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(loss := (model(x.bfloat16()).float() - 1).square().mean())
        loss.backward(); optimizer.step(); optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("selective", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_with_running_statistics_run(selective, affine):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, affine=affine), nn.Linear(8, 8))
    cast_model(model, selective=selective)
    assert model(torch.randn(4, 8).bfloat16()).dtype == torch.bfloat16
    assert model[1].running_mean.dtype == (torch.float32 if selective else torch.bfloat16)


def test_a_norm_inside_a_block_in_full_precision_hands_on_fp32():
    block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model = nn.Sequential(nn.Linear(8, 8), block)
    cast_model(model, full_precision_layers=["1"])
    assert model(torch.randn(4, 8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("name", ["Llama", "GPT2", "Qwen2", "Gemma", "GPTNeoX"])
def test_transformers_models_keep_their_frequencies_and_train(name, rng_seed):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    for cls in ("ForCausalLM", "LMHeadModel"):
        if hasattr(transformers, name + cls): model = getattr(transformers, name + cls)(config)
    buffers = {n: b.clone() for n, b in model.named_buffers()}
    ids = torch.randint(3, 60, (2, 16))
    exact = model.eval()(ids).logits
    cast_model(model)
    out = model(ids, labels=ids)
    for n, b in model.named_buffers(): assert torch.equal(b, buffers[n]) and b.dtype == buffers[n].dtype, n
    assert out.logits.dtype == torch.bfloat16 and (out.logits - exact).abs().max() < 0.05 * exact.abs().max()
    out.loss.backward()
    FlashAdamW(model.parameters()).step()


@pytest.mark.parametrize("dtype", HALF_FORMATS)
def test_what_is_not_floating_point_or_frozen_is_left_or_cast_without_masters(dtype):
    model = nn.Module()
    model.codes = nn.Parameter(torch.arange(4, dtype=torch.int8), requires_grad=False)
    model.phases = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    model.eighth = nn.Parameter(torch.ones(4).to(torch.float8_e4m3fn), requires_grad=False)
    model.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
    model.wide = nn.Parameter(torch.full((4,), 1 / 3, dtype=torch.float64))
    model.listed = nn.ParameterList([torch.randn(3), torch.randn(3)])
    cast_model(model, dtype)
    assert [p.dtype for p in model.parameters()] == [
        torch.int8, torch.complex64, torch.float8_e4m3fn, dtype, dtype, dtype, dtype]
    assert (FlashAdamW([model.wide]).get_fp32_model_state_dict(model)["wide"] - 1 / 3).abs().max() < 1e-5


@pytest.mark.parametrize(
    "value,dtype,limit",
    [(1e5, torch.float16, None), (65504.0, torch.float16, 65504.0), (3.4e38, torch.bfloat16, 3.3895313892515355e38),
     (float("-inf"), torch.float16, float("-inf"))])
def test_a_large_weight_stays_finite_or_is_refused_by_name(value, dtype, limit):
    model = nn.Linear(2, 2)
    with torch.no_grad(): model.weight[0, 1] = value
    before = {n: p.dtype for n, p in model.named_parameters()}
    if limit is None:
        with pytest.raises(UserError, match="weight has a value of size 1e\\+05"): cast_model(model, dtype)
        assert {n: p.dtype for n, p in model.named_parameters()} == before
    else:
        cast_model(model, dtype)
        assert model.weight[0, 1].item() == limit


def test_a_parameter_that_is_a_view_of_a_buffer_is_refused_or_cast_with_it():
    def made():
        model = nn.Linear(4, 4)
        model.register_buffer("shadow", model.weight.data.view(-1))
        return model
    model = made()
    with pytest.raises(UserError, match="the same memory"): cast_model(model)
    assert model.weight.dtype == torch.float32
    cast_model(model, cast_buffers=["shadow"])
    with torch.no_grad(): model.weight[1, 1] = 3
    assert model.shadow[5] == 3


@pytest.mark.parametrize("first,second", [HALF_FORMATS, HALF_FORMATS[::-1]])
def test_a_second_cast_starts_from_the_weights_of_the_first(first, second, rng_seed):
    model = nn.Linear(64, 64)
    exact = model.weight.detach().clone()
    cast_model(model, first); cast_model(model, first); cast_model(model, second)
    assert model.weight.dtype == second
    off = (masters(model)["weight"] - exact).abs().max()
    assert off < 0.05 * (exact.to(torch.bfloat16) - exact).abs().max()


@pytest.mark.parametrize("change", [nn.Module.float, nn.Module.half, nn.Module.double, nn.Module.bfloat16,
                                    lambda m: m.to(torch.float16), copy.deepcopy, torch.compile])
def test_layers_in_full_precision_follow_what_is_done_to_the_model(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.table, self.mid, self.norm, self.out = nn.Embedding(9, 8), Owner(
                torch.randn(8, 8), lambda v, x: x + v), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, i): return self.out(self.norm(self.mid(self.table(self.embed(i)))))

    model = Net()
    cast_model(model, full_precision_recast_layers=["embed"])
    model = change(model, backend="eager", fullgraph=True) if change is torch.compile else change(model)
    assert (
        model(torch.arange(8)).dtype == next(p.dtype for n, p in model.named_parameters() if n.endswith("out.weight")))


def test_a_compiled_model_is_cast_under_its_own_names():
    model = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)), backend="eager")
    cast_model(model, full_precision_layers=["2"])
    assert model(torch.randn(4, 8).bfloat16()).dtype == torch.float32


def test_a_gradient_at_hand_is_cast_with_its_weight():
    model = nn.Linear(4, 4)
    model(torch.randn(2, 4)).sum().backward()
    cast_model(model)
    assert model.weight.grad.dtype == torch.bfloat16
    FlashAdamW(model.parameters()).step()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("decay", [0.99, None])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_an_average_of_masters_is_that_of_an_fp32_run(device, decay, tied):
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    if tied: start[2].weight = start[0].weight
    x = torch.randn(128, 16)
    y = x.sum(1, keepdim=True).sin()
    start, x, y = start.to(device), x.to(device), y.to(device)

    def loss(model): return (model(x.to(next(model.parameters()).dtype)).float() - y).square().mean()
    def mean_after(model, optimizer, update, steps=100):
        for _ in range(steps):
            loss(model).backward(); optimizer.step(); optimizer.zero_grad(); update()

    exact = copy.deepcopy(start)
    how = dict(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)) if decay else {}
    theirs = torch.optim.swa_utils.AveragedModel(exact, **how)
    mean_after(exact, torch.optim.AdamW(exact.parameters(), lr=3e-3), lambda: theirs.update_parameters(exact))
    model = copy.deepcopy(start)
    cast_model(model)
    optimizer = FlashAdamW(model.parameters(), lr=3e-3)
    ours = AveragedMasters(optimizer, model, decay=decay)
    with pytest.warns(UserWarning, match="AveragedMasters"): still = torch.optim.swa_utils.AveragedModel(model, **how)
    twin, mean = copy.deepcopy(start), torch.optim.swa_utils.AveragedModel(copy.deepcopy(start), **how)

    def update():
        ours.update(); still.update_parameters(model)
        twin.load_state_dict(optimizer.get_fp32_model_state_dict(model)); mean.update_parameters(twin)
    mean_after(model, optimizer, update)
    twin.load_state_dict(ours.model_state_dict())
    far = [max((p - q).abs().max().item() for p, q in zip(m.parameters(), mean.module.parameters()))
           for m in (twin, still.module)]
    assert far[0] < 1e-5 and far[1] > 0.01, far
    assert abs(loss(twin) - loss(theirs)) < 0.1 * (loss(start) - loss(theirs))


def test_an_average_before_the_first_step_is_of_the_weights_that_were_cast():
    model = nn.Linear(32, 32)
    exact = model.weight.detach().clone()
    cast_model(model)
    average = AveragedMasters(FlashAdamW(model.parameters()), model)
    average.update()
    assert (
        (average.model_state_dict()["weight"] - exact).abs().max() < 0.02 * (exact - model.weight.float()).abs().max())


@pytest.mark.parametrize("change", [lambda model, opt: model.half(), lambda model, opt: model.float(),
                                    lambda model, opt: opt.add_param_group(dict(params=[nn.Parameter(torch.ones(3))])),
                                    lambda model, opt: opt.param_groups[0].update(
                                        params=[nn.Parameter(p.detach().clone()) for p in model.parameters()])],
                         ids=["half", "float", "added", "replaced"])
def test_an_average_of_what_the_optimizer_no_longer_steps_is_refused(change):
    model = nn.Linear(4, 2); cast_model(model)
    opt = FlashAdamW(model.parameters())
    average = AveragedMasters(opt, model)
    model(torch.ones(1, 4).bfloat16()).float().sum().backward(); opt.step(); average.update()
    before = {name: t.clone() for name, t in average.average.items()}
    change(model, opt)
    with pytest.raises(ValueError, match="anew|a new AveragedMasters"): average.update()
    assert all(torch.equal(t, before[name]) for name, t in average.average.items())


@pytest.mark.parametrize("make", [FlashLion, lambda p: FlashSGD(p, lr=0.1, momentum=0.9)])
def test_averages_of_mixed_models(make):
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    cast_model(model)
    optimizer = make(model.parameters())
    average, seen = AveragedMasters(optimizer, model, decay=None), []
    for _ in range(4):
        model(torch.randn(16, 8).bfloat16()).float().square().sum().backward(); optimizer.step(); optimizer.zero_grad()
        average.update(); seen.append(optimizer.get_fp32_model_state_dict(model))
    found = average.model_state_dict()
    for name, _ in model.named_parameters():
        torch.testing.assert_close(found[name], torch.stack([s[name] for s in seen]).mean(0))
    assert torch.equal(found["1.running_mean"], model[1].running_mean)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ZeroDivisionError), average.applied():
        assert (torch.equal(model[0].weight, found["0.weight"].bfloat16())
                and torch.equal(model[1].weight, found["1.weight"]))
        1 / 0
    for name, t in model.state_dict().items(): assert torch.equal(t, before[name]), name


def test_an_average_goes_on_after_pickle_as_without():
    "Model, optimizer and average in one file, as one pickles a trainer."
    model = nn.Linear(8, 8)
    cast_model(model)
    optimizer = FlashAdamW(model.parameters(), lr=0.1)
    one = model, optimizer, AveragedMasters(optimizer, model, 0.5)
    def go(model, optimizer, average):
        model(torch.ones(2, 8, dtype=torch.bfloat16)).float().square().mean().backward()
        optimizer.step(); optimizer.zero_grad(); average.update()
    go(*one)
    two = pickle.loads(pickle.dumps(one))
    for _ in range(3): go(*one); go(*two)
    for name, mean in one[2].model_state_dict().items(): assert torch.equal(mean, two[2].model_state_dict()[name])


def test_while_averages_are_in_place_nothing_counts_on_the_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    cast_model(model)
    optimizer = FlashAdamW(model.parameters())
    average = AveragedMasters(optimizer, model)
    x = torch.randn(4, 8).bfloat16()
    model(x).float().sum().backward(); optimizer.step(); optimizer.zero_grad(); average.update()
    saved = optimizer.state_dict()
    whole, handle = optimizer.get_fp32_model_state_dict(model), enable_gradient_release(model, optimizer)
    with average.applied():
        for what in (lambda: optimizer.get_fp32_model_state_dict(model),
                     lambda: optimizer.set_fp32_model_state_dict(model, whole), average.update,
                     optimizer.state_dict, lambda: optimizer.load_state_dict(saved),
                     lambda: average.applied().__enter__(), lambda: model(x).float().sum().backward()):
            with pytest.raises(UserError, match="leave applied"): what()
    handle.remove()
    for p in model.parameters(): p.grad = None
    for name, t in optimizer.get_fp32_model_state_dict(model).items(): assert torch.equal(t, whole[name])
    average.update()


def test_a_parameter_at_anothers_former_address_takes_nothing_from_its_place():
    kept = []
    for _ in range(10):
        model = nn.Sequential(nn.Linear(8, 8, bias=False))
        weights = model[0].weight.detach().clone()
        cast_model(model)
        model[0].weight = nn.Parameter(model[0].weight.detach().clone())
        other = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))  # as a rule where the first had been
        opt = FlashAdamW([other, *model.parameters()], lr=0.0)
        for p in (other, model[0].weight): p.grad = torch.zeros_like(p)
        opt.step()
        torch.testing.assert_close(opt.get_fp32_model_state_dict(model)["0.weight"], weights, rtol=2.0**-15, atol=1e-8)
        kept.append((model, opt))


@pytest.mark.parametrize("how", ("tied", "parametrized", "pruned"))
def test_masters_know_what_the_cast_took_wherever_the_parameter_is_by_then(how):
    for _ in range(8):  # by the order of addresses
        model = nn.ModuleDict(dict(emb=nn.Embedding(64, 32), head=nn.Linear(32, 64, bias=False)))
        weights = model.head.weight.detach().clone()
        cast_model(model)
        if how == "tied": model.emb.weight = model.head.weight
        if how == "parametrized": parametrize.register_parametrization(model.head, "weight", nn.Identity())
        if how == "pruned": prune.identity(model.head, "weight")
        masters = FlashAdamW(model.parameters()).get_fp32_model_state_dict(model)
        found = next(t for name, t in masters.items() if name.startswith("head") and "mask" not in name)
        torch.testing.assert_close(found, weights, rtol=2.0**-15, atol=1e-8)


RANK = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.optim import AveragedMasters, FlashAdamW, cast_model

kind = sys.argv[1]
dist.init_process_group("gloo" if kind == "cpu" else "nccl")
if kind == "cuda": torch.cuda.set_device(dist.get_rank())
mesh = init_device_mesh(kind, (2,))

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(38, 13), nn.BatchNorm1d(13), nn.Linear(13, 1), nn.Linear(1, 4)).to(kind)  # 7 and 6 rows; 1 and 0; 2 and 2

def shard(model, columns=False):
    for part in model: fully_shard(part, mesh=mesh, shard_placement_fn=lambda p: Shard(1) if columns and p.ndim == 2 and p.shape[1] % 2 == 0 else None)
    return fully_shard(model, mesh=mesh)

def whole(t): return t.full_tensor() if hasattr(t, "full_tensor") else t

exact = {n: p.detach().clone() for n, p in net().named_parameters()}
x = torch.randn(8, 38, device=kind, generator=torch.Generator(kind).manual_seed(1)).bfloat16()

for order in ("cast, shard", "cast, shard by columns", "shard, cast", "shard, cast, cast", "cast, shard, load"):
    model = net()
    for act in order.split(", "):
        if act == "cast": cast_model(model, torch.float16 if order == "shard, cast, cast" and model[0].weight.dtype == torch.float32 else torch.bfloat16)
        elif act == "load": model.load_state_dict({n: t * 2 for n, t in model.state_dict().items()})
        else: model = shard(model, act != "shard")
    for p in model.parameters(): assert p.dtype == p.to_local().dtype
    optimizer = FlashAdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    loaded = "load" in order
    far = {n: (whole(t) - exact[n] * (2 if loaded else 1)).abs().max().item() for n, t in optimizer.get_fp32_model_state_dict(model).items() if n in exact}
    model(x).float().square().sum().backward()
    optimizer.step()
    stepped = {n: (whole(t) - exact[n] * (2 if loaded else 1)).abs().max().item() for n, t in optimizer.get_fp32_model_state_dict(model).items() if n in exact}
    coarse = (exact["0.weight"] - exact["0.weight"].bfloat16()).abs().max().item()
    assert far == stepped, (order, far, stepped)
    if loaded: assert far["0.weight"] > 0.5 * coarse, far
    else: assert max(far.values()) < 0.05 * coarse, (order, far)

def averaged(model):
    optimizer = FlashAdamW(model.parameters(), lr=1e-2)
    average = AveragedMasters(optimizer, model, decay=0.9)
    for _ in range(5):
        model(x).float().square().sum().backward(); optimizer.step(); optimizer.zero_grad(); average.update()
    again = AveragedMasters(optimizer, model)
    again.load_state_dict(average.state_dict())
    with torch.no_grad():
        ask = lambda: (model(x), hasattr(model, "reshard") and model.reshard())[0]
        usual = ask()
        model(x)  # leaves what fully_shard gathered last as it is
        with again.applied(): left = model(x)
        assert torch.equal(model(x), usual) and not torch.equal(left, usual)
        with again.applied(): assert torch.equal(ask(), left)
    return {n: whole(t) for n, t in again.model_state_dict().items() if n in exact}

one, two = net(), net()
cast_model(one); cast_model(two)
one, two = averaged(one), averaged(shard(two))
for n in exact: assert (one[n] - two[n]).abs().max() < 2e-2, (n, (one[n] - two[n]).abs().max())  # the gradients of two ranks are averaged in bf16

model = shard(net())
model(x.float())
try: cast_model(model)
except UserError as error: assert "before its first forward pass" in str(error)
else: raise AssertionError("a model that ran sharded was cast")

model = net(); cast_model(model)
ddp = nn.parallel.DistributedDataParallel(model)
ddp(x).float().square().sum().backward()
assert model[0].weight.grad.dtype == torch.bfloat16
FlashAdamW(model.parameters()).step()
print("rank agrees")
dist.destroy_process_group()
"""


def test_what_the_cast_adds_lies_where_the_model_lies():
    "DistributedDataParallel sends all buffers around, over NCCL those of the GPU alone."
    with torch.device("meta"): model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    cast_model(model, full_precision_layers=["2"])
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


@on_ranks(2)
def test_what_the_cast_rounds_away_reaches_the_masters_of_shards(kind, tmp_path):
    ranks_agree(RANK, 2, kind, tmp_path)


REPLICA = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from flashoptim_nb.optim import FlashAdamW, cast_model

kind = sys.argv[1]
dist.init_process_group("gloo" if kind == "cpu" else "nccl")
rank = dist.get_rank()
if kind == "cuda": torch.cuda.set_device(rank)

def spread(t):
    other = t.clone()
    dist.broadcast(other, 0)
    return (t != other).sum().item()

def early(opt, model): opt.state_dict()  # as Accelerate asks for

def without_counters(opt, model):
    "Lower bits are in the states alone, which have not begun to count."
    opt.set_fp32_model_state_dict(model, opt.get_fp32_model_state_dict(model))
    for state in opt.state.values(): del state["step"]

def trained(cast=cast_model, ignored=(), before=lambda opt, model: None):
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)).to(kind)
    cast(model)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    opt = FlashAdamW(model.parameters(), lr=1e-5)
    before(opt, model)
    DistributedDataParallel(model)
    whole = torch.cat([t.flatten() for t in opt.get_fp32_model_state_dict(model).values()])
    for n in range(20):
        for p in model.parameters(): p.grad = torch.full_like(p, 0.1 * (n % 3 - 1))
        opt.step()
    return {name: spread(t) for name, t in opt.get_fp32_model_state_dict(model).items()}, whole

for before in lambda opt, model: None, early, without_counters:
    apart, begun = trained(before=before)
    assert not any(apart.values()) and (begun != begun.bfloat16()).any(), apart
for some in lambda model: cast_model(model, masters=rank == 0), lambda model: cast_model(model) if rank == 0 else model.bfloat16():
    assert not any(trained(some)[0].values())  # none has any
apart, begun = trained(ignored=["0.weight"])
assert (apart.pop("0.weight") > 0) == (rank == 1) and not any(apart.values()), apart  # of its own, with its own lower bits
assert (begun[:32 * 64] != begun[:32 * 64].bfloat16()).any()
if rank == 0: cast_model(nn.Linear(2, 2))
DistributedDataParallel(nn.Linear(2, 2).to(kind))  # a model that nobody cast

print("rank agrees")
dist.destroy_process_group()
"""

@on_ranks(2)
def test_replicas_of_ranks_that_were_seeded_otherwise_stay_alike(kind, tmp_path):
    ranks_agree(REPLICA, 2, kind, tmp_path)


def kept_bytes(model):
    return sum(kept.error_bits.nbytes + kept.fold.nbytes for m in model.modules()
               for kept in m.__dict__.get("_cast_error_bits", {}).values())


def test_what_is_frozen_keeps_nothing_once_it_is_cast_again():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    cast_model(model)
    model[0].requires_grad_(False)
    whole = kept_bytes(model)
    cast_model(model)
    assert kept_bytes(model) == whole / 2 > 0


def test_compiled_code_that_makes_modules_does_not_meet_the_hook_that_watches_wrappers():
    "Compiled autograd makes modules of its own while it compiles."
    model = nn.Linear(4, 1)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(compiled_autograd=True):
        torch.compile(lambda x: model(x).sum().backward(), backend="eager")(torch.ones(2, 4))
    assert torch.equal(model.weight.grad, torch.full((1, 4), 2.0))
    made = torch.compile(lambda x: nn.Sequential(nn.ReLU())(x), backend="eager", fullgraph=True)
    assert torch.equal(made(torch.ones(2)), torch.ones(2))
