"""The engine: every request gets what the obvious loop writes for it, whoever comes, goes, is cancelled or shares a beginning."""
from __future__ import annotations

from functools import partial

import babbler
import numpy as np
import pytest
import torch

from slm.config import SLMError
from slm.decode import generate_naive
from slm.engine import Engine
from slm.quantize import quantize_model
from slm.request import Event, choose_slot, portions, shared_length
from slm.sample import LM, Sampling
from slm.slots import SlotCache, read_slots
from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer

SHAPES = {**babbler.SHAPES, "experts": dict(n_expert=3, d_ff=32)}
TEXT = "Once upon a time a small fox met a duck by the pond — “über!” said the duck 🦆. Let us go home! They went home. " * 30
babble = partial(babbler.babbler, vocab_size=290, context_length=96)


@pytest.fixture(scope="module")
def tok():
    return BPETokenizer.train([TEXT], vocab_size=290, special_tokens=SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def lm(tok):
    return LM(babble(), tok)


def drain(engine: Engine) -> list[Event]:
    events = []
    while not engine.idle:
        events += engine.step()
    return events


def naive(lm: LM, request) -> list[int]:
    return generate_naive(lm.model, request.prompt, request.sampling, lm.stop_ids, seed=request.seed)


def crowd(lm: LM, n: int, seed: int = 0, longest: int = 60) -> list[tuple[list[int], Sampling, int]]:
    """Requests of all kinds: short and long, greedy and wild, some with a common beginning."""
    draws = np.random.default_rng(seed)
    hows = [dict(temperature=0), dict(), dict(temperature=1.3, top_p=0.9), dict(top_k=5, repetition_penalty=1.3),
            dict(presence_penalty=0.7, frequency_penalty=0.2), dict(no_repeat_ngram=2), dict(typical_p=0.8, temperature=1.0)]
    common = draws.integers(10, 280, 30).tolist()
    made = []
    for i in range(n):
        own = draws.integers(10, 280, int(draws.integers(1, longest))).tolist()
        prompt = [0, *common[:int(draws.integers(0, 30))], *own] if i % 2 else [0, *own]
        made.append((prompt, Sampling(max_new_tokens=int(draws.integers(1, 25)), **hows[i % len(hows)]), 100 + i))
    return made


@pytest.mark.parametrize("shape", SHAPES)
def test_slots_give_the_scores_of_the_plain_model(shape):
    model, draws = babble(**SHAPES[shape]), np.random.default_rng(1)
    cache = SlotCache(model, slots=4)
    for _ in range(12):
        slots = draws.permutation(4)[:int(draws.integers(1, 5))].tolist()
        pieces = {slot: draws.integers(0, 290, int(draws.integers(1, 9))).tolist() for slot in slots}
        logits = read_slots(model, cache, pieces)
        for row, slot in zip(logits, pieces, strict=True):
            with torch.inference_mode():
                assert torch.allclose(row, model(torch.tensor([cache.texts[slot]]))[0, -1], atol=1e-3), (shape, slot)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_request_is_written_as_if_it_were_alone(shape, tok):
    lm = LM(babble(**SHAPES[shape]), tok)
    engine, requests = Engine(lm, slots=3, prefill_chunk=7), []
    for i, (prompt, sampling, seed) in enumerate(crowd(lm, 10)):
        requests.append(engine.submit(prompt, sampling, seed=seed))
        for _ in range(i % 3):
            engine.step()
    drain(engine)
    for r in requests:
        assert r.tokens == naive(lm, r), (shape, r.sampling)
        assert r.finish_reason in ("stop", "length", "context")


@pytest.mark.parametrize("slots, chunk, reuse", [(1, 128, True), (2, 1, False), (8, 3, True), (16, 64, False)])
def test_text_does_not_depend_on_slots_chunks_or_reuse(slots, chunk, reuse, lm):
    engine = Engine(lm, slots=slots, prefill_chunk=chunk, prefix_reuse=reuse)
    requests = [engine.submit(*ask[:2], seed=ask[2]) for ask in crowd(lm, 14, seed=slots)]
    events = drain(engine)
    for r in requests:
        assert r.tokens == naive(lm, r)
        mine = [e for e in events if e.request is r]
        assert [e.token for e in mine if e.token is not None] == r.tokens and not any(e.finish_reason for e in mine[:-1])
        assert mine[-1].finish_reason == r.finish_reason and "".join(e.text for e in mine) == lm.tokenizer.decode(r.tokens)
    assert sorted(engine.free) == list(range(slots)) and engine.active == engine.waiting == 0


def test_cancelling_leaves_everybody_else_alone(lm):
    for at in (0, 1, 5):
        engine = Engine(lm, slots=3, prefill_chunk=8)
        requests = [engine.submit(*ask[:2], seed=ask[2]) for ask in crowd(lm, 9, seed=4)]
        for _ in range(at):
            engine.step()
        for victim in requests[1::3]:
            engine.cancel(victim)
        drain(engine)
        for i, r in enumerate(requests):
            whole = naive(lm, r)
            if i % 3 == 1 and r.finish_reason == "cancelled":
                assert r.tokens == whole[:len(r.tokens)]
            else:
                assert r.tokens == whole
        assert sorted(engine.free) == [0, 1, 2]


def test_a_hundred_cancelled_requests_leak_no_slot(lm):
    engine, draws = Engine(lm, slots=4), np.random.default_rng(2)
    requests = []
    for prompt, sampling, seed in crowd(lm, 100, seed=5):
        requests.append(engine.submit(prompt, sampling, seed=seed))
        engine.step()
        engine.cancel(requests[int(draws.integers(len(requests)))])
    for r in requests:
        engine.cancel(r)
    reasons = [e.finish_reason for e in engine.step()]
    assert engine.idle and sorted(engine.free) == [0, 1, 2, 3] and set(reasons) <= {"cancelled"}
    assert all(r.finish_reason for r in requests)


def test_no_event_holds_half_a_character(lm):
    engine = Engine(lm, slots=2)
    hot = [engine.submit([0, 5], Sampling(temperature=5.0, max_new_tokens=80), seed=i) for i in range(6)]
    events = drain(engine)
    for r in hot:
        text = "".join(e.text for e in events if e.request is r)
        assert text == lm.tokenizer.decode(r.tokens)


def test_stop_texts_end_an_answer_inside_a_token(lm):
    plain = lm.tokenizer.decode(generate_naive(lm.model, [0, 5], Sampling(max_new_tokens=40), lm.stop_ids, seed=3))
    for cut in range(1, 12, 3):
        stop = plain[cut:cut + 2]
        engine = Engine(lm)
        request = engine.submit([0, 5], Sampling(max_new_tokens=40, stop=stop), seed=3)
        shown = "".join(e.text for e in drain(engine))
        assert shown == plain[:plain.find(stop)] and request.finish_reason == "stop"


def test_log_probabilities_are_the_models(lm):
    engine = Engine(lm, slots=2)
    how = Sampling(temperature=1.5, top_k=4, max_new_tokens=9)
    requests = [engine.submit([0, 9, 30 + i], how, seed=i, top_logprobs=3) for i in range(3)]
    events = drain(engine)
    for r in requests:
        with torch.inference_mode():
            logp = lm.model(torch.tensor([r.prompt + r.tokens]))[0].log_softmax(-1)
        mine = [e for e in events if e.request is r and e.token is not None]
        for i, e in enumerate(mine):
            row = logp[len(r.prompt) - 1 + i]
            assert e.logprob == pytest.approx(float(row[e.token]), abs=1e-4)
            assert [token for token, _ in e.top] == row.topk(3).indices.tolist()


def test_prefix_reuse_reads_only_what_is_new(lm):
    engine, begin = Engine(lm, slots=3), list(range(20, 70))
    first = engine.submit([0, *begin], Sampling(max_new_tokens=5), seed=1)
    drain(engine)
    again = engine.submit([0, *begin, 7, 8], Sampling(max_new_tokens=20), seed=2)
    engine.step()
    third = engine.submit([0, *begin, 9], Sampling(max_new_tokens=5), seed=3)
    drain(engine)
    assert (first.reused, again.reused, third.reused) == (0, 51, 51)
    assert [again.tokens, third.tokens] == [naive(lm, again), naive(lm, third)]


def test_reuse_never_takes_a_whole_prompt_or_a_foreign_one():
    assert choose_slot([[1, 2, 3], [1, 2]], [0, 1], [1, 2]) == (0, 0, 1)
    assert choose_slot([[5], [6]], [1], [7, 8]) == (1, 1, 0)
    assert shared_length([1, 2], [1, 2, 3]) == 2 and shared_length([2], [1]) == 0


@pytest.mark.parametrize("unread", [[1], [500, 3, 3], [2, 2, 2, 2], [50, 100, 1], [128] * 9])
def test_portions_stay_within_the_budget(unread):
    takes = portions(unread, 128)
    assert takes and max(takes) * len(takes) <= 128 and all(0 < t <= n for t, n in zip(takes, unread, strict=False))


def test_int8_and_a_short_context(tok):
    lm = LM(quantize_model(babble()), tok)
    engine = Engine(lm, slots=2, max_length=40)
    requests = [engine.submit([0, *range(30, 30 + n)], Sampling(max_new_tokens=90), seed=n) for n in (3, 20, 38)]
    drain(engine)
    for r in requests:
        assert r.tokens == naive(lm, r)[:40 - len(r.prompt)] and len(r.prompt) + len(r.tokens) <= 40


def test_a_long_prompt_holds_nobody_up_for_more_than_a_chunk(lm):
    engine = Engine(lm, slots=2, prefill_chunk=8)
    quick = engine.submit([0, 5], Sampling(max_new_tokens=60), seed=1)
    engine.step()
    engine.submit([0] * 90, Sampling(max_new_tokens=2), seed=2)
    for _ in range(8):
        before = len(quick.tokens)
        engine.step()
        assert len(quick.tokens) == before + 1 or quick.finish_reason


@pytest.mark.parametrize("ids, words", [([], "has no tokens"), ([1] * 96, "96 tokens, but"), ([290], "holds token 290")])
def test_impossible_requests_are_refused_at_once(ids, words, lm):
    engine = Engine(lm)
    with pytest.raises(SLMError, match=words):
        engine.submit(ids, Sampling())
    assert engine.idle
