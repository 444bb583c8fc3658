"What the prover must find; each witness is judged again, by the judge and not by the solver."
import pytest

from flashoptim_nb.study import consistency
from flashoptim_nb.study.consistency import Finding, findings
from flashoptim_nb.study.expression import Q, All, Not, judge
from flashoptim_nb.study.h1.consistency import H1_CHECKS, H1_LOGIC
from flashoptim_nb.study.h1.criteria import CRITERIA, H1
from flashoptim_nb.study.statistics import exact


@pytest.fixture(scope="module")
def told() -> list[Finding]: return findings(H1_LOGIC, H1_CHECKS)


@pytest.fixture(scope="module")
def found(told) -> dict[str, Finding]: return {finding.id: finding for finding in told}


def typical_but(witness):
    "A lookup: the witness, typical values elsewhere, throughput from the cost relation."
    def value(q):
        if q.key in witness: return witness[q.key]
        if q.name == "throughput_ratio":
            return value(Q("steps_ratio", q.at)) / (1 - value(Q("cost_saving", q.at)))
        return H1_LOGIC.typical[q.name]
    return lambda q: exact(value(q))


def test_all_is_decided_and_named_once(told, found):
    assert len(found) == len(told) and all(finding.proved for finding in told)


def test_success_is_possible_and_typical_values_are_one(found):
    assert found["success"].kind == found["clean success"].kind == "possible"
    assert judge(H1_LOGIC.successful, typical_but({})).status == "met"


def test_what_success_excludes_and_what_it_does_not(found):
    kinds = {c.id: found[f"success with {c.id}"].kind for c in H1.criteria if c.kind != "success"}
    assert {id for id, kind in kinds.items() if kind == "overlap"} == {
        "H1-F2", "H1-F4", "H1-F7", "H1-F8", "H1-D2", "H1-D3", "H1-D6"}
    assert set(kinds.values()) == {"overlap", "excluded"} and len(kinds) == 15


@pytest.mark.parametrize("id", ["H1-F2", "H1-F4", "H1-F7", "H1-F8", "H1-D2", "H1-D3", "H1-D6"])
def test_witnesses_of_overlap(found, id):
    look = typical_but(found[f"success with {id}"].witness)
    assert judge(H1_LOGIC.successful, look).status == "met"
    assert judge(CRITERIA[id].formula, look).status == "met"


def test_the_thresholds_at_7b_and_13b_never_bind(found):
    assert "12 %" in found["H1-S1: cost_saving[13B]"].claim
    assert [finding.id for finding in found.values() if finding.kind == "never binds"] == [
        "H1-S1: cost_saving[7B]", "H1-S1: cost_saving[13B]", "H1-S4 alone"]


def test_throughput_fails_alone_only_where_steps_are_saved(found):
    finding = found["H1-S4 alone"]
    assert ("assumption" in finding.claim
            and min(v for k, v in finding.witness.items() if k.startswith("steps_ratio")) < 1)
    look = typical_but(finding.witness)
    assert judge(CRITERIA["H1-S4"].formula, look).status == "not met"
    assert judge(All(*(CRITERIA[f"H1-S{n}"].formula for n in (1, 2, 3, 5, 6, 7))), look).status == "met"


def test_a_fifth_less_cost_is_a_quarter_more_throughput():
    equal_steps = All(Q("steps_ratio", "1B") >= 1, Q("steps_ratio", "1B") <= 1)
    assert (
        H1_LOGIC.ask(equal_steps, Q("cost_saving", "1B") >= 0.20, Q("throughput_ratio", "1B") < 1.25).possible is False)
    assert (
        H1_LOGIC.ask(equal_steps, Q("cost_saving", "1B") < 0.20, Q("throughput_ratio", "1B") >= 1.25).possible is False)


def test_the_zone_between_failure_and_success(found):
    finding = found["H1-S1: cost_saving[1B] >= 20 %"]
    look = typical_but(finding.witness)
    assert "between 10 % and 20 %" in finding.claim and "partial" in finding.claim
    assert judge(CRITERIA["H1-S1"].formula, look).status == "not met"


def test_zones_are_harmless(found):
    zones = [finding for finding in found.values() if finding.kind == "zone"]
    assert len(zones) >= 10
    for finding in zones:
        look = typical_but(finding.witness)
        assert judge(CRITERIA[finding.id[:5]].formula, look).status == "not met", finding
        assert not [
            c.id for c in H1.criteria if c.kind != "success" and judge(c.formula, look).status == "met"], finding


def test_duplicates(found):
    assert found["H1-F6 = H1-D5"].kind == "implied"
    assert "H1-F1 holds whenever H1-D1 does" == found["H1-D1 -> H1-F1"].claim


def test_cd_alone_can_stop_what_would_succeed(found):
    assert [id for id in ("H1-CB", "H1-CC", "H1-CD", "H1-CE", "H1-CF") if found[id].witness] == ["H1-CD"]


def test_a_contradiction_is_seen():
    assert H1_LOGIC.ask(H1_LOGIC.successful, Not(CRITERIA["H1-S2"].formula)).possible is False
    assert H1_LOGIC.ask(*(axiom.formula for axiom in H1_LOGIC.axioms), Q("platform_gap", "1B") < 0).possible is False


def test_running_out_of_time_is_no_proof(monkeypatch):
    import z3
    monkeypatch.setattr(z3.Solver, "check", lambda self, *a: z3.unknown)
    assert H1_LOGIC.ask(H1_LOGIC.successful).possible is None
    assert all(not finding.proved and "not decided" in finding.claim
               for finding in consistency.can_succeed(H1_LOGIC) + consistency.overlaps(H1_LOGIC))
    assert consistency.never_binding(H1_LOGIC) == [] == consistency.implied(H1_LOGIC)
