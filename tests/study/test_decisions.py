"Checkpoints at their thresholds, the monitor against a plain reading of its rule, replay from records."
import json
import random
from dataclasses import replace

import pytest
from test_verdict import no_waiting_for_the_disk, pair, read_study, write  # noqa: F401 - the first is a fixture of all tests here

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.base.records import RunWriter, read_run
from flashoptim_nb.study.decisions import (ACTIONS, MEMORY_BUDGET, SETTLED, WINDOW, Instability, Monitor, decide,
                                           decide_early, decide_from, projected_seconds, replay, still_holds)
from flashoptim_nb.study.evidence import Evidence, count_spikes, evidence_table
from flashoptim_nb.study.h1.criteria import H1
from flashoptim_nb.study.h1.quantities import early_values

GOOD = {"utilization": 0.9, "nan_rate": 0.5, "cost_saving[1B]": 0.2, "quality_gap[1B]": 0.1, "projected_cost": 50_000,
        "memory_saving[1B]": 0.3, "component_saving[ablation_attn_only]": 0.1, "cost_saving[7B]": 0.15,
        "platform_gap[1B]": 0.02}


def test_all_checkpoints(): assert list(H1.checkpoints) == [f"H1-C{letter}" for letter in "ABCDEFM"]


@pytest.mark.parametrize("id", list(H1.checkpoints))
def test_good_values_go_on(id): assert decide(H1.checkpoint(id), GOOD).action == "continue"


@pytest.mark.parametrize(
    "id, key, at, beyond, action", [
        ("H1-CA", "utilization", 0.85, 0.849, "abort"), ("H1-CA", "nan_rate", 1, 1.01, "abort"),
        ("H1-CB", "cost_saving[1B]", 0.05, 0.049, "abort"), ("H1-CB", "quality_gap[1B]", 2.0, 2.01, "abort"),
        ("H1-CB", "quality_gap[1B]", -2.0, -2.01, "abort"),
        ("H1-CB", "projected_cost", 60_000, 60_001, "pause"),
        ("H1-CC", "cost_saving[1B]", 0.15, 0.149, "downgrade"), ("H1-CC", "memory_saving[1B]", 0.10, 0.099, "abort"),
        ("H1-CD", "component_saving[ablation_attn_only]", 0.031, 0.03, "abort"),
        ("H1-CE", "cost_saving[7B]", 0.08, 0.079, "abort"), ("H1-CF", "platform_gap[1B]", 0.20, 0.201, "abort"),
        ("H1-CM", "loss_streak", 500, 501, "abort"), ("H1-CM", "memory_share", 0.95, 0.951, "abort"),
        ("H1-CM", "cost_overrun", 0.20, 0.201, "abort"),
    ])
def test_thresholds(id, key, at, beyond, action):
    assert decide(H1.checkpoint(id), GOOD | {key: at}).action == "continue"
    decision = decide(H1.checkpoint(id), GOOD | {key: beyond}, enforced=True)
    assert decision.action == action and key in decision.why and H1.checkpoints[id].then in decision.why


def test_cc_downgrades_between_and_aborts_below():
    assert ([decide(H1.checkpoint("H1-CC"), GOOD | {"cost_saving[1B]": v}).action for v in (0.15, 0.12, 0.10, 0.099)]
            == ["continue", "downgrade", "downgrade", "abort"])


@pytest.mark.parametrize("id", [id for id in H1.checkpoints if id != "H1-CM"])
def test_a_checkpoint_is_not_passed_unmeasured(id):
    decision = decide(H1.checkpoint(id), {})
    assert decision.action == "pause" and "not measured" in decision.why


def test_missing_values_do_not_hide_a_reason_to_abort():
    assert decide(H1.checkpoint("H1-CB"), {"cost_saving[1B]": 0.01}).action == "abort"


def test_advice_is_worded_as_advice():
    bad = GOOD | {"cost_saving[7B]": 0.0}
    assert ("would abort" in decide(H1.checkpoint("H1-CE"), bad).words
            and "would" not in decide(H1.checkpoint("H1-CE"), bad, enforced=True).words)


def test_unknown_checkpoint():
    with pytest.raises(UserError, match="H1-CA, H1-CB"): decide(H1.checkpoint("H1-CG"), {})


def streaks(losses):
    "The monitor's rule, read plainly: steps above three times the average of the calm steps before."
    mean, seen, run, out = None, 0, 0, []
    for loss in losses:
        if loss is None or (mean is not None and loss > 3 * mean): run += 1
        else: seen, run = seen + 1, 0; mean = loss if mean is None else mean + (loss - mean) / min(seen, WINDOW)
        out.append(run)
    return out


def random_losses():
    losses = []
    while len(losses) < 3000:
        losses += [random.choice([3.0, 3.2, 12.0, 20.0, None])] * random.choice([1, 5, 499, 500, 501, 502])
    return losses


def observe(monitor, losses, begin=1):
    return [(n, d) for n, loss in enumerate(losses, begin)
            for d in monitor.observe(dict(step=n, loss=loss, seconds=1.0, peak=n % 97))]


def test_streak_rule_on_random_histories(rng_seed):
    for _ in range(3):
        losses = random_losses()
        expected = [n for n, run in enumerate(streaks(losses), 1) if run == 501]
        assert [n for n, _ in observe(Monitor(H1.monitor, steps=len(losses)), losses)] == expected


def test_a_resumed_monitor_goes_on_exactly(rng_seed):
    losses, cut = random_losses(), random.randrange(1, 3000)
    settings = dict(steps=3000, device_bytes=100, projected_seconds=2400.0)
    whole, first, second = (Monitor(H1.monitor, **settings) for _ in range(3))
    expected = observe(whole, losses)
    told = observe(first, losses[:cut])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    told += observe(second, losses[cut:], cut + 1)
    assert told == expected and expected and second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("nan", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_a_number_does_not_disarm(nan):
    live, recorded = ([5.0] * 50 + [bad] * 2 + [500.0] * 600 for bad in (nan, None))
    told = [n for n, _ in observe(Monitor(H1.monitor, steps=652), live)]
    assert told == [551] == [n for n, _ in observe(Monitor(H1.monitor, steps=652), recorded)]


@pytest.mark.parametrize("nan", [None, float("nan"), float("inf")])
def test_an_unskipped_nan_is_an_event_and_no_spike(nan):
    events = Instability({n: 3.0 for n in range(1, 5)})
    told = [event["event"] for n, loss in enumerate([3.0, nan, 9.0, 3.0], 1)
            for event in events.observe(dict(step=n, loss=loss, skipped=False))]
    assert told == ["nan", "spike"]


def test_the_state_does_not_grow():
    monitor, sizes = Monitor(H1.monitor, steps=10**6), []
    for n in range(1, 2001):
        monitor.observe(dict(step=n, loss=3.0, seconds=1.0))
        if n % 1000 == 0: sizes.append(len(monitor.state_dict()))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("pace, fires", [(1.19, False), (1.21, True)])
def test_cost_is_judged_at_the_end_as_it_looks(pace, fires):
    monitor = Monitor(H1.monitor, steps=1000, projected_seconds=1000.0)
    told = [(n, d) for n in range(1, 1001) for d in monitor.observe(dict(step=n, loss=3.0, seconds=pace))]
    assert [n for n, _ in told] == ([SETTLED] if fires else [])


def test_a_slow_first_step_is_not_an_overrun():
    monitor = Monitor(H1.monitor, steps=1000, projected_seconds=1000.0)
    rows = [dict(step=n, loss=3.0, seconds=100.0 if n == 1 else 1.0, cold=n <= 2) for n in range(1, 200)]
    assert not [d for row in rows for d in monitor.observe(row)]


def test_events_are_counted_as_the_judge_counts(rng_seed):
    losses, baseline = ([random.choice([2.0, 3.0, 7.0, 9.0, None]) for _ in range(300)] for _ in range(2))
    events = Instability(dict(enumerate(baseline)))
    told = [event for n, loss in enumerate(losses)
            for event in events.observe(dict(step=n, loss=loss, skipped=loss is None))]
    assert sum(event["event"] == "spike" for event in told) == count_spikes(losses, baseline)
    assert sum(event["event"] == "nan" for event in told) == losses.count(None)


def study(folder, alter=lambda row: row):
    "A protocol run that decides on a small study, on disk."
    runs = pair(folder, roles=("1B",), speed=1.12, utilization=0.5)
    table = evidence_table(runs, H1)
    decisions = [decide_from(id, Evidence(table, H1, "baseline_strong", device="GPU A"),
                             supplied={"projected_cost": 9e4} if id == "H1-CB" else {}) for id in H1.checkpoints
                 if id != "H1-CM"]
    writer = RunWriter(folder / "protocol", header=dict(run="protocol", scale="gpu", arm="protocol"))
    for decision in decisions: writer.append("decision", **alter(decision.row))
    writer.end("finished")
    return {d.checkpoint: d for d in decisions}


def test_decisions_replay_from_records(tmp_path):
    made = study(tmp_path)
    assert [made[f"H1-C{x}"].action for x in "ABCDEF"] == ["abort", "pause", "downgrade", "pause", "pause", "pause"]
    assert all(action in ACTIONS for action in (d.action for d in made.values()))
    replayed = replay(read_study(tmp_path), H1)
    assert len(replayed) == 6 and all(row["agrees"] for row in replayed), replayed


@pytest.mark.parametrize("change, told", [
    (lambda row: row | dict(action="continue"), "action"), (lambda row: row | dict(why="because"), "why"),
    (lambda row: row | dict(values={**row["values"], "cost_saving[1B]": 0.3}), "from the records"),
])
def test_altered_decisions_are_found(tmp_path, change, told):
    study(tmp_path, lambda row: change(row) if row["checkpoint"] == "H1-CC" else row)
    wrong = [row for row in replay(read_study(tmp_path), H1) if not row["agrees"]]
    assert [row["checkpoint"] for row in wrong] == ["H1-CC"] and told in wrong[0]["difference"]


def test_a_decision_whose_runs_are_gone_does_not_agree(tmp_path):
    study(tmp_path)
    runs = [run for run in read_study(tmp_path) if run.header.get("config") != "flashoptim_full"]
    wrong = [row for row in replay(runs, H1) if not row["agrees"]]
    assert (wrong
            and all("gpu-1B-best-flashoptim_full-GPU A-0: its record is missing" in row["difference"] for row in wrong))


def early(folder):
    "Checkpoint B's decision in a run's record, and the baseline that it names beside it."
    for name, seconds in (("baseline", 1.0), ("flashoptim_full", 0.99)):
        writer = RunWriter(folder / name, header=dict(run=name, scale="gpu", config=name))
        for n in range(1, 6): writer.append("step", step=n, loss=3.0, seconds=seconds, tokens=10, cold=n < 2)
        if name != "baseline":
            writer.append("decision", **decide_early(
                              H1.checkpoint("H1-CB"), read_run(folder / name), read_run(folder / "baseline"), 5).row)
        writer.end("finished")
    return read_study(folder)


def test_an_early_decision_without_its_baseline(tmp_path):
    runs = early(tmp_path)
    assert [row["agrees"] for row in replay(runs, H1)] == [True]
    row, = replay([run for run in runs if run.id != "baseline"], H1)
    assert (not row["agrees"]
            and row["difference"] == "baseline: its record is missing; restore it, or take the decision anew")


def test_a_decision_holds_until_the_records_say_otherwise(tmp_path):
    runs = pair(tmp_path, roles=("1B",), seeds=2, speed=1.12)
    def evidence(): return Evidence(evidence_table(read_study(tmp_path), H1), H1, "baseline_strong", device="GPU A")
    row = json.loads(json.dumps(decide_from("H1-CC", evidence()).row))
    assert (row["action"] == "downgrade" and still_holds(row, evidence())
            and still_holds(row, Evidence(evidence_table(runs[::-1], H1), H1, "baseline_strong", device="GPU A")))
    supplied = decide_from("H1-CB", evidence(), supplied={"projected_cost": 9e4}).row
    assert (still_holds(supplied, evidence(), {"projected_cost": 9e4})
            and not still_holds(supplied, evidence(), {"projected_cost": 8e4}))
    # the same saving, one pair more
    for config in ("baseline_strong", "flashoptim_full"):
        write(tmp_path, config, 2, rate=1120.0 if config != "baseline_strong" else 1000.0)
    assert not still_holds(row, evidence())
    write(tmp_path, "baseline_strong", 0, rate=500.0)  # mended: another value
    assert not still_holds(row, evidence())


def test_of_decisions_taken_anew_the_last_stands(tmp_path):
    study(tmp_path)
    first = read_run(tmp_path / "protocol").of("decision")
    write(tmp_path, "baseline_strong", 0, rate=500.0)  # what the first decision rests on is another run now
    wrong = {row["checkpoint"] for row in replay(read_study(tmp_path), H1) if not row["agrees"]}
    assert "H1-CC" in wrong
    writer = RunWriter(tmp_path / "protocol")
    evidence = Evidence(evidence_table(read_study(tmp_path), H1), H1, "baseline_strong", device="GPU A")
    for row in first:
        writer.append("decision",
                      **decide_from(row["checkpoint"], evidence,
                                    supplied={"projected_cost": 9e4} if row["checkpoint"] == "H1-CB" else {}).row)
    writer.end("finished")
    again = replay(read_study(tmp_path), H1)
    assert len(again) == len(first) and all(row["agrees"] for row in again)


def test_a_streak_is_counted_again(tmp_path):
    losses = [3.0] * 20 + [10.0] * 510
    monitor = Monitor(H1.monitor, steps=530)
    decision, = [d for n, loss in enumerate(losses, 1) for d in monitor.observe(dict(step=n, loss=loss, seconds=0.1))]
    for name, values in (("true", decision.values), ("false", decision.values | dict(loss_streak=502))):
        writer = RunWriter(tmp_path / name, header=dict(run=name, scale="gpu"))
        for n, loss in enumerate(losses, 1): writer.append("step", step=n, loss=loss)
        writer.append("decision", **decide(H1.checkpoint("H1-CM"), values).row)
        writer.end("finished")
    assert {row["run"]: row["agrees"] for row in replay(read_study(tmp_path), H1)} == dict(true=True, false=False)


def test_evidence_is_plain_json(tmp_path):
    study(tmp_path)
    write(tmp_path, "baseline", 9)
    for run in read_study(tmp_path):
        for row in run.of("decision"): assert json.loads(json.dumps(row, allow_nan=False)) == row


def monitored(folder, alter=lambda values: values, **whole):
    "A run that the monitor watched, its pace and device told by the journal."
    recipe, search = dict(steps=200, batch=8, seq=16), dict(
        role="1B", config="x", micro=4, checkpointing="selective",
        tried=[dict(checkpointing="none", micro_batch=4, fits=False, budget=int(MEMORY_BUDGET * 1000), peak=2000),
               dict(checkpointing="selective", micro_batch=4, fits=True, budget=int(MEMORY_BUDGET * 1000), peak=500,
                    tokens_per_s=256.0)])
    journal = RunWriter(folder / "protocol", header=dict(run="protocol", scale="full", settings=dict(whole=whole)))
    journal.append("search", **search)
    journal.end("finished")
    monitor = Monitor(
        H1.monitor, steps=200, device_bytes=1000, projected_seconds=projected_seconds(search, 200 * 8 * 16))
    writer = RunWriter(
        folder / "run", header=dict(run="run", scale="full", role="1B", config="x", settings=dict(recipe=recipe)))
    for n in range(1, 201):
        row = dict(step=n, loss=3.0, seconds=0.7 + n / 10_000, cold=n < 3, peak=900 + n)
        writer.append("step", **row)
        for decision in monitor.observe(row):
            writer.append("decision", **decide(H1.checkpoint("H1-CM"), alter(decision.values)).row)
    writer.end("finished")
    return replay(read_study(folder), H1)


def test_memory_and_cost_are_computed_again(tmp_path):
    cost, memory = monitored(tmp_path / "true")
    assert cost["agrees"] and memory["agrees"] and cost["unchecked"] == memory["unchecked"] == []
    for name in ("memory_share", "cost_overrun"):
        false = monitored(tmp_path / name, lambda values: values | {name: values[name] + 0.001})
        assert all(f"{name}: recorded" in row["difference"] for row in false)


def test_what_the_records_do_not_tell_is_named(tmp_path):
    replayed = monitored(tmp_path, memory_bytes=700)  # a budget of one's own: the device's memory is not known
    assert [row["unchecked"] for row in replayed] == [["memory_share"]] * 2 and all(row["agrees"] for row in replayed)


def test_the_pace_is_that_of_what_was_chosen():
    tried = [dict(checkpointing="none", micro_batch=8, fits=False),
             dict(checkpointing="selective", micro_batch=8, fits=True, tokens_per_s=1000.0)]
    assert projected_seconds(dict(micro=8, checkpointing="selective", tried=tried), 5000) == 5.0
    assert projected_seconds(dict(micro=8, checkpointing="none", tried=[]), 5000) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "0.3", True])
@pytest.mark.parametrize("id, key",
                         [("H1-CA", "utilization"), ("H1-CA", "nan_rate"), ("H1-CB", "cost_saving[1B]"),
                          ("H1-CB", "quality_gap[1B]"), ("H1-CC", "memory_saving[1B]"), ("H1-CE", "cost_saving[7B]")])
def test_a_value_that_is_no_number_does_not_pass(id, key, bad):
    decision = decide(H1.checkpoint(id), GOOD | {key: bad})
    assert decision.action == "pause" and f"not measured: {key}" in decision.why


@pytest.mark.parametrize("side", ["baseline", "flashoptim_full"])
@pytest.mark.parametrize("nll", [None, float("nan"), 30.0])
def test_an_early_decision_takes_no_earlier_loss(tmp_path, nll, side):
    runs = {run.id: run for run in early(tmp_path)}
    for name, run in runs.items():
        made = [
            dict(kind="eval", set="c4 (tracked)", step=step, tokens=10, nll=nll if (name, step) == (side, 3) else 30.0)
            for step in (1, 2, 3)]
        runs[name] = replace(run, rows=run.rows[:1] + made + run.rows[1:])
    gap = early_values(runs["flashoptim_full"], runs["baseline"], 4)["quality_gap[1B]"]
    assert gap == (0 if nll == 30.0 else None)
    if gap is None:
        assert decide_early(H1.checkpoint("H1-CB"), runs["flashoptim_full"], runs["baseline"], 4).action != "continue"
