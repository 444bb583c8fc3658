"Independent sets: what the graphs mean, what the solvers find, what partial sets are worth, what is proposed."
import importlib.util
import random
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest
import torch

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.surrogates.domains.independent_sets import exact as E
from flashoptim_nb.surrogates.domains.independent_sets.exact import SOLVERS, gap, greedy, largest_containing
from flashoptim_nb.surrogates.domains.independent_sets.graphs import (
    SATLIB, THRESHOLD, clique_numbers, complement_graph, formula_graph, graphs_folder, independent, load_graphs,
    make_graph, random_3sat, read_dimacs, states)
from flashoptim_nb.surrogates.domains.independent_sets.partial import (
    draw_labels, load_labels, most_nodes, partial_set, save_labels, split_graphs)
from flashoptim_nb.surrogates.domains.independent_sets.network import GraphNet
from flashoptim_nb.optim.cast import cast_model
from flashoptim_nb.surrogates.domains.independent_sets.domain import Combinatorial, load_combinatorial

needs_satlib = pytest.mark.skipif(
    graphs_folder("uf20-91") is None, reason="FLASHOPTIM_DATA names no folder with satlib/")
needs_dimacs = pytest.mark.skipif(
    graphs_folder("dimacs") is None, reason="FLASHOPTIM_DATA names no folder with dimacs_clique/")
needs_pysat = pytest.mark.skipif(importlib.util.find_spec("pysat") is None, reason="python-sat is not installed")
HERE = [s for s, module in dict(rc2="pysat", cpsat="ortools").items() if importlib.util.find_spec(module)] + ["branch"]


def some_graph(rng, n, p):
    return make_graph("random", n, [e for e in combinations(range(n), 2) if rng.random() < p])


def brute(graph, start=()):
    "The size of the largest independent set that contains `start`, by trying all."
    near = [sum(1 << int(j) for j in np.flatnonzero(row)) for row in graph.adjacency]
    must, best = sum(1 << i for i in start), -1
    for s in range(1 << graph.n):
        if s & must == must and all(not (s >> i & 1 and s & near[i]) for i in range(graph.n)):
            best = max(best, s.bit_count())
    return best


# ---------- graphs

@needs_pysat
def test_a_set_of_all_clauses_exists_exactly_if_the_formula_is_satisfiable(rng_seed):
    from pysat.solvers import Solver
    seen = set()
    for k in range(40):
        variables = random.randint(5, 14)
        graph = random_3sat(variables, rng_seed + k, ratio=random.choice((2.0, THRESHOLD, 7.0)))
        with Solver(name="g3", bootstrap_with=graph.clauses) as solver:
            satisfiable = solver.solve()
        # where the formula has no solution, branching over more nodes may not come to an end within its time
        able = [name for name in HERE if graph.n < (100 if name == "branch" else 130)]
        found = largest_containing(graph, solver=random.choice(able or ["rc2"]))
        assert found.proven and (found.size == len(graph.clauses)) == satisfiable
        seen.add(satisfiable)
    assert seen == {True, False}


def test_edges_are_those_of_the_definition(rng_seed):
    clauses = [[random.choice((-1, 1)) * v for v in random.sample(range(1, 7), random.randint(1, 3))] for _ in range(9)]
    graph = formula_graph("mixed", clauses)
    place = [(c, x) for c, clause in enumerate(clauses) for x in clause]
    wanted = [[i, j] for (i, (c, x)), (j, (d, y)) in combinations(enumerate(place), 2) if c == d or x == -y]
    assert graph.edges.tolist() == wanted and graph.n == len(place)


def test_threshold_formulas_are_what_they_say(rng_seed):
    graph = random_3sat(50, rng_seed)
    assert len(graph.clauses) == 213 and all(len({abs(x) for x in c}) == 3 for c in graph.clauses)
    assert random_3sat(50, rng_seed).clauses == graph.clauses != random_3sat(50, rng_seed + 1).clauses
    with pytest.raises(UserError, match="three different"):
        random_3sat(2, 0)


def test_mistakes_in_a_graph_are_answered_in_words():
    for n, edges, told in ((0, [], "at least one"), (3, [(0, 3)], "nodes are 0 to 2"), (3, [(-1, 0)], "node -1"),
                           (3, [(2, 2)], "to itself")):
        with pytest.raises(UserError, match=told):
            make_graph("wrong", n, edges)
    for clauses, told in (([], "no clauses"), ([()], "empty clause"), ([(1, 0)], "literal 0")):
        with pytest.raises(UserError, match=told):
            formula_graph("wrong", clauses)


def test_counts_add_up_and_what_is_too_large_is_told():
    for budget in (10, 129, 10_000):
        found = load_graphs("random3sat-10", 7, budget)
        assert found.read == len(found.graphs) + sum(found.skipped.values()) == 7
        assert all(str(budget) in reason for reason in found.skipped)


def test_a_family_that_is_not_here_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHOPTIM_DATA", str(tmp_path))
    for family in ("uf20-91", "dimacs"):
        with pytest.raises(UserError, match="FLASHOPTIM_DATA"):
            load_graphs(family, 1)
    monkeypatch.delenv("FLASHOPTIM_DATA")
    assert graphs_folder("dimacs") is None


@needs_satlib
@pytest.mark.parametrize("family", SATLIB)
def test_satlib_families_are_read_whole(family):
    counts = dict(zip(SATLIB, (1000, 1000, 1000, 100, 100, 100, 97, 100)))
    found = load_graphs(family, max_nodes=0)
    assert found.read == counts[family] == sum(found.skipped.values())
    graph = load_graphs(family, 1, max_nodes=10_000).graphs[0]
    assert (graph.family == family and graph.target == int(family.rsplit("-")[1]) if not family.startswith("flat")
            else graph.target == {"100": 1117, "175": 1951, "200": 2237}[family[4:7]])


@needs_satlib
@needs_pysat
def test_satisfiable_families_reach_all_clauses_and_others_do_not():
    for family, satisfiable in (("uf20-91", True), ("uf50-218", True), ("uuf50-218", False)):
        for graph in load_graphs(family, 60).graphs[random.randrange(50):][:5]:
            found = largest_containing(graph)
            assert found.proven and (found.size == graph.target) == satisfiable


@needs_dimacs
def test_clique_numbers_are_those_proved_elsewhere():
    known = {k: v for k, v in clique_numbers().items() if v is not None}
    graphs = read_dimacs()
    assert len(graphs) == 68 and {
        k: int(t.sum()) for k, (_, t) in graphs.items() if k in ("brock200_2", "keller4")} == dict(
        brock200_2=9876, keller4=9435)
    for name in known:
        found = largest_containing(complement_graph(name, *graphs[name]), seconds=20)
        assert found.proven and found.size == known[name], name


# ---------- exact solutions

@pytest.mark.parametrize("solver", HERE)
def test_solvers_find_what_trying_everything_finds(solver, rng_seed):
    for _ in range(12):
        graph = some_graph(random, random.randint(1, 10), random.random())
        start = greedy(graph)[: random.randint(0, 2)].tolist()
        if solver == "rc2":  # formulas only
            graph = random_3sat(3, random.randrange(1000), ratio=1.0)
            start = [random.randrange(graph.n)]
        found = largest_containing(graph, start, solver)
        assert found.proven and found.size == found.bound == brute(graph, start)
        assert independent(graph, found.nodes) and set(start) <= set(found.nodes)


def test_enumeration_finds_what_trying_everything_finds(rng_seed):
    for k in range(6):
        graph = random_3sat(4, rng_seed + k, ratio=1.0)
        for start in ((), (0,), greedy(graph)[:3]):
            assert largest_containing(graph, start, "enumeration").size == brute(graph, start)


def test_solvers_agree_on_formulas(rng_seed):
    for k in range(4):
        graph = random_3sat(random.randint(8, 12), rng_seed + k)
        start = partial_set(graph, greedy(graph), 8, np.random.default_rng(rng_seed + k))
        assert len({largest_containing(graph, start, s).size for s in [*HERE, "enumeration"]}) == 1


def test_a_graph_without_edges_is_its_own_largest_set():
    points = make_graph("points", 6, [])
    for solver in ("auto", *SOLVERS):
        assert largest_containing(points, [2], solver).nodes == tuple(range(6))
    assert (len(greedy(points)) == 6 and independent(points, range(6))
            and (states(points, [1]) == [0, 1, 0, 0, 0, 0]).all())
    assert partial_set(points, range(6), 3, np.random.default_rng(0)).size <= 3


@pytest.mark.parametrize("solver", HERE)
def test_time_that_runs_out_leaves_a_bound(solver):
    graph = random_3sat(60, 1) if solver != "branch" else some_graph(random.Random(0), 90, 0.1)
    found = largest_containing(graph, [0], solver, seconds=0)
    assert not found.proven and 0 < found.size < found.bound <= graph.target
    assert independent(graph, found.nodes) and 0 in found.nodes


@needs_pysat
def test_a_solver_that_hangs_is_killed_and_the_next_question_is_answered(monkeypatch):
    child = E.Child("import sys, time\nfor line in sys.stdin: time.sleep(600)")
    ask = child.ask
    monkeypatch.setattr(E, "_rc2_child", child)
    monkeypatch.setattr(child, "ask", lambda question, seconds: ask(question, 0.3))
    found = largest_containing(random_3sat(20, 0), seconds=1)
    assert not found.proven and found.bound == 85 and child.process is None
    monkeypatch.undo()
    assert largest_containing(random_3sat(20, 0)).proven


def test_a_missing_solver_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in ("pysat", "ortools") else find(name, *a))
    graph = random_3sat(21, 0)
    with pytest.raises(UserError, match="needs the package pysat, which is not installed; .*surrogates"):
        largest_containing(graph)
    with pytest.raises(UserError, match="needs the package ortools, which is not installed; .*surrogates"):
        largest_containing(make_graph("path", 9, [(i, i + 1) for i in range(8)]))
    assert largest_containing(random_3sat(12, 0)).solver == "enumeration"


def test_wrong_questions_are_answered_in_words():
    graph = random_3sat(21, 0)
    for start, solver, told in (
            ([0, 1], "auto", "not independent"), ([0, 0], "auto", "twice"), ([graph.n], "auto", "not in"),
            ([], "sat", "choose one of"), ([], "enumeration", "21 variables")):
        with pytest.raises(UserError, match=told):
            largest_containing(graph, start, solver)
    assert gap(7, 7) == 0 and gap(0, 5) == 1
    for size, optimum in ((3, 2), (0, 0)):
        with pytest.raises(UserError):
            gap(size, optimum)


# ---------- partial sets

def test_values_are_what_trying_everything_gives(rng_seed):
    pytest.importorskip("ortools", reason="graphs that are no formulas need a solver")
    for k in range(6):
        graph = some_graph(random, 9, 0.3)
        best = largest_containing(graph)
        for _ in range(4):
            s = partial_set(graph, best.nodes, most_nodes(graph, best.size), np.random.default_rng(rng_seed + k))
            assert independent(graph, s) and largest_containing(graph, s).size == brute(graph, s) <= best.size


def test_labels_are_true_vary_and_repeat(rng_seed):
    labels = draw_labels("random3sat-9", 6, 8, seed=rng_seed)
    assert labels.counts == dict(graphs=dict(read=6, used=6, skipped={}), sets=dict(read=48, used=48, skipped={}))
    assert len(set(labels.lost)) > 2 and labels.lost.min() >= 0
    for row in random.sample(range(48), 12):
        assert largest_containing(
            labels.graphs[labels.which[row]], labels.nodes(row), "enumeration").size == labels.value[row]
    assert draw_labels("random3sat-9", 6, 8, seed=rng_seed).hash == labels.hash != draw_labels(
        "random3sat-9", 6, 8, seed=rng_seed + 1).hash


def test_what_is_left_out_is_counted(monkeypatch):
    from flashoptim_nb.surrogates.domains.independent_sets import partial as P
    from flashoptim_nb.surrogates.domains.independent_sets.graphs import GraphSet
    monkeypatch.setattr(P, "load_graphs", lambda *a: GraphSet(
                            (make_graph("points", 4, []), random_3sat(6, 0)), 3, {"more than 5 nodes": 1}))
    counts = draw_labels("any", 3, 2).counts["graphs"]
    assert (counts["read"] == counts["used"] + sum(counts["skipped"].values()) == 3
            and any("no edges" in k for k in counts["skipped"]))
    monkeypatch.setattr(P, "load_graphs", lambda *a: GraphSet((make_graph("points", 4, []),), 1, {}))
    with pytest.raises(UserError, match="no edges"):
        draw_labels("any", 1, 2)


def test_a_file_of_labels_is_read_back_or_refused(tmp_path, rng_seed):
    labels = draw_labels("random3sat-6", 4, 3, seed=rng_seed)
    path = save_labels(tmp_path / "below" / "labels.npz", labels)
    back = load_labels(path)
    assert (back.hash == labels.hash and back.graphs[1].clauses == labels.graphs[1].clauses
            and [p.name for p in path.parent.iterdir()] == ["labels.npz"])
    whole = dict(np.load(path))
    np.savez(path, **whole | dict(value=whole["value"] - 1))
    with pytest.raises(UserError, match="not those that were written"):
        load_labels(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="no file of labels"):
        load_labels(path)


def test_graphs_that_are_no_formulas_keep_their_edges_in_a_file(tmp_path, rng_seed):
    graphs = tuple(some_graph(random, 8, 0.4) for _ in range(2)) + (random_3sat(4, 0),)
    from flashoptim_nb.surrogates.domains.independent_sets.partial import Labels
    labels = Labels(graphs, np.ones(3, np.int32), np.array([0, 2], np.int32), np.array([[0, -1], [1, -1]], np.int16),
                    np.ones(2, np.int32), {}, {})
    back = load_labels(save_labels(tmp_path / "x.npz", labels))
    assert all((a.edges == b.edges).all() and a.n == b.n for a, b in zip(graphs, back.graphs))


def test_splits_are_disjoint_by_graph(rng_seed):
    for n in (3, 4, 10, 97):
        parts = split_graphs(n, rng_seed)
        assert sorted(np.concatenate(list(parts.values()))) == list(range(n)) and all(map(len, parts.values()))
    data = Combinatorial(draw_labels("random3sat-6", 12, 4, seed=rng_seed), width=8, depth=1, seed=rng_seed)
    graphs = [set(data.labels.which[data.rows[s]].tolist()) for s in ("train", "val", "test")]
    assert not any(a & b for a, b in combinations(graphs, 2)) and sum(data.size(s) for s in data.rows) == 48


# ---------- the domain and its network

@pytest.fixture(scope="module")
def data():
    return load_combinatorial("laptop", instances=12, sets=4)


def test_padding_changes_neither_values_nor_gradients(data, rng_seed):
    net, batch = data.build(16), data.batch("train", np.array([3, 1, 2]))
    padded = data.padded(batch)
    assert padded.x.shape == data.padded(data.batch("train", np.array([5, 6, 7]))).x.shape
    grads = []
    for b in (batch, padded):
        net.zero_grad()
        out = net(b)
        out.square().sum().backward()
        grads.append(torch.cat([out.detach().flatten(), *(p.grad.flatten() for p in net.parameters())]))
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["autocast", "cast", "checkpointing"])
def test_precisions_stay_near_float64(data, how, rng_seed):
    net, batch = GraphNet(6, 16, 3), data.batch("val", np.arange(3))
    wide = GraphNet(6, 16, 3).double()
    wide.load_state_dict(net.state_dict())
    exact = wide(batch)
    net.checkpointing = how == "checkpointing"
    if how == "cast":
        cast_model(net, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        out = net(batch)
    out.sum().backward()
    assert out.dtype == torch.float32 and (out - exact).abs().max() < (1e-5 if how == "checkpointing" else 0.05)
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_twice_the_parameters_are_not_twice_the_width(data):
    def parameters(width):
        return sum(p.numel() for p in data.build(width).parameters())
    for width in (24, 64, 200):
        twice = data.width_for(2 * parameters(width))
        assert abs(parameters(twice) / parameters(width) - 2) < 0.06 and twice < 1.6 * width


def test_modules_import_without_any_solver():
    code = ("import sys\nfor m in ('pysat', 'ortools'): sys.modules[m] = None\n"
            "import flashoptim_nb.surrogates.domains.independent_sets.exact, "
            "flashoptim_nb.surrogates.domains.independent_sets.domain, "
            "flashoptim_nb.surrogates.domains.independent_sets.problem")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode == 0


# ---------- proposing

def test_proposed_sets_are_independent_scored_exactly_and_counted(data, rng_seed):
    from flashoptim_nb.surrogates.domains.independent_sets.problem import set_problems
    net = data.build(8).eval()
    problem, = set_problems(data, lambda batch: net(batch) * data.std + data.mean, instances=2)
    policy, generator = problem.policy(16), torch.Generator().manual_seed(rng_seed)
    for instance in range(problem.instances):
        for x in (policy(instance, 6, generator).x, problem.random(instance, 6, generator)):
            true = problem.objective(instance, x)
            for row, score in zip(x.tolist(), true.tolist()):
                nodes = [v for v in row if v >= 0]
                assert independent(problem.graphs[instance], nodes)
                assert score == largest_containing(
                    problem.graphs[instance], nodes, "enumeration").size / problem.optimum[instance] <= 1
            assert problem.predicted(instance, x).shape == (6,) and problem.features(instance, x).isfinite().all()
    assert not problem.refused


def test_log_probabilities_of_drawn_sets_are_the_enumerated_ones(rng_seed):
    from flashoptim_nb.surrogates.domains.independent_sets.problem import draw_sets
    graph = some_graph(random, 6, 0.4)
    score = torch.randn(6) / 4  # weights of like size: a mean of few large ones would not be known from its spread
    drawn = draw_sets(torch.from_numpy(graph.adjacency), 3, 3000, lambda chosen: score.expand(len(chosen), 6),
                      torch.Generator().manual_seed(rng_seed))
    sets = {tuple(v for v in row if v >= 0) for row in drawn.x.tolist()}
    assert all(independent(graph, s) and (len(s) == 3 or not (states(graph, s) == 0).any()) for s in sets)
    every = {s for k in (1, 2, 3) for s in combinations(range(6), k)
             if independent(graph, s) and (k == 3 or not (states(graph, s) == 0).any())}
    estimate = (drawn.log_pb - drawn.log_pf).double().exp()
    assert abs(estimate.mean().item() - len(every)) < 6 * estimate.std().item() / 3000**0.5 + 1e-6


# ---------- on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize("how", ["fp32", "mixed_bf16", "mixed_fp16", "cast"])
def test_the_network_on_a_gpu_stays_near_float64(data, how, rng_seed):
    net, batch = GraphNet(6, 64, 4), data.batch("train", np.arange(16))
    wide = GraphNet(6, 64, 4).double()
    wide.load_state_dict(net.state_dict())
    exact, net = wide(batch), net.cuda()
    if how == "cast":
        cast_model(net, torch.bfloat16)
    dtype = torch.float16 if how == "mixed_fp16" else torch.bfloat16
    with torch.autocast("cuda", dtype, enabled=how.startswith("mixed")):
        out = net(batch.to("cuda"))
    out.sum().backward()
    assert ((out.cpu() - exact).abs().max() < (1e-4 if how == "fp32" else 0.1)
            and all(p.grad.isfinite().all() for p in net.parameters()))


@pytest.mark.cuda
def test_padded_batches_replay_in_one_cuda_graph(data):
    net = data.build(16).cuda()
    one, two = (data.padded(data.batch("train", np.arange(i, i + 4))).to("cuda") for i in (0, 4))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            net(one)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = net(one)
    with torch.no_grad():
        for name in ("x", "src", "dst", "of"):
            getattr(one, name).copy_(getattr(two, name))
        graph.replay()
        torch.testing.assert_close(out, net(two), rtol=1e-4, atol=1e-4)


@pytest.mark.cuda
def test_policies_propose_on_a_gpu(data, rng_seed):
    from flashoptim_nb.surrogates.domains.independent_sets.problem import set_problems
    problem, = set_problems(data, lambda batch: torch.zeros(len(batch), 1), instances=1, device="cuda")
    drawn = problem.policy(16)(0, 8, torch.Generator("cuda").manual_seed(rng_seed))
    drawn.log_pf.sum().backward()
    assert (drawn.x.device.type == "cuda" and (problem.objective(0, drawn.x) > 0).all()
            and problem.features(0, drawn.x).isfinite().all())
    assert (problem.predicted(0, drawn.x) == 1).all()


def test_what_is_no_graph_or_formula_is_refused():
    from flashoptim_nb.surrogates.domains.independent_sets.graphs import checked, formula_graph, make_graph, random_3sat
    for n, edges in ((3, [[0, 3]]), (3, [[-1, 0]]), (3, [[1, 1]]), (3, [[0, 1.5]]), (3, [[0, float("nan")]]),
                     (3, [[0, 1, 2], [1, 2, 0]]), (3, [0, 1]), (3, [[0, 1], [2]]), (3, [["a", "b"]]), (3, [[0, None]]),
                     (3, [[True, False]]), (0, []), (-1, []), (2.5, []), (True, []), (2**40, [])):
        with pytest.raises(UserError): print(n, edges), make_graph("g", n, edges)
    assert (make_graph("g", 3, [[1, 0], [0, 1], [2, 1]]).edges.tolist() == [[0, 1], [1, 2]]
            and not len(make_graph("g", 3, []).edges))
    for clauses in ([], [[]], [[1], []], [[1, 0]], [[1.5]], [[1, float("nan")]], [["a"]], [[[1]]], [[2**70]], [[2**15]],
                    [[True]], [[None]], [1, 2], None):
        with pytest.raises(UserError): print(clauses), formula_graph("f", clauses)
    assert formula_graph("f", [[1, -1, 1], np.array([2, -1])]).n == 5
    graph = make_graph("g", 3, [[0, 1]])
    for nodes in ([3], [-1], [0, 0], [0.5], [float("nan")], ["a"], [2**70], [True]):
        with pytest.raises(UserError): print(nodes), checked(graph, nodes)
    for ratio in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError): random_3sat(5, 0, ratio)


def test_networks_of_graphs_refuse_nodes_that_are_not_there():
    import dataclasses

    from flashoptim_nb.surrogates.domains.independent_sets.network import GraphBatch, GraphNet
    from flashoptim_nb.surrogates.domains.independent_sets.domain import members
    g = GraphBatch(torch.randn(4, 6), torch.tensor([0, 1, 2, 3]), torch.tensor([1, 0, 3, 2]),
                   torch.tensor([0, 0, 1, 1]), torch.zeros(2, 1))
    model = GraphNet(6, 8, 2)
    model(g)
    for name, wrong in (("src", 4), ("src", -1), ("dst", 4), ("dst", -1), ("of", 3), ("of", -1)):
        with pytest.raises(UserError):
            model(dataclasses.replace(g, **{name: getattr(g, name).index_fill(0, torch.tensor([2]), wrong)}))
    assert members(torch.tensor([[2, -1]]), 3).tolist() == [[False, False, True]]
    for wrong in (3, 4, -2):
        with pytest.raises(UserError): members(torch.tensor([[wrong, -1]]), 3)
@pytest.fixture
def benchmarks(tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHOPTIM_DATA", str(tmp_path))
    for name in ("satlib", "dimacs_clique"): (tmp_path / name).mkdir()
    return tmp_path


U8 = np.zeros(2, np.uint8)


@pytest.mark.parametrize(
    "arrays", [
        dict(other=U8), {"uf20-91/names": np.array([1.5]), "uf20-91": np.zeros((1, 3, 3))},
        {"uf20-91/names": np.array([b"a"]), "uf20-91": np.array(3)},
        {"uf20-91/names": np.array([b"a"]), "uf20-91": np.full((1, 2, 3), 0.5)},
        {"uf20-91/names": np.array([b"a"]), "uf20-91": np.full((1, 2, 3), 2**40)},
        {"uf20-91/names": np.array([b"\xff"]), "uf20-91": np.ones((1, 2, 3), int)},
        {"uf20-91/names": np.array([b"a"]), "uf20-91": np.zeros((0, 3, 3), int)},
        {"uf20-91/names": np.array([b"a"]), "uf20-91/lits": np.ones(4, int), "uf20-91/ptr": np.array([0, 9])},
        {"uf20-91/names": np.array([b"a"]), "uf20-91": np.array([{}], object)},
    ], ids=range(9))
def test_a_file_of_formulas_that_is_none_is_refused_in_words(benchmarks, arrays):
    np.savez(benchmarks / "satlib/satlib_cnf.npz", **arrays)
    with pytest.raises(UserError): load_graphs("uf20-91", 3)


@pytest.mark.parametrize(
    "arrays", [{"c5": U8, "c5/n": np.array(10**9)}, {"c5": U8, "c5/n": np.array(-1)},
               {"c5": U8, "c5/n": np.array([5, 5])}, {"c5": U8, "c5/n": np.array(5.0)}, {"c5": U8},
               {"c5": U8.astype(float), "c5/n": np.array(5)}, {"c5": U8[:1], "c5/n": np.array(5)}], ids=range(7))
def test_a_file_of_cliques_that_is_none_is_refused_in_words(benchmarks, arrays):
    np.savez(benchmarks / "dimacs_clique/dimacs_clique.npz", **arrays)
    with pytest.raises(UserError): load_graphs("dimacs")


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04", b"PK\x05\x06" + b"\0" * 18])
def test_a_file_that_is_no_archive_is_refused_in_words(benchmarks, content):
    for name, family in (("satlib/satlib_cnf.npz", "uf20-91"), ("dimacs_clique/dimacs_clique.npz", "dimacs")):
        (benchmarks / name).write_bytes(content)
        if family == "uf20-91" or content != b"PK\x05\x06" + b"\0" * 18:
            with pytest.raises(UserError): load_graphs(family, 3)


def test_arrays_that_unpack_to_more_than_is_read_are_not_unpacked(tmp_path, monkeypatch):
    from flashoptim_nb.base import files
    np.savez_compressed(tmp_path / "large.npz", a=np.zeros(2**20))
    monkeypatch.setattr(files, "LARGEST_ARRAYS", 2**20)
    with pytest.raises(UserError, match="unpacks to"): files.read_npz(tmp_path / "large.npz")


@pytest.mark.parametrize("clauses", [[["a"]], [[[1]]], [[2**70]], [[1.5]], [1], [None], [["1"]], [[10**5000]]])
def test_a_clause_that_is_none_is_refused_in_words(clauses):
    with pytest.raises(UserError, match="formula 'f'"): formula_graph("f", [*clauses, [1, 2, 3]])


@pytest.mark.parametrize("family", ["random3sat-\u00b2", "random3sat-" + "9" * 5000, "random3sat-1e3"])
def test_a_family_of_no_size_is_none(family):
    with pytest.raises(UserError, match="family of graphs"): load_graphs(family, 1)


@pytest.mark.parametrize(
    "harm", [dict(formula_ends=np.array(3)), dict(edge_ends=np.array([0.5])), dict(about=np.array("[" * 100_000)),
             dict(about=np.array("[]")), dict(about=np.array('{"graphs": [{}]}')), dict(sets=np.array(["x"])),
             dict(formulas=np.ones((3, 3))), dict(edge_ends=np.array([], int))], ids=range(8))
def test_labels_of_another_shape_are_refused_in_words(tmp_path, harm):
    path = save_labels(tmp_path / "labels.npz", draw_labels("random3sat-6", 3, 2))
    np.savez(path, **(dict(np.load(path)) | harm))
    with pytest.raises(UserError): load_labels(path)
