"""Will it fit: the prediction against every recorded peak, and the command's answers."""
import json

import pytest
import torch

from flashoptim_nb.cli.main import main
from flashoptim_nb.lm.cells import Cell, measure_cell, predicted
from flashoptim_nb.lm.fit import FIT_CONFIGS, FIT_HELP, FURTHER_HELP, architecture_of, gpt_of, predict
from flashoptim_nb.lm.gpt import GPT
from flashoptim_nb.report.fits import predicted_rows


def test_every_recorded_peak_is_predicted_within_5_percent():
    rows = predicted_rows()
    assert len(rows) >= 30 and set(rows["kind"]) == {"fit", "memory"}
    worst = rows.loc[rows["off"].abs().idxmax()]
    assert abs(worst["off"]) < 5, worst.to_dict()


@pytest.mark.parametrize("size, config, micro, how, peak", [  # gigabytes, read off GPUs while the package was made
    ("1B", "flash_adamw", 8, {}, 33.6), ("7B", "flash_adamw", 2, {}, 52.8), ("7B", "flash_adamw_release", 4, {}, 70.1),
    ("13B", "flash_adamw_release", 4, dict(checkpointing="full"), 71.5), ("7B", "flash_adamw", 4, dict(gpus=2), 53.8)])
def test_known_peaks(size, config, micro, how, peak):
    found = predict(gpt_of(size), FIT_CONFIGS[config].replace(loss="fused_linear"), micro, 2048, **how)["peak"]
    assert found / 1e9 == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("style", ["gpt2", "llama2"])
@pytest.mark.parametrize("name", FIT_CONFIGS)
def test_the_bytes_of_a_way_are_those_that_its_optimizer_holds(name, style):
    cell = Cell(size="tiny", seq=64, style=style, config=name)
    held, said = measure_cell(cell, torch.device("cpu")), predicted(cell)
    sizes = [p.numel() for p in GPT(gpt_of("tiny", style, 64)).parameters()]
    released = 2 * max(sizes) * FIT_CONFIGS[name].release  # one gradient at a time is there
    assert {kind: held[kind] for kind in ("weights", "gradients", "masters")} == dict(
        weights=said["weights"], gradients=said["gradients"] + released, masters=said["masters"])
    assert 0 < held["states"] - said["states"] <= 4 * len(sizes)  # counters of steps, of each parameter or a group


@pytest.mark.parametrize("family, key, more", [  # transformers' classes of the others have no such parameters
    ("Llama", "attention_bias", 192 + 64), ("Llama", "mlp_bias", 2 * 100 + 64), ("Qwen3", "attention_bias", 192 + 64),
    ("Gemma", "attention_bias", 192 + 64), ("Mistral", "attention_bias", 0), ("Mistral", "mlp_bias", 0), ("Qwen2", "mlp_bias", 0),
    ("Qwen2", "attention_bias", 0), ("Qwen3", "mlp_bias", 0), ("Gemma", "mlp_bias", 0)])
def test_biases_are_counted_where_a_family_has_them(family, key, more):
    config = dict(architectures=[f"{family}ForCausalLM"], hidden_size=64, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
                  num_key_value_heads=4, intermediate_size=100, vocab_size=500, max_position_embeddings=64)
    count = lambda config: architecture_of(config).count()["total"]
    assert count(config | {key: True}) - count(config) == 3 * more


def answer(capsys, *words):
    status = main(["fit", *words])
    return status, *capsys.readouterr()


def test_the_command_answers_programs(capsys, tmp_path):
    status, out, _ = answer(capsys, "--params", "7B", "--gpu", "a100 80gb", "--json")
    found = json.loads(out)
    assert status == 0 and found["gpu"]["name"] == "A100-80GB"
    by = {(row["config"], row["checkpointing"]): row for row in found["rows"]}
    assert not by["adamw", "full"]["fits"] and by["flash_adamw", "none"]["fits"]
    (tmp_path / "config.json").write_text(json.dumps(dict(
        architectures=["Qwen2ForCausalLM"], hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, vocab_size=151_936, max_position_embeddings=32_768, tie_word_embeddings=True)))
    status, out, _ = answer(capsys, "--config", str(tmp_path), "--json")
    assert status == 0 and json.loads(out)["model"]["parameters"] == 494_032_768 and json.loads(out)["loss"] == "plain"


@pytest.mark.parametrize("words, said", [
    ("--params 7B --gpu RTX4091", "did you mean 'RTX 4090'"), ("--params 7", "did you mean 7B?"), ("--params 10M", "'10M' is no size that a model is made by; give 50M to 1000B"), ("--params 49M --style llama2", "give 50M to 1000B"), ("--params 1001B", "give 50M to 1000B"), ("--params 2T", "give 50M to 1000B"), ("--params 7B --gpu 24", "flashoptim-nb: 24GB? '24' is no GPU"), ("--params 7B --gpu 49140MiB", "flashoptim-nb: 47.99GB? "), ("--params 7B --gpu 4090", "(did you mean 'RTX 4090'?); choose one of: T4, "), ("--params 7B --gpu 4090", "B200; or give its memory, with the unit: 24GB"), ("--params seven", "350M, 1.3B or 7B"), ("", "which model?"), ("--params 7B --seq 0", "at least 1"),
    ("--params 7B --gpus -1", "at least 1"), ("--params 7B --configs adam", "did you mean 'adamw'"), ("--config nowhere", "No such file"),
    ("--build torch.nn:Linear", "cannot be built on the meta device"), ("--build json:loads", "cannot be built"), ("--build nothing", "cannot be found"), ("--params 7B --micro 0", "at least 1"), ("--params 7B --micro 99999999", "at most"), ("--gpu 0GB --params 7B", "above 0"), ("--build antigravity.nothing:x", "cannot be found"),
    ("--build torch.nn:Module --style gpt2", "belongs to a model by its size"), ("--config nowhere --style gpt2", "belongs to a model by its size"), ("--params 7B --style gpt3", "did you mean 'gpt2'")])
def test_bad_input_is_answered_in_words(capsys, words, said):
    status, out, err = answer(capsys, *words.split())
    assert status == 2 and said in err and not out and "Traceback" not in err


@pytest.mark.parametrize("gpu, taken, other", [("A100", "A100-80GB", "A100-40GB"), ("V100", "V100-32GB", "V100-16GB"),
                                               ("A100-40GB", "A100-40GB", None), ("H100", "H100", None)])
def test_which_of_two_gpus_of_a_name_is_taken_is_said(capsys, gpu, taken, other):
    words = ("--params", "350M", "--configs", "adamw", "--gpu", gpu)
    told, found = answer(capsys, *words)[1], json.loads(answer(capsys, *words, "--json")[1])["gpu"]
    assert (found["name"], found["asked"]) == (taken, gpu)
    assert f"{gpu} is taken as {taken}; for the other: --gpu {other}" in told if other else "is taken as" not in told


@pytest.mark.parametrize("size", ["50M", "1000B"])
def test_the_sizes_that_the_help_names_are_taken(capsys, size):
    answer(capsys, "--params", size, "--configs", "flash_adamw", "--json")
    with pytest.raises(SystemExit): main(["fit", "--help"])
    assert "sizes: 50M to 1000B parameters" in capsys.readouterr().out and gpt_of(size)


LLAMA = dict(model_type="llama", hidden_size=64, num_attention_heads=4, num_hidden_layers=2, intermediate_size=128, vocab_size=512)


@pytest.mark.parametrize("config, said", [
    (dict(architectures=["MixtralForCausalLM"]), "of any other, --build"), (dict(model_type="bert"), "no architecture that is known"), ([], "no object"),
    (dict(model_type="llama"), "no 'hidden_size'"), (dict(model_type="llama", hidden_size="wide"), "whole number"), (dict(architectures="LlamaForCausalLM"), "no architecture"),
    (LLAMA | dict(num_key_value_heads=8), "does not go evenly"), (LLAMA | dict(hidden_size=4 * 10**400), "whole number from 1"), (LLAMA | dict(vocab_size=10**400), "whole number from 1"), (LLAMA | dict(num_attention_heads=5), "does not go evenly"),
    (LLAMA | dict(tie_word_embeddings="no"), "true or false"), (dict(model_type="gpt2", n_embd=64, n_head=5, n_layer=2, vocab_size=512), "does not go evenly")])
def test_a_config_that_cannot_be_read_is_refused(capsys, tmp_path, config, said):
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, out, err = answer(capsys, "--config", str(tmp_path / "config.json"))
    assert status == 2 and said in err and not out and "did you mean" not in err


@pytest.mark.parametrize("words, first", [
    ("7B", "Largest micro-batch: 63, by flash_adamw_on_host with full checkpointing. Of the ways that fit, this gives up least: "
           "flash_adamw without checkpointing, micro-batch up to 4 (weights of 24 bits or more, states on the GPU, no layer run again)."),
    ("70B", "Does not fit: one sequence by any way of training on 1 x H100; the least peak is")])
def test_the_answer_stands_in_the_first_line(capsys, words, first):
    assert answer(capsys, "--params", words)[1].startswith(first)


@pytest.mark.parametrize("micro, least", [(2, "flash_adamw without checkpointing, micro-batch up to 4 "), (63, "flash_adamw_on_host with full checkpointing, micro-batch up to 63 ")])
def test_the_answer_leads_with_the_micro_batch_that_was_asked_for(capsys, micro, least):
    first = answer(capsys, "--params", "7B", "--micro", str(micro))[1].splitlines()[0]
    assert first.startswith(f"Micro-batch {micro} fits. Of the ways that fit, this gives up least: {least}")
    assert first.endswith(" Largest micro-batch: 63, by flash_adamw_on_host with full checkpointing.")


@pytest.mark.parametrize("words, what, would", [
    ("7B --micro 64", "a micro-batch of 64 by any way of training on 1 x H100", "micro-batch 63 by flash_adamw_on_host with full "
     "checkpointing; or micro-batch 64 by flash_adamw_on_host with full checkpointing over 2 GPUs"),
    ("3B --gpu 24GB --configs adamw", "one sequence by adamw on 1 x 24 GB",
     "micro-batch 1 by flash_adamw without checkpointing; or micro-batch 2 by adamw without checkpointing over 4 GPUs"),
    ("7B --seq 9999999 --gpus 2", "one sequence by any way of training on 2 x H100", None)])
def test_what_does_not_fit_is_said_and_what_would(capsys, words, what, would):
    first = answer(capsys, "--params", *words.split())[1].splitlines()[0]
    assert first.startswith(f"Does not fit: {what}; the least peak is ")
    assert first.endswith(f" Would fit: {would}." if would else " Nothing here would: no other way of training, nor up to 1,024 GPUs.")
    instead = json.loads(answer(capsys, "--params", *words.split(), "--json")[1])["instead"]
    assert len(instead) == (len(would.split("; or ")) if would else 0)


@pytest.mark.parametrize("words, status", [
    ("7B", 0), ("7B --micro 63", 0), ("7B --micro 64", 1), ("70B", 1), ("3B --gpu 24GB --configs adamw", 1), ("3B --gpu 24GB", 0),
    ("7B --gpu H1000", 2)])
def test_the_exit_status_says_whether_it_fits(capsys, words, status):
    for form in ((), ("--json",)): assert answer(capsys, "--params", *words.split(), *form)[0] == status
    with pytest.raises(SystemExit): main(["fit", "--help"])
    assert "exit status: 0 if a way of training fits, 1 if none does, 2 if the question cannot" in capsys.readouterr().out


def test_a_name_in_the_place_of_a_number_of_gpus(capsys):
    with pytest.raises(SystemExit): main("fit --params 7B --gpus H100".split())
    assert "'H100' is no number of GPUs; which GPU goes with --gpu" in capsys.readouterr().err


def test_the_table_says_what_the_host_holds_and_why_release_may_change_nothing(capsys):
    said = answer(capsys, "--params", "7B")[1]
    rows = {tuple(line.split()[:2]): line.split() for line in said.splitlines() if line.startswith("flash_adamw")}
    assert float(rows["flash_adamw_on_host", "full"][-1]) == 19.4 and float(rows["flash_adamw", "full"][-1]) == 0
    assert "before any gradient is there" in said and "loss fused_linear: the logits in pieces" in said
    assert "before any gradient" not in answer(capsys, "--params", "7B", "--gpu", "24GB")[1]
    assert "A10 22.5" in answer(capsys, "--params", "1B", "--gpu", "24GB")[1]


def test_release_is_said_to_free_no_gradient_before_the_last_micro_batch(capsys):
    for more in ((), ("--accumulate",)):
        said = answer(capsys, "--params", "1B", "--configs", "flash_adamw_release", *more)[1]
        assert ("Release frees gradients in the last micro-batch's backward pass." in said) == bool(more)


def test_further_ways_are_shown_where_they_are_asked_for(capsys):
    ways = lambda *words: {row["config"] for row in json.loads(answer(capsys, "--params", "1B", *words, "--json")[1])["rows"]}
    assert ways() == {*FIT_HELP} and ways("--configs", *FURTHER_HELP, "adamw") == {*FURTHER_HELP, "adamw"}
    said = answer(capsys, "--params", "1B", "--configs", "flash_muon")[1]
    assert said.endswith(f"{FURTHER_HELP['flash_muon']}\n") and "adamw_bf16" not in said
    with pytest.raises(SystemExit): main(["fit", "--help"])
    told = capsys.readouterr().out
    assert all(f"\n  {name} " in told for name in FIT_HELP | FURTHER_HELP)


def test_fp32_gradients_are_asked_about_on_one_gpu_alone(capsys):
    words = ("--params", "70B", "--configs", "flash_adamw_grads32")
    status, out, err = answer(capsys, *words, "--gpus", "2")
    assert status == 2 and not out and "flash_adamw_grads32 over 2 GPUs: FSDP2 makes gradients" in err
    instead = json.loads(answer(capsys, *words, "--gpu", "H200", "--json")[1])["instead"]
    assert instead and not any(one["config"] == "flash_adamw_grads32" for one in instead)


def test_what_changes_nothing_is_refused(capsys, tmp_path, monkeypatch):
    (tmp_path / "of_mine.py").write_text("import torch\ndef make(): return torch.nn.Linear(8, 8)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    status, out, _ = answer(capsys, "--build", "of_mine:make", "--json")
    row = json.loads(out)["rows"][-1]
    assert status == 0 and row["classes"]["host"] > 0 and row["peak"] == sum(row["classes"].values()) - row["classes"]["host"] + 2 * 64
    for words in ("--loss plain", "--micro 2", "--seq 4096", "--style gpt2"):
        status, out, err = answer(capsys, "--build", "of_mine:make", *words.split())
        assert status == 2 and "leave it out" in err and not out


OF_MINE = """
import torch
print("imported")

def make(frozen=True):
    print("made")
    model = torch.nn.Sequential(torch.nn.Linear(1000, 1000, bias=False), torch.nn.Linear(1000, 10, bias=False))
    model[0].requires_grad_(not frozen)
    model.codes = torch.nn.Parameter(torch.zeros(1000, dtype=torch.int8), requires_grad=False)
    return model

def whole(): return make(False)
def lazy(): return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LazyLinear(3))
"""


def test_what_a_module_has_frozen_or_prints(capsys, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_mine_too.py").write_text(OF_MINE)
    status, out, err = answer(capsys, "--build", "of_mine_too:make", "--json")
    found = json.loads(out)
    assert status == 0 and "imported" in err and "made" in err
    assert found["model"] == dict(name="of_mine_too:make", parameters=1_011_000, trained=10_000)
    by = {row["config"]: row for row in found["rows"]}
    assert by["adamw"]["classes"] == dict(weights=4 * 1_010_000 + 1000, gradients=40_000, masters=0, states=80_000, host=0)
    assert by["flash_adamw"]["classes"]["masters"] == 10_000
    assert by["flash_adamw_release"]["peak"] == pytest.approx(2 * 1_010_000 + 1000 + (1 + 2.125 + 2) * 10_000)
    assert "of which 1e-05 are trained" in answer(capsys, "--build", "of_mine_too:make")[1]
    whole = json.loads(answer(capsys, "--build", "of_mine_too:whole", "--json")[1])
    assert whole["model"]["trained"] == 1_010_000
    status, out, err = answer(capsys, "--build", "of_mine_too:lazy")
    assert status == 2 and not out and "shapes are not known yet (1.weight" in err


def test_the_micro_batch_that_was_asked_for_is_named(capsys):
    found = json.loads(answer(capsys, "--params", "1B", "--configs", "adamw", "--json")[1])
    best = found["rows"][0]["micro"]
    assert found["micro"] is None and found["most"] == 4096
    _, said, _ = answer(capsys, "--params", "1B", "--configs", "adamw", "--micro", str(best))
    assert f"that was asked for, {best}." in said
    assert json.loads(answer(capsys, "--params", "1B", "--micro", str(best), "--json")[1])["micro"] == best


@pytest.mark.parametrize("asked, counted", [("70B", "64.9 billion parameters where 70B was asked for"),
                                            ("1B", "1.32 billion parameters where 1B was asked for"), ("30B", "30 billion parameters,")])
def test_a_model_of_another_size_than_was_asked_for_is_named(capsys, asked, counted):
    assert f"gpt2: {counted}" in answer(capsys, "--params", asked, "--configs", "flash_adamw")[1]
    assert json.loads(answer(capsys, "--params", asked, "--json")[1])["model"]["asked"] == float(asked[:-1]) * 1e9


@pytest.mark.parametrize("words", ["--micro 5000 --seq 16 --gpu H200 --configs flash_adamw",
                                   "--gpu 4.2427GB --seq 256 --micro 21 --configs adamw"])
def test_a_micro_batch_fits_where_its_own_peak_does(capsys, words):
    found = json.loads(answer(capsys, "--params", "124M", *words.split(), "--json")[1])
    usable, asked = found["gpu"]["usable"], found["micro"]
    assert all(row["fits"] == (row["peak"] <= usable) for row in found["rows"])
    assert any(row["fits"] and row["micro"] >= asked == row["shown"] for row in found["rows"])


def test_each_row_says_whether_it_fits(capsys):
    words = ("--params", "7B", "--gpu", "40GB", "--micro", "4")
    rows = json.loads(answer(capsys, *words, "--json")[1])["rows"]
    _, said, _ = answer(capsys, *words)
    lines = [line.split() for line in said.splitlines() if line.split()[1:2] in (["none"], ["selective"], ["full"])]
    assert [line[2:4] for line in lines] == [["yes" if row["fits"] else "no", str(row["micro"] or "-")] for row in rows]
    assert ["no", "3"] in [line[2:4] for line in lines]  # fits in fewer sequences, and not in what was asked for
    assert "fits: the peak of the micro-batch asked for is at most 36.0 GiB a GPU." in said


def test_where_the_search_for_a_micro_batch_ends_is_said(capsys):
    _, said, _ = answer(capsys, "--params", "124M", "--seq", "16", "--gpu", "H200", "--configs", "flash_adamw")
    assert "4096+" in said and "4,096 is the largest micro-batch that is tried" in said


@pytest.mark.parametrize("benchmark, gpus", [("memory", "0"), ("memory", "3"), ("memory", "-1"), ("compat", "0")])
def test_a_number_of_gpus_that_is_not_measured_is_refused(capsys, benchmark, gpus):
    status = main(["bench", benchmark, "--gpus", gpus, "--dry-run"])
    out, err = capsys.readouterr()
    assert status == 2 and "GPUs were asked for" in err and not out


def test_adamw_over_several_gpus_gathers_bf16_and_keeps_no_copies():
    wide, narrow = (predict(gpt_of("7B"), FIT_CONFIGS[name], 1, 2048, gpus=2) for name in ("adamw", "adamw_bf16"))
    assert wide["copies"] == 0 and wide["activations"] == narrow["activations"] and wide["gathered"] == narrow["gathered"]
    assert wide["weights"] == 2 * narrow["weights"] and wide["states"] == 2 * narrow["states"]
