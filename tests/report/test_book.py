"""The book: what readers get is executed, offline, and claims nothing that its records do not carry."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import records_factory
import torch
import yaml

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.base.machine import repo_root
from flashoptim_nb.base.records import RunWriter, only_writer
from flashoptim_nb.study.h1.criteria import CRITERIA, H1
from flashoptim_nb.report.book import (BookError, book_toc, build_book, check_site, is_chapter, notebook_paths,
                                       run_scales, title_lead)
from flashoptim_nb.report.notebooks import Job, execute_all, split_directives
from flashoptim_nb.report.frontier import DRAWING
from flashoptim_nb.report.readme import ROLES, render_drawing, render_readme, top_level

REPO = repo_root()
CHART = """
import pandas as pd
from flashoptim_nb.report.charts import loss_curves
loss_curves(pd.DataFrame([dict(config="baseline", seed=0, step=t, loss=3 + 1 / t, scale="laptop", study="h1-laptop", run="lap") for t in range(1, 9)]))
"""
HONEST = """
from flashoptim_nb.report.render import load_runs, provenance_note, table
provenance_note(load_runs()) + table([{"id": "H1-S1"}], [dict(criterion="H1-S1", status="STATUS", runs=["h1-laptop/lap"])])
"""


def notebook(path: Path, *cells: str):
    "Writes a notebook; a cell that starts with '# ' or '> ' is Markdown."
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [dict(cell_type="markdown" if text.startswith(("# ", "> ")) else "code", id=f"c{n}", metadata={},
                 source=text, **({} if text.startswith(("# ", "> ")) else dict(outputs=[], execution_count=None)))
            for n, text in enumerate(cells)]
    path.write_text(
        json.dumps(
            dict(cells=made, metadata=dict(kernelspec=dict(display_name="python3", language="python", name="python3")),
                 nbformat=4, nbformat_minor=5)))


def record(folder: Path, study: str, run: str, **fields):
    RunWriter(folder / study / run, records_factory.header(
                  run, scale="laptop", study=study, device="a CPU", started="2026-11-22T10:00:00+00:00") | fields).end(
        "finished")


def small_book(folder: Path, status="no evidence at this scale") -> tuple[Path, Path]:
    "A book of three pages and a study of one laptop run."
    nbs, records = folder / "nbs", folder / "records"
    shutil.copytree(REPO / "nbs" / "_static", nbs / "_static")
    shutil.copy(REPO / "nbs" / "_config.yml", nbs)
    notebook(nbs / "index.ipynb", "# Front", "#| echo: false\nprint('shown without its code')")
    notebook(nbs / "h1" / "01_cost.ipynb", "# Cost $x^2$\n\n[a link](../base/00_lib.ipynb)",
             HONEST.replace("STATUS", status), CHART)
    notebook(nbs / "base" / "00_lib.ipynb", "# Lib", "#| default_exp base.lib",
             "#| export\ndef shown_code(): return 6 * 7", "#| hide\nprint('never seen')", "shown_code()",
             "#| cuda\nprint('on the GPU')", "import os\nos.listdir(os.environ['FLASHOPTIM_RECORDS'])")
    record(records, "h1-laptop", "lap")
    return nbs, records


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    nbs, records = small_book(folder)
    return folder, nbs, records, build_book(folder / "site", [records], nbs=nbs)


def text_of(site, page): return (site / f"{page}.html").read_text()


def code_of(path):
    return ["".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]


def test_each_criterion_and_checkpoint_has_a_chapter():
    text = "\n".join(source for path in sorted((REPO / "nbs" / "h1").glob("*.ipynb")) if "verdict" not in path.name
                     for source in code_of(path))
    absent = [id for id in [*CRITERIA, *H1.checkpoints] if f'"{id}"' not in text]
    assert not absent, f"no chapter shows {absent}"


def test_a_question_has_one_number_in_both_hypotheses():
    h1, h2 = (dict(reversed(path.stem.split("_", 1)) for path in (REPO / "nbs" / folder).glob("*.ipynb"))
              for folder in ("h1", "h2"))
    assert all(
        number.isdigit()
        for number in [*h1.values(), *h2.values()]), "a section is a section of its chapter, not a page with a letter"
    assert {name: h1[name] for name in h1.keys() & h2} == {name: h2[name] for name in h1.keys() & h2}
    assert (not {h1[name] for name in h1.keys() - h2} & set(h2.values())
            and not {h2[name] for name in h2.keys() - h1} & set(h1.values()))


def test_chapters_export_nothing():
    for path in (REPO / "nbs" / "h1").glob("*.ipynb"):
        assert not any({"export", "exporti", "default_exp"} & set(split_directives(source)[0])
                       for source in code_of(path)), path.name


MATH = re.compile(r"(?<!\\)(\$\$?)(?!\$)(.+?)(?<!\\)\1", re.S)  # as MyST finds it, blanks and digits allowed
WORD = re.compile(r"(?<![\\A-Za-z])[a-z]{4,}")


def words_in_math(markdown):
    "Words within dollar signs that are neither commands nor marked as text: prices, taken for formulas."
    prose = re.sub(r"```.*?```|`[^`]*`", "", markdown, flags=re.S)
    spans = [re.sub(r"\\(?:text|mathrm|operatorname|begin|end)\{[^}]*\}", "", span[2]) for part in prose.split("\n\n")
             for span in MATH.finditer(part)]
    return [word for span in spans for word in WORD.findall(span)]


def test_no_price_is_taken_for_a_formula():
    assert words_in_math("from $5 against $6") == ["against"] and words_in_math(r"from \$5 against \$6") == []
    assert words_in_math(r"$\mathrm{saving} = 1 - \frac{t}{s}$") == []
    for path in (REPO / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text())["cells"]:
            found = words_in_math("".join(cell["source"])) if cell["cell_type"] == "markdown" else []
            assert not found, f"{path.relative_to(REPO)}: {found} would be set as mathematics; escape the dollar signs"


def test_contents_file_is_in_sync():
    assert yaml.safe_load((REPO / "nbs" / "_toc.yml").read_text()) == book_toc(REPO / "nbs"), (
        "rewrite it: report.book.write_toc()")


def test_no_two_pages_have_one_title():
    pages = {}
    for name in notebook_paths(REPO / "nbs"):
        first = "".join(json.loads((REPO / "nbs" / name).read_text())["cells"][0]["source"]).splitlines()[0]
        pages.setdefault(title_lead(name) + first.removeprefix("# "), []).append(name)
    assert {title: names for title, names in pages.items() if len(names) > 1} == {}


def test_readme_is_in_sync():
    assert (REPO / "README.md").read_text() == render_readme(), "rewrite it: report.readme.write_readme()"
    assert (REPO / DRAWING).read_text() == render_drawing(), "rewrite it: report.readme.write_readme()"


def test_the_readme_is_read_in_two_screens():
    text = (REPO / "README.md").read_text()
    assert len(text.encode()) <= 8192, "what does not fit has a page in the book"
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)\)", text)
    assert len(links) > 10 and not [link for link in links if not (REPO / link).exists()]


def test_links_between_notebooks_lead_somewhere():
    for path in (REPO / "nbs").rglob("*.ipynb"):
        prose = "".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
                        if cell["cell_type"] == "markdown")
        dead = [link for link in re.findall(r"\]\((?!https?:)([^)#\s]+\.ipynb)", prose)
                if not (path.parent / link).exists()]
        assert not dead, f"{path.relative_to(REPO)} links to {dead}"
        parts = re.findall(r"\]\((?!https?:)([^)\s]*#[^)\s]*)", prose)
        assert not parts, f"{path.relative_to(REPO)} links into pages, which the book does not resolve: {parts}"


def test_the_tree_of_the_repository_is_whole():
    assert set(top_level(REPO)) <= set(ROLES), "give new files at the top of the repository a role in report.readme"


def test_pages_are_dressed(built):
    *_, site = built
    library, chapter, front = text_of(site, "base/00_lib"), text_of(site, "h1/01_cost"), text_of(site, "index")
    assert "shown_code" in library and ">42\n" in library
    assert "#|" not in library and "never seen" not in library and "default_exp" not in library
    assert "flashoptim_nb.base.lib" in library
    assert ("needs a CUDA GPU" in library) is not torch.cuda.is_available()
    assert "shown without its code" in front and "highlight-ipython" not in front
    assert ('class="chart" data-chart-scales="laptop"' in chapter
            and "Scale laptop: 1 run, 2026-11-22, on a CPU" in chapter)
    assert "href=\"../base/00_lib.html\"" in chapter


def test_library_pages_see_no_records(built):
    assert "[]" in text_of(built[-1], "base/00_lib")


def test_the_site_is_whole_and_offline(built):
    folder, nbs, records, site = built
    assert check_site(
        site, {n.removesuffix(".ipynb"): is_chapter(n) for n in notebook_paths(nbs)}, run_scales([records])) == []
    assert "shown_code" in (site / "searchindex.js").read_text() or "cost" in (site / "searchindex.js").read_text()
    for needed in ("_static/vega.js", "_static/charts.js", "_static/mathjax/tex-chtml.js", "search.html"):
        assert (site / needed).is_file(), needed


@pytest.mark.parametrize(
    "old, new, said", [
        ('data-status="no evidence at this scale"', 'data-status="met"', "laptop rows are no evidence"),
        ('data-status="no evidence at this scale" data-runs="h1-laptop/lap"',
         'data-scale="gpu" data-status="inconclusive" data-runs="h1-laptop/lap"', "laptop rows are no evidence"),
        ('data-provenance="laptop"', 'data-nothing="laptop"', "without"),
        ('data-provenance="laptop"', 'data-provenance="gpu"', "without their provenance note"),
        ('data-runs="h1-laptop/lap"', 'data-runs="invented"', "in no record"),
        ('data-chart-scales="laptop"', "", "state no scale"),
        ('src="../_static/charts.js', 'src="https://cdn.example/charts.js', "loads https://cdn.example"),
    ])
def test_a_doctored_page_is_refused(built, tmp_path, old, new, said):
    folder, nbs, records, site = built
    doctored = tmp_path / "site"
    shutil.copytree(site, doctored, ignore=shutil.ignore_patterns("mathjax", "vendor"))
    page = doctored / "h1" / "01_cost.html"
    assert old in page.read_text()
    page.write_text(page.read_text().replace(old, new))
    wrong = check_site(doctored, {"h1/01_cost": True}, run_scales([records]))
    assert wrong and any(said in line and "01_cost" in line for line in wrong), wrong


def test_a_build_that_would_show_laptop_rows_as_evidence_fails(tmp_path):
    nbs, records = small_book(tmp_path, status="met")
    with pytest.raises(BookError, match="H1-S1 rests on laptop runs and is shown as 'met'"):
        build_book(tmp_path / "site", [records], nbs=nbs)
    assert not (tmp_path / "site").exists()


def test_only_what_changed_runs_again(built):
    folder, nbs, records, site = built
    cache = folder / ".book-cache"
    before = {p.name for p in cache.glob("*.json")}
    build_book(site, [records], nbs=nbs)
    assert {p.name for p in cache.glob("*.json")} == before
    record(folder / "more", "h1-gpu", "g", scale="gpu")
    build_book(site, [records, folder / "more"], nbs=nbs)
    after = {p.name for p in cache.glob("*.json")}
    assert (len(before & after) == 1
            and len(after) == 3), "the library page is kept, front page and chapter are made anew"


def test_a_failing_cell_leaves_the_old_book(built, tmp_path):
    folder, nbs, records, site = built
    bad = tmp_path / "nbs"
    shutil.copytree(nbs, bad)
    notebook(bad / "h1" / "01_cost.ipynb", "# Cost", "x = 1", "#| export\nx / 0")
    before = text_of(site, "h1/01_cost")
    with pytest.raises(BookError, match=r"nbs/h1/01_cost.ipynb, cell 3 \(x / 0\): ZeroDivisionError"):
        build_book(site, [records], nbs=bad)
    assert text_of(site, "h1/01_cost") == before
    assert not [p for p in site.parent.iterdir()
                if p.name.startswith(".") and p.name != ".book-cache"], "nothing is left behind"


BUILD = """
import sys
from pathlib import Path
from flashoptim_nb.report.book import _aside, _replace
out = Path(sys.argv[1])
with _aside(out, out.with_name(".book-cache")) as aside:
    (aside / "half of a page").write_text("")
    (out.with_name(".book-cache") / "0123.part").write_text("half of a notebook")
    print(flush=True)
    sys.stdin.read()
"""


def test_a_killed_build_leaves_the_old_book_and_nothing_for_ever(tmp_path):
    from flashoptim_nb.report.book import _aside
    out, cache = tmp_path / "site", tmp_path / ".book-cache"
    out.mkdir(), (out / "page").write_text("old")
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    with pytest.raises(UserError, match="is being written by another run"), _aside(out, cache): pass
    assert len([*tmp_path.rglob("half of a page")]) == 1, "what a living build needs stays"
    process.kill(), process.wait()
    assert (out / "page").read_text() == "old" and len([*tmp_path.rglob("half of a page")]) == 1
    with _aside(out, cache) as aside: assert not list(aside.iterdir())
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".book-cache", ".lock", "page", "site"]


def test_a_book_that_was_about_to_be_replaced_comes_back(built, tmp_path):
    folder, nbs, records, site = built
    shutil.copytree(site, tmp_path / ".site-unfinished" / "old")  # killed between two renames
    bad = tmp_path / "nbs"
    shutil.copytree(nbs, bad)
    notebook(bad / "h1" / "01_cost.ipynb", "# Cost", "1 / 0")
    with pytest.raises(BookError, match="ZeroDivisionError"): build_book(tmp_path / "site", [records], nbs=bad)
    assert (text_of(tmp_path / "site", "h1/01_cost") == text_of(site, "h1/01_cost")
            and not (tmp_path / ".site-unfinished").exists())


def test_two_builds_do_not_share_a_place(built, tmp_path):
    folder, nbs, records, site = built
    with only_writer(tmp_path / ".book-cache"), pytest.raises(UserError, match="is being written by another run"):
        build_book(tmp_path / "site", [records], nbs=nbs)
    assert not (tmp_path / "site").exists()


def test_a_note_of_an_earlier_failure_fails_nothing(tmp_path):
    notebook(tmp_path / "good.ipynb", "1 + 1")
    (tmp_path / "good.error").write_text("an hour ago")
    assert execute_all([Job("good", tmp_path / "good.ipynb", tmp_path / "good.out", {})]) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.ipynb", "good.out"]


def test_a_warning_fails_the_build(built, tmp_path):
    folder, nbs, records, site = built
    bad = tmp_path / "nbs"
    shutil.copytree(nbs, bad)
    notebook(bad / "index.ipynb", "# Front\n\n[nowhere](no_such_page.ipynb)")
    with pytest.raises(BookError, match="no_such_page"):
        build_book(tmp_path / "site", [records], nbs=bad, cache=folder / "other-cache")


def test_a_foreign_folder_is_not_replaced(tmp_path):
    (tmp_path / "precious.txt").write_text("x")
    with pytest.raises(BookError, match="is not a book"):
        build_book(tmp_path, [])
    assert (tmp_path / "precious.txt").read_text() == "x"


def test_a_process_that_dies_is_told(tmp_path):
    for name, source in dict(good="import os; os.environ['WHO']", dead="import os; os._exit(3)").items():
        notebook(tmp_path / f"{name}.ipynb", source)
    failed = execute_all(
        [Job(name, tmp_path / f"{name}.ipynb", tmp_path / f"{name}.out", {"WHO": "me"}) for name in ("good", "dead")])
    assert len(failed) == 1 and failed[0].startswith("dead: its process ended with exit code 3")
    assert "'me'" in (tmp_path / "good.out").read_text()


def test_charts_are_drawn_from_the_file_system(built, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("needs chromium")
    quiet = ["--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--no-first-run"]
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", *quiet, f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000",
         "--dump-dom", (built[-1] / "h1" / "01_cost.html").as_uri()], capture_output=True, text=True, timeout=120)
    drawn = done.stdout.split('class="drawing', 1)[1].split("<script", 1)[0]
    assert "<svg" in drawn and "Training loss" in drawn
    assert "mjx-container" in done.stdout, "the formula is typeset"
