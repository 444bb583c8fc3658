"""Amortized optimization: exact gradients, balance, frozen surrogates,
and true scores kept apart from predicted ones."""
import functools
import itertools
import math

import pytest
import torch

from flashoptim_nb.surrogates.gflownet import balance_loss, gflownet, train_gflownet
from flashoptim_nb.surrogates.policies import BoxPolicy, PoolPolicy, SubsetPolicy, draw_ordered, log_ordered
from flashoptim_nb.surrogates.problem import frozen, verify
from flashoptim_nb.surrogates.reinforce import propose, reinforce, reinforce_loss, train_reinforce
from flashoptim_nb.surrogates.solutions import shared_out, solve
from flashoptim_nb.surrogates.domains.toy.problem import ToyProblem, toy, toy_surrogate

KINDS = ["pool", "box", "subset"]


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


# gradients

@pytest.mark.parametrize("entropy", [0.0, 0.4])
def test_reinforce_is_unbiased_by_enumeration(rng_seed, entropy):
    "Over all triples of samples, weighted by probability, the estimate is the exact gradient of J + c H."
    logits, score = torch.randn(4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64)
    p = logits.softmax(0)
    exact, = torch.autograd.grad((p * score).sum() - entropy * (p * p.log()).sum(), logits)
    log_p = logits.log_softmax(0)
    triples = [list(t) for t in itertools.product(range(4), repeat=3)]
    estimate = sum(log_p[t].sum().exp().detach() * -reinforce_loss(log_p[t], score[t], entropy)[0] for t in triples)
    assert torch.allclose(torch.autograd.grad(estimate, logits)[0], exact, atol=1e-12)


def test_reinforce_of_sets_follows_the_exact_gradient(rng_seed):
    """The gradient through log-probabilities of ordered draws, averaged over many samples,
    against enumeration of the orders."""
    logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
    value = torch.rand(5, dtype=torch.float64)
    orders = torch.tensor(list(itertools.permutations(range(5), 2)))
    exact, = torch.autograd.grad((log_ordered(logits, orders).exp() * value[orders].prod(1)).sum(), logits)
    index, log_pf = draw_ordered(logits, 2, 40_000, torch.Generator().manual_seed(rng_seed))
    loss, _ = reinforce_loss(log_pf, value[index].prod(1))
    estimate, = torch.autograd.grad(-loss, logits)
    assert (estimate - exact).norm() < 0.1 * exact.norm() + 0.01


def test_scores_are_numbers_not_graphs(rng_seed):
    "A score that could be differentiated is not."
    logits = torch.zeros(3, requires_grad=True)
    score = torch.rand(3, requires_grad=True)
    reinforce_loss(logits.log_softmax(0), score, 0.1)[0].backward()
    assert score.grad is None
    balance_loss(logits.log_softmax(0), torch.zeros(3), score, 2.0, torch.zeros(()))[0].backward()
    assert score.grad is None


def test_box_density_is_that_of_the_squashed_normal(rng_seed):
    "log_pf against torch's own transformed distribution, away from the start."
    policy = BoxPolicy(torch.randn(2, 3), dims=3, width=8)
    for p in policy.parameters(): torch.nn.init.normal_(p, std=0.5)
    drawn = policy(1, 200, torch.Generator().manual_seed(rng_seed))
    mean, log_std = policy.head(1).split(3)
    normal = torch.distributions.Normal(mean.double(), log_std.clamp(-4, 2).exp().double())
    law = torch.distributions.TransformedDistribution(normal, [torch.distributions.SigmoidTransform()])
    inside = ((drawn.x > 1e-3) & (drawn.x < 1 - 1e-3)).all(1)
    assert (inside.any()
            and torch.allclose(drawn.log_pf[inside].double(), law.log_prob(drawn.x[inside].double()).sum(1), atol=1e-2))


# trajectory balance

def test_balance_loss_is_torchgfns(rng_seed):
    gfn = pytest.importorskip("gfn.gflownet", reason="torchgfn is not installed")

    log_pf, log_pb, score, log_z, beta = torch.randn(9), -torch.rand(9), torch.rand(9), torch.randn(()), 3.0

    class Given(gfn.TBGFlowNet):
        def __init__(self): torch.nn.Module.__init__(self); self.logZ = torch.nn.Parameter(log_z.clone())
        def get_trajectories_scores(self, *_, **__): return None, None, log_pf - log_pb - beta * score

    assert torch.allclose(balance_loss(log_pf, log_pb, score, beta, log_z)[0], Given().loss(None, None), rtol=1e-6)


def test_gflownet_samples_in_proportion_to_reward():
    problem, beta = toy("pool"), 3.0
    def distance(steps):
        policy, log_z, _ = train_gflownet(problem, seed=1, steps=steps, beta=beta)
        target = [beta * problem.predicted(t, problem.enumerate()) for t in range(problem.instances)]
        drawn = [policy(t, 20_000, torch.Generator().manual_seed(t)).x.bincount(minlength=24) / 20_000
                 for t in range(problem.instances)]
        return (max((d - s.softmax(0)).abs().sum().item() / 2 for d, s in zip(drawn, target)),
                (log_z - torch.stack(target).logsumexp(1)).abs().max())
    (before, _), (after, z_error) = distance(1), distance(300)
    assert after < 0.1 and after < before / 3 and z_error < 0.1


def test_log_z_of_an_instance_that_was_never_drawn_is_unknown():
    "More instances than steps: what was not visited has no log Z, and nothing breaks."
    problem = ToyProblem("pool", instances=12)
    _, log_z, rows = train_gflownet(problem, seed=0, steps=2, spread=3, batch=12)
    assert 3 <= log_z.isfinite().sum() <= 6 and all(math.isfinite(r["loss"]) for r in rows)


# a surrogate that stays as it is, and one that fails

@pytest.mark.parametrize("kind", KINDS)
def test_optimizing_changes_nothing_in_the_surrogate(kind):
    net = toy_surrogate(ToyProblem(kind))
    net.zero_grad(set_to_none=True)
    net.train()  # as it is left by training: its normalization would take in whatever passes
    problem, before = ToyProblem(kind, frozen(net)), {k: v.clone() for k, v in net.state_dict().items()}
    list(solve([problem], ["reinforce", "gflownet"], runs=2, steps=5, batch=16, most=3))
    if _has_botorch(): list(solve([problem], ["bayes"], runs=1, most=6, settings={"bayes": {"samples": 20}}))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and all(m.training for m in net.modules())


class Faulty(ToyProblem):
    "A surrogate that gives no number for some of the candidates, or for all."
    share = 0.3
    def predicted(self, t, x):
        seen = super().predicted(t, x)
        return seen.masked_fill(
            torch.rand(len(seen), generator=torch.Generator().manual_seed(len(seen))) < self.share, torch.nan)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train", [train_reinforce, train_gflownet])
def test_nan_predictions_are_left_out_and_counted(kind, train):
    problem = Faulty(kind)
    policy, *_, rows = train(problem, seed=0, steps=60)
    assert weights(policy).isfinite().all() and all(r["taken"] for r in rows)
    assert 0.1 * 64 < sum(r["skipped"] for r in rows) / len(rows) < 0.5 * 64
    assert sum(r["score"] for r in rows[-10:]) > 1.2 * sum(r["score"] for r in rows[:10])
    found = propose(problem, policy, 0, "x", seed=0, most=4, skipped=5)
    assert found.skipped > 5 and math.isfinite(found.predicted)


@pytest.mark.parametrize("optimize", [reinforce, gflownet])
def test_a_surrogate_without_any_score_still_gives_an_outcome(optimize):
    problem = Faulty("box")
    problem.share = 2.0
    found = optimize(problem, 0, steps=3, samples=10, most=2)[0]
    assert (found.skipped == 3 * 64 + 10 and found.evaluations == 2 and math.isnan(found.predicted)
            and math.isnan(found.fooled))
    row = next(solve([problem], [optimize.__name__], runs=1, steps=3, most=2))
    assert row["predicted"] is None and row["fooled"] is None


# outcomes

def test_predicted_and_true_are_kept_apart(rng_seed):
    """The surrogate picks what is evaluated; the true score picks the answer;
    infeasible and failed verifications count as 0."""
    class Lying(ToyProblem):
        def predicted(self, t, x): return 1 - super().objective(t, x).float() + 2
        def objective(self, t, x):
            true = super().objective(t, x)
            return torch.where(torch.arange(len(x)) == 0, torch.nan, torch.where(torch.arange(len(x)) == 1, 0.0, true))
    problem = Lying("pool")
    found = verify(problem, 0, problem.enumerate(), "x", most=6)
    # the six worst are what this surrogate likes best
    honest = ToyProblem("pool").objective(0, problem.enumerate()).sort().values[:6]
    assert found.objective == pytest.approx(honest[-1].item()) and found.infeasible == 2 and found.evaluations == 6
    assert found.predicted == pytest.approx(3 - found.objective, abs=1e-5)
    assert found.fooled == pytest.approx(((3 - honest).sum() - honest[2:].sum()).item() / 6, abs=1e-5)
    assert list(found.curve) == sorted(found.curve) and found.curve[-1] == found.objective


def test_no_candidate_is_evaluated_twice():
    problem = ToyProblem("pool")
    asked = []
    original = problem.objective
    problem.objective = lambda t, x: asked.append(x) or original(t, x)
    found = reinforce(problem, 0, instances=[1], samples=500, most=50)[0]
    seen = torch.cat(asked[-1:])
    assert found.evaluations == len(seen) == len(seen.unique()) <= 24


def test_long_curves_are_thinned_to_fifty_points_and_keep_both_ends():
    problem = ToyProblem("box")
    found = verify(problem, 0, torch.rand(400, 2), "x", most=300)
    assert len(found.curve) == 50 and found.curve[-1] == found.objective and found.evaluations == 300


# determinism

@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_names_a_result(kind, rng_seed):
    options = dict(runs=3, steps=8, batch=16, most=4, seed=rng_seed % 1000, settings={"bayes": {"samples": 24}})
    methods = ["reinforce", "gflownet"] + (["bayes"] if _has_botorch() else [])
    state = torch.get_rng_state()
    one = [dict(r, seconds=0) for r in solve([toy(kind)], methods, **options)]
    assert torch.equal(state, torch.get_rng_state())  # nobody else's randomness is touched
    torch.rand(3)
    two = [dict(r, seconds=0) for r in solve([toy(kind)], methods, **options)]
    other = [dict(r, seconds=0) for r in solve([toy(kind)], methods, **{**options, "seed": options["seed"] + 100})]
    assert one == two and one != other


def test_runs_are_shared_out_exactly():
    for runs, instances, most in [(100, 7, 20), (1, 5, 20), (100, 1, 20), (33, 1000, 20)]:
        plan = shared_out(runs, instances, most)
        assert sum(map(len, plan)) == runs and all(len(set(p)) == len(p) and max(p) < instances for p in plan)


# Bayesian optimization

def _has_botorch():
    try:
        import botorch  # noqa: F401
        return True
    except ImportError:
        return False


needs_botorch = pytest.mark.skipif(not _has_botorch(), reason="botorch is not installed")


@needs_botorch
def test_bayes_finds_a_known_optimum_that_the_surrogate_denies():
    "The surrogate sees nothing at all: what is found, the residual process found."
    from flashoptim_nb.surrogates.bayes import bayes
    class Blind(ToyProblem):
        def predicted(self, t, x): return torch.zeros(len(x))
    found = bayes(Blind("box", instances=2), seed=0, most=30)
    assert all(f.objective > 0.9 for f in found)


@needs_botorch
def test_bayes_spends_its_budget_on_different_candidates_and_takes_a_policys():
    from flashoptim_nb.surrogates.bayes import bayes
    problem = toy("box")
    policy, _ = train_reinforce(problem, seed=0, steps=40)
    found = bayes(problem, 0, instances=[2], policy=policy, samples=60, most=8)[0]
    assert found.evaluations == 8 and found.proposed == 60 and found.objective > 0.9
    assert bayes(ToyProblem("pool"), 0, instances=[0], most=40)[0].evaluations <= 24


@needs_botorch
def test_bayes_leaves_out_candidates_without_a_score():
    from flashoptim_nb.surrogates.bayes import bayes
    found = bayes(Faulty("box"), 0, instances=[0], samples=50, most=6)[0]
    assert found.skipped > 0 and found.proposed + found.skipped == 50 and math.isfinite(found.predicted)


# policies

def test_policies_start_uniform_and_of_one_seed():
    context = torch.rand(3, 2)
    for policy in (PoolPolicy(context, torch.rand(10, 2), 8), SubsetPolicy(context, 6, 2, 8)):
        g = torch.Generator().manual_seed(0)
        drawn = policy(2, 20, g)
        assert torch.allclose(drawn.log_pf, drawn.log_pf[0].expand(20), atol=1e-5)
        assert drawn.log_pf.requires_grad and not drawn.log_pb.requires_grad


# on a GPU

@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_policies_and_problems_live_on_the_gpu(kind):
    problem = ToyProblem(kind, device="cuda")
    methods = ["reinforce", "gflownet"] + (["bayes"] if _has_botorch() else [])
    rows = list(solve([problem], methods, runs=2, steps=60, most=8))
    assert all(r["objective"] > 0.7 for r in rows)
    assert next(train_reinforce(problem, 0, steps=1)[0].parameters()).is_cuda


# molecules of a wanted logP, put together from fragments

@pytest.fixture(scope="module")
def drugs():
    pytest.importorskip("rdkit", reason="rdkit is not installed")
    from flashoptim_nb.surrogates.domains.drugs.domain import load_drugs
    return load_drugs("laptop", rows=200, vocabulary=150, cores=5, ends=8)


def exact(drugs, wanted=(1.0, 3.0)):
    "The problem with the truth as its surrogate."
    from flashoptim_nb.surrogates.domains.drugs.problem import DrugProblem
    class Exact(DrugProblem):
        def predicted(self, t, x):
            score = torch.tensor([worth(t, tuple(triple)) for triple in x.tolist()])
            return score.masked_fill(torch.tensor([s is None for s in self.smiles(x)]), torch.nan)
    problem = Exact(drugs, None, wanted)
    worth = functools.cache(lambda t, triple: problem.objective(t, torch.tensor([triple])).item())
    return problem


def every(problem):
    "All triples that fit."
    fits = problem.fits
    return torch.tensor([(c, a, b) for c in range(fits.shape[1]) for a in range(fits.shape[2])
                         for b in range(fits.shape[2]) if fits[0, c, a] and fits[1, c, b]])


def test_a_fragment_policy_is_a_distribution_over_what_fits(drugs, rng_seed):
    "By enumeration: probabilities sum to one, and samples come as often as they say."
    problem = exact(drugs)
    policy = problem.policy(8)
    for p in policy.parameters(): torch.nn.init.normal_(p, std=0.4)
    triples = every(problem)
    with torch.no_grad():
        drawn = policy(1, 30_000, torch.Generator().manual_seed(rng_seed))
        state = policy.state(policy.head.context[1])
        log_p = policy.head(1).log_softmax(0)[triples[:, 0]]
        state = state + policy.core(triples[:, 0])
        for side in (0, 1):
            step = policy.out[side](state).masked_fill(~problem.fits[side, triples[:, 0]], -torch.inf).log_softmax(1)
            log_p = log_p + step.gather(1, triples[:, side + 1 : side + 2]).squeeze(1)
            state = state + policy.end(triples[:, side + 1])
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-4)
    number = {tuple(t): i for i, t in enumerate(triples.tolist())}
    index = torch.tensor([number[tuple(t)] for t in drawn.x.tolist()])
    assert torch.allclose(drawn.log_pf, log_p[index], atol=1e-4)
    assert (index.bincount(minlength=len(triples)) / len(index) - log_p.exp()).abs().sum() / 2 < 0.1


@pytest.mark.parametrize("optimize", [reinforce, gflownet])
def test_optimizers_beat_chance_and_come_near_the_best_molecule(drugs, optimize):
    problem = exact(drugs)
    for found in optimize(problem, 0):
        scores = problem.objective(found.instance, every(problem))
        assert (found.objective >= 0.95 * scores.max() > scores.mean()
                and found.objective == pytest.approx(found.predicted, abs=1e-6))


def test_what_is_no_molecule_is_skipped_and_counted(drugs):
    problem = exact(drugs)
    for i, triple in enumerate(every(problem).tolist()):
        if i % 2: problem.made[tuple(triple)] = None
    found = reinforce(problem, 0, instances=[0], steps=10, samples=50)[0]
    assert found.skipped > 100 and found.infeasible == 0
    assert problem.objective(0, every(problem))[1::2].abs().sum() == 0


def test_molecules_in_are_molecules_used_and_skipped(tmp_path):
    pytest.importorskip("rdkit", reason="rdkit is not installed")
    import lzma
    from flashoptim_nb.surrogates.domains.drugs.data import read_zinc
    from flashoptim_nb.surrogates.domains.drugs.domain import Drugs
    (tmp_path / "zinc250k").mkdir()
    lines = (["row,smiles,heavy_atoms,mol_wt,logP,qed,sa"]
             + [f"{i},{'C' * (i + 1)},{i},1,{i / 10},0.5,1" for i in range(20)])
    lines[3], lines[5], lines[7] = "2,CC,1,1,,0.5,1", "4,C1CC,1,1,0.1,0.5,1", "6,CCC,1,1,nan,0.5,1"
    (tmp_path / "zinc250k" / "zinc_20k_props.csv.xz").write_bytes(lzma.compress("\n".join(lines).encode()))
    domain = Drugs(read_zinc(root=tmp_path), 4)
    counts = domain.counts
    assert (counts["rows"] == 20 == counts["used"] + sum(counts["skipped"].values())
            and counts["skipped"] == {"no number": 2, "no molecule": 1})
    assert counts["train"] + counts["val"] + counts["test"] == counts["used"] == 17
    rows = [set(domain.rows[s]) for s in ("train", "val", "test")]
    assert not rows[0] & rows[1] and not rows[1] & rows[2] and not rows[0] & rows[2]


def test_drugs_are_the_same_each_time(drugs):
    from flashoptim_nb.surrogates.domains.drugs.domain import load_drugs
    again = load_drugs("laptop", rows=200, vocabulary=150, cores=5, ends=8)
    assert (again.parts.cores == drugs.parts.cores and again.parts.ends == drugs.parts.ends
            and again.data_hash == drugs.data_hash)
