"""A surrogate learns the same whatever its batch is split into, goes on bit for bit,
meets overflows as its precision promises, and is evaluated as it says."""
import copy

import numpy as np
import pytest
import torch

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.surrogates.largest import enforced, largest, worst_rows
from flashoptim_nb.study.checkpoint import load_checkpoint, save_checkpoint
from flashoptim_nb.surrogates.precision import LossScale, forward_in
from flashoptim_nb.surrogates.task import SurrogateTask, sized
from flashoptim_nb.train.config import SURROGATE_CONFIGS as CONFIGS, SURROGATE_RECIPE
from flashoptim_nb.surrogates.domains.toy.domain import Toy, ToyBatch

TRAINED = [name for name, one in CONFIGS.items() if not one.fused_messages and not one.pyg]  # the toy network passes no messages
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.fixture
def seed(rng_seed): return rng_seed % 10_000


def task(name, seed, device="cpu", domain=None, **recipe):
    return SurrogateTask(domain or Toy(seed=seed), CONFIGS[name], SURROGATE_RECIPE.replace(
                             **dict(epochs=4, batch=32, lr=1e-2) | recipe), seed=seed, device=device)


def state(one): return [*one.weights(), *(one.ema_weights or [])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_task_goes_on_bit_for_bit(name, seed, device, tmp_path):
    one, two = task(name, seed, device), task(name, seed + 1, device, domain=Toy(seed=seed))
    two.seed = seed
    cut = 3 + seed % 9
    for n in range(1, cut): one.step(n)
    save_checkpoint(tmp_path / "c.safetensors", one.state_dict())
    two.load_state_dict(load_checkpoint(tmp_path / "c.safetensors", device))
    assert [one.step(n) for n in range(cut, cut + 12)] == [two.step(n) for n in range(cut, cut + 12)]
    assert all(torch.equal(a, b) for a, b in zip(state(one), state(two), strict=True))


def test_the_order_is_a_function_of_seed_and_step_alone(seed):
    one, other = task("fp32", seed), task("flash_2x", seed)
    epoch = np.concatenate([one.batch_indices(n) for n in range(1, 11)])
    assert sorted(epoch) == list(range(320))
    assert all((one.batch_indices(n) == other.batch_indices(n)).all() for n in (25, 3, 11))
    assert (one.batch_indices(1) != task("fp32", seed + 1, domain=one.domain).batch_indices(1)).any()


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_accumulation_is_the_whole_batch(parts, seed):
    whole, split = task("fp32", seed), task("fp32", seed)
    split.config = split.config.replace(accumulate=parts)
    a, b = [[one.step(n) for n in range(1, 6)] for one in (whole, split)]
    assert np.allclose([r["loss"] for r in a], [r["loss"] for r in b], rtol=1e-5)
    assert np.allclose([r["grad_norm"] for r in a], [r["grad_norm"] for r in b], rtol=1e-4)


@pytest.mark.parametrize("name", ["mixed_bf16_checkpointing", "flash_release"])
def test_what_saves_memory_changes_the_first_step_by_no_more_than_rounding(name, seed):
    plain = task("flash" if "flash" in name else "mixed_bf16", seed)
    assert task(name, seed).step(1)["loss"] == pytest.approx(plain.step(1)["loss"], rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_the_mean_is_of_the_fp32_weights(seed, device):
    for name in ("fp32", "flash"):
        one = task(name, seed, device, ema=0.9, ema_every=2)
        mean = [w.clone() for w in one.weights()]
        for n in range(1, 9):
            one.step(n)
            if n % 2 == 0:
                keep = one.recipe.decay_at(n)
                mean = [keep * m + (1 - keep) * w for m, w in zip(mean, one.weights())]
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mean, one.ema_weights, strict=True))
        assert one.ema_weights[0].dtype == torch.float32


def test_without_a_mean_the_weights_are_evaluated(seed):
    one = task("fp32", seed, ema=0)
    one.step(1)
    assert one.evaluate() == one.evaluate(ema=False)
    with pytest.raises(UserError, match="no mean of the weights"): one.evaluate(ema=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", TRAINED)
def test_a_step_that_is_not_finite_teaches_nothing_and_is_counted(name, seed, device):
    one = task(name, seed, device)
    one.step(1)
    before, micros = copy.deepcopy(state(one)), one.micros
    one.micros = lambda n: [ToyBatch(batch.x, batch.y * (torch.inf if n == 2 else 1)) for batch in micros(n)]
    row = one.step(2)
    bad, scaled = CONFIGS[name].release, CONFIGS[name].scaling == "dynamic"
    assert (row["skipped"], row["partial"], one.skipped) == (not bad, bad, 1)
    if not bad: assert all(torch.equal(a, b) for a, b in zip(before, state(one), strict=True))
    after = one.step(3)
    assert not after["skipped"] and np.isfinite(after["loss"])
    assert after["loss_scale"] == row["loss_scale"] * (0.5 if scaled else 1)


def test_a_static_loss_scale_stays_and_a_dynamic_one_recovers(seed):
    for name, ends in (("mixed_fp16_static", 65536.0), ("mixed_fp16", 65536.0 * 0.5**3)):
        scale = LossScale(CONFIGS[name], "cpu")
        weight = torch.nn.Parameter(torch.ones(2, 2))
        optimizer = torch.optim.AdamW([weight], fused=True)
        for _ in range(3):
            weight.grad = torch.full((2, 2), torch.inf)
            scale(torch.zeros(()))
            scale.scaler.unscale_(optimizer)
            scale.scaler.step(optimizer)
            scale.scaler.update(scale.static)
        assert scale.value == ends and torch.equal(weight, torch.ones(2, 2))


def test_flags_are_put_back_also_after_an_error():
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [flag.allow_tf32 for flag in flags]
    for name in ("fp32", "tf32", "mixed_bf16"):
        with pytest.raises(ZeroDivisionError), forward_in(CONFIGS[name], "cpu"):
            assert flags[0].allow_tf32 == CONFIGS[name].tf32
            1 / 0
        assert [flag.allow_tf32 for flag in flags] == before
        assert not torch.is_autocast_enabled("cpu")


def test_evaluation_in_fp32_uses_what_the_corrections_hold(seed):
    one = task("flash", seed)
    for n in range(1, 20): one.step(n)
    whole, batch = one.surrogate("fp32", ema=False), one.domain.batch("test", np.arange(40))
    assert {p.dtype for p in whole.model.parameters()} == {torch.float32}
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), one.weights(), strict=True))
    assert torch.allclose(whole(batch), one.surrogate(ema=False)(batch), atol=0.2)
    assert {p.dtype for p in one.surrogate().model.parameters()} == {torch.bfloat16}
    before = [w.clone() for w in one.weights()]
    one.surrogate()(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, one.weights()))


def test_errors_are_those_of_the_predictions(seed):
    one = task("fp32", seed)
    n = one.domain.size("test")
    rows = one.domain.batch("test", np.arange(n))
    off = (one.predict(rows) - rows.y).double()
    for row, mae, rmse in zip(one.evaluate(), off.abs().mean(0), off.square().mean(0).sqrt()):
        assert (row["mae"] == pytest.approx(mae.item(), rel=1e-5)
                and row["rmse"] == pytest.approx(rmse.item(), rel=1e-5) and row["n"] == n)


def test_twice_as_large_is_counted_in_parameters():
    (one, a), (two, b) = sized(Toy(), 1), sized(Toy(), 2)
    assert b / a == pytest.approx(2, rel=0.02) and task("fp32_2x", 0).parameters == b


def test_the_largest_model_fits_and_the_next_does_not(seed):
    recipe, toy = SURROGATE_RECIPE.replace(epochs=1, batch=16), Toy(64, seed)
    row, tries = largest(toy, CONFIGS["fp32"], recipe, (1 + seed % 4) << 20, "cpu")
    assert row["peak"] <= row["budget"] and row["parameters"] == max(t["parameters"] for t in tries if t["fits"])
    over = [t["parameters"] for t in tries if not t["fits"]]
    assert over and min(over) < 1.1 * row["parameters"]


def test_a_budget_too_small_is_told(seed):
    row, tries = largest(Toy(64, seed), CONFIGS["flash"], SURROGATE_RECIPE.replace(epochs=1, batch=16), 1000, "cpu")
    assert row["width"] is None and "nothing fits" in row["note"] and not any(t["fits"] for t in tries)
    with pytest.raises(UserError, match="above 0"), enforced("cpu", -1): pass


def test_the_worst_rows_are_the_largest(seed):
    class Ragged(Toy):
        def batch(self, split, which):
            return super().batch(split, np.repeat(which, 1 + (np.asarray(which) * 7919 + seed) % 13))
    toy = Ragged(200)
    sizes = 1 + (np.arange(200) * 7919 + seed) % 13
    assert sorted(sizes[worst_rows(toy, 20)]) == sorted(sizes)[-20:]


@pytest.mark.cuda
def test_a_budget_is_enforced_by_the_allocator():
    with enforced("cuda", 1 << 30):
        with pytest.raises(torch.OutOfMemoryError): torch.empty(3 << 29, dtype=torch.uint8, device="cuda")
    del_me = torch.empty(3 << 29, dtype=torch.uint8, device="cuda")
    assert del_me.numel() == 3 << 29
    with pytest.raises(UserError, match="more than the"), enforced("cuda", 1 << 50): pass


def test_a_batch_of_fewer_rows_than_micro_batches_is_refused(seed):
    "An empty micro-batch has no mean error, and its NaN stood for the step's loss."
    with pytest.raises(UserError, match="a batch of 3 rows cannot be divided into 4 micro-batches: give batch=4"):
        task("mixed_bf16_accumulate", seed, batch=3)
    assert np.isfinite(task("mixed_bf16_accumulate", seed, batch=4).step(1)["loss"])


class Holed(Toy):
    "Some rows of the training split are not finite."
    def __init__(self, bad): super().__init__(); self.bad = bad
    def batch(self, split, which):
        rows = super().batch(split, which)
        bad = torch.tensor([split == "train" and self.bad(int(row)) for row in which])
        return ToyBatch(rows.x.masked_fill(bad[:, None], torch.nan), rows.y)


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_that_taught_nothing_is_told_and_never_handed_over_in_silence(name):
    one = task(name, 0, domain=Holed(lambda row: True), epochs=3)
    with pytest.warns(UserWarning, match=r"the last \d+ of \d+ steps of toy.*not finite in x \(row \d+ of the training rows\)"):
        for n in range(1, one.steps + 1): one.step(n)
    with pytest.warns(UserWarning, match=f"learned nothing: all {one.steps} steps"): one.surrogate()


def test_few_rows_that_are_not_finite_are_named_at_the_end_and_none_is_no_word():
    import warnings
    one = task("flash", 0, domain=Holed(lambda row: row == 7), epochs=3)
    with pytest.warns(UserWarning, match=r"^3 of 30 steps of toy under flash taught nothing, .* not finite in x \(row 7 of the training rows\); leave"):
        for n in range(1, one.steps + 1): one.step(n)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = task("mixed_fp16", 0, epochs=1)
        for n in range(1, whole.steps + 1): whole.step(n)
        whole.evaluate()


def test_a_network_that_does_not_cast_is_told_what_to_do():
    from flashoptim_nb.surrogates.domains.toy.domain import ToyNet
    class Uncast(ToyNet):
        def forward(self, batch): return self.last(self.inner(batch.x))
    class Mine(Toy):
        def build(self, width, **options): return Uncast(width, **options)
    for name in TRAINED:
        one = task(name, 0, domain=Mine())
        if not CONFIGS[name].narrow: one.step(1); continue
        for do in (lambda: one.step(1), lambda: one.predict(Mine().batch("test", np.arange(2)))):
            with pytest.raises(UserError, match="weights are bfloat16.*cast what a batch holds in the network's forward"): do()
    class Broken(ToyNet):
        def forward(self, batch): raise RuntimeError("a fault of its own")
    class Faulty(Toy):
        def build(self, width, **options): return Broken(width, **options)
    broken = task("flash", 0, domain=Faulty())
    with pytest.raises(RuntimeError, match="a fault of its own"): broken.step(1)


def test_a_series_of_skipped_steps_goes_on_after_a_resume():
    one, two = (task("flash", 0, domain=Holed(lambda row: True), epochs=3) for _ in range(2))
    for n in range(1, 10): one.step(n)
    two.load_state_dict(one.state_dict())
    with pytest.warns(UserWarning, match="the last 10 of 10 steps of toy"): two.step(10)


class Failing(Toy):
    "Its loss (the answers) or its gradient alone is NaN."
    def __init__(self, where): super().__init__(); self.where = where
    def build(self, width, **options):
        from flashoptim_nb.surrogates.domains.toy.domain import ToyNet
        class Net(ToyNet):
            def forward(net, batch):
                found = super().forward(batch)
                if self.where == "forward": return found * torch.nan
                return found + torch.sqrt(0 * found)  # whose slope at 0 is infinite, times 0
        return Net(width, **options)


HIGH = 2.0**40  # a loss scale beyond fp16's range
ADVICE = {  # configuration, its scale, the domain, the learning rate -> what is told, and what is not
    "static": (("mixed_fp16_static", HIGH, Toy, 1e-3), "static loss scale of 1,099,511,627,776 .* lower `scale`, or choose a precision of wider", "learning rate"),
    "dynamic": (("mixed_fp16", HIGH, Toy, 1e-3), "is still 1,073,741,824, so take more steps or begin with a lower `scale`, or look for NaN", "learning rate"),
    "forward": (("mixed_fp16_static", 65536.0, "forward", 1e-3), "its loss is not, before .* NaN in the network's forward, or choose", "scale"),
    "backward": (("fp32", 65536.0, "backward", 1e-3), "so is its loss, before .* NaN in the network's backward$", "scale"),
    "unscaled": (("mixed_fp16", 1.0, "backward", 1e-3), "NaN in the network's backward, or choose a precision of wider", "`scale`"),
    "released": (("flash_release", 65536.0, "backward", 1e-3), "so lower the learning rate$", "wider range"),
    "rate": (("mixed_bf16", 65536.0, Toy, 1e38), "its loss is not, so lower the learning rate$", "wider range"),
}


@pytest.mark.parametrize("case", ADVICE)
def test_what_to_do_about_skipped_steps_is_what_would_help(case):
    import re
    (name, scale, domain, lr), told, untold = ADVICE[case]
    domain = domain() if domain is Toy else Failing(domain)
    recipe = SURROGATE_RECIPE.replace(epochs=1, batch=32, lr=lr)
    one = SurrogateTask(domain, CONFIGS[name].replace(scale=scale), recipe, seed=0)
    with pytest.warns(UserWarning, match="taught nothing") as said:
        for n in range(1, one.steps + 1): one.step(n)
        if one.skipped == one.steps: one.surrogate()
    for line in (str(row.message) for row in said if "taught nothing" in str(row.message)):
        assert re.search(told, line) and untold not in line, line


def test_a_static_scale_that_overflows_later_may_be_the_learning_rates_fault():
    one, two = (task("mixed_fp16_static", 0, epochs=1) for _ in range(2))
    whole = one.micros
    two.micros = lambda n: [ToyBatch(batch.x, 1e8 * batch.y) for batch in whole(n)]
    for n in range(1, one.steps): one.step(n)
    two.load_state_dict(one.state_dict())  # which knows as much
    with pytest.warns(UserWarning, match="static loss scale of 65,536 is most likely too high, so lower `scale` or the learning rate"):
        two.step(two.steps)
