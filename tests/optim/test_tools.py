"""The optimizers inside other people's loops: each trains a few steps and ends where a plain loop ends."""
import contextlib
import copy

import pytest
import torch
from torch import nn

from every import CLASSES, MAKERS
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.optim import AveragedMasters, FlashAdamW, cast_model, enable_gradient_release
from flashoptim_nb.optim.state_dict import StateError

KW = dict(lr=1e-2, weight_decay=0.1)
X = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
Y = X[:, :1].sin()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def plain(model, opt, batches, max_norm=None, autocast=False):
    "The loop that the others are compared with."
    for x, y in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast): loss = nn.functional.mse_loss(model(x).float(), y)
        loss.backward()
        if max_norm: nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        opt.step()
        opt.zero_grad()
    return model


def batches(times=1, dtype=torch.float32): return [(X[i:i + 4].to(dtype), Y[i:i + 4]) for i in range(0, 24, 4)] * times


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters()):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "precision, clip", [("32-true", None), ("32-true", 0.5), ("bf16-mixed", None), ("bf16-mixed", 0.5)])
def test_lightning(tmp_path, precision, clip):
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
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", precision=precision, gradient_clip_val=clip, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path)
    trainer.fit(Module(ours), torch.utils.data.DataLoader(batches(), batch_size=None))
    assert_same(ours, plain(theirs, FlashAdamW(theirs.parameters(), **KW), batches(2), clip,
                            autocast=precision == "bf16-mixed"))
    trainer.save_checkpoint(tmp_path / "kept.ckpt", weights_only=False)
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)["optimizer_states"][0]
    again = FlashAdamW(ours.parameters(), **KW)
    again.load_state_dict(kept)
    assert float(again.state[next(ours.parameters())]["step"]) == 12


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    ours, theirs = net(), net()
    model, opt, schedule = accelerator.prepare(
        ours, opt := FlashAdamW(ours.parameters(), **KW), torch.optim.lr_scheduler.ConstantLR(opt, factor=1.0))
    for x, y in batches():
        accelerator.backward(nn.functional.mse_loss(model(x), y))
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        opt.step(); schedule.step(); opt.zero_grad()
    accelerate.state.AcceleratorState._reset_state(True)
    assert_same(ours, plain(theirs, FlashAdamW(theirs.parameters(), **KW), batches(), max_norm=0.5,
                            autocast=precision == "bf16"))


@pytest.mark.parametrize("mixed", [False, True])
def test_hugging_face_trainer(tmp_path, mixed):
    transformers, _ = (pytest.importorskip("transformers"),
                       pytest.importorskip("accelerate", reason="Trainer needs accelerate"))
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=32, vocab_size=97, n_positions=16, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    if not mixed: cast_model(model)
    data = [dict(input_ids=t, labels=t) for t in torch.randint(97, (16, 16))]
    how = dict(output_dir=str(tmp_path), per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True,
               logging_steps=1, learning_rate=1e-2, save_steps=4, seed=0, bf16=mixed, max_grad_norm=1.0)
    def fit(model, steps, **resume):
        trainer = transformers.Trainer(model, transformers.TrainingArguments(max_steps=steps, **how),
                                       train_dataset=data, optimizer_cls_and_kwargs=(FlashAdamW, KW))
        trainer.train(**resume)
        return trainer
    twin = copy.deepcopy(model)
    whole = fit(model, 8)
    losses = [row["loss"] for row in whole.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] and isinstance(whole.optimizer.optimizer, FlashAdamW)
    fit(twin, 8, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))  # its own checkpoint of the optimizer goes on
    for p, q in zip(model.parameters(), twin.parameters()): assert torch.equal(p, q)


@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("half", ["none", "all", "one layer", "added later", "cast later"])
def test_grad_scaler(max_norm, half):
    "fp32 weights are unscaled and left alone by the scaler itself; of fp16 ones, which it refuses, step() does both."
    ours, theirs = net(), net()
    if half in ("all", "cast later"): theirs.half()
    if half in ("one layer", "added later"): theirs[2].half()
    if half == "all": ours.half()
    if half == "one layer": ours[2].half()
    opt, reference = (FlashAdamW(ours[0].parameters() if half == "added later" else ours.parameters(), quantize=False,
                                 max_norm=max_norm, **KW), FlashAdamW(theirs.parameters(), quantize=False, **KW))
    if half == "added later": ours[2].half(); opt.add_param_group(dict(params=ours[2].parameters()))
    if half == "cast later": ours.half()
    assert opt._step_supports_amp_scaling == (half != "none")
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6)
    forward = lambda m, x: m[2](m[1](m[0](x.to(m[0].weight.dtype))).to(m[2].weight.dtype)).float()
    for n, (x, y) in enumerate(batches()):
        scaler.scale(nn.functional.mse_loss(forward(ours, x), y)).backward()
        if n == 3: ours[0].weight.grad[0, 0] = torch.inf
        scaler.step(opt); scaler.update(); opt.zero_grad()
    for n, (x, y) in enumerate(batches()):
        if n == 3: continue
        (nn.functional.mse_loss(forward(theirs, x), y) * 2.0**(6 if n < 3 else 5)).backward()
        for p in theirs.parameters():
            p.grad = (p.grad.float() * 2.0**(-6 if n < 3 else -5) if p.dtype == torch.float32
                      else p.grad * 2.0**(-6 if n < 3 else -5))
        if max_norm: nn.utils.clip_grad_norm_(theirs.parameters(), max_norm)
        reference.step(); reference.zero_grad()
    # fp16 gradients round once more in the reference
    close = dict(rtol=1e-5, atol=1e-6) if half == "none" else dict(rtol=1e-2, atol=2e-3)
    for p, q in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(p.detach(), q.detach(), **close)
    assert scaler.get_scale() == 2.0**5 and int(opt.skipped_steps) == (half != "none")


def test_a_scaler_unscales_what_is_to_be_clipped():
    "Autocast in fp16 over fp32 weights, with torch's own clipping in between, as trainers do it."
    ours, theirs = net(), net()
    opt, reference, scaler = (FlashAdamW(ours.parameters(), **KW), FlashAdamW(theirs.parameters(), **KW),
                              torch.amp.GradScaler("cpu", init_scale=2.0**10))
    for x, y in batches():
        scaler.scale(nn.functional.mse_loss(ours(x), y)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(ours.parameters(), 0.5)
        scaler.step(opt); scaler.update(); opt.zero_grad()
    assert_same(ours, plain(theirs, reference, batches(), max_norm=0.5))


def zero(model, **options):
    from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(model.parameters(), FlashAdamW, **KW, **options)


@pytest.mark.parametrize(
    "options", [dict(), dict(max_norm=1.0), dict(skip_nonfinite=None, max_norm=1.0), dict(quantize=False, fused=None),
                dict(master_weight_bits=32), dict(decouple_lr=True, companded=False)], ids=str)
def test_zero_redundancy_optimizer(options, tmp_path):
    "Of one rank: it hands every option to the groups, deals states out and gathers them."
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours, theirs, again = net(), net(), net()
        opt = zero(ours, **options)
        plain(ours, opt, batches())
        assert_same(ours, plain(theirs, FlashAdamW(theirs.parameters(), **KW, **options), batches()))
        opt.consolidate_state_dict(0)
        kept = copy.deepcopy(opt.state_dict())
        again.load_state_dict(ours.state_dict())
        resumed = zero(again, **options); resumed.load_state_dict(kept)
        plain(ours, opt, batches()); plain(again, resumed, batches())
        for p, q in zip(ours.parameters(), again.parameters()): assert torch.equal(p, q)
    finally: torch.distributed.destroy_process_group()


def test_options_in_a_group_that_are_not_the_optimizers():
    from flashoptim_nb.optim import OptionError
    p = nn.Parameter(torch.zeros(4))
    for group, options in ((dict(quantize=True), dict(quantize=False)), (dict(max_norm=None), dict(max_norm=1.0)),
                           (dict(max_norm=2.0), dict(max_norm=1.0)), (dict(skip_nonfinite=False), dict(max_norm=1.0)),
                           (dict(compress_state_dict=False), dict(compress_state_dict=False))):
        with pytest.raises(OptionError, match=next(iter(group))): FlashAdamW([dict(params=[p], **group)], **options)
    FlashAdamW([dict(params=[p], max_norm=1.0, skip_nonfinite=None)], max_norm=1.0)


def test_clipping_by_a_norm_that_is_not_finite_is_refused():
    from flashoptim_nb.optim import OptionError
    p = nn.Parameter(torch.zeros(4))
    with pytest.raises(OptionError, match="skip_nonfinite=False beside max_norm=1.0"): FlashAdamW([p], max_norm=1.0, skip_nonfinite=False)
    assert FlashAdamW([p], max_norm=1.0).skip_nonfinite and not FlashAdamW([p], skip_nonfinite=False).skip_nonfinite


def test_options_dealt_out_to_ranks(monkeypatch):
    "Each rank would clip by the norm of its own share."
    from flashoptim_nb.optim import OptionError
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    p = nn.Parameter(torch.zeros(4))
    with pytest.raises(OptionError, match="clip_grad_norm_"): FlashAdamW([dict(params=[p], max_norm=1.0)], max_norm=1.0)
    FlashAdamW([dict(params=[p], quantize=True, max_norm=None)])
    FlashAdamW([p], max_norm=1.0)


SCHEDULES = torch.optim.lr_scheduler


@pytest.mark.parametrize("make", [cls for cls in CLASSES if cls.decoupled], ids=lambda make: make.__name__)
@pytest.mark.parametrize("schedule",
                         [lambda o: SCHEDULES.ConstantLR(o, 1.0), lambda o: SCHEDULES.LinearLR(o, 0.1, 1.0, 20),
                          lambda o: SCHEDULES.LambdaLR(o, lambda n: min(n / 20, 1.0)),
                          lambda o: SCHEDULES.OneCycleLR(o, max_lr=1e-2, total_steps=60, cycle_momentum=False),
                          lambda o: SCHEDULES.CyclicLR(o, 1e-4, 1e-2, 20, cycle_momentum=False)],
                         ids=["constant", "warm-up", "from zero", "one cycle", "cyclic"])
@pytest.mark.parametrize("tensor", [False, True])
def test_decoupled_decay_under_schedulers(make, schedule, tensor):
    """Weights shrink by weight_decay where the lr is the constructor's, and in proportion elsewhere,
    whatever a scheduler writes into the groups, before and after a checkpoint."""
    decay, p = 1e-3, nn.Parameter(torch.ones(32))
    new = lambda: make(
        [p], lr=torch.tensor(1e-2) if tensor else 1e-2, weight_decay=decay, decouple_lr=True, quantize=False)
    opt = new()
    scheduler = schedule(opt)
    for n in range(50):
        p.data.fill_(1.0); p.grad = torch.zeros(32)
        opt.step()
        lr = float(opt.param_groups[0]["lr"])
        assert 1 - p[0].item() == pytest.approx(decay * lr / 1e-2, rel=1e-2, abs=2e-7)
        scheduler.step()
        if n == 25: kept = copy.deepcopy(opt.state_dict())
    fresh = make([p], lr=1.0, weight_decay=decay, decouple_lr=True, quantize=False)
    fresh.load_state_dict(kept)
    assert fresh.param_groups[0]["reference_lr"] == pytest.approx(1e-2)


def test_decoupled_decay_of_older_states_and_later_groups():
    from flashoptim_nb.optim import OptionError
    new = lambda lr=1e-2: FlashAdamW([nn.Parameter(torch.ones(4))], lr=lr, weight_decay=1e-3, decouple_lr=True)
    opt = new(); old = opt.state_dict()
    old["param_groups"][0].pop("reference_lr"); old["param_groups"][0]["initial_lr"] = 2e-2
    opt.load_state_dict(old)
    assert opt._decays(opt.param_groups[0])["weight_decay"] == pytest.approx(1e-3 / 2e-2)
    opt.add_param_group(dict(params=[nn.Parameter(torch.ones(2))], lr=5e-2))
    assert opt.param_groups[1]["reference_lr"] == 5e-2
    torchs = torch.optim.AdamW([nn.Parameter(torch.ones(4))], lr=1e-2)
    SCHEDULES.OneCycleLR(torchs, max_lr=1e-2, total_steps=10)
    (fresh := new()).load_state_dict(torchs.state_dict())
    assert fresh.param_groups[0]["reference_lr"] == 1e-2  # and not the lr at which torch's schedule began
    pickled = copy.deepcopy(new())
    pickled.param_groups[0].pop("reference_lr")
    pickled.param_groups[0]["initial_lr"] = 2e-2
    assert pickled._decays(pickled.param_groups[0])["weight_decay"] == pytest.approx(1e-3 / 2e-2)
    with pytest.raises(OptionError, match="lr=0"): new(lr=0.0)
    FlashAdamW([nn.Parameter(torch.ones(4))], lr=0.0, weight_decay=0.0, decouple_lr=True)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
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
    # compiled gradients round elsewhere
    for p, q in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-3, atol=1e-3)


def _wrapped(kind, opt, model):
    "An optimizer and its model as Lightning, Fabric and Accelerate hand them to a program."
    if kind == "lightning":
        from lightning.pytorch.core.optimizer import LightningOptimizer
        return model, LightningOptimizer(opt)
    if kind == "fabric":
        from lightning.fabric import Fabric
        return Fabric(accelerator="cpu", devices=1).setup(model, opt)
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerate.state.AcceleratorState._reset_state(True)
    try: return accelerate.Accelerator(cpu=True).prepare(model, opt)
    finally: accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.parametrize("kind", ["lightning", "fabric"])
def test_what_is_set_on_a_wrapper_reaches_the_optimizer(kind):
    pytest.importorskip("lightning", reason="lightning is not installed")
    cast_model(model := net())
    opt = FlashAdamW(model.parameters(), **KW)
    outer, wrapper = _wrapped(kind, opt, model)
    wrapper.max_norm, wrapper.compress_state_dict = 0.5, False
    plain(model, opt, batches(dtype=torch.bfloat16))
    assert float(wrapper.grad_norm) > 0 and "exp_avg" in wrapper.state_dict()["state"][0]
    # a dict that is loaded, and what a scheduler does to step()
    wrapper.load_state_dict(opt.state_dict() | dict(state={}))
    assert not opt.state and opt._next_clip is None
    torch.optim.lr_scheduler.ConstantLR(wrapper, factor=0.5)
    assert opt.param_groups[0]["lr"] == KW["lr"] / 2 and "step" not in vars(opt)
    handle = enable_gradient_release(model, wrapper)
    assert handle.optimizer is opt and opt.release is wrapper.release is handle
    plain(outer, opt, batches(dtype=torch.bfloat16))
    assert float(opt.state[next(model.parameters())]["step"]) == 6 and float(opt._next_clip) < 1
    handle.remove()
    assert opt.release is wrapper.release is None


def test_weights_that_are_loaded_after_prepare_begin_where_they_are():
    "It saves and loads the optimizer's states, which begin so, with what the cast took from other weights."
    cast_model(model := net())
    _, wrapper = _wrapped("accelerate", FlashAdamW(model.parameters(), **KW), model)
    torch.manual_seed(1)
    model.load_state_dict(loaded := {name: torch.randn_like(t) for name, t in model.state_dict().items()})
    for name, t in wrapper.optimizer.get_fp32_model_state_dict(model).items(): assert torch.equal(t, loaded[name].float())


def test_release_under_accelerate_is_refused_with_the_way_that_works():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    def trained(release):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        cast_model(model := net())
        opt = FlashAdamW(model.parameters(), **KW)
        model, wrapper, schedule, loader = accelerator.prepare(
            model, opt, torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, 6),
            torch.utils.data.DataLoader(batches(dtype=torch.bfloat16)[:5], batch_size=None))
        if release:
            with pytest.raises(UserError, match="clips nothing.*Give the optimizer inside, optimizer.optimizer.*max_norm"):
                enable_gradient_release(model, wrapper)
            assert opt.release is None
            handle = enable_gradient_release(model, wrapper.optimizer)
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(x), y)
                with handle.accumulate() if release and not accelerator.sync_gradients else contextlib.nullcontext():
                    accelerator.backward(loss)
                wrapper.step(); schedule.step(); wrapper.zero_grad()
        accelerate.state.AcceleratorState._reset_state(True)
        assert float(opt.state[next(model.parameters())]["step"]) == 3
        return model
    for p, q in zip(trained(False).parameters(), trained(True).parameters()): assert torch.equal(p, q)


@pytest.mark.parametrize("kind", ["lightning", "fabric", "accelerate"])
def test_averages_by_a_wrapper(kind):
    if kind != "accelerate": pytest.importorskip("lightning", reason="lightning is not installed")
    cast_model(model := net())
    outer, wrapper = _wrapped(kind, opt := FlashAdamW(model.parameters(), **KW), model)
    average = AveragedMasters(wrapper, outer, decay=0.5)
    plain(model, opt, batches(dtype=torch.bfloat16))
    average.update()
    with average.applied():
        for asked in opt, wrapper:
            with pytest.raises(StateError, match="leave applied"): asked.state_dict()
        with pytest.raises(UserError, match="leave applied"): opt.step()
    other = _wrapped(kind, torch.optim.SGD(model.parameters(), lr=0.1), model)[1]
    with pytest.raises(UserError, match="averages of the masters of a SGD, which has none"): AveragedMasters(other, model)
