"""Studies whose runs go on beside each other: what is found out once is noted once, and what is compared shares a device."""

import io
import os
from dataclasses import dataclass
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
from flashoptim_nb.train.ranks import launch_ranks


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
            if spec.config == "broken": raise RuntimeError("the search broke")
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


def counting(out, *configs, protocol=Counting):
    preset = Preset(name="laptop", purpose="", enforced=False, device="cpu", seeds=(0, 1, 2),
                    plans={"1B": Runs(configs=configs or ("one", "two", "three"))}, accelerator=A100_40)
    return Study(protocol(), preset, out, workers=2, console=Console(file=io.StringIO()))


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
    study, told = counting(tmp_path, "broken"), SimpleQueue()
    _prepare(study, [study.spec("1B", "count", "broken", 0)], told)
    assert told.get() == ("prepared", "RuntimeError: the search broke")
