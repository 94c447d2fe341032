"""Guesses leave no trace: greedy texts are the plain loop's, drawn ones follow the model; the fused step gives the model's scores."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from slm.config import ModelConfig
from slm.decode import generate_naive
from slm.fused import NUMBERS, FusedReader
from slm.model import TransformerLM
from slm.quantize import quantize_model
from slm.slots import SlotCache, read_slots
from slm.speculate import DraftModel, Lookup, Speculator, draw, verify
from slm.strategies import Sampling


def babbler(width: int = 32, seed: int = 0, **more) -> TransformerLM:
    torch.manual_seed(seed)
    usual = dict(vocab_size=12, context_length=48, n_layer=2, n_head=2, d_model=width, tie_embeddings=False)
    model = TransformerLM(ModelConfig(**{**usual, **more})).eval()
    with torch.no_grad():
        (model.embed if model.head is None else model.head).weight.mul_(20 if model.head is None else 2)
    return model


@pytest.mark.parametrize("k", [1, 3, 8])
@pytest.mark.parametrize("how", [dict(), dict(repetition_penalty=1.3), dict(no_repeat_ngram=3), dict(frequency_penalty=0.5)])
def test_greedy_text_is_that_of_the_plain_loop(k, how):
    model, greedy = babbler(), Sampling(temperature=0, max_new_tokens=60, **how)
    naive = generate_naive(model, [0, 3, 5], greedy, (11,))
    for draft in (Lookup(1), Lookup(3), DraftModel(babbler(8, 1), greedy), DraftModel(model, greedy)):
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
    model, how = babbler(), Sampling(temperature=1.0, max_new_tokens=40)
    writer = Speculator(model, DraftModel(model, how), k=3)
    assert len(list(writer.write([0], how))) == 40 and writer.passes == 10


SHAPES = {"llama": dict(n_kv_head=1), "gpt": dict(position="learned", norm="layernorm", ffn="gelu", bias=True),
          "alibi": dict(position="alibi"), "window": dict(sliding_window=4, qk_norm=True), "post": dict(norm_position="post"),
          "tied": dict(tie_embeddings=True)}


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_fused_step_gives_the_scores_of_the_plain_model(shape, kind):
    model, draws = babbler(**SHAPES[shape]), np.random.default_rng(0)
    if kind == "int4":
        model = quantize_model(model, kind)                  # its own whole numbers, through torch's product in bfloat16
    reader, caches = FusedReader(model, kind), [SlotCache(model, 3), SlotCache(model, 3)]
    for _ in range(8):
        pieces = {int(s): draws.integers(0, 12, int(draws.integers(1, 5))).tolist() for s in draws.permutation(3)[:draws.integers(1, 4)]}
        fused, plain = reader(caches[0], pieces), read_slots(model, caches[1], pieces)
        error = (fused.softmax(-1) - plain.softmax(-1)).abs().max()
        assert error < {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.1, "int4": 0.1}[kind]
    assert caches[0].texts == caches[1].texts


@pytest.mark.slow
def test_the_compiled_step_gives_the_scores_of_the_eager_one():
    """In every kind of numbers. Where inputs are rounded, a last digit may turn into a whole step: so probabilities, and looser."""
    model = babbler()
    for kind, most in {"float32": 1e-5, "bfloat16": 0.05, "int8": 0.02, "int4": 0.05}.items():
        readers, caches = [FusedReader(model, kind, compiled) for compiled in (False, True)], [SlotCache(model, 2), SlotCache(model, 2)]
        for pieces in ({0: [1, 2, 3]}, {0: [4]}, {0: [5], 1: [6]}, {1: [7]}):
            eager, compiled = (reader(cache, pieces) for reader, cache in zip(readers, caches, strict=True))
            assert (eager.softmax(-1) - compiled.softmax(-1)).abs().max() < most, kind
