"""Bytes by class and the peak of a training step: against derivations by hand and against torch's own tracker."""
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flashoptim_nb.base.machine import capabilities
from flashoptim_nb.measure.memory import device_memory, largest_micro_batch, memory_budget, memory_by_class

CLASSES = ("weights", "gradients", "states", "masters", "copies", "activations")


class Tower(nn.Module):
    "k exponentials of a parameter of n floats; each keeps its result."
    def __init__(self, n, k, segments=1):
        super().__init__()
        self.w, self.k, self.segments = nn.Parameter(torch.full((n,), -3.)), k, segments

    def part(self, x):
        for _ in range(self.k // self.segments): x = x.exp()
        return x

    def forward(self):
        x = self.w
        for _ in range(self.segments):
            x = self.part(x) if self.segments == 1 else checkpoint(self.part, x, use_reentrant=False)
        return x.sum()


def stepper(model, optimizer, micro=1, clear="none"):
    def step():
        optimizer.zero_grad(set_to_none=clear == "none")
        for _ in range(micro): model().backward()
        optimizer.step()
    return step


@pytest.mark.parametrize("k", [2, 4, 7])
def test_peak_by_hand(k):
    n = 5000
    tower = Tower(n, k)
    sgd = torch.optim.SGD(tower.parameters(), lr=1e-3, momentum=0.9)
    row = memory_by_class(stepper(tower, sgd), model=tower, optimizer=sgd, device="cpu")
    # weight, momentum, k results and the gradient of the last one, loss and its gradient
    assert row["peak"] == 4 * n * (1 + 1 + k + 1) + 8
    assert row["activations"] == 4 * n * k


def test_accumulation_keeps_the_gradient_through_the_next_forward():
    n, k = 5000, 3
    peaks = []
    for micro in (1, 2, 4):
        tower = Tower(n, k)
        sgd = torch.optim.SGD(tower.parameters(), lr=1e-3)
        peaks.append(memory_by_class(stepper(tower, sgd, micro), model=tower, optimizer=sgd, device="cpu")["peak"])
    assert peaks[1] - peaks[0] == 4 * n and peaks[2] == peaks[1]


def test_checkpointing_saves_inputs_only():
    n, k = 5000, 9
    rows = []
    for segments in (1, 3):
        tower = Tower(n, k, segments)
        sgd = torch.optim.SGD(tower.parameters(), lr=1e-3)
        rows.append(memory_by_class(stepper(tower, sgd), model=tower, optimizer=sgd, device="cpu"))
    assert [row["activations"] for row in rows] == [4 * n * 9, 4 * n * 2]  # the first segment's input is the parameter
    assert rows[1]["peak"] < rows[0]["peak"]


def mlp(compiled=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64))
    adamw = torch.optim.AdamW(model.parameters(), foreach=False)
    run, x = torch.compile(model) if compiled else model, torch.randn(48, 64)

    def step():
        adamw.zero_grad()
        with torch.autocast("cpu", torch.bfloat16): y = run(x)
        y.float().square().mean().backward()
        adamw.step()
    return model, adamw, x, step


def test_repeats_to_the_byte_and_adds_up():
    model, adamw, x, step = mlp()
    rows = [
        memory_by_class(step, model=model, optimizer=adamw, device="cpu", inputs=x, batch=48, seq=1) for _ in range(3)]
    assert rows[0] == rows[1] == rows[2]
    assert sum(rows[0][c] for c in CLASSES) + rows[0]["other"] == rows[0]["peak"]
    assert rows[0]["other"] + rows[0]["overlap"] >= 0
    assert (rows[0]["batch"], rows[0]["seq"]) == (48, 1)


@pytest.mark.parametrize(
    "compiled", [False, pytest.param(True, marks=[pytest.mark.slow, pytest.mark.skipif(
                                                      not capabilities()["compile"].ok,
                                                      reason="torch.compile: " + capabilities()["compile"].why)])])
def test_autocasts_copies_grow_with_the_model_and_activations_with_the_batch(compiled):
    d, rows = 256, {}
    for batch in (1, 4):
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(d, d, bias=False) for _ in range(4)))
        sgd, x, run = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(batch, d), model
        if compiled: run = torch.compile(model, dynamic=False)
        def step():
            sgd.zero_grad()
            with torch.autocast("cpu", torch.bfloat16): y = run(x)
            y.float().sum().backward()
        rows[batch] = memory_by_class(step, model=model, optimizer=sgd, device="cpu", inputs=x)
    # not the first layer's, whose input needs no gradient
    assert [row["copies"] for row in rows.values()] == [2 * 3 * d * d] * 2
    assert rows[1]["activations"] <= 4 * 4 * 2 * d  # the inputs of four layers
    for row in rows.values():
        assert sum(row[c] for c in CLASSES) + row["other"] == row["peak"] and row["other"] + row["overlap"] >= 0


def test_an_activation_that_looks_like_a_weight_is_none():
    d = 32
    # as many rows as columns, as a batch of d
    model = nn.Sequential(nn.Linear(d, d, bias=False), nn.Linear(d, d, bias=False))
    sgd, x = torch.optim.SGD(model.parameters(), lr=0.0), torch.randn(d, d)
    def step():
        sgd.zero_grad()
        with torch.autocast("cpu", torch.bfloat16): y = model(x)
        y.float().sum().backward()
    row = memory_by_class(step, model=model, optimizer=sgd, device="cpu", inputs=x)
    assert (row["copies"], row["activations"]) == (2 * d * d, 2 * 2 * d * d)


def test_agrees_with_torchs_own_tracker():
    tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    model, adamw, x, step = mlp()
    row = memory_by_class(step, model=model, optimizer=adamw, device="cpu", inputs=x)
    watcher = tracker.MemTracker()
    watcher.track_external(model, adamw, x)
    with watcher:
        step()
        watcher.reset_mod_stats()
        step()
    peak = watcher.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    # a dispatch mode does not see the scalars that C++ wraps below it: a few times 8 bytes
    assert 0 <= row["peak"] - peak <= 64


@pytest.mark.skipif(not capabilities()["compile"].ok, reason="torch.compile: " + capabilities()["compile"].why)
def test_compiled_code_is_seen():
    model, adamw, x, step = mlp(compiled=True)
    rows = [memory_by_class(step, model=model, optimizer=adamw, device="cpu", inputs=x) for _ in range(2)]
    eager_model, eager_adamw, eager_x, eager_step = mlp()
    eager = memory_by_class(eager_step, model=eager_model, optimizer=eager_adamw, device="cpu", inputs=eager_x)
    assert rows[0] == rows[1]
    assert all(rows[0][c] == eager[c] for c in ("weights", "gradients", "states"))
    assert rows[0]["activations"] >= 2 * 48 * (64 + 256)  # the matrix products' inputs in bf16, at the least
    assert rows[0]["peak"] <= eager["peak"]  # fusion allocates no more


def test_gradients_that_are_released_never_stand_together():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(128, 128, bias=False) for _ in range(4)))
    sgd = torch.optim.SGD(model.parameters(), lr=1e-3)

    def use(p):
        with torch.no_grad(): p.sub_(1e-3 * p.grad)
        p.grad = None
    for p in model.parameters(): p.register_post_accumulate_grad_hook(use)
    row = memory_by_class(lambda: model(torch.ones(8, 128)).sum().backward(), model=model, optimizer=sgd, device="cpu")
    assert row["gradients"] == 4 * 128 * 128 == row["weights"] // 4


def test_masters_by_name_and_by_declaration():
    class Split(torch.optim.SGD):
        def step(self):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("error_bits", torch.zeros_like(p, dtype=torch.int8))
                self.state[p].setdefault("exp_avg::quantized", torch.zeros_like(p, dtype=torch.int8))

    class Declared(torch.optim.SGD):
        def memory_classes(self): return dict(masters=77, states=5)

    rows = []
    for kind in (Split, Declared):
        tower = Tower(100, 2)
        optimizer = kind(tower.parameters(), lr=0.1)
        rows.append(memory_by_class(stepper(tower, optimizer), model=tower, optimizer=optimizer, device="cpu"))
    assert (rows[0]["masters"], rows[0]["states"]) == (100, 100)
    assert (rows[1]["masters"], rows[1]["states"]) == (77, 5)


def test_states_replaced_each_step_are_counted_once():
    class Replacing(torch.optim.SGD):
        def step(self):
            for p in self.param_groups[0]["params"]: self.state[p]["m"] = torch.zeros_like(p)
    peaks = []
    for kind in (Replacing, torch.optim.SGD):
        tower = Tower(1000, 6)
        optimizer = kind(tower.parameters(), lr=0.)
        peaks.append(memory_by_class(stepper(tower, optimizer), model=tower, optimizer=optimizer, device="cpu")["peak"])
    assert peaks[0] - peaks[1] == 4000  # the state, once: the old one's release is seen


def test_a_step_that_fails_leaves_no_profiler_behind():
    tower = Tower(100, 2)
    sgd = torch.optim.SGD(tower.parameters(), lr=1e-3)
    def failing(n):
        "A step that fails when it is called for the n-th time."
        left = iter([None] * (n - 1))
        def step():
            for _ in left: return
            raise ValueError("as intended")
        return step
    for n in (1, 2, 3):
        with pytest.raises(ValueError, match="as intended"):
            memory_by_class(failing(n), model=tower, optimizer=sgd, device="cpu")
    assert not torch.autograd._profiler_enabled()
    assert memory_by_class(stepper(tower, sgd), model=tower, optimizer=sgd, device="cpu")["peak"] > 0


def test_search_takes_the_largest_that_fits_and_explains_the_rest():
    tried = []
    def attempt(batch):
        tried.append(batch)
        if batch >= 8: raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB\nmore")
        return dict(peak=batch * 100)
    best, rows = largest_micro_batch(attempt, [16, 4, 8, 2, 32], device="cpu")
    assert best == 4 and tried == [2, 4, 8]
    assert rows[2]["oom"] and rows[2]["reason"].endswith("1 GiB")
    assert rows[3]["reason"] == rows[4]["reason"].replace("16", "8") == "not tried: 8 did not fit"
    best, rows = largest_micro_batch(attempt, [2, 4], budget_bytes=300, device="cpu")
    assert best == 2 and not rows[1]["oom"] and "exceeds the budget" in rows[1]["reason"]
    assert memory_budget("cpu", 10 * device_memory("cpu")) == int(0.9 * device_memory("cpu"))


@pytest.mark.cuda
def test_out_of_memory_on_the_device_is_survived():
    whole = device_memory("cuda")
    def attempt(batch): torch.empty(batch * whole // 8, dtype=torch.uint8, device="cuda")
    best, rows = largest_micro_batch(attempt, [1, 2, 16], device="cuda")
    assert best == 2 and rows[2]["oom"]
    assert torch.cuda.memory_allocated() < whole // 8


@pytest.mark.cuda
def test_peak_by_hand_on_the_device():
    n, k = 1 << 20, 5  # multiples of the allocator's 512-byte blocks
    tower = Tower(n, k).cuda()
    sgd = torch.optim.SGD(tower.parameters(), lr=1e-3, momentum=0.9)
    before = torch.cuda.memory_allocated() - 4 * n
    row = memory_by_class(stepper(tower, sgd), model=tower, optimizer=sgd, device="cuda")
    assert row["activations"] == 4 * n * k and row["states"] == row["weights"] == row["gradients"] == 4 * n
    assert 0 <= row["peak"] - before - 4 * n * (1 + 1 + k + 1) <= 1 << 16


def language_model(**stack):
    "A small GPT's training step under a stack, two micro-batches to a step."
    from flashoptim_nb.lm.gpt import GPT, GPTConfig
    from flashoptim_nb.optim.adam import FlashAdamW
    config = GPTConfig(n_layer=2, d_model=64, n_head=2, vocab_size=512, max_seq=64)
    model = GPT(config, stack.get("attention", "eager"), stack.get("checkpointing", "none")).init_weights(0)
    flash = stack.get("optimizer") == "flash_adamw"
    if flash: model = model.bfloat16()
    optimizer = FlashAdamW(model.parameters(), lr=1e-3) if flash else torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.randint(0, 512, (4, 65))

    def step():
        optimizer.zero_grad()
        for part in tokens.chunk(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=not flash):
                (model.loss(part[:, :-1].contiguous(), part[:, 1:].contiguous(), stack.get("loss", "plain"))
                 / 2).backward()
        optimizer.step()
    row = [memory_by_class(step, model=model, optimizer=optimizer, device="cpu", inputs=tokens) for _ in range(2)]
    assert row[0] == row[1]
    return row[0], sum(p.numel() for p in model.parameters()), len(list(model.parameters()))


def test_the_stacks_bytes_per_parameter():
    row, n, tensors = language_model()
    assert {c: row[c] for c in ("weights", "gradients", "masters")} == dict(weights=4 * n, gradients=4 * n, masters=0)
    assert row["states"] == 8 * n + 4 * tensors
    flash, n, tensors = language_model(optimizer="flash_adamw", loss="fused_linear", attention="flash")
    assert {c: flash[c] for c in ("weights", "gradients", "masters")} == dict(weights=2 * n, gradients=2 * n, masters=n)
    assert flash["states"] - 2 * n == pytest.approx(n / 8, rel=0.01)  # two fp16 scales to 32 values
    assert flash["activations"] < row["activations"]  # no attention matrix, no logits
    assert row["copies"] > 0 == flash["copies"]  # nothing to copy where the weights are bf16


@pytest.mark.parametrize("change", [dict(attention="flash"), dict(checkpointing="full"), dict(loss="fused_linear")])
def test_what_saves_activations_is_seen_to(change):
    plain, _, _ = language_model()
    row, _, _ = language_model(**change)
    assert row["activations"] < plain["activations"]
    assert all(row[c] == plain[c] for c in ("weights", "states", "masters", "gradients"))
    if "loss" not in change: assert row["peak"] < plain["peak"]  # the chunked loss saves where rows outnumber its chunk
