"""`slm sft`, `dpo`, `grpo` as processes: killed and taken up again to the same bits, the base known by hash, refusals in one sentence."""
from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from forks import forks

from slm.artifacts import artifact_id, latest_checkpoint, lineage_text, save_checkpoint
from slm.config import ModelConfig, to_dict
from slm.files import read_json
from slm.model import TransformerLM
from slm.steps import read_log
from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer

THINGS = {"snow": "White.", "coal": "Black.", "grass": "Green.", "blood": "Red.", "milk": "White.", "a crow": "Black."}
ASKS = ("What colour is {}?", "And {}?", "Tell me the colour of {}.", "Which colour has {}?")
ROWS = [{"prompt": ask.format(thing), "completion": colour, "chosen": colour, "rejected": colour[:-1] + ", silly."}
        for ask in ASKS for thing, colour in THINGS.items()]
SIZES = "--batch-size 4 --context-length 64 --set train.save_every=4 --set train.precision=float32"
LINES = {
    "sft": f"sft base rows.jsonl --steps 16 --neftune 1 {SIZES}",
    "sft-lora": f"sft base rows.jsonl --steps 16 --lora 4 {SIZES}",
    "dpo": f"dpo base rows.jsonl --steps 16 {SIZES}",
    "dpo-copy": f"dpo base rows.jsonl --steps 16 --loss ipo --beta 0.5 --reference copy {SIZES}",
    "grpo": "grpo base rows.jsonl --reward mine:right --steps 8 --group 4 --prompts-per-step 2 --max-new-tokens 8 --updates 2 "
            "--held-out 2 --set train.save_every=4 --set train.precision=float32",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("post")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "mine.py").write_text("def right(messages, answer):\n    return float('e' in answer) + len(answer) / 100\n")
    tok = BPETokenizer.train([text for row in ROWS for text in row.values()], vocab_size=300, special_tokens=SPECIAL_TOKENS, strict=False)
    tok.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    shape = ModelConfig(vocab_size=tok.vocab_size, context_length=64, n_layer=2, n_head=2, d_model=32, d_ff=64)
    save_checkpoint(folder / "base", 0, TransformerLM(shape).state_dict(), {}, {"model_config": to_dict(shape)},
                    files={"tokenizer.json": folder / "tokenizer.json"})
    return folder


FATAL = """if True:
    import os, signal, slm.artifacts
    rotate, fatal = slm.artifacts.rotate, lambda: os.kill(os.getpid(), signal.SIGKILL)
    slm.artifacts.rotate = lambda folder, newest, *more: (rotate(folder, newest, *more), newest > 0 and fatal())[0]
"""                                                                                # SIGKILL when the first checkpoint has been saved


@pytest.fixture(scope="module")
def slm(place):
    """A function that runs `slm LINE` in a process of its own, after the lines of another program."""
    with forks("torch", "numba", "slm.cli", "slm.sft", "slm.dpo", "slm.grpo", "slm.sample", "slm.steps") as run:
        yield lambda line, program="": run(program + "import slm.cli; slm.cli.main()", line.split(), place)


def finish(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", [name if name in ("sft-lora", "grpo") else pytest.param(name, marks=pytest.mark.slow) for name in LINES])
def test_a_killed_run_goes_on_to_the_same_bits(place, slm, name):
    loop = place / f"{name}-cut" / ("adapting" if "lora" in name else "")
    cut = slm(f"{LINES[name]} --out {name}-cut", FATAL)
    assert cut.returncode == -signal.SIGKILL, cut.stderr
    assert len(list(loop.glob("step-*"))) == 1
    finish(slm(f"{LINES[name]} --out {name}-whole"))
    said = finish(slm(f"{LINES[name]} --out {name}-cut"))
    assert "step" in said
    steps = [record["step"] for record in read_log(loop)]
    assert steps == sorted(set(steps)) and steps[-1] == len(steps)
    ends = [latest_checkpoint(place / f"{name}-{way}") for way in ("whole", "cut")]
    assert (ends[0] / "model.safetensors").read_bytes() == (ends[1] / "model.safetensors").read_bytes()
    assert read_json(place / f"{name}-cut" / "health.json") == read_json(place / f"{name}-whole" / "health.json")
    tree = lineage_text(ends[1])
    assert artifact_id(place / "base" / "step-00000000")[:12] in tree and "base" in tree  # it knows its base by hash


def test_lineage_of_the_last_stage_shows_every_base(place, slm):
    finish(slm(f"sft base rows.jsonl --steps 2 {SIZES} --out family-sft"))
    finish(slm(f"dpo family-sft rows.jsonl --steps 2 {SIZES} --out family-dpo"))
    told = finish(slm("lineage family-dpo"))
    ids = [artifact_id(latest_checkpoint(place / name))[:12] for name in ("base", "family-sft")]
    assert all(i in told for i in ids) and told.index(ids[1]) < told.index(ids[0])


REFUSALS = [
    ("sft base none.jsonl", "there is no file"), ("sft nowhere rows.jsonl", "nowhere"), ("sft base rows.jsonl=-1", "positive number"),
    ("sft base rows.jsonl --context-length 128", "reads 64"), ("sft base rows.jsonl --set lora.alpha=3", "--lora RANK"),
    ("dpo base rows.jsonl --loss kto", "kto"), ("dpo base rows.jsonl --reference base --context-length 64", "needs an adapter"),
    ("dpo base rows.jsonl --reference moon --context-length 64", "stored"), ("dpo base rows.jsonl --on-long cut", "'skip' or 'raise'"),
    ("grpo base rows.jsonl --reward judge --steps 2", "judge does not know this request"),
    ("grpo base rows.jsonl --reward a:b", "neither judge"),
    ("judge a=base", "two models"), ("judge a=base a=base", "two models are called a"),
]


@pytest.mark.parametrize("line, words", REFUSALS)
def test_refusals_are_one_sentence(place, line, words, monkeypatch):
    import slm.cli  # noqa: F401  the commands join the program
    from slm.shell import expect_refusal
    monkeypatch.chdir(place)
    said = expect_refusal(line if line.startswith("judge") else f"{line} --out refused")
    assert words in said, said
