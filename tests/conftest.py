"""Shared by all tests: the marks, fresh random inputs that can be repeated, and `--record FOLDER`,
which keeps a report as a record."""
import gc
import os
import random
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--record", metavar="FOLDER", help="append the outcome of every test to a record in this folder of studies")


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA device")
    config.addinivalue_line("markers", "slow: takes more than some seconds")
    if config.getoption("--record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Report(config))


def pytest_collection_modifyitems(items):
    idle = [item.nodeid for item in items for mark in item.iter_markers("skip")
            if str(mark.kwargs.get("reason")).startswith("got empty parameter set")]
    if idle: raise pytest.UsageError(f"tests of nothing, which cannot fail: {', '.join(idle)}")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish():
    "What was imported stays: no search for garbage looks through it again."
    gc.collect()
    gc.freeze()


class Report:
    "A row for each test: how it ended, and what it said when it did not pass."

    def __init__(self, config): self.config, self.rows = config, {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed: return
        said = ("" if report.passed else report.longrepr[2] if isinstance(report.longrepr, tuple)
                else str(report.longrepr).strip().splitlines()[-1][:300])
        self.rows[report.nodeid] = dict(
            test=report.nodeid, outcome=report.outcome, when=report.when, seconds=round(report.duration, 3), said=said)

    def pytest_sessionfinish(self, exitstatus):
        from flashoptim_nb.base.config import content_hash
        from flashoptim_nb.base.machine import pick_device, provenance
        from flashoptim_nb.base.records import REHEARSAL, RunWriter, study_name
        from flashoptim_nb.study.h1.criteria import CRITERIA_HASH

        here, origin = Path(__file__).parent, provenance(pick_device("auto"))
        scale = "gpu" if origin["device_kind"] == "cuda" else REHEARSAL
        folder, arguments = self.config.getoption("--record"), list(self.config.invocation_params.args)
        settings = dict(arguments=[a for a in arguments if a not in ("--record", folder, f"--record={folder}")],
                        test_seed=os.environ.get("FLASHOPTIM_TEST_SEED", "fresh in each test"))
        sources = {path.relative_to(here).as_posix(): path.read_text() for path in sorted(here.rglob("*.py"))}
        study = study_name("tests", scale, origin["device"], origin["device_kind"])
        header = dict(
            run="tests", hypothesis="tests", study=study, scale=scale, role="all", size="all", arm="tests",
            config="all", seed=0, settings=settings, settings_hash=content_hash(settings), criteria_hash=CRITERIA_HASH,
            data_hash=content_hash(sources), started=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=" ".join(["pytest", *settings["arguments"]]), **origin)
        writer = RunWriter(Path(folder) / study / "tests", header=header)
        for row in self.rows.values(): writer.append("test", **row)
        writer.end("finished" if exitstatus == 0 else "failed", f"pytest's exit status {int(exitstatus)}")


@pytest.fixture
def rng_seed():
    "A fresh seed for torch and random; FLASHOPTIM_TEST_SEED repeats one. Pytest shows it when the test fails."
    seed = int(os.environ.get("FLASHOPTIM_TEST_SEED", random.SystemRandom().randrange(2**31)))
    print(f"FLASHOPTIM_TEST_SEED={seed}")
    torch.manual_seed(seed)
    random.seed(seed)
    return seed
