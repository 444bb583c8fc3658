"""Records of surrogates on disk in, the verdict on hypothesis 2 out:
pairs, seeds, memory, fp16, precedence, checkpoints."""
import json
import os
import random

import pytest
import records_factory
import z3

from flashoptim_nb.base.config import content_hash
from flashoptim_nb.base.records import RunWriter, problems, read_run, read_study
from flashoptim_nb.cli.main import main
from flashoptim_nb.study.consistency import findings
from flashoptim_nb.study.decisions import decide, decide_from, replay, still_holds
from flashoptim_nb.study.evidence import Evidence, evidence_table
from flashoptim_nb.study.expression import Q, All, Status, judge, leaves, quantities, to_z3
from flashoptim_nb.study.h1.criteria import CRITERIA_HASH, H1
from flashoptim_nb.study.h2.consistency import H2_CHECKS, H2_LOGIC
from flashoptim_nb.study.h2.criteria import H2
from flashoptim_nb.study.h2 import quantities as h2_quantities
from flashoptim_nb.study.h2.quantities import DOMAINS
from flashoptim_nb.study.hypotheses import HYPOTHESES, criterion_of
from flashoptim_nb.study.statistics import Estimate, exact, missing
from flashoptim_nb.study.verdict import _outcome, verdict

IDS = [f"H2-{kind}{n}" for kind in "SFD" for n in range(1, 7)]
CONFIGS = ("fp32", "mixed_bf16", "flash")


@pytest.fixture(autouse=True)
def a_pilot_whose_pairs_lay_close(monkeypatch):
    close = dict.fromkeys(h2_quantities.PILOT_SPREAD, 0.01)
    monkeypatch.setattr(h2_quantities, "PILOT_SPREAD", close)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch): monkeypatch.setattr(os, "fsync", lambda file: None)


# of reduced precision; fp32's are the defaults of `write`
GOOD = dict(mae=0.101, found=6.9, peak=5e9, rate=1500.0, seconds=8.0)


def write(folder, config="fp32", seed=0, role="molecules", arm="train", *, scale="gpu", device="GPU A", mae=0.1,
          rmse=None, found=7.0, peak=10e9, rate=1000.0, seconds=10.0, parameters=1_000_000,
          epochs=2, losses=None, skipped=(), loss_scale=None, problems_=("one",), methods=("reinforce",), runs=4,
          fits=(), status="finished", reason="", recipe=None, batches=(64, 512), **header):
    "One run of hypothesis 2 on disk, with every header field that a record needs."
    settings = dict(
        config=config, role=role, parameters=parameters, recipe=dict(batch=64, epochs=epochs) | (recipe or {}))
    header = records_factory.header(f"{scale}-{role}-{arm}-{config}-{device}-{seed}", config, seed, hypothesis="h2",
                                    scale=scale, role=role, size="2x" if config.endswith("2x") else "1x", arm=arm,
                                    device=device, settings=settings, criteria_hash=H2.hash) | header
    writer, noise = RunWriter(folder / header["run"], header=header), 1 + seed / 1000
    if arm == "train" and status in ("finished", "failed"):
        losses = losses or [1 / n for n in range(1, 41)]
        for n, loss in enumerate(losses, 1):
            writer.append(
                "step", step=n, loss=None if n in skipped else loss, grad_norm=1.0, lr=3e-4, skipped=n in skipped,
                partial=False, seconds=0.1, cold=n < 3, tokens=64, loss_scale=loss_scale)
    if arm == "train" and status == "finished":
        for e in range(1, epochs + 1):
            writer.append("epoch", epoch=e, seconds=seconds * noise, allocated=1, reserved=1, loss_scale=loss_scale)
        for target in DOMAINS[role]:
            for ema in (True, False):
                writer.append("eval", set="test", target=target, unit="eV", mae=mae and mae * noise,
                              rmse=rmse or (mae and 1.3 * mae * noise), n=100, precision="own", ema=ema, epoch=epochs)
        for problem in problems_:
            for method in methods:
                for run in range(runs):
                    writer.append(
                        "solution", problem=problem, method=method, instance=0, run=run, objective=found * noise,
                        predicted=found, unit="1", evaluations=1, what="x", curve=[found])
    if arm == "speed" and status == "finished":
        for batch in batches:
            writer.append("memory", batch=batch, peak=peak, parameters=parameters)
            writer.append("throughput", batch=batch, ms=1.0, samples_per_s=rate * noise)
    if arm == "largest":
        for size, fit in fits:
            writer.append("search", width=1, parameters=size, fits=fit, peak=1, budget=24 * 2**30, reason="")
        if any(fit for _, fit in fits):
            writer.append("largest", width=1, parameters=max(size for size, fit in fits if fit), budget=24 * 2**30,
                          peak=1, batch=64, note="")
    writer.end(status, reason)
    return read_run(folder / header["run"])


def study(folder, seeds=5, domains=tuple(DOMAINS), configs=("mixed_bf16", "flash"), bigger=2.0, larger=0.095, **new):
    "A whole study: fp32 and reduced precisions that do what is claimed, but for what is changed."
    both = {key: new.pop(key) for key in ("scale", "device", "epochs") if key in new}
    for role in domains:
        for config in ("fp32", *configs):
            changed = {} if config == "fp32" else GOOD | new
            for seed in range(seeds):
                for arm in ("train", "speed"): write(folder, config, seed, role, arm, **changed, **both)
                if config != "fp32" and larger:
                    write(folder, f"{config}_2x", seed, role, mae=larger, parameters=2_000_000, **both)
            limit = round(1_000_000 * (1 if config == "fp32" else bigger))
            if bigger:
                write(folder, config, 0, role, "largest",
                      fits=((limit // 2, True), (limit, True), (round(1.01 * limit), False)), **both)
    return read_study(folder)


def by_id(entries, side="mixed_bf16"): return {e["id"]: e for e in entries if e["side"] == side}


def judged(runs, side="mixed_bf16"): return by_id(verdict(runs, H2), side)


# --- the criteria

def test_every_id_once_and_hashes_apart():
    assert ([c.id for c in H2.criteria] == IDS
            and all(c.kind == dict(S="success", F="failure", D="falsification")[c.id[3]] for c in H2.criteria))
    # the hash that the committed records carry
    assert list(HYPOTHESES) == ["h1", "h2"] and H1.hash == CRITERIA_HASH != H2.hash


def everywhere(id, **changed):
    "The status when each quantity has its typical value, but for those changed (by name or key)."
    def look(q): return exact(changed.get(q.key, changed.get(q.name, H2_LOGIC.typical[q.name])))
    return judge(criterion_of(id).formula, look).status


@pytest.mark.parametrize("id, name, at, beyond", [
                             ("H2-S1", "peak_saving", (0.30, "met"), (0.299, "not met")),
                             ("H2-S1", "capacity_ratio", (1.8, "met"), (1.799, "not met")),
                             ("H2-S2", "error_ratio", (1.05, "met"), (1.051, "not met")),
                             ("H2-S2", "error_ratio", (1 / 1.05, "met"), (0.95, "not met")),
                             ("H2-S3", "solution_loss", (0.10, "met"), (0.101, "not met")),
                             ("H2-S4", "scaled_share", (0.90, "met"), (0.899, "not met")),
                             ("H2-S5", "speed_ratio", (0.9, "met"), (0.899, "not met")),
                             ("H2-S6", "speed_ratio", (0.9, "met"), (0.899, "not met")),
                             ("H2-F1", "error_ratio", (1.05, "not met"), (1.051, "met")),
                             ("H2-F2", "collapsed_share", (0.40, "not met"), (0.41, "met")),
                             ("H2-F3", "peak_saving", (0.20, "not met"), (0.199, "met")),
                             ("H2-F4", "larger_error_ratio", (1.02, "not met"), (1.021, "met")),
                             ("H2-F5", "solution_loss", (0.10, "not met"), (0.101, "met")),
                             ("H2-F6", "epoch_ratio", (1.15, "not met"), (1.151, "met")),
                             ("H2-D1", "error_ratio", (1.05, "not met"), (1.051, "met")),
                             ("H2-D1", "rmse_ratio", (1.05, "not met"), (1.051, "met")),
                             ("H2-D2", "solution_loss", (0.10, "not met"), (0.101, "met")),
                             ("H2-D4", "diverged_share", (0.30, "not met"), (0.301, "met")),
                             ("H2-D5", "epoch_ratio", (1.15, "not met"), (1.151, "met")),
                             ("H2-D6", "peak_saving", (0.20, "not met"), (0.199, "met")),
                         ])
def test_thresholds(id, name, at, beyond):
    for value, status in (at, beyond): assert everywhere(id, **{name: value}) == status


@pytest.mark.parametrize("saving, fits, status", [(0.2, 1.0, "not met"), (0.1, 1.5, "not met"), (0.1, 1.49, "met")])
def test_falsified_memory_needs_both(saving, fits, status):
    assert everywhere("H2-D3", peak_saving=saving, capacity_ratio=fits) == status


def test_domains_and_tasks_are_counted():
    bad = {d: {Q("error_ratio", d, target=t).key: 1.2 for t in DOMAINS[d]} for d in DOMAINS}
    one, two, tasks = (bad["aerodynamics"], bad["molecules"] | bad["combinatorial"],
                       bad["aerodynamics"] | bad["molecules"])
    assert [everywhere(id, **one) for id in ("H2-S2", "H2-S6", "H2-F1", "H2-D1", "H2-D6")] == [
        "met", "met", "met", "not met", "not met"]
    assert [everywhere(id, **two) for id in ("H2-S2", "H2-S6", "H2-F1", "H2-D1", "H2-D6")] == [
        "not met", "not met", "met", "not met", "met"]
    assert everywhere("H2-D1", **tasks) == "met"  # three tasks in two domains


def test_success_in_different_domains_is_not_general():
    apart = {"peak_saving[molecules]": 0.25, "solution_loss[aerodynamics]": 0.2, "speed_ratio[combinatorial]": 0.8}
    assert [everywhere(f"H2-S{n}", **apart) for n in (1, 2, 3, 5, 6)] == ["met"] * 4 + ["not met"]


@pytest.mark.parametrize("id", IDS)
def test_unmeasured_and_straddling(id):
    formula = criterion_of(id).formula
    assert judge(formula, lambda q: missing("no runs")).status == "not measured"
    assert judge(formula, lambda q: Estimate(value=0.0, lo=-100.0, hi=100.0, n=5)).status == "inconclusive"
    assert judge(formula, lambda q: Estimate(value=5.0, n=2)).status == "inconclusive"


@pytest.mark.parametrize("id", IDS)
def test_judge_and_solver_agree(id, rng_seed):
    formula = criterion_of(id).formula
    edges = sorted({leaf.right for leaf in leaves(formula)})
    for _ in range(10):
        values = {q: round(random.choice(edges) + random.choice([0, -1, 1]) * random.random() / 10, 3)
                  for q in quantities(formula)}
        solver = z3.Solver()
        solver.add(to_z3(formula), *(z3.Real(q.key) == z3.RealVal(repr(v)) for q, v in values.items()))
        assert (judge(formula, lambda q: exact(values[q])).status == "met") == (solver.check() == z3.sat), values


# --- the verdict

def test_the_records_are_whole(tmp_path): assert problems(write(tmp_path).folder) == []


def test_shape_and_success(tmp_path):
    runs = study(tmp_path)
    entries = verdict(runs, H2)
    assert entries == json.loads(json.dumps(entries, allow_nan=False))
    assert ([e["id"] for e in entries] == ["H2", *IDS] * 2
            and [(e["side"], e["headline"]) for e in entries[::19]] == [("mixed_bf16", True), ("flash", False)])
    for side in ("mixed_bf16", "flash"):
        found = by_id(entries, side)
        assert ({found[id]["status"] for id in IDS if id[3] == "S"} == {"met", "not applicable"}
                and found["H2-S4"]["status"] == "not applicable")
        assert {found[id]["status"] for id in IDS if id[3] != "S"} == {"not met"}
        assert found["H2"]["status"] == "success" and found["H2"]["against"] == "fp32" and found["H2"]["stack"] == side
    assert ("2 epochs" in found["H2"]["reason"] and "the protocol asks for 100 epochs" in found["H2"]["reason"]
            and "5 of the protocol's 5 seeds" in found["H2"]["reason"])
    assert found["H2-S1"]["value"] and found["H2-S1"]["interval"] and found["H2-S1"]["records"]
    for e in entries: assert set(e["records"]) <= {f"{run.header['study']}/{run.id}" for run in runs}


@pytest.mark.parametrize(
    "change, ids, whole", [
        (dict(peak=9e9), ["H2-F3", "H2-D6"], "falsified"), (dict(mae=0.11), ["H2-F1", "H2-D1", "H2-D6"], "falsified"),
        (dict(found=6.0), ["H2-F5", "H2-D2", "H2-D6"], "falsified"),
        (dict(seconds=12.0), ["H2-F6", "H2-D5", "H2-D6"], "falsified"),
        (dict(larger=0.105), ["H2-F4", "H2-D6"], "falsified"),
        (dict(peak=9e9, bigger=1.2), ["H2-F3", "H2-D3", "H2-D6"], "falsified"),
        (dict(peak=7.5e9), [], "partial"), (dict(bigger=1.6), [], "partial"), (dict(rate=850.0), [], "partial"),
        (dict(mae=0.09), [], "partial"), (dict(larger=None), [], "undecided"),
    ])
def test_what_harms_is_found(tmp_path, change, ids, whole):
    found = judged(study(tmp_path, configs=("mixed_bf16",), **change))
    assert [id for id in IDS if id[3] != "S" and found[id]["status"] == "met"] == ids and found["H2"]["status"] == whole


def test_one_domain_that_fails(tmp_path):
    study(tmp_path, configs=("mixed_bf16",), domains=("molecules", "combinatorial"))
    found = judged(study(tmp_path, configs=("mixed_bf16",), domains=("aerodynamics",), mae=0.12))
    assert [found[id]["status"] for id in ("H2-S2", "H2-S6", "H2-F1", "H2-D1", "H2-D6", "H2")] == [
        "met", "met", "met", "not met", "not met", "failed"]


def test_one_domain_alone_succeeds_in_nothing(tmp_path):
    found = judged(study(tmp_path, configs=("mixed_bf16",), domains=("molecules",)))
    assert ({found[f"H2-S{n}"]["status"] for n in (1, 2, 3, 5, 6)} == {"not measured"}
            and found["H2-F1"]["status"] == "not met" and found["H2"]["status"] == "undecided")
    assert "aerodynamics, combinatorial were not run" in found["H2"]["reason"]
    assert [part["status"] for part in found["H2-S5"]["parts"]] == ["met", "not measured", "not measured"]


def test_two_precisions_two_answers(tmp_path):
    study(tmp_path, configs=("mixed_bf16",))
    found = study(tmp_path, configs=("flash",), peak=9e9)
    assert judged(found)["H2"]["status"] == "success" and judged(found, "flash")["H2-F3"]["status"] == "met"


@pytest.mark.parametrize("seeds", [1, 2])
def test_too_few_seeds_decide_nothing(tmp_path, seeds):
    found = judged(study(tmp_path, seeds=seeds, configs=("mixed_bf16",)))
    assert {found[id]["status"] for id in IDS if id not in ("H2-S4", "H2-D4", "H2-D3")} == {"inconclusive"}
    assert (found["H2-F1"]["value"] is not None and found["H2-F1"]["interval"] is None
            and found["H2"]["status"] == "undecided")


def test_laptop_runs_never_decide(tmp_path, rng_seed):
    found = verdict(study(tmp_path, scale="laptop", mae=random.uniform(0.01, 1), peak=random.uniform(1e9, 2e10),
                          found=random.uniform(0.1, 9)), H2)
    assert ({e["status"] for e in found} == {"no evidence at this scale", "not applicable"}
            and by_id(found)["H2-F1"]["value"] is not None)


def test_a_gpu_goes_before_a_laptop(tmp_path):
    study(tmp_path, scale="laptop", device="CPU", configs=("mixed_bf16",))
    found = judged(study(tmp_path, mae=0.2, configs=("mixed_bf16",), domains=("molecules",)))
    assert (found["H2-F1"]["status"], found["H2-F1"]["scale"]) == ("met", "gpu")


def test_other_hypotheses_are_left_out(tmp_path):
    runs = study(tmp_path, configs=("mixed_bf16",))
    assert {e["status"] for e in verdict(runs, H1)} == {"not measured", "undecided"}
    old = [write(tmp_path / "old", seed=seed, hypothesis="h1", criteria_hash=H1.hash) for seed in range(3)]
    assert verdict([*runs, *old], H2) == verdict(runs, H2)


def test_other_criteria_are_told(tmp_path):
    found = judged(study(tmp_path, configs=("mixed_bf16",), domains=("molecules",)))["H2"]
    assert found["stale"] == []
    write(tmp_path, criteria_hash="0" * 12)
    assert len(judged(read_study(tmp_path))["H2"]["stale"]) == 1


def test_precedence():
    def outcome(met, not_met=()):
        entries = [dict(id=c.id, kind=c.kind, status="met" if c.id in met else "not met" if c.id in not_met
                            else "not applicable" if c.only else "inconclusive") for c in H2.criteria]
        return _outcome(H2, entries)[0]
    success, harm = ([id for id in IDS if (id[3] == "S") == good] for good in (True, False))
    success.remove("H2-S4")
    assert ([outcome(success, harm), outcome(success), outcome(IDS), outcome([*success, "H2-F1"], harm),
             outcome([*success, "H2-D4"], harm)] == ["success", "undecided", "falsified", "failed", "falsified"])
    assert ([outcome([], ["H2-S1", "H2-F3"]), outcome(["H2-S1"], ["H2-F3"]), outcome(success[1:], ["H2-F3"]),
             outcome(["H2-S1"])] == ["partial", "partial", "undecided", "undecided"])


# --- estimates

def evidence(folder_or_runs, **place):
    runs = folder_or_runs if isinstance(folder_or_runs, list) else read_study(folder_or_runs)
    return Evidence(evidence_table(runs, H2), H2, **dict(device="GPU A") | place)


GAP = Q("error_ratio", "molecules", target="gap")


@pytest.mark.parametrize("apart", [dict(device="GPU B"), dict(data_hash="other"), dict(scale="full"),
                                   dict(recipe=dict(lr=1.0)), dict(epochs=3)])
def test_what_differs_is_not_paired(tmp_path, apart):
    for seed in range(3):
        write(tmp_path, "fp32", seed)
        write(tmp_path, "mixed_bf16", seed, run=f"new-{seed}", **apart)
    e = evidence(tmp_path, device=None)
    assert e.estimate(GAP).value is None and e.estimate(GAP).note


def test_a_micro_batch_of_its_own_is_paired(tmp_path):
    for seed in range(3):
        for config, micro in (("fp32", 16), ("mixed_bf16", 64)): write(tmp_path, config, seed, recipe=dict(micro=micro))
    assert evidence(tmp_path).estimate(GAP).n == 3


def test_missing_seeds_lower_n_and_count_against(tmp_path):
    for seed in range(5): write(tmp_path, "fp32", seed)
    for seed in range(2, 6): write(tmp_path, "mixed_bf16", seed, mae=0.11)
    estimate = evidence(tmp_path).estimate(GAP)
    assert estimate.n == 3 and estimate.value == pytest.approx(1.1) and len(estimate.records) == 9
    assert estimate.reach[1] == float("inf") and "mixed_bf16, seed 0: there is no such run" in estimate.note


@pytest.mark.parametrize("config", ["fp32", "mixed_bf16"])
def test_a_surrogate_that_diverged_shows_no_equivalence(tmp_path, config):
    grown = [1.0] * 20 + [50.0] * 20
    for seed in range(5):
        for c in ("fp32", "mixed_bf16"):
            write(tmp_path, c, seed, losses=grown if (c, seed) == (config, 4) else None)
    estimate = evidence(tmp_path).estimate(GAP)
    assert estimate.reach[1] > 1.05 and f"{config}" in estimate.note and estimate.n == (4 if config == "fp32" else 5)


def test_another_size_is_no_equal_model(tmp_path):
    for seed in range(3):
        for arm in ("train", "speed"):
            write(tmp_path, "fp32", seed, arm=arm)
            write(tmp_path, "mixed_bf16", seed, arm=arm, parameters=1_500_000)
        write(tmp_path, "mixed_bf16_2x", seed, parameters=4_000_000)
    e = evidence(tmp_path)
    for q in (GAP, Q("peak_saving", "molecules"), Q("larger_error_ratio", "molecules", target="gap")):
        assert e.estimate(q).value is None and "not comparable" in e.estimate(q).note


def test_batch_64_decides_and_512_is_reported(tmp_path):
    for seed in range(3):
        write(tmp_path, "fp32", seed, arm="speed", batches=(64,))
        write(tmp_path, "mixed_bf16", seed, arm="speed", peak=6e9)
    e = evidence(tmp_path)
    assert e.estimate(Q("peak_saving", "molecules")).value == pytest.approx(0.4)
    assert (e.estimate(Q("speed_ratio", "molecules", batch=512)).value is None
            and "512" in e.estimate(Q("speed_ratio", "molecules", batch=512)).note)


def test_out_of_memory_is_a_record_and_no_number(tmp_path):
    for seed in range(3):
        write(tmp_path, "fp32", seed, arm="speed", status="oom", reason="tried to allocate 30 GiB")
        write(tmp_path, "mixed_bf16", seed, arm="speed")
        write(tmp_path, "fp32", seed)
        write(tmp_path, "mixed_bf16", seed)
        write(tmp_path, "fp32_2x", seed, status="oom")
        write(tmp_path, "mixed_bf16_2x", seed, mae=0.09, parameters=2_000_000)
    runs = read_study(tmp_path)
    e = evidence(runs)
    estimate = e.estimate(Q("peak_saving", "molecules"))
    assert (estimate.value is None and "fp32: oom (tried to allocate 30 GiB)" in estimate.note
            and len(estimate.records) == 6)
    assert (e.estimate(Q("larger_error_ratio", "molecules", target="gap")).value == pytest.approx(0.9)
            and len(evidence_table(runs, H2)) == len(runs))


@pytest.mark.parametrize("new, old, ends, bound", [
                             ([(20, True), (22, False)], [(10, True), (11, False)], (20 / 11, 2.2), ""),
                             ([(20, True)], [(10, True), (11, False)], (20 / 11, float("inf")), "at least"),
                             ([(20, True), (22, False)], [(10, True)], (float("-inf"), 2.2), "at most"),
                         ])
def test_what_fits_is_known_up_to_the_search(tmp_path, new, old, ends, bound):
    for config, fits in (("fp32", old), ("mixed_bf16", new)): write(tmp_path, config, arm="largest", fits=fits)
    estimate = evidence(tmp_path).estimate(Q("capacity_ratio", "molecules"))
    assert estimate.value == 2.0 and estimate.ends == pytest.approx(ends) and estimate.bound == bound


def test_nothing_fits(tmp_path):
    write(tmp_path, "fp32", arm="largest", fits=[(10, False)], status="oom", reason="nothing fits")
    write(tmp_path, "mixed_bf16", arm="largest", fits=[(10, True), (20, False)])
    estimate = evidence(tmp_path).estimate(Q("capacity_ratio", "molecules"))
    assert estimate.value is None and "nothing fits" in estimate.note


def test_the_seed_is_the_unit_and_runs_are_averaged(tmp_path):
    for seed in range(5):
        write(tmp_path, "fp32", seed, found=10.0, runs=20)
        write(tmp_path, "mixed_bf16", seed, found=10.0 - seed, runs=20)
    estimate = evidence(tmp_path).estimate(Q("solution_loss", "molecules"))
    assert (estimate.n == 5 and estimate.value == pytest.approx(0.2) and "100 runs over 5 surrogates" in estimate.note
            and "asks for" not in estimate.note)
    one = tmp_path / "one"
    for config in ("fp32", "mixed_bf16"): write(one, config, 0, runs=100)
    # a hundred runs of one surrogate are one observation
    assert not evidence(one).estimate(Q("solution_loss", "molecules")).decides


def test_problems_samplers_and_the_best_tenth(tmp_path):
    for seed in range(3):
        write(tmp_path, "fp32", seed, problems_=("one", "two"), methods=("reinforce", "gflownet"))
        write(tmp_path, "mixed_bf16", seed, found=6.3, problems_=("two", "three"), methods=("reinforce", "bayes"))
    e = evidence(tmp_path)
    assert ([e.estimate(Q("solution_loss", "molecules", **which)).value
             for which in (dict(problem="one"), dict(problem="three"), dict(method="bayes"), dict(method="gflownet"))]
            == [None] * 4)
    assert ([e.estimate(Q(name, "molecules", problem="two")).value for name in ("solution_loss", "top_solution_loss")]
            == pytest.approx([0.1, 0.1]))


def test_a_solution_that_cannot_be_verified_scores_nothing(tmp_path):
    for seed in range(3):
        write(tmp_path, "fp32", seed)
        write(tmp_path, "mixed_bf16", seed, found=float("nan"))
    assert evidence(tmp_path).estimate(Q("solution_loss", "molecules")).value == 1.0
    for seed in range(3): write(tmp_path / "b", "fp32", seed, found=0.0), write(tmp_path / "b", "mixed_bf16", seed)
    assert "positive objective" in evidence(tmp_path / "b").estimate(Q("solution_loss", "molecules")).note


@pytest.mark.parametrize("lost", [dict(mae=float("nan")), dict(status="failed", skipped=range(20, 41))])
def test_a_lost_surrogate_is_not_left_out(tmp_path, lost):
    for seed in range(5):
        write(tmp_path, "fp32", seed)
        write(tmp_path, "mixed_bf16", seed, **(lost if seed == 4 else dict(mae=0.1)))
    estimate = evidence(tmp_path).estimate(GAP)
    assert estimate.n == 4 and estimate.bound == "at least" and "1 of 5 surrogates came to nothing" in estimate.note
    assert judge(GAP <= 1.05, lambda q: estimate).status == judge(
        GAP > 1.05, lambda q: estimate).status == Status.INCONCLUSIVE
    assert judge(GAP > 0.9, lambda q: estimate).status == Status.MET


@pytest.mark.parametrize("how",
                         [dict(mae=float("nan")), dict(mae=float("inf")), dict(status="failed", reason="disk full"),
                          dict(status="oom"), dict(status="aborted")], ids=str)
@pytest.mark.parametrize("side", ["fp32", "mixed_bf16"])
def test_whichever_of_a_pair_is_lost_nothing_is_equivalent(tmp_path, how, side):
    for seed in range(5):
        for config in ("fp32", "mixed_bf16"):
            write(tmp_path, config, seed, **(how if seed == 4 and config == side else dict(mae=0.1)))
    estimate = evidence(tmp_path).estimate(GAP)
    assert (estimate.n == 4 and estimate.bound == "at least"
            and f"{side}, seed 4, {how.get('status', 'no number')}" in estimate.note and "TOST" not in estimate.note)
    assert judge(All(GAP <= 1.05, GAP >= 1 / 1.05), lambda q: estimate).status == Status.INCONCLUSIVE


def test_where_all_surrogates_are_lost_the_criterion_is_open(tmp_path):
    for role in DOMAINS:
        for seed in range(5):
            write(tmp_path, "fp32", seed, role), write(
                tmp_path, "mixed_bf16", seed, role, **(dict(status="failed") if role == "molecules" else dict(mae=0.1)))
    found = judged(read_study(tmp_path))
    part = next(part for part in found["H2-F1"]["parts"] if part["at"].startswith("molecules"))
    assert ((part["status"], part["value"]) == ("inconclusive", None)
            and "5 of 5 surrogates came to nothing" in part["reason"])
    # two of three domains are enough for S2
    assert (found["H2-F1"]["status"], found["H2-S2"]["status"]) == ("inconclusive", "met")


def test_lost_on_both_sides_is_no_equivalence_either(tmp_path):
    for seed in range(5):
        for config in ("fp32", "mixed_bf16"): write(tmp_path, config, seed, mae=float("nan") if seed == 4 else 0.1)
    estimate = evidence(tmp_path).estimate(GAP)
    assert estimate.n == 4 and "lost on both sides" in estimate.note and estimate.bound == ""
    assert [judge(f, lambda q: estimate).status for f in (GAP <= 1.05, GAP > 1.1)] == [
        Status.INCONCLUSIVE, Status.NOT_MET]


@pytest.mark.parametrize(
    "how", [dict(status="oom"), dict(status="failed"), dict(peak=float("nan"), rate=float("nan"))], ids=str)
def test_memory_and_speed_that_were_lost_open_the_estimate(tmp_path, how):
    for seed in range(5):
        write(tmp_path, "fp32", seed, arm="speed"), write(
            tmp_path, "mixed_bf16", seed, arm="speed", **(how if seed == 4 else dict(peak=6e9)))
    e = evidence(tmp_path)
    # epochs are timed in training
    assert ([e.estimate(Q(name, "molecules")).bound for name in ("peak_saving", "speed_ratio", "epoch_ratio")]
            == ["at most", "at most", ""])
    assert [judge(f, e.estimate).status
            for f in (Q("peak_saving", "molecules") >= 0.3, Q("peak_saving", "molecules") < 0.5)] == [
        Status.INCONCLUSIVE, Status.MET]


def test_an_optimizer_that_found_nothing_over_fp32_lowers_no_bar(tmp_path):
    for seed in range(5): write(tmp_path, "fp32", seed, found=7.0), write(tmp_path, "mixed_bf16", seed, found=6.9)
    writer = RunWriter(tmp_path / "gpu-molecules-train-fp32-GPU A-0")
    writer.append(
        "solution", problem="one", method="reinforce", instance=0, run=0, objective=None, predicted=1.0, unit="1")
    writer.end("finished")
    loss = evidence(tmp_path).estimate(Q("solution_loss", "molecules"))
    assert (loss.bound == "at least" and loss.value == pytest.approx(1 - 6.9 / 7)
            and "1 runs have no partner's solution" in loss.note)


def test_a_loss_scale_that_is_no_number_is_low(tmp_path):
    for seed in range(3):
        run = write(tmp_path, "mixed_fp16", seed, loss_scale=65536.0)
        writer = RunWriter(run.folder)
        writer.append("step", step=41, loss=1.0, skipped=False, tokens=64, loss_scale=float("inf"))
        writer.end("finished")
    e = evidence(tmp_path, stack="mixed_fp16")
    assert (e.estimate(Q("low_scale_share", "molecules", config="mixed_fp16")).value == 1.0
            and e.estimate(Q("scaled_share", "molecules", config="mixed_fp16")).value == pytest.approx(40 / 41))


@pytest.mark.parametrize("pilot, status, said", [
    (0.01, Status.MET, "at the pilot's spread of 0.01"),
    (0.1, Status.INCONCLUSIVE, "at the pilot's spread of 0.1, below"),
    (None, Status.INCONCLUSIVE, "no pilot told the spread")])
def test_without_a_pilot_of_power_nothing_is_equivalent(tmp_path, monkeypatch, pilot, status, said):
    for seed, error in enumerate((0.1025, 0.0975, 0.1)):
        write(tmp_path, "fp32", seed, mae=0.1 / (1 + seed / 1000))
        write(tmp_path, "mixed_bf16", seed, mae=error / (1 + seed / 1000))
    monkeypatch.setattr(h2_quantities, "PILOT_SPREAD", {("molecules", "gap"): pilot} if pilot else {})
    estimate = evidence(tmp_path).estimate(GAP)
    assert 1 / 1.05 < estimate.lo < estimate.hi < 1.05 and said in estimate.note  # the pairs themselves lie close
    assert (estimate.reach is None) == (status == Status.MET)
    assert judge(All(GAP <= 1.05, GAP >= 1 / 1.05), lambda q: estimate).status == status


def test_averaged_weights_decide_and_the_others_are_reported(tmp_path):
    for seed in range(3):
        for config, errors in (("fp32", (1.0, 1.0, 1.0)), ("mixed_bf16", (1.1, 1.2, 1.3))):
            write(tmp_path, config, seed, mae=None)
            writer = RunWriter(tmp_path / f"gpu-molecules-train-{config}-GPU A-{seed}")
            for mae, how in zip(errors, (dict(ema=True, precision="own"), dict(ema=False, precision="own"),
                                         dict(ema=True, precision="fp32"))):
                writer.append("eval", set="test", target="gap", unit="eV", mae=mae, rmse=mae, n=1, epoch=2, **how)
            writer.end("finished")
    e = evidence(tmp_path)
    assert ([e.estimate(Q("error_ratio", "molecules", target="gap", **how)).value
             for how in ({}, dict(weights="raw"), dict(precision="fp32"))] == pytest.approx([1.1, 1.2, 1.3]))


def test_the_loss_scale_is_fp16s(tmp_path):
    for role in ("molecules", "aerodynamics"):
        for seed in range(5):
            write(tmp_path, "mixed_fp16", seed, role, loss_scale=0.5 if role == "molecules" and seed < 4 else 65536.0,
                  losses=[1.0] * 20 + [50.0] * 20 if seed < 3 else None)
    runs = study(tmp_path, configs=("mixed_bf16",))
    e = evidence(runs)
    at = lambda name, role: e.estimate(Q(name, role, config="mixed_fp16")).value
    assert ([at("low_scale_share", "molecules"), at("collapsed_share", "molecules"),
             at("collapsed_share", "aerodynamics")] == [0.8, 0.6, 0.0])
    assert (at("scaled_share", "molecules"), at("scaled_share", "aerodynamics")) == pytest.approx((0.2, 1.0))
    found = judged(runs)
    assert (found["H2-S4"]["status"] == "not applicable" and "mixed_fp16" in found["H2-S4"]["reason"]
            and [p["value"] for p in found["H2-S4"]["parts"]] == [pytest.approx(0.2), 1.0, None])
    assert found["H2"]["status"] == "success" and "no loss scale" in e.estimate(Q("collapsed_share", "molecules")).note


def test_divergence_is_counted_in_failed_runs_too(tmp_path):
    for role in DOMAINS:
        for seed in range(5):
            write(tmp_path, "mixed_bf16", seed, role,
                  **(dict(losses=[1.0] * 20 + [50.0] * 20) if seed < 2
                     else dict(status="failed", skipped=range(35, 41)) if seed == 2 and role == "molecules" else {}))
    found = judged(read_study(tmp_path))
    assert (found["H2-D4"]["status"], found["H2-D4"]["value"]) == ("met", pytest.approx(7 / 15))
    assert ([part["value"] for part in found["H2-F2"]["parts"]] == pytest.approx([0.6, 0.4, 0.4])
            and found["H2-F2"]["status"] == "met" and found["H2"]["status"] == "falsified")


def test_steps_that_loss_scaling_skips_are_no_divergence(tmp_path):
    for seed in range(3): write(tmp_path, "mixed_fp16", seed, skipped=(1, 2, 3, 20, 40), loss_scale=1024.0)
    assert evidence(tmp_path, stack="mixed_fp16").estimate(Q("diverged_share")).value == 0.0


def thinned(folder, config, seed, workers=1, skipped=0, scaled=90, least=0.5):
    "A run that kept a step in ten; its epochs count all."
    run = write(folder, config, seed, epochs=0)
    writer = RunWriter(run.folder)
    for e in (1, 2):
        writer.append("epoch", epoch=e, seconds=10.0 if config == "fp32" else 12.0, steps=100, samples=6400,
                      skipped=skipped if e == 2 else 0, scaled_above=scaled, least_scale=least, workers=workers)
    writer.end("finished")


def test_epochs_count_the_steps_that_no_row_was_kept_of(tmp_path):
    for seed in range(3): thinned(tmp_path, "mixed_fp16", seed, skipped=100 if seed == 0 else 99)
    e = evidence(tmp_path, stack="mixed_fp16")
    assert ([e.estimate(Q(name, "molecules")).value for name in ("scaled_share", "low_scale_share", "collapsed_share")]
            == pytest.approx([0.9, 1.0, 1 / 3]))


@pytest.mark.parametrize("workers, value, told", [(1, 1.2, ""), (4, 0.5, "shared the device")])
def test_epochs_on_a_shared_device_tell_no_time(tmp_path, workers, value, told):
    for seed in range(3):
        for config, rate in (("fp32", 1000.0), ("mixed_bf16", 2000.0)):
            thinned(tmp_path, config, seed, workers)
            write(tmp_path, config, seed, arm="speed", rate=rate)
    estimate = evidence(tmp_path).estimate(Q("epoch_ratio", "molecules"))
    assert estimate.value == pytest.approx(value) and told in estimate.note and estimate.decides


# --- checkpoints

FINE = {"reference_ratio[molecules, gap]": 1.0, "baseline_error[molecules, gap]": 0.04,
        "low_scale_share[molecules, mixed_fp16]": 0.0, "peak_saving[molecules]": 0.4,
        "larger_error_ratio[molecules, gap]": 0.95, "top_solution_loss[molecules]": 0.0} | {
    q.key: 0.9 for q in quantities(H2.checkpoints["H2-CF"].rules[0].formula) if "ratio" in q.name} | {
    f"{name}[{d}]": value for d in DOMAINS
    for name, value in (("collapsed_share", 0.0), ("peak_saving", 0.4), ("solution_loss", 0.0))}


def test_good_values_go_on_and_unmeasured_ones_pause():
    assert list(H2.checkpoints) == [f"H2-C{letter}" for letter in "ABCDEF"]
    for id in H2.checkpoints:
        assert (decide(H2.checkpoint(id), FINE).action, decide(H2.checkpoint(id), {}).action) == ("continue", "pause")


@pytest.mark.parametrize(
    "id, key, at, beyond",
    [("H2-CA", "reference_ratio[molecules, gap]", 1.15, 1.151), ("H2-CA", "baseline_error[molecules, gap]", 0.5, 0.501),
     ("H2-CB", "low_scale_share[molecules, mixed_fp16]", 0.6, 0.61), ("H2-CC", "peak_saving[molecules]", 0.15, 0.149),
     ("H2-CD", "larger_error_ratio[molecules, gap]", 1.1, 1.101),
     ("H2-CE", "top_solution_loss[molecules]", 0.15, 0.151),])
def test_checkpoint_thresholds(id, key, at, beyond):
    assert decide(H2.checkpoint(id), FINE | {key: at}).action == "continue"
    advised, enforced = (decide(H2.checkpoint(id), FINE | {key: beyond}, enforced=full) for full in (False, True))
    assert (advised.action == enforced.action == "abort" and key in advised.why and "would abort" in advised.words
            and "would" not in enforced.words)


def test_two_domains_that_fail_are_domain_specific():
    one = FINE | {"peak_saving[molecules]": 0.1}
    assert ([decide(H2.checkpoint("H2-CF"), values).action
             for values in (one, one | {"solution_loss[combinatorial]": 0.2})] == ["continue", "abort"])
    assert "domain-specific" in decide(H2.checkpoint("H2-CF"), one | {"solution_loss[combinatorial]": 0.2}).why


def test_the_baseline_is_held_against_what_fits_its_budget(tmp_path):
    for seed in range(3):
        write(tmp_path, "fp32", seed, mae=0.2)
        write(tmp_path, "pyg_fp32", seed, mae=0.17)
    decision = decide_from("H2-CA", evidence(tmp_path))
    assert decision.values == pytest.approx(
        {"reference_ratio[molecules, gap]": 0.2 / 0.17, "baseline_error[molecules, gap]": 0.2},
        rel=1e-2) and decision.action == "abort"
    assert "published 0.033 eV" in decision.why and "0.044 eV" in decision.why
    for seed in range(3): write(tmp_path / "full", "fp32", seed, scale="full", mae=0.035)
    full = decide_from("H2-CA", evidence(tmp_path / "full", scale="full"), enforced=True)
    assert (full.action == "continue"
            and full.values["reference_ratio[molecules, gap]"] == pytest.approx(0.035 / 0.033, rel=1e-2))
    alone = tmp_path / "alone"
    for seed in range(3): write(alone, "fp32", seed)
    assert decide_from("H2-CA", evidence(alone)).action == "pause"


def decided(folder, alter=lambda row: row):
    "A study with its journal, in which every checkpoint was decided."
    for seed in range(3):
        write(folder, "pyg_fp32", seed)
        write(folder, "mixed_fp16", seed, loss_scale=4.0)
    e = evidence(study(folder, seeds=3, larger=0.12))
    origin = {key: value for key, value in read_run(next(folder.glob("*train-fp32*"))).header.items()
              if key not in ("kind", "role", "size")}
    settings = dict(arm="protocol", config="protocol")
    writer = RunWriter(
        folder / "protocol",
        header=origin | settings | dict(run="protocol", settings=settings, settings_hash=content_hash(settings)))
    for id in H2.checkpoints: writer.append("decision", **alter(decide_from(id, e).row))
    writer.end("finished")
    return {row["checkpoint"]: row for row in read_run(folder / "protocol").of("decision")}


def test_decisions_replay_from_records(tmp_path):
    rows = decided(tmp_path)
    assert {id: row["action"] for id, row in rows.items()} == dict.fromkeys(rows, "continue") | {
        "H2-CD": "abort", "H2-CF": "abort"}
    again = replay(read_study(tmp_path), H2)
    assert len(again) == 6 and all(row["agrees"] and not row["unchecked"] for row in again), again
    assert all(still_holds(row, evidence(tmp_path)) for row in rows.values())
    write(tmp_path, "mixed_bf16", 0, arm="speed", peak=9e9)
    assert not still_holds(rows["H2-CC"], evidence(tmp_path)) and [
        row["checkpoint"] for row in replay(read_study(tmp_path), H2) if not row["agrees"]] == ["H2-CC", "H2-CF"]


def test_altered_decisions_are_found(tmp_path):
    decided(tmp_path, lambda row: row | dict(values={**row["values"], "peak_saving[molecules]": 0.9})
                if row["checkpoint"] == "H2-CC" else row)
    wrong, = (row for row in replay(read_study(tmp_path), H2) if not row["agrees"])
    assert wrong["checkpoint"] == "H2-CC" and "from the records" in wrong["difference"]


# --- the command line

def test_check_and_verdict_on_the_command_line(tmp_path, capsys, monkeypatch):
    # the rows are made up: losses and times are the same in all runs, which `check` finds by itself
    monkeypatch.setattr("flashoptim_nb.study.content.content_problems", lambda runs: [])
    decided(tmp_path / "h2-gpu")
    assert main(["check", str(tmp_path)]) == 0 and "every decision replays" in capsys.readouterr().out
    assert main(["verdict", "h2", "--json", "--records", str(tmp_path)]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert by_id(entries)["H2"]["status"] == "falsified" and {e["side"] for e in entries} == {"mixed_bf16", "flash"}
    assert all(f"H2-C{letter}" in by_id(entries) for letter in "ABCDEF")
    assert main(["verdict", "h2", "--records", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "H2 mixed_bf16 against fp32 (the headline): FALSIFIED" in shown and "H2 flash against fp32" in shown


# --- the prover

@pytest.fixture(scope="module")
def found(): return {finding.id: finding for finding in findings(H2_LOGIC, H2_CHECKS)}


def test_findings(found):
    assert all(finding.proved for finding in found.values())
    assert (found["clean success"].kind == "possible" and found["success with H2-F1"].kind == "overlap"
            and found["H2-F1 in a domain that succeeds"].kind == "excluded")
    assert ({"H2-F5 = H2-D2", "H2-F6 = H2-D5", "H2-D3 -> H2-F3", "claim's number", "between the numbers",
             "falsification's number", "H2-S6 -> H2-S1"} <= set(found))


@pytest.mark.parametrize("id", [c.id for c in H2_LOGIC.harmful])
def test_witnesses_are_judged_again(found, id):
    look = lambda q: exact(found[f"success with {id}"].witness.get(q.key, H2_LOGIC.typical[q.name]))
    assert judge(H2_LOGIC.successful, look).status == judge(criterion_of(id).formula, look).status == "met"
