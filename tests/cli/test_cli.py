"""The command answers bad input in words, with a status that is not zero, and harms nothing that is already written."""
import argparse
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from flashoptim_nb.base.machine import repo_root
from flashoptim_nb.base.records import ROWS

RECORDS = repo_root() / "data/records/h1-laptop"


def command(*words, limit=None, **env):
    "Runs the command as a user does; `limit` bounds the size of any file it writes, as a full disk would."
    cap = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))) if limit else None
    done = subprocess.run([sys.executable, "-m", "flashoptim_nb.cli.main", *map(str, words)], capture_output=True,
                          text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, preexec_fn=cap)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def place(tmp_path):
    "A folder of studies beside a file."
    shutil.copytree(RECORDS / "protocol", tmp_path / "studies" / "h1-laptop" / "protocol")
    (tmp_path / "file").write_text("a file")
    return tmp_path


def listed(place): return {str(path.relative_to(place)): path.stat().st_mtime_ns for path in place.rglob("*")}


def answered(capsys, *words):
    "The status and the words of a command, in this process."
    status, _, said = ran(capsys, *words)
    return status, said


def ran(capsys, *words):
    "What `command` returns, without a process of its own: what would be a traceback there is raised here."
    from flashoptim_nb.cli.main import main
    capsys.readouterr()
    try: status = main([*map(str, words)])
    except SystemExit as left: status = left.code
    told = capsys.readouterr()
    return status, told.out, told.err


WRITES = dict(run="run h1 --scale laptop", dry="run h1 --preset laptop --dry-run", h2="run h2 --scale laptop",
              quality="quality --scale laptop", bench="bench optimizers --tensors tiny --times 1", book="book")


@pytest.mark.parametrize(
    "out, told",
    [("file", "cannot write to"), ("file/deeper", "cannot write to"), ("studies/h1-laptop", "within the records"),
     ("studies/h1-laptop/protocol/new", "within the records"), ("", "empty name")])
@pytest.mark.parametrize("name", WRITES)
def test_a_place_that_cannot_be_written_to_is_refused_first(name, out, told, place, capsys):
    before = listed(place)
    status, said = answered(capsys, *WRITES[name].split(), "--out", place / out if out else "")
    assert status == 2 and told in said and listed(place) == before


@pytest.mark.parametrize(
    "words, told", [
        ("quality --scale laptop --steps 0", "steps are 1 or more"),
        ("quality --scale laptop --steps -3", "steps are 1 or more"),
        ("quality --scale laptop --seeds -1", "seeds from 0"),
        (f"quality --scale laptop --seeds 0 {2**70}", "seeds from 0"),
        ("quality --scale laptop --minutes nan", "minutes above 0"),
        ("quality --scale laptop --configs adam", "did you mean"),
        ("bench --times 0", "at least 1"), ("bench --works 125M", "unknown tensor set"),
        ("bench --molecules --largest", "one at a time"),
        ("bench --molecules --works small", "leave it out with dimenet"), ("bench --largest dimenet", "one at a time"),
        ("bench capacity --configs fp7", "unknown configuration"), ("quality --preset huge", "unknown preset"),
        ("bench compat --gpus 3", "on 1 and on 2"),
        ("quality --scale laptop --recipe harsh", "unknown schedule"),
        ("bench --molecules --blocks pig", "unknown implementation"),
        ("bench --molecules --precisions fp64", "unknown precision"),
        ("run h2 --scale laptop --workers 0", "at least 1"), ("run h2 --scale laptop --minutes 0", "more than 0"),
        ("run h2 --scale laptop --arms tests", "unknown experiment 'tests'"),
        ("run h1 --scale gpu --dry-run --experiments best_bach", "unknown experiment 'best_bach' (did you mean 'best_batch'?)"),
        ("run h2 --scale laptop --domains molecule", "did you mean"),
        ("run h1 --scale laptop --device cuda:99999", "choose one of: auto"),
        ("run h1 --scale gpu --device cpu --dry-run", "is measured on a GPU"),
        ("run h1 --scale laptop --device xpu --dry-run", "choose one of: auto"),
        ("run h2 --scale gpu --device cpu --dry-run", "is measured on a GPU"),
        ("run h2 --scale laptop --domains combinatorial --arms labels --configs fp32 --dry-run",
         "nothing is to be run"),
        ("run h1 --scale laptop --confirm H1-CX", "unknown checkpoint"),
        ("run h1 --scale laptop --confirm H1-CA", "nothing waits"),
        ("run h9 --scale laptop", "choose one of: h1"), ("run h1 --scale huge", "choose one of: laptop, gpu, full"),
        ("run h1 --scale laptop --sizes 1b", "did you mean '1B'"),
        ("run h1 --scale laptop --configs flashoptim", "choose one of: ablation_"),
        ("run h1 --scale gpu --dry-run --configs nope", "unknown configuration 'nope'"),
        ("run h1 --scale laptop --device xpu", "choose one of: auto, cpu, cuda"),
        ("check nowhere", "nowhere holds no records"),
        ("book --serve --port 99999", "is no port"), ("book --serve --port -1", "is no port"),
        ("book --port 5", "give both, or neither"), ("bench memory --dry-run --gpus 0", "0 GPUs"),
        ("bench --budget 0", "belongs to `bench host`"), ("bench --times 0 memory", "belongs to `bench optimizers`"),
        ("bench host --size tiny --device cpu --micro 1 0", "1 to 4,096"),
        ("bench host --size tiny --device cpu --budget inf", "a finite number above 1"),
        ("verdict h1 --records nowhere", "holds no records"), ("book --records nowhere", "holds no records"),
    ])
def test_a_value_is_looked_at_before_anything_is_begun(words, told, place, capsys):
    before = listed(place)
    out = () if words.startswith(("verdict", "check")) else ("--out", place / "new")
    status, said = answered(capsys, *words.split(), *out)
    assert status == 2 and told in said and listed(place) == before


def parsers(parser=None, name=""):
    "Each command's parser, by the command's words."
    if parser is None:
        from flashoptim_nb.cli.main import _parser
        parser = _parser()
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, one in action.choices.items(): yield from parsers(one, f"{name} {word}".strip())


RIGHT = {  # command -> what makes it right without the option that is looked at
    "run": ("h1 --preset laptop", "h2 --preset laptop"), "quality": ("--preset laptop",), "verdict": ("h1",),
    "fit": ("--params 7B",), "bench": ("--tensors tiny",), "bench optimizers": ("--tensors tiny",),
    "bench host": ("--size tiny --device cpu",)}
DIGITS = "9" * 400
ODD = {int: ("0", "-1"), float: ("0", "-1", "nan"), None: ("", "n0thing")}
FINE = {("quality", "--seeds", "0"), ("run", "--seeds", "0")}


def odd_words():
    "Every option of every command that takes a value, with values that it cannot have."
    for name, parser in parsers():
        for action in parser._actions:
            if not action.option_strings or action.nargs == 0 or isinstance(action, argparse._SubParsersAction): continue
            flag, values = action.option_strings[0], ODD.get(action.type, ("",))
            if name in ("fit", "bench host"): values = (*values, DIGITS)
            yield from ((name, right, flag, value) for right in RIGHT.get(name, ("",)) for value in values
                        if (name, flag, value) not in FINE)


@pytest.mark.parametrize("name, right, flag, value", [*odd_words()], ids=lambda x: x[:12] or "empty")
def test_every_option_answers_an_odd_value_in_words(name, right, flag, value, place, capsys, monkeypatch):
    "Also one that is 0, empty or no number: it is not taken for one that was left out."
    monkeypatch.chdir(place)
    for begun in ("study.runner.run_study", "cli.quality.load_corpus", "cli.bench._recorded", "report.book.build_book"):
        monkeypatch.setattr(f"flashoptim_nb.{begun}", lambda *_, **__: pytest.fail("it was begun"))
    before, words = listed(place), [*name.split(), *right.split(), flag, value]
    status, said = answered(capsys, *words)
    assert status == 2 and said.strip() and "and the device is" not in said and listed(place) == before


def test_no_help_loads_torch():
    code = ("import contextlib, io, sys\nfrom flashoptim_nb.cli.main import main\n"
            f"for words in {[[*name.split(), '--help'] for name, _ in parsers()]}:\n"
            "    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as shown: main(words)\n"
            "    assert 'usage: ' in shown.getvalue() and not {'torch', 'numpy'} & sys.modules.keys(), words\n")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_port_in_use_is_told_before_the_book_is_built(place, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, said = answered(capsys, "book", "--serve", "--port", taken.getsockname()[1], "--out", place / "new")
    assert status == 2 and "name another with --port" in said and not (place / "new").exists()


@pytest.mark.parametrize(
    "name, value, told",
    [("FLASHOPTIM_DATA", "file", "is not a folder"), ("FLASHOPTIM_DATA", "none", "is not a folder"),
     ("FLASHOPTIM_PLATFORMS", "none", "cannot be read"), ("FLASHOPTIM_PLATFORMS", "file", "is not JSON"),
     ("FLASHOPTIM_RECORDS", "none", "is not a folder"), ("FLASHOPTIM_CACHE", "file", "FLASHOPTIM_CACHE"),
     ("FLASHOPTIM_COMMIT", "not a commit", "FLASHOPTIM_COMMIT is"),
     ("FLASHOPTIM_COMMIT", "unknown", "FLASHOPTIM_COMMIT is"),])
@pytest.mark.parametrize("words", ["run h1 --scale laptop", "run h2 --scale laptop --dry-run", "doctor"])
def test_a_variable_of_the_wrong_form_is_refused_first(words, name, value, told, place, capsys, monkeypatch):
    from flashoptim_nb.base.machine import commit
    monkeypatch.setenv(name, value if name == "FLASHOPTIM_COMMIT" else str(place / value))
    commit.cache_clear()
    before = listed(place)
    status, said = answered(capsys, *words.split(), *(("--out", place / "new") if words != "doctor" else ()))
    if words == "doctor" and name == "FLASHOPTIM_DATA": assert (status, said) == (0, "")  # it reports, as the next test has it
    else: assert status == 2 and told in said
    assert listed(place) == before


def test_doctor_tells_of_a_wrong_data_folder_beside_all_else(place, capsys, monkeypatch):
    monkeypatch.setenv("FLASHOPTIM_DATA", str(place / "none"))
    status, said, _ = ran(capsys, "doctor")
    assert status == 0
    assert f"FLASHOPTIM_DATA names {place / 'none'}, which is not a folder" in said and "\ncommands\n" in said


@pytest.mark.parametrize("home",
                         [dict(HOME=None, XDG_CACHE_HOME=None), dict(HOME="/dev/null", XDG_CACHE_HOME=""),
                          dict(HOME="nowhere", XDG_CACHE_HOME="relative")], ids=["unset", "not writable", "relative"])
def test_no_home_is_needed(home, monkeypatch, tmp_path):
    from flashoptim_nb.lm.text import load_text
    from flashoptim_nb.lm.tokenize import cache_folder, load_tokenizer, tokens_of
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FLASHOPTIM_CACHE", raising=False)
    for key, value in home.items():
        monkeypatch.delenv(key, raising=False) if value is None else monkeypatch.setenv(key, value)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no such user")))
    assert cache_folder().is_absolute()
    assert len(tokens_of(load_text("sotu", "validation"), load_tokenizer("sotu-2048"))) and not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there(tmp_path):
    "In a process of its own, as a user sees it: words and no traceback."
    status, _, error = command("run", "h1", "--scale", "laptop", "--device", "cuda", "--out", tmp_path)
    assert status == 2 and "sees no CUDA device" in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def test_the_dry_run_prints_what_it_would_take(tmp_path, capsys):
    status, out, _ = ran(capsys, "run", "h1", "--scale", "full", "--dry-run", "--out", tmp_path)
    assert status == 0 and out.startswith("Projected on ") and "In all:" in out
    for hypothesis, column in dict(h1="size", h2="domain").items():
        status, out, _ = ran(capsys, "run", hypothesis, "--scale", "full", "--dry-run", "--json", "--out", tmp_path)
        found = json.loads(out)
        assert status == 0 and found["preset"]["name"] == "full"
        assert {row[column] for row in found["plan"]} == set(found["preset"]["parts"])
    status, said = answered(capsys, "run", "h1", "--preset", "laptop", "--json", "--out", tmp_path)
    assert status == 2 and "give --dry-run with it" in said
    assert not list(tmp_path.iterdir())


def planned(capsys, *words):
    "The text of a dry run of hypothesis 1, and the rows that programs get of the same plan."
    words = ("run", "h1", *words, "--dry-run")
    (status, told, _), (also, out, _) = ran(capsys, *words), ran(capsys, *words, "--json")
    assert status == also == 0
    return told, json.loads(out)["plan"]


@pytest.mark.parametrize("words, priced", [
    ("--preset gpu", True), ("--preset gpu --sizes 124M", True), ("--preset full", True), ("--preset laptop", True),
    ("--preset gpu --piece cost-1B", True), ("--preset gpu --experiments frontier", False)])
def test_a_plan_says_that_searches_and_measurements_are_not_projected(words, priced, capsys):
    told, _ = planned(capsys, *words.split())
    assert told.count("What a search or a measurement takes is not projected.") == 1 and ("In all: " in told) == priced


@pytest.mark.parametrize("words", ["--piece prerequisites", "--experiments prerequisite", "--experiments long_sequence"])
def test_a_plan_without_a_training_says_that_it_has_none(words, capsys):
    told, rows = planned(capsys, "--preset", "gpu", *words.split())
    assert told.startswith("Nothing of it is a training whose time can be projected.\n\nIn this order:\n") and rows == []


@pytest.mark.parametrize("words, out, smaller", [
    ("--preset gpu --sizes 7B", ["baseline"], []), ("--preset gpu --sizes 124M", [], []), ("--preset gpu --sizes 30B", [], []),
    ("--preset full --sizes 1B", ["baseline", "ablation_fused_only", "ablation_loss_only", "ablation_release_only"],
     ["baseline_bf16", "ablation_attn_only", "ablation_compile_only", "ablation_states_only", "ablation_split_only"])])
def test_what_is_too_large_at_every_micro_batch_counts_no_hours_and_no_dollars(words, out, smaller, capsys):
    told, rows = planned(capsys, *words.split())
    large = [row for row in rows if "too large" in row["checkpointing"] and row["runs"]]
    assert [row["config"] for row in large if not row["hours"]] == out
    assert [row["config"] for row in large if row["hours"]] == smaller
    assert all(bool(value) == bool(row["hours"]) for row in rows for name, value in row.items() if name[0] == "$")
    assert ("Left out of the hours" in told) == bool(out) and ("Not left out" in told) == bool(smaller)
    if out: assert f"Left out of the hours: {len(out)} row" in told
    if smaller: assert f"Not left out: {len(smaller)} row" in told
    assert all((row["hours"] is None) == (row["runs"] == 0) for row in rows)  # a search's hours are not known
    if hours := sum(row["hours"] or 0 for row in rows): assert f"In all: {hours:,.4g} hours" in told or f"In all: {hours:,.0f} hours" in told


def test_a_plan_names_the_micro_batch_of_each_peak(capsys):
    told, rows = planned(capsys, "--preset", "gpu", "--sizes", "124M", "1B", "7B")
    assert {row["role"]: row["micro"] for row in rows} == {"124M": 16, "1B": 4, "7B": 2}
    head, *lines = [line.split() for line in told.splitlines()[1:]]
    assert {line[0]: line[head.index("micro")] for line in lines[:len(rows)]} == {"124M": "16", "1B": "4", "7B": "2"}
    assert "micro: the matched micro-batch, in sequences on each GPU." in told


@pytest.fixture
def records(tmp_path):
    return shutil.copytree(RECORDS, tmp_path / "records" / "h1-laptop").parent


@pytest.mark.parametrize("folder", ["data/records", "data/pilot", "data/longer"])  # studies of one name
def test_committed_records_pass_the_checker(folder, capsys):
    status, out, error = ran(capsys, "check", repo_root() / folder)
    assert status == 0, error
    assert "every decision replays" in out


def test_a_verdict_tells_of_records_that_differ_from_their_manifest(records, capsys):
    rows = records / "h1-laptop" / "protocol" / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    status, out, error = ran(capsys, "verdict", "h1", "--records", records)
    assert status == 0 and "differ from their manifest" in out
    status, out, error = ran(capsys, "verdict", "h1", "--records", records, "--json")
    assert all("differ from their manifest" in entry["altered"] for entry in json.loads(out))


def test_a_verdict_tells_of_runs_that_did_not_end(records, capsys):
    rows = records / "h1-laptop" / "1B-best-baseline-s0" / "rows.jsonl"
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:-1]))
    status, out, error = ran(capsys, "verdict", "h1", "--records", records)
    assert status == 0 and "1 of its runs did not end and are left out (1B-best-baseline-s0)" in error


@pytest.mark.parametrize("terminal, quiet, shown", [(True, False, True), (True, True, False), (False, False, False)])
def test_what_takes_long_shows_a_bar_on_a_terminal_alone(capsys, monkeypatch, terminal, quiet, shown):
    from flashoptim_nb.cli import judge
    monkeypatch.setattr(judge, "_PATIENCE", 0.0)
    monkeypatch.setattr("rich.console.Console.is_terminal", terminal)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    with judge._bar("checking", 2, quiet) as counted:
        for _ in range(2): time.sleep(0.1), counted()
    out, err = capsys.readouterr()
    assert not out and ("checking" in err) == shown


def test_a_verdict_reads_each_record_once(place, capsys, monkeypatch):
    from flashoptim_nb.base import records
    read, read_run = [], records.read_run
    monkeypatch.setattr(records, "read_run", lambda folder: read.append(folder) or read_run(folder))
    status, out, said = ran(capsys, "verdict", "h1", "--records", place / "studies")
    assert status == 0 and "H1 against" in out and not said and len(read) == 1


def change(line, **fields):
    return json.dumps(json.loads(line) | fields)


@pytest.mark.parametrize("harm, told", [
    (lambda rows: rows[:3] + [change(rows[3], loss=1.0)] + rows[4:], "its seal does not fit"),
    (lambda rows: rows[:3] + rows[4:], "its seal does not fit"),
    (lambda rows: rows[:3] + [rows[3]] + rows[3:], "its seal does not fit"),
    (lambda rows: rows[:3] + [rows[3][:20]] + rows[4:], "is not JSON"),
    (lambda rows: rows[:-1], "did not end"),
], ids=["altered", "dropped", "doubled", "torn", "cut short"])
def test_a_damaged_record_is_refused(harm, told, records, capsys):
    path = records / "h1-laptop" / "1B-best-baseline-s0" / ROWS
    path.write_text("\n".join(harm(path.read_text().splitlines())) + "\n")
    status, _, error = ran(capsys, "check", records)
    assert status == 1 and told in error


def test_the_verdict_is_a_list_with_its_fields(records, capsys):
    status, out, _ = ran(capsys, "verdict", "h1", "--json", "--records", records)
    entries = json.loads(out)
    assert (status == 0
            and {"id", "statement", "status", "value", "threshold", "interval", "scale", "records"} <= set(entries[0]))
    criteria = {f"H1-{letter}{n}" for letter, n in [("S", 7), ("F", 8), ("D", 7)] for n in range(1, n + 1)}
    criteria |= {f"H1-C{letter}" for letter in "ABCDEFM"}  # the checkpoints and the monitor, on each side
    for against in ("baseline", "baseline_strong"):
        mine = {e["id"]: e for e in entries if e["against"] == against}
        assert set(mine) == criteria | {"H1"}
        assert {e["status"] for e in mine.values()} <= {"no evidence at this scale", "not measured"}, (
            "laptop rows are no evidence")
    assert any(e["value"] is not None or any(part["value"] is not None for part in e["parts"])
               for e in entries), "but they are measured"


def test_the_verdict_says_what_is_asked_when_told_to(records, capsys):
    bare, worded = (ran(capsys, "verdict", "h1", "--records", records, *options) for options in ((), ("--statements",)))
    asks = "Tokens per second are at least the baseline's at each size."
    assert (bare[0], worded[0]) == (0, 0) and asks not in bare[1] and worded[1].count(asks) == 2
    assert set(bare[1].splitlines()) <= set(worded[1].splitlines())


def test_two_studies_in_one_place(tmp_path, capsys):
    from flashoptim_nb.base.records import only_writer
    with only_writer(tmp_path / "h1-laptop"):
        status, _, error = ran(capsys, "run", "h1", "--scale", "laptop", "--out", tmp_path)
    assert status == 2 and "is being written by another run" in error and "--out" in error


def test_a_full_disk_loses_nothing(tmp_path):
    status, _, error = command("run", "h1", "--scale", "laptop", "--sizes", "1B", "--configs", "baseline", "--out",
                               tmp_path, limit=6_000, FLASHOPTIM_DATA="")
    assert status == 2 and "nothing that was recorded before is lost" in error and "Traceback" not in error
    for path in tmp_path.glob(f"*/*/{ROWS}"):
        assert all(json.loads(line)["seal"] for line in path.read_text().splitlines()), "only whole rows are left"


def test_a_rate_of_ones_own(place, capsys, monkeypatch):
    monkeypatch.setenv("FLASHOPTIM_RATES", "")  # is set by the option, and restored after the test
    status, shown, _ = ran(capsys, *"run h1 --scale full --dry-run --rate".split(), "NVIDIA A100-SXM4-40GB=1.25")
    assert status == 0 and "your NVIDIA A100-SXM4-40GB's rate" in shown, shown
    status, said = answered(capsys, *"run h1 --scale laptop --dry-run --rate H100".split())
    assert status == 2 and "not NAME=DOLLARS" in said


@pytest.mark.parametrize("words, rate, told", [
    ("run h1 --preset gpu", "A100=2", "--rate A100=2 is not used: the plan is priced for NVIDIA H200, at the rates of aws-p5en, runpod-h200"),
    ("run h1 --preset gpu", "H20=2", "--rate H20=2 is not used (did you mean H200?): the plan is priced for NVIDIA H200"),
    ("run h1 --preset gpu --json", "H100=3", "--rate H100=3 is not used: the plan is priced for NVIDIA H200"),
    ("run h1 --preset gpu --piece prerequisites", "H100=3", "--rate H100=3 is not used: the plan for NVIDIA H200 shows no dollars"),
    ("run h1 --preset gpu --sizes 7B --configs baseline", "H200=3", "--rate H200=3 is not used: the plan for NVIDIA H200 shows no dollars"),
    ("run h1 --preset full", "A100=2", "--rate A100=2 is not used: the plan is priced for NVIDIA A100-SXM4-40GB"),
    ("run h1 --preset gpu --rate H200=3", "H200=4", "--rate H200=3 is not used: --rate H200=4, of the same GPU, comes after it\n"),
    ("run h1 --preset gpu", "H200=2", ""), ("run h1 --preset laptop", "H200=2", "for two CPU cores shows no dollars"),
    ("run h2 --preset gpu", "H200=2", "the plan for NVIDIA H200 shows no dollars"), ("run h2 --preset full", "nvidia a100-sxm4-40gb=2", "did you mean NVIDIA A100-SXM4-40GB?")])
def test_a_rate_that_is_not_used_is_told_of(place, capsys, monkeypatch, words, rate, told):
    monkeypatch.setenv("FLASHOPTIM_RATES", "")
    status, _, said = ran(capsys, *words.split(), "--dry-run", "--rate", rate)
    assert status == 0 and (told in said if told else not said)


def test_the_book_says_which_rates_it_has_no_use_for(place, capsys, monkeypatch):
    monkeypatch.setenv("FLASHOPTIM_RATES", "")
    monkeypatch.setattr("flashoptim_nb.report.book.build_book", lambda out, studies: out)
    status, _, said = ran(capsys, "book", "--records", place / "studies", "--out", place / "book", "--rate", "H200=2")
    assert status == 0 and said == "--rate H200=2 is not used: the records are of no GPU\n"


def test_a_run_uses_no_rate(place, capsys, monkeypatch):
    monkeypatch.setenv("FLASHOPTIM_RATES", "")
    from flashoptim_nb.study.runner import Study
    monkeypatch.setattr(Study, "run", lambda study, confirm: 0)
    status, _, said = ran(capsys, *"run h1 --preset laptop --rate H200=2".split())
    assert status == 0 and "--rate H200=2 is not used: a run records seconds" in said


def test_a_folder_in_a_records_place_is_a_problem_among_others(records, capsys):
    study = records / "h1-laptop"
    shutil.copytree(study.parent.parent / "records" / "h1-laptop", records.parent / "whole" / "h1-laptop")
    (study / "1B-best-baseline-s0" / ROWS).unlink()
    (study / "1B-best-baseline-s0" / ROWS).mkdir()
    (study / "1B-best-baseline-s1" / "rows.1.jsonl").mkdir()  # in the place of an earlier attempt's
    (study / "1B-best-baseline-s2" / ROWS).write_text("no record\n")
    status, out, said = ran(capsys, "check", records)
    assert status == 1 and " problems" in out
    for words in (f"s0/{ROWS} is a folder and no record", "s1/rows.1.jsonl is a folder", f"s2/{ROWS}, row 1: is not JSON",
                  "s0: is in the manifest and not there"):
        assert words in said, words


def test_what_is_lost_of_a_study_is_told_with_its_command(records, capsys):
    study = records / "h1-laptop"
    shutil.rmtree(study / "1B-best-baseline-s0")
    assert "s0: is in the manifest and not there; restore it from a copy, or make it again on such a machine: " in ran(capsys, "check", records)[2]
    (study / "manifest.json").unlink()
    (study / "manifest.json").mkdir()
    said = ran(capsys, "check", records)[2]
    assert "manifest.json: is a folder and no manifest; remove it, then the study's own command writes it" in said


def test_what_cannot_be_read_leaves_the_rest_to_be_checked(records, capsys, monkeypatch):
    from flashoptim_nb.study import manifest
    def denied(study): raise PermissionError(13, "Permission denied", str(study / "x"))
    monkeypatch.setattr(manifest, "digests", denied)
    (records / "h1-laptop" / "1B-best-baseline-s2" / ROWS).write_text("no record\n")
    status, out, said = ran(capsys, "check", records)
    assert status == 1 and "2 problems" in out and "cannot be read: Permission denied" in said and "is not JSON" in said


def cut_off(study, *names, **header):
    "A study as it is when it is killed, copied from where its command wrote it: some runs and the journal do not end."
    from flashoptim_nb.base.records import RunWriter, read_run
    for folder in [path.parent for path in study.glob(f"*/{ROWS}")]:
        first, *rows = read_run(folder).rows
        if folder.name in (*names, "protocol"): rows = rows[:-1]
        (folder / ROWS).unlink()
        writer = RunWriter(folder, {key: value for key, value in first.items() if key != "kind"} | header)
        for row in rows: writer.append(**row)
        writer.close()


def test_a_study_that_was_killed_is_told_its_own_command_and_one_place(records, capsys):
    study = records / "h1-laptop"
    cut_off(study, "1B-best-baseline-s0", command="flashoptim-nb run h1 --out /elsewhere --preset laptop", registration="x")
    (study / "manifest.json").unlink()
    _, _, said = ran(capsys, "check", records)
    lines = said.splitlines()
    without, unended = (next(line for line in lines if words in line) for words in ("has no manifest.json", "did not end"))
    for line in (without, unended):
        assert "flashoptim-nb run h1 --" in line and line.count("--out") == 1 and f"--out {records}" in line
    assert "the study's own command writes it" in without


def test_a_study_that_was_killed_since_its_manifest_is_not_called_altered_alone(records, capsys):
    cut_off(records / "h1-laptop", "1B-best-baseline-s0")
    _, _, said = ran(capsys, "check", records)
    assert "is not the file that the manifest has the digest of" in said
    assert "where it was killed since the manifest was written, the study's own command writes it" in said


def test_a_plan_takes_no_other_optimizers_time_and_names_the_gpu_of_each(capsys):
    words = "quality --preset long --schedule low --seeds 99 --dry-run --configs adamw lion flash_lion".split()
    status, out, _ = ran(capsys, *words)
    adamw, lion, flash_lion, total = out.splitlines()
    assert status == 0 and flash_lion.endswith("flash_lion-s99: not measured"), "it was trained on no GPU"
    for line in (adamw, lion): assert " s of steps on NVIDIA H" in line and ", not measured on " in line
    assert total.startswith("3 runs to make of 3; ") and total.endswith("1 not measured; nothing was run")
    assert all(line.split(" on ")[1].split(",")[0] in total for line in (adamw, lion))


@pytest.mark.parametrize("words", ["run h1 --preset laptop", "run h2 --preset laptop --domains aerodynamics"])
def test_a_time_that_is_over_is_neither_done_nor_failed_nor_an_interruption(words, tmp_path, capsys, monkeypatch):
    "A script goes on while the status says so; one that gets nowhere is told, so that it ends."
    from flashoptim_nb.cli.options import TIME_UP
    keep = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    command = [*words.split(), "--device", "cpu", "--minutes", "1e-5", "--out", tmp_path]
    try:
        first, second = ran(capsys, *command), ran(capsys, *command)
        with monkeypatch.context() as began:  # as where a run has written something
            began.setattr("flashoptim_nb.study.runner._written", lambda folder, n=iter(range(9)): next(n))
            over = ran(capsys, *command)
        monkeypatch.setattr("flashoptim_nb.cli.run.Stop.__call__", lambda self, *_: True)  # as after Ctrl-C
        stopped = ran(capsys, *command)
    finally:
        for number, how in keep.items(): signal.signal(number, how)
    assert over[0] == TIME_UP == os.EX_TEMPFAIL and "the time is up" in "".join(over[1:])
    assert first[0] == second[0] == 2 and "give more with --minutes" in second[2]
    assert stopped[0] == 130 and "the time is up" not in stopped[2]


def test_a_comparison_whose_time_is_over_says_so_in_its_status(tmp_path, capsys, monkeypatch):
    from flashoptim_nb.cli.options import TIME_UP
    words = "quality --preset laptop --seeds 0 --configs adamw --device cpu --minutes 1 --steps 3 --out".split()
    ticks = iter([0, 0, 0, 90])
    with monkeypatch.context() as later:
        later.setattr("flashoptim_nb.cli.quality.time", argparse.Namespace(monotonic=lambda: next(ticks, 90)))
        status, out, _ = ran(capsys, *words, tmp_path)
    assert status == TIME_UP and "the time is up during optimizer_gentle-quality-adamw-s0; the same command goes on" in out
    status, out, _ = ran(capsys, *[word.replace("adamw", "flash_adamw") for word in words], tmp_path)
    assert status == 0 and "nothing to compare" in out
    status, out, _ = ran(capsys, *words, tmp_path)
    assert status == 0 and "no evidence at this scale" in out.split(" at a margin of ")[0]
    # a plan refuses what the command would
    for other, said in (("5", "steps=3 and not 5"), ("3", None)):
        status, out, told = ran(capsys, *[other if word == "3" else word for word in words], tmp_path, "--dry-run")
        assert (status, bool(said), said in told if said else "0 runs to make of 1" in out) == (2 * bool(said), bool(said), True)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_a_comparison_that_is_told_to_stop_goes_on_by_the_same_command(how, tmp_path, capsys, monkeypatch):
    from flashoptim_nb.base.records import read_run
    from flashoptim_nb.study import loop
    words, take = "quality --preset laptop --seeds 0 --configs adamw --device cpu --steps 3 --out".split(), loop._take
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as told:
        told.setattr(loop, "_take", lambda *given: (take(*given), signal.raise_signal(how))[0])
        status, _, said = ran(capsys, *words, tmp_path)
    assert status == 130 and "stopping after this step" in said
    assert "stopped during optimizer_gentle-quality-adamw-s0; the same command goes on" in said
    assert {number: signal.getsignal(number) for number in before} == before, "what comes later is stopped as ever"
    run, = (path.parent for path in tmp_path.glob("*/*/checkpoint.safetensors"))
    assert ran(capsys, *words, tmp_path)[0] == 0 and [row["step"] for row in read_run(run).of("step")] == [1, 2, 3]


@pytest.mark.parametrize("name", ["run", "verdict", "check", "quality"])
def test_the_help_names_the_exit_statuses(name, capsys):
    status, out, _ = ran(capsys, name, "--help")
    told = out[out.index("exit status: "):]
    assert status == 0 and told.startswith("exit status: 0 if ") and "130" in told
    assert ("130 if it was stopped by Ctrl-C or SIGTERM: the same command" in told) == (name in ("run", "quality"))
    assert ("75 if the time of" in told) == (name in ("run", "quality"))


def test_what_an_older_commit_read_post_hoc_is_not_what_was_registered(records, capsys, monkeypatch):
    from flashoptim_nb.cli.judge import _as_registered
    from flashoptim_nb.study import registration
    entries = json.loads(ran(capsys, "verdict", "h1", "--json", "--records", records)[1])
    late = [entry | dict(given="read post hoc") for entry in entries[:2]]
    monkeypatch.setattr(registration, "verdict_at", lambda *_: late + entries)
    run = argparse.Namespace(header=dict(registration="x", commit="c"), folder=records)
    assert len(_as_registered([run], "h1", "x", [])) == len(entries)
