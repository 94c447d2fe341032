"""Promises of the model that must hold for every config: drawn at random, and one grid over the position schemes.

No future; reading in pieces through the cache = reading at once; a left-padded row = the row alone; packed documents =
separate documents; finite gradients for every weight; parameters counted exactly; all kernels agree.
"""
from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from slm.attention import KERNELS, AttentionError, use_kernel
from slm.config import ModelConfig, SLMError
from slm.model import ModelError, TransformerLM, count_parameters, flops_per_token, model_from_state

V, T = 23, 12
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def configs(draw):
    pick = lambda *options: draw(st.sampled_from(options))
    return ModelConfig(
        vocab_size=V, context_length=16, n_layer=pick(1, 2), n_head=4, n_kv_head=pick(4, 2, 1), d_model=32, d_ff=pick(None, 24),
        d_head=pick(None, 6), norm=pick("rmsnorm", "layernorm", "none"), norm_position=pick("pre", "post"),
        position=pick("rope", "alibi", "learned", "none"), ffn=pick("swiglu", "gelu", "relu2"), qk_norm=pick(False, True),
        bias=pick(False, True), tie_embeddings=pick(True, False), sliding_window=pick(None, 1, 4, 99), logit_softcap=pick(None, 5.0))


def build(config, seed=0):
    """A model whose weights, biases and norms are all random, so that none hides behind a zero or a one."""
    torch.manual_seed(seed)
    model = TransformerLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model, torch.randint(V, (3, T))


def equal(a, b):
    torch.testing.assert_close(a, b, atol=5e-5, rtol=5e-5)


def read(model, ids, pieces, start=None):
    cache, out = model.new_cache(len(ids), T), []
    for piece in ids.split(pieces, dim=1):
        out.append(model(piece, cache=cache, start=start))
        start = None
    return torch.cat(out, 1)


@SETTINGS
@given(configs(), st.lists(st.integers(1, 5), min_size=12, max_size=12))
def test_cached_is_full(config, sizes):
    model, ids = build(config)
    pieces = [n for n, end in zip(sizes, torch.tensor(sizes).cumsum(0).tolist(), strict=True) if end <= T]
    pieces += [T - sum(pieces)] if sum(pieces) < T else []
    full = model(ids)
    equal(read(model, ids, pieces), full)
    equal(read(model, ids, [1] * T), full)
    equal(read(model, ids, [T]), full)


@SETTINGS
@given(configs(), st.integers(1, T - 1))
def test_no_future(config, cut):
    model, ids = build(config)
    other = ids.clone()
    other[:, cut:] = (other[:, cut:] + 1) % V
    equal(model(other)[:, :cut], model(ids)[:, :cut])


@SETTINGS
@given(configs(), st.lists(st.integers(0, T - 1), min_size=3, max_size=3), st.sampled_from([[T], [4, 8], [1] * T]))
def test_left_padded_is_alone(config, starts, pieces):
    model, ids = build(config)
    padded = torch.where(torch.arange(T) < torch.tensor(starts)[:, None], 1, ids)
    cached, at_once = read(model, padded, pieces, torch.tensor(starts)), model(padded, start=torch.tensor(starts))
    assert cached.isfinite().all()
    for row, start in enumerate(starts):
        alone = model(ids[row:row + 1, start:])[0]
        equal(cached[row, start:], alone)
        equal(at_once[row, start:], alone)


@SETTINGS
@given(configs(), st.lists(st.booleans(), min_size=T - 1, max_size=T - 1))
def test_packed_documents_are_apart(config, cuts):
    model, ids = build(config)
    doc_ids = torch.tensor([0, *cuts]).cumsum(0)
    packed = model(ids, doc_ids=doc_ids.expand(3, T))
    for doc in doc_ids.unique():
        equal(packed[:, doc_ids == doc], model(ids[:, doc_ids == doc]))


@SETTINGS
@given(configs(), st.sampled_from(["plain", "start", "doc_ids"]))
def test_finite_gradients_and_exact_counts(config, how):
    model, ids = build(config)
    extra = {"plain": {}, "start": {"start": torch.tensor([0, 3, T - 1])}, "doc_ids": {"doc_ids": (ids > 9).cumsum(1)}}[how]
    F.cross_entropy(model(ids, **extra).flatten(0, 1), ids.flatten()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    counts = count_parameters(config)
    assert counts["total"] == model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert counts["non_embedding"] == model.num_parameters(non_embedding=True)
    with FlopCounterMode(display=False) as counter:
        use_kernel(model, "matmul")(ids)
    if config.sliding_window is None or config.sliding_window >= T:
        assert counter.get_total_flops() == ids.numel() * flops_per_token(config, T, training=False)


@SETTINGS
@given(configs(), st.sampled_from(["plain", "start", "doc_ids", "cache"]))
def test_kernels_agree(config, how):
    model, ids = build(config)
    extra = {"start": {"start": torch.tensor([0, 3, T - 1])}, "doc_ids": {"doc_ids": (ids > 9).cumsum(1)}}.get(how, {})
    run = (lambda: read(model, ids, [5, 1, 6])) if how == "cache" else (lambda: model(ids, **extra))
    outputs = [run() for kernel in KERNELS if use_kernel(model, kernel)]
    for out in outputs[1:]:
        equal(out, outputs[0])


@pytest.mark.parametrize("position", ["rope", "alibi", "learned", "none"])
def test_bfloat16_is_float32_up_to_rounding(position):
    shape = dict(vocab_size=V, context_length=16, n_layer=2, n_head=4, n_kv_head=2, d_model=32)
    model, ids = build(ModelConfig(**shape, position=position, qk_norm=True))
    exact = model(ids)
    with torch.autocast("cpu", torch.bfloat16):
        rough, cached = model(ids), read(model, ids, [5, 1, 6])
        assert model.new_cache(1).keys.dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert (rough - exact).std() < 0.03 * exact.std() and (cached - exact).std() < 0.03 * exact.std()
    whole = model.to(torch.bfloat16)(ids)            # weights in bfloat16 too
    assert whole.dtype == torch.float32 and (whole - exact).std() < 0.06 * exact.std()


def test_a_window_reaches_exactly_so_far():
    model, ids = build(ModelConfig(vocab_size=V, n_layer=1, n_head=4, d_model=32, sliding_window=4))
    first = ids.clone()
    first[:, 0] = (first[:, 0] + 1) % V
    moved = (model(first) - model(ids)).abs().amax((0, 2))
    assert (moved[:4] > 1e-4).all() and (moved[4:] < 1e-5).all()


def test_softcap_squeezes():
    model, ids = build(ModelConfig(vocab_size=V, n_layer=1, n_head=4, d_model=32, logit_softcap=2.0))
    raw = 5 * model.hidden(ids) @ model.head_weight.T
    capped = model.unembed(5 * model.hidden(ids))
    equal(capped, 2 * torch.tanh(raw / 2))
    assert raw.abs().max() > 2 >= capped.abs().max()


def test_cache_rows_can_leave():
    model, ids = build(ModelConfig(vocab_size=V, n_layer=2, n_head=4, d_model=32))
    start, cache = torch.tensor([0, 2, 5]), model.new_cache(3, T)
    model(ids[:, :8], cache=cache, start=start)
    rest = model(ids[[0, 2], 8:], cache=cache.select(torch.tensor([0, 2])))
    equal(rest, model(ids, start=start)[[0, 2], 8:])
    assert cache.length == T and cache.start.tolist() == [0, 5]


@pytest.mark.parametrize("call, words", [
    (lambda m, ids: m(ids[0]), "shape"),
    (lambda m, ids: m(ids.float()), "float32"),
    (lambda m, ids: m(ids[:, :0]), "time"),
    (lambda m, ids: m(ids + V), "vocabulary"),
    (lambda m, ids: m(ids - V), "vocabulary"),
    (lambda m, ids: m(ids, doc_ids=ids[0]), "doc_ids"),
    (lambda m, ids: m(ids, doc_ids=ids, cache=m.new_cache(3)), "own row"),
    (lambda m, ids: m(ids, start=torch.zeros(2)), "start"),
    (lambda m, ids: m(ids, cache=m.new_cache(2)), "rows"),
    (lambda m, ids: m(ids, cache=m.new_cache(3, 5)), "room for 5"),
    (lambda m, ids: m(torch.cat([ids, ids], 1)), "context_length 16"),
    (lambda m, ids: use_kernel(m, "fuse"), "fused"),
    (lambda m, ids: model_from_state(m.config, {}), "missing"),
])
def test_refusals_are_one_sentence(call, words):
    model, ids = build(ModelConfig(vocab_size=V, context_length=16, n_layer=1, n_head=2, d_model=16, position="learned"))
    with pytest.raises(SLMError, match=words) as e:
        call(model, ids)
    assert isinstance(e.value, ModelError | AttentionError | ValueError) and "\n" not in str(e.value)
