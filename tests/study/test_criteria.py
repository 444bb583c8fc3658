"Every criterion at its thresholds, the logic's laws, and one formula's readings against each other."
import itertools
import random
from dataclasses import replace

import pytest
import z3

from flashoptim_nb.study.h1.criteria import CRITERIA, CRITERIA_HASH, H1
from flashoptim_nb.study.h1.quantities import H1_QUANTITIES
from flashoptim_nb.study.expression import (All, Any, AnyTested, AtLeast, Count, EveryTested, Not, Q, Status,
                                            estimate_of, judge, leaves, quantities, text, to_z3)
from flashoptim_nb.study.statistics import Estimate, exact, missing, opened

IDS = [f"H1-{kind}{n}" for kind, last in (("S", 7), ("F", 8), ("D", 7)) for n in range(1, last + 1)]
KINDS = dict(S="success", F="failure", D="falsification")


def test_every_id_of_the_protocol_once():
    assert list(CRITERIA) == IDS
    assert all(CRITERIA[id].kind == KINDS[id[3]] for id in IDS)
    assert all(CRITERIA[id].statement and CRITERIA[id].title for id in IDS)


def everywhere(id, **changed):
    "The status when each quantity of a criterion has the same value, but for those changed (by name or key)."
    def look(q): return exact(changed.get(q.key, changed.get(q.name)))
    return judge(CRITERIA[id].formula, look).status


@pytest.mark.parametrize("id, name, at, beyond", [
                             # a value at the threshold, where the criterion is met or not met; one just beyond
                             ("H1-S3", "quality_gap", (0.5, "met"), (0.501, "not met")),
                             ("H1-S3", "quality_gap", (-0.5, "met"), (-0.501, "not met")),
                             ("H1-S4", "throughput_ratio", (1.0, "met"), (0.999, "not met")),
                             ("H1-S6", "platform_gap", (0.05, "met"), (0.051, "not met")),
                             ("H1-S7", "nan_events", (0, "met"), (1, "not met")),
                             ("H1-F1", "cost_saving", (0.10, "not met"), (0.099, "met")),
                             ("H1-F2", "quality_gap", (1.0, "not met"), (1.001, "met")),
                             ("H1-F3", "throughput_ratio", (0.95, "not met"), (0.949, "met")),
                             ("H1-F4", "memory_saving", (0.05, "not met"), (0.049, "met")),
                             ("H1-F6", "platform_gap", (0.15, "not met"), (0.151, "met")),
                             ("H1-F7", "loss_spikes", (3, "not met"), (4, "met")),
                             ("H1-F8", "component_saving", (0.05, "met"), (0.051, "not met")),
                             ("H1-D1", "cost_saving", (0.10, "not met"), (0.099, "met")),
                             ("H1-D2", "quality_gap", (1.0, "not met"), (1.001, "met")),
                             ("H1-D3", "steps_ratio", (1.10, "not met"), (1.101, "met")),
                             ("H1-D4", "memory_saving", (0.0, "met"), (0.001, "not met")),
                             ("H1-D5", "platform_gap", (0.15, "not met"), (0.151, "met")),
                             ("H1-D7", "nan_unrecovered", (0.001, "not met"), (0.0011, "met")),
                         ])
def test_thresholds(id, name, at, beyond):
    for value, status in (at, beyond): assert everywhere(id, **{name: value}) == status


@pytest.mark.parametrize("id, values, status", [
                             ("H1-S1", (0.20, 0.15, 0.12), "met"), ("H1-S1", (0.199, 0.15, 0.12), "not met"),
                             ("H1-S1", (0.20, 0.149, 0.12), "not met"), ("H1-S1", (0.20, 0.15, 0.119), "not met"),
                             ("H1-S2", (0.25, 0.30, 0.0), "met"), ("H1-S2", (0.249, 0.30, 0.9), "not met"),
                             ("H1-S2", (0.25, 0.299, 0.9), "not met"),
                             ("H1-S5", (0.25, 0.20, 0.20), "met"), ("H1-S5", (0.26, 0.26, 0.20), "not met"),
                             ("H1-S5", (0.25, 0.19, 0.21), "not met"), ("H1-S5", (0.20, 0.27, 0.20), "not met"),
                             ("H1-F5", (0.30, 0.0, 0.20), "not met"), ("H1-F5", (0.31, 0.31, 0.20), "met"),
                             ("H1-F4", (0.0, 0.05, 0.049), "met"), ("H1-F4", (0.0, 0.05, 0.05), "not met"),
                             ("H1-D1", (0.09, 0.09, 0.10), "not met"), ("H1-D4", (0.0, -0.1, 0.5), "met"),
                             ("H1-D4", (0.0, 0.1, 0.5), "not met"),
                         ])
def test_criteria_over_sizes(id, values, status):
    name = quantities(CRITERIA[id].formula)[0].name
    assert (everywhere(id, **{f"{name}[{size}]": v
                              for size, v in zip(("1B", "7B", "13B"), map(lambda v: round(v, 9), values))}) == status)


def test_reversal_needs_70b_unless_it_already_rises():
    known = {"cost_saving[1B]": 0.2, "cost_saving[13B]": 0.15}
    look = lambda q: exact(known[q.key]) if q.key in known else missing("planned")
    assert judge(CRITERIA["H1-D6"].formula, look).status == "not measured"
    known["cost_saving[13B]"] = 0.21
    assert judge(CRITERIA["H1-D6"].formula, look).status == "not met"
    known |= {"cost_saving[13B]": 0.15, "cost_saving[70B]": 0.14}
    assert judge(CRITERIA["H1-D6"].formula, look).status == "met"


@pytest.mark.parametrize("id", IDS)
def test_unmeasured_is_not_measured(id):
    assert judge(CRITERIA[id].formula, lambda q: missing("no runs")).status == "not measured"


@pytest.mark.parametrize("id", IDS)
def test_one_pair_and_straddling_intervals_are_inconclusive(id):
    formula = CRITERIA[id].formula
    assert judge(formula, lambda q: Estimate(value=5.0, n=1)).status == "inconclusive"
    assert judge(formula, lambda q: Estimate(value=0.0, lo=-100.0, hi=100.0, n=3)).status == "inconclusive"
    assert judge(formula, lambda q: Estimate(value=5.0, lo=4.0, hi=6.0, n=3, projected=True)).status == "inconclusive"


@pytest.mark.parametrize("id", IDS)
def test_judge_and_solver_agree(id, rng_seed):
    formula = CRITERIA[id].formula
    edges = sorted({leaf.right for leaf in leaves(formula)})
    for _ in range(20):
        values = {q: round(random.choice(edges) + random.choice([0, -1, 1]) * random.random() / 10, 3)
                  for q in quantities(formula)}
        solver = z3.Solver()
        solver.add(to_z3(formula), *(z3.Real(q.key) == z3.RealVal(repr(v)) for q, v in values.items()))
        # differences of floats are rounded, those of the solver's rationals are not: stay off the edge
        if any(abs(leaf.estimate.value - leaf.compare.right) < 1e-9 and leaf.estimate.value != leaf.compare.right
               for leaf in judge(formula, lambda q: exact(values[q])).leaves):
            continue
        assert (judge(formula, lambda q: exact(values[q])).status == "met") == (solver.check() == z3.sat), values


def random_formula(depth):
    if depth == 0: return random.choice([Q("a") > 0, Q("b") <= 0.2, Q("c") - Q("a") < 0, Q("d") >= -0.1])
    parts = [random_formula(depth - 1) for _ in range(3)]
    return random.choice([All(*parts), Any(*parts), AtLeast(2, *parts), EveryTested(*parts), AnyTested(*parts)])


def random_estimate():
    value, half = random.uniform(-1, 1), random.choice([0, 0.1, 1.0])
    known = Estimate(value=value, lo=value - half, hi=value + half, n=3)
    return random.choice([missing("lost"), Estimate(value=value, n=1), known,
                          opened(known, "not searched", less=random.random() < 0.5, more=random.random() < 0.5)])


def inside(estimate):
    "A number that the quantity can be."
    lo, hi = (min(max(end, -5.0), 5.0) for end in estimate.ends)
    return random.uniform(lo, hi)


FLIP = {"met": "not met", "not met": "met"}


def test_negation_turns_what_is_decided_and_nothing_else(rng_seed):
    seen = set()
    for _ in range(500):
        formula, known = random_formula(2), {name: random_estimate() for name in "abcd"}
        status = judge(formula, lambda q: known[q.name]).status
        assert judge(Not(formula), lambda q: known[q.name]).status == FLIP.get(status, status), text(formula)
        seen.add(status)
    assert seen == set(Status) - {Status.NO_EVIDENCE}


def test_more_knowledge_never_overturns_a_decision(rng_seed):
    for _ in range(500):
        formula, known = random_formula(2), {name: random_estimate() for name in "abcd"}
        # limited to what was tested, so a further test may well change it
        if any(node.tested for node in walk(formula)):
            continue
        status = judge(formula, lambda q: known[q.name]).status
        if status not in FLIP: continue
        def sharper(e):
            value = random.uniform(-1, 1) if e.value is None else e.value if e.lo is None else inside(e)
            return exact(value)
        learned = {name: sharper(e) for name, e in known.items()}
        assert judge(formula, lambda q: learned[q.name]).status == status, text(formula)


def walk(formula):
    if isinstance(formula, Count):
        yield formula
        for part in formula.parts: yield from walk(part)


def test_each_threshold_and_statement_is_in_the_hash():
    seen = {CRITERIA_HASH}
    for i, criterion in enumerate(H1.criteria):
        moved = next(leaves(criterion.formula))
        for changed in (replace(criterion, statement=criterion.statement + " "),
                        replace(criterion, formula=nudge(criterion.formula, moved))):
            seen.add(replace(H1, criteria=H1.criteria[:i] + (changed,) + H1.criteria[i + 1:]).hash)
    assert len(seen) == 1 + 2 * len(IDS)


def nudge(formula, leaf):
    "The formula with one threshold moved by a millionth."
    if formula is leaf: return replace(leaf, right=leaf.right + 1e-6)
    return (replace(formula, parts=tuple(nudge(part, leaf) for part in formula.parts)) if isinstance(formula, Count)
            else formula)


def test_quantities_have_a_unit_and_a_meaning():
    used = set(itertools.chain.from_iterable(quantities(c.formula) for c in H1.criteria))
    assert all(H1_QUANTITIES[q.name].unit and H1_QUANTITIES[q.name].meaning for q in used)


def test_arithmetic_keeps_every_value_that_is_possible(rng_seed):
    for _ in range(500):
        known = {name: random_estimate() for name in "ab"}
        if any(e.lo is None for e in known.values()): continue
        look = lambda q: known[q.name]
        a, b = (inside(known[name]) for name in "ab")
        for term, value in ((Q("a") + Q("b"), a + b), (Q("a") - Q("b"), a - b), (Q("a") * Q("b"), a * b),
                            (1 - Q("a") * Q("b"), 1 - a * b)):
            found = estimate_of(term, look)
            assert (found.ends[0] - 1e-9 <= value <= found.ends[1] + 1e-9
                    and found.ends[0] <= found.lo <= found.hi <= found.ends[1])


def test_a_bound_decides_in_one_direction_only():
    at_least, at_most, neither = (opened(Estimate(value=0.2, lo=0.15, hi=0.25, n=3), "", **sides)
                                  for sides in (dict(more=True), dict(less=True), dict(less=True, more=True)))
    statuses = lambda e: [
        judge(formula, lambda q: e).status for formula in (Q("a") >= 0.1, Q("a") < 0.1, Q("a") >= 0.3, Q("a") < 0.3)]
    assert statuses(at_least) == ["met", "not met", "inconclusive", "inconclusive"]
    assert statuses(at_most) == ["inconclusive", "inconclusive", "not met", "met"]
    assert statuses(neither) == ["inconclusive"] * 4
    assert [e.map(lambda x: 1 - x).bound for e in (at_least, at_most, neither)] == [
        "at most", "at least", "not established"]
