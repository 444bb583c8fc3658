"""Interrupted work resumes: studies are killed for real, at random moments, and end as if nothing had happened."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from flashoptim_nb.base.records import problems
from processes import Forked
from records_factory import rows_without

# A small study of the real protocol: one prerequisite, three uncompiled stacks, one seed; signals as in the command.
DRIVER = """
import sys
from flashoptim_nb.cli import main, run
from flashoptim_nb.study.h1 import experiments as h1
from flashoptim_nb.study.h1.presets import LM_PRESETS
from flashoptim_nb.study.loop import Interrupted
from flashoptim_nb.study.runner import Study
plan = LM_PRESETS["laptop"].plans["1B"]
plan = plan.replace(recipe=plan.recipe.replace(steps=10, batch=2, micro=1, seq=32), micros=(2,), track_every=3,
                    configs=("baseline", "ablation_split_only", "ablation_release_only"))
preset = LM_PRESETS["laptop"].replace(plans={"1B": plan}, seeds=(0,), checkpoint_every=2, eval_sets=(("sotu", 512),),
                                      track_set=("sotu", 512), stress_lengths=(128,))
for name in set(h1.PREREQUISITES) - {"checkpointing"}: del h1.PREREQUISITES[name]
try: sys.exit(Study(h1.H1_PROTOCOL, preset, sys.argv[1], device="cpu", stopped=run.Stop()).run())
except Interrupted: sys.exit(130)
"""
# Not promised: what a clock says, what is derived from it or decided on it, and what names the moment.
TIMED = {"seconds", "task_seconds", "cold", "started", "command", "commit", "tokens_per_s", "mean_tokens_per_s",
         "settling", "seconds_per_step", "utilization", "steps", "values", "why", "action"}


def start(out): return Forked(DRIVER, out, FLASHOPTIM_DATA="")


def content(out):
    "Everything in the records that is not a time, by run."
    return rows_without(out / "h1-laptop", TIMED)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "In a process that began anew, with an order of hashes of its own, unlike those that the tests kill."
    out = tmp_path_factory.mktemp("whole")
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(out)], env=os.environ | {"OMP_NUM_THREADS": "1", "FLASHOPTIM_DATA": ""},
        capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def uninterrupted(whole): return content(whole)


def test_a_finished_study_run_again_changes_nothing(whole, uninterrupted):
    "Not even its decisions, which rest on the runs before them and not on those that came later."
    def files(): return {path: path.read_bytes() for path in whole.rglob("*.jsonl")}
    before, process = files(), start(whole)
    told, _ = process.communicate(timeout=300)
    assert files() == before, "the journal is as it was, its last row included"
    assert told.count("sizes are roles at laptop scale") == 1, "said once, before anything is called 1B"
    assert process.returncode == 0, told
    assert content(whole) == uninterrupted


def rows(out):
    "How many rows a study has written so far."
    return sum(path.read_bytes().count(b"\n") for path in out.glob("*/*/*.jsonl"))


def wait_for(process, out, more):
    "Waits until the study has written some rows more, and a random moment longer; returns whether it still runs."
    wanted, began = rows(out) + more, time.monotonic()
    while process.poll() is None and rows(out) < wanted:
        assert time.monotonic() - began < 300, "no progress"
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))
    return process.poll() is None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_killed_at_random_moments(how, uninterrupted, tmp_path, rng_seed):
    kills = 0
    for most in (2, 25, 25, 25):  # the first within the prerequisite or the first run
        process = start(tmp_path)
        if not wait_for(process, tmp_path, random.randint(1, most)): break
        process.send_signal(how)
        process.communicate(timeout=120)
        if process.returncode == 0: break  # it had written its last row
        assert process.returncode in (-how, 128 + how, 130), "stopped in an orderly way, or at once"
        kills += 1
    process = start(tmp_path)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    assert kills >= 1, "the study ended before it could be killed"
    again = content(tmp_path)
    assert again.keys() == uninterrupted.keys()
    for run in again:
        assert again[run] == uninterrupted[run], run
    assert not [line for folder in (tmp_path / "h1-laptop").iterdir() if folder.is_dir() for line in problems(folder)]
    assert not list((tmp_path / "h1-laptop").glob("*/*.safetensors")), "a finished run keeps no checkpoint"


@pytest.mark.parametrize("moment", ["runs", "decision"])
def test_a_study_stops_after_its_last_run_too(moment, monkeypatch):
    "A stop that comes with the last run, or while the last decision is taken, is not overheard."
    from flashoptim_nb.study import runner
    from flashoptim_nb.study.experiment import Stage
    from flashoptim_nb.study.loop import Interrupted
    done, protocol = [], SimpleNamespace(stages=lambda *_: [Stage("1B", ())], opening=lambda _: "", after_downgrade=())
    study = SimpleNamespace(protocol=protocol, preset=SimpleNamespace(plans={}), experiments=None,
                            specs=lambda stage: [], stopped=lambda: moment in done)
    study.check_stop = lambda: runner.Study.check_stop(study)
    monkeypatch.setattr(runner, "train_all_first", lambda study: None)
    monkeypatch.setattr(runner, "attempt_all", lambda *_: done.append("runs") or 0)
    monkeypatch.setattr(runner, "record_decision", lambda *_: done.append("decision") or "continue")
    with pytest.raises(Interrupted, match="the same command again"): runner.run_stages(study)
    assert done == ["runs", "decision"][:1 + (moment == "decision")]


class Counts:
    "A task whose state is a number."
    def __init__(self): self.n = torch.zeros(1)
    def step(self, n): self.n += 1; return dict(loss=1.0, grad_norm=1.0, lr=1.0, skipped=False, tokens=1)
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, state): self.n = state["n"]


def test_what_is_evaluated_after_the_last_step_can_be_stopped(tmp_path):
    from flashoptim_nb.base.records import read_run
    from flashoptim_nb.study.loop import Callback, Interrupted, fit
    class Evaluates(Callback):
        "Three evaluations of the task with other weights, each of which takes its time."
        made = 0
        def __init__(self, task): self.task = task
        def finish(self):
            for n in range(3):
                kept, self.task.n = self.task.n, self.task.n + 10
                try:
                    Evaluates.made += 1
                    yield "eval", dict(step=n, set="s", nll=float(self.task.n), tokens=1)
                finally: self.task.n = kept
    def made(name, stopped):
        task = Counts()
        return fit(task, tmp_path / name, dict(run=name, settings_hash="s"), steps=4, callbacks=[Evaluates(task)],
                   stopped=stopped)
    made("whole", lambda: False)
    Evaluates.made = 0
    with pytest.raises(Interrupted, match="before all was evaluated"): made("late", lambda: Evaluates.made == 1)
    assert Evaluates.made == 1 and not read_run(tmp_path / "late").of("eval")
    assert made("late", lambda: False) == "finished"
    rows = [read_run(tmp_path / name).of("eval") for name in ("whole", "late")]
    assert rows[0] == rows[1] and [row["nll"] for row in rows[0]] == [14.0] * 3


def test_what_a_killed_process_left_half_written_is_removed(tmp_path):
    from flashoptim_nb.study.run import is_done
    from flashoptim_nb.study.loop import Interrupted, fit
    run, header = tmp_path / "r", dict(run="r", settings_hash="s")
    def litter():
        for name in (".tmpAb1Xyz", "checkpoint.new", "rows.new", "rows.1.new"): (run / name).write_bytes(b"half of it")
    def files(): return sorted(path.name for path in run.iterdir())
    with pytest.raises(Interrupted): fit(Counts(), run, header, steps=4, checkpoint_every=1, stopped=lambda: True)
    assert files() == ["checkpoint.safetensors", "rows.jsonl"]
    litter()
    (run / "notes.txt").write_text("a user's own")
    assert fit(task := Counts(), run, header, steps=4, checkpoint_every=1) == "finished" and task.n == 4
    assert files() == ["notes.txt", "rows.jsonl"]
    litter()  # killed after its last row
    assert is_done(run, header) and files() == ["notes.txt", "rows.jsonl"]


def test_a_checkpoint_that_could_not_be_written_leaves_nothing(tmp_path, monkeypatch):
    from flashoptim_nb.study import checkpoint
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path / "checkpoint.safetensors", dict(n=torch.zeros(3)))
    assert not list(tmp_path.iterdir())


TWO = DRIVER.replace('("baseline", "ablation_split_only", "ablation_release_only")', '("baseline", "flashoptim_full")')
TWO = TWO.replace("plan = LM", "h1.LM_CONFIGS['flashoptim_full'] = h1.LM_CONFIGS['flashoptim_full'].replace(compile=False)\nplan = LM", 1)


def test_what_check_says_mends_a_decision_on_a_run_that_was_made_again(tmp_path, capsys):
    "Checkpoint B stands in one run and looks at another; that of the stage, in the journal, looks at both."
    from flashoptim_nb.base.records import read_run
    from flashoptim_nb.cli.main import main
    study = tmp_path / "studies" / "h1-laptop"
    def made():
        process = Forked(TWO, study.parent, FLASHOPTIM_DATA="")
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told
    def stale():
        main(["check", str(study)])
        return [line for line in capsys.readouterr().err.splitlines() if "does not replay" in line]
    made()
    early = "1B-best-flashoptim_full-s0"
    assert "H1-CB" in {row["checkpoint"] for row in read_run(study / early).of("decision")} and not stale()
    (study / "1B-best-baseline-s0" / "rows.jsonl").write_text("damaged\n")
    shutil.rmtree(study / "1B-best-baseline-s0")
    made()
    (line,) = stale()
    assert line.startswith(f"{study / early}: H1-CB") and f"move the folder {study / early} elsewhere and make that run" in line
    (study / early).rename(tmp_path / "elsewhere")
    made()
    assert not stale()
    kept = shutil.copytree(study / "protocol", tmp_path / "protocol")
    shutil.rmtree(study / early)
    made()
    shutil.copyfile(kept / "rows.jsonl", study / "protocol" / "rows.jsonl")  # as if the journal had not seen it
    (line,) = stale()
    assert line.startswith(f"{study / 'protocol'}: H1-CC") and "the study's command takes it anew on such a machine: " in line
    made()
    assert not stale()


def test_decisions_that_a_study_no_longer_comes_to_are_withdrawn(tmp_path, monkeypatch):
    from flashoptim_nb.study import runner
    from flashoptim_nb.study.experiment import Stage
    from flashoptim_nb.study.journal import Journal, standing_decisions
    journal, action = Journal(tmp_path), dict.fromkeys(("H1-CC", "H1-CD", "H1-CE"), "continue")
    journal.reopen(dict(run="protocol"))
    protocol = SimpleNamespace(stages=lambda *_: [Stage("1B", (), "H1-CC"), Stage("1B", (), "H1-CD"), Stage("7B", (), "H1-CE")],
                               opening=lambda _: "", after_downgrade=("7B",))
    study = SimpleNamespace(protocol=protocol, preset=SimpleNamespace(plans={}), experiments=None, journal=journal,
                            specs=lambda stage: [], check_stop=lambda: None)
    monkeypatch.setattr(runner, "train_all_first", lambda study: None)
    monkeypatch.setattr(runner, "attempt_all", lambda *_: 0)
    def decided(study, stage):
        row = dict(checkpoint=stage.checkpoint, action=action[stage.checkpoint], enforced=True, why="", values={})
        if standing_decisions(journal.rows).get(stage.checkpoint) != dict(kind="decision") | row: journal.note("decision", **row)
        return row["action"]
    monkeypatch.setattr(runner, "record_decision", decided)
    def standing():
        runner.run_stages(study)
        return [*standing_decisions(journal.rows)]
    assert standing() == ["H1-CC", "H1-CD", "H1-CE"]
    action["H1-CC"] = "abort"
    assert standing() == standing() == ["H1-CC"]
    action["H1-CC"] = "downgrade"
    assert standing() == ["H1-CC", "H1-CD"]
    action["H1-CC"] = "continue"
    assert standing() == ["H1-CC", "H1-CD", "H1-CE"], "and they are taken again where the study comes to them again"
