"""Runs over several GPUs: in the chart of the frontier, in the curve of a GPU's speed, beside what was predicted."""
import re

import records_factory
from pytest import approx

from flashoptim_nb.base.records import JOURNAL, Run
from flashoptim_nb.lm.fit import predict
from flashoptim_nb.lm.sizes import gpt_config
from flashoptim_nb.report.fits import predicted_rows
from flashoptim_nb.report.frontier import BUDGETS, FRONTIER_SIZES, WAYS, frontier, frontier_sentences, frontier_svg
from flashoptim_nb.report.scaling import scaling, show_scaling, show_scaling_curve
from flashoptim_nb.train.config import LM_CONFIGS

CARD = "NVIDIA H100 80GB HBM3"


def run(name, *rows, **fields):
    header = records_factory.header(name, study="h1-gpu", device=CARD, **fields)
    return Run(None, [dict(kind="header", **header), *rows, dict(kind="end", status="finished", reason="")], (0, ""), (0, ""))


def search(config, gpus, *tried, **about):
    "Candidates as (micro-batch, peak, predicted, tokens a second of all GPUs); the first is chosen."
    rows = [dict(checkpointing="none", micro_batch=micro, peak=peak, predicted=predicted, fits=True, oom=False, reason="",
                 budget=76e9, tokens_per_s=speed, early=speed) for micro, peak, predicted, speed in tried]
    return dict(kind="search", config=config, micro=tried[0][0], checkpointing="none", why="the fastest that fits",
                tried=rows) | (dict(gpus=gpus) if gpus > 1 else {}) | about


def journal(*searches): return run(JOURNAL, *searches, config=JOURNAL, arm=JOURNAL, role="", settings=dict(recipe=None))


def trained(size, config, gpus, seed, speed, peak, micro=2, steps=10):
    settings = dict(size=size, config=config, gpus=gpus, recipe=dict(seq=2048, batch=24))
    return run(f"{size}-best-{config}-s{seed}-x{gpus}", *[dict(kind="step", step=n, peak=peak) for n in range(1, 13)],
               dict(kind="throughput", tokens_per_s=speed, steps=steps, micro_batch=micro),
               config=config, role=size, seed=seed, settings=settings)


def of_30b():
    found = {key: value for key, value in search("flashoptim_release", 4, (1, 66e9, 63e9, 7_000.0)).items() if key != "role"}
    return run("30B-frontier-flashoptim_release-s0-x4", found, config="flashoptim_release", role="30B", arm="frontier",
               settings=dict(size="30B", gpus=4, recipe=dict(seq=2048, batch=24)))


SEARCHED = journal(
    search("baseline_strong", 4, (1, 70e9, 69e9, 14_000.0), role="13B"),
    search("flashoptim_full", 4, (2, 50e9, 48e9, 18_000.0), (1, 35e9, 34e9, 15_000.0), role="13B"),
    search("flashoptim_full", 2, (1, 72e9, 72e9, 8_600.0), role="13B"))
TRAINED = [trained("13B", "flashoptim_full", 4, seed, speed, 51e9) for seed, speed in ((0, 19_000.0), (1, 21_000.0))]
RUNS = [SEARCHED, *TRAINED, of_30b()]


def test_cells_of_four_gpus_are_measured_and_those_of_eight_predicted():
    place = ["gpus", "budget", "size", "way"]
    trained_too = frontier([*RUNS, trained("13B", "baseline_strong", 4, 0, 15_000.0, 70e9, micro=1)]).set_index(place)
    full = trained_too.loc[4, 80, "13B", "flash"]
    assert (full["state"], full["tokens_per_s"], full["peak"]) == ("measured", 5_000.0, 51e9)  # of a GPU; as trained
    cells = frontier(RUNS).set_index(place)
    assert cells.loc[4, 80, "13B", "flash"]["tokens_per_s"] == 4_500.0  # beside a reference that was searched alone
    assert cells.loc[4, 40, "13B", "flash"]["tokens_per_s"] == 3_750.0  # the search's smaller candidate
    assert cells.loc[4, 80, "30B", "release"]["tokens_per_s"] == 1_750.0
    assert cells.loc[4, 80, "30B", "release"]["device"] == CARD
    assert cells.loc[4, 80, "30B", "adamw"]["state"] == "predicted not to fit"
    assert {cells.loc[8, budget, size, "flash"]["state"] for budget in BUDGETS for size in FRONTIER_SIZES[8]} <= {
        "predicted to fit", "predicted not to fit"}


def test_places_are_counted_over_all_numbers_of_gpus():
    cells = frontier(RUNS)
    places = len(BUDGETS) * sum(map(len, FRONTIER_SIZES.values()))
    assert len(cells) == places * len(WAYS)
    said = frontier_sentences(cells, [])["Room"]
    assert f"of the chart's {places} places" in said and "up to 30B on 4 GPUs of 80 GB" in said
    small = journal(search("flashoptim_release", 1, (1, 76e9, 76e9, 4_000.0), role="13B"),
                    search("flashoptim_full", 4, (1, 22e9, 22e9, 12_000.0), role="13B"))
    # one GPU of 80 GB is less memory than four of 24
    assert "up to 13B on 1 GPU of 80 GB" in frontier_sentences(frontier([small]), [])["Room"]


def test_each_panel_lies_within_the_drawing():
    svg = frontier_svg(frontier(RUNS))
    width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', svg).groups())
    assert width <= 1300
    boxes = [tuple(map(float, box)) for box in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="60" height="28"', svg)]
    assert len(boxes) == len(set(boxes)) == len(frontier([]))  # none hides another
    assert all(x + 60 <= width and y + 28 <= height for x, y in boxes)
    for gpus, sizes in FRONTIER_SIZES.items():
        for budget in BUDGETS:
            _, _, panel = svg.partition(f">{gpus} GPU{'s' * (gpus > 1)} of {budget} GB<")
            assert tuple(re.findall(r">(\d+[MB])</text>", panel)[:len(sizes)]) == sizes


def test_trained_comes_before_searched_and_a_speed_is_that_of_a_gpu():
    found = scaling(RUNS).set_index(["size", "config", "gpus"])
    assert list(found["from"]) == ["searched", "searched", "trained", "searched"]
    full = found.loc["13B", "flashoptim_full"]
    assert list(full["tokens_per_s"]) == [4_300.0, 5_000.0] and list(full["kept"]) == [1, approx(5_000 / 4_300)]
    four = full.loc[4]
    assert (four["seeds"], four["peak"], four["predicted"], four["device"]) == (2, 51.0, 48.0, CARD)
    assert four["off"] == approx(100 * (48 / 51 - 1))
    assert four["runs"] == sorted(["h1-gpu/protocol", *(f"h1-gpu/{one.id}" for one in TRAINED)])
    assert found.loc["30B", "flashoptim_release", 4]["predicted"] == 63.0  # a search without a role has its run's


def test_what_is_no_speed_is_no_point():
    short = trained("7B", "flashoptim_full", 2, 0, 1e6, 1e9, steps=3)
    layers = journal(search("flashoptim_full", 2, (1, 1e9, 1e9, 1e6), role="13B-20L"))
    nothing = journal(dict(kind="search", role="13B", config="baseline_strong", micro=None, checkpointing="full", tried=[
        dict(checkpointing="full", micro_batch=1, fits=False, oom=True, peak=80e9, predicted=99e9, reason="", budget=76e9)]))
    other = trained("7B", "strong_fp8", 2, 0, 1e6, 1e9)
    laptop = Run(None, [dict(TRAINED[0].header, scale="laptop"), *TRAINED[0].rows[1:]], (0, ""), (0, ""))
    assert scaling([short, layers, nothing, other, laptop]).empty


def test_a_training_without_its_search_has_no_prediction():
    row = scaling(TRAINED[:1]).iloc[0]
    assert row["predicted"] is None and row["off"] is None and row["runs"] == [f"h1-gpu/{TRAINED[0].id}"]
    elsewhere = journal(search("flashoptim_full", 4, (1, 35e9, 34e9, 15_000.0), role="13B"))  # another micro-batch
    assert scaling([elsewhere, TRAINED[0]]).iloc[0]["predicted"] is None


def test_only_what_has_two_numbers_of_gpus_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr("flashoptim_nb.report.scaling.draw", lambda chart, rows: drawn.append(rows))
    show_scaling_curve(RUNS)
    assert [*zip(drawn[0]["size"], drawn[0]["config"], drawn[0]["gpus"])] == [
        ("13B", "flashoptim_full", 2), ("13B", "flashoptim_full", 4)]
    table = show_scaling(RUNS).markdown
    assert "| 30B | flashoptim_release | 4 |" in table and "| 13B | baseline_strong | 4 |" in table
    one = [trained("1B", "flashoptim_full", 1, 0, 66_000.0, 60e9)]
    assert show_scaling_curve(one).markdown == "Over several GPUs: not measured." and len(drawn) == 1
    assert "no curve" in show_scaling_curve([SEARCHED, of_30b()][1:]).markdown


def test_a_peak_on_four_gpus_stands_beside_what_is_predicted_of_four():
    model, stack = gpt_config("13B"), LM_CONFIGS["flashoptim_full"]
    settings = dict(size="13B", gpus=4, stack=stack.as_settings(), recipe=dict(batch=8, seq=2048), model=dict(
        style="gpt2", n_layer=40, d_model=5120, n_head=40, max_seq=2048, vocab_size=50_304))
    memory = dict(kind="memory", batch=1, seq=2048, checkpointing="none", attention="flash", peak=45e9)
    row = predicted_rows([run("13B-equal-flashoptim_full-s0-x4", memory, config="flashoptim_full", role="13B", arm="equal",
                              settings=settings)]).iloc[0]
    known = predict(model, stack.replace(attention="flash"), 1, 2048, gpus=4, accumulate=True)["peak"]
    assert row["gpus"] == 4 and row["predicted"] == approx(known / 2**30)
