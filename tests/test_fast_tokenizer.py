"""The fast ways of cutting, encoding and decoding give what the definition gives: on hard Unicode, on any bytes, in any pieces, with any
number of threads, in bounded memory, with and without numba; and the same as `tokenizers` and `tiktoken`."""

from __future__ import annotations

import base64
import io
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm.fast_encode import FileEncoder, TokenBytes, cut_place, find_marks
from slm.kernels import compiled, has_numba
from slm.neighbours import numpy_ends, python_ends
from slm.scan import compiled_ends, digits_of, word_ends
from slm.text import SPECIAL_TOKENS, TokenizerError
from slm.tokenizer import BPETokenizer
from slm.tokenizer_bench import bench_tokenizers, made_up_text
from slm.words import PATTERNS

os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")
needs_numba = pytest.mark.skipif(not has_numba(), reason="numba is not installed")
CODES = [
    code for code in (*range(0x32000), *range(0x32000, 0x110000, 61)) if not 0xD800 <= code < 0xE000
]  # nothing is assigned above but tags
DIGITS = {"gpt2": 0, "gpt4": 3, PATTERNS["gpt4"].replace("{1,3}", "{1,2}"): 2, PATTERNS["gpt4"].replace("{1,3}", ""): 1}
WAYS = [True, False] if has_numba() else [False]
SPECIAL = {"<|endoftext|>": 5000, "<|end|>": 5001, "<a b>": 5002, "e <|x": 5003}

EDGES = """a s t D LL 's 're 'Ve 'ſ 'S \t \n \r \r\n 0 9 12345 ½ ² Ⅷ . , - _ !!! é e\u0301 ß ſ İ 語 ا 🙂 𝒜 𝟗
\u00a0 \u1680 \u2028 \u3000 \ufeff
\x1c
\x85 \u088f \u0558""".split(" ")
BROKEN = [b"\x80", b"\xe6\x97", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\xaf", b"\xff", b"\xf0\x9f\x99", b"'\xc5", b" ", b"  ", b"'"]
part = (
    st.sampled_from([edge.encode() for edge in EDGES] + BROKEN)
    | st.binary(max_size=4)
    | st.characters(exclude_categories=["Cs"]).map(str.encode)
)
hard_bytes = st.lists(part, max_size=16).map(b"".join)
hard_text = st.lists(
    st.sampled_from([*EDGES, " ", "  ", "<|endoftext|>", "<|end", "<a b>"]) | st.characters(exclude_categories=["Cs"]), max_size=16
).map("".join)
many = settings(max_examples=100, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return made_up_text(1)


@pytest.fixture(scope="module")
def data(documents) -> bytes:
    """Words, code, numbers, several scripts, no spaces at all, one very long word, marks, and bytes that are no UTF-8."""
    random = np.random.default_rng(0)
    noise = base64.b64encode(random.bytes(40_000)) + b"\n" + random.bytes(20_000) + b"a" * 30_000 + "日本語、テスト。".encode() * 3000
    return b"<|endoftext|>".join(text.encode() for text in documents) + b"<a b>" + noise + b"the <|x" * 3000


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def tok(request, documents) -> BPETokenizer:
    return BPETokenizer.train(documents, 3000, [], pattern=request.param)


def encoder_of(tok: BPETokenizer) -> FileEncoder:
    return FileEncoder(tok.byte_ids, tok.ranks, tok.pattern)


def definition(tok: BPETokenizer, data: bytes, special: dict[str, int] | None = None) -> list[int]:
    """The ids by regular expression, dictionary and lists alone."""
    slow, ids = encoder_of(tok), []
    for start, stop, mark in find_marks(data, special).tolist():
        text, at = data[start:stop], 0
        for end in python_ends(text, tok.pattern).tolist():
            ids += slow.encode_word(text[at:end])
            at = end
        ids += [mark] * (mark >= 0)
    return ids


# ----------------------------------------------------------------------------------------------------------- cutting
@needs_numba
@many
@given(st.lists(hard_bytes, min_size=1, max_size=4), st.integers(1, 24))
def test_three_ways_of_cutting_agree(texts, block):
    data, stops = np.frombuffer(b"".join(texts), np.uint8), np.cumsum([len(text) for text in texts])
    for pattern, digits in DIGITS.items():
        ends = np.concatenate([python_ends(text, pattern) + stop - len(text) for text, stop in zip(texts, stops)])
        assert digits_of(pattern) == digits
        assert np.array_equal(numpy_ends(data, stops, digits), ends)
        assert np.array_equal(compiled_ends(data, stops, digits, block), ends)


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_every_code_point_in_context_is_cut_as_in_the_tokenizers_library(pattern):
    hf = pytest.importorskip("tokenizers")
    split = hf.pre_tokenizers.Split(hf.Regex(PATTERNS[pattern]), behavior="isolated")
    if pattern == "gpt2":
        split = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    for first in range(0, len(CODES), 50_000):
        text = "".join(f"a{chr(code)}1 {chr(code)}" for code in CODES[first : first + 50_000])
        ends = [stop for _, (_, stop) in split.pre_tokenize_str(text)]
        sizes = np.cumsum(np.frombuffer(b"".join([len(char.encode()).to_bytes(1, "little") for char in text]), np.uint8))
        raw = np.frombuffer(text.encode(), np.uint8)
        for fast in WAYS:
            assert np.array_equal(word_ends(raw, pattern, fast), sizes[np.array(ends) - 1])


@many
@given(hard_text)
def test_words_of_hard_text_are_those_of_the_tokenizers_library(text):
    hf, raw = pytest.importorskip("tokenizers"), np.frombuffer(text.encode(), np.uint8)
    for pattern in ("gpt2", "gpt4"):
        split = hf.pre_tokenizers.Split(hf.Regex(PATTERNS[pattern]), behavior="isolated")
        ends = np.cumsum([len(word.encode()) for word, _ in split.pre_tokenize_str(text)])
        assert all(word_ends(raw, pattern, fast).tolist() == ends.tolist() for fast in WAYS)


# ---------------------------------------------------------------------------------------------------------- encoding
def test_ids_are_those_of_the_definition(tok, data):
    for text, special in ((data, SPECIAL), (data[-200_000:], None)):
        expected = definition(tok, text, special)
        assert all(encoder_of(tok).encode(text, special, fast).tolist() == expected for fast in WAYS)


@many
@given(hard_bytes)
def test_hard_bytes_have_the_ids_of_the_definition_and_come_back(tok, raw):
    encoder, tokens = encoder_of(tok), TokenBytes(tok.vocab)
    expected = definition(tok, raw)
    for fast in WAYS:
        ids = encoder.encode(raw, None, fast)
        assert ids.tolist() == expected and tokens.decode(ids, fast) == tokens.decode(expected, fast) == raw


def test_every_code_point_in_context_has_the_ids_of_tiktoken(documents):
    tiktoken = pytest.importorskip("tiktoken")
    text = "".join(f"a{chr(code)}s {chr(code)}1 '{chr(code)}\n" for code in CODES)
    for pattern in ("gpt2", "gpt4"):
        tok = BPETokenizer.train([text[:200_000], *documents[:20]], 1000, [], pattern=pattern)
        theirs = tiktoken.Encoding(
            "ours", pat_str=PATTERNS[pattern], mergeable_ranks={token: i for i, token in tok.vocab.items()}, special_tokens={}
        )
        expected = theirs.encode_to_numpy(text)
        for fast in WAYS[:1]:
            assert np.array_equal(tok.encoder.encode(text.encode(), None, fast), expected)


def test_ids_are_those_of_tokenizers_and_tiktoken_on_worst_texts(tok, documents):
    hf, tiktoken = pytest.importorskip("tokenizers").Tokenizer.from_str(tok.file_text), pytest.importorskip("tiktoken")
    theirs = tiktoken.Encoding(
        "ours", pat_str=PATTERNS[tok.pattern], mergeable_ranks={token: i for i, token in tok.vocab.items()}, special_tokens={}
    )
    random = np.random.default_rng(1)
    worst = [
        "a" * 20_000,
        "-" * 9999,
        " " * 9999,
        "\n" * 9999,
        " \n" * 5000,
        "ab" * 5000,
        "日本" * 5000,
        base64.b64encode(random.bytes(30_000)).decode(),
        "".join(map(str, random.integers(0, 10, 30_000))),
        "'" * 999,
        "x" * 15 + " " + "x" * 16,
        *documents[:30],
    ]
    for text in worst:
        expected = theirs.encode_ordinary(text)
        assert hf.encode(text).ids == expected
        assert all(tok.encoder.encode(text.encode(), None, fast).tolist() == expected for fast in WAYS)


@needs_numba
def test_a_word_of_a_million_letters_takes_no_time_to_speak_of(tok):
    ids = encoder_of(tok).encode(b"a" * 1_000_000, None, True)
    assert TokenBytes(tok.vocab).decode(ids, True) == b"a" * 1_000_000


def test_the_tokenizer_gives_the_same_ids_by_all_ways(documents, data):
    ways = {fast: BPETokenizer.train(documents, 1000, SPECIAL_TOKENS) for fast in (*WAYS, None)}
    text, results = data.decode("utf-8", "replace"), {}
    for fast, tok in ways.items():
        tok.fast = fast
        results[fast] = [tok.encode(text), tok.encode(text, "all"), tok.encode("short <|end|>", "all"), tok.encode_batch(documents[:3])]
        assert tok.decode(results[fast][1]) == text
    assert all(result == results[None] for result in results.values())
    assert 0 not in results[None][0] and 0 in results[None][1]


# ----------------------------------------------------------------------------------------------- pieces, blocks, threads
@pytest.mark.parametrize("size, threads", [(300, 1), (4096, 2), (70_000, 3), (1 << 20, 2), (1 << 22, 1)])
def test_ids_of_a_file_depend_neither_on_pieces_nor_on_threads(tok, data, size, threads, tmp_path):
    (tmp_path / "text").write_bytes(data)
    for special in (SPECIAL, None):
        whole = encoder_of(tok).encode(data, special, WAYS[0])
        assert encoder_of(tok).encode_file(tmp_path / "text", tmp_path / "ids", special, threads=threads, size=size, fast=WAYS[0]) == len(
            whole
        )
        assert np.array_equal(np.fromfile(tmp_path / "ids", "<u2"), whole)


@many
@given(st.lists(hard_text | st.sampled_from(["the ", "<a b>", " <|x", "e <|x", "12 "]), max_size=8).map("".join), st.integers(1, 30))
def test_a_stream_may_be_cut_anywhere(tok, text, size):
    encoder, raw = encoder_of(tok), text.encode()
    parts = list(encoder.encode_pieces(io.BytesIO(raw).read, SPECIAL, size=size, fast=WAYS[0]))
    assert [i for ids in parts for i in ids.tolist()] == definition(tok, raw, SPECIAL)


@many
@given(hard_bytes, hard_bytes)
def test_a_cut_is_safe_whatever_follows(tok, before, after):
    at = cut_place(before, SPECIAL, tok.pattern)
    assert 0 <= at <= len(before)
    assert definition(tok, before[:at], SPECIAL) + definition(tok, before[at:] + after, SPECIAL) == definition(tok, before + after, SPECIAL)


@needs_numba
def test_word_tables_of_any_size_give_the_same_ids(tok, data):
    from slm.joining import MergeTables
    from slm.word_table import WordTable

    data = data[:15_000] + data[-40_000:]
    raw, tables = np.frombuffer(data, np.uint8), MergeTables(tok.byte_ids, tok.ranks)
    results = [
        WordTable(limit, 8).encode(tables, digits_of(tok.pattern), raw, find_marks(data, None), block).tolist()
        for limit, block in ((8, 1 << 16), (1 << 10, 1000), (1 << 18, 17))
    ]
    assert results[0] == results[1] == results[2]


@needs_numba
def test_one_encoder_serves_many_threads_at_once(tok, documents):
    encoder = encoder_of(tok)
    expected = [encoder.encode(text.encode(), None, True).tolist() for text in documents[:200]]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda text: encoder.encode(text.encode(), None, True).tolist(), documents[:200]))
    assert results == expected and 1 <= len(encoder.word_tables) <= 8
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda text: encoder.encode(text.encode(), None, False).tolist(), documents[:200]))
    assert results == expected and 1 <= len(encoder.numpy_words) <= 4


# ----------------------------------------------------------------------------------------------------------- decoding
@pytest.mark.parametrize("fast", WAYS)
def test_decoding_is_joining_the_bytes_of_tokens(tok, fast):
    ids = np.random.default_rng(0).integers(0, 3000, 50_000)
    tokens, expected = TokenBytes(tok.vocab), b"".join(tok.vocab[i] for i in ids.tolist())
    assert tokens.decode(ids, fast) == tokens.decode(ids.tolist(), fast) == tokens.decode(ids.astype(np.uint16), fast) == expected
    for bad in (-1, 3000, 1 << 40):
        with pytest.raises(TokenizerError, match=f"{bad} is not an id"):
            tokens.decode([0, bad], fast)


# -------------------------------------------------------------------------------------------- memory, imports, no numba
def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, cwd=Path(__file__).parent
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


MEMORY = """
import gc, os, re, sys
from pathlib import Path
import numpy as np
from slm.fast_encode import FileEncoder
from slm.tokenizer import BPETokenizer
from slm.tokenizer_bench import made_up_text
folder, documents = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(os.environ["FOLDER"]), made_up_text(0.5)
tok = BPETokenizer.train(documents, 2000, [])
random, piece = np.random.default_rng(0), "\\n".join(documents).encode()
for name, n in (("small", 4), ("large", 40)):
    with open(folder / name, "wb") as file:
        for _ in range(n):
            new = np.frombuffer(piece, np.uint8).copy()
            letters = (new >= 97) & (new < 123)
            new[letters] = random.permutation(np.arange(97, 123))[new[letters] - 97]         # other words each time
            file.write(new.tobytes())
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
tok.encoder.encode(b"the sea", None, FAST)
del documents, piece, new, letters; gc.collect()
def measured(run):
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    run()
    return round(peak() - before)
def chunks():
    with open(folder / "large", encoding="utf-8", errors="replace") as file:
        while text := file.read(1 << 16):
            yield text
for threads in (1, 2):
    for name in ("small", "large"):
        encoder = FileEncoder(tok.byte_ids, tok.ranks)
        encoder.encode(b"the sea", None, FAST)
        print(threads, name, measured(lambda: encoder.encode_file(folder / name, folder / "ids", threads=threads, fast=FAST)))
print(0, "iterable", measured(lambda: sum(1 for _ in tok.encode_iterable(chunks()))))
"""


@needs_numba
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc to measure memory")
def test_memory_is_bounded_whatever_the_size_of_the_file(tmp_path):
    used = {}
    for line in run_python(MEMORY.replace("FAST", "True"), FOLDER=str(tmp_path), OMP_NUM_THREADS="1").splitlines():
        threads, name, megabytes = line.split()
        used[int(threads), name] = int(megabytes)
    assert (tmp_path / "large").stat().st_size > 9 * (tmp_path / "small").stat().st_size
    assert used[1, "large"] < 100 and used[2, "large"] < 160, used
    assert used[2, "large"] < used[2, "small"] + 40, used
    assert used[0, "iterable"] < 20, used


def test_importing_the_package_and_short_strings_leave_numba_alone():
    code = """
import sys, slm
from slm.tokenizer import BPETokenizer
import slm.fast_encode, slm.scan, slm.tokenizer_bench
tok = BPETokenizer.train("the sun and the sea " * 20, 270)
assert tok.decode(tok.encode("the sun, the sea")) == "the sun, the sea"
print("numba" in sys.modules)"""
    assert run_python(code) == "False"


def test_without_numba_everything_works_but_what_asks_for_it():
    code = """
import sys; sys.modules["numba"] = None
from slm.ground import sentence_of
from slm.kernels import LONG, has_numba
from slm.scan import word_ends
from slm.text import TokenizerError
from slm.tokenizer import BPETokenizer
import numpy as np
tok = BPETokenizer.train("the sun and the sea, naïve 42. " * 200, 280)
text = "the sunny sea, naïve 42. " * (2 * LONG // 24)
ids = tok.encode(text)
assert tok.decode(ids) == text and not has_numba()
assert word_ends(np.frombuffer(b"the sun", np.uint8), "gpt2", None).tolist() == [3, 7]
print(sentence_of(TokenizerError, tok.encoder.encode, b"the sea", None, True))
import hashlib; print(hashlib.sha256(np.array(ids, np.uint32).tobytes()).hexdigest())"""
    sentence, digest = run_python(code).splitlines()
    assert "numba" in sentence and 'pip install "slm[fast]"' in sentence
    if has_numba():
        assert (
            run_python(
                code.replace('sys.modules["numba"] = None', "import slm.kernels; slm.kernels.PAYS = 1")
                .replace("and not has_numba()", "")
                .replace('print(sentence_of(TokenizerError, tok.encoder.encode, b"the sea", None, True))', "")
            )
            == digest
        )


@needs_numba
def test_a_kernel_is_compiled_anew_when_a_kernel_that_it_calls_has_changed(tmp_path):
    (tmp_path / "kernels_a.py").write_text("def inner(x): return x + 1\n")
    (tmp_path / "kernels_b.py").write_text("from kernels_a import inner\ndef outer(x): return inner(x) * 2\n")
    code = "from kernels_b import outer\nfrom slm.kernels import compiled\nprint(compiled(outer)(1))"
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])
    assert run_python(code, PYTHONPATH=path) == "4"
    (tmp_path / "kernels_a.py").write_text("def inner(x): return x + 20\n")
    assert run_python(code, PYTHONPATH=path) == "42"
    assert compiled(word_sum)(3) == 6


def word_sum(n: int) -> int:
    total = 0
    for i in range(n + 1):
        total += i
    return total


# ---------------------------------------------------------------------------------------------------------- benchmark
def test_all_contenders_agree_in_the_benchmark():
    rows = bench_tokenizers(made_up_text(0.2, seed=3), [600], repeats=1, pattern="gpt4")
    assert {row["task"] for row in rows} == {"train", "encode"} and all(row["same"] is not False and row["seconds"] > 0 for row in rows)
    assert {"slm python", "slm numpy"} <= {row["who"] for row in rows if row["same"]}
