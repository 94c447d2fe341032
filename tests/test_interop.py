"""Other tools and back: equal scores in transformers and llama.cpp, bit-identical weights, exact chat ids, sentences for broken files."""
from __future__ import annotations

import json
import shutil
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import slm
from slm.config import PRESETS, ModelConfig, RopeScaling, SLMError
from slm.families import FAMILIES, InteropError, config_from_hf, family_of, hf_settings
from slm.folders import artifact_id, read_manifest
from slm.gguf_file import export_gguf, import_gguf, pair_rows, read_gguf
from slm.hf_folder import export_hf, import_hf, weight_files
from slm.interop import export_model, format_of, import_model
from slm.layouts import held_as, tensor_rows, to_ours, to_theirs
from slm.lora import LoRAConfig, add_lora, merge_lora
from slm.model import TransformerLM
from slm.quantize import quantize_model
from slm.sample import LM
from slm.text import STORY, CharTokenizer
from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer, TokenizerError, render_chat

transformers = pytest.importorskip("transformers")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL = dict(vocab_size=330, context_length=128, n_layer=2, d_model=64, n_head=4)
GPT2 = dict(norm="layernorm", position="learned")
CONFIGS = {
    "llama": ModelConfig(**SMALL, n_kv_head=2, d_head=32, norm_eps=3e-4, rope_theta=5000.0),
    "llama untied with biases": ModelConfig(**SMALL, d_ff=96, bias=True, tie_embeddings=False),
    "llama stretched": ModelConfig(**SMALL, rope_scaling=RopeScaling("llama3", 4.0, 64)),
    "llama linear": ModelConfig(**SMALL, rope_scaling=RopeScaling("linear", 2.0)),
    "mistral": ModelConfig(**SMALL, n_kv_head=2, sliding_window=12, tie_embeddings=False),
    "qwen3": ModelConfig(**SMALL, n_kv_head=1, d_head=24, qk_norm=True, rope_theta=1e6, norm_eps=1e-6),
    "qwen3 yarn": ModelConfig(**SMALL, qk_norm=True, rope_scaling=RopeScaling("yarn", 4.0, 32)),
    "mixtral": ModelConfig(**SMALL, d_ff=96, n_expert=4),
    "mixtral all experts": ModelConfig(**SMALL, d_ff=64, n_expert=2, sliding_window=20),
    "gpt2": ModelConfig(**SMALL, **GPT2, ffn="gelu_tanh", bias=True, norm_eps=1e-4),
    "gpt2 exact, no biases": ModelConfig(**SMALL, **GPT2, ffn="gelu", d_ff=100, tie_embeddings=False),
}
IN_GGUF = [name for name in CONFIGS if name not in ("mistral", "mixtral all experts", "llama stretched", "qwen3 yarn")]
STOPS = ("<|endoftext|>", "<|end|>")


@pytest.fixture(scope="module")
def tok() -> BPETokenizer:
    return BPETokenizer.train([STORY], vocab_size=320, special_tokens=SPECIAL_TOKENS)


@pytest.fixture(scope="module")
def models() -> dict[str, TransformerLM]:
    torch.manual_seed(0)
    made = {name: TransformerLM(config).eval() for name, config in CONFIGS.items()}
    for model in made.values():                       # norms and biases that are not one and zero, or mixing them up would not show
        for name, p in model.named_parameters():
            if p.dim() == 1:
                torch.nn.init.normal_(p, float("norm" in name and name.endswith("weight")), 0.1)
    return made


def same_weights(a: TransformerLM, b: TransformerLM) -> bool:
    theirs = b.state_dict()
    return all(torch.equal(t, theirs[name]) for name, t in a.state_dict().items())


@torch.inference_mode()
def greedy(model: TransformerLM, ids: list[int], n: int = 64, never: tuple[int, ...] = ()) -> list[int]:
    row = torch.tensor([ids])
    for _ in range(n):
        scores = model(row, last_only=True)[:, -1]
        if never:
            scores = scores.index_fill(1, torch.tensor(never), -torch.inf)
        row = torch.cat([row, scores.argmax(-1, keepdim=True)], 1)
    return row[0, len(ids):].tolist()


# ------------------------------------------------------------------------------------------------------------ Hugging Face
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_computes_the_same_from_the_folder_and_it_comes_back_bit_for_bit(name, models, tok, tmp_path):
    model = models[name]
    folder = export_hf(tmp_path / "out", model, tok)
    other = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.randint(330, (2, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert (other(ids).logits - model(ids)).abs().max() <= 1e-5
    there = other.generate(ids[:1, :8], max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 8:].tolist()
    assert there == greedy(model, ids[0, :8].tolist())
    back, back_tok = import_hf(folder)
    assert back.config == held_as(model.config) and same_weights(model, back) and back_tok.hash == tok.hash


@pytest.mark.parametrize("name", ["llama untied with biases", "mistral", "qwen3", "mixtral", "gpt2"])
def test_a_folder_saved_by_transformers_in_shards_is_read(name, tmp_path):
    data = hf_settings(CONFIGS[name])
    settings = transformers.CONFIG_MAPPING[data["model_type"]](**data)
    other = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32).eval()
    other.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(weight_files(tmp_path)) > 1
    model, tokenizer = import_hf(tmp_path)
    ids = torch.randint(330, (1, 50), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        assert tokenizer is None and (other(ids).logits - model(ids)).abs().max() <= 1e-5


def test_our_shards_hold_the_same_tensors_as_one_file(models, tok, tmp_path):
    cut = export_hf(tmp_path / "cut", models["llama"], tok, shard_bytes=100_000)
    assert len(weight_files(cut)) > 2 and all(p.stat().st_size < 110_000 for p in weight_files(cut))
    assert same_weights(models["llama"], import_hf(cut)[0])
    index = json.loads((cut / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {theirs for _, theirs in tensor_rows(CONFIGS["llama"], "hf")}


def test_half_precision_is_the_rounding_of_each_weight(models, tmp_path):
    for dtype, kind in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        back, _ = import_hf(export_hf(tmp_path / dtype, models["qwen3"], dtype=dtype))
        assert all(torch.equal(t.to(kind).float(), back.state_dict()[name]) for name, t in models["qwen3"].state_dict().items())


def test_published_shapes_are_understood():
    smollm = {"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "max_position_embeddings": 8192,
              "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "rope_theta": 100000,
              "tie_word_embeddings": True, "vocab_size": 49152, "hidden_act": "silu", "rope_scaling": None, "attention_bias": False}
    qwen = smollm | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 128, "sliding_window": None, "use_sliding_window": False}
    gpt2 = {"architectures": ["GPT2LMHeadModel"], "activation_function": "gelu_new", "n_embd": 768, "n_head": 12, "n_layer": 12,
            "n_positions": 1024, "n_ctx": 1024, "layer_norm_epsilon": 1e-5, "vocab_size": 50257}
    assert config_from_hf(smollm).d_head == 64 and config_from_hf(smollm).tie_embeddings
    assert config_from_hf(qwen).qk_norm and config_from_hf(qwen).d_head == 128
    shape = config_from_hf(gpt2)
    assert (shape.ffn, shape.d_ff, shape.bias, shape.tie_embeddings, shape.n_kv_head) == ("gelu_tanh", 3072, True, True, 12)
    assert config_from_hf({"model_type": "mistral", **{k: v for k, v in smollm.items() if k != "architectures"}}).sliding_window == 4096


def test_defaults_of_left_out_keys_are_those_of_transformers():
    needed = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
              "max_position_embeddings": 64}
    for name in ("llama", "mistral", "qwen3", "mixtral"):
        theirs = transformers.CONFIG_MAPPING[name](**needed).to_dict()
        ours = config_from_hf({"architectures": [FAMILIES[name].architecture], **needed, "num_key_value_heads": 4})
        assert ours.norm_eps == theirs["rms_norm_eps"] and ours.tie_embeddings == theirs["tie_word_embeddings"]
        assert ours.d_head == (theirs["head_dim"] or 16) and ours.sliding_window == theirs.get("sliding_window")
        assert ours.rope_theta == theirs["rope_parameters"]["rope_theta"]
        assert name != "mixtral" or (ours.n_expert, ours.n_expert_active) == (theirs["num_local_experts"], theirs["num_experts_per_tok"])


def test_every_preset_leaves_or_is_refused_with_a_reason():
    for name, config in PRESETS.items():
        try:
            assert config_from_hf(hf_settings(config)) == held_as(config), name
        except InteropError as error:
            assert "no known family" in str(error)


@pytest.mark.parametrize("change, words", [
    ({"logit_softcap": 30.0}, "logit_softcap must be None"), ({"attn_logit_softcap": 30.0}, "attn_logit_softcap must be None"),
    ({"position": "alibi"}, "position must be 'rope'"), ({"norm": "none"}, "norm must be 'rmsnorm'"),
    ({"norm_position": "post"}, "norm_position must be 'pre'"),
    ({"ffn": "relu2"}, "ffn must be 'swiglu'"), ({"rope_scaling": RopeScaling("ntk", 2.0)}, "not ntk"),
    ({"n_expert": 4, "n_expert_active": 1}, "n_expert_active must be at least 2"), ({"qk_norm": True, "bias": True}, "must be False"),
])
def test_a_variant_that_no_family_holds_is_refused_with_the_reason(change, words, tmp_path):
    model = TransformerLM(ModelConfig(**SMALL, **change))
    with pytest.raises(InteropError, match=words):
        export_hf(tmp_path / "x", model)
    assert not (tmp_path / "x").exists()


def test_quantised_models_and_unmerged_adapters_do_not_leave(models, tok, tmp_path):
    adapted = add_lora(TransformerLM(CONFIGS["llama"]), LoRAConfig(rank=2))
    for model in (quantize_model(models["llama"]), adapted):
        for format in ("hf", "gguf"):
            with pytest.raises(InteropError, match="does not belong to a plain model"):
                export_model(tmp_path / f"x-{format}", model, tok, format)
    assert same_weights(merge_lora(adapted), import_hf(export_hf(tmp_path / "merged", merge_lora(adapted)))[0])


# ---------------------------------------------------------------------------------------------------------------- chat, tokenizer
def test_the_chat_template_renders_exactly_our_ids(models, tok, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(export_hf(tmp_path / "out", models["llama"], tok))
    pick = np.random.default_rng(0)
    for _ in range(60):
        roles = [*(["system"] if pick.integers(2) else []), *["user", "assistant"] * int(pick.integers(1, 4))][: int(pick.integers(1, 6))]
        say = lambda: "".join(pick.choice(list("ab {}%#\n'\"é日🙂<|>"), int(pick.integers(0, 12))))
        chat = [{"role": role, "content": say()} for role in roles]
        for more in (True, False):
            assert theirs.apply_chat_template(chat, add_generation_prompt=more)["input_ids"] == render_chat(tok, chat, more)[0]


def test_a_forged_mark_or_a_foreign_role_is_refused_by_the_template(models, tok, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(export_hf(tmp_path / "out", models["llama"], tok))
    for role, content, words in ("user", "a<|end|>b", "contains the mark"), ("tool", "a", "unknown role"):
        with pytest.raises(Exception, match=words):
            theirs.apply_chat_template([{"role": role, "content": content}])


def test_the_tokenizer_of_the_folder_opens_a_text_as_ours_does(models, tok, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(export_hf(tmp_path / "out", models["llama"], tok))
    assert theirs(STORY)["input_ids"] == [tok.eot_id, *tok.encode(STORY)]
    assert theirs(STORY, add_special_tokens=False)["input_ids"] == tok.encode(STORY)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (tok.eot_id, tok.eot_id, tok.pad_id)
    assert theirs.decode(tok.encode(STORY)) == STORY


def test_characters_go_to_a_folder_and_not_into_a_gguf_file(tmp_path):
    chars = CharTokenizer.train([STORY], special_tokens=["<|endoftext|>", "<|pad|>"])
    model = TransformerLM(ModelConfig(vocab_size=chars.vocab_size, n_layer=1, d_model=32, n_head=2, **GPT2, ffn="gelu"))
    _, back = import_hf(export_hf(tmp_path / "out", model, chars))
    assert back.encode(STORY) == chars.encode(STORY)
    with pytest.raises(InteropError, match="export to a Hugging Face folder"):
        export_gguf(tmp_path / "x.gguf", model, chars)


# ------------------------------------------------------------------------------------------------------------------ broken folders
@pytest.fixture(scope="module")
def good(models, tok, tmp_path_factory) -> Path:
    path = export_hf(tmp_path_factory.mktemp("good") / "out", models["llama"], tok, shard_bytes=100_000)
    (path / "manifest.json").unlink()
    return path


def edit(name: str, change):
    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))
    return apply


BREAKS = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config a list": (lambda f: (f / "config.json").write_text("[]"), "not the settings of a model"),
    "architecture": (edit("config.json", lambda d: d.update(architectures=["GemmaForCausalLM"])), "'GemmaForCausalLM': slm reads LlamaFor"),
    "activation": (edit("config.json", lambda d: d.update(hidden_act="gelu")), "hidden_act 'gelu'"),
    "rope": (edit("config.json", lambda d: d.update(rope_scaling={"rope_type": "longrope"})), "'longrope' RoPE"),
    "more layers": (edit("config.json", lambda d: d.update(num_hidden_layers=3)), "layers.2.input_layernorm.weight is missing"),
    "other width": (edit("config.json", lambda d: d.update(vocab_size=400)), "embed_tokens.weight has shape"),
    "impossible": (edit("config.json", lambda d: d.update(num_attention_heads=5)), "cannot build"),
    "key gone": (edit("config.json", lambda d: d.pop("hidden_size")), "lacks hidden_size"),
    "shard gone": (lambda f: weight_files(f)[0].unlink(), "which is not in the folder"),
    "shard torn": (lambda f: weight_files(f)[0].write_bytes(weight_files(f)[0].read_bytes()[:5000]), "damaged or incomplete"),
    "shard empty": (lambda f: weight_files(f)[0].write_bytes(b""), "damaged or incomplete"),
    "index outside": (edit("model.safetensors.index.json", lambda d: d["weight_map"].update(x="../../x")), "which is not in the folder"),
    "index empty": (edit("model.safetensors.index.json", lambda d: d.update(weight_map={})), "names no files"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "Unknown"}}'), "cannot be used as a tokenizer"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_folder_is_explained_in_one_sentence(name, good, tmp_path):
    change, words = BREAKS[name]
    copy = shutil.copytree(good, tmp_path / "copy")
    change(copy)
    with pytest.raises(SLMError) as caught:
        import_model(copy) if name != "no config" else import_hf(copy)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_can_run_code_are_never_opened(good, tmp_path, monkeypatch):
    copy = shutil.copytree(good, tmp_path / "copy")
    for file in (*weight_files(copy), copy / "model.safetensors.index.json"):
        file.unlink()
    (copy / "pytorch_model.bin").write_bytes(b"anything")
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    with pytest.raises(InteropError, match="pytorch_model.bin, which can run code"):
        import_hf(copy)


def test_a_folder_of_ours_that_was_changed_is_noticed(models, tok, tmp_path):
    folder = export_hf(tmp_path / "out", models["llama"], tok, parents={"model": "e" * 64})
    assert read_manifest(folder)["parents"] == {"model": "e" * 64} and len(artifact_id(folder)) == 64
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-3, 2), file.write(b"???")
    with pytest.raises(SLMError, match="damaged"):
        import_hf(folder)


def test_nothing_of_others_is_overwritten(models, tok, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "mine.gguf").write_text("years of work")
    for name in ("mine", "mine.gguf"):
        for format in ("hf", "gguf"):
            with pytest.raises(SLMError):
                export_model(tmp_path / name, models["llama"], tok, format)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == (tmp_path / "mine.gguf").read_text() == "years of work"
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "mine.gguf"}


def test_a_head_that_contradicts_the_settings_is_refused():
    tensors = to_theirs(TransformerLM(CONFIGS["llama"]).state_dict(), CONFIGS["llama"])
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    assert to_ours(tensors, CONFIGS["llama"]).keys() == TransformerLM(CONFIGS["llama"]).state_dict().keys()
    tensors["lm_head.weight"][0] += 1
    with pytest.raises(InteropError, match="the two differ"):
        to_ours(tensors, CONFIGS["llama"])


# ---------------------------------------------------------------------------------------------------------------------------- GGUF
@pytest.mark.parametrize("name", IN_GGUF)
def test_a_gguf_file_comes_back_bit_for_bit(name, models, tok, tmp_path):
    pytest.importorskip("gguf")
    path = export_gguf(tmp_path / "out.gguf", models[name], tok)
    back, back_tok = import_gguf(path)
    expected = held_as(models[name].config)
    assert back.config == (replace(expected, ffn="gelu_tanh") if expected.ffn == "gelu" else expected)      # the one GELU of llama.cpp
    assert same_weights(models[name], back) and back_tok.hash == tok.hash and back_tok.encode(STORY) == tok.encode(STORY)


@pytest.mark.parametrize("name, words", [("mistral", "sliding window"), ("llama stretched", "llama3 rotations"), ("qwen3 yarn", "yarn")])
def test_what_llama_cpp_has_no_graph_for_is_refused(name, words, models, tok, tmp_path):
    with pytest.raises(InteropError, match=words):
        export_gguf(tmp_path / "x.gguf", models[name], tok)
    assert not list(tmp_path.iterdir())


def test_q8_keeps_every_weight_within_half_a_step_of_its_block(models, tok, tmp_path):
    _, exact = read_gguf(export_gguf(tmp_path / "a.gguf", models["llama"], tok))
    _, rounded = read_gguf(export_gguf(tmp_path / "b.gguf", models["llama"], tok, dtype="q8_0"))
    for name, t in exact.items():
        if t.dim() < 2:
            assert torch.equal(t, rounded[name])
        else:
            blocks = t.view(-1, 32)
            step = blocks.abs().amax(1, keepdim=True) / 127
            assert ((blocks - rounded[name].view(-1, 32)).abs() <= 0.51 * step + 1e-3 * blocks.abs()).all()


def test_pairs_of_rows_are_a_permutation_inside_each_head():
    for n_head, d_head in ((1, 2), (3, 8), (4, 24)):
        rows = pair_rows(n_head, d_head)
        assert sorted(rows.tolist()) == list(range(n_head * d_head))
        assert torch.equal(rows // d_head, torch.arange(n_head).repeat_interleave(d_head))
        assert torch.equal(rows[1::2] - rows[::2], torch.full((n_head * d_head // 2,), d_head // 2))


def test_torn_and_altered_gguf_files_give_a_sentence_or_a_model(models, tok, tmp_path):
    whole = export_gguf(tmp_path / "out.gguf", TransformerLM(ModelConfig(**SMALL | {"n_layer": 1})), tok).read_bytes()
    pick = np.random.default_rng(0)
    for trial in range(60):
        data = bytearray(whole)
        if trial < 25:
            data = data[: int(pick.integers(0, len(data) - 40))]
        else:
            data[int(pick.integers(4, 14_000))] = int(pick.integers(256))
        (tmp_path / "bad.gguf").write_bytes(bytes(data))
        try:
            import_gguf(tmp_path / "bad.gguf")
            assert trial >= 25                       # a byte of a name in the vocabulary may well be another one
        except SLMError as error:
            assert "\n" not in str(error)


class LlamaCpp:
    """llama.cpp with one file; keys and values in 32 bits."""

    def __init__(self, path: Path):
        x = pytest.importorskip("xllamacpp")
        p, f32 = x.CommonParams(), int(x.ggml_type.GGML_TYPE_F32)
        p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.verbosity, p.port = str(path), 128, 1, False, -1, 0
        p.cache_type_k, p.cache_type_v, p.cpuparams.n_threads = f32, f32, 1
        p.flash_attn_type = int(x.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED)
        self.server = x.Server(p)

    def ask(self, route: str, **body) -> dict:
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.server.listening_address + route, json.dumps(body).encode(), head)
        return json.load(urllib.request.urlopen(request))

    def scores(self, ids: list[int], say: int, n: int) -> torch.Tensor:
        answer = self.ask("/completion", prompt=ids, n_predict=1, temperature=0, n_probs=n, cache_prompt=False, logit_bias=[[say, 100.0]])
        found = {p["id"]: p["logprob"] for p in answer["completion_probabilities"][0]["top_logprobs"]}
        return torch.tensor([found[i] for i in range(n)])


@torch.inference_mode()
def logprobs(model: TransformerLM, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]))[0, -1].log_softmax(-1)


@pytest.mark.parametrize("name", IN_GGUF)
def test_llama_cpp_writes_the_same_text(name, models, tok, tmp_path):
    peer, model = LlamaCpp(export_gguf(tmp_path / "out.gguf", models[name], tok)), models[name]
    prompt = [tok.eot_id, *tok.encode("They sailed past the")]
    apart = (peer.scores(prompt, tok.encode("a")[0], 330) - logprobs(model, prompt)).abs().max()
    assert apart < (2e-3 if "gpt2" in name else 1e-5)                    # llama.cpp looks GELU up in a table of 16-bit numbers
    answer = peer.ask("/completion", prompt=prompt, n_predict=64, temperature=0, return_tokens=True, cache_prompt=False, ignore_eos=True)
    expected = greedy(model, prompt, never=tuple(tok.special_tokens[s] for s in STOPS))
    same = next((i for i in range(64) if answer["tokens"][i] != expected[i]), 64)
    assert same == 64 or ("gpt2" in name and logprobs(model, prompt + expected[:same]).topk(2).values.diff().abs() < 2 * 2e-3)


def test_llama_cpp_in_eight_bits_is_within_the_error_of_the_rounded_weights(models, tok, tmp_path):
    path, prompt = export_gguf(tmp_path / "out.gguf", models["llama"], tok, dtype="q8_0"), [tok.eot_id, *tok.encode("They sailed")]
    there, rounded = LlamaCpp(path).scores(prompt, tok.encode("a")[0], 330), logprobs(import_gguf(path)[0], prompt)
    lost = (rounded - logprobs(models["llama"], prompt)).abs().max()
    assert 0 < lost < 0.05 and (there - rounded).abs().max() < 3 * lost


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
def test_llama_cpp_cuts_text_into_our_ids(pattern, tmp_path):
    tok = BPETokenizer.train([STORY], vocab_size=320, special_tokens=SPECIAL_TOKENS, pattern=pattern)
    peer = LlamaCpp(export_gguf(tmp_path / "out.gguf", TransformerLM(ModelConfig(**SMALL | {"n_layer": 1})), tok))
    pick = np.random.default_rng(0)
    ends = ["\n", "\r\n", "  ", "'s", "'LL", "12345", "🙂", "é", "\u00a0", "\u3000", "½", "Ⅷ", "a\u0301", "<|end|>", " x", "\t"]
    for text in [STORY, *("".join(pick.choice([*ends, chr(int(pick.integers(33, 0x2FFF)))]) for _ in range(30)) for _ in range(150))]:
        assert peer.ask("/tokenize", content=text, add_special=False, parse_special=False)["tokens"] == tok.encode(text), ascii(text)
    assert peer.ask("/tokenize", content="Hi", add_special=True)["tokens"] == [tok.eot_id, *tok.encode("Hi")]
    chat = [{"role": "user", "content": "Café {{ x }}?"}]
    text = peer.ask("/apply-template", messages=chat)["prompt"]
    assert [tok.eot_id, *tok.encode(text, allowed_special="all")] == render_chat(tok, chat, add_generation_prompt=True)[0]


# ------------------------------------------------------------------------------------------------------------------ one door, LM
def test_lm_export_and_load_give_the_same_text(models, tok, tmp_path):
    lm = LM(models["llama"], tok, parents={"model": "a" * 64})
    expected = lm.generate("They", seed=3, max_new_tokens=20)
    for format, dtype, name in (("hf", None, "folder"), ("hf", "float32", "again"), ("gguf", "f32", "file.gguf")):
        path = lm.export(tmp_path / name, format, dtype)
        assert format_of(path) == format and slm.load(path).generate("They", seed=3, max_new_tokens=20) == expected
    assert read_manifest(tmp_path / "folder")["parents"] == {"model": "a" * 64}
    assert read_gguf(tmp_path / "file.gguf")[0]["slm.parent.model"] == "a" * 64
    kept = slm.load(tmp_path / "file.gguf").save(tmp_path / "kept")
    assert slm.load(kept).generate("They", seed=3, max_new_tokens=20) == expected


def test_a_folder_without_a_tokenizer_is_a_model_but_not_an_lm(models, tmp_path):
    folder = export_hf(tmp_path / "bare", models["qwen3"])
    assert import_model(folder)[1] is None
    with pytest.raises(SLMError, match="no tokenizer.json"):
        slm.load(folder)


def test_unknown_formats_paths_and_number_formats_are_explained(models, tok, tmp_path):
    cases = [(lambda: export_model(tmp_path / "x", models["llama"], tok, "onnx"), "choose hf or gguf"),
             (lambda: export_model(tmp_path / "x", models["llama"], tok, "gguf", "q2_k"), "use f32, f16, q8_0"),
             (lambda: export_model(tmp_path / "x", models["llama"], tok, "hf", "f16"), "use float32, bfloat16, float16"),
             (lambda: import_model(tmp_path / "nothing"), "neither a Hugging Face folder")]
    for call, words in cases:
        with pytest.raises(InteropError, match=words):
            call()


def test_the_two_families_of_errors_are_one_kind():
    assert issubclass(InteropError, SLMError) and issubclass(TokenizerError, SLMError)
    assert family_of(CONFIGS["mixtral"]).name == "mixtral" and family_of(CONFIGS["mistral"]).name == "mistral"
