"""Data: killed and resumed preparation, damage, hub layouts, long documents, and the doctor, through the command line and the library."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from every_format import write_every_format, write_table
from forks import forks

import slm.cli  # noqa: F401  its commands join the program
from slm.config import SLMError
from slm.data import Pack, open_source
from slm.data_doctor import examine
from slm.loading import ROWS, Loader
from slm.packing import parts_folder
from slm.shell import expect_ok, expect_refusal
from slm.sources import DataError
from slm.texts import stream_rows

ROOT = Path(__file__).resolve().parents[1]
CORPORA = os.environ.get("SLM_DATA")              # a folder of real corpora; the tests that need it are skipped without


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


SMALL = "--vocab-size 300 --val-fraction 0.1 --shard-tokens 30000 --part-megabytes 0.02 --workers 1"
PREPARE = f"data prepare storyworld --megabytes 0.6 {SMALL}"
MIXED = f"data prepare --sources mix.yml --near-copies 0.9 {SMALL}"
MIX = """\
target_total_words: 30000
sources:
- {name: stories, kind: storyworld, share: 2}
- {name: rows, kind: file, location: rows.jsonl, filters: [encoding, controls, repetition, "words=5:"], share: 1}
"""


def write_mix(folder: Path) -> None:
    """A list of two sources, one of them with faults to be cleaned."""
    (folder / "mix.yml").write_text(MIX)
    chance = random.Random(5)
    some = ["river", "mill", "cafÃ©", "winter", "lamp", "bridge", "quiet", "nobody", "returned", "before", "dawn", "letter", "garden"]
    told = [" ".join(chance.choices(some, k=chance.randrange(3, 60))) + f" number {i}." for i in range(4000)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in told))


FATAL = """if True:
    import os, signal, sys, threading
    import slm.cli
    seconds = float(sys.argv.pop())
    if seconds: threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    slm.cli.main()"""


@pytest.fixture(scope="module")
def prepare():
    """A function that runs `slm data prepare`, which SIGKILL ends so many seconds after it has begun to work (0: never); its exit code."""
    with forks("datasets", "matplotlib.pyplot", "torch", "slm.cli", "slm.dedup", "slm.splitting", "slm.together", "slm.tokenizer") as run:
        def prepare(words: str, folder: Path, seconds: float = 0) -> int:
            done = run(FATAL, [*words.split(), str(seconds)], folder)
            assert done.returncode in (0, -signal.SIGKILL), done.stderr
            return done.returncode

        yield prepare


def killed_until_done(prepare, here: Path, kills: int, moments: random.Random, words: str = PREPARE) -> None:
    """Kill `slm data prepare` at random moments of its work, then let it finish. A kill that comes too late is repeated, sooner."""
    began, met = time.perf_counter(), 0
    assert prepare(f"{words} --out oracle", here) == 0
    took = time.perf_counter() - began
    for _ in range(kills + 20):
        if prepare(f"{words} --out killed", here, moments.uniform(0, 1.5 / kills) * took):
            met += 1
        else:
            shutil.rmtree(here / "killed")
            took /= 2
        if met == kills:
            break
    assert met == kills
    assert prepare(f"{words} --out killed", here) == 0


def test_killed_preparation_gives_the_same_bytes(prepare, here):
    write_mix(here)
    killed_until_done(prepare, here, 3, random.Random(0), MIXED)
    assert files_of(here / "killed" / "pack") == files_of(here / "oracle" / "pack")
    assert files_of(here / "killed" / "corpus") == files_of(here / "oracle" / "corpus")
    assert not parts_folder(here / "killed" / "pack").exists() and not (here / "killed" / ".parts").exists()


def test_any_number_of_workers_gives_the_same_bytes(prepare, here):
    """One worker in this process, three of another one: which also has another hash seed."""
    write_mix(here)
    expect_ok(f"{MIXED} --out by1")
    assert prepare(f"{MIXED.replace('--workers 1', '--workers 3')} --out by3", here) == 0
    assert [json.loads((here / f"by{n}/report/stages.json").read_text())["workers"] for n in (1, 3)] == [1, 3]
    for name in ("corpus", "tokenizer", "pack"):
        assert files_of(here / "by1" / name) == files_of(here / "by3" / name), name
    assert len(list((here / "by1" / "pack").glob("*.bin"))) > 2


@pytest.mark.slow
def test_twenty_kills(prepare, here):
    for number in range(4):
        (here / str(number)).mkdir()
        write_mix(here / str(number))
        words = (PREPARE, MIXED)[number % 2].replace("--workers 1", f"--workers {1 + number // 2}")
        killed_until_done(prepare, here / str(number), 5, random.Random(number), words)
        assert files_of(here / str(number) / "killed" / "pack") == files_of(here / str(number) / "oracle" / "pack")


def test_a_flipped_byte_in_any_shard_is_named_before_training(here):
    expect_ok("data prepare storyworld --max-docs 80 --part-megabytes 0.1 --vocab-size 300 --val-fraction 0.1 --shard-tokens 5000 --out s")
    for shard in sorted(Path("s/pack").glob("*.bin")):
        good = shard.read_bytes()
        shard.write_bytes(good[:7] + bytes([good[7] ^ 16]) + good[8:])
        with pytest.raises(SLMError, match=shard.name):
            Pack("s/pack")
        assert shard.name in expect_refusal("pretrain s/pack --preset tiny --steps 2 --out never")
        shard.write_bytes(good)
    assert Pack("s/pack").metadata["splits"]["train"]["documents"] > 10


def rows(n: int) -> list[str]:
    return [f"Row {i} of the table tells about {i} mills, a river and a quiet winter." for i in range(n)]


def test_every_format_gives_the_same_texts(here):
    texts = rows(20)
    for name in write_every_format(texts):
        assert [item["text"] for item in open_source(name)] == texts, name


def test_hub_layout_with_configs_and_splits(here):
    texts = rows(30)
    for config, part in (("small", texts[:10]), ("large", texts)):
        for number, half in enumerate((part[:len(part) // 2], part[len(part) // 2:])):
            write_table(half, f"set/{config}/train-{number:05d}-of-00002.parquet", "story")
        write_table(["held out"], f"set/{config}/test-00000-of-00001.parquet", "story")
    configs = "".join(f"- config_name: {c}\n  data_files:\n  - split: train\n    path: {c}/train-*\n  - split: test\n    path: {c}/test-*\n"
                      for c in ("small", "large"))
    Path("set/README.md").write_text(f"---\nconfigs:\n{configs}---\n")

    def read(config, split, field="story"):
        return [item["text"] for item in stream_rows("set", field, str, "set", config, split=split)]

    assert read("small", "train") == texts[:10] and read("large", "train") == texts and read("large", "test") == ["held out"]
    with pytest.raises(DataError, match="no field 'text'"):
        read("small", "train", "text")


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_document_larger_than_memory_streams_through(here):
    line = "The mill at the river was quiet that winter, and nobody came.\n"
    with open("giant.txt", "w") as file:
        file.write("A small one.<|endoftext|>")
        for _ in range(400):
            file.write(line * 8000)
    script = """if True:
        import resource
        from slm.sources import open_source
        held = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (held + (160 << 20),) * 2)       # less than the document
        print(sum(len(item["text"]) for item in open_source("giant.txt")))"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=here)
    assert done.returncode == 0, done.stderr[-500:]
    assert int(done.stdout) > 0.99 * (here / "giant.txt").stat().st_size


def test_dtype_overflow_and_other_wishes_are_refused(here):
    Path("a.txt").write_text("\n\n".join(rows(200)))
    assert "uint16 or uint32" in expect_refusal("data prepare a.txt --dtype int8 --vocab-size 300 --out x")
    assert "did you mean 'language'" in expect_refusal("data prepare a.txt --clean languge --out x")
    assert "never ends" in expect_refusal("data prepare storyworld --out x")
    assert "holds no text" in expect_refusal("data check nowhere")


def test_npy_export_is_the_pack(here):
    expect_ok("data prepare storyworld --max-docs 60 --part-megabytes 0.1 --vocab-size 300 --val-fraction 0.1 --dtype uint32 --npy --out s")
    [shard] = Pack("s/pack").tokens("train")
    assert np.array_equal(np.load("s/npy/train-00000.npy"), shard) and shard.dtype == np.uint32


def test_loader_is_a_function_of_seed_and_step(here):
    expect_ok("data prepare storyworld --max-docs 60 --part-megabytes 0.1 --vocab-size 300 --val-fraction 0.1 --out s")
    for rule in (*ROWS, "random"):
        one, other = (Loader(Pack("s/pack"), "train", 64, 4, rule, seed=seed) for seed in (0, 1))
        again = Loader(Pack("s/pack"), "train", 64, 4, rule)
        assert all((one.batch(step)["ids"] == again.batch(step)["ids"]).all() for step in (5, 0, 3)), rule
        assert not (one.batch(5)["ids"] == other.batch(5)["ids"]).all(), rule


def test_training_takes_its_rows_from_the_loader(here):
    expect_ok("data prepare storyworld --max-docs 60 --part-megabytes 0.1 --vocab-size 300 --val-fraction 0.1 --out s")
    words = "pretrain s/pack --preset tiny --steps 2 --batch-size 2 --context-length 64 --quiet --out"
    for number, rule in enumerate((*ROWS, "random")):
        expect_ok(f"{words} r{number} --rows {rule} --masks")
    assert "did you mean 'fitted'" in expect_refusal(f"{words} x --rows fited")


def test_doctor_on_the_command_line(here):
    Path("pages").mkdir()
    told = [*rows(30), "cafÃ© " * 3 + rows(1)[0], "", rows(3)[2]]
    Path("pages/train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in told))
    out = expect_ok("data check pages --report r")
    assert "encoding: 1" in out and "empty: 1" in out and Path("r/report.md").exists()


@pytest.mark.skipif(not CORPORA, reason="set SLM_DATA to a folder of real corpora")
def test_doctor_reads_real_corpora():
    seen = examine(Path(CORPORA) / "sft", text_field="prompt")
    assert seen.sizes and seen.languages.most_common(1)[0][0] == "en"
