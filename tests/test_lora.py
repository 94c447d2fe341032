"""LoRA: the base bit for bit at the start, gradients for adapters alone, merging within float tolerance, and no adapter on a wrong base."""
from __future__ import annotations

import copy
import json

import pytest
import torch

from slm.adapter_files import adapter_tensors, base_hash, load_adapter, read_adapter, save_adapter
from slm.artifacts import ArtifactError, lineage
from slm.config import PRESETS, ConfigError, ModelConfig, SLMError
from slm.decode import generate_ids
from slm.folders import verify
from slm.lora import (
    LoRAConfig,
    LoRAError,
    adapters_off,
    add_lora,
    choose_layers,
    lora_layers,
    lora_parameters,
    merge_lora,
    set_adapter,
)
from slm.model import TransformerLM
from slm.optim import TrainConfig, build_optimizer
from slm.pretrain import train
from slm.quantize import quantize_model
from slm.steps import lm_loss
from slm.strategies import Sampling

SMALL = dict(vocab_size=40, context_length=64, n_layer=2, d_model=32, n_head=4)
CONFIGS = {
    "plain": ModelConfig(**SMALL, n_kv_head=2),
    "biases": ModelConfig(**SMALL, bias=True, norm="layernorm", position="learned", ffn="gelu", tie_embeddings=False),
    "experts": ModelConfig(**SMALL, d_ff=32, n_expert=3, d_head=12, qk_norm=True),
}
VARIANTS = {"lora": {}, "rslora": {"rslora": True}, "dora": {"dora": True}, "one layer": {"targets": ("layers.1.attn.*",)},
            "rows": {"special": (7, 1)}, "table": {"embeddings": "all"}}
GELU = ("q_proj", "v_proj", "up_proj", "down_proj")


def made(name: str) -> TransformerLM:
    torch.manual_seed(0)
    return TransformerLM(CONFIGS[name]).eval()


def ids_of(seed: int = 0) -> torch.Tensor:
    return torch.randint(40, (2, 24), generator=torch.Generator().manual_seed(seed))


def moved(model: TransformerLM, name: str = "default", size: float = 0.3) -> TransformerLM:
    """The model with an adapter that does something."""
    g = torch.Generator().manual_seed(1)
    for key, t in adapter_tensors(model, name).items():
        t.data += size * torch.randn(t.shape, generator=g) * (0.1 if key.endswith("m") else 1)
    return model


def settings(name: str, **more) -> LoRAConfig:
    return LoRAConfig(**{"rank": 3, **({"targets": GELU} if name == "biases" else {}), **more})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_untrained_adapter_changes_no_bit(name, variant):
    model, ids = made(name), ids_of()
    with torch.no_grad():
        before = model(ids)
        adapted = add_lora(model, settings(name, **VARIANTS[variant]))
        assert lora_layers(adapted) and torch.equal(adapted(ids), before)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_merged_equals_unmerged_and_none_is_the_base(name, variant):
    base, ids = made(name), ids_of()
    model = moved(add_lora(copy.deepcopy(base), settings(name, **VARIANTS[variant])))
    merged = merge_lora(model)
    with torch.no_grad():
        assert (model(ids) - base(ids)).abs().max() > 0.01
        assert (merged(ids) - model(ids)).abs().max() < 1e-4
        assert torch.allclose(model.head_weight, merged.head_weight) and torch.equal(model.head_weight[:1], base.head_weight[:1]) == (
            variant != "table")
        losses = [lm_loss(m, {"ids": ids, "labels": ids_of(1)})[0].item() for m in (model, merged, base)]
        assert abs(losses[0] - losses[1]) < 1e-2 < abs(losses[0] - losses[2])                 # the loss reads the head past `unembed`
        with adapters_off(model):
            assert torch.equal(model(ids), base(ids)) and model.head_weight is model.get_parameter(
                "embed.weight" if model.head is None else "head.weight")
        assert torch.equal(set_adapter(model, None)(ids), base(ids))
    assert not lora_layers(merged) and merged.state_dict().keys() == base.state_dict().keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_active_adapter_is_trained(variant):
    model = add_lora(add_lora(made("plain"), LoRAConfig(rank=2), "first"), LoRAConfig(rank=3, **VARIANTS[variant]), "second")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        f"{path.rpartition('.')[0]}.adapters.second.{path.rpartition('.')[2]}" for path in adapter_tensors(model, "second")}
    moved(model, "second")
    loss, _, _ = lm_loss(model, {"ids": ids_of(), "labels": ids_of(1)})
    loss.backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None and bool(p.grad.abs().sum() > 0)) == (".second." in name), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_agree_with_finite_differences(variant):
    model = moved(add_lora(TransformerLM(ModelConfig(vocab_size=11, context_length=8, n_layer=2, d_model=8, n_head=2, d_ff=16)),
                           LoRAConfig(rank=2, **VARIANTS[variant]))).double().eval()
    part = next(t for key, t in adapter_tensors(model).items() if "layers.1.attn.v_proj.A" in key)
    other = next(t for key, t in adapter_tensors(model).items() if "layers.1.attn.q_proj.B" in key)
    ids = torch.arange(8)[None]

    def loss() -> torch.Tensor:
        return (model.hidden(ids) * torch.linspace(-1, 1, 8, dtype=torch.double)).sum()

    for t in (part, other):
        grad, = torch.autograd.grad(loss(), t)
        for i in range(0, t.numel(), 3):
            flat, h = t.data.view(-1), 1e-3          # norms are computed in float32, whatever the model
            flat[i] += h
            up = loss().item()
            flat[i] -= 2 * h
            down = loss().item()
            flat[i] += h
            assert abs((up - down) / (2 * h) - grad.view(-1)[i].item()) < 5e-3 + 2e-2 * abs(grad.view(-1)[i].item())


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_move_where_they_should_and_nowhere_else(name):
    base, ids = made(name), ids_of()
    model = moved(add_lora(copy.deepcopy(base), settings(name, targets=("layers.1.attn.v_proj",), special=(7, 1))))
    for key, t in adapter_tensors(model).items():
        if key.endswith(".B"):
            t.data.zero_()                                                                    # the rows alone
    tables = [n for n in ("embed", "head") if getattr(base, n) is not None]
    assert sorted(k for k in adapter_tensors(model) if k.endswith("delta")) == [f"{n}.delta" for n in tables]
    merged = merge_lora(model).state_dict()
    for key, t in base.state_dict().items():
        changed = (t != merged[key]).reshape(len(t), -1).any(1).nonzero().flatten().tolist()
        assert changed == ([1, 7] if key in [f"{n}.weight" for n in tables] else []), key
    untouched = torch.tensor([[2, 3, 4, 5]])
    others = [i for i in range(40) if i not in (1, 7)]
    assert torch.equal(model(untouched)[..., others], base(untouched)[..., others])
    assert not torch.equal(model(untouched)[..., [1, 7]], base(untouched)[..., [1, 7]]) and not torch.equal(model(ids), base(ids))


def test_counts_follow_the_formula_for_every_preset():
    for name, config in PRESETS.items():
        with torch.device("meta"):
            parts = choose_layers(TransformerLM(config), GELU)
        expected = sum(7 * sum(part.weight.shape) for part in parts.values())
        assert lora_parameters(config, LoRAConfig(rank=7, targets=GELU)) == expected, name
    model = add_lora(made("experts"), LoRAConfig(rank=5, dora=True))
    trained = lambda m: sum(p.numel() for p in m.parameters() if p.requires_grad)
    assert trained(model) == lora_parameters(CONFIGS["experts"], LoRAConfig(rank=5, dora=True))
    for name in CONFIGS:
        for more in ({"special": (3, 3, 0)}, {"embeddings": "all"}, {"embeddings": "none", "special": (3,)}):
            assert trained(add_lora(made(name), settings(name, **more))) == lora_parameters(CONFIGS[name], settings(name, **more))


def test_the_seed_decides_the_start_and_nothing_else():
    first, same, other = (adapter_tensors(add_lora(made("plain"), LoRAConfig(seed=seed))) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if key.endswith("A"))


def test_dropout_acts_in_training_only():
    model, ids = moved(add_lora(made("plain"), LoRAConfig(rank=4, dropout=0.5))), ids_of()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids), model(ids))
        assert not torch.equal(model.train()(ids), model(ids))


def test_an_adapter_saved_and_loaded_gives_the_same_bits(tmp_path):
    for i, (variant, more) in enumerate(VARIANTS.items()):
        model = moved(add_lora(made("plain"), LoRAConfig(rank=3, **more), "polite"), "polite")
        path = save_adapter(tmp_path / variant, model, "polite", parents={"base": f"{i}" * 64})
        fresh = made("plain")
        assert load_adapter(path, fresh) == "polite"
        with torch.no_grad():
            assert torch.equal(fresh(ids_of()), model(ids_of()))
        assert sum(f.stat().st_size for f in path.iterdir()) < 0.5 * sum(4 * p.numel() for p in made("plain").parameters())
        assert verify(path)["kind"] == "adapter" and lineage(path)["parents"]["base"]["id"] == f"{i}" * 64


def test_an_adapter_on_a_wrong_base_is_refused_and_changes_nothing(tmp_path):
    path = save_adapter(tmp_path / "a", moved(add_lora(made("plain"), LoRAConfig(rank=2))))
    other = made("plain")
    with torch.no_grad():
        other.layers[1].ffn.up_proj.weight[3, 4] += 1e-6
    for wrong in (other, made("experts"), merge_lora(moved(add_lora(made("plain"))))):
        names = list(wrong.state_dict())
        with pytest.raises(LoRAError, match="was trained on the base"):
            load_adapter(path, wrong)
        assert list(wrong.state_dict()) == names
    adapted = add_lora(made("plain"), LoRAConfig(rank=4), "other")
    assert base_hash(adapted) == base_hash(made("plain")) and load_adapter(path, adapted) == "default"      # beside another one it fits


def test_damaged_and_foreign_folders_are_explained(tmp_path):
    path = save_adapter(tmp_path / "a", add_lora(made("plain"), LoRAConfig(rank=2)))
    file = path / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match="damaged"):
        load_adapter(path, made("plain"))
    with pytest.raises(ArtifactError):
        read_adapter(tmp_path / "nothing")
    assert json.loads((path / "adapter.json").read_text())["lora"]["rank"] == 2


@pytest.mark.parametrize("call, words", [
    (lambda m: add_lora(m, LoRAConfig(targets=("q_prj",))), "no linear layer is called 'q_prj': choose among down_proj"),
    (lambda m: add_lora(m, LoRAConfig(targets=("head",))), "no linear layer is called 'head'"),
    (lambda m: add_lora(m, name="a.b"), "cannot be called 'a.b'"),
    (lambda m: add_lora(m, LoRAConfig(special=(3, 40))), "ids from 3 to 40, but the model has 40 tokens"),
    (lambda m: add_lora(add_lora(m)), "has an adapter 'default' already"),
    (lambda m: set_adapter(m, "x"), "has no adapter 'x'"),
    (lambda m: merge_lora(m), "no adapter to merge"),
    (lambda m: adapter_tensors(m), "has no adapter 'default'"),
])
def test_mistakes_are_explained_in_one_sentence(call, words):
    with pytest.raises(LoRAError, match=words):
        call(made("plain"))


@pytest.mark.parametrize("field, value", [
    ("rank", 0), ("rank", 2.5), ("alpha", 0.0), ("dropout", 1.0), ("targets", "q_proj"), ("seed", -1),
    ("embeddings", "some"), ("special", (1.5,))])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ConfigError, match=field):
        LoRAConfig(**{field: value})


def test_an_adapted_model_is_not_quantised_by_mistake():
    with pytest.raises(SLMError):
        quantize_model(moved(add_lora(made("plain"))))


def test_generation_with_a_cache_is_that_of_the_merged_model():
    model = moved(add_lora(made("plain"), LoRAConfig(rank=4)), size=0.5)
    prompts, greedy = [[1, 2, 3], [4, 5]], Sampling(temperature=0.0, max_new_tokens=12)
    assert generate_ids(model, prompts, greedy) == generate_ids(merge_lora(model), prompts, greedy)


@pytest.mark.parametrize("optimizer, lr", [("adamw", 3e-2), ("muon", 1e-2)])
def test_the_training_loop_trains_an_adapter_and_leaves_the_base_alone(optimizer, lr, tmp_path):
    """As `slm.sft` does it: the same loop, loss and optimizer; only the model has been given an adapter first."""
    model = add_lora(made("plain"), LoRAConfig(rank=4))
    before, rows = base_hash(model), (torch.arange(65)[None] * 3 + torch.arange(16)[:, None]) % 40
    config = TrainConfig(steps=40, batch_size=16, context_length=64, optimizer=optimizer, lr=lr, muon_lr=lr, warmup_steps=3,
                         weight_decay=0.0, precision="float32", save_seconds=None)
    kept = build_optimizer(model, config).tensors()
    assert all(".adapters." in name for name in kept)
    losses = []
    done = train(model, lambda step: {"ids": rows[:, :-1], "labels": rows[:, 1:]}, lambda m, b: losses.append(lm_loss(m, b)) or losses[-1],
                 config, tmp_path / "run", quiet=True)
    first, last = losses[0][0].item() / losses[0][1], done["loss"]
    assert last < 0.9 * first and base_hash(model) == before
    again = add_lora(made("plain"), LoRAConfig(rank=4))                         # a finished run is taken up again
    train(again, lambda step: {"ids": rows[:, :-1], "labels": rows[:, 1:]}, lm_loss, config, tmp_path / "run", quiet=True)
    assert all(torch.equal(t, adapter_tensors(again)[key]) for key, t in adapter_tensors(model).items())
