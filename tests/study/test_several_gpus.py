"""A study whose plan says two GPUs starts its ranks itself; one that is killed is told of, and the same command goes on."""
import os
import re
import signal
import time

from flashoptim_nb.base.records import problems, read_run
from processes import Forked

DRIVER = """
import sys, tempfile
from dataclasses import replace
from flashoptim_nb.cli import main, run
from flashoptim_nb.study.h1 import experiments as h1
from flashoptim_nb.study.h1.presets import LM_PRESETS
from flashoptim_nb.study.runner import Study
plan = LM_PRESETS["laptop"].plans["1B"]
plan = plan.replace(recipe=plan.recipe.replace(steps=8, batch=4, micro=1, seq=32), micros=(2,), track_every=3,
                    configs=("ablation_split_only",), gpus=2)
preset = LM_PRESETS["laptop"].replace(plans={"1B": plan}, seeds=(0,), checkpoint_every=2, eval_sets=(("sotu", 512),),
                                      track_set=("sotu", 512), stress_lengths=())
h1.PREREQUISITES.clear()
tempfile.tempdir = sys.argv[2]
runs = h1.H1_PROTOCOL.experiments
runs["matched_batch"] = replace(runs["matched_batch"], seeds=lambda preset, size: ())
sys.exit(Study(h1.H1_PROTOCOL, preset, sys.argv[1], device="cpu", stopped=run.Stop()).run())
"""


def test_a_killed_rank_is_told_of_and_the_same_command_goes_on(tmp_path):
    out, ranks = tmp_path / "out", tmp_path / "ranks"
    ranks.mkdir()
    def start(): return Forked(DRIVER, out, ranks, FLASHOPTIM_DATA="")
    run = out / "h1-laptop" / "1B-best-ablation_split_only-s0-x2"
    process, until = start(), time.monotonic() + 500
    while process.poll() is None and not (run / "checkpoint.safetensors").exists():
        assert time.monotonic() < until, "no checkpoint"
        time.sleep(0.01)
    os.kill(int(next(ranks.glob("*/pid-1")).read_text()), signal.SIGKILL)
    told, _ = process.communicate(timeout=500)
    assert process.returncode == 1, told
    assert re.search(rf"{run.name} was not ended: rank 1 of 2 was killed \(signal 9\); the same command goes on", told)
    assert read_run(run).status == "unfinished"
    process = start()
    told, _ = process.communicate(timeout=500)
    assert process.returncode == 0, told
    found = read_run(run)
    steps = found.of("step")
    assert found.status == "finished" and [row["step"] for row in steps] == [*range(1, 9)]
    assert [row["step"] for row in steps if row["cold"]][-1] > 2, "it went on from the checkpoint"
    assert found.header["settings"]["gpus"] == 2 and len(found.of("eval")) == 4
    assert sorted(path.name for path in run.iterdir()) == ["rows.jsonl"] and not [*ranks.iterdir()]
    assert not [line for folder in run.parent.iterdir() if folder.is_dir() for line in problems(folder)]
