"""Guesses leave no trace: greedy texts are the plain loop's, drawn ones follow the model; the fused step gives the model's scores."""
from __future__ import annotations

import shutil

import babbler
import numpy as np
import pytest
import torch

from slm.c_step import C_KINDS, CReader
from slm.constrain import compile_constraint
from slm.decode import generate_naive
from slm.engine import Engine
from slm.fused import NUMBERS, FusedReader
from slm.guessing import GuessingEngine
from slm.model import TransformerLM
from slm.quantize import quantize_model
from slm.sample import LM
from slm.slots import SlotCache, read_slots
from slm.speculate import DraftModel, Lookup, Speculator, draw, verify
from slm.strategies import Sampling
from slm.tokenizer import CharTokenizer


def babble(width: int = 32, seed: int = 0, **shape) -> TransformerLM:
    return babbler.babbler(vocab_size=12, context_length=48, seed=seed, **{"d_model": width, "n_head": 2, **shape})


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("how", [dict(), dict(repetition_penalty=1.3), dict(no_repeat_ngram=3), dict(frequency_penalty=0.5)])
def test_greedy_text_is_that_of_the_plain_loop(k, how):
    model, greedy = babble(), Sampling(temperature=0, max_new_tokens=60, **how)
    naive = generate_naive(model, [0, 3, 5], greedy, (11,))
    for draft in (Lookup(1), Lookup(3), DraftModel(babble(8, 1), greedy), DraftModel(model, greedy)):
        assert list(Speculator(model, draft, k).write([0, 3, 5], greedy, (11,))) == naive


@pytest.mark.parametrize("seed", range(3))
def test_whatever_the_draft_the_first_token_follows_the_model(seed):
    draws = np.random.default_rng(seed)
    p = torch.tensor(draws.dirichlet(np.ones(6) * 0.5, 2))
    q = torch.tensor(draws.dirichlet(np.ones(6) * 0.5, 1))
    found = torch.tensor([verify(p, q, [draw(q[0], draws.random())], draws)[0] for _ in range(10_000)])
    counts, expected = torch.bincount(found, minlength=6), 10_000 * p[0]
    seen = expected > 5
    assert float(((counts - expected)[seen] ** 2 / expected[seen]).sum()) < 20.5      # χ², at most 5 degrees of freedom, 1 in 1,000


def test_a_perfect_draft_writes_k_plus_one_tokens_a_pass():
    model, how = babble(), Sampling(temperature=1.0, max_new_tokens=40)
    writer = Speculator(model, DraftModel(model, how), k=3)
    assert len(list(writer.write([0], how))) == 40 and writer.passes == 10


# --- many at once ---

needs_cc = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler")
HOWS = [dict(temperature=0), dict(), dict(temperature=1.5, top_k=5), dict(repetition_penalty=1.4), dict(frequency_penalty=0.6)]
ASKS = [([1 + i, 2, 3, *range(2, 2 + i), 2, 3], Sampling(max_new_tokens=5 + 3 * i, **HOWS[i % 5])) for i in range(10)]


@pytest.fixture(scope="module")
def lms():
    """A model that knows eleven letters and an end, and a smaller one."""
    tok = CharTokenizer("abcdefghijk", ["<|endoftext|>"])
    shape = dict(vocab_size=tok.vocab_size, context_length=48, n_head=2)
    return LM(babbler.babbler(**shape), tok), LM(babbler.babbler(**shape, d_model=16, seed=1), tok)


def finish(engine: Engine, rows: list[int], constraint: object = None) -> list[list[int]]:
    """Some of ten requests, submitted while others are being written; their tokens."""
    requests = []
    for i in rows:
        requests.append(engine.submit(*ASKS[i], seed=i, constraint=constraint))
        engine.step()
    while not engine.idle:
        engine.step()
    return [r.tokens for r in requests]


@pytest.mark.parametrize("who", ["text", "small", "itself"])
@pytest.mark.parametrize("k, slots, chunk", [(1, 1, 128), (4, 3, 4), (7, 8, 1)])
def test_guesses_in_the_engine_change_no_text_and_neighbours_do_not_matter(lms, who, k, slots, chunk):
    lm, small = lms
    make = lambda: GuessingEngine(lm, slots=slots, prefill_chunk=chunk, k=k, draft={"text": None, "small": small, "itself": lm}[who])
    plain, together = finish(Engine(lm, slots=3), range(10)), finish(engine := make(), range(10))
    assert together == plain and together[3] == finish(make(), [3])[0] and sorted(engine.free) == list(range(slots))
    assert together == [generate_naive(lm.model, *ask, lm.stop_ids, seed=i) for i, ask in enumerate(ASKS)]


@pytest.mark.parametrize("backend", ["slm", "llguidance"])
def test_a_constraint_holds_at_every_guessed_place(lms, backend):
    lm, small = lms
    language = compile_constraint(lm.tokenizer, regex="(ab|ba|cd){2,9}", backend=backend)
    plain = finish(Engine(lm, slots=2), range(8), language)
    for draft in (None, small):
        assert finish(GuessingEngine(lm, slots=2, draft=draft), range(8), language) == plain
    assert any(len(tokens) > 6 for tokens in plain)


def test_pairs_of_tokens_follow_the_model(lms):
    """Chi-square over the first two tokens of 3,000 requests, guessed by a small model, against the exact probabilities."""
    lm, small = lms
    engine, V = GuessingEngine(lm, slots=16, draft=small, k=2), lm.tokenizer.vocab_size
    with torch.inference_mode():
        first = (lm.model(torch.tensor([[3, 4]]))[0, -1] / 3).softmax(-1)
        second = torch.stack([(lm.model(torch.tensor([[3, 4, t]]))[0, -1] / 3).softmax(-1) for t in range(V)])
    expected = 3000 * (first[:, None] * second).double()
    requests = [engine.submit([3, 4], Sampling(temperature=3.0, max_new_tokens=2), seed=i) for i in range(3000)]
    while not engine.idle:
        engine.step()
    counts = torch.zeros(V, V, dtype=torch.float64)
    for r in requests:
        if len(r.tokens) == 2:
            counts[r.tokens[0], r.tokens[1]] += 1
    common = expected > 5
    common[list(lm.stop_ids)], common[:, list(lm.stop_ids)] = False, False
    chi, degrees = float(((counts - expected)[common] ** 2 / expected[common]).sum()), int(common.sum())
    assert degrees > 10 and chi < degrees + 4 * (2 * degrees) ** 0.5 + 4                # about one in ten thousand


SHAPES = {**babbler.SHAPES, "llama": dict(n_kv_head=1), "window": dict(sliding_window=4, qk_norm=True)}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_step_gives_the_scores_of_the_plain_model(shape, kind):
    model, draws = babble(**SHAPES[shape]), np.random.default_rng(0)
    if kind == "int4":
        model = quantize_model(model, kind)                  # its own whole numbers, through torch's product in bfloat16
    reader, caches = FusedReader(model, kind), [SlotCache(model, 3), SlotCache(model, 3)]
    for _ in range(8):
        pieces = {int(s): draws.integers(0, 12, int(draws.integers(1, 5))).tolist() for s in draws.permutation(3)[:draws.integers(1, 4)]}
        fused, plain = reader(caches[0], pieces), read_slots(model, caches[1], pieces)
        error = (fused.softmax(-1) - plain.softmax(-1)).abs().max()
        assert error < {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1, "int4": 0.1}[kind]
    assert caches[0].texts == caches[1].texts


@needs_cc
@pytest.mark.parametrize("kind", C_KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_in_c_gives_the_scores_of_the_eager_one(shape, kind):
    """Pieces of all lengths, many rows and few, in slots that forget; where inputs are rounded, a last digit may become a whole step."""
    model, draws = babble(**SHAPES[shape]), np.random.default_rng(1)
    readers, caches = [FusedReader(model, kind), CReader(model, kind)], [SlotCache(model, 3), SlotCache(model, 3)]
    for i in range(12):
        pieces = {int(s): draws.integers(0, 12, int(draws.integers(1, 9))).tolist() for s in draws.permutation(3)[:draws.integers(1, 4)]}
        for cache in caches:
            for slot, new in pieces.items():
                cache.keep(slot, min(len(cache.texts[slot]), 48 - len(new), 7 * i))
        eager, c = (reader(cache, pieces, every=i % 3 == 0) for reader, cache in zip(readers, caches, strict=True))
        rows = [eager[j, :len(new)] - c[j, :len(new)] for j, new in enumerate(pieces.values())] if i % 3 == 0 else [eager - c]
        assert max(float(row.abs().max()) for row in rows) < {"float32": 2e-4, "int8": 0.2}[kind]
    assert caches[0].texts == caches[1].texts


@needs_cc
def test_an_engine_in_c_writes_the_plain_models_text(lms):
    lm, small = lms
    fast = LM(lm.model, lm.tokenizer).compile("float32")
    assert isinstance(fast.reader, CReader)
    plain = finish(Engine(lm, slots=3), range(10))
    for engine in (Engine(fast, slots=3, prefill_chunk=4), GuessingEngine(fast, slots=3, draft=small)):
        assert finish(engine, range(10)) == plain
