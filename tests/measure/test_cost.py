"""Prices, plans and worth: the source's own figures, its errata, and what a user's file may hold."""
import json

import pytest

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.measure.cost import PLATFORMS, WORLD, Platform, co2_kg, cost_per_token, load_platforms, project_cost
from flashoptim_nb.lm.plan import (A100_40, A100_80, against_budget, gpu_hours, longest_sequence, plan_protocol,
                                   plan_run, sequence_bytes, config_bytes, unlocks)
from flashoptim_nb.study.h1.worth import ASSUMPTIONS, Assumption, arithmetic, edit, worth
from flashoptim_nb.lm.sizes import gpt_config

OURS = dict(
    name="ours", instance="rack", price_per_hour=10, gpus=4, gpu="NVIDIA H200", source="the bill", date="2026-11-01")


def test_a_gpu_hour_is_a_share_of_an_instance_hour():
    assert PLATFORMS["aws-p4d"].per_gpu_hour == 32.77 / 8
    assert PLATFORMS["gcp-a2-mega"].per_gpu_hour == 27.35 / 16
    for platform in PLATFORMS.values():  # the whole instance for an hour costs the instance's price
        assert (
            cost_per_token(3600 / 1e6, platform, n_gpus=platform.gpus) * 1e6 == pytest.approx(platform.price_per_hour))


@pytest.mark.parametrize("device, trained, label, why", [
    ("NVIDIA A100-SXM4-40GB", 1e9, "measured", ""),
    ("NVIDIA A100-SXM4-40GB", 1e6, "projected", "1,000,000 of 1,000,000,000 tokens"),
    ("NVIDIA A100-SXM4-80GB", 1e9, "projected", "measured on NVIDIA A100-SXM4-80GB, priced for NVIDIA A100-SXM4-40GB"),
])
def test_dollars_that_were_not_measured_say_so(device, trained, label, why):
    row = project_cost(2e-6, 1e9, PLATFORMS["aws-p4d"], device=device, measured_tokens=trained)
    assert row["label"] == label and why in row["why"]
    assert row["gpu_hours"] == pytest.approx(2e-6 * 1e9 / 3600)
    assert row["dollars"] == pytest.approx(row["gpu_hours"] * 32.77 / 8)


def test_a_users_rates_are_added(tmp_path):
    path = tmp_path / "rates.json"
    path.write_text(json.dumps({"ours": OURS, "aws-p4d": OURS | {"name": "AWS"}}))
    found = load_platforms(path)
    assert found["ours"].per_gpu_hour == 2.5
    assert found["aws-p4d"].price_per_hour == 10 and PLATFORMS["aws-p4d"].price_per_hour == 32.77
    assert Platform(**found["ours"].to_dict()) == found["ours"]


@pytest.mark.parametrize("content, said", [
    ("{", "not JSON"),
    ("[]", "not an object"),
    ('{"x": 3}', "'x' is 3"),
    (json.dumps({"x": OURS | {"gpus": 0}}), "1 GPU at least"),
    (json.dumps({"x": OURS | {"gpus": 2.5}}), "gpus is 2.5"),
    (json.dumps({"x": OURS | {"price_per_hour": "10"}}), "a number"),
    (json.dumps({"x": OURS | {"price_per_hour": -1}}), "above 0"),
    (json.dumps({"x": OURS | {"price_per_hour": True}}), "a number"),
    ('{"x": ' + json.dumps(OURS).replace("10,", "NaN,") + "}", "above 0"),
    (json.dumps({"x": OURS | {"date": "1.11.2026"}}), "YYYY-MM-DD"),
    (json.dumps({"x": OURS | {"source": ""}}), "source is ''"),
    (json.dumps({"x": {k: v for k, v in OURS.items() if k != "source"}}), "misses source"),
    (json.dumps({"x": OURS | {"region": "north"}}), "unknown region"),
])
def test_a_bad_file_is_answered_in_words(tmp_path, content, said):
    path = tmp_path / "rates.json"
    path.write_text(content)
    with pytest.raises(UserError, match=said) as caught: load_platforms(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="none.json cannot be read"): load_platforms(tmp_path / "none.json")


def test_co2_is_energy_times_the_grid():
    assert co2_kg(7.2e6) == pytest.approx(2 * WORLD.kg_co2e_per_kwh)
    assert co2_kg(3.6e6, WORLD.replace(kg_co2e_per_kwh=0.03), overhead=1.5) == pytest.approx(0.045)


def test_the_protocol_needs_twelve_times_its_budget():
    plan = plan_protocol()
    found = against_budget(plan)
    assert found["gpu_hours"] == pytest.approx(58_600, rel=0.01) and found["dollars"] == pytest.approx(240e3, rel=0.01)
    assert found["hours_over_budget"] == pytest.approx(12.2, abs=0.1) and found["pauses"] is True
    assert set(plan.label) == {"projected"} and list(plan["size"]) == ["1B", "7B", "13B"]
    # from the shapes alone: 12 L d^2 in the layers, and the embedding; 6 operations a parameter and token
    by_hand = (5 * sum(6 * (12 * layers * d * d + 50_304 * d) * tokens
                       for layers, d, tokens in ((24, 2048, 10e9), (32, 4096, 50e9), (40, 5120, 50e9))))
    assert found["gpu_hours"] == pytest.approx(by_hand / (312e12 * 0.45 * 3600), rel=0.005)


def test_the_pause_fires_at_either_rate_and_at_full_utilization():
    assert all(against_budget(plan_protocol(platform=p))["pauses"] for p in PLATFORMS.values())
    assert against_budget(plan_protocol(utilization=1.0))["pauses"]
    assert not against_budget(plan_protocol(configurations=1).head(1))["pauses"]


def test_attention_and_seeds_add_to_it():
    one, three = plan_protocol(attention=True), plan_protocol(attention=True, seeds=3)
    assert one.gpu_hours.sum() > plan_protocol().gpu_hours.sum()
    assert three.gpu_hours.sum() == pytest.approx(3 * one.gpu_hours.sum())
    assert plan_run("70B", 1e9)["label"] == "projected"


@pytest.mark.parametrize("utilization", [0, 45, -1, float("nan")])
def test_a_utilization_is_a_share(utilization):
    with pytest.raises(UserError, match="share of the peak"): gpu_hours(1e18, A100_40, utilization)


def test_what_fits_is_the_largest_that_fits():
    seven, limit = gpt_config("7B"), 0.9 * A100_80.memory
    for name in ("baseline", "baseline_strong", "flashoptim_full", "flashoptim_release"):
        longest = longest_sequence(seven, name)
        assert sequence_bytes(seven, longest, name, 8) <= limit < sequence_bytes(seven, longest + 256, name, 8)
    assert longest_sequence(gpt_config("70B"), "baseline", n_gpus=8) == 0
    with pytest.raises(UserError, match="unknown configuration 'baselin'"): longest_sequence(seven, "baselin")


def test_what_is_unlocked_is_computed_or_a_claim():
    table = unlocks(n_gpus=4)
    assert set(table.label) == {"projected", "claim"}
    assert table[table.label == "claim"].topic.tolist() == ["multimodal training"]
    assert (table[table.label == "projected"].formula != "").all()
    big = table[(table.topic == "70B scale") & (table.unit == "GB")].iloc[0]
    for name in ("baseline", "flashoptim_full", "flashoptim_release"):
        assert big[name] / big["baseline"] == pytest.approx(config_bytes(name) / 16)
    assert [round(config_bytes(name)) for name in ("baseline", "flashoptim_full", "flashoptim_release")] == [16, 7, 5]


SOURCE = {
    # h1-llm-cost, "What a saving is worth", at 20 %
    ("one frontier run", "saved"): 20e6, ("one 70B run", "saved"): 600e3, ("industry", "spent"): 1e9,
    ("industry", "saved"): 200e6,
    ("industry", "return on validation"): 4255, ("access", "does what cost"): 625e3, ("access", "more market"): 0.25,
    ("pace", "more experiments"): 0.25, ("pace", "shorter at least"): 3, ("pace", "shorter at most"): 6,
    ("academia", "papers at least"): 50, ("academia", "papers at most"): 100,
    ("carbon", "saved"): 2000, ("carbon", "not emitted"): 8000, ("fine-tuning", "saved"): 100e6}


def test_worth_gives_the_sources_results_at_its_saving():
    found = {(row.item, row.result): row.value for row in worth(0.20).itertuples()}
    for key, value in SOURCE.items(): assert found[key] == pytest.approx(value, rel=2e-4), key


def test_worth_follows_the_saving_that_was_measured():
    found = {(row.item, row.result): row.value for row in worth(0.07).itertuples()}
    assert found["one frontier run", "saved"] == pytest.approx(7e6)
    assert found["pace", "more experiments"] == pytest.approx(1 / 0.93 - 1)
    assert (worth(-0.05).query("result == 'saved'").value < 0).all()
    with pytest.raises(UserError, match="below 1"): worth(1.0)
    with pytest.raises(UserError, match="below 1"): worth(float("nan"))


def test_runs_and_gpu_years_are_kept_apart():
    longer = {(row.item, row.result): row.value for row in worth(0.20, edit("carbon", gpu_years_a_run=3)).itertuples()}
    assert longer["carbon", "saved"] == pytest.approx(6000) and longer["carbon", "not emitted"] == pytest.approx(24_000)
    assert {"runs_a_year", "gpu_years_a_run"} <= set(next(a for a in ASSUMPTIONS if a.item == "carbon").values)


def test_assumptions_are_edited_by_name_and_do_not_leak():
    assert edit("fine-tuning", cost=1.)[-1].values == dict(cost=1.) and ASSUMPTIONS[-1].values == dict(cost=500e6)
    with pytest.raises(UserError, match="did you mean 'industry'"): edit("industri", cost=1)
    with pytest.raises(UserError, match="unknown value of 'industry' 'cost'"): edit("industry", cost=1)
    own = Assumption(item="mine", values=dict(a=2), formulas=dict(twice="a * 2 * saving"))
    assert worth(0.5, [own]).value.tolist() == [2.]


@pytest.mark.parametrize("formula", ["open('x')", "a.b", "a ** 9", "[a]", "a if a else a", "a; a", "lambda: a", "'a'"])
def test_a_formula_is_arithmetic_and_nothing_else(formula):
    with pytest.raises(UserError, match="formula"): arithmetic(formula, dict(a=1))


@pytest.mark.parametrize("text, told", [
                             ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nests deeper"),
                             ("\xff\xfe", "is not JSON"), ('{"m": [1]}', "not an object"),
                             (json.dumps(dict(m=OURS | dict(price_per_hour=10**400))), "price_per_hour"),
                             (json.dumps(dict(m=OURS | dict(price_per_hour=1e308))), "price_per_hour"),
                             (json.dumps(dict(m=OURS | dict(gpus=10**400))), "gpus"),
                             (json.dumps(dict(m=OURS | dict(price_per_hour=float("nan")))), "price_per_hour"),
                             (json.dumps(dict(m=OURS | dict(name="x\x1b[2J"))), "control characters"),
                             (json.dumps({"m\u202e": OURS}), "control characters"),
                         ], ids=range(9))
def test_rates_that_are_none_are_refused_in_words(tmp_path, text, told):
    (tmp_path / "rates.json").write_text(text, encoding="latin-1" if "\xff" in text else "utf-8")
    with pytest.raises(UserError, match=told): load_platforms(tmp_path / "rates.json")
