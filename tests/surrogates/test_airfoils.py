"Shapes as numbers and back, solvers that hang or are missing, tables whose counts add up, held-out airfoils."
import shutil
import time
from collections import Counter

import numpy as np
import pytest
import torch

from flashoptim_nb.surrogates.domains.aerodynamics.problem import LiftToDrag, Space, broken
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.surrogates.domains.aerodynamics import airfoils as A
from flashoptim_nb.surrogates.domains.aerodynamics import solvers as S
from flashoptim_nb.surrogates.domains.aerodynamics.polars import (
    drag_floor, load_table, same_shapes, select, split_airfoils)
from flashoptim_nb.surrogates.domains.aerodynamics.domain import load_aerodynamics
from flashoptim_nb.surrogates.domains.aerodynamics.labels import cheap_labels

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("gcc", "cc", "clang"))), reason="no C compiler: XFOIL's stub cannot be built")


@pytest.fixture
def rng(rng_seed): return np.random.default_rng(rng_seed)


@pytest.fixture(scope="module")
def laptop(): return load_aerodynamics("laptop")


def random_shape(rng):
    "A shape whose sides cannot cross: positive weights above, negative below."
    return np.r_[rng.uniform(0.08, 0.4, 8), rng.uniform(-0.3, -0.02, 8), rng.uniform(-0.1, 0.1), rng.uniform(0, 0.01)]


# shapes

def test_round_trip_of_random_weights(rng):
    for _ in range(20):
        p = random_shape(rng)
        fit = A.fit_cst(A.coordinates(p, n=int(rng.integers(41, 201))))
        assert fit.largest < 2e-4 and fit.rms <= fit.largest
        assert np.abs(A.coordinates(fit.parameters) - A.coordinates(p)).max() < 2e-4


def test_shapes_are_linear_in_their_parameters(rng):
    p, q = random_shape(rng), random_shape(rng)
    mixed = 0.3 * A.coordinates(p) + 0.7 * A.coordinates(q)
    assert np.allclose(A.coordinates(0.3 * p + 0.7 * q), mixed, atol=1e-12)


def test_fit_ignores_position_and_scale(rng):
    p = random_shape(rng)
    moved = A.coordinates(p) * 3.7 + rng.normal(size=2)
    assert np.abs(A.coordinates(A.fit_cst(moved).parameters) - A.coordinates(p)).max() < 2e-4


def test_crossing_is_refused_for_one_and_recorded_for_many(rng):
    p = random_shape(rng)
    upside_down = A.coordinates(p)[::-1]
    with pytest.raises(UserError, match="crosses itself"): A.fit_cst(upside_down)
    found = A.parameterize(dict(good=A.coordinates(p), bad=upside_down, short=A.coordinates(p)[:4]))
    assert found.names == ("good",) and found.skipped == dict(bad="crosses itself", short="no contour in Selig's order")


@pytest.mark.parametrize("given", ["abc", [[0, 0]], np.full((30, 2), np.nan), np.zeros((30, 3)), [["x", "y"]] * 30])
def test_what_is_no_contour_is_answered_in_words(given):
    with pytest.raises(UserError, match="coordinates|finite"): A.fit_cst(given)


def test_shipped_shapes_are_all_accounted_for():
    contours, shapes = A.read_contours(), A.load_shapes()
    assert len(contours) == 2174 == len(shapes.names) + len(shapes.skipped)
    assert not set(shapes.names) & set(shapes.skipped) and len(shapes.names) > 2000
    assert shapes.largest.max() <= A.MAX_ERROR and np.median(shapes.largest) < 1e-3
    g = A.geometry(shapes.parameters)
    assert (g.crossing >= -A.CROSSING).all() and (g.thickness > 0).all()


def test_geometry_of_many_is_that_of_each(rng):
    P = np.stack([random_shape(rng) for _ in range(5)])
    many = A.geometry(P)
    assert all(
        np.allclose(getattr(many, f)[i], getattr(A.geometry(p), f)) for i, p in enumerate(P) for f in many._fields)


# solvers

@needs_compiler
@pytest.mark.parametrize(
    "body, note",
    [("sleep 60 & sleep 60", "timed out"), ("exit 3", "crashed"), ("kill -9 $$", "crashed"), ("cat > /dev/null", "")])
def test_a_solver_that_gives_nothing(tmp_path, rng, body, note):
    fake = tmp_path / "solver"
    fake.write_text(f"#!/bin/sh\n{body}\n")
    fake.chmod(0o755)
    began = time.monotonic()
    found = S.Xfoil(str(fake), timeout=0.5).polar(A.coordinates(random_shape(rng)), [0, 1, 2], 5e5)
    assert found.note == note and not found.converged.any() and np.isnan(found.CL).all() and len(found.rows()) == 3
    assert time.monotonic() - began < 30  # killed, with what it started
    many = S.Xfoil(str(fake), timeout=0.5).many(
        [A.coordinates(random_shape(rng)), A.coordinates(random_shape(rng))[::-1]], [0], 5e5)
    assert [p.note for p in many] == [note, "no airfoil"]


@needs_compiler
def test_every_solver_sees_the_same_contour(tmp_path, rng):
    """Whatever the unit, the place, doubled points and a base drawn as a line:
    XFOIL's file is the same, and so is NeuralFoil's answer."""
    fake = tmp_path / "solver"
    fake.write_text(f"#!/bin/sh\ncat > /dev/null\ncp shape.dat {tmp_path}/seen.dat\n")
    fake.chmod(0o755)
    shape = A.coordinates(random_shape(rng) + np.r_[np.zeros(17), 0.004])
    given = [shape, shape * 1000, shape * 0.01 + [3, -7], np.repeat(shape, 2, 0), np.concatenate([shape, shape[:1]]),
             A.coordinates(A.fit_cst(shape).parameters)]
    seen, solver = [], S.Xfoil(str(fake), timeout=20)
    for xy in given:
        solver.polar(xy, [0], 1e6)
        seen.append(np.loadtxt(tmp_path / "seen.dat", skiprows=1))
    assert all(a.shape == seen[0].shape and np.allclose(a, seen[0], atol=2e-7) for a in seen[:-1])
    assert np.isclose(seen[0][:, 0].min(), 0) and np.isclose(seen[0][:, 0].max(), 1)
    if pytest.importorskip("neuralfoil"):
        found = [S.NeuralFoil().polar(xy, [2.0], 1e6).CL for xy in given]
        assert np.allclose(found, found[0], atol=0.02, equal_nan=True)


def not_to_be_solved(shape):
    turn = lambda a: shape @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    yield from dict(turned=turn(0.1), much=turn(1.0), backwards=shape[::-1],
                    loop=np.concatenate([shape[:40], shape[20:]]), rolled=np.roll(shape[:-1], 40, 0), few=shape[::40],
                    empty=shape[:0], nan=np.where(np.arange(len(shape))[:, None] == 5, np.nan, shape),
                    infinite=np.where(np.arange(len(shape))[:, None] == 5, np.inf, shape),
                    one_point=shape[:1].repeat(50, 0), half=shape[: len(shape) // 2 + 1],
                    no_height=shape * [1, 0] + [0, np.nan], three=np.pad(shape, ((0, 0), (0, 1)))).items()


@needs_compiler
def test_every_solver_refuses_the_same_contours(tmp_path, rng):
    fake = tmp_path / "solver"
    fake.write_text("#!/bin/sh\ncat > /dev/null\n")
    fake.chmod(0o755)
    shape = A.coordinates(random_shape(rng))
    solvers = [S.Xfoil(str(fake), timeout=20)] + ([S.NeuralFoil()] if pytest.importorskip("neuralfoil") else [])
    for name, xy in not_to_be_solved(shape):
        for solver in solvers:
            with pytest.raises(UserError): print(solver.name, name), solver.polar(xy, [0], 1e6)
            assert solver.many([xy, shape], [0], 1e6)[0].note == "no airfoil"
    for alphas, Re in (([np.nan], 1e6), ([np.inf], 1e6), ([100.0], 1e6), ([], 1e6), (["a"], 1e6), (None, 1e6),
                       ([0], 0.0), ([0], -1e6), ([0], np.nan), ([0], np.inf), ([0], 1.0), ([0], "fast")):
        for solver in solvers:
            with pytest.raises(UserError): print(solver.name, alphas, Re), solver.polar(shape, alphas, Re)
            with pytest.raises(UserError): solver.many([shape], alphas, Re)


def test_labels_and_inputs_that_are_no_numbers_reach_no_training(laptop):
    from flashoptim_nb.surrogates.domains.aerodynamics.domain import Aerodynamics
    spoil = lambda a, value: np.where(np.arange(len(a)) == 3, value, a)
    for wrong in (dict(CL=np.nan), dict(CD=np.inf), dict(CD=0.0), dict(CD=-0.1), dict(Re=-1.0), dict(alpha=np.nan)):
        table = laptop.table._replace(**{k: spoil(getattr(laptop.table, k), v) for k, v in wrong.items()})
        with pytest.raises(UserError): Aerodynamics(table, laptop.parts, width=8, depth=1)
    P = laptop.table.parameters[:2]
    for given in (
            (P * np.nan, 1, 1e6), (P[:, :17], 1, 1e6), (P, np.nan, 1e6), (P, 1, -1e6), (P, 1, np.nan), (P, 200, 1e6)):
        with pytest.raises(UserError): laptop.encode(*given)


@needs_compiler
def test_what_converged_before_the_time_out_is_kept(tmp_path, rng):
    fake = tmp_path / "solver"
    fake.write_text("#!/bin/sh\n"
                    "printf '%s\\n' ' alpha CL CD CDp CM' ' ------ -----' ' 1.000 0.5 0.01 0.002 -0.05' ' 2.000 0.6 "
                    "-0.01 0 0' > polar.txt\n"
                    "sleep 60\n")
    fake.chmod(0o755)
    found = S.Xfoil(str(fake), timeout=0.5).polar(A.coordinates(random_shape(rng)), [0, 1, 2], 5e5)
    # a negative drag is no answer
    assert found.converged.tolist() == [False, True, False] and found.CL[1] == 0.5 and found.note == "timed out"


def test_a_missing_solver_or_compiler_says_what_to_install(monkeypatch):
    with pytest.raises(UserError, match="apt install xfoil"): S.Xfoil("no-such-solver-here")
    S.trap_stub.cache_clear()
    monkeypatch.setattr(S.shutil, "which", lambda name, path=None: "/usr/bin/xfoil" if name == "xfoil" else None)
    with pytest.raises(UserError, match="apt install gcc"): S.Xfoil()
    S.trap_stub.cache_clear()


def test_fallback_and_its_absence(monkeypatch):
    pytest.importorskip("neuralfoil", reason="neuralfoil is not installed")
    monkeypatch.setattr(S.shutil, "which", lambda name, path=None: None)
    assert S.pick_solver().name == "neuralfoil"
    monkeypatch.setitem(__import__("sys").modules, "neuralfoil", None)
    with pytest.raises(UserError, match="apt install xfoil.*pip install '.*surrogates"): S.pick_solver()
    with pytest.raises(UserError, match="did you mean"): S.pick_solver("xfoill")


@needs_compiler
@pytest.mark.skipif(not shutil.which("xfoil"), reason="XFOIL is not installed")
def test_xfoil_gives_the_shipped_coefficients(rng):
    table, solver = load_table(), S.Xfoil()
    chosen = rng.choice(len(table.names), 6, replace=False)
    alphas = np.arange(-2, 7, 2.0)
    difference = []
    for a, polar in zip(chosen, solver.many([A.coordinates(table.parameters[a]) for a in chosen], alphas, 5e5)):
        assert not polar.note
        rows = (table.airfoil == a) & (table.Re == 5e5)
        here = {v: c for v, c in zip(table.alpha[rows], table.CL[rows])}
        difference += [abs(c - here[v]) for v, c, ok in zip(polar.alpha, polar.CL, polar.converged) if ok and v in here]
    assert len(difference) >= 5 and np.median(difference) < 0.05


def test_neuralfoil_is_the_same_alone_and_among_others(rng):
    pytest.importorskip("neuralfoil", reason="neuralfoil is not installed")
    solver, shapes = S.NeuralFoil(), [A.coordinates(random_shape(rng)) for _ in range(3)]
    together = solver.many([shapes[0], shapes[1][::-1], shapes[2]], [0, 3], 1e6)
    assert together[1].note == "no airfoil" and not together[1].converged.any()
    with pytest.raises(UserError, match="crosses itself"): solver.polar(shapes[1][::-1], [0, 3], 1e6)
    assert np.allclose(together[2].CL, solver.polar(shapes[2], [0, 3], 1e6).CL, equal_nan=True)


# tables

def test_shipped_polars_are_all_accounted_for():
    table = load_table()
    assert table.counts["rows"] == 9959 == table.counts["used"] + sum(table.counts["skipped"].values())
    assert len(table.alpha) == table.counts["used"] and (table.CD >= drag_floor(table.Re)).all()
    assert table.hash == load_table().hash != select(table, table.Re < 1e6, "Re").hash


def test_lift_slope_of_thin_airfoil_theory():
    table, slopes = load_table(), []
    for a in range(len(table.names)):
        rows = (table.airfoil == a) & (table.Re == 3e6) & (table.alpha >= -2) & (table.alpha <= 4)
        if rows.sum() >= 5: slopes.append(np.polyfit(table.alpha[rows], table.CL[rows], 1)[0])
    assert len(slopes) > 100 and abs(np.median(slopes) - 2 * np.pi * np.pi / 180) < 0.006


def test_split_is_by_airfoil(rng):
    table, seed = load_table(), int(rng.integers(1000))
    parts = split_airfoils(table.parameters, seed)
    assert sorted(np.concatenate(list(parts.values()))) == list(range(len(table.names)))
    assert all(np.array_equal(parts[k], split_airfoils(table.parameters, seed)[k]) for k in parts)
    group = same_shapes(table.parameters)
    assert not (
        set(group[parts["train"]]) & set(group[parts["test"]]) or set(group[parts["train"]]) & set(group[parts["val"]]))
    domain = load_aerodynamics("gpu", seed=seed)
    names = {s: {table.names[i] for i in table.airfoil[domain.rows[s]]} for s in ("train", "val", "test")}
    assert not names["train"] & names["test"] and not names["train"] & names["val"] and not names["val"] & names["test"]


def test_same_shapes_are_found_through_others(rng):
    p = random_shape(rng)
    step = np.r_[np.zeros(17), 0.003]  # 0.0015 chords at the trailing edge of either side
    assert same_shapes(np.stack([p, p + 2 * step, p + step, p + 20 * step])).tolist() == [0, 0, 0, 1]
    with pytest.raises(UserError, match="at least 3"): split_airfoils(np.stack([p, p, p]))


# the domain

def test_domain_counts_and_limits(laptop):
    assert laptop.counts["rows"] == laptop.counts["used"] + sum(laptop.counts["skipped"].values())
    assert laptop.counts["used"] == sum(map(laptop.size, ("train", "val", "test")))
    with pytest.raises(UserError, match="did you mean 'laptop'"): load_aerodynamics("laptob")
    with pytest.raises(UserError, match="choose one of"): laptop.batch("tes", np.arange(2))


def test_batches_are_what_encode_gives(laptop, rng):
    which = rng.choice(laptop.size("val"), 7)
    batch, rows, t = laptop.batch("val", which), laptop.rows["val"][which], laptop.table
    assert batch.x.equal(laptop.encode(t.parameters[t.airfoil[rows]], t.alpha[rows], t.Re[rows]).x)
    assert (torch.allclose(batch.y, torch.tensor(np.stack([t.CL[rows], np.log(t.CD[rows])], -1), dtype=torch.float32))
            and len(batch.to("cpu")) == 7)


def test_contour_option(rng):
    domain = load_aerodynamics("laptop", contour=True)
    batch = domain.batch("train", np.arange(3))
    p = domain.table.parameters[domain.table.airfoil[domain.rows["train"][2]]]
    assert np.allclose(batch.contour[2, 0], 10 * A.cst_matrix(A.stations(64), "upper") @ p, atol=1e-5)
    assert batch.contour.shape == (3, 2, 64) and domain.build(16)(batch).shape == (3, 2)


def test_width_for_twice_the_parameters():
    domain = load_aerodynamics("gpu")
    def count(width):
        with torch.device("meta"): return sum(p.numel() for p in domain.build(width).parameters())
    one = count(domain.width)
    assert 9e6 < one < 11e6 and abs(count(domain.width_for(2 * one)) / one - 2) < 0.02


def test_cheap_labels_leave_held_out_airfoils_alone(laptop):
    pytest.importorskip("neuralfoil", reason="neuralfoil is not installed")
    cheap = cheap_labels(laptop, measure=False, alphas=[0.0, 4.0], Res=[5e5])
    assert cheap.counts["rows"] == cheap.counts["used"] + sum(cheap.counts["skipped"].values()) and cheap.seconds > 0
    t, held = laptop.table, np.concatenate([laptop.parts["val"], laptop.parts["test"]])
    trained = cheap.domain.table.parameters[cheap.domain.parts["train"]]
    group = same_shapes(np.concatenate([t.parameters[held], trained]))
    assert not set(group[:len(held)]) & set(group[len(held):])
    for split in ("val", "test"):
        a, b = (d.batch(split, np.arange(d.size(split))) for d in (laptop, cheap.domain))
        assert a.x.equal(b.x) and a.y.equal(b.y)
    assert cheap.domain.mean.equal(laptop.mean)


# the problem

class Counting:
    "Drag 0.01 and lift 0.1 a degree; every third shape does not converge."
    name, solved = "counting", 0
    def many(self, shapes, alphas, Re):
        a, start = np.asarray(alphas, float), self.solved
        self.solved += len(shapes)
        return [S.Polar(a, 0.1 * a, np.full(len(a), 0.01), 0 * a, np.full(len(a), (start + i) % 3 > 0))
                for i in range(len(shapes))]


def test_objective_counts_and_remembers(laptop, rng_seed):
    problem = LiftToDrag(laptop, lambda batch: torch.zeros(len(batch), 2), solver=Counting(), points=[(5e5, 4.0)])
    x = problem.random(0, 60, torch.Generator().manual_seed(rng_seed))
    score = problem.objective(0, torch.cat([x, x]))
    assert (score[:60].equal(score[60:]) and score.dtype == torch.float64 and problem.counts["evaluated"] == 60
            and problem.counts["repeated"] == 60)
    reasons = Counter({k: v for k, v in problem.counts.items() if k not in ("evaluated", "repeated")})
    assert reasons.total() == 60 and reasons["verified"] == (score[:60] > 0).sum()
    feasible = sum(not r for r in broken(problem.space.parameters(x), problem.space.low, problem.space.high))
    assert problem.solver.solved == feasible == reasons["verified"] + reasons["not converged"]


def test_impossible_drag_does_not_count(laptop):
    class Impossible(Counting):
        def many(self, shapes, alphas, Re):
            a = np.asarray(alphas, float)
            return [S.Polar(a, 0.1 * a, np.full(len(a), 1e-3), 0 * a, np.full(len(a), True)) for _ in shapes]
    problem = LiftToDrag(laptop, lambda batch: torch.full((len(batch), 2), -20.0).index_fill(1, torch.tensor([0]), 0.5),
                         solver=Impossible(), points=[(5e5, 4.0)])
    x = problem.random(0, 50, torch.Generator().manual_seed(0))
    assert (problem.objective(0, x) == 0).all() and problem.counts["drag below a laminar flat plate's"] > 0
    assert problem.predicted(0, x).max() <= 0.5 / drag_floor(5e5) / problem.references[0] * 1.001


def test_space_holds_the_training_airfoils_it_was_made_of(laptop):
    train = laptop.table.parameters[laptop.parts["train"]]
    space = Space(train, components=18)
    z = np.linalg.lstsq(space.axes.T, (train - space.center).T, rcond=None)[0].T
    assert np.allclose(z.std(0), 1, atol=1e-6)
    x = torch.tensor((z / 2.5 + 1) / 2)
    assert np.allclose(space.parameters(x), train, atol=1e-8)


@needs_compiler
@pytest.mark.skipif(not shutil.which("xfoil"), reason="XFOIL is not installed")
def test_xfoil_verifies_an_airfoil(laptop):
    problem = LiftToDrag(laptop, lambda batch: torch.zeros(len(batch), 2), points=[(5e5, 4.0)])
    assert problem.solver.name == "xfoil"
    x = problem.random(0, 40, torch.Generator().manual_seed(0))
    good = ([i for i, r in enumerate(broken(problem.space.parameters(x), problem.space.low, problem.space.high))
             if not r][:4])
    score = problem.objective(0, x[good])
    assert len(good) == 4 and ((score >= 0) & (score < 2)).all() and (score > 0).any()
