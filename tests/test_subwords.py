"""Unigram, WordPiece and the adapters: brute force, hostile input, and the `tokenizers` library as the second opinion for ids and files."""
from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from fake_hub import fake_hub
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.flat_lattice import FlatLattices
from slm.ground import SLMError, rng
from slm.lattice import Lattices, arcs, backward, forward, maximise, n_best, seed_pieces, segmentations, train_pieces, viterbi
from slm.storyworld import stories
from slm.subwords import HFTokenizer, TiktokenTokenizer, TransformersTokenizer, UnigramTokenizer, WordPieceTokenizer
from slm.text import SPECIAL_TOKENS, STORY, TokenizerError, show_tokens
from slm.tokenizer import BPETokenizer, load_tokenizer
from slm.wordpiece import PREFIX, RULES, longest_match, train_wordpiece
from slm.words import PATTERNS

os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
OWN = r"\p{L}{1,4}|\p{N}|\s+"
often = lambda n: settings(max_examples=n, deadline=None, database=None, derandomize=True)
KINDS = {"unigram": (UnigramTokenizer, 460), "wordpiece": (WordPieceTokenizer, 680)}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_pattern = pytest.mark.parametrize("pattern", ["gpt2", "gpt4", OWN, ".{1,9}"])


@lru_cache
def trained(kind: str, pattern: str = "gpt2", special: tuple[str, ...] = tuple(SPECIAL_TOKENS)):
    cls, size = KINDS[kind]
    return cls.train([STORY, "### a ## <0x41> <|end|> ---- aaaa " * 9], size, special, pattern, strict=False)


@lru_cache
def theirs_of(tok, plain: bool = False) -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer.from_str(tok.file_text)
    theirs.encode_special_tokens = plain
    return theirs


@lru_cache
def byte_bpe() -> BPETokenizer:
    return BPETokenizer.train(STORY, 400)


@lru_cache
def adapters() -> dict:
    import tiktoken
    import transformers
    bpe = byte_bpe()
    ranks = {token: i - 6 for i, token in bpe.vocab.items() if i >= 6}
    marks = {name: 394 + n for n, name in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("small", pat_str=PATTERNS["gpt2"], mergeable_ranks=ranks, special_tokens=marks)
    theirs = tokenizers.Tokenizer.from_str(bpe.file_text)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(bpe.file_text))
    return {"hf": HFTokenizer(theirs), "unigram file": HFTokenizer(tokenizers.Tokenizer.from_str(trained("unigram").file_text)),
            "wordpiece file": HFTokenizer(tokenizers.Tokenizer.from_str(trained("wordpiece").file_text)),
            "tiktoken": TiktokenTokenizer(encoding), "transformers": TransformersTokenizer(fast)}


ADAPTERS = ["hf", "unigram file", "wordpiece file", "tiktoken", "transformers"]
each_adapter = pytest.mark.parametrize("name", ADAPTERS)
hard = ["a", "s", "LL", "'", "'s", "'RE", "\t", "\n", "\r\n", " ", "   ", "0", "½", "٣", ".", "_", "é", "e\u0301", "ß", "語", "ا", "🙂",
        "𝒜", "\u2028", "\u3000", "\ufeff", "\x1c", "\x85", "\x00", "\U0010ffff", "#", "##", " ##", "##a", "<0x41>", "<0x", "aaaa",
        "-----", "<|", "<|end", "|>", "sun", " sail", *SPECIAL_TOKENS]
lone = ["\ud83d", "\ude42", "\udcff", "\ud800"]
clean_text = st.lists(st.sampled_from(hard) | st.characters(exclude_categories=["Cs"]), max_size=14).map("".join)
any_text = st.lists(st.sampled_from(hard + lone) | st.characters(), max_size=14).map("".join)
known = lambda text: text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
eighths = st.integers(-80, -1).map(lambda n: n / 8)
scores_of = st.dictionaries(st.text("ab", min_size=2, max_size=5), eighths, max_size=9).map(lambda found: {"a": -1.25, "b": -2.5, **found})
words_of = st.dictionaries(st.text("abc", min_size=1, max_size=24), st.integers(1, 5), min_size=1, max_size=10)


# ---------------------------------------------------------------------------------------------------- the lattice
@often(200)
@given(scores_of, st.text("ab", max_size=10), st.integers(1, 12))
def test_best_paths_and_sums_are_those_of_brute_force(scores, word, n):
    every = {way: sum(scores[piece] for piece in way) for way in segmentations(word, scores)}
    lattice, prob = arcs(word, scores), {piece: math.exp(score) for piece, score in scores.items()}
    assert every[tuple(viterbi(lattice, len(word), scores))] == max(every.values())
    best = n_best(lattice, len(word), scores, n)
    assert [score for score, _ in best] == sorted(every.values(), reverse=True)[:n] and all(every[way] == score for score, way in best)
    total = sum(map(math.exp, every.values()))
    assert math.isclose(forward(lattice, len(word), prob)[-1], total) and math.isclose(backward(lattice, len(word), prob)[0], total)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_samples_are_drawn_with_the_probabilities_of_the_lattice(alpha):
    tok = UnigramTokenizer({"a": -3.0, "b": -2.0, "ab": -2.5, "ba": -4.0, "aba": -5.0, "bb": -2.25}, pattern=".+")
    every = {way: math.exp(alpha * sum(tok.scores[piece] for piece in way)) for way in segmentations("abab", tok.scores)}
    sampled, draws = tok.sampled(alpha, rng("chi", 1)), 6000
    seen = Counter(tuple(sampled.encode("abab")) for _ in range(draws))
    wanted = {tuple(tok.ids[piece] for piece in way): draws * p / sum(every.values()) for way, p in every.items()}
    assert set(seen) <= set(wanted)
    limit = len(wanted) - 1 + 4.5 * math.sqrt(2 * (len(wanted) - 1))               # about one in ten thousand
    assert sum((seen[ids] - n) ** 2 / n for ids, n in wanted.items()) < limit


@often(60)
@given(words_of, st.lists(st.text("abc", min_size=2, max_size=5), max_size=8))
def test_likelihood_never_falls_while_the_pieces_stay(words, pieces):
    found, last = Lattices(words, dict.fromkeys([*"abc", *pieces], 1)), -math.inf
    prob = maximise(found.counts)
    for _ in range(6):
        counts, total = found.expected(prob)
        assert total >= last - 1e-9 * abs(total)
        prob, last = maximise(counts), total


@often(60)
@given(words_of | st.dictionaries(st.sampled_from(["aaaaaaaa", "abababab", "b" * 24, "日本🙂日", "ab"]), st.integers(1, 9), min_size=1),
       st.integers(0, 25), st.booleans())
def test_arrays_and_numba_learn_exactly_what_the_definition_learns(words, n_pieces, fast):
    flat = lambda words: FlatLattices(words, fast)
    assert dict(zip(flat(words).pieces, flat(words).counts.tolist(), strict=True)) == seed_pieces(words)
    (pieces, history), (flat_pieces, flat_history) = train_pieces(words, n_pieces), train_pieces(words, n_pieces, flat)
    assert flat_pieces == pieces and np.allclose(history, flat_history, rtol=1e-12)
    assert set("".join(words)) <= set(pieces) and len(pieces) <= max(n_pieces, len(set("".join(words))))
    assert all(later >= earlier - 1e-9 * abs(earlier) for (m, earlier), (n, later) in zip(history, history[1:], strict=False) if m == n)


def test_both_rungs_learn_the_same_from_stories():
    texts = [story.text for story in stories(3, 60)]
    slow = UnigramTokenizer.train(texts, 900, speed="python")
    assert slow.hash == UnigramTokenizer.train(texts, 900).hash == UnigramTokenizer.train(reversed(texts), 900).hash


# ------------------------------------------------------------------------------------------------------- wordpiece
pieces_of = st.lists(st.text("abc", min_size=1, max_size=4), max_size=12)


@often(200)
@given(pieces_of, pieces_of, st.text("abc", max_size=12))
def test_the_longest_match_is_that_of_the_library(first, rest, word):
    pieces = {piece: n for n, piece in enumerate(dict.fromkeys(["[UNK]", *first, *(PREFIX + piece for piece in rest)]))}
    theirs = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    found = longest_match(word, {piece: n for piece, n in pieces.items() if n}, 6)
    assert theirs.encode(word).tokens == (["[UNK]"] if found is None else found)


@often(100)
@given(words_of, st.sampled_from(sorted(RULES)), st.integers(1, 4))
def test_learned_pieces_occur_and_are_different(words, rule, least):
    counted = {word.encode(): n for word, n in words.items()}
    pieces = train_wordpiece(counted, 560, rule, least)
    assert len(set(pieces)) == len(pieces) <= 560 and pieces[:512] == train_wordpiece({}, 512)
    for piece in pieces[512:]:
        inner = piece.startswith(PREFIX)
        places = sum(n * word.startswith(piece.removeprefix(PREFIX), at) for word, n in words.items()
                     for at in (range(1, len(word)) if inner else [0]))
        assert places >= least


def test_the_most_frequent_pair_is_joined_first():
    pieces = train_wordpiece({b"sun": 5, b"sunny": 3, b"ny": 9}, 516)
    assert pieces[512:] == ["ny", "su", "sun", "##ny"]


# ------------------------------------------------------------------------------------------------------- protocol
@each_kind
@each_pattern
@often(120)
@given(text=any_text, data=st.binary(max_size=60))
def test_any_text_and_any_bytes_come_back(kind, pattern, text, data):
    tok = trained(kind, pattern)
    ids = tok.encode(text)
    assert tok.decode(ids) == tok.decode(tok.encode(text, "all")) == known(text)
    assert not set(ids) & set(tok.special_tokens.values()) and tok.decode_bytes(tok.encode_bytes(data)) == data
    assert tok.encode_bytes(known(text).encode()) == ids
    assert all(isinstance(tok.decode(ids[:n]), str) for n in range(len(ids) + 1))
    assert "".join(show_tokens(tok, known(text).encode("ascii", "ignore").decode()).pieces).isascii()


@each_kind
@each_pattern
@often(150)
@given(text=clean_text)
def test_ids_are_those_of_the_library(kind, pattern, text):
    tok = trained(kind, pattern)
    assert theirs_of(tok).encode(text).ids == tok.encode(text, "all") and theirs_of(tok, True).encode(text).ids == tok.encode(text)
    assert theirs_of(tok).decode(tok.encode(text), skip_special_tokens=False) == text


@often(100)
@given(scores_of, st.text("abé\ud7ff", max_size=30))
def test_equal_paths_are_decided_as_in_the_library(scores, text):
    tok = UnigramTokenizer(scores, pattern=".+")
    assert theirs_of.__wrapped__(tok).encode(text).ids == tok.encode(text)


overlapping = ["<a>", "<a><b>", "<b>", "><", "ab", "<a", "a b"]


@each_kind
@often(100)
@given(text=st.text("<>ab ", max_size=24))
def test_the_longest_of_overlapping_marks_wins(kind, text):
    tok = trained(kind, "gpt2", tuple(overlapping))
    ids, at, marks = tok.encode(text, "all"), 0, []
    while at < len(text):
        mark = max((name for name in overlapping if text.startswith(name, at)), key=len, default="")
        marks += [mark] * bool(mark)
        at += len(mark) or 1
    names = {i: name for name, i in tok.special_tokens.items()}
    assert [names[i] for i in ids if i in names] == marks and ids == theirs_of(tok).encode(text).ids
    assert list(tok.encode_iterable(text, "all")) == ids and not set(tok.encode(text)) & set(names)


long_text = st.lists(any_text | st.sampled_from(["sun ", " sail\n", "I'll ", "a  \n b"]), max_size=6).map("".join)


def cut_at(text: str, cuts: list[int]) -> list[str]:
    places = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in zip(places, places[1:], strict=False)]


@each_kind
@each_pattern
@often(80)
@given(text=long_text, cuts=st.lists(st.integers(0, 999), max_size=6))
def test_chunks_give_the_ids_of_the_whole(kind, pattern, text, cuts):
    tok = trained(kind, pattern)
    for allowed in ("none", "all"):
        assert list(tok.encode_iterable(cut_at(text, cuts), allowed)) == tok.encode(text, allowed)


@each_kind
def test_files_of_any_bytes_come_back(kind, tmp_path):
    tok, data = trained(kind), STORY.encode() * 60 + "日本語🙂 ".encode() * 2000 + b"\xff\r\n\xe6"
    (tmp_path / "t.txt").write_bytes(data)
    count = tok.encode_file(tmp_path / "t.txt", tmp_path / "t.bin")
    ids = np.fromfile(tmp_path / "t.bin", "<u2")
    assert len(ids) == count and tok.decode_bytes(ids) == data and ids.tolist() == tok.encode_bytes(data)


@each_kind
@pytest.mark.parametrize("word", ["a", "sun", "-", " ", "日", "🙂"])
def test_very_long_words_do_not_take_for_ever(kind, word):
    tok, text = trained(kind), word * (100_000 // len(word.encode()))
    start = time.process_time()
    ids = tok.encode(text)
    assert time.process_time() - start < 10 and tok.decode(ids) == text
    if kind == "unigram":
        assert tok.decode(tok.sampled(0.2, rng(0)).encode(text[:5000])) == text[:5000]


@each_kind
def test_empty_texts(kind):
    tok = trained(kind)
    assert tok.encode("") == tok.encode("", "all") == tok.encode_bytes(b"") == list(tok.encode_iterable([])) == [] == tok.encode_batch([])
    assert tok.decode([]) == "" and KINDS[kind][0].train([], 999, strict=False).decode(tok.encode_batch([""])[0]) == ""


@each_kind
@each_pattern
def test_save_load_save_is_the_same_file(kind, pattern, tmp_path):
    tok = trained(kind, pattern)
    again = load_tokenizer(tok.save(tmp_path / "deep" / "tokenizer.json").parent)
    assert type(again) is type(tok) and again.hash == tok.hash and again.vocab == tok.vocab and again.special_tokens == tok.special_tokens
    assert again.encode(STORY) == tok.encode(STORY) and again.file_text == tok.file_text and again.pattern == tok.pattern
    assert sorted(os.listdir(tmp_path / "deep")) == ["tokenizer.json", "tokenizer.txt"]
    assert len((tmp_path / "deep" / "tokenizer.txt").read_text(encoding="utf-8").splitlines()) == len(tok.vocab) == tok.vocab_size


@lru_cache
def fresh_python(text: str) -> dict:
    """What another Python, with another hash seed, imports and learns."""
    code = """if True:
        import json, sys, slm, slm.subwords
        heavy = [name for name in ("numba", "tokenizers", "tiktoken", "transformers", "sentencepiece") if name in sys.modules]
        train = {"unigram": slm.subwords.UnigramTokenizer.train, "wordpiece": slm.subwords.WordPieceTokenizer.train}
        hashes = {name: call(sys.argv[1], 680, strict=False).hash for name, call in train.items()}
        print(json.dumps({"heavy": heavy, "after": "numba" in sys.modules, **hashes}))"""
    env, root = {**os.environ, "PYTHONHASHSEED": "1"}, Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "-c", code, text], env=env, capture_output=True, text=True, check=True, cwd=root)
    return json.loads(done.stdout)


@each_kind
def test_training_does_not_depend_on_order_form_or_hash_seed(kind, tmp_path):
    cls, file = KINDS[kind][0], tmp_path / "all.txt"
    texts = STORY.splitlines()
    file.write_text("<|endoftext|>".join(texts), encoding="utf-8")
    wanted = cls.train(texts, 680, strict=False).hash
    assert cls.train(reversed(texts), 680, strict=False).hash == wanted == cls.train([file], 680, strict=False).hash
    assert fresh_python("<|endoftext|>".join(texts))[kind] == wanted


def test_neither_importing_nor_small_texts_load_other_packages():
    found = fresh_python("<|endoftext|>".join(STORY.splitlines()))
    assert found["heavy"] == [] and not found["after"]


# ------------------------------------------------------------------------------------------------------- bad input
@each_kind
@pytest.mark.parametrize("wrong", [0, 255, -5, 300.0, "300", None, True])
def test_vocabulary_sizes_that_cannot_be(kind, wrong):
    with pytest.raises(TokenizerError, match="vocab_size is .*: it must be at least (262|518), "):
        KINDS[kind][0].train(STORY, wrong)


@each_kind
def test_more_than_the_text_can_give(kind):
    cls = KINDS[kind][0]
    possible = cls.train(STORY, 9999, strict=False).vocab_size
    with pytest.raises(TokenizerError, match="can give only"):
        cls.train(STORY, 9999)
    assert cls.train(STORY, possible).vocab_size == possible


@each_kind
@pytest.mark.parametrize("names", [["a"], [""], ["<a>", "<a>"], [5], ["<\ud800>"]])
def test_special_tokens_that_cannot_be(kind, names):
    with pytest.raises(TokenizerError, match="special token .* is not usable"):
        KINDS[kind][0].train(STORY, special_tokens=names)


@each_kind
@pytest.mark.parametrize("bad", ["(", "a*", "gpt3", r"\p{Greek}+", None, 5])
def test_patterns_that_cannot_be(kind, bad):
    with pytest.raises(TokenizerError):
        KINDS[kind][0].train(STORY, 700, pattern=bad)


@each_kind
@pytest.mark.parametrize("text", [5, None, b"sun"])
def test_texts_that_are_none(kind, text, tmp_path):
    with pytest.raises(TokenizerError, match="must be a str"):
        trained(kind).encode(text)
    with pytest.raises(TokenizerError, match="must be a str"):
        KINDS[kind][0].train([text], 700)
    with pytest.raises(SLMError, match="no such file"):
        KINDS[kind][0].train(tmp_path / "none.txt", 700)


@pytest.mark.parametrize("scores", [{"ab": -1.0}, {"a": "x"}, {"a": math.nan}, {"a": -1.0, "": -1.0}, {1: -1.0},
                                    {"a": -1, "b": -1, "ab": -1}])
def test_scores_that_cannot_be(scores):
    with pytest.raises(TokenizerError, match="piece|score"):
        UnigramTokenizer(scores, ["ab"])


@pytest.mark.parametrize("alpha", [-1, math.nan, math.inf, "much", None])
def test_exponents_that_cannot_be(alpha):
    with pytest.raises(TokenizerError, match="alpha is"):
        trained("unigram").sampled(alpha, rng(0))


@pytest.mark.parametrize("coverage", [0, 99.95, -1, "all", None])
def test_coverages_that_cannot_be(coverage):
    with pytest.raises(TokenizerError, match="coverage is"):
        UnigramTokenizer.train(STORY, 500, coverage=coverage)


@pytest.mark.parametrize("kind", [*KINDS, *ADAPTERS])
def test_values_of_allowed_special_and_ids_that_cannot_be(kind):
    tok = trained(kind) if kind in KINDS else adapters()[kind]
    for call in (tok.encode, tok.encode_batch):
        with pytest.raises(TokenizerError, match="allowed_special is"):
            call("sun", "some")
    for ids in ([10 ** 6], [-1]):
        with pytest.raises(TokenizerError, match="is not an id"):
            tok.decode(ids)


leaves = st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3)
branches = lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
trees = st.recursive(leaves, branches, max_leaves=5)


@each_kind
@often(100)
@given(part=st.sampled_from(["model", "added_tokens", "pre_tokenizer", "decoder", "normalizer", "vocab", "type", "unk_token"]), tree=trees)
def test_any_part_of_a_file_may_be_anything(tmp_path_factory, kind, part, tree):
    data = json.loads(trained(kind).file_text)
    (data if part in data else data["model"])[part] = tree
    file = tmp_path_factory.getbasetemp() / "part.json"
    file.write_text(json.dumps(data))
    for load in (load_tokenizer, HFTokenizer.from_file):
        try:
            load(file)
        except SLMError as error:
            assert str(file) in str(error) and "\n" not in str(error)


# -------------------------------------------------------------------------------------------------------- adapters
@each_adapter
@often(100)
@given(text=any_text, data=st.binary(max_size=40))
def test_adapters_keep_every_text_and_every_byte(name, text, data):
    tok = adapters()[name]
    ids = tok.encode(text)
    assert tok.decode(ids) == known(text) == tok.decode(tok.encode(text, "all")) and tok.decode_bytes(tok.encode_bytes(data)) == data
    assert not set(ids) & set(tok.special_tokens.values()) and tok.encode_batch([text, text]) == [ids, ids]


@often(100)
@given(text=clean_text, allowed=st.sampled_from(["none", "all"]))
def test_adapters_give_the_ids_of_the_original(text, allowed):
    found = adapters()
    wanted = byte_bpe().encode(text, allowed)
    assert found["hf"].encode(text, allowed) == wanted == found["transformers"].encode(text, allowed)
    assert found["unigram file"].encode(text, allowed) == trained("unigram").encode(text, allowed)
    assert found["wordpiece file"].encode(text, allowed) == trained("wordpiece").encode(text, allowed)
    assert found["tiktoken"].encode(text, allowed) == [i - 6 if i >= 6 else 394 + i for i in wanted]


@each_adapter
@often(60)
@given(text=long_text, cuts=st.lists(st.integers(0, 999), max_size=6))
def test_chunks_through_adapters_give_the_ids_of_the_whole(name, text, cuts):
    tok = adapters()[name]
    for allowed in ("none", "all"):
        assert list(tok.encode_iterable(cut_at(text, cuts), allowed)) == tok.encode(text, allowed)


@each_adapter
def test_adapters_are_saved_as_one_file_that_loads(name, tmp_path):
    tok = adapters()[name]
    own, hf = load_tokenizer(tok.save(tmp_path / "t.json")), HFTokenizer.from_file(tmp_path / "t.json")
    assert own.encode(STORY) == tok.encode(STORY) == hf.encode(STORY) and own.vocab == tok.vocab == hf.vocab
    assert own.special_tokens == tok.special_tokens == hf.special_tokens and len(tok.hash) == 64
    (tmp_path / "s.txt").write_text(STORY, encoding="utf-8")
    assert tok.encode_file(tmp_path / "s.txt", tmp_path / "s.bin") == len(tok.encode(STORY))


def test_truncation_padding_and_marks_of_the_original_do_not_reach_the_adapter():
    theirs = tokenizers.Tokenizer.from_str(byte_bpe().file_text)
    theirs.enable_truncation(3)
    theirs.enable_padding(length=9)
    theirs.post_processor = tokenizers.processors.TemplateProcessing(single="<|user|> $A", special_tokens=[("<|user|>", 3)])
    assert HFTokenizer(theirs).encode_batch([STORY, "a"]) == byte_bpe().encode_batch([STORY, "a"]) and len(theirs.encode(STORY).ids) == 9


@pytest.mark.parametrize("missing, call", [
    ("tokenizers", lambda: HFTokenizer.from_file("t.json")), ("tiktoken", lambda: TiktokenTokenizer("gpt2")),
    ("transformers", lambda: TransformersTokenizer.from_pretrained("t"))])
def test_a_missing_package_is_one_sentence(missing, call, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(TokenizerError, match=f"needs the package {missing}, which is not installed: run pip install {missing}"):
        call()


@pytest.mark.parametrize("offline", [False, True])
def test_names_that_cannot_be_fetched(offline, tmp_path, monkeypatch):
    """Neither from a hub that does not know the name (one on this machine: the real one may be out of reach) nor without a network."""
    from huggingface_hub import constants, get_session
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    with fake_hub({}) as hub:
        to_our_hub = lambda request: setattr(request, "url", request.url.copy_with(scheme="http", host="127.0.0.1", port=hub.server_port))
        monkeypatch.setattr(get_session(), "event_hooks", {"request": [*get_session().event_hooks["request"], to_our_hub]})
        with pytest.raises(TokenizerError, match="no-one/no-model cannot be had as a tokenizer"):
            HFTokenizer.from_pretrained("no-one/no-model")
        with pytest.raises(TokenizerError, match="no-one/no-model cannot be had as a tokenizer"):
            TransformersTokenizer.from_pretrained("no-one/no-model")
        assert any("no-one/no-model" in path for path, _ in hub.asked) is not offline
    with pytest.raises(TokenizerError, match="tiktoken has no encoding 'gpt9'"):
        TiktokenTokenizer("gpt9")
    with pytest.raises(SLMError, match="no such file"):
        HFTokenizer.from_file(tmp_path / "none.json")
