"""What post-training buys: the default run, GRPO after it, LoRA beside all weights. Writes nbs/results/proof.json (SLM_SLOW=1).

About half an hour on two cores. With SLM_PROOF=FOLDER the models stay there: what is finished is not made again, and a run that was
stopped goes on.
"""
from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slm.files import read_json, write_json
from slm.steps import read_log

ROOT = Path(__file__).resolve().parents[1]
SFT = "slm sft story/pretrain storyworld --rows 4000 --batch-size 4 --held-out 0.02 --steps 200 --lr 0.01 --set train.muon_lr=0.02 " \
      "--set train.decay_fraction=0.5"
NAMES = {"base": "story/pretrain", "sft": "story/sft", "dpo": "story/dpo", "grpo": "grpo", "sft-full": "sft-full", "sft-lora": "sft-lora",
         "sft-lora-none": "sft-lora-none", "sft-lora-all": "sft-lora-all"}
LINES = [
    "slm run story --out .",
    "slm grpo story/dpo --out grpo",
    f"{SFT} --out sft-full",
    f"{SFT} --lora 16 --out sft-lora",
    f"{SFT} --lora 16 --set lora.embeddings=none --out sft-lora-none",
    f"{SFT} --lora 16 --set lora.embeddings=all --out sft-lora-all",
    f"slm judge {' '.join(f'{name}={folder}' for name, folder in NAMES.items())} --prompts 500 --docs 100 --pairs story/dpo/pairs.json "
    "--kept judged --out judged.json",
    "slm judge dpo=story/dpo grpo=grpo --prompts 500 --docs 20 --temperature 1.0 --kept warm --out warm.json",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = Path(os.environ.get("SLM_PROOF") or tmp_path_factory.mktemp("proof"))
    for line in LINES:
        done = subprocess.run([sys.executable, "-m", "slm.cli", *shlex.split(line)[1:]], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_post_training_is_worth_its_minutes(place):
    found, log = read_json(place / "judged.json"), read_log(place / "grpo")
    warm = read_json(place / "warm.json")["duels"]["dpo to grpo"]          # as GRPO itself samples
    columns = ("step", "reward", "kl", "differ", "surprise", "val_reward")
    write_json(ROOT / "nbs" / "results" / "proof.json", found | {
        "commands": LINES, "warm": warm,
        "grpo": [{name: record[name] for name in columns if record.get(name) is not None} for record in log],
        "health": {name: read_json(place / folder / "health.json")["sentences"] for name, folder in NAMES.items() if name != "base"}})
    gain = lambda key: found["duels"][key]["gain"]
    assert gain("base to sft")["low"] > 0.2 and gain("sft to dpo")["low"] > 0 and warm["gain"]["low"] > 0
    assert found["models"]["sft"]["score"]["overall"] >= 0.8 and found["cut"]["sft to dpo"]["ratio"] < 0.5
    assert found["retention"]["sft to dpo"] < 0.02
    overall = {name: model["score"]["overall"] for name, model in found["models"].items()}
    assert overall["sft-full"] > overall["sft-lora"] > overall["sft-lora-all"]
