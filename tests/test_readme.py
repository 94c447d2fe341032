"""The README tells the truth: its commands exist, its links lead somewhere, its figures are those of the stored report."""
import json
import math
import re
from pathlib import Path
from statistics import median

import pytest
from typer.testing import CliRunner

from slm.time_to_loss import crossing

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = json.loads((ROOT / "nbs" / "results" / "story.json").read_text(encoding="utf-8"))


def test_two_commands_stand_once_each():
    lines = README.splitlines()
    for last in ("slm run", "slm test"):
        assert lines.count(f"pip install -c constraints.txt -e '.[dev]' && {last}") == 1


def test_links_lead_somewhere():
    local = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("http")]
    assert len(local) > 20 and not [target for target in local if not (ROOT / target).exists()]


def test_every_notebook_is_in_the_table():
    assert [p.stem for p in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))] == re.findall(r"\[`(\d\d[a-z]?_\w+)`\]", README)


def test_figures_are_those_of_the_report():
    bits, judge = REPORT["bits_per_byte"], REPORT["judge"]
    for value in (bits["val"], bits["floor"], bits["int8"], bits["val"] - bits["floor"]):
        assert f"{value:.3f}" in README
    for model in ("base", "sft", "dpo"):
        assert f"{100 * judge[model]['overall']:.0f} %" in README
    assert f"{REPORT['parameters']:,}" in README
    assert f"{sum(REPORT['seconds'].values()) / 60:.1f} in all" in README
    old = json.loads((ROOT / "nbs" / "results" / "story_avx2.json").read_text(encoding="utf-8"))
    bits, scores = old["bits_per_byte"], " → ".join(f"{100 * old['judge'][model]['overall']:.0f} %" for model in ("base", "sft", "dpo"))
    assert f"{bits['val']:.3f} bits per byte, {bits['val'] - bits['floor']:.3f} above the floor, and {scores}" in README


def test_speeds_are_those_of_the_stored_benches():
    stored = lambda name: json.loads((ROOT / "nbs" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    speeds = stored("decode")["tokens_per_second"]
    one, eight = (speeds["slm int8, compiled"][at] / speeds["llama.cpp Q8_0"][at] for at in ("batch 1", "batch 8"))
    assert f"{one:.1f} times as fast as llama.cpp's Q8_0 for one text and {eight:.1f} times for eight" in README
    training = [row for row in stored("tokenizer_bench") if row["task"] == "train" and row["who"] in ("slm numba", "tokenizers")]
    seconds = {(row["who"], row["vocab_size"]): row["seconds"] for row in training}
    times = [seconds["tokenizers", size] / seconds["slm numba", size] for size in (4096, 32000)]
    assert all(row["same"] for row in training) and f"BPE training {min(times):.0f} to {max(times):.0f} times as fast" in README
    file = next(row for row in stored("encoder_10mb") if row["task"] == "file" and row["text"] == "as given")
    assert file["same"] and f"encoding a cold file {file['ratio']:.0f} times as fast as tiktoken" in README
    shares = [crossing(race["curves"]) or math.inf for race in stored("time_to_loss")["races"].values()]
    assert len(shares) == 5 and 0.2 < median(shares) < 0.25
    assert "a tuned GPT-2's final loss in about a quarter of its processor time" in README


def test_the_report_holds_what_was_promised():
    bits, judge = REPORT["bits_per_byte"], REPORT["judge"]
    assert 0 < bits["val"] - bits["floor"] < 0.15 and abs(bits["int8"] - bits["val"]) < 0.01
    assert judge["base"]["high"] < judge["sft"]["low"] and judge["sft"]["overall"] < judge["dpo"]["overall"]
    assert all(judge[model]["n"] >= 200 for model in judge) and sum(REPORT["seconds"].values()) < 600


@pytest.mark.parametrize("line", [line.split("#")[0].strip() for line in README.splitlines() if re.match(r"slm \w", line)])
def test_shell_examples_are_real_commands(line):
    from slm.cli import app
    words = line.split()[1:]
    known = CliRunner().invoke(app, [*words[:2 if words[0] in ("data", "tokenizer", "bench") else 1], "--help"])
    assert known.exit_code == 0
    assert not [flag for flag in re.findall(r"--[a-z-]+", line) if flag not in known.output]


def test_names_in_the_python_examples_exist():
    import slm
    from slm.sample import LM
    assert all(hasattr(LM, name) for name in re.findall(r"\blm\.(\w+)\(", README)) and callable(slm.load)
    for module, names in re.findall(r"from (slm\.\w+) import (.+)", README):
        loaded = __import__(module, fromlist=["*"])
        assert all(hasattr(loaded, name.strip()) for name in names.split(","))
