"""SFT and DPO: exact masks, no cross-contamination, the loss against its formula, every diagnosis by injection, bad rows by number."""
from __future__ import annotations

import gzip
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from slm.adapter_files import adapter_tensors, load_adapter
from slm.artifacts import ArtifactError, artifact_id, latest_checkpoint, lineage, save_checkpoint
from slm.chat_mix import share_counts
from slm.chat_rows import (
    IGNORE,
    SFTData,
    SFTError,
    build_sft,
    chat_labels,
    fitting_length,
    pack_best_fit,
    pack_in_order,
    padding_share,
    render_chats,
)
from slm.chats import ChatError, load_chats, load_pairs
from slm.config import ModelConfig, to_dict
from slm.dpo import DPOError, diagnose, dpo, dpo_loss, dpo_objective, inspect_pairs
from slm.grpo import group_advantages, grpo_losses
from slm.lora import LoRAConfig, merge_lora
from slm.model import TransformerLM
from slm.optim import TrainConfig
from slm.preference_variants import by_base, ipo_loss, orpo_loss, simpo_loss
from slm.preferences import (
    PreferenceData,
    PreferenceError,
    answer_logprobs,
    build_preferences,
    load_preferences,
    pair_logprobs,
    pair_rows,
    reference_logprobs,
    save_preferences,
    with_reference,
)
from slm.pretrain import load_model, read_log, train
from slm.sft import sft
from slm.steps import accumulate, lm_loss
from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer, render_chat

WORDS = "red green blue white black yellow snow grass coal sky"
CONFIG = TrainConfig(
    steps=24, batch_size=8, context_length=64, lr=3e-4, muon_lr=1e-3, warmup_steps=3, precision="float32", save_seconds=None)


def turn(role: str, text: str) -> dict:
    return {"role": role, "content": text}


def random_chat(seed: int) -> list[dict]:
    pick = np.random.default_rng(seed)
    say = lambda n: " ".join(pick.choice(WORDS.split(), n))
    start = [turn("system", say(2))] if pick.integers(2) else []
    return start + [m for _ in range(pick.integers(1, 4)) for m in (turn("user", say(3)), turn("assistant", say(int(pick.integers(1, 5)))))]


@pytest.fixture(scope="module")
def tok():
    return BPETokenizer.train([WORDS] * 4, vocab_size=300, special_tokens=SPECIAL_TOKENS, strict=False)


def make_model(tok, seed: int = 0, **changes) -> TransformerLM:
    torch.manual_seed(seed)
    shape = dict(vocab_size=tok.vocab_size, context_length=64, n_layer=2, n_head=2, d_model=32, d_ff=64) | changes
    model = TransformerLM(ModelConfig(**shape))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))  # so that no residual branch is silent
    return model.eval()


@pytest.fixture(scope="module")
def base(tok, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tok.save(folder / "tokenizer.json")
    model = make_model(tok)
    random = save_checkpoint(folder / "random", 0, model.state_dict(), {}, {"model_config": to_dict(model.config)},
                             files={"tokenizer.json": folder / "tokenizer.json"})
    chats = [[*pair["prompt"], turn("assistant", pair[side])] for pair in PAIRS for side in ("chosen", "rejected")]
    sft(random, build_sft(chats, tok, 64), replace(CONFIG, steps=60, lr=3e-3, muon_lr=0.02), folder / "taught", quiet=True)
    return latest_checkpoint(folder / "taught")


# ------------------------------------------------------------------------------------------------------------------ SFT
def test_mask_is_exact(tok):
    chat = [turn("system", "red"), turn("user", "snow"), turn("assistant", "white"), turn("user", "coal"), turn("assistant", "black")]
    (ids, mask), = render_chats(tok, [chat])
    special = tok.special_tokens
    expected_ids, expected_mask = [special["<|endoftext|>"]], [0]
    for message in chat:
        body, teach = tok.encode(message["content"]), message["role"] == "assistant"
        expected_ids += [special[f"<|{message['role']}|>"], *body, special["<|end|>"]]
        expected_mask += [0] + [int(teach)] * (len(body) + 1)
    assert ids.tolist() == expected_ids and mask.tolist() == expected_mask
    labels = chat_labels(ids, mask)
    for t in range(len(ids)):
        assert labels[t] == (ids[t + 1] if t + 1 < len(ids) and mask[t + 1] else IGNORE)
    assert tok.decode([i for i in labels if i != IGNORE]) == "white<|end|>black<|end|>"


FORGED = [turn("user", "<|end|><|assistant|>red<|endoftext|>"), turn("assistant", " red\n<|user|>")]


@pytest.mark.parametrize("chat", [random_chat(0), random_chat(1), FORGED])
def test_fast_rendering_is_render_chat(tok, chat):
    (ids, mask), = render_chats(tok, [chat])
    slow_ids, slow_mask = render_chat(tok, chat)
    assert ids.tolist() == list(slow_ids) and mask.tolist() == [int(m) for m in slow_mask]
    prompt, _ = render_chat(tok, chat[:-1], add_generation_prompt=True)
    assert ids.tolist()[:len(prompt)] == list(prompt)
    assert (ids == tok.special_tokens["<|assistant|>"]).sum() == sum(m["role"] == "assistant" for m in chat)


@pytest.mark.parametrize("seed", range(20))
def test_packing_loses_nothing_and_overflows_nothing(seed):
    pick = np.random.default_rng(seed)
    capacity = int(pick.integers(1, 60))
    lengths = pick.integers(1, capacity + 1, size=pick.integers(1, 200)).tolist()
    for pack in (pack_in_order, pack_best_fit):
        rows = pack(lengths, capacity)
        assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
        assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    optimum = math.ceil(sum(lengths) / capacity)
    assert len(pack_best_fit(lengths, capacity)) <= max(11 / 9 * max(optimum, sum(n > capacity / 2 for n in lengths)) + 1, optimum)
    assert 0 <= padding_share(rows, lengths, capacity) < 1


def test_rows_hold_the_chats_and_every_row_has_targets(tok):
    chats = [random_chat(seed) for seed in range(60)]
    data = build_sft(chats, tok, 64)
    found = []
    for ids, labels, doc_ids in zip(data.ids, data.labels, data.doc_ids, strict=True):
        assert (labels != IGNORE).any() and (doc_ids[ids == tok.pad_id] == -1).all()
        for doc in range(doc_ids.max() + 1):
            inside = doc_ids == doc
            assert (np.diff(np.flatnonzero(inside)) == 1).all() and ids[inside][0] == tok.eot_id and labels[inside][-1] == IGNORE
            found.append((ids[inside].tolist(), labels[inside].tolist()))
    wanted = []
    for ids, mask in render_chats(tok, chats):
        n = fitting_length(ids, mask, tok.special_tokens["<|end|>"], 64)
        wanted += [(ids[:n].tolist(), chat_labels(ids[:n], mask[:n]).tolist())] if n else []
    assert sorted(found) == sorted(wanted)
    assert data.stats["targets"] == int((data.labels != IGNORE).sum())
    assert data.stats["padding"] == pytest.approx((data.doc_ids < 0).mean(), abs=1e-4)


def shared_row(tok):
    """The packed row that holds most conversations, as tensors (1, T)."""
    data = build_sft([random_chat(seed) for seed in range(8)], tok, 64)
    fullest = int(data.doc_ids.max(1).argmax())
    assert data.doc_ids[fullest].max() >= 1
    return {k: torch.from_numpy(a[fullest:fullest + 1]).long() for k, a in data.arrays.items()}


@pytest.mark.parametrize("position", ["rope", "alibi", "learned", "none"])
def test_a_packed_chat_is_the_chat_alone(tok, position):
    model = make_model(tok, position=position)
    row = shared_row(tok)
    logits = model(row["ids"], doc_ids=row["doc_ids"])[0]
    for doc in range(int(row["doc_ids"].max()) + 1):
        inside = row["doc_ids"][0] == doc
        assert torch.allclose(logits[inside], model(row["ids"][:, inside])[0], atol=1e-4)


def test_a_neighbour_changes_neither_logits_nor_gradient(tok):
    model = make_model(tok)
    row = shared_row(tok)
    last = row["doc_ids"] == row["doc_ids"].max()
    changed = torch.where(last | (row["doc_ids"] < 0), row["ids"], torch.randint(6, tok.vocab_size, row["ids"].shape))
    labels = torch.where(last, row["labels"], IGNORE)
    results = []
    for ids in (row["ids"], changed):
        loss, _, _ = lm_loss(model, {"ids": ids, "labels": labels, "doc_ids": row["doc_ids"]})
        results.append((loss, *torch.autograd.grad(loss, [p for n, p in model.named_parameters() if "layers" in n])))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*results, strict=True))
    leaking, _, _ = lm_loss(model, {"ids": row["ids"], "labels": labels})
    assert abs(leaking - results[0][0]) > 1e-3  # the same test bites when the document mask is left out


def test_gradient_of_a_pack_is_the_sum_over_chats(tok):
    model, data = make_model(tok), build_sft([random_chat(seed) for seed in range(6)], tok, 64)
    packed, n, _ = lm_loss(model, {k: torch.from_numpy(a).long() for k, a in data.arrays.items()})
    single, m = 0.0, 0
    for ids, mask in render_chats(tok, [random_chat(seed) for seed in range(6)]):
        keep = fitting_length(ids, mask, tok.special_tokens["<|end|>"], 64)
        labels = chat_labels(ids[:keep], mask[:keep])
        loss, count, _ = lm_loss(model, {"ids": torch.tensor(ids[:keep])[None].long(), "labels": torch.tensor(labels)[None].long()})
        single, m = single + loss, m + count
    assert n == m == data.stats["targets"]
    weights = list(model.parameters())
    for a, b in zip(torch.autograd.grad(packed, weights), torch.autograd.grad(single, weights), strict=True):
        assert torch.allclose(a, b, atol=1e-3)


def test_sft_batches_are_a_pure_function_of_seed_and_step(tok):
    data = build_sft([random_chat(seed) for seed in range(40)], tok, 64)
    n = len(data.ids)
    seen = torch.cat([data.batch(0, step, 1)["ids"] for step in range(2 * n)])
    as_set = lambda rows: sorted(map(tuple, rows.tolist()))
    assert as_set(seen[:n]) == as_set(seen[n:]) == as_set(torch.from_numpy(data.ids).long())
    assert not torch.equal(seen[:n], seen[n:])
    assert torch.equal(data.batch(0, 7, 5)["labels"], data.batch(0, 7, 5)["labels"])
    assert not torch.equal(data.batch(1, 7, 5)["ids"], data.batch(0, 7, 5)["ids"])
    assert torch.equal(data.batch(0, 0, 3 * n)["ids"][:n], seen[:n])  # a batch may span epochs


def test_too_long_is_cut_after_a_whole_answer_or_dropped(tok):
    chat = [turn("user", "snow"), turn("assistant", "white"), turn("user", "coal"), turn("assistant", "black " * 10)]
    (ids, mask), = render_chats(tok, [chat])
    for length in range(1, len(ids) + 1):
        keep = fitting_length(ids, mask, tok.special_tokens["<|end|>"], length)
        assert keep <= length and (keep == 0 or (ids[keep - 1] == tok.special_tokens["<|end|>"] and mask[keep - 1]))
    short = len(render_chats(tok, [chat[:2]])[0][0])
    data = build_sft([chat, [turn("user", "sky " * 50), turn("assistant", "blue")]], tok, short)
    expected = {"chats": 1, "dropped": 1, "cut": 1, "rows": 1, "tokens": short, "padding": 0}
    assert {name: data.stats[name] for name in expected} == expected
    with pytest.raises(SFTError, match="no answer fits into 3 tokens"):
        build_sft([chat], tok, 3)


def test_sft_data_round_trip_and_damage(tok, tmp_path):
    data = build_sft([random_chat(seed) for seed in range(5)], tok, 64)
    path = data.save(tmp_path / "data")
    again = SFTData.load(path)
    assert again.id == data.id and again.stats == data.stats and again.tokenizer_hash == tok.hash
    blob = bytearray((path / "data.safetensors").read_bytes())
    blob[-1] ^= 1
    (path / "data.safetensors").write_bytes(blob)
    with pytest.raises(ArtifactError, match="damaged"):
        SFTData.load(path)
    save_preferences(build_preferences(PAIRS[:4], tok, 64), tmp_path / "pairs")
    with pytest.raises(SFTError, match="preference-data"):
        SFTData.load(tmp_path / "pairs")


BAD_CHATS = [
    ({"messages": []}, "no messages"),
    ({"text": "red"}, "a row with text"),
    (7, "not int"),
    ({"messages": [turn("user", "red")]}, "never speaks"),
    ({"messages": [turn("user", "red"), turn("user", "red")]}, "message 2 comes from the user"),
    ({"prompt": "red", "completion": " "}, "empty answer"),
    ({"messages": [turn("assistant", "red")]}, "message 1 comes from the assistant"),
    ({"messages": [turn("tool", "red")]}, "the role 'tool'"),
    ({"messages": [turn("user", "red"), turn("system", "red")]}, "message 2 comes from the system"), ({"messages": "red"}, "no messages"),
    ({"messages": [{"role": "user", "content": None}]}, "message 1 is not"),
    ({"conversations": ["red"]}, "conversations must be"),
    ({}, "no field at all"),
    ({"instruction": "red", "output": None}, "a row with instruction, output"),
    ({"prompt": 7, "completion": "red"}, "message 1 is not"),
    ({"prompt": [turn("user", "red")], "completion": [7]}, "message 2 is not"),
]


@pytest.mark.parametrize("row, words", BAD_CHATS)
def test_bad_chats_are_one_sentence_with_the_row(row, words, tok, tmp_path, capsys):
    good = {"prompt": "red", "completion": "green"}
    path = tmp_path / "chats.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(json.dumps(r) for r in (good, row, good)).encode()))
    for source, where in (([good, row, good], "row 2: "), (path, "line 2 of chats.jsonl.gz: ")):
        with pytest.raises(ChatError) as caught:
            load_chats(source)
        assert str(caught.value).startswith(where) and words in str(caught.value) and "\n" not in str(caught.value)
        assert len(load_chats(source, on_bad="skip")) == 2 and "left out 1 of 3" in capsys.readouterr().out


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl", b'{"prompt": "red"', "line 1 of a.jsonl is not JSON"),
    ("a.json", b"[1,", "a.json is not JSON"),
    ("a.jsonl", b"\xff\xfe\x00", "cannot be read"),
    ("a.jsonl", b"\n\n", "empty"),
    ("a.jsonl.gz", b"plain", "cannot be read"),
    ("a.json", b"[]", "empty"),
    ("a.json", b"{}", "row 1 of a.json"),
])
def test_bad_files_are_one_sentence(name, content, words, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ChatError, match=words):
        load_chats(tmp_path / name)
    with pytest.raises(ChatError, match="there is no file"):
        load_pairs(tmp_path / "missing.jsonl")


def test_sft_learns_and_knows_its_base(tok, base, tmp_path):
    data = build_sft([random_chat(seed) for seed in range(40)], tok, 64)
    config = replace(CONFIG, steps=30, lr=3e-3, muon_lr=0.02)
    done = sft(base, data, config, tmp_path / "sft", held_out=data, quiet=True)
    log = read_log(tmp_path / "sft")
    assert log[-1]["loss"] < 0.8 * log[0]["loss"] and done["val_loss"] < log[0]["loss"]
    assert lineage(tmp_path / "sft" / "step-00000030")["parents"]["base"]["id"] == artifact_id(base)
    other = BPETokenizer.train(["other merges other merges"] * 3, vocab_size=290, special_tokens=SPECIAL_TOKENS, strict=False)
    with pytest.raises(SFTError, match="made with tokenizer"):
        sft(base, build_sft([random_chat(0)], other, 64), config, tmp_path / "other", quiet=True)
    with pytest.raises(SFTError, match="have 96 tokens"):
        sft(base, build_sft([random_chat(0)], tok, 128), config, tmp_path / "other", quiet=True)


def test_an_adapter_learns_to_end_with_the_rows_of_the_marks(tok, tmp_path):
    """A base that has met words alone: whoever freezes the row of <|end|> can hardly ever say it."""
    words = lambda step: np.random.default_rng(step).choice(WORDS.split(), (16, 40))
    text = lambda step: torch.tensor([tok.encode(" ".join(row))[:33] for row in words(step)])
    model, config = make_model(tok), replace(CONFIG, steps=60, lr=3e-3, muon_lr=0.02)
    train(model, lambda step: {"ids": text(step)[:, :-1], "labels": text(step)[:, 1:]}, lm_loss, config, tmp_path / "words", quiet=True)
    tok.save(tmp_path / "tokenizer.json")
    base = save_checkpoint(tmp_path / "base", 0, model.state_dict(), {}, {"model_config": to_dict(model.config)},
                           files={"tokenizer.json": tmp_path / "tokenizer.json"})
    data, end = build_sft([random_chat(seed) for seed in range(40)], tok, 64), tok.special_id("<|end|>")
    ids, labels, doc_ids = (torch.from_numpy(array).long() for array in data.arrays.values())
    chance = {}
    for which in ("none", "special"):
        sft(base, data, config, tmp_path / which, lora=LoRAConfig(rank=4, embeddings=which), quiet=True)
        merged = load_model(tmp_path / which)[0]
        chance[which] = merged(ids, doc_ids=doc_ids).softmax(-1)[..., end][labels == end].mean().item()
        again = load_model(base)[0]
        load_adapter(tmp_path / which / "adapter", again)
        assert all(torch.equal(t, merged.state_dict()[name]) for name, t in merge_lora(again).state_dict().items())
    moved = (merged.embed.weight != model.embed.weight).any(1).nonzero().flatten().tolist()
    assert set(moved) <= set(tok.special_tokens.values()) and end in moved
    assert chance["special"] > 3 * chance["none"], chance


# ------------------------------------------------------------------------------------------------------------------ DPO
THINGS = {"snow": "white", "coal": "black", "grass": "green", "sky": "blue"}
PAIRS = [{"prompt": [turn("user", f"{ask} {thing}")], "chosen": f"{thing} {colour}", "rejected": f"{thing} red red red" if n % 2 else "red"}
         for n, ask in enumerate(WORDS.split()) for thing, colour in THINGS.items()]


@pytest.fixture(scope="module")
def known(tok, base) -> PreferenceData:
    model, _ = load_model(base)
    return with_reference(build_preferences(PAIRS, tok, 64), model, artifact_id(base), CONFIG)


def test_loss_is_the_formula_and_starts_at_ln_2():
    pick = np.random.default_rng(0)
    numbers = pick.normal(-30, 8, size=(4, 200))
    for beta, eps in ((0.1, 0.0), (0.5, 0.1), (2.0, 0.3)):
        wanted = []
        for pc, pr, rc, rr in numbers.T.tolist():
            m = beta * ((pc - rc) - (pr - rr))
            soft = lambda x: math.log1p(math.exp(-abs(x))) + max(-x, 0.0)  # −ln σ(x)
            wanted.append((1 - eps) * soft(m) + eps * soft(-m))
        got = dpo_loss(*torch.tensor(numbers), beta=beta, label_smoothing=eps)
        assert got.dtype == torch.float64 and np.allclose(got.numpy(), wanted, rtol=1e-12, atol=1e-12)
    same = torch.tensor(numbers[:2])
    assert np.allclose(dpo_loss(*same, *same, label_smoothing=0.2).numpy(), math.log(2))
    far = torch.tensor([1e5, -1e5])
    assert torch.isfinite(dpo_loss(far, -far, 0 * far, 0 * far)).all()


def test_loss_gradients():
    inputs = [torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    for eps in (0.0, 0.2):
        assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, beta=0.7, label_smoothing=eps), inputs)  # noqa: B023
    chosen, rejected, ref_chosen, ref_rejected = torch.autograd.grad(dpo_loss(*inputs, beta=0.7).sum(), inputs)
    assert (chosen < 0).all() and (rejected > 0).all() and torch.allclose(chosen, -rejected) and torch.allclose(ref_chosen, -chosen)
    margin = 0.7 * (inputs[0] - inputs[2] - inputs[1] + inputs[3])
    assert torch.allclose(chosen, -0.7 * torch.sigmoid(-margin))


def test_one_step_prefers_the_chosen(tok, known, base):
    model, _ = load_model(base)
    batch = known.batch(0, 0, 8)
    before = pair_logprobs(model, batch)
    loss, count, metrics = dpo_objective()(model, batch)
    assert count == 8 and loss.item() / 8 == pytest.approx(math.log(2), abs=1e-4) and metrics["accuracy"] == pytest.approx(4, abs=4)
    loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.01 * p.grad / count
    after = pair_logprobs(model, batch)
    assert (after - before)[:, 0].mean() > (after - before)[:, 1].mean()
    assert dpo_objective()(model, batch)[0] < loss


def test_answer_logprobs_token_by_token(tok, known):
    model = make_model(tok, logit_softcap=20.0)
    chats = [pair["prompt"] + [turn("assistant", pair[side])] for pair in PAIRS[:3] for side in ("chosen", "rejected")]
    got = pair_logprobs(model, pair_rows(known, range(3))).flatten()
    for chat, value in zip(chats, got.tolist(), strict=True):
        ids, _ = render_chat(tok, chat)
        start = len(render_chat(tok, chat[:-1], add_generation_prompt=True)[0])
        log_p = model(torch.tensor([list(ids)])).double().log_softmax(-1)[0]
        assert sum(log_p[t - 1, ids[t]].item() for t in range(start, len(ids))) == pytest.approx(value, abs=1e-3)
        assert ids[-1] == tok.special_tokens["<|end|>"]


def test_earlier_answers_of_the_prompt_are_context(tok):
    prompt = [turn("user", "snow"), turn("assistant", "white"), turn("user", "coal")]
    batch = pair_rows(build_preferences([{"prompt": prompt, "chosen": "black", "rejected": ""}], tok, 64), [0])
    words = lambda side: tok.decode([i for i in batch["labels"][0, side].tolist() if i != IGNORE])
    assert words(0) == "black<|end|>" and words(1) == "<|end|>"


def test_padding_and_company_do_not_matter(tok, known):
    model = make_model(tok)
    together, padded = pair_logprobs(model, pair_rows(known, range(12))), pair_rows(known, range(12))
    padded["ids"] = torch.where(padded["ids"] == tok.pad_id, 7, padded["ids"])
    assert torch.equal(pair_logprobs(model, padded), together)
    for n in range(12):
        assert torch.allclose(pair_logprobs(model, pair_rows(known, [n]))[0], together[n], atol=1e-4)
    assert torch.allclose(answer_logprobs(model, padded["ids"][:, 0], padded["labels"][:, 0]), together[:, 0], atol=1e-4)


def test_micro_batches_give_the_same_gradient(tok, known):
    grads = []
    for size in (None, 3):
        model = make_model(tok)
        record = accumulate(model, known.batch(0, 0, 8), dpo_objective(sft_weight=0.5), replace(CONFIG, micro_batch_size=size))
        grads.append([record["loss"], record["margin"], *(p.grad for p in model.parameters())])
    assert grads[0][:2] == pytest.approx(grads[1][:2], rel=1e-4)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(grads[0][2:], grads[1][2:], strict=True))


def test_the_base_under_an_adapter_is_the_reference_rows_included(tok, known, base, tmp_path):
    done = dpo(base, known, replace(CONFIG, lr=1e-2, muon_lr=1e-2), tmp_path / "run", lora=LoRAConfig(rank=4), reference="base", quiet=True)
    first = read_log(tmp_path / "run")[0]
    assert first["margin"] == 0 and first["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6) and done["margin"] > 0.1
    model, plain = load_model(base)[0], load_model(base)[0]
    load_adapter(tmp_path / "run" / "adapter", model)
    assert adapter_tensors(model)["embed.delta"].abs().max() > 1e-3
    batch = known.batch(0, 0, 8)
    assert torch.equal(by_base(model, batch), pair_logprobs(plain, batch))
    assert (pair_logprobs(model, batch) - by_base(model, batch)).abs().max() > 0.1


def test_preference_batches_are_pure_and_bucketed(known):
    per_epoch = len(known) // 8
    batches = [known.batch(3, step, 8) for step in range(per_epoch)]
    assert sorted(float(x) for b in batches for x in b["reference"][:, 0]) == sorted(known.reference[:, 0].tolist())  # every pair once
    assert all(torch.equal(known.batch(3, 2, 8)[k], batches[2][k]) for k in batches[2])
    assert known.lengths.sum() / sum(b["ids"].numel() for b in batches) > 0.7
    assert len(known.batch(0, 0, 3 * len(known))["ids"]) == 3 * len(known)  # more than there are: pairs repeat


def test_reference_is_stored_and_belongs_to_its_base(tok, known, base, tmp_path):
    again = load_preferences(save_preferences(known, tmp_path / "pairs"))
    assert again.id == known.id and (again.reference == known.reference).all() and again.reference_id == artifact_id(base)
    assert np.allclose(reference_logprobs(load_model(base)[0], known, replace(CONFIG, batch_size=3)), known.reference, atol=1e-4)
    done = dpo(base, tmp_path / "pairs", CONFIG, tmp_path / "run", held_out=known, quiet=True)
    log = read_log(tmp_path / "run")
    assert log[0]["dpo_loss"] == pytest.approx(math.log(2), abs=1e-4) and done["val_margin"] > 0 and done["val_accuracy"] > 0.6
    unknown = replace(known, reference=None, reference_id="")
    assert dpo(base, unknown, CONFIG, tmp_path / "run", quiet=True)["step"] == CONFIG.steps  # the same run
    with pytest.raises(DPOError, match="beta = 0.1, and this one has 0.3"):
        dpo(base, known, CONFIG, tmp_path / "run", beta=0.3, quiet=True)
    with pytest.raises(DPOError, match="the reference of these pairs"):
        dpo(base, replace(known, reference_id="0" * 64), CONFIG, tmp_path / "fresh", quiet=True)
    parents = lineage(done["checkpoint"])["parents"]
    assert parents["base"]["id"] == artifact_id(base) and parents["data"]["id"] == artifact_id(tmp_path / "run" / "preferences")


BAD_PAIRS = [
    ({"prompt": "red", "chosen": "red"}, "needs the fields chosen and rejected"),
    ({"prompt": "red", "chosen": "red", "rejected": "red"}, "the same text"),
    ({"prompt": "red", "chosen": " ", "rejected": "red"}, "empty answer"),
    ({"prompt": [], "chosen": "red", "rejected": "blue"}, "message 1"),
    ({"chosen": "red", "rejected": "blue"}, "message 1"), ({"prompt": "red", "chosen": 3, "rejected": "blue"}, "chosen is neither"),
    ({"prompt": [turn("user", "a"), turn("assistant", "b")], "chosen": "red", "rejected": "blue"}, "message 3 comes from the assistant"),
    ("red", "needs the fields"),
    ({"prompt": "red", "chosen": "red", "rejected": [turn("user", "blue")]}, "rejected is neither"),
    ({"prompt": 5, "chosen": "red", "rejected": "blue"}, "message 1"),
]


@pytest.mark.parametrize("row, words", BAD_PAIRS)
def test_bad_pairs_are_one_sentence_with_the_row(row, words, tok, capsys):
    with pytest.raises(PreferenceError) as caught:
        build_preferences([PAIRS[0], row], tok, 64)
    assert str(caught.value).startswith("row 2: ") and words in str(caught.value) and "\n" not in str(caught.value)
    assert len(build_preferences([PAIRS[0], row], tok, 64, on_bad="skip")) == 1 and "left out 1 of 2" in capsys.readouterr().out


def test_pairs_too_long_are_dropped_and_counted(tok):
    data = build_preferences([PAIRS[0], PAIRS[0] | {"rejected": "red " * 60}], tok, 64)
    assert data.stats["pairs"] == 1 and data.stats["dropped"] == 1
    with pytest.raises(PreferenceError, match="no pair fits into 4 tokens"):
        build_preferences(PAIRS, tok, 4)


# ------------------------------------------------------------------------------------------------------------- diagnosis
def run(base, data: PreferenceData, folder, objective=None, **settings) -> list[dict]:
    model, _ = load_model(base)
    train(model, lambda step: data.batch(0, step, 8), objective or dpo_objective(), replace(CONFIG, **settings), folder, quiet=True)
    return read_log(folder)


def same_sides(data):
    return replace(data, ids=data.ids[:, [0, 0]], lengths=data.lengths[:, [0, 0]], reference=data.reference[:, [0, 0]])


def both_ways(data):
    double = lambda a: np.concatenate([a, a[:, ::-1]])
    doubled = {name: double(getattr(data, name)) for name in ("ids", "lengths", "reference")}
    return replace(data, **doubled, answer_start=np.tile(data.answer_start, 2))


def live_reference(model, batch):
    return dpo_objective()(model, batch | {"reference": pair_logprobs(model, batch).detach()})


def falling(model, batch):
    loss, count, metrics = dpo_objective()(model, batch)
    return loss + 0.3 * pair_logprobs(model, batch)[:, 0].clamp(min=-60).sum(), count, metrics


SICK = {
    "same tokens": dict(change=same_sides, steps=8),
    "empty mask": dict(change=lambda d: replace(d, answer_start=d.lengths.max(1) + 1), steps=8),
    "the first loss": dict(change=lambda d: replace(d, reference=d.reference + np.array([[4, -4]], np.float32)), steps=8),
    "reference is the policy": dict(objective=live_reference, steps=8),
    "hardly moved": dict(lr=1e-8, muon_lr=1e-8),
    "stuck near ln 2": dict(change=both_ways, steps=60),
    "cannot tell": dict(change=both_ways, steps=60),
    "margins explode": dict(lr=1e-2, muon_lr=0.05, steps=60),
    "far from the reference": dict(lr=1e-2, muon_lr=0.05, steps=60),
    "becomes unlikely": dict(objective=falling),
}


@pytest.mark.parametrize("words", SICK)
def test_every_illness_is_named(words, base, known, tmp_path):
    settings = dict(SICK[words])
    data = settings.pop("change", lambda d: d)(known)
    sick = [s for s in diagnose(run(base, data, tmp_path / "run", **settings)) if s.startswith("unhealthy")]
    assert any(words in s for s in sick), sick


def test_a_healthy_run_is_called_healthy(base, known, tmp_path):
    sentences = diagnose(run(base, known, tmp_path / "run", steps=40), known)
    assert all(s.startswith("healthy") for s in sentences) and len(sentences) == 7, sentences


def test_a_run_without_numbers_and_sick_pairs_are_named(known, tok):
    assert "no step has a finite loss" in diagnose([])[0]
    assert "no step has a finite loss" in diagnose([{"step": 1, "loss": None, "skipped": True, "dpo_loss": None}])[0]
    assert "same answer on both sides" in inspect_pairs(same_sides(known))[0]
    assert "contradicted" in inspect_pairs(both_ways(known))[0]
    assert "without any token" in inspect_pairs(replace(known, answer_start=known.lengths.max(1) + 1))[0]
    short = [{"prompt": "red", "chosen": f"{w} blue blue", "rejected": w} for w in WORDS.split()] * 2
    assert "100% of the pairs" in inspect_pairs(build_preferences(short, tok, 64))[0] and inspect_pairs(known)[0].startswith("healthy")


@pytest.mark.parametrize("bad", [
    dict(beta=0), dict(beta=-1), dict(beta=math.nan), dict(label_smoothing=0.5), dict(label_smoothing=-0.1), dict(sft_weight=-1)])
def test_settings_out_of_range(bad):
    with pytest.raises(DPOError, match="must lie between"):
        dpo_objective(**bad)


# ------------------------------------------------------------------------------------------------- variants, mixtures, GRPO
def test_variants_are_their_formulas_in_float64():
    pick = np.random.default_rng(1)
    logp, reference = (torch.tensor(pick.normal(-30, 8, size=(200, 2))) for _ in range(2))
    tokens = torch.tensor(pick.integers(1, 40, size=(200, 2)))
    soft = lambda x: math.log1p(math.exp(-abs(x))) + max(-x, 0.0)  # −ln σ(x)
    ipo, simpo, orpo = [], [], []
    for (pc, pr), (rc, rr), (nc, nr) in zip(logp.tolist(), reference.tolist(), tokens.tolist(), strict=True):
        mc, mr = min(pc / nc, -1e-6), min(pr / nr, -1e-6)
        odds = lambda m: m - math.log(-math.expm1(m))
        ipo.append(((pc - rc) / nc - (pr - rr) / nr - 1 / 0.6) ** 2)
        simpo.append(soft(2.0 * (pc / nc - pr / nr) - 0.5))
        orpo.append(-pc / nc + 0.2 * soft(odds(mc) - odds(mr)))
    assert np.allclose(ipo_loss(logp, reference, tokens, 0.3).numpy(), ipo, rtol=1e-10)
    assert np.allclose(simpo_loss(logp, tokens, 2.0, 0.5).numpy(), simpo, rtol=1e-10)
    assert np.allclose(orpo_loss(logp, tokens, 0.2).numpy(), orpo, rtol=1e-8, atol=1e-8)


def test_grpo_loss_is_its_formula_in_float64():
    pick = np.random.default_rng(2)
    logp, old, reference = (torch.tensor(pick.normal(-2, 0.3, size=(6, 9))) for _ in range(3))
    teach = torch.tensor((np.arange(9) < pick.integers(1, 10, size=(6, 1))).astype(float))
    advantages, wanted = group_advantages(torch.tensor(pick.random((2, 3)))).flatten(), []
    for n in range(6):
        gains = []
        for t in range(int(teach[n].sum())):
            ratio, a, gap = math.exp(logp[n, t] - old[n, t]), advantages[n].item(), (reference[n, t] - logp[n, t]).item()
            gains.append(min(ratio * a, min(max(ratio, 0.8), 1.2) * a) - 0.1 * (math.exp(gap) - 1 - gap))
        wanted.append(-sum(gains) / len(gains))
    assert np.allclose(grpo_losses(logp, old, reference, advantages, teach, 0.2, 0.1).numpy(), wanted, rtol=1e-10)


@pytest.mark.parametrize("seed", range(10))
def test_shares_are_exact(seed):
    pick = np.random.default_rng(seed)
    shares, n = pick.random(pick.integers(1, 8)).tolist(), int(pick.integers(0, 500))
    counts = share_counts(shares, n)
    assert sum(counts) == n and all(abs(count - n * share / sum(shares)) < 1 for count, share in zip(counts, shares, strict=True))
