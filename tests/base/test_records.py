"""A record that was damaged, altered or is of another shape is refused in words by whoever reads it,
and going on loses nothing of it."""
import json
import shutil

import pytest

from flashoptim_nb.base.errors import UserError, visible
from flashoptim_nb.base.machine import data_root
from flashoptim_nb.base.records import (LONGEST_ROW, ROWS, RecordError, RunWriter, _seal, attempts, problems, read_run,
                                        read_study)
from flashoptim_nb.base.schema import FORMS, TABLES
from flashoptim_nb.cli.main import main

GONE = object()


def journal(folder):
    "A journal of few rows, with a confirmation that nobody wants to lose."
    writer = RunWriter(folder, header=dict(run=folder.name, arm="protocol", note="it's 1e-05, naïve: M-J"))
    writer.append(
        "decision", checkpoint="H1-CA", action="pause", enforced=True, why="looked-at", values={"nan_rate": -1.5e-7})
    writer.append("confirm", checkpoint="H1-CA", why="looked-at")
    return writer


def sealed(rows):
    "The rows as a file, with seals made anew."
    seal, lines = "", []
    for row in rows:
        row = {key: value for key, value in row.items() if key != "seal"}
        seal = _seal(seal, row)
        lines.append(json.dumps(row | {"seal": seal}) + "\n")
    return "".join(lines)


def rows_in(path): return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_any_flipped_bit_is_called_damage(tmp_path):
    folder = tmp_path / "protocol"
    journal(folder).end("finished")
    path, mark = folder / ROWS, read_run(folder).mark
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            harmed = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1:]
            path.write_bytes(harmed)
            with pytest.raises(RecordError): read_run(folder)
    for reopen in (dict(), dict(mark=mark)):
        with pytest.raises(RecordError): RunWriter(folder, **reopen)
    assert path.read_bytes() == harmed, "a damaged record is left as it is"


@pytest.mark.parametrize(
    "between", [b"\r", b"\x0b", b"\x0c", b"\x1c", b"\x1d", b"\x1e", b"\x85", "\u2028".encode(), "\u2029".encode()])
def test_only_newlines_part_rows(tmp_path, between):
    folder = tmp_path / "protocol"
    journal(folder).end("finished")
    path = folder / ROWS
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"looked-at", b"looked" + between + b"at", 1))
    with pytest.raises(RecordError, match="row 2"): read_run(folder)
    path.write_bytes(whole[:-1] + between)
    with pytest.raises(RecordError): RunWriter(folder)


def test_going_on_behind_a_damaged_row_is_refused(tmp_path):
    folder = tmp_path / "run"
    writer = RunWriter(folder, header=dict(run="run", arm="best"))
    for n in range(1, 5): writer.append("step", step=n, loss=-1.0)
    mark, path = writer.mark, folder / ROWS
    writer.close()
    harmed = path.read_bytes().replace(b"-1.0", b"\r1.0", 1)
    path.write_bytes(harmed)
    with pytest.raises(RecordError, match="row 2"): RunWriter(folder, mark=mark)
    assert path.read_bytes() == harmed
    path.write_bytes(harmed.replace(b"\r1.0", b"-1.0"))
    with pytest.raises(RecordError, match="not the record"): RunWriter(folder, mark=(mark[0], "0" * 16))
    with pytest.raises(RecordError, match="not the record"): RunWriter(folder, mark=(mark[0] + 1, mark[1]))
    RunWriter(folder, mark=mark).end("finished")
    assert read_run(folder).status == "finished"


def test_a_torn_row_is_cut_off_and_anything_else_is_kept(tmp_path, capsys):
    folder = tmp_path / "protocol"
    journal(folder).close()
    path = folder / ROWS
    whole = path.read_bytes()
    for torn in (b"{", b'{"kind": "en'):
        path.write_bytes(whole + torn)
        RunWriter(folder).close()
        assert path.read_bytes() == whole and not attempts(folder) and not capsys.readouterr().err
    path.write_bytes(whole + b"\0" * 4096)
    RunWriter(folder).close()
    assert path.read_bytes() == whole and (folder / "rows.1.jsonl").read_bytes() == whole + b"\0" * 4096
    assert "rows.1.jsonl" in capsys.readouterr().err


def test_a_row_without_an_end_is_told_before_it_fills_the_memory(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with open(folder / ROWS, "wb") as file: file.truncate(3 * LONGEST_ROW)
    with pytest.raises(RecordError, match="longer than"): read_run(folder)
    assert "longer than" in problems(folder)[0]
    writer = RunWriter(tmp_path / "other", header=dict(run="other"))
    with pytest.raises(RecordError, match="divide it"):
        writer.append("check", name="x", passed=True, detail="x" * LONGEST_ROW)


def test_the_tables_name_forms_and_parts():
    for table in TABLES.values():
        for field in table.split():
            form = field.partition(":")[2].strip("?[]{}")
            assert form in FORMS or form in TABLES, field


@pytest.fixture
def study(tmp_path):
    folder = tmp_path / "records" / "h1-laptop"
    for config in ("baseline", "flashoptim_full"):
        shutil.copytree(data_root() / f"records/h1-laptop/1B-best-{config}-s0", folder / f"1B-best-{config}-s0")
    return folder


def answers(folder, *words):
    "Status of a command; what is no answer in words is raised."
    return main([*words, str(folder)])


WRONG = [
    ("header", "run", GONE), ("header", "arm", GONE), ("header", "role", [None]), ("header", "settings", "x"),
    ("header", "settings", dict(recipe=[1])),
    ("header", "settings", dict(recipe=dict(batch=0))), ("header", "settings", dict(gpus="1")),
    ("header", "scale", "huge"), ("header", "device", 3), ("header", "device", GONE),
    ("header", "study", "a\nb"), ("header", "libraries", {"torch": 2}), ("step", "loss", "0.1"),
    ("step", "loss", 10**400), ("step", "loss", [1.0]), ("step", "step", GONE),
    ("step", "skipped", 2), ("eval", "set", GONE), ("eval", "set", {}), ("eval", "nll", "x"), ("eval", "tokens", GONE),
    ("throughput", "tokens_per_s", -1),
    ("throughput", "tokens_per_s", 1e-300), ("throughput", "micro_batch", 2**61 - 1), ("end", "reason", 1),
    ("end", "status", 1), ("end", "status", GONE), ("end", "kind", 3),
]


@pytest.mark.parametrize(
    "kind, field, value", WRONG,
    ids=[f"{kind}'s {field} {'gone' if value is GONE else str(value)[:20]!r}" for kind, field, value in WRONG])
def test_sealed_rows_of_another_shape_are_refused_in_words(study, capsys, kind, field, value):
    path = study / "1B-best-baseline-s0" / ROWS
    rows = rows_in(path)
    row = next(row for row in rows if row["kind"] == kind)
    if value is GONE: del row[field]
    else: row[field] = value
    path.write_text(sealed(rows))
    assert answers(study, "check") == 1
    said = capsys.readouterr()
    assert "1B-best-baseline-s0" in said.err and not said.out.startswith("2 records, 0 problems")
    if (kind, field, value) == ("header", "arm", GONE):
        assert answers(study, "verdict", "h1", "--records") == 0, "the verdict does without"
    else: assert answers(study, "verdict", "h1", "--records") == 2


def test_a_decision_that_cannot_be_taken_again_is_a_problem(tmp_path, capsys):
    shutil.copytree(data_root() / "records/h1-laptop/protocol", tmp_path / "h1-laptop/protocol")
    path = tmp_path / "h1-laptop/protocol" / ROWS
    rows = rows_in(path)
    for row in rows:
        if row["kind"] == "decision": row["checkpoint"] = "H1-XX"
    path.write_text(sealed(rows))
    assert answers(tmp_path, "check") == 1
    assert "H1-XX" in capsys.readouterr().err


def test_shipped_records_have_the_shape_of_their_kinds():
    for study in ("h1-laptop", "bench-gpu-nvidia-h200", "tests-gpu-nvidia-h200"):
        read_study(data_root() / "records" / study)


def test_a_terminal_is_not_told_what_to_do(study, capsys):
    path = study / "1B-best-baseline-s0" / ROWS
    rows = rows_in(path)
    tricks = "\x1b]0;owned\x07\x1b[2J\r\x9b1A\u202eabc\u2066\ud800\nflashoptim-nb: 0 problems"
    rows[0]["command"] += tricks
    rows[0]["commit"] = "unknown" + tricks
    path.write_text(sealed(rows[:-1]))
    assert answers(study, "check") == 1
    path.write_text(sealed(rows[:-1] + [dict(kind="end", status="failed", reason="out of memory. Tried " + tricks)]))
    for words in (["check"], ["verdict", "h1", "--records"], ["verdict", "h1", "--json", "--records"]):
        answers(study, *words)
    said = capsys.readouterr()
    for text in (said.out, said.err): assert visible(text, keep="\n") == text
    assert "\nflashoptim-nb: 0 problems" not in said.err and "\\u001b]0;owned\\u0007" in said.err


def test_a_name_with_control_characters_is_no_name(study, capsys):
    path = study / "1B-best-baseline-s0" / ROWS
    rows = rows_in(path)
    rows[0]["device"] = "a GPU\x1b[8m"
    path.write_text(sealed(rows))
    assert answers(study, "check") == 1 and answers(study, "verdict", "h1", "--records") == 2
    assert "without control characters" in (said := capsys.readouterr().err) and "\x1b" not in said
    with pytest.raises(UserError): read_study(study)


def test_a_page_shows_what_a_terminal_or_a_reader_would_not_see():
    from flashoptim_nb.report.render import rendered, sentence, table
    for made in (rendered("a\x1b[2J\u202eb"), table([{"why": "a\x07"}], [dict(runs=["\x9b1A"])]),
                 sentence("over\u2066turned\n\nand on", [])):
        for text in (made.html, made.markdown): assert visible(text, keep="\n") == text and "\\u" in text


def test_what_is_written_can_be_read_back(tmp_path):
    "The writer refuses what the reader would; a float that is no measurement becomes null, a flag may be a number."
    writer = RunWriter(tmp_path / "run", header=dict(run="run"))
    with pytest.raises(RecordError, match="loss is 'low'"): writer.append("step", step=1, loss="low")
    writer.append("step", step=1, loss=float("nan"), grad_norm=1e200, lr=1e-200, skipped=0)
    writer.end("finished")
    (row,) = read_run(tmp_path / "run").of("step")
    assert (row["loss"], row["grad_norm"], row["lr"], row["skipped"]) == (None, None, 0.0, 0)
