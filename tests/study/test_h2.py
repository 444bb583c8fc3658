"""The study of hypothesis 2: whole, interrupted, killed, shared among workers, asked for what there is not."""
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.base.records import RunWriter, problems, read_study
from flashoptim_nb.study.h2.quantities import DOMAINS
from flashoptim_nb.study.h2.experiments import H2_PROTOCOL
from flashoptim_nb.study.h2.presets import SURROGATE_PRESETS
from flashoptim_nb.study.presets import select_runs
from flashoptim_nb.study.runner import Study, dry_run
from flashoptim_nb.cli.main import main
from flashoptim_nb.study.loop import Interrupted
from processes import Forked
from records_factory import rows_without

COMMON = """
from dataclasses import replace
from flashoptim_nb.study.h2.presets import SURROGATE_PRESETS
from flashoptim_nb.surrogates.plans import Solve
from flashoptim_nb.surrogates.registry import domains

plan = SURROGATE_PRESETS["laptop"].plans["molecules"].replace(configs=("fp32", "flash", "mixed_fp16"), searched=("flash",), tries=3, batches=(16,), timed=2, limits=dict(rows=160), budget=1 << 20, labels=(),
                                         solve=Solve(runs=2, methods=("reinforce",), steps=2, batch=8, most=3), solved=("fp32", "flash"))
PRESET = SURROGATE_PRESETS["laptop"].replace(plans={"toy": plan}, seeds=(0, 1), checkpoints=3)
"""
DRIVER = COMMON + """
import sys
from flashoptim_nb.cli import main, run
from flashoptim_nb.study.h2.experiments import H2_PROTOCOL
from flashoptim_nb.study.runner import Study
from flashoptim_nb.study.loop import Interrupted
try: sys.exit(Study(H2_PROTOCOL, PRESET, sys.argv[1], device="cpu", stopped=run.Stop()).run())
except Interrupted: sys.exit(130)
"""
exec(COMMON)
# What a clock says, what is derived from it and what names the moment: not what the promise is about.
TIMED = {
    "seconds", "task_seconds", "cold", "started", "command", "commit", "ms", "samples_per_s", "mean_samples_per_s",
    "settling", "steps"}


TOY = domains()["toy"]  # noqa: F821 - of COMMON


@pytest.fixture
def lacking(monkeypatch):
    "Takes the toy domain's data away, and gives them back."
    def load(preset, **_): raise UserError("the package of the data is not installed; install it")
    def take(away): monkeypatch.setitem(domains(), "toy", replace(TOY, load=load) if away else TOY)  # noqa: F821
    return take


@pytest.fixture
def one_thread():
    "As workers have: on some processors a product in bf16 that is divided among threads is rounded otherwise."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def study(out, preset=PRESET, **options):  # noqa: F821 - of COMMON
    return Study(H2_PROTOCOL, preset, out, device="cpu", console=Console(file=io.StringIO()), **options)


def content(out):
    "Everything in the records that is not a time, by run."
    return rows_without(out / "h2-laptop", TIMED)


def start(out): return Forked(DRIVER, out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "In a process that began anew, with an order of hashes of its own, unlike those that the tests kill."
    out = tmp_path_factory.mktemp("whole")
    done = subprocess.run([sys.executable, "-c", DRIVER, str(out)], env=os.environ | {"OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_records_hold_what_the_judge_reads(whole):
    runs = read_study(whole / "h2-laptop")
    assert [bad for run in runs for bad in problems(run.folder)] == []
    assert {run.status for run in runs} == {"finished"}
    run = next(run for run in runs if run.id == "toy-train-flash-s1")
    assert run.header["hypothesis"] == "h2" and run.header["settings"]["parameters"] > 0
    assert {(row["set"], row["precision"], row["ema"]) for row in run.of("eval")} == {
        ("val", "own", True), *(("test", p, e) for p in ("own", "fp32") for e in (True, False))}
    assert [(row["instance"], row["method"]) for row in run.of("solution")] == [(0, "reinforce"), (1, "reinforce")]
    assert all(row["curve"] == sorted(row["curve"]) and row["objective"] == pytest.approx(row["curve"][-1], abs=1e-5)
               for row in run.of("solution"))
    epochs = run.of("epoch")
    assert (sum(row["samples"] for row in epochs) == sum(row["tokens"] for row in run.of("step"))
            and epochs[-1]["loss_scale"] == 1.0)
    fp16 = next(run for run in runs if run.id == "toy-train-mixed_fp16-s0")
    assert fp16.of("epoch")[-1]["loss_scale"] == 65536.0 and not fp16.of("solution")
    speed = next(run for run in runs if run.id == "toy-speed-fp32-s0")
    assert {row["batch"] for kind in ("memory", "throughput") for row in speed.of(kind)} == {16}
    largest = next(run for run in runs if run.header["arm"] == "largest")
    assert (len(largest.of("search")) == 3
            and largest.of("largest")[0]["peak"] <= largest.of("largest")[0]["budget"] == 1 << 20)
    journal = next(run for run in runs if run.id == "protocol")
    assert journal.of("cut") and journal.of("source")[0]["rows"]["train"] == 160


def test_made_again_nothing_changes(whole):
    before = {run.id: run.mark for run in read_study(whole / "h2-laptop") if run.id != "protocol"}
    assert study(whole).run() == 0
    assert before == {run.id: run.mark for run in read_study(whole / "h2-laptop") if run.id != "protocol"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_a_random_moment_it_goes_on_as_if_nothing_had_happened(number, whole, tmp_path, rng_seed):
    asked = random.randrange(1, 8)  # after so many records
    process = start(tmp_path)
    while process.poll() is None and len([*tmp_path.glob("*/*/rows.jsonl")]) < asked: time.sleep(0.02)
    time.sleep(random.random() / 3)
    if process.poll() is None: process.send_signal(number)
    process.communicate(timeout=120)
    for run in read_study(tmp_path / "h2-laptop") if (tmp_path / "h2-laptop").exists() else ():
        assert run.status in ("unfinished", "finished")
    process = start(tmp_path)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    ours, theirs = content(tmp_path), content(whole)
    for name in theirs: assert ours[name] == theirs[name], name
    assert not [*tmp_path.glob("*/*/checkpoint*")]


def test_workers_make_the_same_training_runs(whole, tmp_path, one_thread):
    scale = PRESET.replace(plans={"toy": PRESET.plans["toy"].replace(solve=None)})  # noqa: F821
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert (study(alone, scale, experiments=["train"]).run() == 0
            and study(together, scale, experiments=["train"], workers=2).run() == 0)
    a, b = content(alone), content(together)
    assert a.keys() == b.keys() and len(a) == 7
    for name in a.keys() - {"protocol"}:
        strip = lambda rows: [{k: v for k, v in row.items() if k != "workers"} for row in rows]
        assert strip(a[name]) == strip(b[name]), name


def test_a_limit_of_time_stops_and_the_same_command_goes_on(tmp_path):
    with pytest.raises(UserError, match="before anything could be done"): study(tmp_path, minutes=1e-5).run()
    made = len(read_study(tmp_path / "h2-laptop"))
    assert study(tmp_path, experiments=["speed"]).run() == 0
    assert len(read_study(tmp_path / "h2-laptop")) > made
    assert study(tmp_path, experiments=["speed"], minutes=1e-5).run() == 0  # nothing is left to make
    with pytest.raises(UserError, match="more than 0"): study(tmp_path, minutes=-1.0)


def test_what_breaks_is_recorded_and_the_others_go_on(tmp_path, monkeypatch):
    from flashoptim_nb.surrogates.task import SurrogateTask
    learn = SurrogateTask.train_batch
    def broken(self, micros):
        if self.config.name == "flash": raise (torch.OutOfMemoryError if self.seed else ZeroDivisionError)("on purpose")
        return learn(self, micros)
    monkeypatch.setattr(SurrogateTask, "train_batch", broken)
    assert study(tmp_path, experiments=["train", "speed"]).run() == 1
    ended = {run.id: run.status for run in read_study(tmp_path / "h2-laptop")}
    assert ((ended["toy-train-flash-s0"], ended["toy-train-flash-s1"], ended["toy-speed-flash-s1"])
            == ("failed", "oom", "oom"))
    assert ended["toy-train-fp32-s1"] == ended["toy-train-mixed_fp16-s1"] == "finished"
    monkeypatch.setattr(SurrogateTask, "train_batch", learn)
    assert study(tmp_path, experiments=["train", "speed"]).run() == 0
    ended = {run.id: run.status for run in read_study(tmp_path / "h2-laptop")}
    # what did not fit is a finding
    assert (ended["toy-train-flash-s0"], ended["toy-train-flash-s1"]) == ("finished", "oom")


def test_a_domain_without_its_data_is_a_record_that_says_so(tmp_path, lacking):
    lacking(True)
    assert study(tmp_path, configs=["fp32"]).run() == 0
    runs = read_study(tmp_path / "h2-laptop")
    assert {(run.status, run.reason) for run in runs if run.id != "protocol"} == {
        ("unavailable", "the package of the data is not installed; install it")}
    assert [bad for run in runs for bad in problems(run.folder)] == []
    assert next(run for run in runs if run.id == "protocol").of("skip")


def test_bad_requests_are_answered_in_words(tmp_path, capsys):
    for words, told in (
            (["--domains", "molecule"], "did you mean 'molecules'"), (["--configs", "fp8"], "choose one of"),
            (["--arms", "all"], "choose one of: train"), (["--sizes", "1B"], "--sizes is not an option of h2"),
            (["--workers", "0"], "at least 1"), (["--minutes", "0"], "more than 0"), (["--confirm", "H1-CA"], "H2-CA"),
            (["--scale", "laptoop"], "did you mean 'laptop'")):
        assert main(["run", "h2", "--scale", "laptop", "--out", str(tmp_path), *words]) == 2, words
        assert told in capsys.readouterr().err, words
    if not torch.cuda.is_available():
        assert main(["run", "h2", "--scale", "gpu", "--out", str(tmp_path)]) == 2
        assert "CUDA" in capsys.readouterr().err
    assert main(["run", "h1", "--scale", "laptop", "--out", str(tmp_path), "--domains", "molecules"]) == 2
    assert "not an option of h1" in capsys.readouterr().err
    with pytest.raises(UserError, match="above 0"): study(tmp_path, PRESET.replace(budget=0))  # noqa: F821


def test_a_budget_too_small_is_a_finding(tmp_path):
    plan = PRESET.plans["toy"].replace(budget=1000)  # noqa: F821
    assert study(tmp_path, PRESET.replace(plans={"toy": plan}), experiments=["largest"]).run() == 0  # noqa: F821
    run = next(run for run in read_study(tmp_path / "h2-laptop") if run.header["arm"] == "largest")
    assert run.status == "oom" and "nothing fits" in run.reason and run.of("largest")[0]["parameters"] is None


def records(out):
    "Every file of a study but its lock, with its bytes."
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*"))
            if path.is_file() and path.name != ".lock"}


@pytest.fixture
def taught(monkeypatch):
    "A scale whose runs are taught by inexpensive labels, and what says whether their solver is installed."
    solver = dict(installed=False)
    def label_ways(domain):
        if not solver["installed"]: raise UserError("the solver was not found; look in [/opt/solver]")
        return dict(full=[domain], cheap_then_fine=[domain, domain]), dict(full=2.0, cheap_then_fine=1.0), "a solver"
    monkeypatch.setitem(domains(), "toy", replace(TOY, label_ways=label_ways))  # noqa: F821
    plan = PRESET.plans["toy"].replace(labels=("fp32",), solve=None)  # noqa: F821
    return PRESET.replace(plans={"toy": plan}, seeds=(0,)), solver  # noqa: F821


def statuses(out): return {run.id: run.status for run in read_study(out / "h2-laptop")}


def test_a_run_that_cannot_be_had_is_tried_again_and_ends_nothing(tmp_path, taught):
    scale, solver = taught
    first = dict(experiments=["labels", "speed"], configs=["fp32"])
    assert study(tmp_path, scale, **first).run() == 0
    stands, files = statuses(tmp_path), records(tmp_path)
    assert stands["toy-labels-fp32-s0"] == "unavailable" and stands["protocol"] == "finished"
    for _ in range(2):
        assert study(tmp_path, scale, **first).run() == 0
        assert records(tmp_path) == files, "nothing was done, so nothing is written"
    assert study(tmp_path, scale, **first, workers=2).run() == 0 and records(tmp_path) == files
    assert study(tmp_path, scale, configs=["fp32"]).run() == 0  # what comes after it is reached
    assert statuses(tmp_path) == stands | {"toy-train-fp32-s0": "finished"}
    solver["installed"] = True
    assert study(tmp_path, scale, configs=["fp32"]).run() == 0
    assert set(statuses(tmp_path).values()) == {"finished"}
    assert [bad for run in read_study(tmp_path / "h2-laptop") for bad in problems(run.folder)] == []


@pytest.mark.parametrize("arm", ["labels", "speed", "largest"])
def test_a_measurement_that_was_killed_and_then_cannot_be_had_ends_nothing(tmp_path, taught, arm, monkeypatch):
    scale, solver = taught
    solver["installed"] = True
    assert study(tmp_path, scale, experiments=[arm]).run() == 0
    run = next(run for run in read_study(tmp_path / "h2-laptop") if run.header["arm"] == arm)
    file = run.folder / "rows.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    def cannot(*_, **__): raise UserError("it cannot be had here")
    for name in ("label_rows", "measure_speed", "largest"):
        monkeypatch.setattr(f"flashoptim_nb.study.h2.experiments.{name}", cannot)
    for _ in range(2):
        assert study(tmp_path, scale, experiments=[arm]).run() == 0
        stands = statuses(tmp_path)
        assert stands[run.id] == "unavailable" and stands["protocol"] == "finished"


@pytest.mark.parametrize("arm", ["labels", "speed", "largest"])
def test_a_row_that_does_not_fit_is_a_failure_and_not_unavailable(tmp_path, taught, arm, monkeypatch):
    scale, solver = taught
    solver["installed"] = True
    whole = RunWriter.append
    def append(self, kind, **fields):
        whole(self, kind, **(fields if kind in ("header", "end") or self.folder.name == "protocol"
                             else fields | dict(note=3, n=[], set=1, seconds="x", ms="y")))
    with monkeypatch.context() as m:
        m.setattr(RunWriter, "append", append)
        assert study(tmp_path, scale, experiments=[arm], configs=["flash"] if arm == "largest" else ["fp32"]).run() == 1
    (id, status), = ((id, status) for id, status in statuses(tmp_path).items() if id != "protocol")
    assert (status == "failed"
            and "RowError" in next(run.reason for run in read_study(tmp_path / "h2-laptop") if run.id == id))
    assert (study(tmp_path, scale, experiments=[arm], configs=["flash"] if arm == "largest" else ["fp32"]).run() == 0
            and set(statuses(tmp_path).values()) == {"finished"})


def test_arms_that_a_domain_has_not_are_named(tmp_path, taught):
    told = io.StringIO()
    scale, _ = taught
    bare = scale.replace(plans={"toy": scale.plans["toy"].replace(labels=())})
    for arms in ["labels"], ["labels", "train"]:
        assert (Study(H2_PROTOCOL, bare, tmp_path, device="cpu", experiments=arms, configs=["fp32"],
                      console=Console(file=told)).run() == 0)
    assert told.getvalue().count("nothing to run: toy has no labels with the configurations fp32") == 2


def test_a_study_whose_protocol_record_was_taken_away_is_refused(tmp_path, taught, capsys):
    assert study(tmp_path, taught[0], experiments=["train"], configs=["fp32"]).run() == 0
    assert main(["check", str(tmp_path)]) == 0 and "followed a plan of its own" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "h2-laptop" / "protocol")
    assert main(["check", str(tmp_path)]) == 1 and "1 runs of h2 and no protocol record" in capsys.readouterr().err


def test_a_plan_of_ones_own_is_no_registered_one_and_hides_no_run(tmp_path, taught, capsys):
    assert study(tmp_path, taught[0], experiments=["train"], configs=["fp32"]).run() == 0
    runs, folder = read_study(tmp_path / "h2-laptop"), tmp_path / "h2-laptop"
    assert not any("registration" in run.header for run in runs)  # none has this plan
    assert json.loads((folder / "manifest.json").read_text())["plan"] == "one's own"
    shutil.copytree(next(run.folder for run in runs if run.id != "protocol"), folder / "toy-train-fp32-s9")
    capsys.readouterr()
    assert main(["check", str(tmp_path)]) == 1 and "no plan has this run" in capsys.readouterr().err


def test_a_study_that_is_interrupted_has_its_manifest(tmp_path, taught, capsys):
    made = []
    def stopped(): return any((tmp_path / "h2-laptop").glob("toy-train*")) and (made.append(1) or len(made) > 3)
    with pytest.raises(Interrupted): study(tmp_path, taught[0], experiments=["train"], stopped=stopped).run()
    kept = json.loads((tmp_path / "h2-laptop" / "manifest.json").read_text())
    assert kept["absent"] and any("train" in run for run in kept["runs"])
    assert main(["check", str(tmp_path)]) == 1  # for it is not finished, and for nothing else
    assert all("the run did not end" in line for line in capsys.readouterr().err.splitlines())


def test_what_is_told_is_not_read_as_markup(tmp_path, taught):
    told, out = io.StringIO(), tmp_path / "a [bold] place [/x] :fire:"
    console = Console(file=told, force_terminal=True, color_system=None, width=60)
    assert (Study(H2_PROTOCOL, taught[0], out, device="cpu", experiments=["labels", "train"], configs=["fp32"],
                  console=console).run() == 0)
    assert "is unavailable: the solver was not found; look in [/opt/solver]; the same" in told.getvalue()
    assert f"3 records in {out / 'h2-laptop'}; next: flashoptim-nb verdict h2 --records '{out}'" in told.getvalue()


def test_a_refused_request_changes_nothing(tmp_path):
    wanted = dict(experiments=["speed"], configs=["fp32"])
    with pytest.raises(UserError, match="nothing waits for H2-CA"): study(tmp_path / "new", **wanted).run(["H2-CA"])
    assert not (tmp_path / "new").exists()
    assert study(tmp_path, **wanted).run() == 0
    files = records(tmp_path)
    other = PRESET.replace(plans={"toy": PRESET.plans["toy"].replace(batches=(8,))})  # noqa: F821
    for scale, confirm in ((PRESET, ["H2-CA"]), (PRESET, ["H2-CX"]), (other, [])):  # noqa: F821
        with pytest.raises(UserError): study(tmp_path, scale, **wanted).run(confirm)
        assert records(tmp_path) == files
    with pytest.raises(Interrupted): study(tmp_path, **wanted, stopped=lambda: True).run()
    assert records(tmp_path) == files


def test_data_that_come_and_go_end_nothing(tmp_path, lacking):
    wanted = dict(experiments=["train", "speed"], configs=["fp32"])
    lacking(True)
    assert study(tmp_path, **wanted).run() == 0 and set(statuses(tmp_path).values()) == {"unavailable", "finished"}
    files = records(tmp_path)
    assert study(tmp_path, **wanted).run() == 0 and records(tmp_path) == files
    lacking(False)
    assert study(tmp_path, **wanted).run() == 0 and set(statuses(tmp_path).values()) == {"finished"}
    lacking(True)  # what was made stays made
    assert study(tmp_path, **wanted).run() == 0 and set(statuses(tmp_path).values()) == {"finished"}


def test_an_interrupted_run_waits_for_its_data(tmp_path, lacking):
    wanted, left = dict(experiments=["train"], configs=["fp32"]), iter([False] * 4 + [True] * 9)
    with pytest.raises(Interrupted): study(tmp_path, **wanted, stopped=lambda: next(left)).run()
    lacking(True)
    assert study(tmp_path, **wanted).run() == 1
    assert list((tmp_path / "h2-laptop").glob("*/checkpoint.safetensors")), "it is still there to go on from"
    lacking(False)
    assert study(tmp_path, **wanted).run() == 0
    assert set(statuses(tmp_path).values()) == {"finished"} and not list(tmp_path.rglob("checkpoint*"))


def test_other_settings_do_not_mix(tmp_path):
    assert study(tmp_path, experiments=["speed"], configs=["fp32"]).run() == 0
    other = PRESET.replace(plans={"toy": PRESET.plans["toy"].replace(batches=(8,))})  # noqa: F821
    with pytest.raises(UserError, match="other settings"):
        study(tmp_path, other, experiments=["speed"], configs=["fp32"]).run()


@pytest.mark.parametrize("preset", SURROGATE_PRESETS)
def test_every_preset_can_say_what_it_would_run(preset):
    told = dry_run(H2_PROTOCOL, SURROGATE_PRESETS[preset])
    assert told.startswith("On ") and "In all" in told
    assert json.loads(dry_run(H2_PROTOCOL, SURROGATE_PRESETS[preset], as_json=True))["preset"]["name"] == preset
    for stage in H2_PROTOCOL.stages(select_runs(SURROGATE_PRESETS[preset], configs=["fp32"])):
        assert all(configs == ("fp32",) for _, configs in stage.runs)


def test_conditions_and_seeds_are_never_cut():
    assert (len(SURROGATE_PRESETS["gpu"].seeds) == len(SURROGATE_PRESETS["full"].seeds) == 5
            and SURROGATE_PRESETS["gpu"].budget == 24 << 30)
    for preset in SURROGATE_PRESETS.values():
        assert preset.plans.keys() >= DOMAINS.keys()
        for name in DOMAINS:
            assert {"fp32", "mixed_bf16", "flash", "mixed_bf16_2x", "flash_2x", "fp32_2x", "mixed_fp16", "tf32"} <= set(
                preset.plans[name].configs)
    assert np.prod([len(SURROGATE_PRESETS["gpu"].seeds), SURROGATE_PRESETS["gpu"].plans["molecules"].solve.runs]) == 100


def test_an_enforced_checkpoint_holds_the_study_until_it_is_confirmed(tmp_path, monkeypatch):
    monkeypatch.setitem(domains(), "molecules", replace(TOY, name="molecules"))  # noqa: F821
    plan = PRESET.plans["toy"].replace(configs=("fp32", "mixed_fp16"), solve=None, searched=())  # noqa: F821 - the toy's errors are no molecule's, so CA is not measured
    scale = PRESET.replace(plans={"molecules": plan}, enforced=True)  # noqa: F821
    def stands(): return next(run for run in read_study(tmp_path / "h2-laptop") if run.id == "protocol")
    assert study(tmp_path, scale).run() == 1
    assert (stands().status, [row["checkpoint"] for row in stands().of("decision")]) == ("paused", ["H2-CA"])
    assert not [run for run in read_study(tmp_path / "h2-laptop") if run.header["config"] == "mixed_fp16"]
    files = records(tmp_path)
    for ids in (["H2-CB"], ["H2-CA", "H2-CB"]):
        with pytest.raises(UserError, match="what waits: H2-CA"): study(tmp_path, scale).run(ids)
        assert records(tmp_path) == files
    assert study(tmp_path, scale).run() == 1 and records(tmp_path) == files, "it waits, and is as it was"
    assert study(tmp_path, scale).run(["H2-CA"]) == 1  # and is held by the next that cannot be decided
    assert (stands().of("confirm") and stands().status == "paused"
            and stands().of("decision")[-1]["checkpoint"] != "H2-CA")
