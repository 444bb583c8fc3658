"""Somebody's own launcher: its scripts are sound, its first process makes the study, and what is not there is refused."""
import json
import subprocess

import pytest

from flashoptim_nb.base.machine import repo_root
from flashoptim_nb.cli.main import main
from flashoptim_nb.train.ranks import launched

SCRIPTS = repo_root() / "nbs/h1/launch"


def test_scripts_are_sound():
    yaml = pytest.importorskip("yaml")
    for script in ("torchrun.sh", "slurm.sh"): subprocess.run(["bash", "-n", SCRIPTS / script], check=True)
    task = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())
    for command in (task["run"], *((SCRIPTS / name).read_text() for name in ("torchrun.sh", "slurm.sh"))):
        assert "run h1 --preset full" in command


LAUNCHED = ("RANK", "WORLD_SIZE", "GROUP_WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_NNODES")


def by_launcher(monkeypatch, **env):
    for name in LAUNCHED: monkeypatch.delenv(name, raising=False)
    for name, value in env.items(): monkeypatch.setenv(name, str(value))


def test_the_first_of_those_that_are_launched_makes_the_study(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    def run(*words): return main(["run", "h1", "--preset", "laptop", "--out", str(out), *words])
    by_launcher(monkeypatch)
    assert launched() == (0, 1)
    for env in (dict(RANK=1, WORLD_SIZE=2, GROUP_WORLD_SIZE=1), dict(SLURM_PROCID=1, SLURM_NTASKS=2)):
        by_launcher(monkeypatch, **env)
        assert run() == 0 and not [*out.glob("*")], "another makes it"
    by_launcher(monkeypatch, RANK=0, WORLD_SIZE=2)
    assert run("--dry-run") == 0 and {line.split()[3] for line in capsys.readouterr().out.splitlines()
                                      if line.split()[1:2] == ["tiny"]} == {"2"}, "over as many as were launched"
    for env in (dict(RANK=0, WORLD_SIZE=16, GROUP_WORLD_SIZE=2), dict(SLURM_PROCID=0, SLURM_NTASKS=2, SLURM_NNODES=2)):
        by_launcher(monkeypatch, **env)
        assert run() == 2 and "launched on 2 machines" in capsys.readouterr().err


def test_a_plan_for_other_machines_can_be_made_anywhere(capsys, monkeypatch):
    by_launcher(monkeypatch)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert main("run h1 --preset gpu --sizes 7B --gpus 4 --workers 2 --dry-run".split()) == 0
    said = capsys.readouterr()
    assert "takes 8 GPUs (2 runs at a time, each over 4); 1 is here" in said.err and "GPU-hours" in said.out
    assert main("run h1 --preset gpu --sizes 7B --dry-run".split()) == 0
    assert "the plan takes" not in capsys.readouterr().err


@pytest.mark.parametrize("words, runs, listed", [
    ("--preset gpu --experiments frontier", 0, "30B, frontier"),
    ("--preset gpu --experiments prerequisite", 0, "all, prerequisite"),
    ("--preset gpu --piece cost-1B --experiments matched_batch", 0, "1B, matched batch"),
    ("--preset gpu --experiments frontier --sizes 30B", 0, "30B, frontier: flashoptim_full, flashoptim_release"),
    ("--preset gpu --experiments best_batch --sizes 7B", 3 * 4, "7B, best batch"),
    ("--preset gpu --sizes 7B", 3 * 4, "7B, frontier"), ("--preset full --sizes 1B", 3 * 17, "1B-16384, long sequence"),
])
def test_a_dry_run_plans_the_runs_that_would_be_made_and_no_others(words, runs, listed, capsys, monkeypatch):
    by_launcher(monkeypatch)
    assert main(["run", "h1", *words.split(), "--dry-run"]) == 0
    table, _, order = capsys.readouterr().out.partition("In this order:")
    assert listed in order and bool(runs) == ("GPU-hours" in table and "In all: " in table)
    assert main(["run", "h1", *words.split(), "--dry-run", "--json"]) == 0
    assert sum(row["runs"] for row in json.loads(capsys.readouterr().out)["plan"]) == runs


@pytest.mark.parametrize("words, told", [
    ("--preset gpu --piece cost-13B-x4 --gpus 2 --dry-run", "divides its runs over 4; leave --gpus out"),
    ("--preset gpu --piece cost-13B-4x --dry-run", "did you mean 'cost-13B-x4'?"),
    ("--preset laptop --gpus 0 --dry-run", "at least 1 is needed"),
    ("--preset laptop --piece cost-1B", "pieces are of preset gpu"),
    ("--preset gpu --piece cost-1b --dry-run", "unknown piece"),
    ("--preset laptop --seeds 9", "has no seed 9"), ("--preset laptop --steps 0", "at least 1 is needed"),
    ("--preset laptop --style gpt3", "unknown style"),
    ("--preset gpu --sizes 7B --gpus 5 --dry-run", "deals 24 sequences out to 5 GPUs"),
    ("--preset gpu --style llama2 --sizes 2B --dry-run", "unknown size '2B'"),
    ("--preset full --experiments frontier --dry-run", "nothing is to be run"),
    ("--preset gpu --sizes 30B --experiments matched_batch --dry-run", "none of 30B has matched_batch"),
])
def test_what_cannot_be_run_is_refused(words, told, capsys, monkeypatch):
    by_launcher(monkeypatch)
    assert main(["run", "h1", *words.split()]) == 2
    assert told in capsys.readouterr().err
