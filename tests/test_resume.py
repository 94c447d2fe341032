"""The twenty-five trials of a run and its checkpoints (R1 … R25). `SLM_SLOW=1` runs those that take minutes or need root.

| trial | where |
| --- | --- |
| R1 R2 R3 | test_pretrain.py: interrupted = uninterrupted (fp32, bf16), twice, beside epoch borders; three controls |
| R4 | test_pretrain.py, and here 100 kills |
| R5 | here, slow: power loss on a loop device; skipped where there is none |
| R6 R7 R8 R9 R10 R11 R12 R13 R14 | here: flushing, damage, missing files, full disk, read-only, two writers, signals, clocks |
| R15 | here: a real limit on memory; test_pretrain.py: the parts are halved, and a resumed run keeps them |
| R16 | test_pretrain.py: nan and spikes |
| R17 | here: shards of a pack, ids outside the vocabulary |
| R18 | test_pretrain.py: another config, model, parent or data is refused by name; here: and allowed with a word |
| R19 R20 R21 | here: nonsense in a config; rotation; a reader while saving |
| R22 | test_distributed.py |
| R23 | here: files that would run code, or lead outside |
| R24 | test_style.py: no unsafe loading anywhere |
| R25 | here: a checkpoint of an earlier version |
"""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pretrain import CONFIG, batch_at, boom, everything, forker, fresh, go, same, stop_at  # noqa: F401

from slm.artifacts import ArtifactError, latest_checkpoint, load_checkpoint, rotate, save_checkpoint, step_folders
from slm.config import ConfigError, ModelConfig, from_dict, override, rng
from slm.data import Pack, open_source, write_corpus, write_pack
from slm.model import ModelError
from slm.optim import TrainConfig
from slm.pretrain import load_model, read_log
from slm.steps import TrainingError, append_log
from slm.tokenizer import BPETokenizer

RESULTS = Path(__file__).resolve().parents[1] / "nbs" / "results" / "reliability.json"
ROOT_ONLY = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting needs root")


def count(name, passed, tried):
    """In a slow run, keep the figure for the notebook."""
    if os.environ.get("SLM_SLOW"):
        results = json.loads(RESULTS.read_text())
        results["counts"][name] = {"passed": passed, "tried": tried}
        RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    assert passed == tried, f"{name}: {passed} of {tried}"


def two_checkpoints(folder):
    for step in (1, 2):
        save_checkpoint(folder, step, {"w": torch.arange(3000.0) + step}, {"w:m": torch.ones(900)}, {"note": "x" * 200})
    return folder / "step-00000002"


@pytest.fixture
def saved(tmp_path):
    return two_checkpoints(tmp_path / "run")


def mounted(*words):
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")


# ------------------------------------------------------------------------------------------------------------ R4, R12, R13
@pytest.mark.slow
def test_r4_a_hundred_kills(forker, tmp_path):  # noqa: F811
    words = ("save_every=1", "steps=40")
    _, seconds = forker(tmp_path / "whole", *words)
    expected, kills, runs = everything(tmp_path / "whole"), 0, 0
    for moment in rng("hundred").uniform(0.05, 0.45, size=400):
        last = max([step for step, _ in step_folders(tmp_path / f"cut{runs}")], default=0)
        code, _ = forker(tmp_path / f"cut{runs}", *words, after=float(moment * seconds))
        assert code in (0, -signal.SIGKILL) and max([s for s, _ in step_folders(tmp_path / f"cut{runs}")], default=0) >= last
        kills += code != 0
        if code == 0:
            assert same(everything(tmp_path / f"cut{runs}"), expected)
            runs += 1
        if kills == 100:
            break
    assert forker(tmp_path / f"cut{runs}", *words)[0] == 0 and same(everything(tmp_path / f"cut{runs}"), expected)
    count("R4 kill -9 at random moments", kills, 100)


@pytest.mark.slow
def test_r13_signals_at_random_moments(forker, tmp_path):  # noqa: F811
    _, seconds = forker(tmp_path / "whole", "steps=60")
    expected, passed = everything(tmp_path / "whole"), 0
    for i, moment in enumerate(rng("signals").uniform(0.1, 0.8, size=20)):
        number = (signal.SIGINT, signal.SIGTERM)[i % 2]
        code, _ = forker(tmp_path / str(i), "steps=60", after=float(moment * seconds), signal=number)
        assert code in (0, 7)                                               # 7: left by an exception, which the forker saw
        assert forker(tmp_path / str(i), "steps=60")[0] == 0
        passed += same(everything(tmp_path / str(i)), expected)
    count("R13 SIGINT and SIGTERM at random moments", passed, 20)


TWINS = """
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_pretrain as t

def child(folder, moment, hold):
    pid = os.fork()
    if pid: return pid
    time.sleep(max(0.0, moment - time.time()))
    try:
        t.go(folder, on_step=t.stop_at(2, lambda: time.sleep(600) if hold else None))
        os._exit(0)
    except t.ArtifactError as error:
        Path(f"{folder}.refused").write_text(str(error))
        os._exit(7)
    except BaseException as error:
        Path(f"{folder}.broken").write_text(repr(error))
        os._exit(9)

for i in range(int(sys.argv[3])):
    folder = f"{sys.argv[2]}/{i}"
    pair = {child(folder, time.time() + 0.05, True) for _ in range(2)}
    loser, status = os.wait()
    winner, = pair - {loser}
    said = Path(f"{folder}.refused")
    named = said.exists() and str(winner) in said.read_text()
    os.kill(winner, signal.SIGKILL)
    os.waitpid(winner, 0)
    again = os.waitstatus_to_exitcode(os.waitpid(child(folder, 0, False), 0)[1])
    print(os.waitstatus_to_exitcode(status), named, again, flush=True)
"""


@pytest.mark.parametrize("tries", [pytest.param(20, marks=pytest.mark.slow), 3])
def test_r12_of_two_processes_one_runs_and_a_killed_one_leaves_no_lock(tmp_path, tries):
    """Two processes begin at one moment: one is refused and names the other's number; that one is killed, and the next start succeeds."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    line = [sys.executable, "-c", TWINS, str(Path(__file__).parent), str(tmp_path), str(tries)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300 + 10 * tries)
    assert done.returncode == 0, done.stderr[-2000:]
    passed = done.stdout.splitlines().count("7 True 0")
    count("R12 two processes in one folder", passed, tries) if tries == 20 else None
    assert passed == tries, done.stdout


@pytest.mark.parametrize("tries", [pytest.param(20, marks=pytest.mark.slow), 3])
def test_r12_of_two_threads_one_runs(tmp_path, tries):
    from slm.artifacts import run_lock
    passed = 0
    for i in range(tries):
        ready, won, refused = threading.Barrier(2), [], []

        def contend(folder, ready=ready, won=won, refused=refused):
            ready.wait()
            try:
                with run_lock(folder):
                    won.append(1)
                    ready.wait(120)
            except ArtifactError as error:
                refused.append(str(error))
                ready.wait(120)
        pair = [threading.Thread(target=contend, args=(tmp_path / str(i),)) for _ in range(2)]
        [t.start() for t in pair], [t.join() for t in pair]
        passed += len(won) == 1 and len(refused) == 1 and str(os.getpid()) in refused[0]
    count("R12 two writers at once", passed, tries) if tries == 20 else None
    assert passed == tries


# ------------------------------------------------------------------------------------------------------- R5, R6: the disk
@pytest.mark.slow
@ROOT_ONLY
def test_r5_power_loss(tmp_path):
    """ext4 on a loop device, shut down without flushing (FS_IOC_SHUTDOWN) right after a save was acknowledged."""
    import fcntl
    import struct
    image, where, passed = tmp_path / "disk", tmp_path / "mnt", 0
    where.mkdir()
    subprocess.run(["truncate", "-s", "64M", image], check=True)
    if not shutil.which("mkfs.ext4") or subprocess.run(["mkfs.ext4", "-q", "-F", image], capture_output=True).returncode:
        pytest.skip("no mkfs.ext4")
    for i in range(20):
        mounted("-o", "loop,commit=1", image, where)
        try:
            save_checkpoint(where / "run", 2 * i + 1, {"w": torch.full((20000,), float(i))}, {}, {})
            handle = os.open(where, os.O_RDONLY)
            fcntl.ioctl(handle, 0x8004587D, struct.pack("I", 2))
            os.close(handle)
        finally:
            subprocess.run(["umount", where], check=True)
        mounted("-o", "loop", image, where)
        found = latest_checkpoint(where / "run")
        passed += found is not None and found.name == f"step-{2 * i + 1:08d}"
        subprocess.run(["umount", where], check=True)
    count("R5 power cut after a save", passed, 20)


def test_r6_files_are_flushed_before_the_name_appears(tmp_path, monkeypatch):
    calls, fsync, rename, replace = [], os.fsync, os.rename, os.replace
    name_of = lambda handle: Path(os.readlink(f"/proc/self/fd/{handle}")).name
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append(("flush", name_of(handle))), fsync(handle)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("name", Path(b).name)), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(("name", Path(b).name)), replace(a, b)))
    save_checkpoint(tmp_path / "run", 7, {"w": torch.ones(5)}, {"w:m": torch.ones(5)}, {})
    appears = calls.index(("name", "step-00000007"))
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        assert any(kind == "flush" and seen.endswith(name) for kind, seen in calls[:appears]), name
    assert ("flush", "run") in calls[appears:] and calls.index(("name", "latest")) > appears


# ------------------------------------------------------------------------------------------------------- R7, R8: damage
def damages(data, n):
    draws = rng("damage", n)
    for _ in range(n):
        at, kind = int(draws.integers(len(data))), draws.integers(4)
        if kind == 0:
            yield "flip", data[:at] + bytes([data[at] ^ 1 << int(draws.integers(8))]) + data[at + 1:]
        elif kind == 1 and any(data[at:at + 4096]):
            yield "zeros", data[:at] + bytes(len(data[at:at + 4096])) + data[at + 4096:]
        elif kind == 2 and any(data[at:]):
            yield "zero tail", data[:at] + bytes(len(data) - at)
        else:
            yield "truncated", data[:at]


def test_r7_damage_is_never_silent(saved, capsys):
    passed = tried = 0
    for file in sorted(p for p in saved.iterdir()):
        data = file.read_bytes()
        for _, damaged in damages(data, 50):
            file.write_bytes(damaged)
            found, said = latest_checkpoint(saved.parent), capsys.readouterr().out
            passed += found == saved.with_name("step-00000001") and "step-00000002" in said and file.name in said
            tried += 1
        file.write_bytes(data)
    assert latest_checkpoint(saved.parent) == saved
    count("R7 damaged files of the newest checkpoint", passed, tried)


def test_r8_missing_and_stray_files(saved, capsys):
    run = saved.parent
    for file in sorted(saved.iterdir()):
        data = file.read_bytes()
        file.unlink()
        assert latest_checkpoint(run).name == "step-00000001" and file.name in capsys.readouterr().out
        file.write_bytes(data)
    (run / "step-00000009").mkdir()
    (run / "step-abc").mkdir()
    (run / "step-00000010").write_text("a file")
    (run / "stray").write_text("x")
    assert latest_checkpoint(run) == saved and "step-00000009" in capsys.readouterr().out
    assert load_checkpoint(saved).model["w"][0] == 2


# --------------------------------------------------------------------------------------------- R9, R10, R11, R14: the system
@pytest.mark.slow
@ROOT_ONLY
def test_r9_a_full_disk(tmp_path, capsys):
    """A small file system fills up in the middle of a run; training goes on, and saves again when there is room."""
    where = tmp_path / "small"
    where.mkdir()
    mounted("-t", "tmpfs", "-o", "size=2m", "tmpfs", where)
    try:
        def crowd(step):
            if step == 5:
                (where / "hog").write_bytes(bytes(1 << 21 >> 1))
            if step == 10:
                (where / "hog").unlink()
        try:
            go(where / "run", on_step=crowd, quiet=False)
        finally:
            said = capsys.readouterr().out
        steps = [step for step, _ in step_folders(where / "run")]
        assert "step 8 is not saved, training goes on" in said and "disk full" in said and steps == [12, 14]
        assert not list((where / "run").glob(".tmp*")) and load_model(where / "run")[1].state["step"] == 14
        count("R9 a disk that fills up and is cleared", 1, 1)
    finally:
        subprocess.run(["umount", where], check=True)


def test_r10_a_log_that_cannot_be_written_does_not_stop_a_run(tmp_path, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    append_log(tmp_path, {"step": 1})
    assert "training goes on without it" in capsys.readouterr().out


@ROOT_ONLY
def test_r10_a_checkpoint_that_does_not_fit_is_tried_again(tmp_path, capsys):
    """Without mount rights: for a while a limit on the size of files (RLIMIT_FSIZE) stops the system in the middle of one."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def cramp(step):
        if step in (5, 10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]) if step == 5 else before)
    try:
        go(tmp_path / "run", on_step=cramp, quiet=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "step 8 is not saved, training goes on" in capsys.readouterr().out
    assert [step for step, _ in step_folders(tmp_path / "run")] == [12, 14] and not list((tmp_path / "run").glob(".tmp*"))
    go(tmp_path / "whole")
    assert same(everything(tmp_path / "run"), everything(tmp_path / "whole"))


def test_r11_a_read_only_folder_is_refused_before_the_first_step(tmp_path):
    (tmp_path / "ro").mkdir()
    mounted("--bind", tmp_path / "ro", tmp_path / "ro")
    try:
        mounted("-o", "remount,ro,bind", tmp_path / "ro")
        with pytest.raises(ArtifactError, match="read-only"):
            go(tmp_path / "ro" / "run", on_step=lambda step: pytest.fail("a step was made"))
    finally:
        subprocess.run(["umount", tmp_path / "ro"], check=True)


def test_r14_clocks_do_not_matter(saved):
    for year, name in ((4_000_000_000, "step-00000001"), (946_684_800, "step-00000002")):
        for path in (saved.with_name(name), *saved.with_name(name).iterdir()):
            os.utime(path, (year, year))
    assert latest_checkpoint(saved.parent) == saved


def test_r14_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """The clock on the wall goes back by a day in the middle of a run: no negative speed, saving by seconds goes on, the same bits."""
    import time
    shift, clock = [0.0], time.time
    monkeypatch.setattr(time, "time", lambda: clock() + shift[0])
    config = override(CONFIG, ["save_every=null", "save_seconds=0.0"])
    go(tmp_path / "run", config, on_step=stop_at(5, lambda: shift.__setitem__(0, -86400.0)))
    records = read_log(tmp_path / "run")
    assert len(records) == CONFIG.steps and all(0 < r["tokens_per_second"] < 1e9 for r in records)
    assert [step for step, _ in step_folders(tmp_path / "run")] == [13, 14] and load_model(tmp_path / "run")[1].state["seconds"] < 3600
    go(tmp_path / "whole", config)
    assert same(everything(tmp_path / "run"), everything(tmp_path / "whole"))


# ------------------------------------------------------------------------------------------------------- R17: the data
def test_r17_damaged_packs_are_refused_by_name(tmp_path):
    texts = [{"text": f"The fox saw {n} birds and went home."} for n in range(60)]
    tok = BPETokenizer.train([t["text"] for t in texts], vocab_size=270)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    write_corpus(open_source(str(tmp_path / "texts.jsonl")), tmp_path / "corpus", val_fraction=0.2)
    write_pack(tmp_path / "corpus", tok, tmp_path / "pack", progress=False)
    shard = tmp_path / "pack" / "train-00000.bin"
    data = shard.read_bytes()
    for damaged in (data[:-1], data[:-2], data + b"\0\0", b"\xff\xff" + data[2:], data[:8] + bytes([data[8] ^ 1]) + data[9:]):
        shard.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="train-00000.bin is damaged"):
            Pack(tmp_path / "pack")
    shard.unlink()
    with pytest.raises(ArtifactError, match="train-00000.bin is missing"):
        Pack(tmp_path / "pack")
    shard.write_bytes(data)
    (tmp_path / "pack" / "train-00001.bin").write_bytes(data)                # a stranger beside it is no part of the pack
    assert len(Pack(tmp_path / "pack").tokens("train")) == 1
    assert Pack(tmp_path / "pack").batch("train", 0, 0, 2, 16)["ids"].shape == (2, 16)


def test_r17_ids_outside_the_vocabulary_are_a_sentence_and_not_a_crash(tmp_path):
    """A pack whose seal fits, but whose ids no model of its vocabulary has: the first step refuses them with their numbers."""
    too_large = lambda step: batch_at(step) | {"ids": batch_at(step)["ids"] + 9 * (step == 2)}
    with pytest.raises(ModelError, match="ids run from .* but the model's vocabulary has 64"):
        go(tmp_path / "run", batch_at=too_large)


# ------------------------------------------------------------------------------------------- R15, R18: memory, and another run
HUNGRY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import test_pretrain as t
import slm.runs
model, rows = t.TransformerLM(t.override(t.TINY, ["context_length=64", "n_layer=1", "d_ff=4096"])), 64
batch_at = lambda step: {"ids": t.torch.ones(rows, 64, dtype=t.torch.int64), "labels": t.torch.ones(rows, 64, dtype=t.torch.int64)}
config = t.override(t.CONFIG, ["steps=2", "micro_batch_size=null", "warmup_steps=0", "context_length=64"])
slm.runs.first_micro_batch = lambda model, config, *more: config.micro_batch_size     # the look ahead is not what is tested here
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[3]) * 2**20,) * 2)
t.train(model, batch_at, t.lm_loss, config, sys.argv[2])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_r15_a_real_limit_on_memory(tmp_path):
    """RLIMIT_AS: where there is room for less, the parts are halved until they fit; the run ends, and says what it did."""
    done = subprocess.run([sys.executable, "-c", HUNGRY, str(Path(__file__).parent), str(tmp_path / "run"), "150"],
                          capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    assert "64 rows at once do not fit into memory: 32 from now on" in done.stdout
    assert load_model(tmp_path / "run")[1].state["step"] == 2 and load_model(tmp_path / "run")[1].state["micro"] <= 32


@pytest.mark.parametrize("name, change", [("config.seed", "seed=5"), ("config.lr", "lr=0.001"),
                                          ("config.context_length", "context_length=8")])
def test_r18_another_run_only_with_a_word(tmp_path, name, change):
    """Refused by the name of the field; with that name in `allow` the run goes on with the new value."""
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", on_step=stop_at(5, boom))
    other = override(CONFIG, [change])
    with pytest.raises(TrainingError, match=name):
        go(tmp_path / "run", other)
    with pytest.raises(TrainingError, match=name):
        go(tmp_path / "run", override(other, ["allow=[data]"]))
    go(tmp_path / "run", override(other, [f"allow=[{name}]"]))
    assert load_model(tmp_path / "run")[1].state["step"] == 14


def test_r18_other_data_only_with_a_word(tmp_path):
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", on_step=stop_at(5, boom))
    other = lambda step: batch_at(step, seed=3)
    with pytest.raises(TrainingError, match="other data"):
        go(tmp_path / "run", batch_at=other)
    go(tmp_path / "run", override(CONFIG, ["allow=[data]"]), batch_at=other)
    assert load_model(tmp_path / "run")[1].state["step"] == 14


# ------------------------------------------------------------------------------------------------- R19: nonsense in a config
ANYTHING = st.one_of(st.integers(-10**20, 10**20), st.floats(), st.text(max_size=5), st.booleans(), st.none(),
                     st.lists(st.text(max_size=3)))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from([*TrainConfig.__dataclass_fields__, "learning_rate"]), ANYTHING, max_size=4))
def test_r19_nonsense_is_one_sentence(data):
    try:
        assert isinstance(from_dict(TrainConfig, data), TrainConfig)
    except ConfigError as error:
        assert str(error) and "\n" not in str(error)


# ------------------------------------------------------------------------------------------------- R20, R21: rotation, readers
def test_r20_rotation_never_takes_the_last_good_one(tmp_path, monkeypatch, capsys):
    two_checkpoints(tmp_path / "run")
    save_checkpoint(tmp_path / "run", 99999, {"w": torch.ones(3)}, {}, {})                   # of an older, longer run
    save_checkpoint(tmp_path / "run", 3, {"w": torch.ones(3)}, {}, {}, keep=1)
    assert [step for step, _ in step_folders(tmp_path / "run")] == [3, 99999]
    monkeypatch.setattr(os, "rename", lambda *names: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    assert rotate(tmp_path / "run", 99999, keep=1) == [] and "could not delete step-00000003" in capsys.readouterr().out
    with pytest.raises(ArtifactError):
        (tmp_path / "run" / "step-00099999" / "model.safetensors").write_bytes(b"")
        rotate(tmp_path / "run", 99999, keep=1)


@pytest.mark.parametrize("saves", [pytest.param(200, marks=pytest.mark.slow), 25])
def test_r21_a_reader_never_sees_half_a_checkpoint(tmp_path, saves):
    save_checkpoint(tmp_path, 1, {"w": torch.ones(2000)}, {}, {})
    stop, seen, failed = threading.Event(), [], []

    def read():
        while not stop.is_set():
            found = latest_checkpoint(tmp_path)
            if found is None:                                               # all that were listed have been rotated away: look again
                continue
            try:
                saved = load_checkpoint(found)
                seen.append(saved.state["step"])
                if not (saved.model["w"] == saved.state["step"]).all():
                    failed.append(saved.state["step"])
            except ArtifactError as error:
                failed.extend([str(error)] if found.exists() else [])       # what was the newest may have been rotated away meanwhile
    reader = threading.Thread(target=read)
    reader.start()
    step, end = 1, time.monotonic() + 120
    while step < saves + 1 or (len(set(seen)) < 3 and time.monotonic() < end):         # until the reader has seen some of them
        step += 1
        save_checkpoint(tmp_path, step, {"w": torch.full((2000,), float(step))}, {}, {})
    stop.set()
    reader.join()
    assert seen == sorted(seen) and len(set(seen)) >= 3 and not failed, failed[:3]
    count("R21 saves under a reader's eyes", saves, saves) if saves == 200 else None


# ------------------------------------------------------------------------------------------- R23, R25: strangers, and the past
class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def reseal(folder, change):
    """A manifest that was changed and given a new, fitting id: what an attacker would write."""
    from slm.folders import manifest_id
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    manifest["id"] = manifest_id(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_r23_files_that_would_run_code_or_lead_outside(saved, tmp_path, monkeypatch):
    import hashlib
    import io
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(Bomb(), buffer)
    for payload in (buffer.getvalue(), (10 * 2**30).to_bytes(8, "little") + b"{}"):
        (saved / "model.safetensors").write_bytes(payload)
        known = {"sha256": hashlib.sha256(payload).hexdigest(), "size": len(payload)}
        reseal(saved, lambda m, known=known: m["files"].update({"model.safetensors": known}))
        with pytest.raises(ArtifactError):
            load_checkpoint(saved)
    reseal(saved, lambda m: m["files"].update({"../../secret": m["files"]["state.json"]}))
    with pytest.raises(ArtifactError, match="outside its folder"):
        load_checkpoint(saved)
    assert not (tmp_path / "exploded").exists()


def test_r23_an_array_of_objects_is_not_unpacked(tmp_path, monkeypatch):
    import numpy as np

    from slm.packing import read_part
    monkeypatch.chdir(tmp_path)
    np.save("part.npy", np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match="[Oo]bject arrays cannot be loaded"):
        read_part("part.npy")
    assert not (tmp_path / "exploded").exists()


def test_r18_another_tokenizer_is_refused(tmp_path):
    """Of the same size: its ids would be other words."""
    from slm.config import SLMError
    from slm.make import pack_and_tokenizer
    texts = [f"The fox saw {n} birds and went home." for n in range(60)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    own, other = (BPETokenizer.train(lines, vocab_size=270) for lines in (texts, [text[::-1] for text in texts]))
    write_corpus(open_source(str(tmp_path / "texts.jsonl")), tmp_path / "corpus", val_fraction=0.2)
    write_pack(tmp_path / "corpus", own, tmp_path / "pack", progress=False)
    for name, tok in (("own", own), ("other", other)):
        tok.save(tmp_path / f"{name}.json")
    assert pack_and_tokenizer(tmp_path / "pack", tmp_path / "own.json")[1].hash == own.hash and own.vocab_size == other.vocab_size
    with pytest.raises(SLMError, match="was not written with the tokenizer"):
        pack_and_tokenizer(tmp_path / "pack", tmp_path / "other.json")


OLD = Path(__file__).parent / "old_run"


def test_r25_a_run_begun_by_an_earlier_version_goes_on(tmp_path):
    """`old_run` was written by the first version of the loop: it loads, gives the recorded logits, and is finished by this version."""
    expected = json.loads((OLD / "expected.json").read_text())
    shutil.copytree(OLD, tmp_path / "run")
    model, saved = load_model(tmp_path / "run")
    assert saved.state["step"] == 4 and model(torch.arange(6)[None]).argmax(-1)[0].tolist() == expected["greedy"]
    from slm.model import TransformerLM
    from slm.pretrain import train
    from slm.steps import lm_loss
    config = from_dict(TrainConfig, {k: v for k, v in saved.state["config"].items()})
    done = train(TransformerLM(ModelConfig(**expected["shape"])), old_batch_at, lm_loss, config, tmp_path / "run", quiet=True)
    assert done["resumed_from"] == 4 and done["step"] == 8
    assert [r["loss"] for r in read_log(tmp_path / "run")] == pytest.approx(expected["losses"], rel=1e-3)


def old_batch_at(step):
    rows = torch.from_numpy(rng("old", step).integers(16, size=(4, 9)))
    return {"ids": rows[:, :-1], "labels": rows[:, 1:].clone()}


def test_a_checkpoint_of_something_else_is_refused(saved):
    with pytest.raises(TrainingError, match="was not written by a training run"):
        go(saved.parent)


def test_a_run_in_a_folder_with_damage_says_which_and_goes_on(tmp_path, capsys):
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", on_step=stop_at(9, boom))
    (tmp_path / "run" / "step-00000008" / "optimizer.safetensors").unlink()
    go(tmp_path / "run", quiet=False)
    said = capsys.readouterr().out
    assert "skipping step-00000008: optimizer.safetensors is missing" in said and "goes on after step 4 of 14" in said
    go(tmp_path / "whole")
    assert same(everything(tmp_path / "run"), everything(tmp_path / "whole"))
    assert override(CONFIG, []) == CONFIG and fresh() is not None and batch_at(0)["ids"].shape == (6, 16)
