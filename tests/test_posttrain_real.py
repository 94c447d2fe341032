"""SFT and DPO on real files: held-out loss falls, held-out pairs are told apart. Writes nbs/results/post.json (SLM_SLOW=1)."""
from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from slm.chat_rows import build_sft
from slm.files import read_json, write_json
from slm.optim import TrainConfig
from slm.post_cli import keep_back, read_mixture
from slm.pretrain import load_model
from slm.sft import held_out_loss
from slm.steps import read_log
from slm.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
LINES = [
    "slm data prepare tinystories-train.txt --megabytes 8 --vocab-size 2048 --out stories",
    "slm pretrain stories/pack --preset tiny --steps 700 --batch-size 8 --context-length 256 --out base",
    "slm sft base instruction-data.json --steps 60 --batch-size 8 --context-length 256 --lr 2e-3 --set train.muon_lr=0.01 --out sft",
    "slm dpo sft instruction-data-with-preference.json --on-bad skip --steps 60 --batch-size 16 --context-length 256 --lr 3e-4 "
    "--set train.muon_lr=0.001 --out dpo",
]
FILES = {"tinystories-train.txt": "pretrain", "instruction-data.json": "sft", "instruction-data-with-preference.json": "preference"}


def run(line: str, folder: Path) -> None:
    words = [str(DATA / FILES[word] / word) if word in FILES else word for word in shlex.split(line)]
    done = subprocess.run([sys.executable, "-m", "slm.cli", *words[1:]], cwd=folder, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").open("a").write(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="the real files are not beside the repository")
def test_real_files(tmp_path):
    for line in LINES:
        run(line, tmp_path)
    chats = read_mixture(str(DATA / "sft" / "instruction-data.json"), "chats", None, 0, "raise")
    base, checkpoint = load_model(tmp_path / "base")
    data = build_sft(keep_back(chats, 0.1)[1], load_tokenizer(Path(checkpoint.path)), 256)
    before = held_out_loss(base, data, TrainConfig(batch_size=8))["val_loss"]
    said = (tmp_path / "said.txt").read_text()
    sft, dpo = read_log(tmp_path / "sft"), read_log(tmp_path / "dpo")
    log = read_log(tmp_path / "base")
    keep = lambda records, names: [{name: record[name] for name in names.split() if record.get(name) is not None} for record in records]
    columns = "step dpo_loss accuracy margin change_chosen change_rejected kl val_accuracy val_dpo_loss val_margin"
    write_json(ROOT / "nbs" / "results" / "post.json", {
        "commands": LINES, "base_bits_per_byte": log[-1]["bits_per_byte"], "sft_before": before,
        "sft": keep(sft, "step loss val_loss"), "dpo": keep(dpo, columns),
        "bad_pairs": int(re.search(r"left out (\d+) of 1100 rows", said)[1]),
        "health": [sentence for name in ("sft", "dpo") for sentence in read_json(tmp_path / name / "health.json")["sentences"]]})
    print(json.dumps({"before": before, "sft": sft[-1]["val_loss"], "dpo": dpo[-1]["val_accuracy"]}))
    assert "left out 6 of 1100 rows" in said and "row 123 of instruction-data-with" in said
    assert sft[-1]["val_loss"] < 0.8 * before
    assert dpo[-1]["val_accuracy"] > 0.7 and dpo[-1]["val_dpo_loss"] < 0.6931 - 0.03
