"""Clocks, busy shares and energy: properties, never times."""
import time

import numpy as np
import pytest
import torch

from flashoptim_nb.measure.energy import EnergyMeter, PowerSampler, trapezoid
from flashoptim_nb.measure.timing import BusyWindow, Stopwatch, busy_time, measure_utilization, settling, throughput


def test_a_stopwatch_keeps_order_and_forgets_on_drain(monkeypatch):
    watch, clock = Stopwatch("cpu"), iter([0.0, 1.0, 10.0, 13.0, 20.0, 22.0])
    with monkeypatch.context() as patched:
        patched.setattr("flashoptim_nb.measure.timing.time.perf_counter", lambda: next(clock))
        for _ in range(3):
            with watch: pass
    assert watch.drain() == [1.0, 3.0, 2.0]
    assert watch.drain() == []


def test_a_step_that_fails_is_not_timed():
    watch = Stopwatch("cpu")
    with pytest.raises(ValueError):
        with watch: raise ValueError
    assert watch.seconds() == []


def test_throughput_is_the_medians_and_ignores_warm_up():
    row = throughput([100., 1., 2., 3., 50.], 600, warmup=1)
    assert row["seconds_per_step"] == 2.5 and row["tokens_per_s"] == 240 and row["steps"] == 4
    assert row["energy_j_per_token"] is None and row["utilization"] is None


def test_no_step_that_counts_is_a_row_that_says_so():
    for seconds in ([1., 1., 1.], []):
        row = throughput(seconds, 600, warmup=3, micro_batch=2)
        assert (row["tokens_per_s"] is row["seconds_per_step"] is row["mean_tokens_per_s"] is row["energy_j_per_token"]
                is None)
        assert row["steps"] == 0 and row["micro_batch"] == 2 and "take at least 4" in row["reason"]


def test_a_slow_beginning_is_left_out_and_a_late_delay_is_not(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for _ in range(50):
        level, slow = rng.integers(12, 40), rng.integers(0, 7)
        steady = 1 + 0.005 * rng.standard_normal(level)
        seconds = [*(1.2 + 0.05 * rng.random(slow)), *steady]
        assert slow <= settling(seconds) <= len(seconds) // 2
        row = throughput(seconds, 1000)
        assert row["seconds_per_step"] == pytest.approx(1, abs=0.01) and row["steps"] + row["settling"] == len(seconds)
        assert (row["mean_tokens_per_s"] == pytest.approx(1000 * len(seconds) / sum(seconds))
                and (not slow or row["mean_tokens_per_s"] < row["tokens_per_s"]))
        steady[-3] = 30.0
        assert throughput([*seconds[:slow], *steady], 1000)["seconds_per_step"] == pytest.approx(1, abs=0.01)


def test_energy_is_of_the_steps_whose_time_counts():
    seconds, joules = [9.] + [2.] * 3 + [1.] * 9, [1e6] + [500.] * 3 + [100.] * 8 + [None]
    row = throughput(seconds, 10, warmup=1, joules=joules)
    assert (row["settling"], row["steps"], row["energy_j_per_token"]) == (3, 9, 10)
    assert throughput(seconds, 10, joules=[None] * 13)["energy_j_per_token"] is None


def test_busy_time_is_the_union(rng_seed):
    generator = torch.Generator().manual_seed(rng_seed)
    begins = torch.randint(0, 500, (60,), generator=generator).tolist()
    spans = [(b, b + int(n)) for b, n in zip(begins, torch.randint(0, 30, (60,), generator=generator))]
    covered = {tick for begin, end in spans for tick in range(begin, end)}
    assert busy_time(spans) == len(covered)
    assert busy_time(reversed(spans)) == len(covered)


def test_utilization_is_a_share():
    assert 0 <= measure_utilization(lambda: time.sleep(0.01), "cpu") <= 1
    window = BusyWindow("cpu")
    with pytest.raises(KeyError):
        with window: raise KeyError
    assert window.share is None


def test_energy_without_a_counter_says_why():
    with EnergyMeter("cpu") as meter: pass
    assert meter.joules is None and meter.per_token(5) is None and "'cpu'" in meter.reason


def test_sampled_power_integrates():
    assert trapezoid([(0, 0), (1, 100), (3, 100)]) == 250
    level = iter(range(10_000))
    sampler = PowerSampler(lambda: float(next(level)), every=0.002)
    sampler.start()
    time.sleep(0.02)
    joules = sampler.joules()
    times, watts = zip(*sampler.samples)
    assert min(watts) * (times[-1] - times[0]) < joules < max(watts) * (times[-1] - times[0])
    assert not sampler.thread.is_alive()


@pytest.mark.cuda
def test_the_device_is_timed_without_waiting_for_it():
    x, watch = torch.randn(8192, 8192, device="cuda"), Stopwatch("cuda")
    x @ x
    torch.cuda.synchronize()
    for _ in range(10):
        with watch: x @ x
    queued_only = not torch.cuda.current_stream().query()
    assert queued_only  # the host did not wait for the work
    assert len(watch.seconds()) == 10 and min(watch.seconds()) > 0


@pytest.mark.cuda
def test_a_working_device_is_busy_and_uses_energy():
    x = torch.randn(8192, 8192, device="cuda")
    def work(): [x @ x for _ in range(10)]
    def rest(): torch.cuda.synchronize(); time.sleep(0.05)
    work()
    assert 0 <= measure_utilization(rest, "cuda") < measure_utilization(work, "cuda") <= 1
    with EnergyMeter("cuda") as meter:
        begin = time.perf_counter()
        while time.perf_counter() - begin < 1: work(); torch.cuda.synchronize()
    assert meter.joules is not None and meter.joules > 0 if meter.how else meter.reason
