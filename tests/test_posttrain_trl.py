"""The DPO and IPO losses, their gradients and what is logged, against TRL: the same tiny model, the same pairs, its own tokenisation."""
from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from slm.config import ModelConfig
from slm.hf_folder import export_hf
from slm.model import TransformerLM
from slm.optim import TrainConfig
from slm.preference_variants import preference_objective
from slm.preferences import PreferenceData, build_preferences, pair_rows, with_reference
from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer

THINGS = {"snow": "white", "coal": "black", "grass": "green", "the sky": "blue"}
say = lambda role, text: {"role": role, "content": text}
PAIRS = [{"prompt": [say("user", f"What colour is {thing}?")], "chosen": f"It is {colour}.", "rejected": "Red, silly." if n % 2 else "Red."}
         for n, (thing, colour) in enumerate(THINGS.items())]
PAIRS += [{"prompt": [say("system", "One word."), say("user", "And coal?"), say("assistant", "Black."), say("user", "And snow?")],
           "chosen": "White.", "rejected": "I do not know that."}]


def tiny(tok: BPETokenizer, seed: int) -> TransformerLM:
    torch.manual_seed(seed)
    shape = dict(context_length=96, n_layer=2, n_head=2, n_kv_head=1, d_model=32, d_ff=64)
    model = TransformerLM(ModelConfig(vocab_size=tok.vocab_size, **shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # so that no residual branch is silent
    return model.eval()


@pytest.fixture(scope="module")
def ours(tmp_path_factory) -> tuple:
    """(policy, pairs that know the reference, folder of the policy, folder of the reference)"""
    words = [message["content"] for pair in PAIRS for message in pair["prompt"]] + [pair[side] for pair in PAIRS for side in
                                                                                  ("chosen", "rejected")]
    tok = BPETokenizer.train(words, vocab_size=300, special_tokens=SPECIAL_TOKENS, strict=False)
    reference = tiny(tok, 0)
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.03 * torch.randn_like(p))
    data = with_reference(build_preferences(PAIRS, tok, 96), reference, "the reference", TrainConfig(precision="float32"))
    folder = tmp_path_factory.mktemp("trl")
    return policy, data, export_hf(folder / "policy", policy, tok), export_hf(folder / "reference", reference, tok)


def trl_losses(ours: tuple, loss: str, beta: float, same: bool = False) -> tuple[float, np.ndarray, dict, list[int]]:
    """(loss, gradient of the embedding, metrics, tokens of each row) of the pairs in TRL; `same`: the policy starts as the reference."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    _, _, policy, reference = ours
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = [{"prompt": pair["prompt"], "chosen": [say("assistant", pair["chosen"])], "rejected": [say("assistant", pair["rejected"])]}
            for pair in PAIRS]
    args = trl.DPOConfig(output_dir=str(policy) + "-trl", loss_type=[loss], beta=beta, report_to=[], use_cpu=True, bf16=False,
                         gradient_checkpointing=False, per_device_train_batch_size=len(rows), max_length=96, disable_tqdm=True)
    start, tokenizer = load(reference if same else policy), AutoTokenizer.from_pretrained(policy)
    trainer = trl.DPOTrainer(start, ref_model=load(reference), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    value = trainer.compute_loss(trainer.model.train(), batch)
    value.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return value.item(), trainer.model.model.embed_tokens.weight.grad.numpy(), metrics, batch["completion_mask"].sum(1).tolist()


def our_loss(policy: TransformerLM, data: PreferenceData, loss: str, beta: float) -> tuple[float, np.ndarray, dict]:
    policy.zero_grad()
    value, count, metrics = preference_objective(loss, beta=beta)(policy, pair_rows(data, range(len(data))))
    (value / count).backward()
    return value.item() / count, policy.embed.weight.grad.numpy().copy(), {name: total / count for name, total in metrics.items()}


@pytest.mark.parametrize("loss, theirs, beta", [("dpo", "sigmoid", 0.1), ("dpo", "sigmoid", 0.7), ("ipo", "ipo", 0.3)])
def test_loss_and_gradient_equal_trl(ours, loss, theirs, beta):
    policy, data, _, _ = ours
    value, gradient, metrics = our_loss(policy, data, loss, beta)
    wanted, slope, logged, tokens = trl_losses(ours, theirs, beta)
    answers = data.lengths - data.answer_start[:, None]
    assert tokens == [*answers[:, 0].tolist(), *answers[:, 1].tolist()]  # TRL's tokenizer and template mark the same tokens
    assert abs(wanted - (math.log(2) if loss == "dpo" else (1 / (2 * beta)) ** 2)) > 1e-3  # the policy is not the reference
    assert value == pytest.approx(wanted, abs=2e-6, rel=2e-6)
    assert np.abs(slope).max() > 1e-3 and np.allclose(gradient, slope, atol=2e-6, rtol=1e-4)
    assert metrics["logp_chosen"] == pytest.approx(logged["logps/chosen"], rel=1e-5)
    assert metrics["logp_rejected"] == pytest.approx(logged["logps/rejected"], rel=1e-5)
    if loss == "dpo":
        assert metrics["margin"] == pytest.approx(logged["rewards/margins"], abs=1e-5)
        assert metrics["reward_chosen"] == pytest.approx(logged["rewards/chosen"], abs=1e-5)
        assert metrics["accuracy"] == pytest.approx(logged["rewards/accuracies"])


def test_both_start_at_ln_2(ours):
    _, data, _, reference = ours
    from slm.hf_folder import import_hf
    start = import_hf(reference)[0].eval()
    assert our_loss(start, data, "dpo", 0.1)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert trl_losses(ours, "sigmoid", 0.1, same=True)[0] == pytest.approx(math.log(2), abs=1e-6)


def test_loss_of_the_model_in_float64(ours):
    """From the model's logits on, in double precision and token by token: softmax, sums, margins, loss."""
    policy, data, _, reference = ours
    from slm.hf_folder import import_hf
    models = [policy, import_hf(reference)[0].eval()]
    logp = np.zeros((2, len(data), 2))
    for m, model in enumerate(models):
        for n in range(len(data)):
            for side in (0, 1):
                ids, start = data.ids[n, side, :data.lengths[n, side]].tolist(), int(data.answer_start[n])
                scores = model(torch.tensor([ids]))[0].double().detach().numpy()
                for t in range(start, len(ids)):
                    row = scores[t - 1] - scores[t - 1].max()
                    logp[m, n, side] += row[ids[t]] - math.log(np.exp(row).sum())
    margins = 0.1 * ((logp[0] - logp[1])[:, 0] - (logp[0] - logp[1])[:, 1])
    wanted = float(np.mean([math.log1p(math.exp(-m)) for m in margins]))
    assert our_loss(policy, data, "dpo", 0.1)[0] == pytest.approx(wanted, abs=1e-6)


def moved(params: list, direction: list, step: float) -> None:
    with torch.no_grad():
        for p, d in zip(params, direction, strict=True):
            p.add_(d, alpha=step)


@pytest.mark.parametrize("loss", ["dpo", "ipo", "simpo", "orpo"])
def test_gradient_of_the_weights_against_finite_differences(ours, loss):
    """The slope along random directions in the space of all weights; two step sizes, extrapolated to none (Richardson).

    In float64: on some processors the rounding of float32 is larger than what is measured.
    """
    policy, data, _, _ = ours
    model, batch = copy.deepcopy(policy).double(), pair_rows(data, range(len(data)))
    objective, params = preference_objective(loss, beta=0.5), list(model.parameters())
    of = lambda: objective(model, batch)[0] / len(data)
    gradient = torch.autograd.grad(of(), params)
    for seed in range(3):
        torch.manual_seed(seed)
        direction, found = [torch.randn_like(p) for p in params], []
        slope = sum((g * d).sum() for g, d in zip(gradient, direction, strict=True)).item()
        for step in (8e-4, 4e-4):
            moved(params, direction, step)
            ahead = of().item()
            moved(params, direction, -2 * step)
            found.append((ahead - of().item()) / (2 * step))
            moved(params, direction, step)
        assert (4 * found[1] - found[0]) / 3 == pytest.approx(slope, rel=2e-3, abs=2e-3), (loss, seed)
