"""The laboratory: paired trials, a fair race, ablations that go on, laws that come back, and a doctor who finds what was injected."""
from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from slm.ablate import ablate, compare, parse_axes, recipe, small_base, variants
from slm.config import ConfigError, ModelConfig, SLMError, seed_everything
from slm.counting import count_parameters
from slm.doctor import CHECKS, REMEDIES, Patient, examine, run_numbers
from slm.model import TransformerLM
from slm.optim import NEWTON_SCHULZ, TrainConfig, orthogonalize
from slm.scaling import bootstrap_laws, power_law, predict, rung, size_of
from slm.shakespeare import OURS, REFERENCE, fit_steps, our_shape, reference_shape
from slm.storyworld import stories
from slm.trials import cost_to_reach, held_out_nats, held_out_windows, mean_interval, split_letters, window_batches

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results"


@pytest.fixture(scope="module")
def letters():
    return split_letters("\n\n".join(tale.text for tale in stories(0, 120)))


# ----------------------------------------------------------------------------------------------------------------- trials
@pytest.mark.parametrize("n,length", [(2, 8), (9, 8), (10, 8), (50, 8), (57, 1), (100, 33), (1000, 64)])
def test_every_held_out_letter_counts_once(n, length):
    spans = held_out_windows(n, length)
    assert [label for _, end, first in spans for label in range(first, end)] == list(range(1, n))
    assert all(end - start <= length + 1 for start, end, _ in spans)


def test_held_out_loss_leaves_no_trace(letters):
    seed_everything(0)
    model = TransformerLM(small_base(len(letters.alphabet)).model).train()
    state = torch.get_rng_state()
    held_out_nats(model, letters.val[:300], 64)
    assert model.training and torch.equal(state, torch.get_rng_state())


def test_pairs_see_the_same_batches(letters):
    a, b = window_batches(letters.train, 4, 16, 3), window_batches(letters.train, 4, 16, 3)
    assert all(torch.equal(a(step)["ids"], b(step)["ids"]) for step in (5, 0, 5))


def test_cost_to_reach():
    curve = [{"seconds": 1.0, "val": 2.0}, {"seconds": 2.0, "val": 1.0}]
    assert cost_to_reach(curve, 1.5) == 1.5 and cost_to_reach(curve, 0.5) is None and cost_to_reach(curve, 2.5) == 1.0


# ------------------------------------------------------------------------------------------------------------------- Muon
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 6, 10), (2, 2, 10, 6)])
def test_orthogonalize_is_the_textbook_iteration(shape):
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    X = G.mT if shape[-2] > shape[-1] else G
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    expected = X.mT if shape[-2] > shape[-1] else X
    assert torch.allclose(orthogonalize(G, dtype=torch.float64), expected, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (3, 6, 10)])
@pytest.mark.parametrize("again", [(), (3,), (1, 2, 3, 4)])
def test_the_small_matrix_gives_the_same_update(shape, again):
    from slm.muon_bench import turn_on_gram
    G = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = turn_on_gram(G, [NEWTON_SCHULZ] * 5, torch.float64, again)
    assert torch.allclose(found, orthogonalize(G, dtype=torch.float64), atol=1e-10)


@pytest.mark.parametrize("lowest, rounds", [(0.001, 5), (0.01, 4), (0.1, 2), (0.5, 1)])
def test_best_polynomials_touch_their_error_at_both_ends(lowest, rounds):
    from slm.muon_bench import polar_express
    sigma = torch.linspace(lowest, 1, 100_000, dtype=torch.float64)
    for a, b, c in polar_express(lowest, rounds):
        sigma = a * sigma + b * sigma**3 + c * sigma**5
    low, high = sigma.min().item(), sigma.max().item()
    assert abs((1 - low) - (high - 1)) < 1e-4 and low > 0                                # as far below one as above it


def test_stored_ways_of_muon_come_from_a_command():
    from slm.muon_bench import turning_ways
    stored = json.loads((RESULTS / "muon_rounds.json").read_text())
    assert stored["command"].startswith("slm bench muon") and [row["who"] for row in stored["rows"]] == list(turning_ways())


# -------------------------------------------------------------------------------------------------------------- the recipe
def test_the_default_run_uses_the_recipe_that_was_searched_around():
    from slm.recipe import RECIPE_GRID
    from slm.stages import RUN_PRESETS
    from slm.time_to_loss import OURS as recipe
    for name, values in RECIPE_GRID:
        assert getattr(RUN_PRESETS["story"].pretrain, name) == getattr(recipe, name) and getattr(recipe, name) in values
    stored = json.loads((RESULTS / "recipe.json").read_text())
    assert stored["command"].startswith("slm bench recipe") and len(stored["tries"]) >= 10


# ----------------------------------------------------------------------------------------------------------- time to a loss
def test_both_sides_learn_from_the_same_rows(letters):
    """GPT-2 and ours: one text, one judge, sizes alike; the stored answer is what its curves say."""
    from slm.time_to_loss import Pieces, crossing, points_of, race_shape, with_steps
    pieces = Pieces(len(letters.alphabet), letters.train, letters.val[:500], 500)
    shape = ModelConfig(vocab_size=pieces.vocab_size, context_length=32, n_layer=1, n_head=1, d_model=64, d_ff=128)
    curves = {}
    for side, optimizer in (("gpt2", "adamw"), ("slm", "muon")):
        plan = with_steps(TrainConfig(batch_size=4, context_length=32, optimizer=optimizer, precision="float32", lr=3e-3), 60)
        curves[side] = list(points_of(side, plan, shape, pieces, points=6))
    for curve in curves.values():
        assert curve[-1]["tokens"] == 60 * 4 * 32 and curve[-1]["val"] < curve[0]["val"] < math.log(pieces.vocab_size)
    assert crossing(curves) is None or crossing(curves) > 0
    assert race_shape(1024).d_model % 64 == 0


def test_stored_time_to_loss_is_what_its_curves_say():
    from slm.time_to_loss import crossing
    stored = json.loads((RESULTS / "time_to_loss.json").read_text())
    races = [race["curves"] for race in stored["races"].values()]
    assert stored["command"].startswith("slm bench loss") and len(races) >= 3
    best = min(row["val"] for name, row in stored["tries"].items() if name.startswith("gpt2"))
    rates = {name for name in stored["tries"] if name.startswith("gpt2")}
    assert len(rates) >= 5 and all(abs(race["gpt2"][-1]["val"] - best) < 0.1 for race in races)     # the tuned one raced
    for race in races:
        assert crossing(race) is None or crossing(race) * race["gpt2"][-1]["seconds"] <= race["slm"][-1]["seconds"]


# --------------------------------------------------------------------------------------------------------------- the race
def test_the_race_is_fair():
    ours, theirs = (count_parameters(shape(65))["total"] for shape in (our_shape, reference_shape))
    assert ours <= theirs
    assert (REFERENCE.steps, REFERENCE.batch_size, REFERENCE.context_length, REFERENCE.lr) == (2000, 12, 64, 1e-3)
    assert fit_steps(OURS, 10.0, 0.1).steps * 0.1 <= 10.0


def test_stored_race_keeps_its_promise():
    stored = json.loads((RESULTS / "shakespeare.json").read_text())
    assert stored["command"].startswith("slm bench shakespeare")
    assert stored["letters"] == 1_115_394 and stored["ours"]["parameters"] <= stored["reference"]["parameters"]
    assert stored["ours"]["seconds"] <= 1.05 * stored["reference"]["seconds"] and stored["ours"]["val"] <= 1.65


# -------------------------------------------------------------------------------------------------------------- ablations
@pytest.mark.parametrize("words", [["nrom=a,b"], ["norm=rmsnorm"], ["norm"], ["norm=rmsnorm,rmsnorm"], ["=a,b"]])
def test_bad_axes(words):
    with pytest.raises(ConfigError):
        parse_axes(words)


def test_variants_change_one_thing_each():
    recipes = variants(parse_axes(["norm=rmsnorm,none", "position=rope,none,alibi"]))
    assert all(len(set(recipes["base"]) - set(settings)) == (name != "base") for name, settings in recipes.items())
    with pytest.raises(SLMError):
        recipe(small_base(40), ["norm=batchnorm"])


def test_an_ablation_goes_on(letters, tmp_path):
    axes, base, out = parse_axes(["optimizer=muon,adamw"]), small_base(len(letters.alphabet), 4), tmp_path / "a.json"
    ablate(axes, letters, base, 1, out, lambda line: None)
    said = []
    rows = ablate(axes, letters, base, 2, out, said.append)
    assert len(said) == 2 and len(rows) == 4
    assert rows == ablate(axes, letters, base, 2, None, lambda line: None) or all(row["val"] for row in rows)


def test_intervals_hold_the_truth():
    draws = np.random.default_rng(1).normal(3.0, 2.0, (4000, 4))
    assert abs(np.mean([abs(mean - 3) <= half for mean, half in map(mean_interval, draws)]) - 0.95) < 0.02


def test_stored_ablation_is_complete():
    stored = json.loads((RESULTS / "ablation.json").read_text())
    names = set(variants(parse_axes(stored["axes"])))
    table = compare(list(stored["runs"].values()))
    assert {row["variant"] for row in table} == names and all(row["runs"] == 3 for row in table)


# ---------------------------------------------------------------------------------------------------------------- scaling
@pytest.mark.parametrize("E,A,alpha", [(1.0, 5.0, 0.2), (0.5, 20.0, 0.4), (2.0, 3.0, 0.1)])
def test_power_law_comes_back(E, A, alpha):
    n = np.geomspace(1e4, 1e7, 7)
    e, a, exponent = power_law(n, E + A * n**-alpha)
    assert abs(e - E) < 0.03 and abs(exponent - alpha) < 0.02


def test_predictions_are_ordered():
    rows = [{"size": n, "val": 1 + 5 * n**-0.2 + 0.01 * k} for n in (1e3, 1e4, 1e5) for k in (-1, 1)]
    middle, low, high = predict(bootstrap_laws(rows, 40), 1e5)
    assert low <= middle <= high and size_of(rung(small_base(40), 32)) < size_of(rung(small_base(40), 48))


# ----------------------------------------------------------------------------------------------------------------- doctor
def plain(letters, **change):
    seed_everything(0)
    shape = ModelConfig(vocab_size=len(letters.alphabet), context_length=64, n_layer=1, n_head=2, d_model=32, d_ff=64)
    config = TrainConfig(steps=100, batch_size=4, context_length=64, lr=5e-3, warmup_steps=5)
    parts = {"model": TransformerLM(shape), "batch_at": window_batches(letters.train, 4, 64), "config": config}
    return Patient(**(parts | change))


def test_every_fault_has_a_remedy():
    assert set(CHECKS) == set(REMEDIES) and len(CHECKS) >= 10 and all(len(remedy) > 10 for remedy in REMEDIES.values())


@pytest.mark.parametrize("seed", range(3))
def test_the_doctor_is_silent_on_health(letters, seed):
    assert examine(plain(letters, batch_at=window_batches(letters.train, 4, 64, seed), held_out=window_batches(letters.val, 4, 64))) == []


def test_labels_that_skip_a_token_are_found(letters):
    def batch_at(step):
        rows = window_batches(letters.train, 4, 66)(step)["ids"]
        return {"ids": rows[:, :64], "labels": rows[:, 2:]}
    assert "moved by 2" in str(examine(plain(letters, batch_at=batch_at))[0])


def test_a_batch_without_targets_ends_in_a_finding_not_an_error(letters):
    def batch_at(step):
        ids = window_batches(letters.train, 4, 64)(step)["ids"]
        return {"ids": ids, "labels": torch.full_like(ids, -100)}
    assert "mask empty" in [finding.name for finding in examine(plain(letters, batch_at=batch_at))]


def test_numbers_of_runs():
    a = np.random.default_rng(0).integers(0, 50, (3, 40))
    numbers = run_numbers(a, 8).reshape(3, -1)
    assert len(np.unique(numbers)) == numbers.size and run_numbers(a[:, 5:20], 8)[0] == numbers[0, 5]
    assert math.prod(run_numbers(a[:, :4], 8).shape) == 0


# ----------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize("words", ["bench train", "bench muon", "bench shakespeare", "bench loss",
                                   "bench recipe", "ablate", "scale", "doctor"])
def test_commands_explain_themselves(words):
    from slm.cli import app
    from slm.shell import run_words
    code, out, _ = run_words(app, [*words.split(), "--help"])
    assert code == 0 and f"\n  slm {words}" in out


BAD = ["ablate norm=rmsnorm --text x.txt", "scale 16 20 --text x.txt", "doctor nowhere", "bench train --preset huge",
       "bench muon --text nowhere.txt", "bench shakespeare --text nowhere.txt", "bench loss nowhere.txt", "ablate norm=rmsnorm,none"]


@pytest.mark.parametrize("line", BAD)
def test_bad_requests_are_one_sentence(line, tmp_path, monkeypatch):
    import slm.cli  # noqa: F401
    from slm.shell import expect_refusal
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some letters " * 20)
    assert expect_refusal(line).startswith("slm: ")
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
