"""Molecules: data, geometry, bases and network, against definitions and against PyG's own."""
import dataclasses
import importlib.util

import numpy as np
import pytest
import torch

from flashoptim_nb.base.compare import rel_err
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.surrogates.domains.molecules.geometry import Geometry
from flashoptim_nb.surrogates.domains.molecules.data import Structures, from_smiles, load_qm9, split_molecules
from flashoptim_nb.surrogates.domains.molecules.triplets import zonal_harmonics
from flashoptim_nb.surrogates.domains.molecules.bench import benchmark_molecules
from flashoptim_nb.surrogates.domains.molecules.bases import RadialBasis, spherical_radial
from flashoptim_nb.surrogates.domains.molecules.dimenet import DIMENET, DimeNetConfig, DimeNetPP, dimenet_width
from flashoptim_nb.optim.cast import cast_model
from flashoptim_nb.surrogates.domains.molecules.domain import MoleculeDomain, load_molecules

pyg = pytest.mark.skipif(importlib.util.find_spec("torch_geometric") is None, reason="torch_geometric is not installed")
rdkit = pytest.mark.skipif(importlib.util.find_spec("rdkit") is None, reason="rdkit is not installed")
SMALL = DimeNetConfig(hidden=16, blocks=2, int_emb=8, basis_emb=4, out_emb=24)


def clouds(counts, spread=1.5, device="cpu"):
    "Random molecules."
    counts = np.asarray(counts)
    pos = torch.randn(counts.sum(), 3) * spread
    z = torch.tensor([1, 6, 7, 8, 9])[torch.randint(5, (len(pos),))]
    return Geometry(z, pos, counts, device=device), pos


def awake(model):
    "Output layers start at zero: let everything matter."
    for output in model.output_blocks: torch.nn.init.normal_(output.lin.weight)
    return model


def gradients(model, batch):
    model.zero_grad()
    out = model(batch)
    out.square().sum().backward()
    return out.detach(), [p.grad.clone() for p in model.parameters()]


@pyg
def test_bases_and_angles_are_pygs(rng_seed):
    """Radial and spherical basis in float64, on edges and triplets of random molecules,
    the angle as DimeNetPlusPlus.forward takes it."""
    from torch_geometric.nn.models.dimenet import BesselBasisLayer, SphericalBasisLayer
    geometry, pos = clouds([9, 6])
    g, pos = geometry.batch(np.arange(2), torch.zeros(2, 1)).with_triplets(), pos.double()
    dist = (pos[g.target] - pos[g.source]).norm(dim=1)
    k, j, i = g.source[g.kj], g.target[g.kj], g.target[g.ji]
    jk, ij = pos[j] - pos[k], pos[i] - pos[j]
    angle = torch.atan2(torch.cross(ij, jk, dim=1).norm(dim=-1), (ij * jk).sum(-1))
    theirs = SphericalBasisLayer(7, 6)(dist, angle, g.kj)
    unit = (pos[g.target] - pos[g.source]) / dist[:, None]
    ours = (
        spherical_radial(dist)[g.kj].view(-1, 7, 6) * zonal_harmonics((unit[g.kj] * unit[g.ji]).sum(-1), 7)[:, :, None])
    assert rel_err(ours.flatten(1), theirs) < 1e-6  # PyG's zeros are rounded to fp32
    assert rel_err(RadialBasis().double()(dist), BesselBasisLayer(6).double()(dist)) < 1e-6
    fp32 = g.unit[g.kj].mul(g.unit[g.ji]).sum(-1)
    assert (fp32.double() - angle.cos()).abs().max() < 1e-5


@pyg
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_network_with_pygs_blocks_is_the_same(dtype, rng_seed):
    g = clouds([7, 1, 5])[0].batch(np.arange(3), torch.zeros(3, 1))
    g = dataclasses.replace(g, dist=g.dist.to(dtype), unit=g.unit.to(dtype)).with_triplets()
    model = awake(DimeNetPP(SMALL)).to(dtype)
    names = [name for name, _ in model.named_parameters()]
    out, grads = gradients(model, g)
    fused = DimeNetPP(SMALL, "fused").to(dtype)
    fused.load_state_dict(model.state_dict())
    ours = gradients(fused, g)
    theirs = gradients(model.with_pyg_blocks(), g)
    assert names == [name for name, _ in model.named_parameters()]
    limit = 1e-9 if dtype == torch.float64 else 1e-4
    for o, grad in ((out, grads), ours):
        assert rel_err(o, theirs[0]) < limit
        assert max(rel_err(a, b) for a, b in zip(grad, theirs[1])) < limit


@pyg
def test_the_parameters_are_counted_as_pyg_has_them():
    from torch_geometric.nn.models.dimenet import EmbeddingBlock, InteractionPPBlock, OutputPPBlock
    c = DIMENET["published"]
    with torch.device("meta"):
        act = torch.nn.SiLU()
        parts = [
            EmbeddingBlock(c.radial, c.hidden, act), *[InteractionPPBlock(c.hidden, c.int_emb, c.basis_emb, c.spherical,
                                                                          c.radial, c.before_skip, c.after_skip, act)]
                * c.blocks, *[OutputPPBlock(c.radial, c.hidden, c.out_emb, 1, c.output_layers, act)] * (c.blocks + 1)]
    assert c.radial + sum(p.numel() for part in parts for p in part.parameters()) == c.parameters


@pytest.mark.parametrize("interaction", ["triplets", "fused"])
@pytest.mark.parametrize("precision", ["autocast_bf16", "autocast_fp16", "cast"])
def test_reduced_precision_is_near(interaction, precision, rng_seed):
    """By the median of nine networks: of random ones a few in a hundred give an output that nearly cancels,
    and no precision is near that."""
    errors, finite = [], 0
    for _ in range(9):
        g = clouds([9, 12])[0].batch(np.arange(2), torch.zeros(2, 1))
        model = awake(DimeNetPP(SMALL, interaction))
        exact = model(g).detach()
        if precision == "cast": cast_model(model, torch.bfloat16)
        with torch.autocast(
                "cpu", torch.float16 if "fp16" in precision else torch.bfloat16, enabled=precision != "cast"):
            out = model(g)
        (1e-3 * out.sum() / out.detach().abs().max()).backward()
        assert out.dtype == torch.float32 and all(p.grad is not None for p in model.parameters())
        finite += all(p.grad.isfinite().all() for p in model.parameters())
        errors.append(rel_err(out, exact))
    assert np.median(errors) < 0.1, errors
    assert finite >= (7 if "fp16" in precision else 9)  # atoms drawn at random may lie so close that fp16 overflows


def test_rotating_and_reordering_changes_nothing(rng_seed):
    counts = np.array([8, 3, 11])
    geometry, pos = clouds(counts)
    turn = torch.linalg.qr(torch.randn(3, 3)).Q
    turned = Geometry(geometry.tables["z"], pos @ turn.T + 5, counts)
    model, order = awake(DimeNetPP(SMALL, "fused")), np.array([2, 0, 1])
    with torch.no_grad():
        a, b = model(geometry.batch(np.arange(3), torch.zeros(3, 1))), model(turned.batch(order, torch.zeros(3, 1)))
    assert rel_err(b, a[order]) < 1e-4


def test_one_atom_alone_has_no_edges(rng_seed):
    g = clouds([1])[0].batch(np.array([0]), torch.zeros(1, 1))
    for interaction in ("triplets", "fused"):
        assert torch.equal(awake(DimeNetPP(SMALL, interaction))(g), torch.zeros(1, 1))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e39])
def test_positions_that_are_not_finite_are_refused(wrong, rng_seed):
    pos = torch.randn(9, 3, dtype=torch.float64)
    pos[int(torch.randint(5, 9, ())), int(torch.randint(3, ()))] = wrong
    with pytest.raises(UserError, match="molecule 1 .* has the position"):
        Geometry(torch.ones(9, dtype=torch.uint8), pos, np.array([5, 4]))


@pytest.mark.parametrize(
    "counts", [[2], [4], [2, 2], [3, 0], [0, 3], [4, -1], [], [1.5, 1.5], [[3]], [float("nan")], ["3"], [2**40]])
def test_counts_that_do_not_match_the_atoms_are_refused(counts):
    with pytest.raises(UserError): Geometry(torch.tensor([8, 6, 8]), torch.eye(3), np.array(counts))


def test_atoms_that_cannot_be_are_refused():
    pos = torch.eye(3)
    for z in ([8, 6, 0], [8, -1, 8], [95, 6, 8], [8, 6.5, 8], [8, 6, float("nan")], [8, 6]):
        with pytest.raises(UserError, match="atomic number"): Geometry(torch.tensor(z), pos, np.array([3]))
    for distance in (0.0, 1e-30, 1e-4):
        with pytest.raises(UserError, match="two atoms in one place"):
            Geometry(torch.tensor([8, 6]), torch.tensor([[1.0, 2, 3], [1.0 + distance, 2, 3]]), np.array([2]))
    for cutoff in (0, -5.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match="cutoff"): Geometry(torch.tensor([8, 6, 8]), pos, np.array([3]), cutoff)
    for shape in ((3, 2), (2, 3), (9,)):
        with pytest.raises(UserError):
            Geometry(torch.tensor([8, 6, 8]),
                     torch.arange(9.0)[: shape[0] * (shape[1] if len(shape) > 1 else 1)].view(shape), np.array([3]))


@pytest.mark.parametrize("interaction", ["triplets", "fused"])
def test_a_batch_that_points_outside_its_tables_is_refused(interaction, rng_seed):
    g = clouds([7, 1, 5])[0].batch(np.arange(3), torch.zeros(3, 1)).with_triplets()
    model, (N, E) = awake(DimeNetPP(SMALL, interaction)), (len(g.z), len(g.source))
    for name, values in dict(z=(95, -1, 10**9), molecule=(4, -1), source=(N, -1), target=(N, -1), out_edge=(E, -1),
                             incoming=(-1, E + 1), outgoing=(-1, E + 1), kj=(E, -1), ji=(E, -1)).items():
        for value in values:
            wrong = getattr(g, name).clone()
            wrong[int(torch.randint(len(wrong), ()))] = value
            with pytest.raises(UserError): model(dataclasses.replace(g, **{name: wrong}))
    for name in ("z", "molecule", "source", "dist", "unit", "incoming", "outgoing", "out_edge"):
        with pytest.raises(UserError): model(dataclasses.replace(g, **{name: getattr(g, name)[1:]}))
    for which in ([3], [0, -1], [0.0], [[0]]):
        with pytest.raises(UserError): clouds([7, 1, 5])[0].batch(np.array(which), torch.zeros(len(which), 1))


def test_padding_leaves_every_molecule_and_gradient_as_it_was(rng_seed):
    g = clouds([7, 12, 2])[0].batch(np.arange(3), torch.zeros(3, 1)).with_triplets()
    n, e, t = (len(g.z) + int(torch.randint(1, 9, ())), len(g.source) + int(torch.randint(1, 99, ())),
               len(g.kj) + int(torch.randint(999, ())))
    for interaction in ("triplets", "fused"):
        model = awake(DimeNetPP(SMALL, interaction)).double()
        for a, b in zip(gradients(model, g), gradients(model, g.pad(n, e, t))):
            pairs = [(a, b)] if isinstance(a, torch.Tensor) else zip(a, b)
            assert all(rel_err(y, x) < 1e-6 for x, y in pairs)


def test_domain_is_a_function_of_its_arguments():
    a, b = load_molecules("laptop", limit=40), load_molecules("laptop", limit=40)
    assert a.data_hash == b.data_hash and torch.equal(a.mean, b.mean)
    assert load_molecules("laptop", limit=41).data_hash != a.data_hash
    assert sum(a.size(s) for s in ("train", "val", "test")) == a.counts["used"] == 40
    assert a.counts["given"] == a.counts["used"] + sum(a.counts["skipped"].values())
    torch.manual_seed(0); one = a.build(a.width)
    torch.manual_seed(0); two = a.build(a.width, fused=True, checkpointing=True)
    assert all(map(torch.equal, one.parameters(), two.parameters()))


@pytest.mark.parametrize("times", [0.5, 1.0, 2.0, 4.0])
def test_width_is_solved_for_parameters(times):
    for base in DIMENET.values():
        found = base.scaled(dimenet_width(round(times * base.parameters), base))
        assert abs(found.parameters / (times * base.parameters) - 1) < 0.12


@rdkit
def test_a_users_molecules(rng_seed):
    given = ["CCO", "no", "C", "[Na+].[Cl-]", "c1ccccc1", "N", "O", "CC", "C=C", "C#C", "CO", "CN", "CF", "C=O", "CC=O",
             "CCC"]
    mine = from_smiles(given)
    assert len(mine) + len(mine.skipped) == len(given) and [n for n, *_ in mine.skipped] == [1, 3]
    labelled = Structures(
        mine.z, mine.pos, mine.counts, mine.smiles, dict(gap=np.random.rand(len(mine))), mine.source, mine.skipped)
    domain = load_molecules("laptop", structures=labelled)
    assert domain.counts == dict(given=16, used=14, skipped={"beyond the limit": 0, "unusable": 2})
    assert domain.build(domain.width)(domain.batch("train", np.arange(3))).shape == (3, 1)
    with pytest.raises(UserError, match="labels"): load_molecules("laptop", structures=mine)
    with pytest.raises(UserError, match="13"): MoleculeDomain(labelled.take(np.arange(4)), SMALL)


@rdkit
def test_missing_values_among_smiles(rng_seed):
    "Passed over and named, or refused: in structures, fingerprints and properties alike."
    from flashoptim_nb.surrogates.domains.drugs.data import fingerprints, fragments, properties
    given = ["CCO", None, float("nan"), np.float32("nan"), "", " ", "no", "\ud800", "C"]
    mine = from_smiles(given)
    assert mine.smiles == ("CCO", "C") and [n for n, *_ in mine.skipped] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(UserError, match="missing"): from_smiles(given[:2], skip=False)
    for odd in (5, b"C", ["C"]):
        with pytest.raises(UserError, match="each is a text"): from_smiles(["C", odd])
    assert (fingerprints(given)[1].tolist() == np.isfinite(properties(given)).all(1).tolist()
            == [True] + [False] * 7 + [True])
    with pytest.raises(UserError, match="no core"): fragments(given, 2, 2)


def test_labels_that_are_not_finite_reach_no_training():
    qm9 = load_qm9().take(np.arange(60))
    for value in (np.nan, np.inf):
        gap = qm9.labels["gap"].copy()
        gap[17] = value
        spoiled = dataclasses.replace(qm9, labels=qm9.labels | dict(gap=gap))
        with pytest.raises(UserError, match="1 of 60 labels of 'gap'"): load_molecules("laptop", structures=spoiled)


def test_structures_have_to_fit_together():
    qm9 = load_qm9().take(np.arange(20))
    counts = qm9.counts.copy()
    counts[3] -= 1
    for wrong in (dict(counts=counts), dict(counts=qm9.counts[:-1]), dict(pos=qm9.pos * np.nan), dict(z=qm9.z[1:]),
                  dict(z=qm9.z * 0), dict(smiles=qm9.smiles[1:]), dict(labels=dict(gap=qm9.labels["gap"][1:]))):
        with pytest.raises(UserError): dataclasses.replace(qm9, **wrong)
    for which in ([20], [-1]):
        with pytest.raises(UserError): qm9.take(np.array(which))


@pytest.mark.skipif(importlib.util.find_spec("qm9pack") is None, reason="qm9pack is not installed")
def test_all_of_qm9_holds_the_shipped_slice():
    whole, part = load_qm9("all"), load_qm9()
    assert len(whole) == 130_831
    where = np.searchsorted(whole.labels["index"], part.labels["index"])
    assert (np.array_equal(whole.counts[where], part.counts)
            and np.allclose(whole.labels["gap"][where], part.labels["gap"]))


def test_split_is_the_published_one():
    parts = split_molecules(130_831)
    order = np.random.RandomState(42).permutation(np.arange(130_831))
    assert np.array_equal(parts["train"], order[:110_000]) and np.array_equal(parts["test"], order[120_000:])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_network(dtype, device, rng_seed):
    """The middle of five batches: the loss is a square,
    so that one batch whose output nearly cancels makes all of its hundred gradients uncertain at once."""
    flat = lambda out, grads: (out, *grads)
    counts = [18, 20, 1, 29] if device == "cuda" else [10, 12, 1, 17]  # kernels have tiles to fill, plain PyTorch has none
    errors = []
    for _ in range(5):
        g = clouds(counts, 2.0, device)[0].batch(np.arange(4), torch.zeros(4, 1))
        model = awake(DimeNetPP(DIMENET["published"])).to(device)
        exact = flat(*gradients(model.double(), g))
        model.float()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            same = flat(*gradients(model, g))
            model.interaction = "fused"
            ours = flat(*gradients(model, g))
        errors.append([[rel_err(o, e), rel_err(s, e)] for o, s, e in zip(ours, same, exact)])
    ours, same = np.median(errors, axis=0).T
    ratios = ours / np.maximum(same, 5e-6 if dtype == torch.float32 else 1e-2)
    # a kernel has the factor of 2; of a whole network's hundred tensors some may be unlucky together
    assert np.sqrt(np.square(ratios).mean()) <= 2 and np.quantile(ratios, 0.95) <= 3, ratios


@pytest.mark.cuda
def test_benchmark_on_the_gpu():
    rows = benchmark_molecules(
        "cuda", (8,), network="published", steps=2, warmup=1, domain=load_molecules("laptop", device="cuda"))
    losses = [r["loss"] for r in rows if r["kind"] == "molecule_step" and not r["reason"] and r["precision"] == "fp32"]
    assert len(losses) >= 6 and max(losses) - min(losses) < 1e-2 * max(losses)


@pytest.mark.cuda
@pytest.mark.parametrize("interaction,checkpointing", [("triplets", False), ("fused", False), ("fused", True)])
def test_captured_steps_are_the_eager_ones(interaction, checkpointing, rng_seed):
    "Forward and backward in a CUDA graph over filled-up batches: the loss and the gradients of each batch as without."
    from flashoptim_nb.surrogates.domains.molecules.bench import captured
    geometry, _ = clouds([12, 9, 15, 4, 11, 7], 2.0, "cuda")
    batches = [geometry.batch(np.array(w), torch.randn(3, 1)) for w in ([0, 1, 2], [3, 4, 5], [5, 2, 0])]
    sizes = geometry.room(3, np.arange(6))
    batches = [b.with_triplets().pad(*sizes) if interaction == "triplets" else b.pad(*sizes[:2]) for b in batches]
    model = awake(DimeNetPP(SMALL, interaction, checkpointing)).cuda()
    def learn(batch):
        loss = (model(batch) - batch.y).square().mean()
        loss.backward()
        return loss.detach()
    run = captured(model, learn, batches[0])
    found = []
    for batch in batches: found.append((run(batch).clone(), [p.grad.clone() for p in model.parameters()]))
    for batch, (loss, grads) in zip(batches, found):
        model.zero_grad(set_to_none=True)
        assert rel_err(loss, learn(batch)) < 1e-5
        assert max(rel_err(a, p.grad) for a, p in zip(grads, model.parameters())) < 1e-3


@rdkit
def test_a_molecule_that_takes_minutes_to_embed_is_refused_at_once():
    with pytest.raises(UserError, match="more than 200 atoms.*raise most_atoms"): from_smiles("C" * 10_000)
    with pytest.raises(UserError, match="more than 200 atoms"): from_smiles("C" * 100)
    assert [why for _, _, why in from_smiles(["C", "C" * 8], most_atoms=20).skipped] == [
        "more than 20 atoms, which take long to embed; raise most_atoms to try"]


@rdkit
@pytest.mark.parametrize(
    "given", [[None], ["C", None], [float("nan")], ["\ud800"], ["\u0421"], [""], ["C\0C"], [b"C"], ["(" * 3000]])
def test_what_is_no_smiles_is_refused_in_words(given):
    with pytest.raises(UserError): from_smiles(given, skip=False)
