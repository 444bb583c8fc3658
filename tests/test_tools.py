"""The optimizers inside other people's loops: each trains a few steps and ends where a plain loop ends."""
import copy

import pytest
import torch
from torch import nn

from flashoptim_nb.optim import FlashAdamW, FlashLion, FlashSGD, cast_model

KW = dict(lr=1e-2, weight_decay=0.1)
X = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
Y = X[:, :1].sin()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def plain(model, opt, batches, max_norm=None):
    "The loop that the others are compared with."
    for x, y in batches:
        loss = nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        if max_norm: nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        opt.step()
        opt.zero_grad()
    return model


def batches(times=1, dtype=torch.float32): return [(X[i:i + 4].to(dtype), Y[i:i + 4]) for i in range(0, 24, 4)] * times


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters()): torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model
        def training_step(self, batch, _): return nn.functional.mse_loss(self.model(batch[0]), batch[1])
        def configure_optimizers(self):
            opt = FlashAdamW(self.model.parameters(), **KW)
            return [opt], [torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0)]

    ours, theirs = net(), net()
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(Module(ours), torch.utils.data.DataLoader(batches(), batch_size=None))
    assert_same(ours, plain(theirs, FlashAdamW(theirs.parameters(), **KW), batches(2)))
    trainer.save_checkpoint(tmp_path / "kept.ckpt", weights_only=False)
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)["optimizer_states"][0]
    again = FlashAdamW(ours.parameters(), **KW)
    again.load_state_dict(kept)
    assert float(again.state[next(ours.parameters())]["step"]) == 12


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True)
    ours, theirs = net(), net()
    model, opt, schedule = accelerator.prepare(ours, opt := FlashAdamW(ours.parameters(), **KW), torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0))
    for x, y in batches():
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        opt.step(); schedule.step(); opt.zero_grad()
    assert_same(ours, plain(theirs, FlashAdamW(theirs.parameters(), **KW), batches(), max_norm=0.5))


def test_hugging_face_trainer(tmp_path):
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("accelerate", reason="Trainer needs accelerate")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=97, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    cast_model(model)
    data = [dict(input_ids=t, labels=t) for t in torch.randint(97, (16, 16))]
    how = dict(output_dir=str(tmp_path), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, learning_rate=1e-2, save_steps=4, seed=0)
    def fit(model, steps, **resume):
        trainer = transformers.Trainer(model, transformers.TrainingArguments(max_steps=steps, **how), train_dataset=data, optimizer_cls_and_kwargs=(FlashAdamW, KW))
        trainer.train(**resume)
        return trainer
    twin = copy.deepcopy(model)
    whole = fit(model, 8)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] and isinstance(whole.optimizer.optimizer, FlashAdamW)
    fit(twin, 8, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # its own checkpoint of the optimizer goes on
    for p, q in zip(model.parameters(), twin.parameters()): assert torch.equal(p, q)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_grad_scaler(max_norm):
    ours, theirs = net(), net()
    opt, reference = FlashAdamW(ours.parameters(), quantize=False, max_norm=max_norm, **KW), FlashAdamW(theirs.parameters(), quantize=False, **KW)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for n, (x, y) in enumerate(batches()):
        loss = nn.functional.mse_loss(ours(x), y)
        scaler.scale(loss).backward()
        if n == 3: ours[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt); scaler.update(); opt.zero_grad()
    plain(theirs, reference, [b for n, b in enumerate(batches()) if n != 3], max_norm)
    for p, q in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 2.0**9 and int(opt.skipped_steps) == 1


@pytest.mark.parametrize("make", [FlashAdamW, FlashLion, lambda p, **kw: FlashSGD(p, momentum=0.9, **kw)], ids=["FlashAdamW", "FlashLion", "FlashSGD"])
def test_a_compiled_step(make):
    from flashoptim_nb.base.machine import capabilities
    if not (able := capabilities()["compile"]).ok: pytest.skip(able.why)
    ours, theirs = net(), net()
    opt = make(ours.parameters(), **KW)

    @torch.compile
    def step(x, y):
        nn.functional.mse_loss(ours(x), y).backward()
        opt.step()
        opt.zero_grad()

    for x, y in batches(): step(x, y)
    plain(theirs, make(theirs.parameters(), **KW), batches())
    for p, q in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-3)  # compiled gradients round elsewhere
