"""States on the host: the same bits as beside the parameters, through every door; what cannot be is refused."""
import copy
import inspect
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import flashoptim_nb.optim.host as host
import flashoptim_nb.optim as optim
from every import MAKERS, OPTIONS
from flashoptim_nb.optim import AveragedMasters, FlashAdamW, FlashSGD, OptionError, cast_model, enable_gradient_release
from flashoptim_nb.optim.base import FlashOptimizer
from flashoptim_nb.optim.split import INTERPRETED
from processes import ranks_agree

CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch): monkeypatch.setattr(host, "STAGING", 1 << 16)


class Net(nn.Module):
    "A tied embedding larger than a part, ragged and small tensors, and a layer that some batches leave out."
    def __init__(self, dtype=torch.bfloat16, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.mid, self.norm = nn.Embedding(301, 67), nn.Linear(67, 67), nn.LayerNorm(67)
        self.rare, self.head = nn.Linear(67, 67), nn.Linear(67, 301, bias=False)
        self.head.weight = self.embed.weight
        self.to(DEVICE, dtype)

    def forward(self, seed, rare=True):
        ids = torch.randint(0, 301, (64,), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        x = self.norm(self.mid(self.embed(ids)).tanh())
        return self.head(x + self.rare(x) if rare else x).float().logsumexp(-1).mean()


def train(model, opt, steps=4, first=0, rare=lambda t: True):
    for t in range(first, first + steps):
        model(t, rare(t)).backward()
        opt.step(); opt.zero_grad()


def states(opt):
    return [(key, opt.state[p][key]) for group in opt.param_groups for p in group["params"]
            for key in sorted(opt.state.get(p, {}))]


def assert_same(a, oa, b, ob):
    for (name, p), q in zip(a.named_parameters(), b.parameters()): assert torch.equal(p, q), name
    assert [key for key, _ in states(oa)] == [key for key, _ in states(ob)]
    for (key, s), (_, t) in zip(states(oa), states(ob)): assert torch.equal(s.cpu(), t.cpu()), key


def pair(make=FlashAdamW, dtype=torch.bfloat16, release=False, **options):
    a = Net(dtype)
    b = copy.deepcopy(a)
    oa, ob = make(a.parameters(), lr=1e-2, **options), make(b.parameters(), lr=1e-2, offload_states=True, **options)
    if release:
        for model, opt in (a, oa), (b, ob): enable_gradient_release(model, opt)
    return a, oa, b, ob


@pytest.mark.parametrize("release", [False, True], ids=["step", "release"])
@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in MAKERS), *(("FlashAdamW", options) for options in (
        dict(max_norm=0.1), dict(quantize=False, master_weight_bits=None), dict(master_weight_bits=32),
        dict(companded=False)))], ids=str)
def test_same_bits(name, options, release):
    a, oa, b, ob = pair(MAKERS[name], release=release, **options)
    for model, opt in (a, oa), (b, ob): train(model, opt, rare=lambda t: t != 1)
    assert_same(a, oa, b, ob)
    assert all(t.device.type == "cpu" for key, t in states(ob) if key != "step")
    [pipe] = ob._host.pipes.values()
    assert len(pipe.order) > 2 and max(part.size for part in pipe.order) <= len(pipe.ring)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_same_bits_in_other_dtypes(dtype):
    a, oa, b, ob = pair(dtype=dtype)
    for model, opt in (a, oa), (b, ob): train(model, opt)
    assert_same(a, oa, b, ob)


@pytest.mark.parametrize("release", [False, True], ids=["step", "release"])
def test_a_skipped_step_leaves_all_as_it_is(release):
    a, oa, b, ob = pair(release=release, skip_nonfinite=True)
    for model, opt in (a, oa), (b, ob):
        train(model, opt, 2)
        (model(2) * torch.nan).backward()
        opt.step(); opt.zero_grad()
        train(model, opt, 2, 3)
    assert_same(a, oa, b, ob)
    assert int(oa.skipped_steps) == int(ob.skipped_steps) == 1


def test_accumulation_a_loop_without_step_and_step_param():
    a, oa, b, ob = pair(release=True)
    for model, opt in (a, oa), (b, ob):
        for t in range(2):
            with opt.release.accumulate(): model(2 * t).backward()
            model(2 * t + 1, t == 0).backward()  # the rare layer's gradient is of the first part alone
            opt.step()
        opt.release.remove()
        model(7).backward()
        for p in model.parameters(): opt.step_param(p)
        opt.zero_grad()
        train(model, opt, 2, 8)
    assert_same(a, oa, b, ob)


def test_what_is_loaded_ahead_and_changed_is_loaded_again():
    a, oa, b, ob = pair(release=True)
    for model, opt in (a, oa), (b, ob):
        train(model, opt, 3)
        first = []
        def clear(p, group, opt=opt, model=model, first=first):
            if not first:  # all of the rest has been loaded ahead
                first.append(p)
                for q in model.parameters():
                    if q is not p: opt.state[q]["exp_avg::quantized"].zero_()
            return True
        opt.release.pre_step = clear
        train(model, opt, 1, 3)
        opt.release.pre_step = None
        train(model, opt, 1, 4)
    assert_same(a, oa, b, ob)


def test_checkpoints_go_from_one_to_the_other():
    a, oa, b, ob = pair()
    train(a, oa); train(b, ob)
    for compress in True, False:
        oa.compress_state_dict = ob.compress_state_dict = compress
        sa, sb = oa.state_dict(), ob.state_dict()
        assert sa["param_groups"] == sb["param_groups"]
        for i in sa["state"]:
            assert list(sa["state"][i]) == list(sb["state"][i])
            for key in sa["state"][i]: assert torch.equal(sa["state"][i][key].cpu(), sb["state"][i][key].cpu())
    public = [opt.public_state_dict()["state"] for opt in (oa, ob)]
    for i in public[0]:
        for key in public[0][i]: assert torch.equal(public[0][i][key].cpu(), public[1][i][key].cpu())
    oa.compress_state_dict = ob.compress_state_dict = True
    sizes = []
    for source in oa, ob:
        torch.save(source.state_dict(), file := io.BytesIO())
        sizes.append(len(file.getvalue()))
        for kind in False, True:
            m = copy.deepcopy(a)
            opt = FlashAdamW(m.parameters(), lr=1e-2, offload_states=kind)
            file.seek(0)
            opt.load_state_dict(torch.load(file, weights_only=True))
            where = {t.device.type for key, t in states(opt) if key != "step"}
            assert where == {"cpu" if kind else DEVICE}
            n, on = copy.deepcopy(a), copy.deepcopy(oa)
            on = FlashAdamW(n.parameters(), lr=1e-2); on.load_state_dict(oa.state_dict())
            train(m, opt, 2, 4); train(n, on, 2, 4)
            assert_same(n, on, m, opt)
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[0], sizes  # no slabs in files


def test_masters_and_averages():
    models = []
    for offload in False, True:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(60, 70), nn.Tanh(), nn.Linear(70, 9))
        cast_model(model)  # what the cast rounds away are the first error bits
        model.to(DEVICE)
        opt = FlashAdamW(model.parameters(), lr=1e-3, offload_states=offload)
        mean = AveragedMasters(opt, model, None)
        for t in range(3):
            torch.manual_seed(t)
            model(torch.randn(4, 60).to(DEVICE, torch.bfloat16)).float().square().mean().backward()
            opt.step(); opt.zero_grad(); mean.update()
        wide = opt.get_fp32_model_state_dict(model)
        opt.set_fp32_model_state_dict(model, {name: 1.1 * t for name, t in wide.items()})
        later = opt.get_fp32_model_state_dict(model)
        model(torch.ones(4, 60, device=DEVICE, dtype=torch.bfloat16)).float().square().mean().backward()
        opt.step()
        models.append((wide, later, mean.model_state_dict(), opt.get_fp32_model_state_dict(model)))
        sizes = opt.bytes_per_parameter()
        if CUDA and offload: assert sizes["masters"] == sizes["states"] == 0 and sizes["host"] > 3
    for x, y in zip(*models):
        for name in x: assert torch.equal(x[name], y[name]), name


def test_copies_and_pickles_are_their_own():
    a, oa, b, ob = pair()
    train(a, oa); train(b, ob)
    pb, pob = copy.deepcopy((b, ob))
    qb, qob = pickle.loads(pickle.dumps((b, ob)))
    train(a, oa, 2, 4)
    for m, o in (b, ob), (pb, pob), (qb, qob):
        train(m, o, 2, 4)
        assert_same(a, oa, m, o)
    at = {t.data_ptr() for o in (ob, pob, qob) for key, t in states(o) if key != "step"}
    assert len(at) == sum(key != "step" for o in (ob, pob, qob) for key, _ in states(o))


def test_states_that_somebody_replaces():
    a, oa, b, ob = pair()
    for model, opt in (a, oa), (b, ob):
        train(model, opt, 2)
        s = opt.state[model.mid.weight]
        s["exp_avg::quantized"] = torch.full_like(s["exp_avg::quantized"], 3)
        del opt.state[model.norm.weight]
        del opt.state[model.rare.weight]["error_bits"]
        opt.param_groups[0]["lr"] = 1e-3
        train(model, opt, 2, 2)
        opt.add_param_group(dict(params=[extra := nn.Parameter(torch.ones(5, 7, device=DEVICE).bfloat16())]))
        extra.grad = torch.ones_like(extra)
        train(model, opt, 2, 4)
    assert_same(a, oa, b, ob)


def test_momentum_that_begins_later():
    a, oa, b, ob = pair(FlashSGD)
    for model, opt in (a, oa), (b, ob):
        train(model, opt, 2)
        opt.param_groups[0]["momentum"] = 0.9
        train(model, opt, 2, 2)
    assert_same(a, oa, b, ob)


class RowsAndMatrices(FlashOptimizer):
    "A class that steps whole parameters, with states of other shapes."
    moments = {"momentum": torch.int8}

    def __init__(self, params, lr=1e-2, weight_decay=0.0, **options):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay), **options)

    def _state_shapes(self, p): return {"row": p.shape[:1]} if p.ndim == 2 else {"all": ()}

    def _update_one(self, theta, grad, state, group, t):
        key, dims = ("row", 1) if theta.ndim == 2 else ("all", 0)
        state[key].lerp_(grad.square().mean(dims), 0.1)
        m = state["momentum"].mul_(0.9).add_(grad)
        theta.sub_(m / (state[key].sqrt() + 1e-8).view(-1, *[1] * (theta.ndim - 1)), alpha=group["lr"])


@pytest.mark.parametrize("quantize", [True, False])
def test_a_class_that_steps_whole_parameters(quantize):
    a, oa, b, ob = pair(RowsAndMatrices, quantize=quantize)
    train(a, oa); train(b, ob)
    assert_same(a, oa, b, ob)


# what cannot be

def test_too_little_memory_is_said_before_anything_changes(monkeypatch):
    a, oa, b, ob = pair()
    train(a, oa, 1)
    kept = [p.clone() for p in b.parameters()]
    with monkeypatch.context() as m:
        m.setattr(host, "free_host_memory", lambda: 50_000)
        with pytest.raises(OptionError, match="50,000 are free"): FlashAdamW(b.parameters(), offload_states=True)
        b(0).backward()
        with pytest.raises(MemoryError, match="Nothing has been changed"): ob.step()
        assert not ob.state and all(map(torch.equal, kept, b.parameters()))
        ob.zero_grad()
        enable_gradient_release(b, ob)
        with pytest.raises(MemoryError, match="FSDP2"): b(0).backward()
        assert not ob.state and all(map(torch.equal, kept, b.parameters()))
        ob.release.remove()
    def refuse(size, pinned): raise host.HostMemoryError("no memory")
    with monkeypatch.context() as m:
        m.setattr(host, "_slab", refuse)
        ob.zero_grad(); b(0).backward()
        with pytest.raises(MemoryError): ob.step()
        assert not ob.state
    ob.zero_grad(); train(b, ob, 1)
    assert_same(a, oa, b, ob)


def test_room_is_needed_for_all_ranks_of_a_host(monkeypatch):
    "Each finds the same memory free, for none has taken its share yet."
    a, *_ = pair()
    monkeypatch.setattr(host, "free_host_memory", lambda: 10**6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1000")
    FlashAdamW(a.parameters(), offload_states=True)  # launched, and not joined: it trains for itself
    monkeypatch.setattr(host, "dist", SimpleNamespace(is_initialized=lambda: True))
    with pytest.raises(OptionError, match="on each of 1000 ranks"): FlashAdamW(a.parameters(), offload_states=True)


def test_options_are_checked():
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(OptionError, match="offload_states"): FlashAdamW([p], offload_states="host")
    with pytest.raises(OptionError, match="offload_states"): FlashAdamW([p], offload=True)
    opt = FlashAdamW([p], offload_states=True)
    with pytest.raises(OptionError, match="make a new optimizer"): opt.offload_states = False
    with pytest.raises(OptionError, match="whole optimizer"): FlashAdamW([dict(params=[p], offload_states=True)])


RANK = """
import sys, copy, torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from flashoptim_nb import optim
from flashoptim_nb.optim import host

host.STAGING = 1 << 14
kind = sys.argv[1]
dist.init_process_group("gloo" if kind == "cpu" else "nccl")
if kind == "cuda": torch.cuda.set_device(dist.get_rank())
mesh = init_device_mesh(kind, (dist.get_world_size(),))

def sharded():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(137, 113), nn.Tanh(), nn.Linear(113, 1)).to(kind, torch.bfloat16)
    for part in (model[0], model[2], model): fully_shard(part, mesh=mesh)
    return model

def train(model, opt, first, steps):
    for n in range(first, first + steps):
        torch.manual_seed(n)
        (100 * model(torch.randn(8, 137).to(kind, torch.bfloat16)).float().square().mean()).backward()
        opt.step(); opt.zero_grad()

def own(t): return getattr(t, "_local_tensor", t).cpu()

def same(a, oa, b, ob):
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.equal(own(p), own(q))
        assert oa.state[p].keys() == ob.state[q].keys()
        for key in oa.state[p]: assert torch.equal(own(oa.state[p][key]), own(ob.state[q][key])), key

def adamw(model, **options): return optim.FlashAdamW(model.parameters(), lr=1e-2, max_norm=1.0, **options)
def muon(model, **options): return optim.FlashMuon(optim.muon_groups(model), lr=1e-2, **options)

for make, release in (adamw, False), (adamw, True), (muon, False):
    made = [(model := sharded(), make(model, offload_states=offload)) for offload in (False, True)]
    (a, oa), (b, ob) = made
    for model, opt in made:
        if release: optim.enable_gradient_release(model, opt)
        train(model, opt, 0, 4)
    same(a, oa, b, ob)
    kept = [t for p in b.parameters() for key, t in ob.state[p].items() if key != "step"]
    assert all(t._local_tensor.device.type == "cpu" for t in kept)
    full = [opt.get_fp32_model_state_dict(model) for model, opt in made]
    for key in full[0]: assert torch.equal(full[0][key].full_tensor(), full[1][key].full_tensor())
    if release: oa.release.remove(); ob.release.remove()
    # one's checkpoint in the other
    kept = [get_optimizer_state_dict(model, opt) for model, opt in made]
    kept = copy.deepcopy(kept)
    set_optimizer_state_dict(a, oa, kept[1]); set_optimizer_state_dict(b, ob, kept[0])
    for model, opt in made: train(model, opt, 4, 2)
    same(a, oa, b, ob)
print("rank", dist.get_rank(), "agrees")
dist.destroy_process_group()
"""


def test_shards(tmp_path): ranks_agree(RANK, 2, "cpu", tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
def test_shards_on_gpus(tmp_path): ranks_agree(RANK, min(2, torch.cuda.device_count()), "cuda", tmp_path)


# what a GPU alone can show

cuda = [pytest.mark.cuda, pytest.mark.skipif(not CUDA, reason="needs a GPU")]


def large(n=24, width=1024, dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(width, width, bias=k % 2 == 0) for k in range(n))).to("cuda", dtype)


def run_large(model, opt, steps=3, first=0):
    for t in range(first, first + steps):
        x = torch.randn(16, model[0].in_features, generator=torch.Generator().manual_seed(t)).to("cuda", torch.bfloat16)
        model(x).float().square().mean().backward()
        opt.step(); opt.zero_grad()


class TestOnAGpu:
    pytestmark = cuda

    def test_states_are_pinned_and_the_device_holds_the_ring_alone(self, monkeypatch):
        monkeypatch.setattr(host, "STAGING", 1 << 22)
        model = large()
        model(torch.ones(16, 1024, device="cuda", dtype=torch.bfloat16)).sum().backward()  # cuBLAS takes its workspace
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        opt = FlashAdamW(model.parameters(), lr=1e-3, offload_states=True)
        enable_gradient_release(model, opt)
        run_large(model, opt)
        assert all(t.is_pinned() for key, t in states(opt) if key != "step")
        tables = 1 << 20  # addresses and blocks; each small tensor takes 512 bytes
        assert torch.cuda.memory_allocated() - before < (1 << 22) + tables

    @pytest.mark.parametrize("release", [False, True], ids=["step", "release"])
    @pytest.mark.parametrize("staging", [1 << 18, 1 << 22, 1 << 26], ids=str)
    def test_same_bits_whatever_the_ring_takes(self, monkeypatch, staging, release):
        monkeypatch.setattr(host, "STAGING", staging)
        a = large()
        b = copy.deepcopy(a)
        oa, ob = (FlashAdamW(m.parameters(), lr=1e-3, max_norm=0.5, offload_states=o)
                  for m, o in ((a, False), (b, True)))
        if release:
            for model, opt in (a, oa), (b, ob): enable_gradient_release(model, opt)
        for model, opt in (a, oa), (b, ob): run_large(model, opt, 6)
        assert_same(a, oa, b, ob)

    @pytest.mark.parametrize("slow", ["inward", "step", "outward"])
    def test_no_place_is_filled_before_it_was_emptied(self, monkeypatch, slow):
        """One of the three ways is made slow, so that each of the others would overtake it where an event is missing:
        a part loaded over one that has not been written back, stepped before it is there, written back before it is
        stepped."""
        monkeypatch.setattr(host, "STAGING", 1 << 20)
        wait = lambda: torch.cuda._sleep(2_000_000)  # a millisecond
        a = large(8)
        b = copy.deepcopy(a)
        oa, ob = (FlashAdamW(m.parameters(), lr=1e-3, offload_states=o) for m, o in ((a, False), (b, True)))
        for model, opt in (a, oa), (b, ob): enable_gradient_release(model, opt)
        real_load, real_event, real_stage = host.Pipe.load, host.Pipe._event, host.Part.stage
        def load(self, part):
            if slow == "inward":
                with torch.cuda.stream(self.inward): wait()
            return real_load(self, part)
        def event(self, stream):
            if slow == "outward" and stream == self.outward:
                with torch.cuda.stream(stream): wait()
            return real_event(self, stream)
        def stage(self, *args):
            if slow == "step": wait()
            return real_stage(self, *args)
        monkeypatch.setattr(host.Pipe, "load", load)
        monkeypatch.setattr(host.Pipe, "_event", event)
        monkeypatch.setattr(host.Part, "stage", stage)
        for model, opt in (a, oa), (b, ob): run_large(model, opt, 3)
        assert_same(a, oa, b, ob)

    def test_the_test_before_would_notice(self, monkeypatch):
        "Without the wait for what is written back, a slow way out gives other bits."
        monkeypatch.setattr(host, "STAGING", 1 << 20)
        a = large(8)
        b = copy.deepcopy(a)
        oa, ob = (FlashAdamW(m.parameters(), lr=1e-3, offload_states=o) for m, o in ((a, False), (b, True)))
        for model, opt in (a, oa), (b, ob): enable_gradient_release(model, opt)
        real = host.Pipe.staged
        def staged(self, part):  # the copy back is late, and nobody knows of it
            with torch.cuda.stream(self.outward): torch.cuda._sleep(20_000_000)
            for load in self.loads: load.part.written = None
            return real(self, part)
        monkeypatch.setattr(host.Pipe, "staged", staged)
        for model, opt in (a, oa), (b, ob): run_large(model, opt, 3)
        assert not all(torch.equal(s.cpu(), t.cpu()) for (_, s), (_, t) in zip(states(oa), states(ob)))

    def test_memory_that_was_somebodys_is_not_written_too_early(self, monkeypatch):
        "The ring may lie where a tensor was whose kernels still run, and a tensor where a ring was."
        monkeypatch.setattr(host, "STAGING", 1 << 24)
        for _ in range(4):
            a = large(8)
            b = copy.deepcopy(a)
            oa, ob = (FlashAdamW(m.parameters(), lr=1e-3, offload_states=o) for m, o in ((a, False), (b, True)))
            run_large(a, oa, 2)
            x = torch.zeros(1 << 24, dtype=torch.uint8, device="cuda")
            torch.cuda._sleep(20_000_000)
            x += 1
            seen = x[::4096].float().sum()
            del x
            run_large(b, ob, 2)
            assert_same(a, oa, b, ob)
            assert seen.item() == 4096

    def test_a_copy_and_a_step_go_on_at_once(self, monkeypatch):
        "The trace has copies both ways at one time, and kernels beside copies."
        monkeypatch.setattr(host, "STAGING", 1 << 26)
        model = large(16, 4096)
        opt = FlashAdamW(model.parameters(), lr=1e-3, offload_states=True)
        enable_gradient_release(model, opt)
        run_large(model, opt, 3)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
            run_large(model, opt, 2)
        spans = {"HtoD": [], "DtoH": [], "kernel": []}
        for event in trace.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kind = next((k for k in ("HtoD", "DtoH") if k in event.name), "kernel")
                spans[kind].append((event.time_range.start, event.time_range.end))
        def together(x, y):
            return sum(max(0, min(b, d) - max(a, c)) for a, b in spans[x] for c, d in spans[y])
        # how much of the time is for `bench host` to say: on one stream nothing would overlap at all
        assert together("HtoD", "DtoH") > 0 and together("HtoD", "kernel") > 0

    def test_inside_a_cuda_graph_it_is_refused(self):
        model = Net()
        opt = FlashAdamW(model.parameters(), lr=1e-2, offload_states=True)
        train(model, opt, 2)
        kept = [p.clone() for p in model.parameters()]
        model(3).backward()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with pytest.raises(OptionError, match="CUDA graph"):
            with torch.cuda.graph(graph): opt.step()
        torch.cuda.synchronize()
        assert all(map(torch.equal, kept, model.parameters()))
        opt.step()

    def test_the_model_moves_to_the_gpu_after_the_optimizer_was_made(self):
        a, b = Net().cpu(), Net().cpu()
        oa, ob = FlashAdamW(a.parameters(), lr=1e-2), FlashAdamW(b.parameters(), lr=1e-2, offload_states=True)
        a.cuda(); b.cuda()
        train(a, oa); train(b, ob)
        assert_same(a, oa, b, ob)


@pytest.mark.parametrize("name", MAKERS)
def test_what_states_take_on_the_host_is_said_for_each_class(name):
    "The text of the option, beside what lies there after a step."
    said = inspect.getsource(getattr(optim, name).__init__).partition("offload_states: bool")[0]
    said = " ".join(said[said.rindex("otherwise;"):].replace("#", " ").split())
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    def held(**options):
        (opt := MAKERS[name]([p], offload_states=True, **options)).step()
        there = sum(t.nbytes for key, t in opt.state[p].items() if key != "step")
        return f"{there / p.numel():.1f}".removesuffix(".0")
    assert f"costs {held()} bytes a " in said
    if "momentum" in OPTIONS.get(getattr(optim, name), {}): assert f", {held(momentum=0.0)} without momentum" in said
    if name == "FlashMuon": assert f"and {held(algorithm='adamw')} of AdamW's groups" in said


def test_parameters_without_any_state_are_stepped():
    weight = nn.Parameter(torch.ones(40))
    weight.grad = torch.ones_like(weight)
    FlashSGD([weight], lr=0.5, offload_states=True).step()
    assert weight.tolist() == [0.5] * 40
