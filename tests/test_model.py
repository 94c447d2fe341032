"""Promises of the model that must hold for every config: drawn at random, and one grid over the position schemes.

No future; reading in pieces through the cache = reading at once; a left-padded row = the row alone; packed documents =
separate documents; finite gradients for every weight; parameters counted exactly; all kernels agree. Then the equivalence
matrix (every fast path against the slow model, every layout), and properties of single parts.
"""
from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from slm.accounting import cost_table, plan, suitable_depth
from slm.attention import KERNELS, AttentionError, RollingKVCache, use_kernel
from slm.config import PRESETS, ModelConfig, RopeScaling, SLMError, config_from_depth, from_dict, to_dict
from slm.counting import activation_numbers, memory_bytes
from slm.equivalence import LAYOUTS, PATHS, TRAINING_PATHS, broken_cells, equivalence_matrix
from slm.feedforward import Experts, expert_gates
from slm.lora import Adapter, LoRAConfig, LoRALinear
from slm.model import ModelError, TransformerLM, count_parameters, flops_per_token, model_from_state
from slm.positions import stretched_rope
from slm.quantize import quantize_model
from slm.reference import slow_logits
from slm.steps import lm_loss

V, T = 23, 12
SETTINGS = settings(max_examples=40, deadline=None, derandomize=True, database=None)


@st.composite
def configs(draw):
    pick = lambda *options: draw(st.sampled_from(options))
    position, n_expert = pick("rope", "alibi", "learned", "none"), pick(None, None, 2, 3)
    stretch = dict(factor=4.0, original_max_position_embeddings=8)
    stretches = [None, *(RopeScaling(kind, **stretch) for kind in ("linear", "ntk", "yarn", "llama3"))]
    return ModelConfig(
        vocab_size=V, context_length=16, n_layer=pick(1, 2), n_head=4, n_kv_head=pick(4, 2, 1), d_model=32, d_ff=pick(None, 24),
        d_head=pick(None, 6), norm=pick("rmsnorm", "layernorm", "none"), norm_position=pick("pre", "post"),
        position=position, ffn=pick("swiglu", "gelu", "gelu_tanh", "relu2"), qk_norm=pick(False, True),
        attn_logit_softcap=pick(None, None, 2.0),
        n_expert=n_expert, n_expert_active=pick(None, 1, 2) if n_expert else None,
        rope_scaling=pick(*stretches) if position == "rope" else None,
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
    kernels = [kernel for kernel in KERNELS if kernel != "fused" or config.attn_logit_softcap is None]
    outputs = [run() for kernel in kernels if use_kernel(model, kernel)]
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


# ------------------------------------------------------------------------------------------------------ the equivalence matrix
@torch.no_grad()
def test_every_path_equals_the_slow_model_for_every_layout():
    matrix = equivalence_matrix()
    assert set(matrix) == set(LAYOUTS) and all(set(row) == set(PATHS) for row in matrix.values())
    assert broken_cells(matrix) == []


def test_gradients_of_training_paths_equal_those_of_the_slow_model():
    half = dict(list(LAYOUTS.items())[::2])                # all of them in the notebook
    assert "much at once" in half
    assert broken_cells(equivalence_matrix(half, {name: PATHS[name] for name in TRAINING_PATHS}, gradients=True)) == []


@torch.no_grad()
def test_broken_paths_turn_the_matrix_red(monkeypatch):
    some = {name: LAYOUTS[name] for name in ("grouped-query", "window 3", "top 2 of 4")}
    monkeypatch.setattr(Experts, "sparse", lambda self, x, gates: Experts.dense(self, x, (gates > 0).to(x.dtype)))   # forgets the gates
    monkeypatch.setattr(RollingKVCache, "held", property(lambda self: min(self.fill, max(0, self.window - 2))))     # forgets one too many
    red = broken_cells(equivalence_matrix(some, {name: PATHS[name] for name in ("fused", "cached")}))
    assert red == [("window 3", "cached"), ("top 2 of 4", "fused"), ("top 2 of 4", "cached")]


@torch.no_grad()
@pytest.mark.parametrize("broken, red", [
    ((LoRAConfig, "scale", property(lambda self: 1.1 * self.alpha / self.rank)), {"adapted", "merged"}),
    ((Adapter, "changed", lambda self, weight: weight), {"merged"}),                                          # merges nothing
    ((LoRALinear, "forward", lambda self, x: F.linear(x, self.weight, self.bias)), {"adapted"}),              # never asks the adapter
])
def test_broken_adapters_turn_their_columns_red(monkeypatch, broken, red):
    some = {name: LAYOUTS[name] for name in ("grouped-query", "gelu by tanh", "top 2 of 4")}
    monkeypatch.setattr(*broken)
    cells = broken_cells(equivalence_matrix(some, {name: PATHS[name] for name in ("fused", "adapted", "merged")}))
    assert cells == [(layout, path) for layout in some for path in ("adapted", "merged") if path in red]


def test_a_model_with_any_activation_loads_without_the_other_families():
    program = """import sys
from slm.config import ModelConfig
from slm.model import TransformerLM, model_from_state
config = dict(vocab_size=9, context_length=8, n_layer=1, n_head=1, d_model=8, ffn="gelu_tanh")
model_from_state(config, TransformerLM(ModelConfig(**config)).state_dict())
assert not {"slm.families", "slm.interop"} & set(sys.modules)"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@SETTINGS
@given(configs())
def test_the_slow_model_agrees_with_any_config(config):
    model, ids = build(config)
    equal(model(ids)[0], slow_logits(model, ids[0]))


@pytest.mark.skipif(not shutil.which("g++"), reason="no compiler")
@pytest.mark.parametrize("name", ["soft gate of 2", "learned", "alibi, window 3"])
def test_the_captured_graph_of_a_forward_pass_is_the_forward_pass(name):
    torch.compiler.reset()
    model, ids = build(LAYOUTS[name])
    with torch.no_grad():
        equal(torch.compile(model, backend="aot_eager")(ids), model(ids))


# --------------------------------------------------------------------------------------------------------- what must not change
FIXED = {  # the last logits of random ids, written down before experts and stretched rotations came
    "tiny": ([0.00995, -0.13162, 0.24296, -0.12824], 0.051113), "story": ([-0.06224, -0.09552, -0.21489, -0.30315], 0.102235),
    "char": ([-0.03083, 0.18552, 0.21402, -0.12571], 0.108856),
}


@pytest.mark.parametrize("name", FIXED)
def test_a_seed_gives_the_same_model_as_ever(name):
    torch.manual_seed(0)
    model = TransformerLM(PRESETS[name])
    logits = model(torch.randint(PRESETS[name].vocab_size, (2, 40)))
    last, power = FIXED[name]
    torch.testing.assert_close(logits[0, -1, :4], torch.tensor(last), atol=2e-4, rtol=1e-3)
    assert abs(logits.square().mean().item() - power) < 1e-4


def test_old_configs_without_the_new_fields_still_load():
    new = {"attn_logit_softcap", "rope_scaling", "n_expert", "n_expert_active", "router_aux_loss_coef"}
    old = {key: value for key, value in to_dict(PRESETS["story"]).items() if key not in new}
    assert from_dict(ModelConfig, old) == PRESETS["story"]
    assert all(to_dict(PRESETS["story"])[key] is None for key in new)      # so that an old run may be resumed


# ------------------------------------------------------------------------------------------------------------- positions
def hugging_face_frequencies(kind, K, theta, s):
    """Pair by pair in plain Python, after the published formulas of each type."""
    out, T = [], s.original_max_position_embeddings
    for i in range(K // 2):
        f = theta ** (-2 * i / K)
        wavelength = 2 * math.pi / f
        if kind == "linear":
            f /= s.factor
        elif kind == "ntk":
            f = (theta * s.factor ** (K / (K - 2))) ** (-2 * i / K)
        elif kind == "yarn":
            low, high = (K * math.log(T / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (s.beta_fast, s.beta_slow))
            low, high = max(math.floor(low), 0), min(math.ceil(high), K - 1)
            ramp = min(1, max(0, (i - low) / (high - low)))
            f = f / s.factor * ramp + f * (1 - ramp)
        elif wavelength > T / s.low_freq_factor:
            f /= s.factor
        elif wavelength > T / s.high_freq_factor:
            smooth = (T / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            f = (1 - smooth) * f / s.factor + smooth * f
        out.append(f)
    return torch.tensor(out)


@pytest.mark.parametrize("kind", ["linear", "ntk", "yarn", "llama3"])
@pytest.mark.parametrize("theta, trained", [(10000.0, 512), (500000.0, 8192)])
def test_stretched_rotations_follow_the_published_formulas(kind, theta, trained):
    scaling = RopeScaling(kind, 8.0, trained)
    frequencies, factor = stretched_rope(128, theta, scaling)
    torch.testing.assert_close(frequencies, hugging_face_frequencies(kind, 128, theta, scaling), atol=0, rtol=2e-4)
    assert factor == pytest.approx(0.1 * math.log(8) + 1 if kind == "yarn" else 1.0)


@pytest.mark.parametrize("position", ["rope", "none"])
def test_only_distances_count(position):
    """The same text behind three strange tokens that nobody may look at gives the same logits: nothing depends on the place itself."""
    model, ids = build(ModelConfig(vocab_size=V, context_length=16, n_layer=2, n_head=4, d_model=32, position=position))
    start = torch.full((3,), 3)
    shifted = model.pos_embed.rotation
    model.pos_embed.rotation = lambda places: None if position == "none" else shifted(places + 1000)
    moved = model(ids)
    model.pos_embed.rotation = shifted
    torch.testing.assert_close(moved, model(ids), atol=1e-3, rtol=1e-3)
    equal(model(torch.cat([ids[:, :3], ids], 1), start=start)[:, 3:], model(ids))


@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_texts_may_be_longer_than_the_context_unless_positions_are_a_table(position):
    model, _ = build(ModelConfig(vocab_size=V, context_length=8, n_layer=1, n_head=4, d_model=32, position=position))
    ids = torch.randint(V, (1, 50))
    assert model(ids).isfinite().all()
    equal(model(ids)[:, :20], model(ids[:, :20]))


# ----------------------------------------------------------------------------------------------------------------- caches
@pytest.mark.parametrize("position", ["rope", "alibi", "none"])
def test_a_rolling_cache_reads_an_endless_text_in_bounded_memory(position):
    model, _ = build(ModelConfig(vocab_size=V, context_length=32, n_layer=2, n_head=4, n_kv_head=2, d_model=32, position=position,
                                 sliding_window=5))
    ids, cache, out = torch.randint(V, (2, 150)), model.new_cache(2), []
    start, size = torch.tensor([0, 7]), cache.keys.nbytes
    assert isinstance(cache, RollingKVCache) and size * 2 == memory_bytes(model.config, 2)["cache"]
    for piece in ids.split([11, 1, 1, 40, 1, 6, 7, 3, 80], dim=1):
        out.append(model(piece, cache=cache, start=start if not out else None))
    assert cache.keys.nbytes == size and cache.length == 150
    got, whole = torch.cat(out, 1), model(ids, start=start)
    torch.testing.assert_close(got[0], whole[0], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(got[1, 7:], whole[1, 7:], atol=2e-4, rtol=1e-3)


def test_rows_can_leave_a_rolling_cache():
    model, ids = build(ModelConfig(vocab_size=V, n_layer=2, n_head=4, d_model=32, sliding_window=3))
    start, cache = torch.tensor([0, 2, 5]), model.new_cache(3, T)
    model(ids[:, :8], cache=cache, start=start)
    rest = model(ids[[0, 2], 8:], cache=cache.select(torch.tensor([0, 2])))
    equal(rest, model(ids, start=start)[[0, 2], 8:])


# ------------------------------------------------------------------------------------------------------- experts and gradients
@SETTINGS
@given(st.integers(2, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_gates_sum_to_one_and_as_many_are_active_as_asked(n_expert, n_active, seed):
    n_active = min(n_expert, n_active)
    gates, probs = expert_gates(torch.randn(7, n_expert, generator=torch.Generator().manual_seed(seed)), n_active)
    equal(probs.sum(-1), torch.ones(7))
    assert ((gates > 0).sum(-1) == n_active).all()
    equal(gates.sum(-1), torch.ones(7) if n_active > 1 or n_expert == 1 else probs.amax(-1))


def test_the_balancing_loss_reaches_the_training_loss_and_only_there():
    model, ids = build(ModelConfig(vocab_size=V, n_layer=2, n_head=4, d_model=32, n_expert=4, router_aux_loss_coef=0.5))
    batch = {"ids": ids[:, :-1], "labels": ids[:, 1:]}
    plain, count, metrics = lm_loss(model, batch)
    assert metrics == {}
    loss, _, metrics = lm_loss(model.train(), batch)
    torch.testing.assert_close(loss - plain, torch.tensor(metrics["balance"]), atol=1e-2, rtol=1e-3)
    assert 0.4 < metrics["balance"] / count < 2.1
    loss.backward()
    assert all(layer.ffn.router.weight.grad.abs().sum() > 0 for layer in model.layers)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_slopes(name):
    """The derivative along a random direction of all weights, against a central difference.

    Where a router chooses, only weights behind the last choice move: at a choice that changes there is no slope.
    """
    config = dataclasses.replace(LAYOUTS[name], norm_eps=1e-3)
    model, ids = build(config)
    model = model.double()
    jumps = config.n_expert and config.n_expert_active < config.n_expert
    weights = [p for n, p in model.named_parameters() if not jumps or n.startswith(("layers.1.ffn.experts", "head", "norm"))]
    mean_loss = lambda: (model.unembed(model.hidden(ids)) * torch.linspace(-1, 1, V)).mean()
    torch.manual_seed(1)
    direction, h = [torch.randn_like(p) for p in weights], 3e-4
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(mean_loss(), weights), direction, strict=True))
    ends = []
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, d in zip(weights, direction, strict=True):
                p += step * d
            ends.append(mean_loss())
    measured = (ends[0] - ends[1]) / (2 * h)
    assert abs(measured - slope) < 0.02 * abs(slope) + 2e-4


def test_a_model_of_experts_is_saved_loaded_and_quantised():
    model, ids = build(ModelConfig(vocab_size=V, n_layer=2, n_head=4, d_model=32, n_expert=3))
    again = model_from_state(to_dict(model.config), model.state_dict()).eval()
    assert torch.equal(again(ids), model(ids))
    small = quantize_model(model)
    assert (small(ids) - model(ids)).std() < 0.1 * model(ids).std()


def test_grouped_heads_with_as_many_key_heads_are_multi_head():
    shape = dict(vocab_size=V, n_layer=1, n_head=4, d_model=32)
    multi, ids = build(ModelConfig(**shape))
    grouped = model_from_state(ModelConfig(**shape, n_kv_head=4), multi.state_dict()).eval()
    assert torch.equal(grouped(ids), multi(ids))


# ------------------------------------------------------------------------------------------------------------ accounting
@SETTINGS
@given(configs())
def test_the_table_a_layer_adds_up(config):
    rows = cost_table(config, T)
    assert sum(row.parameters for row in rows) == count_parameters(config)["total"]
    assert sum(row.flops for row in rows) == flops_per_token(config, T, training=False)
    assert sum(row.activations for row in rows) == activation_numbers(config, T)


def test_presets_have_the_size_of_their_name():
    sizes = {name: count_parameters(config)["total"] for name, config in PRESETS.items()}
    assert sizes["pico"] == 29_106_688 and sizes["nlm"] == 22_696_448 and sizes["char"] == 3_246_336
    assert all(abs(sizes[f"{m}m"] / (m * 1e6) - 1) < 0.05 for m in (15, 125, 500))
    dial = [count_parameters(config_from_depth(depth))["total"] for depth in range(1, 30)]
    assert dial == sorted(dial)


def test_a_plan_says_what_fits():
    made = plan(PRESETS["story"], 10, 16, 256, speed=1000.0, free=10**10)
    assert made.fits and made.tokens == 600_000 and made.steps == 146
    tight = plan(PRESETS["story"], 10, 16, 256, speed=1000.0, free=10**8)
    assert not tight.fits and memory_bytes(PRESETS["story"], tight.largest_batch, 256)["training"] <= 10**8
    with pytest.raises(SLMError, match="minutes > 0"):
        plan(PRESETS["story"], 0)
    assert suitable_depth(10, 1e12) <= suitable_depth(1000, 1e12)


@pytest.mark.parametrize("settings, words", [
    (dict(n_expert_active=2), "no experts"), (dict(n_expert=2, n_expert_active=3), "only 2 experts"), (dict(n_expert=1), "between 2"),
    (dict(router_aux_loss_coef=0.1), "no experts"), (dict(position="alibi", rope_scaling=RopeScaling("ntk", 2.0)), "position is 'alibi'"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 4}), "original_max_position_embeddings"),
    (dict(rope_scaling={"rope_type": "dynamic"}), "rope_type"), (dict(rope_scaling={"factor": 0.5}), "between 1.0"),
    (dict(attn_logit_softcap=0.0), "attn_logit_softcap"),
])
def test_combinations_that_make_no_sense_are_refused_in_a_sentence(settings, words):
    with pytest.raises(SLMError, match=words) as e:
        ModelConfig(**settings)
    assert "\n" not in str(e.value)


def test_a_fused_kernel_cannot_cap_and_says_so():
    model, ids = build(ModelConfig(vocab_size=V, n_layer=1, n_head=4, d_model=32, attn_logit_softcap=2.0))
    with pytest.raises(AttentionError, match="attn_logit_softcap"):
        use_kernel(model, "fused")(ids)
