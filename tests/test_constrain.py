"""Constraints: thousands of texts judged by `jsonschema` and `re`, brute force, hostile patterns, llguidance, the engine."""
from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
import torch

from slm.config import ModelConfig
from slm.constrain import compile_constraint
from slm.engine import Engine
from slm.masks import apply_mask
from slm.model import TransformerLM
from slm.patterns import ConstraintError
from slm.sample import LM, Sampling
from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer, CharTokenizer

TEXT = 'Once a small fox met a duck: "über!" said the duck 🦆 at 10:45. {"name": "Ann", "age": 12, "tags": ["a", "b"], "ok": true} ' * 20
PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "minLength": 1, "maxLength": 12}, "age": {"type": "integer", "minimum": 0, "maximum": 130},
                   "tags": {"type": "array", "items": {"enum": ["a", "bé", 3, None]}, "maxItems": 3}, "ok": {"type": ["boolean", "null"]}},
}
UNION = {"anyOf": [{"type": "number", "minimum": -2, "maximum": 2},
                   {"type": "string", "pattern": "^[a-f]{2,4}$"}, {"const": {"é": [1, "x"]}}]}
TREE = {"$ref": "#/$defs/n", "$defs": {"n": {
    "type": "object", "properties": {"v": {"type": "integer", "minimum": -5, "maximum": 99},
                   "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
    "required": ["v", "next"], "additionalProperties": False}}}
NAMES = ["yes", "no", "no way", "über 🦆", "maybe\n"]
CASES = {
    "person": dict(json_schema=PERSON), "union": dict(json_schema=UNION), "tree": dict(json_schema=TREE),
    "date": dict(regex=r"[0-9]{4}-(0[1-9]|1[0-2])-[0-3][0-9]"), "words": dict(regex=r"(the|a) [a-zé🦆]{1,8}( [^\n\"]{1,6})?\."),
    "stars": dict(regex=r"a?(b|cd)*e{1,3}[^a-y]"), "choices": dict(choices=NAMES),
}


@pytest.fixture(scope="module")
def tok():
    return BPETokenizer.train([TEXT], vocab_size=320, special_tokens=SPECIAL_TOKENS)


def fits(text: str, *, json_schema=None, regex=None, choices=None) -> bool:
    """The independent judge of a text."""
    if choices is not None:
        return text in choices
    if regex is not None:
        return re.fullmatch(regex, text) is not None
    import jsonschema  # takes seconds, which at the top every worker would wait that collects this file

    jsonschema.validate(json.loads(text), json_schema)
    return True


def sample(compiled, tok, n: int, seed: int, temperature: float = 2.0, most: int = 2_000) -> list[str]:
    """n texts side by side, from a new row of random scores for every token of each."""
    generator = torch.Generator().manual_seed(seed)
    states, data, going = [compiled.start() for _ in range(n)], [b""] * n, list(range(n))
    for _ in range(most):
        scores = 3 * torch.randn(len(going), tok.vocab_size, generator=generator)
        scores = apply_mask(scores, torch.stack([states[i].mask() for i in going]))
        tokens = torch.multinomial((scores / temperature).softmax(-1), 1, generator=generator)[:, 0].tolist()
        for i, token in zip(going, tokens, strict=True):
            if not states[i].advance(token).finished:
                data[i] += tok.vocab[token]
        if not (going := [i for i in going if not states[i].finished]):
            return [text.decode() for text in data]
    raise AssertionError(f"{len(going)} texts found no end")


@pytest.mark.parametrize("name", CASES)
def test_thousands_of_texts_at_temperature_two_all_fit(tok, name):
    texts = sample(compile_constraint(tok, **CASES[name]), tok, 600, seed=len(name))
    assert all(fits(text, **CASES[name]) for text in texts)
    assert len(set(texts)) >= len(CASES[name].get("choices", range(100)))             # and they are not always the same


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_ten_thousand_texts_of_each_fit(tok, name):
    compiled = compile_constraint(tok, **CASES[name])
    assert all(fits(text, **CASES[name]) for seed in range(10) for text in sample(compiled, tok, 1000, seed=100 + seed))


# --- probabilities ---

PAIR = "(ab|ba|c){1,2}"


@pytest.fixture(scope="module")
def small():
    return CharTokenizer("abc", ["<|endoftext|>"])


def spellings(tok) -> dict[tuple[int, ...], str]:
    """Every text of at most four letters that `re` accepts, by its tokens."""
    ids, found, level = [tok.encode(c)[0] for c in "abc"], {}, [()]
    for _ in range(4):
        level = [(*before, i) for before in level for i in ids]
        found |= {ids: text for ids in level if re.fullmatch(PAIR, text := tok.decode(list(ids)))}
    return found


def step_probabilities(tok, before: tuple[int, ...], texts, scores) -> np.ndarray:
    """By brute force: the softmax at temperature 2 over those tokens with which some text of the language goes on."""
    good = {ids[len(before)] if len(ids) > len(before) else tok.eot_id for ids in texts if ids[:len(before)] == before}
    weights = np.array([np.exp(scores[i] / 2) if i in good else 0.0 for i in range(tok.vocab_size)])
    return weights / weights.sum()


def test_renormalised_probabilities_equal_brute_force(small):
    texts, compiled = spellings(small), compile_constraint(small, regex=PAIR)
    scores = np.random.default_rng(0).normal(0, 2, small.vocab_size)
    for before in {ids[:n] for ids in texts for n in range(len(ids) + 1)}:
        state = compiled.start()
        for token in before:
            state.advance(token)
        ours = apply_mask(torch.from_numpy(scores) / 2, state.mask()).softmax(-1).numpy()
        np.testing.assert_allclose(ours, step_probabilities(small, before, texts, scores), atol=1e-12)


def test_samples_follow_the_renormalised_distribution(small):
    """Chi-square over whole texts: the model has one row of scores for every position."""
    texts, compiled = spellings(small), compile_constraint(small, regex=PAIR)
    scores, draws, n, counts = np.random.default_rng(1).normal(0, 2, (5, small.vocab_size)), torch.Generator().manual_seed(0), 4000, {}
    chance = {ids: np.prod([step_probabilities(small, ids[:k], texts, scores[k])[(*ids, small.eot_id)[k]] for k in range(len(ids) + 1)])
              for ids in texts}
    assert abs(sum(chance.values()) - 1) < 1e-12
    for _ in range(n):
        state, ids = compiled.start(), ()
        while not state.finished:
            odds = apply_mask(torch.from_numpy(scores[len(ids)]) / 2, state.mask()).softmax(-1)
            state.advance(token := int(torch.multinomial(odds, 1, generator=draws)))
            ids += () if state.finished else (token,)
        counts[ids] = counts.get(ids, 0) + 1
    assert set(counts) <= set(texts)
    common = [ids for ids in texts if n * chance[ids] >= 5]                            # the rare ones together make the last cell
    seen, expected = np.array([counts.get(ids, 0) for ids in common]), np.array([n * chance[ids] for ids in common])
    seen, expected = np.append(seen, n - seen.sum()), np.append(expected, n - expected.sum())
    chi, degrees = float(((seen - expected) ** 2 / expected.clip(1e-9)).sum()), len(seen) - 1
    assert chi < degrees + 4 * (2 * degrees) ** 0.5 + 4                                # about one in ten thousand


# --- hostile and impossible ---

@pytest.mark.timeout(600)
@pytest.mark.parametrize("pattern", ["[ -~]{20000}", "((a{1,60}){1,60}){1,60}", "((a*)*)*b{99999}", ".*a.{500}",
                                     "(" * 3000 + "a" + ")" * 3000])
def test_hostile_patterns_end_within_seconds(tok, pattern):
    before = time.process_time()
    try:
        state = compile_constraint(tok, regex=pattern).start()
    except ConstraintError as error:
        assert str(error) and "\n" not in str(error)
    else:
        for _ in range(20):
            state.advance(int(state.mask().nonzero()[0]))
    assert time.process_time() - before < 10


@pytest.mark.parametrize("given", [dict(regex="[a-"), dict(choices=[]), dict(json_schema={"type": "integer", "minimum": 3, "maximum": 2}),
                                   dict(regex="a", choices=["a"]), dict(regex="a", backend="other")])
def test_what_cannot_be_met_is_refused(tok, given):
    with pytest.raises(ConstraintError):
        compile_constraint(tok, **given)


# --- the independent library ---

@pytest.mark.parametrize("pattern", [r"[0-9]+(\.[0-9][0-9])?", "(yes|no|maybe)!{0,3}", r"[a-zé]{2,8}( [a-zé]{2,8})*\.", "a?(b|cd)*e+",
                                     r"[^\n\"]{1,20}", "(a|ab)(c|bcd)*", "☃{1,3}|é.ü"])
def test_agrees_with_llguidance(tok, pattern):
    """Along random walks: what llguidance allows, we allow; the masks are equal but where it forces one way to cut certain text."""
    pytest.importorskip("llguidance")
    own, other = (compile_constraint(tok, regex=pattern, backend=backend) for backend in ("slm", "llguidance"))
    draws, compared = np.random.default_rng(0), 0
    for _ in range(4):
        ours, theirs = own.start(), other.start()
        for _ in range(30):
            a, b = ours.mask(), theirs.mask()
            assert not (b & ~a).any()
            assert torch.equal(a, b) or b.sum() == 1
            compared += 1
            token = int(draws.choice(b.nonzero()[:, 0].numpy()))
            if ours.advance(token).finished or theirs.advance(token).finished:
                break
    assert compared >= 8


# --- the engine ---

class Broken:
    """A constraint that allows everything but an end, and whose state gives up in the middle of a text."""
    def __init__(self, n_vocab: int, after: int, where: str):
        self.n_vocab, self.after, self.where, self.finished, self.read = n_vocab, after, where, False, 0

    def start(self): return Broken(self.n_vocab, self.after, self.where)

    def give_up(self, where: str) -> None:
        if (self.where, self.after) == (where, self.read):
            raise ConstraintError("the constraint takes too much work")

    def mask(self):
        self.give_up("mask")
        return torch.arange(self.n_vocab) >= len(SPECIAL_TOKENS)

    def advance(self, token: int):
        self.give_up("advance")
        self.read += 1


@pytest.fixture(scope="module")
def lm(tok):
    torch.manual_seed(0)
    shape = dict(vocab_size=tok.vocab_size, context_length=96, n_layer=1, n_head=2, d_model=16, tie_embeddings=False)
    return LM(TransformerLM(ModelConfig(**shape)).eval(), tok)


def finish(engine: Engine, *requests) -> list[str]:
    texts = {id(r): "" for r in requests}
    while not engine.idle:
        for event in engine.step():
            texts[id(event.request)] += event.text
    return list(texts.values())


@pytest.mark.parametrize("where", ["mask", "advance"])
@pytest.mark.parametrize("temperature", [0, 2.0])
def test_a_constraint_that_gives_up_ends_its_request_alone(lm, where, temperature):
    how, compiled = Sampling(max_new_tokens=30, temperature=temperature), compile_constraint(lm.tokenizer, json_schema=PERSON)
    submit = lambda engine, seed, constraint: engine.submit([0, 5, 9], how, seed=seed, constraint=constraint)
    alone = [finish(engine := Engine(lm, slots=2), submit(engine, seed, constraint))[0] for seed, constraint in ((1, None), (2, compiled))]
    engine = Engine(lm, slots=3)
    requests = [submit(engine, 1, None), submit(engine, 3, Broken(lm.tokenizer.vocab_size, 4, where)), submit(engine, 2, compiled)]
    texts = finish(engine, *requests)
    assert [texts[0], texts[2]] == alone
    assert requests[1].finish_reason == "stop" and len(requests[1].tokens) == 4
    assert isinstance(requests[1].error, ConstraintError) and requests[0].error is None
    assert engine.active == 0 and len(engine.free) == 3
