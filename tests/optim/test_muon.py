"""FlashMuon: torch.optim.Muon's steps in 4.06 bytes a value, alone, released, resumed, in Triton and on several ranks."""
import copy
import io

import pytest
import torch
from torch import nn

import flashoptim_nb.optim.muon as muon
from flashoptim_nb.optim import FlashMuon, NumericsError, OptionError, cast_model, enable_gradient_release, muon_groups
from flashoptim_nb.optim.muon_kernel import newton_schulz, newton_schulz_stack, symmetric_reference
from flashoptim_nb.optim.split import decode
from processes import on_ranks, ranks_agree

SHAPES = [(16, 16), (33, 7), (7, 33), (40, 24), (16, 16), (1, 5)]
on_gpu = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])


def matrices(shapes=SHAPES, dtype=torch.float32, seed=0, device="cpu"):
    rng = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=rng).to(device, dtype)) for s in shapes]


def step(opt, params, n):
    rng = torch.Generator().manual_seed(n)
    for p in params: p.grad = torch.randn(p.shape, generator=rng).to(p.device, p.dtype)
    opt.step()


def weights(opt, p):
    error_bits = opt.state[p].get("error_bits")
    return p.detach() if error_bits is None else decode(p.detach(), error_bits)


def way(a, b, start): return ((a.float() - b.float()).norm() / (b.float() - start.float()).norm()).item()


@devices
@pytest.mark.parametrize("options", [
    {}, dict(nesterov=False), dict(adjust_lr_fn="match_rms_adamw"), dict(adjust_lr_fn="original"), dict(ns_steps=0),
    dict(ns_steps=2, eps=1e-2), dict(weight_decay=0.0, momentum=0.0), dict(ns_coefficients=(2.0, -1.5, 0.5))], ids=str)
def test_it_is_torchs_muon(device, options):
    "fp32: to the bit where both take one matrix after the other; stacks within bf16's rounding."
    ours, theirs = matrices(device=device), matrices(device=device)
    start = [p.detach().clone() for p in ours]
    a, b = FlashMuon(ours, lr=1e-2, quantize=False, **options), torch.optim.Muon(theirs, lr=1e-2, **options)
    for n in range(6): step(a, ours, n); step(b, theirs, n)
    for p, q, s in zip(ours, theirs, start):
        assert torch.equal(p, q) if device == "cpu" else way(p, q, s) < 0.02, (p.shape, options)


@devices
def test_in_four_bytes_it_stays_close(device):
    ours = matrices(dtype=torch.bfloat16, device=device)
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    start = [p.detach().clone() for p in theirs]
    a, b = FlashMuon(ours, lr=1e-2), torch.optim.Muon(theirs, lr=1e-2)
    for n in range(20): step(a, ours, n); step(b, theirs, n)
    for p, q, s in zip(ours, theirs, start): assert way(weights(a, p), q, s) < 0.25, p.shape


@devices
def test_a_stack_is_as_near_as_the_published_iteration(device):
    for shape in (64, 64), (48, 160), (160, 48), (130, 70), (5, 300):
        rng = torch.Generator().manual_seed(0)
        u = torch.randn(4, *shape, generator=rng).to(device, torch.bfloat16)
        if device == "cpu":
            from flashoptim_nb.optim.muon_kernel import symmetric_reference as halves
        else: halves = None
        true = torch.stack([newton_schulz(x.double(), dtype=torch.float64) for x in u])
        off = lambda x: (x.double() - true).norm().item()
        assert off(newton_schulz_stack(u.clone(), halves=halves)) < 2 * off(torch.stack([newton_schulz(x) for x in u]))


@devices
@pytest.mark.parametrize("options", [
    dict(max_norm=0.5), dict(quantize=False, nesterov=False), dict(master_weight_bits=32, maximize=True, ns_steps=1)],
    ids=str)
def test_fused_is_the_reference(device, options, monkeypatch):
    "The kernels where there are some; stacks of one matrix and of several."
    from flashoptim_nb.optim.backend import INTERPRETED
    if device == "cpu" and not INTERPRETED: pytest.skip("plain PyTorch both times")
    shapes = SHAPES if device == "cuda" else [(16, 16), (33, 7), (7, 33), (16, 16)]  # an interpreter is slow
    for most in (1, 1 << 25):
        monkeypatch.setattr(muon, "STACK", most)
        ours, theirs = (matrices(shapes, torch.bfloat16, device=device) for _ in range(2))
        start = [p.detach().clone() for p in ours]
        a, b = FlashMuon(ours, lr=1e-2, **options), FlashMuon(theirs, lr=1e-2, fused=False, **options)
        for n in range(2): step(a, ours, n); step(b, theirs, n)
        assert a._cached[None].made[0][0].on_gpu and not b._cached[None].made[0][0].on_gpu
        for p, q, s in zip(ours, theirs, start): assert way(weights(a, p), weights(b, q), s) < 0.05, (p.shape, way(weights(a, p), weights(b, q), s))


def test_a_gradient_of_nothing_and_one_that_is_not_a_number():
    "A gradient of zeros moves nothing but by decay; one with NaN is left out with skip_nonfinite."
    ours = matrices(dtype=torch.bfloat16)
    opt = FlashMuon(ours, lr=1e-2, weight_decay=0.0, skip_nonfinite=True)
    before = [p.detach().clone() for p in ours]
    for p in ours: p.grad = torch.zeros_like(p)
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, before))
    step(opt, ours, 0)
    before = [weights(opt, p).clone() for p in ours]
    for p in ours: p.grad[0, 0] = torch.nan
    opt.step()
    assert all(torch.equal(weights(opt, p), q) for p, q in zip(ours, before)) and opt.skipped_steps == 1


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_scratch_memory_is_bounded():
    "Two stacks of directions and two of their products, however many matrices there are."
    params = [nn.Parameter(torch.randn(512, 512, device="cuda").bfloat16()) for _ in range(300)]
    opt = FlashMuon(params)
    for p in params: p.grad = torch.ones_like(p)
    opt.step()
    torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 4.1 * 2 * muon.STACK < sum(p.nbytes for p in params) * 2


class Net(nn.Module):
    def __init__(self, dtype=torch.float32, seed=0):
        super().__init__(); torch.manual_seed(seed)
        self.embed, self.up, self.down, self.norm = nn.Embedding(20, 64), nn.Linear(64, 96), nn.Linear(96, 64), nn.LayerNorm(64)
        self.head = nn.Linear(64, 20, bias=False)
        self.to(dtype)

    def forward(self, i): return self.head(self.norm(self.embed(i) + self.down(self.up(self.embed(i)).relu())))


def train(model, opt, steps, first=0):
    for n in range(first, first + steps):
        i = torch.randint(20, (32,), generator=torch.Generator().manual_seed(n)).to(next(model.parameters()).device)
        nn.functional.cross_entropy(model(i).float(), (i * 3 + 1) % 20).backward()
        opt.step(); opt.zero_grad()


def test_what_muon_takes_of_a_model():
    model = Net()
    names = {p: n for n, p in model.named_parameters()}
    mine, rest = muon_groups(model, lr=3e-4)
    assert [names[p] for p in mine["params"]] == ["up.weight", "down.weight"]
    assert {*names.values()} == {names[p] for group in (mine, rest) for p in group["params"]} and rest["lr"] == 3e-4
    model.embed.weight = model.head.weight  # tied
    assert sum(len(group["params"]) for group in muon_groups(model)) == len(list(model.parameters()))
    assert [names.get(p) for p in muon_groups(model, heads=["down"])[0]["params"]] == ["up.weight"]  # the head is the embedding
    model.up.weight.requires_grad_(False)
    assert [names.get(p) for p in muon_groups(model)[0]["params"]] == ["down.weight"]


def test_adamws_options_are_its_own_unless_they_are_given():
    model = Net()
    opt = FlashMuon(muon_groups(model), lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    _, rest = opt.param_groups
    plain = torch.optim.AdamW(rest["params"]).defaults
    assert {name: rest[name] for name in ("lr", "weight_decay", "eps")} == {
        name: plain[name] for name in ("lr", "weight_decay", "eps")} and rest["betas"] == (0.8, 0.9)
    assert [group["lr"] for group in muon_groups(model, lr=3e-4)[1:]] == [3e-4]
    for wrong in "lrr", "weight_decy", "learning_rate":
        with pytest.raises(OptionError, match=f"unknown option '{wrong}'"): muon_groups(model, **{wrong: 0.1})


def to_muon(model, **how):
    names = {p: name for name, p in model.named_parameters()}
    return [names[p] for group in muon_groups(model, **how) if group["algorithm"] == "muon" for p in group["params"]]


def test_a_head_that_peft_trains_beside_its_adapters_is_adamws():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=97,
        tie_word_embeddings=False))
    how = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    for one in peft.get_peft_model(model, how), model:  # the second is given its head by name alone
        found = to_muon(one)
        assert found and all(".q_proj.lora_" in name for name in found), found
        model.get_output_embeddings = lambda: None


def test_adapters_go_where_the_layer_goes_that_they_are_attached_to():
    peft = pytest.importorskip("peft")
    def adapted(**how):
        how = peft.LoraConfig(r=2, target_modules=["embed", "up", "down", "head"], **how)
        return peft.get_peft_model(Net(), how)
    for how in dict(), dict(use_dora=True), dict(bias="all"):
        found = to_muon(adapted(**how))
        assert len(found) == 4 and all(".up.lora_" in name or ".down.lora_" in name for name in found), found
    named = to_muon(adapted(), heads=["up", "head"])
    assert len(named) == 2 and all(".down.lora_" in name for name in named)
    rows = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["up"], trainable_token_indices=dict(embed=[1, 2])))
    assert all(".up.lora_" in name for name in to_muon(rows)) and any("tokens" in n for n, p in rows.named_parameters() if p.requires_grad)


def test_hidden_layers_below_a_part_that_is_named_as_a_head_stay_muons():
    transformers = pytest.importorskip("transformers")
    model = transformers.BertForSequenceClassification(transformers.BertConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, num_attention_heads=2, vocab_size=97))
    assert {name for name, p in model.bert.encoder.named_parameters() if p.ndim == 2} == {
        name.removeprefix("bert.encoder.") for name in to_muon(model) if "encoder" in name}
    assert "classifier.weight" not in to_muon(model)


@devices
def test_bytes(device):
    "Counted in the tensors: weight 2, error bits 1, momentum 1, scales a 16th; AdamW's rest 5.125."
    model = Net().to(device)
    cast_model(model)
    opt = FlashMuon(muon_groups(model, lr=1e-3), lr=1e-2)
    enable_gradient_release(model, opt)
    train(model, opt, 2)
    for p in model.up.weight, model.down.weight:
        held = p.nbytes + sum(t.nbytes for k, t in opt.state[p].items() if k != "step")
        assert p.grad is None and held / p.numel() == 2 + 1 + 1 + 2 / 32
    p = model.embed.weight
    assert (p.nbytes + sum(t.nbytes for k, t in opt.state[p].items() if k != "step")) / p.numel() == 2 + 1 + 2 + 4 / 32


@devices
@pytest.mark.parametrize("clip", [None, 0.1])
def test_released_it_takes_the_same_steps(device, clip):
    a, b = (Net(torch.bfloat16).to(device) for _ in range(2))
    oa, ob = (FlashMuon(muon_groups(m, lr=1e-3), lr=1e-2, skip_nonfinite=True) for m in (a, b))
    handle = enable_gradient_release(b, ob)
    train(a, oa, 5); train(b, ob, 5)
    for p, q in zip(a.parameters(), b.parameters()):
        if device == "cpu": assert torch.equal(p, q)
        else: torch.testing.assert_close(p, q, rtol=0.02, atol=0.02)  # in another stack, products may be added up otherwise
    assert ob.grad_norm.item() == pytest.approx(oa.grad_norm.item(), rel=1e-3 if device == "cpu" else 0.1)
    handle.remove()


@devices
@pytest.mark.parametrize("how", [{}, dict(quantize=False), dict(compress_state_dict=False, quantize=False), dict(master_weight_bits=32)], ids=str)
def test_a_resumed_run_is_an_uninterrupted_one(device, how):
    make = lambda m: FlashMuon(muon_groups(m, lr=1e-3), lr=1e-2, max_norm=1.0, **how)
    whole, half, again = (Net(torch.bfloat16, seed).to(device) for seed in (0, 0, 7))
    train(whole, opt := make(whole), 8)
    train(half, first := make(half), 4)
    torch.save((half.state_dict(), first.state_dict()), file := io.BytesIO()); file.seek(0)
    kept = torch.load(file, weights_only=True)
    again.load_state_dict(kept[0])
    (second := make(again)).load_state_dict(kept[1])
    train(again, second, 4, first=4)
    for p, q in zip(whole.parameters(), again.parameters()):
        assert torch.equal(p, q)
        for key, t in opt.state[p].items(): assert torch.equal(t, second.state[q][key]), key


def test_a_group_that_is_given_another_algorithm_lets_go_of_the_moments_of_the_old_and_of_nothing_else():
    p = nn.Parameter(torch.ones(16, 16))
    opt = FlashMuon([dict(params=[p], algorithm="adamw")])
    for algorithm in "adamw", "muon":
        opt.param_groups[0]["algorithm"] = algorithm
        p.grad = torch.ones_like(p)
        opt.step()
        opt.state[p]["exp_avg::mine"] = 7
    assert opt.state[p].keys() == {"step", "momentum_buffer::quantized", "momentum_buffer::scales", "exp_avg::mine"}
    p.grad = torch.ones_like(p); opt.step()
    assert opt.state[p]["exp_avg::mine"] == 7


def test_a_vector_is_refused_and_nothing_is_changed():
    layer = nn.Linear(4, 3)
    for bad in layer.parameters(), [layer.bias], [dict(params=[nn.Parameter(torch.ones(2, 3, 4))])]:
        with pytest.raises(OptionError, match='algorithm="adamw"'): FlashMuon(bad)
    opt = FlashMuon([layer.weight])
    with pytest.raises(OptionError, match="shape \\(3,\\)"): opt.add_param_group(dict(params=[layer.bias]))
    assert len(opt.param_groups) == 1
    layer.weight.grad = torch.ones(3, 4)
    opt.step()
    weight, state = layer.weight.detach().clone(), copy.deepcopy(opt.state[layer.weight])
    opt.param_groups[0]["params"].append(layer.bias); layer.bias.grad = torch.ones(3)
    with pytest.raises(OptionError, match="shape \\(3,\\)"): opt.step()
    assert torch.equal(layer.weight, weight) and all(torch.equal(t, opt.state[layer.weight][k]) for k, t in state.items())


def test_fp32_weights_out_and_in():
    model = Net()
    cast_model(model)
    opt = FlashMuon(muon_groups(model, lr=1e-3), lr=1e-2)
    train(model, opt, 3)
    fp32 = opt.get_fp32_model_state_dict(model)
    own = weights(opt, model.up.weight)
    assert torch.equal(fp32["up.weight"], torch.where(own.bfloat16() == model.up.weight, own, fp32["up.weight"]))
    assert torch.equal(fp32["up.weight"].bfloat16(), model.up.weight)
    other = Net(seed=3); cast_model(other)
    new = FlashMuon(muon_groups(other), lr=1e-2)
    new.set_fp32_model_state_dict(other, fp32)
    for name, t in new.get_fp32_model_state_dict(other).items(): assert torch.equal(t, fp32[name])


RANK = """
import sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.debug import CommDebugMode
import flashoptim_nb.optim.muon as muon
from flashoptim_nb.optim import FlashMuon, OptionError, enable_gradient_release, muon_groups
from flashoptim_nb.base.errors import UserError

kind, where = sys.argv[1:]
dist.init_process_group("gloo" if kind == "cpu" else "nccl")
rank, world = dist.get_rank(), dist.get_world_size()
if kind == "cuda": torch.cuda.set_device(rank)
flat = init_device_mesh(kind, (world,))
copies = init_device_mesh(kind, (1, world), mesh_dim_names=("copies", "shards"))

def net(dtype):
    torch.manual_seed(0)  # on two ranks 7 and 6 rows, 9 and 9, one and none
    return nn.Sequential(nn.Linear(37, 13), nn.Tanh(), nn.Linear(13, 18), nn.Tanh(), nn.Linear(18, 13), nn.Linear(13, 1)).to(kind, dtype)

def sharded(dtype, mesh, **how):
    model = net(dtype)
    for part in (*(m for m in model if isinstance(m, nn.Linear)), model): fully_shard(part, mesh=mesh, **how)
    return model

def train(model, opt, steps, dtype, first=0):
    for n in range(first, first + steps):
        torch.manual_seed(n)
        (100 * model(torch.randn(8, 37).to(kind, dtype)).float().square().mean()).backward()
        opt.step(); opt.zero_grad()

def by_columns(p): return Shard(int(p.ndim == 2 and p.shape[1] % world == 0))
def whole(model): return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]

for most in (1, 1 << 25):
    muon.STACK = most
    for mesh, how in ((flat, {}), (copies, {}), (flat, dict(shard_placement_fn=by_columns))):
        for dtype, close, options in ((torch.float32, 1e-5 if kind == "cpu" else 1e-2, dict(quantize=False)), (torch.bfloat16, 5e-2, {})):
            make = lambda model: FlashMuon(muon_groups(model, lr=1e-3), lr=1e-3, max_norm=1.0, **options)
            if how and dtype == torch.bfloat16: continue
            a, b = sharded(dtype, mesh, **how) , net(dtype)
            oa, ob = make(a), make(b)
            train(a, oa, 5, dtype); train(b, ob, 5, dtype)
            assert abs(oa.grad_norm - ob.grad_norm) <= close * ob.grad_norm
            for p, q in zip(whole(a), whole(b)): assert (p - q).abs().max() <= close * q.abs().max() + close * 1e-2, (dtype, most, p.shape, (p - q).abs().max())
            full = oa.get_fp32_model_state_dict(a)
            for key, t in ob.get_fp32_model_state_dict(b).items(): assert (full[key].full_tensor() - t).abs().max() <= close * t.abs().max() + close * 1e-2
plans = [x.plan for x in oa._cached[None].made[0]]
assert {owner for plan in plans for each in plan.rounds for owner, own in enumerate(each) if own} == {*range(world)}, "a rank owns nothing"

# a matrix is gathered by its owner alone: of a step a rank receives the whole of what it owns, and its own part of all
received, exchange = [], muon.MatrixSharding.exchange
def counted(self, out, *how): received.append(out.numel()); exchange(self, out, *how)
muon.MatrixSharding.exchange = counted
for p in a.parameters(): p.grad = torch.ones_like(p)
with CommDebugMode() as seen: oa.step()
muon.MatrixSharding.exchange = exchange
counts = {str(op): n for op, n in seen.get_comm_counts().items()}
assert counts and not any("gather" in op for op in counts), counts
owned = sum(plan.shapes[i][0] * plan.shapes[i][1] for plan in plans for each in plan.rounds for i in each[rank])
assert sum(received) == owned + sum(n for plan in plans for n in plan.sizes), (received, owned)
assert owned < sum(r * c for plan in plans for r, c in plan.shapes), "a rank owns all"

# a checkpoint, read into a new optimizer, goes on bit for bit
make = lambda model: FlashMuon(muon_groups(model, lr=1e-3), lr=1e-3)
a, b = sharded(torch.bfloat16, flat), sharded(torch.bfloat16, flat)
oa, ob = make(a), make(b)
train(a, oa, 6, torch.bfloat16); train(b, ob, 3, torch.bfloat16)
dcp.save(dict(opt=get_optimizer_state_dict(b, ob)), checkpoint_id=where)
oc = make(b)
state = get_optimizer_state_dict(b, oc)
dcp.load(dict(opt=state), checkpoint_id=where)
set_optimizer_state_dict(b, oc, state)
train(b, oc, 3, torch.bfloat16, first=3)
assert all(torch.equal(p, q) for p, q in zip(whole(a), whole(b)))

# what several ranks would have to exchange inside a backward pass
try: enable_gradient_release(a, oa)
except UserError as error: assert "sharded matrix" in str(error)
else: raise AssertionError("released")
print("rank", rank, "agrees")
dist.destroy_process_group()
"""


@on_ranks(2)
def test_shards_are_stepped_as_the_whole(kind, tmp_path):
    "Uneven and empty shards; rows or columns; each matrix has an owner, and each rank owns some."
    ranks_agree(RANK, 2, kind, tmp_path)


def test_coefficients_without_a_middle_one():
    "A polynomial without its middle term keeps the identity, in the plain and the batched iteration."
    torch.manual_seed(0)
    u = torch.randn(2, 24, 40)
    true = torch.stack([newton_schulz(x.double(), (1.5, 0.0, -0.5), dtype=torch.float64) for x in u])
    ours = newton_schulz_stack(u.bfloat16(), (1.5, 0.0, -0.5), halves=symmetric_reference)
    assert ((ours - true).norm() / true.norm()).item() < 0.05


def test_a_norm_beyond_fp32_stands_still():
    "As torch does: the direction of a matrix whose norm is infinite is zero, never NaN."
    u = torch.full((2, 8, 16), 1e30).bfloat16()
    u[1] = torch.randn(8, 16).bfloat16()
    moved = newton_schulz_stack(u.clone(), halves=symmetric_reference)
    assert not moved[0].any() and torch.isfinite(moved).all() and moved[1].any()


def test_adamw_as_the_default_algorithm_has_its_eps():
    p = torch.nn.Parameter(torch.ones(3))
    assert FlashMuon([p], algorithm="adamw").param_groups[0]["eps"] == 1e-8
    assert FlashMuon([p], algorithm="adamw", eps=1e-6).param_groups[0]["eps"] == 1e-6


def test_a_cyclic_schedule_moves_the_momentum():
    "As for torch.optim.Muon, and AdamW's betas stay."
    w, b = torch.nn.Parameter(torch.randn(4, 4)), torch.nn.Parameter(torch.randn(4))
    opt = FlashMuon([dict(params=[w]), dict(params=[b], algorithm="adamw")], lr=0.02)
    torch.optim.lr_scheduler.OneCycleLR(opt, 0.02, total_steps=10)
    assert [group["momentum"] for group in opt.param_groups][0] == 0.95
    w.grad, b.grad = torch.randn(4, 4), torch.randn(4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, 0.02, total_steps=10)
    for _ in range(3): opt.step(); schedule.step()
    assert opt.param_groups[0]["momentum"] < 0.95 and opt.param_groups[1]["betas"] == (0.9, 0.999)


def test_check_numerics_knows_the_size_of_a_step():
    "Rows are orthogonal, so a value moves by lr over the root of the longer side: 32 times less at 1024."
    p = torch.nn.Parameter(torch.randn(1024, 64).bfloat16())
    p.grad = torch.randn_like(p)
    for rounding, lost in ("nearest", 1e-4), ("dithered", 1e-6):
        with pytest.raises(NumericsError, match="at least"):
            FlashMuon([p], lr=lost, rounding=rounding, check_numerics=True).step()
    FlashMuon([p], lr=2e-2, check_numerics=True).step()


def test_a_copy_takes_further_groups():
    opt = copy.deepcopy(FlashMuon([dict(params=matrices()), dict(params=[nn.Parameter(torch.ones(3))], algorithm="adamw")], betas=(0.8, 0.9)))
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(5))], algorithm="adamw"))
    assert opt.param_groups[-1]["betas"] == (0.8, 0.9) and opt.param_groups[-1]["eps"] == opt.param_groups[1]["eps"]


@pytest.mark.parametrize("copied", ["deepcopy", "pickle"])
def test_the_reference_goes_on_as_a_copy_and_takes_groups_of_either_algorithm(copied):
    from flashoptim_nb.base.errors import UserError
    from flashoptim_nb.train.optimizers import MuonAdamW
    model = nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5))
    opt = MuonAdamW([dict(params=[model[0].weight])], lr=1e-2, adjust_lr_fn="match_rms_adamw", betas=(0.8, 0.9))
    step(opt, [model[0].weight], 0)
    opt.add_param_group(dict(params=[*model[1].parameters()], algorithm="adamw", weight_decay=0.0))
    model, opt = copy.deepcopy((model, opt)) if copied == "deepcopy" else torch.load(_saved((model, opt)), weights_only=False)
    opt.add_param_group(dict(params=[model[0].bias], algorithm="adamw", lr=1e-3))
    assert [group["algorithm"] for group in opt.param_groups] == ["muon", "adamw", "adamw"]
    assert opt.param_groups[-1]["betas"] == (0.8, 0.9) and opt.param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    twin, before = copy.deepcopy((model, opt)), [p.detach().clone() for p in model.parameters()]
    for net, one in ((model, opt), twin): step(one, [*net.parameters()], 1)
    for p, q, was in zip(model.parameters(), twin[0].parameters(), before): assert torch.equal(p, q) and not torch.equal(p, was)
    with pytest.raises(UserError, match="did you mean 'adamw'"): opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], algorithm="adam"))
    with pytest.raises(ValueError, match="2D"): opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))]))
    assert len(opt.param_groups) == 3, "a group that is refused is not there"


def _saved(what):
    torch.save(what, kept := io.BytesIO())
    kept.seek(0)
    return kept


def test_a_model_that_leaves_its_head_open_has_groups():
    class Open(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(10, 10)
        def get_output_embeddings(self): raise NotImplementedError
    muon, adamw = muon_groups(model := Open())
    assert muon["params"] == [model.layer.weight] and adamw["params"] == [model.layer.bias]
