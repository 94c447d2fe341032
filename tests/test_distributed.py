"""Two processes with gloo on the CPU: the loss curve of one, with DDP and FSDP2, and checkpoints that either side can take up.

One launch of `torchrun` runs all of `WORKER`, since starting two processes costs more than what they do.
`SLM_SLOW=1` adds the command line, a killed rank, and the curves that notebook 51b draws.
"""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from slm import optim  # noqa: F401 (the worker reads it)
from slm.config import ModelConfig, override, rng, seed_everything
from slm.model import TransformerLM
from slm.optim import AdamW, TrainConfig  # noqa: F401 (the worker reads it)
from slm.pretrain import load_model, read_log, train
from slm.steps import lm_loss

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ModelConfig(vocab_size=64, context_length=16, n_layer=2, n_head=2, d_model=32, d_ff=64)
CONFIG = TrainConfig(steps=12, batch_size=8, micro_batch_size=2, context_length=16, warmup_steps=3, precision="float32",
                     save_every=4, save_seconds=None, eval_every=6)
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "USE_LIBUV": "0"}
WORKER = """
import contextlib, functools, sys
from pathlib import Path
import test_distributed as t
out = Path(sys.argv[1])
def boom(step):
    if step == 6: raise RuntimeError("boom")
for kind in ("ddp", "fsdp"):
    t.go(out / kind, [f"parallel={kind}"])                               # twelve steps by two processes
    t.go(out / f"one-{kind}", [f"parallel={kind}"])                      # begun by one process, goes on with two
    with contextlib.suppress(RuntimeError):
        t.go(out / f"{kind}-one", [f"parallel={kind}"], on_step=boom)    # begun by two, and cut
plain, kernel, calls = t.AdamW.__init__, t.optim.fused_adamw, []
t.optim.fused_adamw = lambda *args: calls.append(1) or kernel(*args)
for fused in (False, True):                                              # as on a CUDA device, where the kernel is the default
    t.AdamW.__init__ = functools.partialmethod(plain, fused=fused)
    t.go(out / f"fused-{fused}", ["parallel=fsdp", "optimizer=adamw", "steps=6"])
    (out / f"calls-{fused}").write_text(str(len(calls)))
"""


def batch_at(step):
    """Rows with ragged labels: the two halves of a batch have different numbers of targets."""
    rows = torch.from_numpy(rng("rows", step).integers(64, size=(8, 17)))
    labels = rows[:, 1:].clone()
    for i in range(8):
        labels[i, : i] = -100
    return {"ids": rows[:, :-1], "labels": labels}


def go(run_dir, settings=(), **options):
    seed_everything(1)
    model = TransformerLM(SHAPE)
    train(model, batch_at, lm_loss, override(CONFIG, settings), run_dir, quiet=True,
          evaluate=lambda m: {"val_loss": (lm_loss(m, batch_at(99))[0] / 100).item()}, **options)


def torchrun(*words, timeout=900):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, words)]
    return subprocess.run(line, env=ENV, capture_output=True, text=True, timeout=timeout)


def losses(run_dir, name="loss"):
    return [r[name] for r in read_log(run_dir) if name in r]


def boom(step):
    if step == 6:
        raise RuntimeError("boom")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    if sys.platform == "win32":
        pytest.skip("gloo and torchrun are tested on Linux and macOS")
    out = tmp_path_factory.mktemp("two")
    go(out / "one")
    for kind in ("ddp", "fsdp"):
        with pytest.raises(RuntimeError, match="boom"):
            go(out / f"one-{kind}", on_step=boom)
    (out / "worker.py").write_text(WORKER)
    done = torchrun(out / "worker.py", out)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in ("ddp", "fsdp"):
        go(out / f"{kind}-one")
    return out


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_give_the_curve_of_one(runs, kind):
    assert losses(runs / kind) == pytest.approx(losses(runs / "one"), rel=1e-4)
    assert losses(runs / kind, "val_loss") == pytest.approx(losses(runs / "one", "val_loss"), rel=1e-3)
    assert [r["targets"] for r in read_log(runs / kind)] == [sum(16 - i for i in range(8))] * 12
    first = json.loads((runs / kind / "log.jsonl").read_text().splitlines()[0])
    assert first["processes"] == 2 and len((runs / kind / "log.csv").read_text().splitlines()) == 13


@pytest.mark.parametrize("name", ["ddp", "fsdp", "one-ddp", "one-fsdp", "ddp-one", "fsdp-one"])
def test_checkpoints_are_interchangeable(runs, name):
    """Whole tensors with the same names and nearly the same values, whoever wrote the first half of the run and whoever the second."""
    (_, one), (_, other) = load_model(runs / "one"), load_model(runs / name)
    assert one.model.keys() == other.model.keys() and one.optimizer.keys() == other.optimizer.keys() and other.state["step"] == 12
    for key, t in one.model.items():
        torch.testing.assert_close(other.model[key], t, rtol=1e-2, atol=2e-3)
    assert len(losses(runs / name)) == 12


def test_the_fused_kernel_is_the_same_rule_on_shards(runs):
    """PyTorch's AdamW kernel on the shards of FSDP2 gives the curve of the readable update."""
    readable, fused = (losses(runs / f"fused-{way}") for way in (False, True))
    assert fused == pytest.approx(readable, rel=1e-6) and fused[-1] != fused[0]
    assert (runs / "calls-False").read_text() == "0" and int((runs / "calls-True").read_text()) >= len(fused)


def test_random_numbers_are_saved_for_every_process(runs):
    state = load_model(runs / "ddp")[1].state
    assert len(state["ranks"]) == 1 and state["ranks"][0]["torch"] != state["rng"]["torch"]
    assert load_model(runs / "one")[1].state["ranks"] == []


@pytest.mark.slow
def test_the_command_line_and_a_killed_rank(runs, tmp_path):
    """`torchrun -m slm.cli pretrain`: the curve of one process; one rank killed ends the other, and the same command goes on."""
    slm = [sys.executable, "-m", "slm.cli"]
    words = "data prepare storyworld --megabytes 0.1 --vocab-size 320 --out".split()
    subprocess.run([*slm, *words, tmp_path / "d"], check=True,
                   env=ENV, capture_output=True)
    shape = "--preset tiny --set model.d_model=32 --set model.d_ff=64 --set model.n_layer=1 --set train.precision=float32".split()
    words = ["pretrain", tmp_path / "d" / "pack", *shape, "--steps", "12", "--batch-size", "4", "--context-length", "64", "--device", "cpu"]
    subprocess.run([*slm, *map(str, words), "--out", tmp_path / "one"], check=True, env=ENV, capture_output=True)
    for extra in ([], ["--fsdp"]):
        done = torchrun("-m", "slm.cli", *words, "--out", tmp_path / f"two{len(extra)}", *extra)
        assert done.returncode == 0, done.stderr[-2000:]
        assert losses(tmp_path / f"two{len(extra)}") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    killer = tmp_path / "killer.py"
    killer.write_text("import os, signal, sys\nfrom pathlib import Path\nimport test_distributed as t\nout, fatal = Path(sys.argv[1]), "
                      "sys.argv[2] == 'kill' and os.environ['RANK'] == '1'\n"
                      "t.go(out, on_step=lambda step: os.kill(os.getpid(), signal.SIGKILL) if fatal and step == 6 else None)\n")
    begin = time.perf_counter()
    lost = torchrun(killer, tmp_path / "cut", "kill")
    assert lost.returncode != 0 and time.perf_counter() - begin < 300
    assert "process 0 of 2 has lost another one: start the same command again" in lost.stderr, lost.stderr[-2000:]
    assert torchrun(killer, tmp_path / "cut", "no").returncode == 0
    torchrun(killer, tmp_path / "whole", "no")
    a, b = load_model(tmp_path / "cut")[1], load_model(tmp_path / "whole")[1]
    assert all(torch.equal(a.model[k], b.model[k]) for k in a.model)
    names = {"one": "one process", "ddp": "two, ddp", "fsdp": "two, fsdp"}
    result = {"command": "SLM_SLOW=1 pytest tests/test_distributed.py"}
    result["loss"] = {label: losses(runs / name) for name, label in names.items()}
    (ROOT / "nbs" / "results" / "distributed.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(tmp_path / "d")
