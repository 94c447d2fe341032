"""Looking inside: views that are correct, hooks that change nothing, a page that runs without network."""
from __future__ import annotations

import math
import re
import shutil
import subprocess
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import slm
from slm.capture import capture
from slm.cli import app
from slm.config import ModelConfig, SLMError
from slm.heads import ablate, head_scores, without
from slm.lens import attribute, entropy_bits, logit_lens
from slm.loss import document_bits
from slm.model import TransformerLM
from slm.origins import Index, copied_share, longest_match, matches, origins, suffix_array
from slm.page import inspection, page, write_inspection
from slm.sample import LM
from slm.specimen import make_specimen, prepare_specimen, sentences, specimen_source
from slm.surprise import surprise
from slm.timelapse import Snapshots, log_steps, open_snapshots

SMALL = dict(vocab_size=50, context_length=32, n_layer=3, n_head=4, d_model=32)
KINDS = {
    "plain": {}, "gqa": dict(n_kv_head=2), "mqa": dict(n_kv_head=1, qk_norm=True), "alibi": dict(position="alibi"),
    "learned": dict(position="learned", norm="layernorm", bias=True, ffn="gelu"), "none": dict(position="none", norm="none"),
    "window": dict(sliding_window=4), "capped": dict(attn_logit_softcap=4.0), "experts": dict(n_expert=4, n_expert_active=2),
    "untied": dict(tie_embeddings=False), "post": dict(norm_position="post"),
}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return slm.load(make_specimen(tmp_path_factory.mktemp("specimen"), steps=60))


def make(kind, seed=0):
    torch.manual_seed(seed)
    return TransformerLM(ModelConfig(**SMALL, **KINDS[kind])).eval(), torch.randint(50, (2, 14))


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_leave_the_model_bit_identical(kind):
    model, ids = make(kind)
    before = model(ids)
    seen = capture(model, ids)
    assert torch.equal(before, seen.logits) and torch.equal(before, model(ids))
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(ids), capture(model, ids).logits)
    assert capture(model.train(), ids).logits is not None and model.training


@pytest.mark.parametrize("kind", KINDS)
def test_maps_lens_and_attribution_are_correct(kind):
    model, ids = make(kind)
    seen = capture(model, ids)
    for shares in seen.maps:
        assert torch.allclose(shares.sum(-1), torch.ones(2, 4, 14), atol=1e-5) and (shares.triu(1) == 0).all()
    assert torch.equal(logit_lens(model, seen)[-1], seen.logits)
    assert (entropy_bits(seen.logits) <= math.log2(50) + 1e-4).all() and (entropy_bits(seen.logits) >= 0).all()
    if kind == "post":
        with pytest.raises(SLMError, match="norms inside"):
            attribute(model, seen, 3, 5)
        return
    for position, token, versus in ((0, 3, None), (13, 20, None), (7, 1, 2)):
        found = attribute(model, seen, position, token, versus, row=1)
        want = seen.logits[1, position, token] - (0 if versus is None else seen.logits[1, position, versus])
        assert found["total"] == pytest.approx(float(want), abs=2e-4)


def test_surprise_is_the_evaluation_loss(lm):
    for text in ("Mia and Tom went to the pond.", " ".join(doc["text"] for doc in sentences("long", 30)), "x\n\n é 漢"):
        tokens = surprise(lm, text)
        eot = lm.tokenizer.eot_id
        whole = document_bits(lm.model, [[eot, *lm.tokenizer.encode(text), eot]])[0]
        assert sum(token["bits"] for token in tokens) == pytest.approx(whole, rel=1e-5)
        assert all((token["rank"] == 1) == (token["p"] >= token["top"][0][1] - 1e-12) for token in tokens)


def test_an_induction_circuit_made_by_hand_scores_one():
    V, P = 24, 40
    model = TransformerLM(ModelConfig(vocab_size=V, context_length=P, n_layer=2, n_head=1, d_model=2 * V + P, d_head=P, d_ff=8,
                                      norm="none", position="learned")).eval()
    for p in model.parameters():
        p.data.zero_()
    who, where, before = torch.arange(V), V + torch.arange(P), V + P + torch.arange(V)
    model.embed.weight.data[who, who] = 1
    next(p for name, p in model.named_parameters() if name.startswith("pos_embed")).data[torch.arange(P), where] = 1
    back, seek = (layer.attn for layer in model.layers)
    back.q_proj.weight.data[torch.arange(P - 1), where[1:]] = 1e4
    back.k_proj.weight.data[torch.arange(P), where] = 1
    seek.q_proj.weight.data[who, who], seek.k_proj.weight.data[who, before] = 1e4, 1
    for part, room in ((back, before), (seek, who)):
        part.v_proj.weight.data[who, who] = part.o_proj.weight.data[room, who] = 1
    scores = head_scores(model, first=0)
    assert scores["induction"][1, 0] == 1 and scores["previous"][0, 0] == 1 and scores["duplicate"].max() < 1e-6


def test_ablation_restores_the_model(lm):
    docs = [[lm.tokenizer.eot_id, *lm.tokenizer.encode(doc["text"]), lm.tokenizer.eot_id] for doc in sentences("ablate", 6)]
    ids = torch.tensor([docs[0]])
    before = lm.model(ids)
    effects = ablate(lm.model, docs)
    assert effects["heads"].shape == (2, 4) and effects["layer"].max() > 0 and torch.equal(before, lm.model(ids))
    with pytest.raises(ZeroDivisionError), without(lm.model, 0):
        raise ZeroDivisionError
    assert torch.equal(before, lm.model(ids))


@pytest.mark.parametrize("seed", range(4))
def test_the_suffix_array_is_the_sorted_list_and_finds_the_longest(seed):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(3 + seed, size=300)
    assert suffix_array(tokens).tolist() == sorted(range(300), key=lambda i: tokens[i:].tolist())
    index, ids = Index(tokens, [0]), generator.integers(3 + seed, size=40).tolist()
    text = tokens.tolist()
    stands = lambda piece: any(text[i:i + len(piece)] == piece for i in range(300))
    for start in range(0, 40, 7):
        match = longest_match(index, ids, start)
        assert stands(ids[start:start + match.length])
        assert start + match.length == 40 or not stands(ids[start:start + match.length + 1])
        assert match.count == sum(text[i:i + match.length] == ids[start:start + match.length] for i in range(300 - match.length + 1))
    assert all(b.start + b.length > a.start + a.length for a, b in zip(matches(index, ids, 2), matches(index, ids, 2)[1:]))


def test_snapshots_open_in_order(lm, tmp_path):
    keep = Snapshots(tmp_path, 9)
    for step in range(10):
        keep(lm.model, lm.tokenizer, step)
    film = open_snapshots(tmp_path)
    assert [step for step, _ in film] == log_steps(9) == [0, 1, 2, 4, 8, 9]
    assert torch.equal(film[0][1].logits([1, 2, 3]), lm.logits([1, 2, 3]))


def browser():
    return next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def look(lm, tmp_path_factory):
    return write_inspection(lm, "Mia and Tom went to the pond. <b>Tom</b> gave a boat to Mia.", tmp_path_factory.mktemp("page") / "look")


@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_runs_without_network_and_without_an_error(lm, look, tmp_path, dark):
    html = look[0].read_text("utf-8")
    assert not re.search(r"https?://", html) and len(look) >= 6
    spy = "window.onerror=(...a)=>{document.title='ERROR '+a[0]};"
    (tmp_path / "spied.html").write_text(html.replace('<script>', f"<script>{spy}", 1).replace("</body>", "<script>"
        "document.querySelectorAll('.text span,figure,td').forEach(e=>e.click());document.getElementById('theme').click();"
        "document.title+=` ${document.querySelectorAll('#text span').length} ${document.querySelectorAll('#stair .bar').length}`"
        "</script></body>"), "utf-8")
    words = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=3000", *(["--force-dark-mode"] if dark else []), "--dump-dom",
             (tmp_path / "spied.html").as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert "CONSOLE" not in done.stderr, re.findall(".*CONSOLE.*", done.stderr)
    title = re.search(r"<title>(.*?)</title>", done.stdout)[1]
    assert title == f"slm inspect {len(surprise(lm, 'Mia and Tom went to the pond. <b>Tom</b> gave a boat to Mia.'))} 12"


def test_the_page_keeps_text_as_text(lm):
    html = page(inspection(lm, "</script><img src=x onerror=alert(1)>"))
    assert html.count("</script>") == 2 and "<img" not in html
    with pytest.raises(SLMError, match="nothing to look at"):
        inspection(lm, " ")


def test_long_texts_and_int8_models_have_a_page_too(lm):
    facts = inspection(LM(lm.quantize("int8").model, lm.tokenizer), " ".join(doc["text"] for doc in sentences("page", 40)), most=50)
    assert facts["cut"] and facts["shape"][2] <= 51 and len(facts["pushes"]["terms"]) == facts["shape"][2]


def test_attributions_sum_to_the_logit_of_int8_weights_too(lm):
    small = lm.quantize("int8")
    seen = capture(small.model, lm.prompt_ids("Mia and Tom went to the pond."))
    for position, token in ((2, 300), (5, 40)):
        assert attribute(small.model, seen, position, token)["total"] == pytest.approx(float(seen.logits[0, position, token]), abs=2e-4)


def test_planted_canaries_are_found_and_the_score_tells_copies_from_new_text(tmp_path):
    canary = "The secret of Ada is lamp kite lamp bell rope."
    tok, pack = prepare_specimen(tmp_path, specimen_source(n=300, extra=[f"{canary} {doc['text']}" for doc in sentences("behind", 12)]))
    index, copied = Index.of_pack(pack), sentences(0, 1)[0]["text"]
    found = origins(SimpleNamespace(tokenizer=tok), index, canary)
    assert found["share"] == 1 and canary in found["matches"][0]["passage"] and found["matches"][0]["count"] >= 11
    assert copied_share(index, tok.encode(copied)) == 1
    assert copied_share(index, tok.encode("Zzz qqq! 81 jumping %% wizards, never told.")) < 0.5


def test_pretrain_keeps_a_film_and_inspect_shows_it_in_four_pictures(tmp_path, monkeypatch):
    prepare_specimen(tmp_path, specimen_source(n=300))
    monkeypatch.chdir(tmp_path)
    run = lambda words: CliRunner().invoke(app, words.split(), catch_exceptions=False)
    small = "--set model.n_layer=1 --set model.d_model=32 --set model.d_ff=64"
    made = run("pretrain pack --tokenizer tokenizer.json --preset tiny --steps 6 --batch-size 4 --context-length 32 --out run --film -q "
               + small)
    assert made.exit_code == 0, made.output
    assert [step for step, _ in open_snapshots("run/film")] == [0, 1, 2, 4, 6]
    seen = run("inspect run --text Mia --film run/film --pack pack --out look")
    assert seen.exit_code == 0, seen.output
    drawn = {path.stem for path in (tmp_path / "look").glob("*.png")}
    assert drawn >= {"film-attention", "film-lens", "film-samples", "film-embeddings", "origins", "neighbours", "ablation", "surprise"}
