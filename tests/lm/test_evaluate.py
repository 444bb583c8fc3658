"""Perplexities against a token-by-token computation in float64 and against transformers' own loss."""
import math

import numpy as np
import pytest
import torch
from torch import nn

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.lm.evalsets import EvalSet, LambadaSet
from flashoptim_nb.lm.evaluate import IGNORE, evaluate, score, windows
from flashoptim_nb.lm.gpt import GPT, GPTConfig, load_transformers

V, C = 61, 16


@pytest.fixture
def gpt(rng_seed):
    config = GPTConfig(n_layer=2, d_model=32, n_head=2, vocab_size=V, max_seq=C)
    model = GPT(config).init_weights(rng_seed)
    with torch.no_grad(): model.wte.weight.mul_(20)  # far from uniform, so that mistakes show
    return model


def text(rng_seed, n):
    tokens = np.random.default_rng(rng_seed).integers(0, V, n).astype(np.uint16)
    return EvalSet("text", tokens, words=n // 2, bytes=3 * n, source="shipped", sha256="")


def passages(examples):
    return LambadaSet("lambada", examples, words=len(examples), bytes=5 * len(examples), source="shipped", sha256="")


@torch.no_grad()
def brute(model, stream, context):
    """Sum of -log p of each token but the first, each from its own forward pass over what stands before it
    in its window."""
    model, total = model.double(), 0.
    for i in range(1, len(stream)):
        begin = (i - 1) // context * context
        before = torch.from_numpy(stream[begin:i].astype(np.int64))[None]
        total -= model.logits(model.hidden(before))[0, -1].log_softmax(-1)[int(stream[i])].item()
    model.float()
    return total


@pytest.mark.parametrize("n", [2, 16, 17, 18, 33, 70])  # around the windows' ends
def test_against_a_computation_token_by_token(gpt, rng_seed, n):
    given = text(rng_seed, n)
    expected = brute(gpt, given.tokens, C)
    # a token's loss is a difference of logits of some tens: its error is theirs, however small the loss
    slack = 3e-5 * (n - 1)
    for batch in (1, 3):
        row = evaluate(gpt, given, batch=batch, device="cpu", context=C)
        assert row["tokens"] == n - 1
        assert row["nll"] == pytest.approx(expected, abs=slack)
    assert row["ppl"] == pytest.approx(math.exp(expected / (n - 1)), rel=1e-4)
    assert row["word_ppl"] == pytest.approx(math.exp(row["nll"] / (n // 2)), rel=1e-9)
    assert row["bpb"] == pytest.approx(row["nll"] / math.log(2) / (3 * n), rel=1e-9)


def test_every_token_but_the_first_of_a_stream_is_predicted_once(rng_seed):
    rng = np.random.default_rng(rng_seed)
    for _ in range(50):
        streams = [rng.integers(0, 1000, rng.integers(0, 60)) for _ in range(3)]
        context = int(rng.integers(1, 20))
        cut = list(windows(streams, context))
        predicted = [t for _, targets in cut for t in targets if t != IGNORE]
        assert predicted == [t for s in streams for t in s[1:]]
        for inputs, targets in cut:
            n = int((targets != IGNORE).sum())
            assert np.array_equal(inputs[1:n], targets[:n - 1])  # each target is the next input


def test_the_loss_that_transformers_gives(rng_seed):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(rng_seed)
    hf = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=V, n_positions=C, n_embd=32, n_layer=2, n_head=2)).eval()
    given = text(rng_seed, 3 * C + 7)
    total = 0.
    for at in range(0, len(given.tokens) - 1, C):
        ids = torch.from_numpy(given.tokens[at:at + C + 1].astype(np.int64))[None]
        with torch.no_grad(): logits = hf(ids[:, :-1]).logits
        total += nn.functional.cross_entropy(logits[0], ids[0, 1:], reduction="sum").item()
    whole = torch.from_numpy(given.tokens[:C].astype(np.int64))[None]
    with torch.no_grad(): theirs = hf(whole, labels=whole).loss.item()
    model = load_transformers(hf)
    assert evaluate(model, given, batch=2, device="cpu", context=C)["nll"] == pytest.approx(total, rel=1e-5)
    first = EvalSet("first", given.tokens[:C], words=1, bytes=1, source="shipped", sha256="")
    row = evaluate(model, first, batch=2, device="cpu", context=C)
    assert row["nll"] / row["tokens"] == pytest.approx(theirs, rel=1e-5)


def test_chunks_bound_the_logits(gpt, rng_seed):
    sizes, logits = [], gpt.logits
    gpt.logits = lambda x: (sizes.append(x[..., 0].numel() * V), logits(x))[1]
    tokens = torch.from_numpy(text(rng_seed, 5 * C).tokens.astype(np.int64)).view(5, C)
    whole = score(gpt, tokens, tokens.roll(-1, 1))
    sizes.clear()
    parts = score(gpt, tokens, tokens.roll(-1, 1), chunk=7 * V)
    assert max(sizes) <= 7 * V
    torch.testing.assert_close(parts[0], whole[0])
    assert torch.equal(parts[1], whole[1])


def test_autocast_is_the_callers(gpt, rng_seed):
    given = text(rng_seed, 40)
    seen = []
    gpt.blocks[0].register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    plain = evaluate(gpt, given, batch=2, device="cpu", context=C)["nll"]
    cast = evaluate(gpt, given, batch=2, device="cpu", context=C, autocast=torch.bfloat16)["nll"]
    assert set(seen[:len(seen) // 2]) == {False} and set(seen[len(seen) // 2:]) == {True}
    assert plain != cast and cast == pytest.approx(plain, rel=0.05)


def test_mode_and_gradients_are_left_alone(gpt, rng_seed):
    for training in (True, False):
        gpt.train(training)
        evaluate(gpt, text(rng_seed, 20), batch=2, device="cpu", context=C)
        assert gpt.training is training and all(p.grad is None for p in gpt.parameters())


@torch.no_grad()
def test_lambada_is_greedy_decoding(gpt, rng_seed):
    rng = np.random.default_rng(rng_seed)
    examples, right, total = [], 0, 0.
    for i in range(9):
        before = rng.integers(0, V, rng.integers(1, 12))
        n, decoded, double = int(rng.integers(1, 4)), list(before), gpt.double()
        for _ in range(n): decoded.append(double.logits(double.hidden(torch.tensor([decoded])))[0, -1].argmax().item())
        target = decoded[-n:]
        if i % 3 == 0: target[-1] = (target[-1] + 1) % V  # greedy decoding does not give this one
        examples.append((before, np.array(target)))
        right += i % 3 != 0
        full = [*before, *target]
        logp = double.logits(double.hidden(torch.tensor([full[:-1]])))[0].log_softmax(-1)
        total -= sum(logp[len(before) - 1 + j, t].item() for j, t in enumerate(target))
    row = evaluate(gpt.float(), passages(examples), batch=4, device="cpu", context=C)
    assert (row["correct"], row["examples"]) == (right, 9)
    assert row["tokens"] == sum(len(t) for _, t in examples)
    assert row["nll"] == pytest.approx(total, rel=1e-5)
    assert row["word_ppl"] == pytest.approx(math.exp(total / 9), rel=1e-4)


@torch.no_grad()
def test_short_passages_are_not_padded_to_the_longest(gpt, rng_seed, monkeypatch):
    "One long passage among short ones costs a batch of its own; each counts as it does alone."
    rng = np.random.default_rng(rng_seed)
    config = GPTConfig(n_layer=1, d_model=32, n_head=2, vocab_size=V, max_seq=256)
    model, seen = GPT(config).init_weights(rng_seed), []
    examples = [(rng.integers(0, V, n), rng.integers(0, V, 2)) for n in (200, *rng.integers(1, 60, 40))]
    alone = [evaluate(model, passages([one]), batch=1, device="cpu", context=256) for one in examples]
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda inputs: (seen.append(inputs.numel()), hidden(inputs))[1])
    row = evaluate(model, passages(examples), batch=5, device="cpu", context=256)
    assert row["nll"] == pytest.approx(sum(one["nll"] for one in alone), rel=1e-6)
    assert (row["correct"], row["context"]) == (sum(one["correct"] for one in alone), 201)
    assert sum(seen) < 40 * 64 + 10 * 224


def test_long_passages_keep_their_end(gpt, rng_seed):
    passage = np.random.default_rng(rng_seed).integers(0, V, 50)
    rows = [evaluate(gpt, passages([(before, passage[-2:])]), batch=1, device="cpu", context=C)
            for before in (passage[:-2], passage[-C - 1:-2])]
    assert rows[0] == rows[1]


def test_a_text_without_words_has_no_perplexity_by_word(gpt):
    row = evaluate(
        gpt, EvalSet("blanks", np.array([0, 1, 2], np.uint16), words=0, bytes=0, source="shipped", sha256=""), batch=1,
        device="cpu", context=C)
    assert row["tokens"] == 2 and row["ppl"] > 1 and row["word_ppl"] is row["bpb"] is None


def test_a_loss_that_is_no_number_has_no_perplexity(gpt, rng_seed):
    with torch.no_grad(): gpt.norm_f.weight.fill_(float("nan"))
    row = evaluate(gpt, text(rng_seed, 20), batch=2, device="cpu", context=C)
    assert math.isnan(row["nll"]) and math.isnan(row["ppl"])


def test_nothing_to_predict_is_said():
    with pytest.raises(UserError, match="no token"):
        evaluate(nn.Identity(), text(0, 1), batch=1, device="cpu", context=4)
    with pytest.raises(UserError, match="no example"):
        evaluate(nn.Identity(), passages([]), batch=1, device="cpu", context=4)
