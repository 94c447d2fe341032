"""Evaluation: figures equal to lm-evaluation-harness' on real files, resumable suites, sentences for every wrong word."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forks import forks

import slm
from slm.benchmarks import pair_ids, score_pairs
from slm.config import SLMError
from slm.instructions import CHECKS, follows
from slm.loss import bits_per_byte
from slm.measure import domain_docs, framed, measure, measure_by_domain
from slm.sources import open_source
from slm.specimen import make_specimen, sentences
from slm.subwords import HFTokenizer, TiktokenTokenizer
from slm.suite import find_benchmarks, run_benchmark, run_suite, run_texts, suite_table
from slm.words import PATTERNS

ROOT = Path(__file__).resolve().parents[1]
REAL = Path(os.environ.get("SLM_EVAL_DATA", ROOT.parent / "shared" / "data" / "eval"))   # local copies of public benchmarks
real = pytest.mark.skipif(not REAL.is_dir(), reason="no local benchmark files: set SLM_EVAL_DATA")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_specimen(tmp_path_factory.mktemp("specimen"), steps=60, context_length=256)


@pytest.fixture(scope="module")
def lm(run):
    return slm.load(run)


def test_measure_equals_the_loss_chapter_and_splits_by_domain(lm):
    docs = sentences("tests", 40)
    found, ids = measure_by_domain(lm, docs), framed(lm, [doc["text"] for doc in docs])
    whole = bits_per_byte(lm.model, ids, [len(doc["text"].encode()) for doc in docs])
    assert all(found["all"][key] == pytest.approx(whole[key], rel=1e-9) for key in ("bits_per_byte", "low", "high"))
    assert found["all"]["above"] == pytest.approx(found["all"]["bits_per_byte"] - found["all"]["floor"])
    assert sum(found[name]["docs"] for name in ("gift", "echo")) == 40
    with pytest.raises(SLMError, match="at least one character"):
        measure(lm, [])


def test_a_score_does_not_depend_on_whose_tokenizer_code_runs(lm, run, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    docs, tok = sentences("adapters", 30), lm.tokenizer
    ranks = {tok.decode_bytes([i]): i for i in range(tok.vocab_size) if i not in tok.special_tokens.values()}
    encoding = tiktoken.Encoding("small", pat_str=PATTERNS[tok.pattern], mergeable_ranks=ranks, special_tokens=dict(tok.special_tokens))
    found = measure_by_domain(lm, docs)
    for other in (HFTokenizer.from_file(run.parent / "tokenizer.json"), TiktokenTokenizer(encoding)):
        assert measure_by_domain(slm.LM(lm.model, other), docs) == found
    folder = measure_by_domain(slm.load(lm.export(tmp_path / "hf")), docs)
    assert all(folder[name][key] == pytest.approx(found[name][key], rel=1e-6) for name in found for key in found[name])


def test_a_folder_gives_a_row_a_file_and_stories_their_floor(lm, tmp_path):
    for domain in ("gift", "echo"):
        text = "<|endoftext|>".join(doc["text"] for doc in sentences("files", 80) if doc["domain"] == domain)
        (tmp_path / f"{domain}.txt").write_text(text)
    (tmp_path / "photo.png").write_bytes(b"\0" * 99)
    found = run_texts(lm, [tmp_path, "storyworld"], tmp_path / "out", limit=20)
    assert list(found) == ["all", "echo.txt", "gift.txt", "storyworld"] and all(r["docs"] == 20 for r in list(found.values())[1:])
    story = found["storyworld"]
    assert story["above"] == pytest.approx(story["bits_per_byte"] - story["floor"]) and "floor" not in found["all"]
    assert (tmp_path / "out" / "text.png").stat().st_size > 3000 and "| gift.txt | 20 |" in (tmp_path / "out" / "text.md").read_text()
    trained_on = {doc["text"] for doc in open_source("storyworld", limit_docs=2000)}
    assert not trained_on & {doc["text"] for doc in domain_docs(["storyworld"], 200)}


FATAL = """if True:
    import itertools, os, signal, slm.suite
    marked, number = slm.suite.document_marks, itertools.count()
    slm.suite.document_marks = lambda *words: (next(number) == 3 and os.kill(os.getpid(), signal.SIGKILL), marked(*words))[1]
"""


def test_slm_eval_killed_in_the_middle_goes_on(run, tmp_path):
    (tmp_path / "tale.txt").write_text("<|endoftext|>".join(doc["text"] for doc in sentences("kill", 600)))
    words = ["eval", str(run), "--text", "tale.txt", "--max-docs", "600", "--out", "out", "--json"]
    marks = tmp_path / "out" / "text.marks.jsonl"
    with forks("torch", "slm.cli", "slm.sample", "slm.suite") as start:
        begin = lambda program: start(program + "import slm.cli; slm.cli.main()", words, tmp_path)
        assert begin(FATAL).returncode == -signal.SIGKILL
        kept = marks.read_text()
        assert kept.count("\n") == 1 + 3 * 64, "it was over before it could be killed"
        went_on = json.loads(begin("").stdout)
    assert marks.read_text().startswith(kept[:kept.rindex("\n") + 1]) and marks.read_text().count("\n") == 601
    docs = domain_docs([tmp_path / "tale.txt"])
    alone = run_texts(slm.load(run), [tmp_path / "tale.txt"], tmp_path / "alone")
    assert went_on["text"] == alone and alone["all"]["docs"] == len(docs) == 600


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_scores_do_not_depend_on_the_batch(lm, batch):
    pairs = [pair_ids(lm, doc["text"][:9], doc["text"][9:]) for doc in sentences("batch", 12)]
    for (nats, greedy), (context, rest) in zip(score_pairs(lm, pairs, batch), pairs, strict=True):
        log_p = lm.logits(context + rest)[0, len(context) - 1:-1].log_softmax(-1)
        assert nats == pytest.approx(log_p.gather(-1, torch.tensor(rest)[:, None]).sum().item(), abs=1e-3)
        assert greedy == (log_p.argmax(-1).tolist() == rest)


def test_a_suite_that_was_stopped_goes_on_with_the_same_figures(lm, tmp_path):
    texts = [doc["text"][:12] for doc in sentences("stop", 700)]
    rows = [{"query": text, "choices": ["boat", "Mia", "the pond"], "gold": i % 3} for i, text in enumerate(texts)]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = run_suite(lm, tmp_path / "many.jsonl", tmp_path / "a")
    marks = (tmp_path / "a" / "many.marks.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "many.marks.jsonl").write_text("".join(marks[:600]) + marks[600][:5])
    assert run_suite(lm, tmp_path / "many.jsonl", tmp_path / "b") == whole
    assert (tmp_path / "b" / "many.marks.jsonl").read_text() == "".join(marks)
    assert whole["many"]["random"] == pytest.approx(1 / 3) and "| many | 700 |" in suite_table(whole)


@real
def test_every_real_file_is_understood(lm, tmp_path):
    files = find_benchmarks(REAL)
    assert len(files) >= 13
    small = slm.LM(lm.model, lm.tokenizer)
    for name, path in files.items():
        if name == "ifeval-prompts":
            continue
        found = run_benchmark(small, path, tmp_path, limit=4)
        assert found["n"] == 4 and 0 <= found["acc"] <= 1 and found["random"] in (0, 0.25, 0.5), name


@real
def test_real_instructions_have_a_check_each():
    rows = [json.loads(line) for line in (REAL / "ifeval-prompts.jsonl").read_text("utf-8").splitlines()]
    assert {name for row in rows for name in row["instruction_id_list"]} == set(CHECKS)
    for row in rows:
        verdict = follows("Just one short answer, nothing else.", row)
        assert all(loose or not strict for strict, loose in zip(verdict["strict"], verdict["loose"], strict=True))


def compare_with_the_harness(lm, run, tmp_path, names, limit):
    """Figures of files: ours, the harness' through `slm`, the harness' through an exported folder, all as the harness prints them."""
    from slm.harness import harness_figures, write_tasks
    (tmp_path / "data").mkdir()
    for name in names:
        shutil.copy(REAL / name, tmp_path / "data")
    tasks = write_tasks(tmp_path / "data", tmp_path / "tasks", limit)
    mine = run_suite(lm, tmp_path / "data", tmp_path / "out", limit=limit)
    exported = str(lm.export(tmp_path / "hf"))
    theirs = harness_figures("slm", {"path": str(run)}, tasks)
    hf = harness_figures("hf", {"pretrained": exported, "tokenizer": exported, "device": "cpu", "dtype": "float32"}, tasks)
    for name, figure in mine.items():
        keys = figure.keys() & theirs[f"slm_{name}"].keys()
        assert "acc" in keys and {"acc_norm", "perplexity"} & keys
        for key in keys:
            ours, printed, folder = figure[key], theirs[f"slm_{name}"][key], hf[f"slm_{name}"][key]
            assert f"{ours:.4f}" == f"{printed:.4f}", (name, key)
            if key == "perplexity":                    # two libraries, 32 bits: e to the power of a mean of logarithms, both near 40
                assert folder == pytest.approx(ours, rel=1e-6), name
            else:
                assert f"{ours:.4f}" == f"{folder:.4f}", (name, key)
    return {name: figure["n"] for name, figure in mine.items()}


@real
def test_figures_equal_the_harness_and_the_exported_folder(lm, run, tmp_path):
    pytest.importorskip("lm_eval")
    names = ["copa.jsonl", "blimp-200.jsonl", "lambada-dev.txt", "hellaswag-500.jsonl", "winograd_wsc.jsonl"]
    assert set(compare_with_the_harness(lm, run, tmp_path, names, 24).values()) == {24}


@real
@pytest.mark.slow
def test_figures_equal_the_harness_on_whole_files(tmp_path):
    pytest.importorskip("lm_eval")
    run = make_specimen(tmp_path, steps=60, context_length=1024)
    names = [path.name for path in REAL.iterdir() if path.name not in ("ifeval-prompts.jsonl", "README.md")]
    counts = compare_with_the_harness(slm.load(run), run, tmp_path, names, None)
    assert len(counts) == 12 and sum(counts.values()) > 24_000, counts


def test_a_task_file_registers_the_model(tmp_path):
    pytest.importorskip("lm_eval")
    from slm.harness import write_tasks
    (tmp_path / "tiny.txt").write_text("Mia went home\n")
    task, = write_tasks(tmp_path / "tiny.txt", tmp_path / "tasks")
    program = ("import sys, lm_eval.models; from lm_eval.api.registry import get_model, model_registry; "
               "from lm_eval.tasks._yaml_loader import load_yaml; assert 'slm' not in model_registry; "
               "load_yaml(sys.argv[1]); print(get_model('slm').__name__)")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", program, str(task)], capture_output=True, text=True, timeout=600, env=env)
    assert done.stdout.strip() == "SLMHarness", done.stderr[-2000:]


@pytest.mark.slow
def test_the_plain_program_of_the_harness_finds_the_model(run, tmp_path):
    pytest.importorskip("lm_eval")
    from slm.harness import write_tasks
    (tmp_path / "tiny.jsonl").write_text('{"query": "Mia and Tom went to the", "choices": ["pond", "lamp"], "gold": 0}\n' * 4)
    task, = write_tasks(tmp_path / "tiny.jsonl", tmp_path / "tasks")
    words = [sys.executable, "-m", "lm_eval", "run", "--model", "slm", "--model_args", f"path={run}", "--tasks", str(task)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "slm_tiny" in done.stdout and "acc" in done.stdout


def test_the_harness_is_an_extra(monkeypatch):
    import slm.harness
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api", None)
    with pytest.raises(SLMError, match="not installed"):
        slm.harness.need_harness()
