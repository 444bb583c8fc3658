"The transformer against Hugging Face's, against itself under every choice, and the formulas about it."
import random

import pytest
import torch

from flashoptim_nb.base.compare import rel_err
from flashoptim_nb.base.errors import UserError
from flashoptim_nb.base.machine import capabilities
from flashoptim_nb.lm.gpt import CHECKPOINTING, GPT, LOSSES, GPTConfig, load_transformers
from flashoptim_nb.lm.sizes import SIZES, gpt_config
from flashoptim_nb.lm.sizing import count_parameters

STYLES = ("gpt2", "llama2")


def random_shape():
    head, width = random.randint(1, 6), 2 * random.randint(2, 12)
    return dict(n_layer=random.randint(1, 3), n_head=head, d_model=head * width, vocab_size=random.randint(11, 300),
                max_seq=random.randint(9, 70))


def hugging_face(style, shape, ffn, **more):
    "A randomly initialized model of `transformers`, with weights large enough for every part to matter."
    hf = pytest.importorskip("transformers")
    if style == "gpt2":
        config = hf.GPT2Config(
            n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["d_model"], vocab_size=shape["vocab_size"],
            n_positions=shape["max_seq"], n_inner=ffn, bos_token_id=0, eos_token_id=0,
            **(dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0) | more))
        model = hf.GPT2LMHeadModel(config)
    else:
        config = hf.LlamaConfig(
            num_hidden_layers=shape["n_layer"], num_attention_heads=shape["n_head"], hidden_size=shape["d_model"],
            vocab_size=shape["vocab_size"], max_position_embeddings=shape["max_seq"], intermediate_size=ffn,
            bos_token_id=0, eos_token_id=0, **(dict(rms_norm_eps=10 ** -random.uniform(4, 6)) | more))
        model = hf.LlamaForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters(): p.copy_(torch.randn_like(p) * 0.3 + (p.dim() == 1))
    return model.eval()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("trial", range(3))
def test_logits_agree_with_transformers(style, trial, rng_seed):
    shape = random_shape()
    theirs = hugging_face(style, shape, random.randint(5, 90))
    for attention in ("eager", "flash"):
        ours = load_transformers(theirs, attention)
        for length in {1, 2, shape["max_seq"], random.randint(1, shape["max_seq"])}:
            tokens = torch.randint(shape["vocab_size"], (2, length))
            with torch.no_grad():
                assert rel_err(ours(tokens), theirs(tokens).logits.double()) < 2e-5, (attention, length)


@pytest.mark.parametrize("style", STYLES)
def test_loss_and_gradient_agree_with_transformers(style, rng_seed):
    shape = random_shape()
    theirs = hugging_face(style, shape, 32)
    ours, tokens = load_transformers(theirs), torch.randint(shape["vocab_size"], (3, shape["max_seq"]))
    expected = theirs(tokens, labels=tokens).loss
    loss = ours.loss(tokens[:, :-1], tokens[:, 1:])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward(), expected.backward()
    assert rel_err(ours.wte.weight.grad, theirs.get_input_embeddings().weight.grad.double()) < 1e-4


def test_the_copy_is_a_copy(rng_seed):
    theirs = hugging_face("llama2", random_shape(), 16)
    ours = load_transformers(theirs)
    with torch.no_grad(): ours.wte.weight.zero_()
    assert theirs.get_input_embeddings().weight.abs().sum() > 0


def test_another_architecture_is_refused(rng_seed):
    hf = pytest.importorskip("transformers")
    grouped = hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
                                                 hidden_size=16, vocab_size=9, intermediate_size=8))
    with pytest.raises(UserError, match="grouped keys"): load_transformers(grouped)
    with pytest.raises(UserError, match="unknown architecture 'opt'"):
        load_transformers(hf.OPTForCausalLM(hf.OPTConfig(num_hidden_layers=1, num_attention_heads=1, hidden_size=8,
                                                         ffn_dim=8, vocab_size=9, word_embed_proj_dim=8)))


ONE = dict(n_layer=2, n_head=2, d_model=16, vocab_size=23, max_seq=20)


@pytest.mark.parametrize(
    "style, more", [
        *[("gpt2", dict(activation_function=a)) for a in ("gelu_pytorch_tanh", "gelu_fast", "gelu_accurate")],
        ("gpt2", dict(layer_norm_epsilon=1e-2)), ("gpt2", dict(reorder_and_upcast_attn=True)),
        ("gpt2", dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)), ("llama2", dict(hidden_act="swish")),
        ("llama2", dict(rms_norm_eps=1e-2)),
        ("llama2", dict(rope_parameters=dict(rope_type="default", rope_theta=777.0))),
        ("llama2", dict(attention_dropout=0.5, num_key_value_heads=2, head_dim=8))])
def test_every_setting_is_taken_over(style, more, rng_seed):
    theirs = hugging_face(style, ONE, 24, **more)
    theirs.train()
    ours, tokens = load_transformers(theirs), torch.randint(23, (2, 20))
    assert theirs.training
    with torch.no_grad(): assert rel_err(ours(tokens), theirs.eval()(tokens).logits.double()) < 2e-5


@pytest.mark.parametrize(
    "style, more, words", [
        ("gpt2", dict(tie_word_embeddings=False), "tied"),
        ("gpt2", dict(scale_attn_weights=False), "scale_attn_weights=False"),
        ("gpt2", dict(scale_attn_by_inverse_layer_idx=True), "inverse_layer_idx"),
        *[("gpt2", dict(activation_function=a), repr(a)) for a in ("gelu", "relu", "silu", "quick_gelu")],
        ("gpt2", dict(add_cross_attention=True), "cross attention"),
        ("llama2", dict(tie_word_embeddings=True), "tied"), ("llama2", dict(num_key_value_heads=1), "grouped keys"),
        ("llama2", dict(attention_bias=True), "biases"), ("llama2", dict(mlp_bias=True), "biases"),
        ("llama2", dict(hidden_act="gelu"), "'gelu'"), ("llama2", dict(head_dim=4), "head width"),
        ("llama2", dict(head_dim=16), "head width"),
        *[("llama2", dict(rope_parameters=dict(rope_type=kind, rope_theta=1e4, factor=4.0, **parts)),
           "scaled rotations") for kind, parts in (
              ("linear", {}), ("dynamic", {}), ("yarn", {}),
              ("llama3", dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8)))]])
def test_what_would_be_lost_is_refused(style, more, words, rng_seed):
    theirs = hugging_face(style, ONE, 24, **more)
    with pytest.raises(UserError, match=words): load_transformers(theirs)


@pytest.mark.parametrize("style", STYLES)
def test_what_was_changed_after_building_is_refused(style, rng_seed):
    "What neither the configuration nor the names of the weights tell."
    hf = pytest.importorskip("transformers")
    fresh = lambda: hugging_face(style, ONE, 24)
    layer = lambda m: m.transformer.h[1] if style == "gpt2" else m.model.layers[1]
    def head(m): m.lm_head.weight = torch.nn.Parameter(m.lm_head.weight.detach().clone() + (style == "gpt2"))
    def activation(m): setattr(layer(m).mlp, "act" if style == "gpt2" else "act_fn", torch.nn.ReLU())
    def hook(m):
        layer(m).register_forward_hook(
            lambda module, given, out: (out[0].roll(1, -1), *out[1:]) if isinstance(out, tuple) else out.roll(1, -1))
    def added(m): layer(m).mlp.adapter = torch.nn.Linear(16, 16)
    def bias(m): m.lm_head.bias = torch.nn.Parameter(torch.randn(23))
    def not_finite(m): m.lm_head.weight.data[0] = float("nan")
    def resized(m): m.config.vocab_size += 1
    def quantized(m):
        m.get_parameter("transformer.h.0.mlp.c_fc.weight" if style == "gpt2"
                        else "model.layers.0.mlp.up_proj.weight").requires_grad_(False).data = torch.zeros(
            1, dtype=torch.int8)
    def tied(m): m.lm_head.weight = m.get_input_embeddings().weight
    for change in (
            *([head] if style == "gpt2" else [tied]), activation, hook, added, bias, not_finite, resized, quantized):
        theirs = fresh()
        change(theirs)
        with pytest.raises(UserError): print(change.__name__), load_transformers(theirs)
    others = ((hf.GPT2Model, hf.GPT2DoubleHeadsModel, hf.GPT2ForSequenceClassification) if style == "gpt2"
              else (hf.LlamaModel, hf.LlamaForSequenceClassification))
    for kind in others:
        with pytest.raises(UserError): print(kind), load_transformers(kind(fresh().config))
    with pytest.raises(UserError, match="loaded"): load_transformers(fresh().to("meta"))
    with pytest.raises(UserError, match="unknown architecture"): load_transformers(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("style", STYLES)
def test_each_weight_keeps_its_dtype(style, rng_seed):
    theirs = hugging_face(style, ONE, 24).bfloat16()
    ours = load_transformers(theirs)
    assert ({p.dtype for p in ours.parameters()} == {torch.bfloat16}
            and all(p.is_contiguous() and p.requires_grad for p in ours.parameters()))
    assert torch.equal(ours.wte.weight, theirs.get_input_embeddings().weight)
    ours.loss(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)).backward()


def one_step(shape, style, attention="eager", checkpointing="none", how="plain", compiled=None, device="cpu", seed=5,
             whole=False):
    model = GPT(GPTConfig(style=style, **shape), attention, checkpointing).to(device).init_weights(seed)
    if compiled: model.compile_blocks(compiled, whole)
    tokens = torch.randint(
        shape["vocab_size"], (2, 2, shape["max_seq"]), generator=torch.Generator().manual_seed(seed)).to(device)
    loss = model.loss(*tokens, how)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("style", STYLES)
def test_no_choice_changes_the_result(style, rng_seed):
    shape = random_shape()
    loss, grad = one_step(shape, style)
    for attention in ("eager", "math", "flash"):
        for how in LOSSES:
            plain = one_step(shape, style, attention, "none", how)
            torch.testing.assert_close(plain, (loss, grad), rtol=1e-4, atol=1e-6)
            for checkpointing in CHECKPOINTING:
                for a, b in zip(one_step(shape, style, attention, checkpointing, how), plain): assert torch.equal(a, b)


@pytest.mark.parametrize("style", STYLES)
def test_no_target_is_no_part_of_loss_and_gradients(style, rng_seed):
    "Both losses, whatever share of the targets is missing, give what torch gives for the logits."
    shape = random_shape()
    tokens, targets = torch.randint(shape["vocab_size"], (2, 3, shape["max_seq"]))
    for missing in (torch.rand(targets.shape) < 0.5, torch.ones(targets.shape, dtype=torch.bool)):
        found, y = [], targets.masked_fill(missing, -100)
        for how in (None, *LOSSES):
            model = GPT(GPTConfig(style=style, **shape)).init_weights(2)
            loss = (torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), y.flatten()) if how is None
                    else model.loss(tokens, y, how))
            loss.backward()
            found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
        for other in found[1:]: torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6, equal_nan=True)


def test_targets_and_tokens_that_are_none_are_refused(rng_seed):
    shape = random_shape()
    model, V = GPT(GPTConfig(**shape)).init_weights(2), shape["vocab_size"]
    tokens = torch.randint(V, (2, 9))
    for wrong in (V, -1, -101):
        bad = tokens.clone()
        bad[1, 4] = wrong
        for how in LOSSES:
            with pytest.raises(UserError, match=f"targets have to be 0 to {V - 1}, or -100 .* given were {wrong}"):
                model.loss(tokens, bad, how)
        with pytest.raises(UserError, match=f"token ids have to be 0 to {V - 1}; given were {wrong}"): model(bad)
    with pytest.raises(UserError, match="rows"): model(tokens[0])
    with pytest.raises(UserError, match="each token has one target"): model.loss(tokens, tokens.T)
    with pytest.raises(UserError, match="float32"): model(tokens.float())
    assert torch.equal(model(tokens.to(torch.uint8) % 11), model(tokens.to(torch.uint8).long() % 11))
    last = tokens[:, -1:]  # strided, one token a sequence
    for how in LOSSES:
        torch.testing.assert_close(model.loss(last, last, how), model.loss(last.clone(), last.clone(), how))
    for how in LOSSES: assert model.loss(tokens[:0], tokens[:0], how).isnan()


def test_a_compiled_loss_ignores_and_refuses_the_same(rng_seed):
    if not (able := capabilities()["compile"]).ok: pytest.skip(able.why)
    torch._dynamo.reset()
    model = GPT(GPTConfig(n_layer=1, n_head=2, d_model=32, vocab_size=96, max_seq=24)).init_weights(1)
    tokens = torch.randint(96, (2, 24))
    y = tokens.clone()
    y[:, ::2] = -100
    expected = model.loss(tokens, y)
    model.compile_blocks("aot_eager")
    torch.testing.assert_close(model.loss(tokens, y), expected)
    y[0, 3] = -1
    with pytest.raises(UserError, match="targets have to be 0 to 95"): model.loss(tokens, y)


@pytest.mark.parametrize("style, attention, checkpointing, backend, whole",
                         [("gpt2", "eager", "none", "aot_eager", False),
                          ("llama2", "flash", "selective", "aot_eager", False),
                          ("llama2", "eager", "full", "aot_eager", False), ("gpt2", "flash", "none", "aot_eager", True),
                          ("gpt2", "eager", "selective", "aot_eager", True),
                          pytest.param("gpt2", "flash", "none", "inductor", False, marks=pytest.mark.slow)])
def test_compiled_blocks_give_the_same(style, attention, checkpointing, backend, whole, rng_seed):
    if not (able := capabilities()["compile"]).ok: pytest.skip(able.why)
    torch._dynamo.reset()
    shape = dict(n_layer=3, n_head=2, d_model=32, vocab_size=96, max_seq=24)
    torch._dynamo.utils.counters.clear()
    compiled, plain = (one_step(shape, style, attention, checkpointing, compiled=to, whole=whole)
                       for to in (backend, None))
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one graph for all blocks or layers, one for the head"
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.cuda
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_the_gpu_agrees_with_float64(style, checkpointing, rng_seed):
    shape = dict(n_layer=2, n_head=2, d_model=128, vocab_size=512, max_seq=200)
    tokens = torch.randint(512, (2, 2, 200), device="cuda")
    exact = GPT(GPTConfig(style=style, **shape)).init_weights(5).double().cuda()
    exact_loss = exact.loss(*tokens)
    exact_loss.backward()
    errors = {}
    for attention, how in (("eager", "plain"), ("flash", "fused_linear"), ("cudnn", "fused_linear")):
        model = GPT(GPTConfig(style=style, **shape), attention, checkpointing).init_weights(5).cuda()
        with torch.autocast("cuda", torch.bfloat16): loss = model.loss(*tokens, how)
        loss.backward()
        errors[attention] = [rel_err(p.grad, e.grad) for p, e in zip(model.parameters(), exact.parameters())]
        assert abs(loss.item() - exact_loss.item()) < 0.01
    for attention in ("flash", "cudnn"):
        worst = max(e / max(s, 1e-3) for e, s in zip(errors[attention], errors["eager"]))
        assert worst < 2, (attention, worst)


@pytest.mark.cuda
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_compiled_on_the_gpu(checkpointing, rng_seed):
    torch._dynamo.reset()
    shape = dict(n_layer=2, n_head=2, d_model=128, vocab_size=512, max_seq=128)
    for style in STYLES:
        results = []
        for compiled in (None, "inductor"):
            with torch.autocast("cuda", torch.bfloat16):
                results.append(one_step(shape, style, "flash", checkpointing, compiled=compiled, device="cuda"))
        assert abs(results[0][0] - results[1][0]) < 0.01 and rel_err(results[1][1], results[0][1].double()) < 0.03


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("style", STYLES)
def test_precisions(style, weights, rng_seed):
    """fp32 weights under autocast and bf16 weights both stay near the fp32 loss,
    and give gradients in the weights' dtype."""
    shape = random_shape()
    tokens = torch.randint(shape["vocab_size"], (2, 2, shape["max_seq"]))
    reference = GPT(GPTConfig(style=style, **shape)).init_weights(1).loss(*tokens).item()
    for how in LOSSES:
        model = GPT(GPTConfig(style=style, **shape), "flash").init_weights(1).to(weights)
        with torch.autocast("cpu", torch.bfloat16, enabled=weights == torch.float32): loss = model.loss(*tokens, how)
        loss.backward()
        assert loss.dtype == torch.float32 and abs(loss.item() - reference) < 0.03
        assert all(p.grad.dtype == weights and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("style", STYLES)
def test_counted_parameters_are_the_built_ones(size, style):
    with torch.device("meta"): built = GPT(gpt_config(size, style))
    assert count_parameters(built.config)["total"] == sum(p.numel() for p in built.parameters())


def test_the_tensor_sets_that_optimizers_are_measured_on():
    for size, tensors, total in (("124M", 100, 124e6), ("1B", 196, 1.315e9)):
        with torch.device("meta"): shapes = [p.shape for p in GPT(gpt_config(size)).parameters()]
        assert len(shapes) == tensors and abs(sum(s.numel() for s in shapes) - total) < 1e6


@pytest.mark.slow
def test_norms_in_fp32_follow_adamw_through_the_warm_up():
    """A norm's 16-bit weight does not move before its steps add up to half a spacing, and the loss lags;
    with norms in fp32 it does not."""
    from flashoptim_nb.study.h1.corpus import load_corpus
    from flashoptim_nb.cli.quality import quality_spec
    from flashoptim_nb.study.h1.run import make_task
    from flashoptim_nb.study.h1.presets import LM_PRESETS
    from flashoptim_nb.lm.sizes import pad_vocab

    laptop, seed = LM_PRESETS["laptop"], random.randrange(1000)
    corpus = load_corpus(laptop)

    def late_losses(config):  # 36 steps of warm-up in all
        spec = quality_spec("laptop", config, seed, pad_vocab(corpus.tokenizer.vocab_size), laptop.tokenizer, steps=120)
        task = make_task(spec, torch.device("cpu"), corpus)
        return torch.tensor([task.step(n)["loss"] for n in range(1, 28)])[18:].mean().item()

    adamw, narrow, whole = map(late_losses, ("adamw", "flash_adamw", "flash_adamw_norms32"))
    assert narrow - adamw > 1e-4 and abs(whole - adamw) < (narrow - adamw) / 2, (adamw, narrow, whole)
