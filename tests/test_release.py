"""Gradient release: the same bits as ordinary steps, gradients that do not outlive their use."""
import pytest
import torch
from torch import nn

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.optim import FlashAdamW, enable_gradient_release

KW = dict(lr=1e-2, betas=(0.9, 0.95))


class Model(nn.Module):
    "An embedding tied to the head, and a layer that some micro-batches leave out."
    def __init__(self, dtype=torch.bfloat16):
        super().__init__(); torch.manual_seed(0)
        self.embed, self.mid, self.rare, self.head = nn.Embedding(17, 32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 17, bias=False)
        self.head.weight = self.embed.weight
        self.to(dtype)

    def forward(self, seed, rare=True):
        x = self.mid(self.embed(torch.randint(0, 17, (64,), generator=torch.Generator().manual_seed(seed)))).tanh()
        return self.head(x + self.rare(x) if rare else x).float().logsumexp(-1).mean()


def pair(**options):
    "Ordinary and releasing training of the same model."
    a, b = Model(), Model()
    o, r = FlashAdamW(a.parameters(), **KW, **options), FlashAdamW(b.parameters(), **KW, **options)
    return a, o, b, r, enable_gradient_release(b, r)


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


@pytest.mark.parametrize("options", [dict(), dict(quantize=False, master_weight_bits=None), dict(skip_nonfinite=False)])
def test_same_bits(options):
    a, o, b, r, handle = pair(**options)
    for t in range(6):
        a(t).backward(); o.step(); o.zero_grad()
        b(t).backward()
        assert all(p.grad is None for p in b.parameters())
        r.step(); r.zero_grad()
    assert equal(a, b)
    if not options: torch.testing.assert_close(o.grad_norm, r.grad_norm)


def test_few_gradients_live_at_once():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    opt, alive = FlashAdamW(layers.parameters()), []
    enable_gradient_release(layers, opt, pre_step=lambda p: alive.append(sum(q.grad is not None for q in layers.parameters())))
    layers(torch.randn(4, 64)).sum().backward(); opt.step()
    assert len(alive) == 24 and max(alive) <= 2


def test_accumulation_with_a_layer_that_the_last_micro_batch_leaves_out():
    a, o, b, r, handle = pair()
    for t in range(4):
        a(2 * t).backward(); a(2 * t + 1, rare=False).backward(); o.step(); o.zero_grad()
        with handle.accumulate(): b(2 * t).backward()
        assert b.rare.weight.grad is not None
        b(2 * t + 1, rare=False).backward(); r.step()
        assert all(p.grad is None for p in b.parameters())
    assert equal(a, b)


def test_clipping_by_the_previous_norm():
    a, o, b, r, handle = pair(max_norm=0.02)
    previous = None
    plain = FlashAdamW(a.parameters(), **KW)
    for t in range(5):
        a(t).backward()
        norm = torch.stack([p.grad.float().norm() for p in a.parameters()]).norm()
        scale = None if previous is None else (0.02 / (previous + 1e-6)).clamp(max=1)
        for g in plain.param_groups:
            for p in g["params"]: plain.step_param(p, g, scale)
        plain.zero_grad()
        b(t).backward(); r.step()
        torch.testing.assert_close(r.grad_norm, norm, rtol=1e-3, atol=0)
        previous = r.grad_norm
    assert equal(a, b)


def test_a_bad_gradient_leaves_its_parameter_and_counts_once():
    a, o, b, r, handle = pair(skip_nonfinite=True)
    b(0).backward(); r.step()
    before = {n: p.detach().clone() for n, p in b.named_parameters()}
    hook = b.mid.weight.register_hook(lambda g: g * torch.nan)
    b(1).backward(); r.step(); hook.remove()
    after = dict(b.named_parameters())
    assert torch.equal(after["mid.weight"], before["mid.weight"]) and not torch.equal(after["rare.weight"], before["rare.weight"])
    assert r.skipped_steps == 1 and not r.grad_norm.isfinite()
    b(2).backward(); r.step()
    assert r.skipped_steps == 1 and not torch.equal(b.mid.weight, before["mid.weight"])


def test_with_a_loss_scaler():
    a, o, b, r, handle = pair(); handle.remove()
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    enable_gradient_release(b, r, grad_scaler=scalers[1])
    for t in range(4):
        for m, opt, s in (a, o, scalers[0]), (b, r, scalers[1]):
            s.scale(m(t)).backward(); s.step(opt); s.update(); opt.zero_grad()
    assert equal(a, b) and scalers[0].get_scale() == scalers[1].get_scale()


def test_remove_restores_ordinary_steps():
    a, o, b, r, handle = pair()
    handle.remove()
    for m, opt in (a, o), (b, r): m(0).backward(); opt.step()
    assert not handle.active and equal(a, b) and all(p.grad is not None for p in b.parameters())
    enable_gradient_release(b, r).remove()


def test_where_it_cannot_be_right():
    m = Model(); opt = FlashAdamW(m.parameters())
    enable_gradient_release(m, opt)
    for bad in (lambda: enable_gradient_release(m, opt), lambda: enable_gradient_release(m, torch.optim.AdamW(m.parameters())),
                lambda: enable_gradient_release(Model(), FlashAdamW([nn.Parameter(torch.zeros(2))]))):
        with pytest.raises(UserError): bad()
