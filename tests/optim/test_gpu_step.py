"""What only a GPU can show of a step: no waiting for the device, life inside CUDA graphs, parameters on two devices,
no hidden memory."""
import copy

import pytest
import torch
from torch import nn

from every import MAKERS

ELEMENTWISE = [name for name in MAKERS if name != "FlashMuon"]  # whose products need scratch memory, and round to bf16

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def net(dtype=torch.bfloat16):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(200, 333), nn.LayerNorm(333), nn.Linear(333, 7)).to("cuda", dtype)


def gradients(model, n):
    rng = torch.Generator("cuda").manual_seed(0)
    return [
        [torch.randn(p.shape, generator=rng, device="cuda").to(p.dtype) for p in model.parameters()] for _ in range(n)]


def feed(model, grads):
    for p, g in zip(model.parameters(), grads):
        if p.grad is None: p.grad = g.clone()
        else: p.grad.copy_(g)


def bits(model, opt): return [*model.parameters(), *(t for p in model.parameters() for t in opt.state[p].values())]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("options", [{}, dict(max_norm=0.5)], ids=["plain", "clipped"])
def test_inside_a_cuda_graph(name, options):
    a = net()
    b, grads = copy.deepcopy(a), gradients(a, 7)
    rates = [torch.tensor(1e-2, device="cuda") for _ in range(2)]
    oa, ob = (MAKERS[name](m.parameters(), lr=lr, **options) for m, lr in zip((a, b), rates))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # states and tables are made before the capture
        for n in range(2): feed(a, grads[n]); oa.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): oa.step()
    for n in range(2): feed(b, grads[n]); ob.step()
    for n in range(2, 7):
        if n == 4:
            for lr in rates: lr.fill_(1e-3)
        if n == 5: grads[n][0][0, 0] = torch.nan if options else 0.0
        feed(a, grads[n]); graph.replay()
        feed(b, grads[n]); ob.step()
    assert all(torch.equal(x, y) for x, y in zip(bits(a, oa), bits(b, ob)))
    assert int(oa.skipped_steps) == int(ob.skipped_steps) == bool(options)


@pytest.mark.parametrize("name", MAKERS)
def test_a_graph_reads_its_own_tables_after_steps_at_many_other_addresses(name):
    "The addresses were known before the capture, and are dropped from what is known while the graph is kept."
    a = net()
    b, grads = copy.deepcopy(a), gradients(a, 14)
    oa, ob = (MAKERS[name](m.parameters(), lr=torch.tensor(1e-2, device="cuda")) for m in (a, b))
    feed(a, grads[0]), feed(b, grads[0])
    home = [p.grad for p in a.parameters()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side): oa.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): oa.step()
    ob.step()
    for n in range(1, 13):
        for p, g in zip(a.parameters(), grads[n]): p.grad = g
        feed(b, grads[n])
        oa.step(), ob.step()
    spoiled = [
        torch.full((size,), -1, dtype=torch.int64, device="cuda") for size in (4, 8, 16, 64, 512) for _ in range(64)]
    for p, g, new in zip(a.parameters(), home, grads[13]): p.grad = g; g.copy_(new)
    feed(b, grads[13])
    graph.replay(), ob.step()
    assert spoiled and all(torch.equal(x, y) for x, y in zip(bits(a, oa), bits(b, ob)))


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize(
    "options", [{}, dict(max_norm=0.5), dict(quantize=False)], ids=["plain", "clipped", "fp32 states"])
def test_a_step_never_waits_for_the_device(name, options):
    model = net()
    opt, grads = MAKERS[name](model.parameters(), lr=1e-2, **options), gradients(model, 3)
    feed(model, grads[0]); opt.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for n in (1, 2): feed(model, grads[n]); opt.step()
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_a_step_hides_no_memory(name):
    model = nn.Linear(4096, 4096, device="cuda", dtype=torch.bfloat16)
    opt = MAKERS[name](model.parameters(), lr=1e-2, max_norm=1.0)
    feed(model, gradients(model, 1)[0]); opt.step()
    torch.cuda.synchronize(); torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    opt.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1 << 16, (
        "a few scalars and tables, nothing that grows with the parameters")


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_parameters_on_two_devices_share_a_norm(name):
    whole = net(torch.float32).cpu()
    split, grads = copy.deepcopy(whole), gradients(whole.cuda(), 4)
    whole.cpu(); split[0].cuda()  # the first layer on the GPU, the others offloaded
    ow, osplit = (MAKERS[name](m.parameters(), lr=1e-2, max_norm=0.5, quantize=False) for m in (whole, split))
    for step in grads:
        for p, q, g in zip(whole.parameters(), split.parameters(), step): p.grad, q.grad = g.cpu(), g.to(q.device)
        ow.step(); osplit.step()
        torch.testing.assert_close(ow.grad_norm.cpu(), osplit.grad_norm.cpu(), rtol=1e-5, atol=0)
    for p, q in zip(whole.parameters(), split.parameters()):
        torch.testing.assert_close(p.detach(), q.detach().cpu(), rtol=1e-5, atol=1e-5)
