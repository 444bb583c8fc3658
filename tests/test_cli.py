"""The command answers bad input in words, with a status that is not zero, and harms nothing that is already written."""
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest

from flashoptim_nb.base.machine import repo_root
from flashoptim_nb.base.records import ROWS

RECORDS = repo_root() / "data/records/h1-laptop"


def command(*words, limit=None, **env):
    "Runs the command as a user does; `limit` bounds the size of any file it writes, as a full disk would."
    cap = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    done = subprocess.run([sys.executable, "-m", "flashoptim_nb.cli.main", *map(str, words)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"} | env, preexec_fn=cap)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("words, told", [
    (("run", "h9", "--scale", "laptop"), "choose one of: h1"),
    (("run", "h1", "--scale", "huge"), "choose one of: laptop, gpu, full"),
    (("run", "h1", "--scale", "laptop", "--sizes", "1b"), "did you mean '1B'"),
    (("run", "h1", "--scale", "laptop", "--configs", "flashoptim"), "choose one of: ablation_"),
    (("run", "h1", "--scale", "laptop", "--device", "cuda"), "sees no CUDA device"),
    (("run", "h1", "--scale", "laptop", "--device", "xpu"), "choose one of: auto, cpu, cuda"),
    (("run", "h1", "--scale", "gpu", "--dry-run", "--configs", "nope"), "unknown configuration 'nope'"),
    (("verdict", "h1", "--records", "nowhere"), "nowhere holds no records"),
    (("check", "nowhere"), "nowhere holds no records"),
], ids=lambda v: " ".join(v) if isinstance(v, tuple) else None)
def test_mistakes_are_answered_in_words(words, told, tmp_path):
    import torch
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    status, _, error = command(*words, *(("--out", tmp_path) if words[0] == "run" else ()))
    assert status == 2 and told in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_a_data_folder_that_is_none(tmp_path):
    status, _, error = command("run", "h1", "--scale", "laptop", "--out", tmp_path, FLASHOPTIM_DATA=str(tmp_path / "none"))
    assert status == 2 and "FLASHOPTIM_DATA names" in error and "Traceback" not in error


def test_the_dry_run_prints_what_it_would_take(tmp_path):
    status, out, _ = command("run", "h1", "--scale", "full", "--dry-run", "--out", tmp_path)
    assert status == 0 and "In all:" in out and json.loads(out[: out.index("\nProjected")])["name"] == "full"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def records(tmp_path):
    return shutil.copytree(RECORDS, tmp_path / "records" / "h1-laptop").parent


def test_committed_records_pass_the_checker():
    status, out, error = command("check", repo_root() / "data/records")
    assert status == 0, error
    assert "every decision replays" in out


def change(line, **fields):
    return json.dumps(json.loads(line) | fields)


@pytest.mark.parametrize("harm, told", [
    (lambda rows: rows[:3] + [change(rows[3], loss=1.0)] + rows[4:], "its seal does not fit"),
    (lambda rows: rows[:3] + rows[4:], "its seal does not fit"),
    (lambda rows: rows[:3] + [rows[3]] + rows[3:], "its seal does not fit"),
    (lambda rows: rows[:3] + [rows[3][:20]] + rows[4:], "is not JSON"),
    (lambda rows: rows[:-1], "did not end"),
], ids=["altered", "dropped", "doubled", "torn", "cut short"])
def test_a_damaged_record_is_refused(harm, told, records):
    path = records / "h1-laptop" / "1B-best-baseline-s0" / ROWS
    path.write_text("\n".join(harm(path.read_text().splitlines())) + "\n")
    status, _, error = command("check", records)
    assert status == 1 and told in error and "Traceback" not in error


def test_the_verdict_is_a_list_with_its_fields(records):
    status, out, _ = command("verdict", "h1", "--json", "--records", records)
    entries = json.loads(out)
    assert status == 0 and {"id", "statement", "status", "value", "threshold", "interval", "scale", "records"} <= set(entries[0])
    criteria = {f"H1-{letter}{n}" for letter, n in [("S", 7), ("F", 8), ("D", 7)] for n in range(1, n + 1)}
    for against in ("baseline", "baseline_strong"):
        mine = {e["id"]: e for e in entries if e["against"] == against}
        assert set(mine) == criteria | {"H1"}
        assert {e["status"] for e in mine.values()} <= {"no evidence at this scale", "not measured"}, "laptop rows are no evidence"
    assert any(e["value"] is not None or any(part["value"] is not None for part in e["parts"]) for e in entries), "but they are measured"


def test_the_verdict_says_what_is_asked_when_told_to(records):
    bare, worded = (command("verdict", "h1", "--records", records, *options) for options in ((), ("--statements",)))
    asks = "Tokens per second are at least the baseline's at each size."
    assert (bare[0], worded[0]) == (0, 0) and asks not in bare[1] and worded[1].count(asks) == 2
    assert set(bare[1].splitlines()) <= set(worded[1].splitlines())


def test_two_studies_in_one_place(tmp_path):
    from flashoptim_nb.base.records import only_writer
    with only_writer(tmp_path / "h1-laptop"):
        status, _, error = command("run", "h1", "--scale", "laptop", "--out", tmp_path)
    assert status == 2 and "is being written by another run" in error and "--out" in error


def test_a_full_disk_loses_nothing(tmp_path):
    status, _, error = command("run", "h1", "--scale", "laptop", "--sizes", "1B", "--configs", "baseline", "--out", tmp_path, limit=6_000, FLASHOPTIM_DATA="")
    assert status == 2 and "nothing that was recorded before is lost" in error and "Traceback" not in error
    for path in tmp_path.glob(f"*/*/{ROWS}"):
        assert all(json.loads(line)["seal"] for line in path.read_text().splitlines()), "only whole rows are left"
