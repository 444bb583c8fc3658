"""Studies whose runs go on beside each other: what is found out once is noted once, and what is compared shares a device."""

import io
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
from rich.console import Console

from flashoptim_nb.base.config import Config
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.base.records import read_study
from flashoptim_nb.lm.plan import A100_40
from flashoptim_nb.study.experiment import Experiment, Stage, StudyProtocol
from flashoptim_nb.study.h1.criteria import H1
from flashoptim_nb.study.presets import Preset
from flashoptim_nb.study.run import RunSpec
from flashoptim_nb.study.runner import Study, _prepare
from flashoptim_nb.train.ranks import RanksFailed, launch_ranks


@dataclass(frozen=True, kw_only=True)
class Runs(Config):
    configs: tuple[str, ...] = ("one", "two", "three")


@dataclass(frozen=True, kw_only=True)
class CountSpec(RunSpec):
    whole: Preset | None = None
    gpus: int = 1


def record_process(study, spec, data):
    found = study.journal.last_event("skip", what=spec.config)
    writer = study.writer(spec)
    writer.append("check", name=str(os.getpid()), passed=found["reason"] == f"{spec.config} was searched")
    writer.end("finished")


class Counting(StudyProtocol):
    name, hypothesis, workload, narrowing, spec_type, in_stages = "h1", H1, "size", "--sizes", CountSpec, True
    experiments = dict(count=Experiment(name="count", perform=record_process, trains=True, seed_by_seed=True))

    def stages(self, preset, experiments=None): return [Stage("1B", (("count", preset.plans["1B"].configs),))]

    def spec(self, study, workload, experiment, config, seed):
        return CountSpec(preset=study.preset.name, workload=workload, size=workload, experiment=experiment,
                         config=config, seed=seed)

    def prepare(self, study, specs):
        for spec in specs:
            if spec.config == "wrong": raise UserError("give it another way")
            if spec.config == "broken": raise RuntimeError("the search broke")
            if spec.config == "lost": raise RanksFailed("rank 1 of 2 was killed")
            if spec.config.startswith("slow"):
                Path(study.folder.parent, "searching").write_text(str(os.getpid()))
                time.sleep(60)
            if spec.config == "killed": os._exit(9)
            if not study.journal.last_event("skip", what=spec.config):
                study.journal.note("skip", what=spec.config, reason=f"{spec.config} was searched")

    def load(self, study, workload): return SimpleNamespace(data_hash="d")
    def journal_settings(self, study): return self.spec(study, "", "protocol", "", 0).replace(whole=study.whole), "d"
    def rests_on(self, stage, preset): return {}


def record_ranks(study, spec, data):
    "Whether the ranks of a run's second work are those of its first."
    first, second = (launch_ranks(2, os.getppid) for _ in range(2))
    writer = study.writer(spec)
    writer.append("check", name=str(first), passed=first == second)
    writer.end("finished")


class Divided(Counting):
    experiments = dict(count=Experiment(name="count", perform=record_ranks, trains=True, seed_by_seed=True))

    def spec(self, *run): return super().spec(*run).replace(gpus=2)


class Measuring(Counting):
    experiments = {name: Experiment(name=name, perform=record_process, trains=name == "count", seed_by_seed=True)
                   for name in ("measure", "count")}

    def stages(self, preset, experiments=None):
        return [Stage("1B", tuple((name, preset.plans["1B"].configs) for name in self.experiments))]

    def prepare(self, study, specs):
        for spec in specs: study.journal.note_once("skip", what=spec.config, reason=f"searched for {spec.experiment}")

    def worker_devices(self, device, n): return ["cpu"] * n


def counting(out, *configs, protocol=Counting, timeout=1800.0):
    preset = Preset(name="laptop", purpose="", enforced=False, device="cpu", seeds=(0, 1, 2),
                    plans={"1B": Runs(configs=configs or ("one", "two", "three"))}, accelerator=A100_40)
    return Study(protocol(), preset, out, workers=2, rank_timeout=timeout,
                 console=Console(file=io.StringIO()))


def await_that(true, seconds=50):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end: time.sleep(0.05)
    assert true()


def test_each_search_is_noted_once_and_a_seed_stays_with_one_worker(tmp_path):
    assert counting(tmp_path).run() == 0
    runs = {(run.header["config"], run.header["seed"]): run for run in read_study(tmp_path / "h1-laptop")}
    noted = [row["what"] for row in runs.pop(("", 0)).of("skip")]
    assert sorted(noted) == ["one", "three", "two"] and len(runs) == 9
    checks = {key: run.of("check")[0] for key, run in runs.items()}
    assert all(check["passed"] for check in checks.values())
    for seed in range(3): assert len({check["name"] for key, check in checks.items() if key[1] == seed}) == 1
    assert str(os.getpid()) not in {check["name"] for check in checks.values()}


def test_each_worker_keeps_ranks_of_its_own(tmp_path):
    assert counting(tmp_path, "one", protocol=Divided).run() == 0
    checks = [run.of("check")[0] for run in read_study(tmp_path / "h1-laptop") if not run.is_journal]
    assert len(checks) == 3 and all(check["passed"] for check in checks)
    assert 1 <= len({check["name"] for check in checks}) <= 2


def test_a_search_that_breaks_ends_the_study_in_words(tmp_path):
    with pytest.raises(UserError, match="a worker process died"): counting(tmp_path, "one", "killed").run()
    told = SimpleQueue()
    for config, words in dict(wrong="give it another way", broken="", lost="").items():
        study = counting(tmp_path, config)
        _prepare(study, [study.spec("1B", "count", config, 0)], told)
        assert told.get() == ("prepared", words)
    with pytest.raises(UserError, match="give it another way"): counting(tmp_path / "another", "one", "wrong").run()


def test_a_search_that_loses_its_ranks_costs_its_own_runs_alone(tmp_path):
    "As with one worker: others go on, and the same command tries it again."
    assert counting(tmp_path, "one", "lost", "broken").run() == 1
    runs = [run for run in read_study(tmp_path / "h1-laptop") if not run.is_journal]
    assert Counter((run.header["config"], run.status) for run in runs) == {
        ("one", "finished"): 3, ("lost", "failed"): 3, ("broken", "failed"): 3}


def test_a_search_is_over_what_trains(tmp_path):
    "What is measured has a smaller batch of its own, and the journal keeps one search for both."
    study = counting(tmp_path, "one", protocol=Measuring)
    assert study.run() == 0
    assert [row["reason"] for row in study.journal.rows if row["kind"] == "skip"] == ["searched for count"]


def test_a_worker_has_all_that_the_study_was_asked_for(tmp_path):
    protocol, preset, options = counting(tmp_path, timeout=120.0).made
    assert Study.again(protocol, preset, options).rank_timeout == 120.0


def test_a_worker_that_searches_ends_with_whoever_started_it(tmp_path):
    "kill -9 of the study alone; what it started would hold its GPUs to the search's end."
    code = f"import test_workers; test_workers.counting({str(tmp_path)!r}, 'slow').run()"
    (script := tmp_path / "study.py").write_text(f"if __name__ == '__main__':\n    {code}\n")
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    started = subprocess.Popen([sys.executable, script], env=os.environ | dict(PYTHONPATH=path))
    try: await_that((tmp_path / "searching").exists)
    finally:
        started.kill()
        started.wait()
    worker = Path("/proc", (tmp_path / "searching").read_text())
    await_that(lambda: not worker.exists())
