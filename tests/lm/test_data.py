"""Text from three places, tokens with known answers, batches that remember nothing,
evaluation sets with published counts."""
import hashlib
import http.client
import json
import lzma
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from flashoptim_nb.base.errors import UserError
from flashoptim_nb.base.machine import Capability, data_root
from flashoptim_nb.base import files
from flashoptim_nb.lm import text as T
from flashoptim_nb.lm import tokenize as K
from flashoptim_nb.lm.batches import Synthetic, Windows, check_repeats
from flashoptim_nb.lm.evalsets import load_evalset
from flashoptim_nb.base.files import DataUnavailable
from flashoptim_nb.lm.text import SETS, load_text
from flashoptim_nb.lm.tokenize import load_tokenizer, token_set, tokens_of, train_bpe
from flashoptim_nb.study.h1.corpus import load_corpus
from flashoptim_nb.study.h1.presets import LM_PRESETS

GIVEN = os.environ.get("FLASHOPTIM_DATA")
needs_folder = pytest.mark.skipif(not GIVEN, reason="FLASHOPTIM_DATA is not set: the protocol's own sets are not here")


@pytest.fixture
def no_hub(monkeypatch):
    T.hub_reachable.cache_clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    T.hub_reachable.cache_clear()


@pytest.fixture
def folder(monkeypatch, tmp_path, no_hub):
    "An empty folder in FLASHOPTIM_DATA, no hub, and a function that writes a file of it."
    monkeypatch.setenv("FLASHOPTIM_DATA", str(tmp_path))
    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(lzma.compress(text.encode()))
        return path
    write.root = tmp_path
    return write


# ---------- what ships

def test_every_shipped_file_is_listed_and_whole():
    listed = dict(reversed(line.split(maxsplit=1)) for line in (data_root() / "SHA256SUMS").read_text().splitlines())
    for part in ("sotu", "bpe", "gpt2_bpe"):
        for path in (data_root() / part).iterdir():
            assert listed[f"{part}/{path.name}"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_presidents_are_held_out_whole():
    train, held = load_text("sotu"), load_text("sotu", "validation")
    assert len(train.documents) + len(held.documents) == 233
    assert 0.05 < held.n_chars / train.n_chars < 0.15
    assert not set(train.documents) & set(held.documents)
    rows = [json.loads(line) for line in files.read_xz(data_root(), "sotu/sotu.jsonl.xz").splitlines()]
    of = {row["text"]: row["id"].split("_", 1)[1] for row in rows}
    assert not {of[d] for d in train.documents} & {of[d] for d in held.documents}
    assert len({of[d] for d in held.documents}) == len(T.HELD_OUT)


# ---------- a folder

def test_a_folder_is_read(folder):
    folder("c4/c4_en_2k.jsonl.xz", [{"text": "one"}, {"text": "zwei\u2028drei"}])
    found = load_text("c4")
    assert (found.source, found.documents) == ("folder", ["one", "zwei\u2028drei"]) and not found.overlaps


def test_a_folder_that_lacks_a_set_says_which_file(folder):
    with pytest.raises(DataUnavailable, match=r"lacks lambada/lambada_test.jsonl.xz; HF_HUB_OFFLINE is set"):
        load_text("lambada", "test")


def test_a_folder_that_is_none(monkeypatch, tmp_path, no_hub):
    monkeypatch.setenv("FLASHOPTIM_DATA", str(tmp_path / "gone"))
    with pytest.raises(UserError, match="is not a folder"): load_text("c4")
    monkeypatch.delenv("FLASHOPTIM_DATA")
    with pytest.raises(DataUnavailable, match="FLASHOPTIM_DATA is not set"): load_text("c4")


def test_a_damaged_file_is_refused(folder, rng_seed):
    path = folder("c4/c4_en_2k.jsonl.xz", [{"text": "one " * 1000}])
    raw = bytearray(path.read_bytes())
    (folder.root / "SHA256SUMS").write_text(f"{hashlib.sha256(raw).hexdigest()}  ./c4/c4_en_2k.jsonl.xz\n")
    assert load_text("c4").n_chars == 4000
    raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)
    path.write_bytes(raw)
    with pytest.raises(UserError, match="damaged or was changed"): load_text("c4")
    path.write_bytes(raw[: random.randrange(len(raw))])
    with pytest.raises(UserError, match="damaged or was changed"): load_text("c4")
    (folder.root / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="truncated or not xz"): load_text("c4")


@pytest.mark.parametrize("line, said",
                         [("not json", "is not JSON"), ("", "is not JSON"), ("[1]", "holds list, not an object"),
                          ('{"txt": "a"}', "has no text among its fields .txt."), ('{"text": null}', "has no text"),
                          ('{"text": "\\ud800"}', "not Unicode"), ("{}", "has no text among its fields .none.")])
def test_a_line_that_is_no_document_is_named(folder, line, said):
    path = folder("c4/c4_en_2k.jsonl.xz", json.dumps({"text": "one"}) + "\n" + line + "\n")
    with pytest.raises(UserError, match=said) as caught: load_text("c4")
    assert f"{path}, line 2: " in str(caught.value)


def test_an_empty_document_is_a_document(folder):
    folder("c4/c4_en_2k.jsonl.xz", [{"text": ""}, {"text": "one"}])
    assert load_text("c4").documents == ["", "one"] == load_text("c4", limit_chars=10).documents


@pytest.mark.parametrize("passage", ["word", "", " word", "two words "])
def test_a_passage_without_a_last_word_is_named(folder, passage):
    folder("lambada/lambada_test.jsonl.xz", [{"text": "there on my own, Shane"}, {"text": passage}])
    with pytest.raises(UserError, match="passage 2 of lambada"): load_evalset("lambada", load_tokenizer("sotu-2048"))


@pytest.mark.parametrize("line", ["deadbeef  c4/c4_en_2k.jsonl.xz", "no", "a" * 64, "a" * 64 + " c4/c4_en_2k.jsonl.xz"])
def test_a_list_of_checksums_that_is_none(folder, line):
    folder("c4/c4_en_2k.jsonl.xz", [{"text": "one"}])
    (folder.root / "SHA256SUMS").write_text("\n" + line + "\n")
    with pytest.raises(UserError, match="SHA256SUMS, line 2"): load_text("c4")


def test_unknown_names():
    with pytest.raises(UserError, match="choose one of: sotu, c4, wikitext103, lambada, pile, prose"): load_text("wikitext2")
    with pytest.raises(UserError, match="choose one of: train, validation"): load_text("c4", "test")


def test_limits_hold_for_each_kind(folder):
    folder("pile/pile_eval_14sets.jsonl.xz", [{"pile_set_name": k, "text": k * 30} for k in "aabbbc"])
    found = load_text("pile", "validation", limit_chars=40)
    assert ({g: sum(len(d) for d, h in zip(found.documents, found.groups) if h == g) for g in "abc"}
            == {"a": 40, "b": 40, "c": 30})


def test_training_on_the_pile_names_what_it_spoils(folder):
    for name in SETS["pile"]["train"].files: folder(name, [{"text": name}])
    train = load_text("pile")
    assert train.overlaps == {"pile/pile_cc", "pile/openwebtext2", "pile/wikipedia_(en)"}
    folder("pile/pile_eval_14sets.jsonl.xz",
           [{"pile_set_name": k, "text": "some text"} for k in ("pile_cc", "github", "wikipedia_(en)")])
    tokenizer = load_tokenizer("sotu-2048")
    assert [s.name for s in load_evalset("pile", tokenizer)] == ["pile/github", "pile/pile_cc", "pile/wikipedia_(en)"]
    assert [s.name for s in load_evalset("pile", tokenizer, leave_out=train.overlaps)] == ["pile/github"]
    assert [s.name for s in load_evalset("pile/github", tokenizer)] == ["pile/github"]
    with pytest.raises(UserError, match="choose one of: pile/github"): load_evalset("pile/books3", tokenizer)


# ---------- a hub: the streaming of `datasets` itself, over local rows

ROWS = {
    ("allenai/c4", "en", "train"): [{"text": f"document {i}", "url": "u", "timestamp": "t"} for i in range(50)],
    ("Salesforce/wikitext", "wikitext-103-v1", "validation"): [
        {"text": t} for t in ("", " = A = \n", "", " one two \n", "", " = B = \n", " three \n")],
    ("EleutherAI/lambada_openai", "default", "test"): [{"text": "there on my own, Shane"}, {"text": "to the docks"}],
    ("mit-han-lab/pile-val-backup", None, "validation"): [
        {"text": "x" * 10, "meta": {"pile_set_name": n}} for n in ("Pile-CC", "Wikipedia (en)", "Pile-CC")],
    ("monology/pile-uncopyrighted", None, "train"): [{"text": "y", "meta": {"pile_set_name": "Github"}}],
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    "A hub that answers, whose data sets are files here; rows go through `datasets` streaming."
    datasets = pytest.importorskip("datasets")
    class Pulled(list): commit = "c0ffee"
    real, pulled = datasets.load_dataset, Pulled()
    def load_dataset(path, config, *, split, streaming, revision):
        assert streaming and revision == pulled.commit
        file = tmp_path / f"{len(pulled)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[path, config, split]))
        stream = real("json", data_files=str(file), split="train", streaming=True)
        assert isinstance(stream, datasets.IterableDataset)
        pulled.append(path)
        return stream
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(T, "hub_reachable", lambda: Capability(True, "a hub"))
    monkeypatch.setattr(T, "_hub_commit", lambda spec: pulled.commit)
    monkeypatch.delenv("FLASHOPTIM_DATA", raising=False)
    monkeypatch.setenv("FLASHOPTIM_CACHE", str(tmp_path / "cache"))
    return pulled


def test_every_set_is_streamed(hub):
    c4 = load_text("c4", limit_chars=25)
    assert (c4.source, c4.documents) == ("hub", ["document 0", "document 1", "docum"])
    wiki = load_text("wikitext103", "validation")
    assert wiki.documents == [" \n = A = \n \n one two \n \n", " = B = \n three \n"] and wiki.continuous
    evaluated, = load_evalset("wikitext103", load_tokenizer("gpt2"))
    assert evaluated.words == 9 + 7 and (evaluated.tokens == 50_256).sum() == 1
    pile = load_text("pile", "validation")
    assert pile.groups == ["pile_cc", "wikipedia_(en)", "pile_cc"]
    assert (
        load_text("pile").overlaps == frozenset()), "the hub's training split shares nothing with its validation split"
    lambada, = load_evalset("lambada", load_tokenizer("gpt2"))
    assert lambada.words == 2 and lambada.source == "hub"
    assert len(hub) == 6


def test_the_same_text_has_the_same_hash_from_anywhere(hub, monkeypatch, tmp_path):
    streamed = load_text("wikitext103", "validation")
    (tmp_path / "wikitext103").mkdir()
    (tmp_path / "wikitext103/wiki.valid.tokens.xz").write_bytes(lzma.compress("".join(streamed.documents).encode()))
    monkeypatch.setenv("FLASHOPTIM_DATA", str(tmp_path))
    stored = load_text("wikitext103", "validation")
    assert (stored.source, stored.sha256) == ("folder", streamed.sha256)


def test_a_stream_becomes_a_file_of_tokens(hub):
    tokenizer = load_tokenizer("sotu-2048")
    tokens = token_set("c4", "train", tokenizer, limit_tokens=100).tokens
    expected = tokenizer.encode_documents([row["text"] for row in ROWS["allenai/c4", "en", "train"]])[:100]
    assert isinstance(tokens, np.memmap) and np.array_equal(tokens, expected)
    assert np.array_equal(token_set("c4", "train", tokenizer, limit_tokens=100).tokens, expected)


def test_a_hub_that_moved_on_is_streamed_again(hub):
    tokenizer = load_tokenizer("sotu-2048")
    first = token_set("c4", "train", tokenizer, 100)
    assert (first.source, len(hub)) == ("hub", 1)
    token_set("c4", "train", tokenizer, 100)
    assert len(hub) == 1, "kept"
    hub.commit = "decade"
    token_set("c4", "train", tokenizer, 100)
    assert len(hub) == 2


def test_two_folders_never_share_their_tokens(monkeypatch, tmp_path, no_hub):
    tokenizer, found, mtime = load_tokenizer("sotu-2048"), {}, (1_700_000_000,) * 2
    monkeypatch.setenv("FLASHOPTIM_CACHE", str(tmp_path / "cache"))
    def content(text): return lzma.compress((json.dumps({"text": text}) + "\n").encode())
    for name, text in (
            ("A", "apples are red. " * 50), ("B", "bananas yellow. " * 50), ("A again", "apples are red. " * 50)):
        path = tmp_path / name / "c4/c4_en_2k.jsonl.xz"
        path.parent.mkdir(parents=True)
        path.write_bytes(content(text))
        os.utime(path, mtime)
        monkeypatch.setenv("FLASHOPTIM_DATA", str(tmp_path / name))
        found[name] = token_set("c4", "train", tokenizer, 100)
    assert tokenizer.decode(found["B"].tokens[1:]).startswith("bananas") and found["A"].source == "folder"
    assert found["A"].sha256 != found["B"].sha256 and found["A"].sha256 == found["A again"].sha256
    assert len(list((tmp_path / "cache").glob("*.u16"))) == 2, "the same content is kept once, wherever it lies"
    assert found["B"].note == dict(
        set="c4", split="train", source="folder", sha256=hashlib.sha256(found["B"].tokens).hexdigest(), tokens=100)
    path.write_bytes(content("bananas yellow. " * 50))  # edited in place
    assert token_set("c4", "train", tokenizer, 100).sha256 == found["B"].sha256


def test_a_streamed_set_names_what_it_spoils(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHOPTIM_CACHE", str(tmp_path / "cache"))
    for name in SETS["pile"]["train"].files: folder(name, [{"text": name}])
    assert token_set("pile", "train", load_tokenizer("sotu-2048"), 10).overlaps == SETS["pile"]["train"].overlaps


@pytest.mark.parametrize("train_tokens", [0, 10], ids=["whole", "limited"])
def test_what_is_trained_on_is_not_evaluated(folder, monkeypatch, tmp_path, train_tokens):
    monkeypatch.setenv("FLASHOPTIM_CACHE", str(tmp_path / "cache"))
    for name in SETS["pile"]["train"].files: folder(name, [{"text": name}])
    folder("pile/pile_eval_14sets.jsonl.xz", [{"pile_set_name": k, "text": "some text"} for k in ("pile_cc", "github")])
    corpus = load_corpus(LM_PRESETS["laptop"].replace(
        tokenizer="sotu-2048", train_sets=(("pile", "train"),), train_tokens=train_tokens, eval_sets=(("pile", 100),), track_set=("sotu", 100)))
    assert [one.name for one in corpus.evals] == ["pile/github"]
    assert corpus.sources[0]["source"] == "folder" and len(corpus.train) == (train_tokens or corpus.sources[0]["tokens"])


def test_a_set_that_is_taken_whole():
    whole, text = token_set("sotu", "validation", load_tokenizer("sotu-2048")), load_text("sotu", "validation")
    assert ((whole.source, whole.sha256) == ("shipped", text.sha256)
            and np.array_equal(whole.tokens, tokens_of(text, load_tokenizer("sotu-2048"))))


def test_a_stream_that_breaks_off(hub, monkeypatch):
    import datasets
    def broken():
        yield {"text": "one"}
        raise ConnectionError("reset by peer")
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **kw: datasets.IterableDataset.from_generator(broken))
    with pytest.raises(DataUnavailable, match="streaming allenai/c4 .* failed: .*reset by peer"): load_text("c4")


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "not a url"])
def test_a_hub_that_does_not_answer(monkeypatch, endpoint):
    pytest.importorskip("datasets")
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "FLASHOPTIM_DATA", "http_proxy", "HTTP_PROXY", "all_proxy",
                 "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    T.hub_reachable.cache_clear()
    with pytest.raises(DataUnavailable, match="cannot be reached"): load_text("c4")
    T.hub_reachable.cache_clear()


# ---------- tokens

@pytest.mark.parametrize("name", K.TOKENIZERS)
def test_any_text_comes_back(name, rng_seed):
    t = load_tokenizer(name)
    for _ in range(50):
        text = "".join(chr(random.choice((random.randrange(32, 127), random.randrange(0xA0, 0x2FFF),
                                          random.randrange(0x10000, 0x10FFFF)))) for _ in range(random.randrange(40)))
        tokens = t.encode(text)
        assert t.decode(tokens) == text and tokens.dtype == np.uint16
        assert t.token_bytes[tokens].sum() == len(text.encode()) and t.eot not in tokens


def test_a_damaged_tokenizer_is_refused(monkeypatch, tmp_path):
    (tmp_path / "bpe").mkdir()
    (tmp_path / "bpe/sotu-2048.json").write_text("{}")
    (tmp_path / "SHA256SUMS").write_text((data_root() / "SHA256SUMS").read_text())
    monkeypatch.setattr(K, "data_root", lambda: tmp_path)
    with pytest.raises(UserError, match="damaged or was changed"): K.TOKENIZERS["sotu-2048"]()


@pytest.mark.slow
def test_the_shipped_vocabulary_can_be_learned_again():
    shipped = json.loads((data_root() / "bpe/sotu-2048.json").read_text())
    assert train_bpe(load_text("sotu").documents, 2048) == shipped


def test_tokens_are_kept_and_made_again_when_damaged(monkeypatch, tmp_path, rng_seed):
    monkeypatch.setenv("FLASHOPTIM_CACHE", str(tmp_path / "cache"))
    tokenizer, text = load_tokenizer("sotu-2048"), load_text("sotu", "validation", limit_chars=20_000)
    tokens = np.array(tokens_of(text, tokenizer))
    assert np.array_equal(tokens, tokenizer.encode_documents(text.documents))
    encode = tokenizer.encode_blocks
    monkeypatch.setattr(tokenizer, "encode_blocks", lambda *a: pytest.fail("was encoded again"))
    assert np.array_equal(tokens_of(text, tokenizer), tokens)
    file, = (tmp_path / "cache").glob("*.u16")
    raw = bytearray(file.read_bytes())
    raw[random.randrange(len(raw))] ^= 1
    file.write_bytes(raw)
    monkeypatch.setattr(tokenizer, "encode_blocks", encode)
    assert np.array_equal(tokens_of(text, tokenizer), tokens)
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".json", ".u16"], "nothing is left aside"


def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLASHOPTIM_CACHE", str(tmp_path / "file"))
    tokenizer, text = load_tokenizer("sotu-2048"), load_text("sotu", limit_chars=5000)
    assert np.array_equal(tokens_of(text, tokenizer), tokenizer.encode_documents(text.documents))
    with pytest.raises(UserError, match="FLASHOPTIM_CACHE"): token_set("sotu", "train", tokenizer, 1000)


# ---------- batches

def test_batches_are_a_function_of_the_step(rng_seed):
    tokens = np.random.default_rng(rng_seed).integers(2048, size=random.randrange(200, 2000)).astype(np.uint16)
    seq, batch = random.randrange(1, 30), random.randrange(1, 9)
    one, two = (Windows(tokens, seq, batch, seed=rng_seed) for _ in range(2))
    steps = list(range(3 * one.n_windows // batch))
    forward = {s: one.batch(s) for s in steps}
    random.shuffle(steps)
    for s in steps:
        x, y = two.batch(s)
        assert torch.equal(x, forward[s][0]) and torch.equal(y, forward[s][1]) and torch.equal(x[:, 1:], y[:, :-1])
        parts = [two.slice(s, i, batch) for i in range(batch)]
        assert torch.equal(torch.cat([p[0] for p in parts]), x)


def test_an_epoch_predicts_each_token_once(rng_seed):
    tokens = np.arange(1001, dtype=np.uint16)
    w = Windows(tokens, seq=10, batch=20, seed=rng_seed)
    for epoch in range(3):
        targets = torch.cat([w.batch(epoch * 5 + s)[1].flatten() for s in range(5)])
        assert torch.equal(targets.sort().values, torch.arange(1, 1001))
    assert w.epochs(15) == 3.0 and check_repeats(w, 20) == 4.0
    with pytest.raises(UserError, match="21 steps .* 4.2 times through the 1,001 tokens .* at most 20 steps"):
        check_repeats(w, 21)
    assert check_repeats(Synthetic(50, 10, 20, seed=0), 10**9) == 0


def test_a_micro_batch_reads_its_own_windows_only(rng_seed):
    class Counted:
        reads, tokens = 0, np.arange(1001, dtype=np.uint16)
        def __len__(self): return len(self.tokens)
        def __getitem__(self, where):
            Counted.reads += 1
            return self.tokens[where]
    w = Windows(Counted(), seq=10, batch=20, seed=rng_seed)
    whole = w.batch(3)
    Counted.reads = 0
    parts = [w.slice(3, k, 10) for k in range(10)]
    assert Counted.reads == 20
    assert all(torch.equal(torch.cat(p), side) for p, side in zip(zip(*parts), whole))


@pytest.mark.parametrize("seq", [4096, 8192, 16_384])
def test_synthetic_lengths(seq):
    x, y = Synthetic(50_304, seq, 1, seed=0).batch(7)
    assert x.shape == y.shape == (1, seq) and x.max() < 50_304 and torch.equal(x[:, 1:], y[:, :-1])


# ---------- the protocol's own sets, where they are

@needs_folder
def test_wikitext_has_its_published_counts():
    t = load_tokenizer("gpt2")
    for split, words, tokens in (("validation", 217_646, 249_735), ("test", 245_569, 285_234)):
        s, = load_evalset("wikitext103", t, split=split)
        assert (s.words, s.predicted) == (words, tokens)
        assert s.bytes == sum(len(d.encode()) for d in load_text("wikitext103", split).documents)
    assert len(load_text("wikitext103", "validation").documents) == 60, "articles"


@needs_folder
def test_lambada_has_its_published_counts():
    text = load_text("lambada", "test")
    s, = load_evalset("lambada", load_tokenizer("gpt2"))
    assert s.words == 5153 and sum(len(load_tokenizer("gpt2").encode(d)) for d in text.documents[:100]) == sum(
        len(c) - 1 + len(w) for c, w in s.examples[:100])


@needs_folder
def test_the_pile_by_kind():
    sets = load_evalset("pile", load_tokenizer("sotu-2048"), limit_tokens=2000)
    assert len(sets) == 14 and all(s.name.startswith("pile/") and 0 < s.predicted <= 2000 for s in sets)
    spoiled = load_text("pile", limit_chars=1000).overlaps
    assert len(load_evalset("pile", load_tokenizer("sotu-2048"), limit_tokens=100, leave_out=spoiled)) == 11


@needs_folder
def test_c4_is_told_apart():
    train, held = load_text("c4"), load_text("c4", "validation")
    assert (len(train.documents), len(held.documents)) == (2000, 1480)
    assert not {d[:200] for d in train.documents} & {d[:200] for d in held.documents}


@needs_folder
def test_gpt2_on_a_known_text():
    path = Path(GIVEN) / "tinyshakespeare/input.txt.xz"
    if not path.is_file(): pytest.skip("FLASHOPTIM_DATA has no tinyshakespeare")
    assert len(load_tokenizer("gpt2").encode(files.read_xz(Path(GIVEN), "tinyshakespeare/input.txt.xz"))) == 338_025


DEEP = "[" * 100_000 + "]" * 100_000


def packed(path, megabytes, piece=b"\0"):
    "An xz file that unpacks to so many times 2**20 pieces."
    packer = lzma.LZMACompressor(preset=0)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(packer.compress(piece * 2**20) for _ in range(megabytes)) + packer.flush())


def test_what_unpacks_to_one_endless_document_is_refused(folder, tmp_path, monkeypatch):
    "At a sixteenth of the bound, which takes a sixteenth of the time; the files' notebook refuses at the bound."
    assert T.LONGEST_DOCUMENT == files.LONGEST_DOCUMENT == 2**26
    for module in (T, files): monkeypatch.setattr(module, "LONGEST_DOCUMENT", 2**22)
    many = T.LONGEST_DOCUMENT // 2**20 + 2
    packed(tmp_path / "c4/c4_en_2k.jsonl.xz", many)
    packed(tmp_path / "wikitext103/wiki.train.tokens.xz", many, b"\n")
    for name in ("c4", "wikitext103"):
        with pytest.raises(UserError, match="is longer than 4,194,304 characters"): load_text(name, "train", 1000)


def test_what_is_kept_in_memory_is_bounded(folder, monkeypatch):
    folder("c4/c4_en_2k.jsonl.xz", [dict(text="word " * 100)] * 100)
    for module in (T, files): monkeypatch.setattr(module, "LARGEST_TEXT", 20_000)
    with pytest.raises(UserError, match="give limit_chars"): load_text("c4")
    assert load_text("c4", limit_chars=5_000).n_chars == 5_000
    assert len(token_set("c4", "train", load_tokenizer("sotu-2048"), 300).tokens) == 300
    with pytest.raises(UserError, match="cut it"):
        files.read_xz(Path(os.environ["FLASHOPTIM_DATA"]), "c4/c4_en_2k.jsonl.xz")


def test_an_unpacker_is_given_no_more_memory_than_xz_asks_for(folder, tmp_path):
    (tmp_path / "c4").mkdir()
    wide = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**30, "mode": lzma.MODE_FAST, "mf": lzma.MF_HC3, "nice_len": 3,
             "depth": 1}]
    head = lzma.compress(b"x", preset=0)
    try: head = lzma.compress(b"x", filters=wide)
    except MemoryError: pytest.skip("no memory to write such a file")
    (tmp_path / "c4/c4_en_2k.jsonl.xz").write_bytes(head)
    with pytest.raises(UserError, match="cannot be read"): load_text("c4")


def test_lines_end_at_newlines_alone(folder):
    texts = ["one\x0btwo\x1cthree\x85four\u2028five", "six\r"]
    folder("c4/c4_en_2k.jsonl.xz", "".join(json.dumps(dict(text=text), ensure_ascii=False) + "\n" for text in texts))
    assert load_text("c4").documents == texts


@pytest.mark.parametrize("line, told", [('{"text": ' + DEEP + "}", "nests deeper"), ('["text"]', "not an object"),
                                        ('{"text": 1}', "has no text"), ('{"text": "\\ud800"}', "not Unicode")])
def test_a_line_within_a_file_that_is_no_document_is_named(folder, line, told):
    folder("c4/c4_en_2k.jsonl.xz", '{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError, match=f"line 2.*{told}"): load_text("c4")


def test_a_set_without_text_is_none(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASHOPTIM_CACHE", str(tmp_path / "cache"))
    folder("wikitext103/wiki.train.tokens.xz", "")
    with pytest.raises(UserError, match="holds no text"):
        token_set("wikitext103", "train", load_tokenizer("sotu-2048"), 300)
    assert not len(tokens_of(load_text("wikitext103"), load_tokenizer("sotu-2048")))


@pytest.mark.parametrize("note", ["[]", "null", '"x"', "{}", DEEP, "\xff", ""])
def test_a_note_that_is_none_makes_the_tokens_anew(tmp_path, monkeypatch, note):
    monkeypatch.setenv("FLASHOPTIM_CACHE", str(tmp_path))
    tokenizer = load_tokenizer("sotu-2048")
    text = T.TextSet("mine", "train", ["a few words"], "folder", T.text_hash(["a few words"]))
    first = tokens_of(text, tokenizer).tolist()
    next(tmp_path.glob("*.json")).write_text(note, encoding="latin-1")
    assert tokens_of(text, tokenizer).tolist() == first


@pytest.mark.parametrize("endpoint", ["http://[::1", "http://a:port", "no scheme", "http://", "ftp://x:y"])
def test_a_hub_that_cannot_be_one_is_no_hub(monkeypatch, endpoint):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert not T.hub_reachable.__wrapped__(0.1).ok


def test_a_hub_that_does_not_speak_http_is_no_hub(monkeypatch):
    def nonsense(*_, **__): raise http.client.BadStatusLine("\x1b[2J no HTTP")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(T.urllib.request, "urlopen", nonsense)
    found = T.hub_reachable.__wrapped__(0.1)
    assert not found.ok and "cannot be reached" in found.why and "\x1b" not in found.why
