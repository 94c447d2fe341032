"""Training that is killed, stopped, starved and fed wrong data: what must hold, whatever happens.

The kills are real: a child process trains and is ended by SIGKILL at a given step or at a random moment, in the middle of
whatever it was doing. One parent process imports everything once and forks the children, so that a kill costs no import.
A child that is to be met by a signal does not go past the step `hold` before it has come, however fast it is.
"""
from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from slm.artifacts import ArtifactError, load_checkpoint
from slm.config import ModelConfig, override, rng, seed_everything
from slm.model import TransformerLM
from slm.optim import AdamW, TrainConfig, build_optimizer, load_optimizer_tensors, optimizer_tensors
from slm.pretrain import Run, begin, bits_per_byte, load_model, read_log, resume, save, train
from slm.steps import Interrupted, TrainingError, accumulate, lm_loss, set_rng_state, training_step

TINY = ModelConfig(vocab_size=64, context_length=16, n_layer=2, n_head=2, d_model=32, d_ff=64, dropout=0.1)
CONFIG = TrainConfig(steps=14, batch_size=6, micro_batch_size=4, context_length=16, warmup_steps=3, schedule="cosine", save_every=4,
                     save_seconds=None, precision="float32")
ROWS, EPOCH = 6, 5                                                          # 5 steps are an epoch: 14 steps cross two borders


def batch_at(step, seed=0):
    """Rows of a fixed table in an order that is shuffled anew in every epoch; ragged labels."""
    table = rng("table").integers(64, size=(ROWS * EPOCH, 17))
    order = rng("order", seed, step // EPOCH).permutation(len(table))
    rows = torch.from_numpy(table[order[step % EPOCH * ROWS:][:ROWS]])
    labels = rows[:, 1:].clone()
    for i in range(ROWS):
        labels[i, : 2 * i] = -100
    return {"ids": rows[:, :-1], "labels": labels}


def fresh(seed=1):
    seed_everything(seed)
    return TransformerLM(TINY)


def go(run_dir, config=CONFIG, **options):
    """Train (or go on) in a folder; the model."""
    model = fresh()
    train(model, options.pop("batch_at", batch_at), options.pop("loss_fn", lm_loss), config, run_dir, **{"quiet": True} | options)
    return model


def everything(run_dir):
    """All that a finished run leaves: weights, optimizer, random state, and the log without its clock."""
    _, saved = load_model(run_dir)
    log = [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in read_log(run_dir)]
    return saved.model, saved.optimizer, saved.state["rng"], log


def same(a, b):
    (model_a, opt_a, rng_a, log_a), (model_b, opt_b, rng_b, log_b) = a, b
    tensors = all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in ((model_a, model_b), (opt_a, opt_b)))
    return tensors and rng_a == rng_b and log_a == log_b


def stop_at(when, how):
    return lambda step: how() if step == when else None


def boom():
    raise RuntimeError("boom")


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    go(folder / "run")
    return everything(folder / "run")


# --------------------------------------------------------------------------------------------------------------- kill -9
FORKER = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_pretrain as t

def mark(job, name): return Path(job["dir"] + "." + name)

def child(job):
    for name in ("held", "sent"): mark(job, name).unlink(missing_ok=True)
    pid = os.fork()
    if pid:
        return pid
    def on_step(step):
        if step == job.get("at"): os.kill(os.getpid(), signal.SIGKILL)
        if step >= job.get("hold", step + 1):
            mark(job, "held").touch()
            while not mark(job, "sent").exists(): time.sleep(0.005)
    try:
        t.go(job["dir"], t.override(t.CONFIG, job["set"]), on_step=on_step)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(7)

for line in sys.stdin:
    job = json.loads(line)
    pid, start = child(job), time.perf_counter()
    if "after" in job:
        time.sleep(job["after"])
        try: os.kill(pid, job.get("signal", signal.SIGKILL))
        except ProcessLookupError: pass
    elif "signal" in job:
        while not mark(job, "held").exists(): time.sleep(0.005)
        os.kill(pid, job["signal"])
        mark(job, "sent").touch()
    _, status = os.waitpid(pid, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - start]), flush=True)
"""


@pytest.fixture(scope="module")
def forker():
    """A function that runs one training process to its end or its death; returns its exit code and its seconds."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    code = FORKER.format(tests=str(Path(__file__).parent))
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(folder, *settings, **job):
        process.stdin.write(json.dumps({"dir": str(folder), "set": list(settings), **job}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield run
    process.stdin.close()
    process.wait(120)


@pytest.mark.parametrize("settings", [[], ["precision=bfloat16", "optimizer=adamw", "schedule=wsd"]], ids=["muon-fp32", "adamw-bf16"])
def test_killed_at_given_steps_ends_with_the_same_bits(forker, tmp_path, settings):
    assert forker(tmp_path / "whole", *settings)[0] == 0
    for when in (2, 4, 7, 9, 13):                              # before the first save, on a save, beside epoch borders (5, 10)
        assert forker(tmp_path / "cut", *settings, at=when)[0] == -signal.SIGKILL
    assert forker(tmp_path / "cut", *settings)[0] == 0
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "cut"))
    assert [r["step"] for r in read_log(tmp_path / "cut")] == list(range(1, 15))


def test_killed_at_random_moments_always_goes_on(forker, tmp_path):
    code, seconds = forker(tmp_path / "whole", "save_every=1", "steps=40")
    assert code == 0
    last = 0
    for moment in rng("moments").uniform(0.1, 0.4, size=6):
        code, _ = forker(tmp_path / "cut", "save_every=1", "steps=40", after=float(moment * seconds), hold=30)
        steps = [int(p.name[5:]) for p in (tmp_path / "cut").glob("step-*")]
        assert code == -signal.SIGKILL and max(steps, default=0) >= last             # never back behind what was saved
        last = max(steps, default=0)
    assert forker(tmp_path / "cut", "save_every=1", "steps=40")[0] == 0
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "cut"))


# --------------------------------------------------------------------------------------------------- stopped, and the controls
@pytest.mark.parametrize("moments", [(6,), (3, 11), (5, 10)])
def test_interrupted_equals_uninterrupted(tmp_path, reference, moments):
    for when in moments:
        with pytest.raises(RuntimeError, match="boom"):
            go(tmp_path / "run", on_step=stop_at(when, boom))
    go(tmp_path / "run")
    assert same(everything(tmp_path / "run"), reference)


def test_interrupted_inside_an_accumulation(tmp_path, reference):
    """The second part of step 7 fails: what the first part left in the gradients is not taken up again."""
    parts = []

    def torn(model, part):
        parts.append(part)
        if len(parts) == 2 * 7:
            boom()
        return lm_loss(model, part)
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", loss_fn=torn)
    assert len(read_log(tmp_path / "run")) == 6 and len(parts[-1]["ids"]) == 2
    go(tmp_path / "run")
    assert same(everything(tmp_path / "run"), reference)


def forget_step(run, saved, real=resume):
    real(run, saved).step = 0
    return run


@pytest.mark.parametrize("name, broken", [
    ("set_rng_state", lambda state: torch.manual_seed(5)), ("load_optimizer_tensors", lambda opt, tensors: None), ("resume", forget_step),
], ids=["random numbers", "optimizer", "step"])
def test_negative_control_what_is_not_restored_is_missed(tmp_path, reference, monkeypatch, name, broken):
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", on_step=stop_at(6, boom))
    monkeypatch.setattr(f"slm.runs.{name}", broken)
    go(tmp_path / "run")
    weights = everything(tmp_path / "run")[0]
    assert not all(torch.equal(weights[k], reference[0][k]) for k in weights)


def test_looking_does_not_alter_the_run(tmp_path, reference):
    looked = override(CONFIG, ["eval_every=3", "sample_every=4", "log_every=2", "save_every=5"])
    go(tmp_path / "run", looked, evaluate=lambda model: {"noise": torch.rand(1).item()}, sample=lambda model: str(np.random.rand()))
    assert all(torch.equal(a, b) for a, b in zip(everything(tmp_path / "run")[0].values(), reference[0].values(), strict=True))
    assert [r["step"] for r in read_log(tmp_path / "run") if "noise" in r] == [3, 6, 9, 12, 14]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_current_step(tmp_path, reference, number, capsys):
    leaving = pytest.raises(Interrupted, match="step 6 of 14") if number == signal.SIGINT else pytest.raises(SystemExit)
    before = signal.getsignal(number)
    with leaving as caught:
        go(tmp_path / "run", on_step=stop_at(6, lambda: os.kill(os.getpid(), number)), quiet=False)
    assert getattr(caught.value, "code", 130) == 128 + number and "run the same again" in capsys.readouterr().out
    assert signal.getsignal(number) is before and load_model(tmp_path / "run")[1].state["step"] == 6
    go(tmp_path / "run")
    assert same(everything(tmp_path / "run"), reference)


def test_the_second_signal_leaves_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        go(tmp_path / "run", on_step=stop_at(6, twice))
    assert not isinstance(caught.value, Interrupted) and load_model(tmp_path / "run")[1].state["step"] == 4      # the save before


def test_sigterm_from_outside_saves_and_the_next_run_goes_on(forker, tmp_path, reference):
    assert forker(tmp_path / "whole", "steps=60")[0] == 0
    assert forker(tmp_path / "run", "steps=60", hold=30, signal=signal.SIGTERM)[0] == 7     # SystemExit(143), seen by the forker
    assert load_model(tmp_path / "run")[1].state["step"] == 30
    assert forker(tmp_path / "run", "steps=60")[0] == 0
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "run"))


# ------------------------------------------------------------------------------------------------------------------ one step
def gradients(config, model):
    model.zero_grad()
    record = accumulate(model, batch_at(0), lm_loss, config)
    return record, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("size", [1, 2, 4, 5, 6, 100])
def test_accumulation_with_ragged_labels_gives_the_same_gradient(size):
    model = fresh().eval()                                                  # no dropout: its masks would differ
    (whole, expected), (parts, found) = (gradients(override(CONFIG, [f"micro_batch_size={s}"]), model) for s in ("none", size))
    assert whole["targets"] == parts["targets"] == sum(16 - 2 * i for i in range(ROWS))
    assert math.isclose(whole["loss"], parts["loss"], rel_tol=1e-5)
    for a, b in zip(expected, found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def wrong_from(first, last=10**9):
    """A loss that is not a number on the batches of steps first … last (counted from 1)."""
    poison = [batch_at(step - 1)["ids"] for step in range(first, min(last, CONFIG.steps) + 1)]

    def loss_fn(model, batch):
        loss, count, metrics = lm_loss(model, batch)
        return (loss * float("nan") if any(torch.equal(batch["ids"], ids) for ids in poison) else loss), count, metrics
    return loss_fn


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_step_moves_nothing(poison):
    model = fresh()
    opt = build_optimizer(model, CONFIG)
    training_step(model, opt, batch_at(0), lm_loss, CONFIG, 0)
    weights, state = {k: v.clone() for k, v in model.state_dict().items()}, optimizer_tensors(opt)
    record = training_step(model, opt, batch_at(1), lambda m, b: (lm_loss(m, b)[0] * poison, 1, {}), CONFIG, 1)
    assert record["skipped"] and all(torch.equal(weights[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(state[k], v) for k, v in opt.tensors().items())


def test_an_infinite_gradient_behind_a_finite_loss_moves_nothing():
    model = fresh()
    opt, before = build_optimizer(model, CONFIG), fresh().state_dict()

    def loss_fn(model, batch):
        loss, count, metrics = lm_loss(model, batch)
        return loss + (model.norm.weight.sum() * 0).sqrt(), count, metrics                  # the slope of a root at zero
    assert training_step(model, opt, batch_at(0), loss_fn, CONFIG, 0)["skipped"]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bad_steps_are_skipped_and_logged_and_too_many_end_the_run(tmp_path):
    config = override(CONFIG, ["micro_batch_size=none", "max_bad_steps=3"])
    go(tmp_path / "two", config, loss_fn=wrong_from(5, 6))
    log = read_log(tmp_path / "two")
    assert [r["step"] for r in log if r["skipped"]] == [5, 6] and log[4]["loss"] is None
    json.loads((tmp_path / "two" / "log.jsonl").read_text().splitlines()[5], parse_constant=lambda word: pytest.fail(word))
    with pytest.raises(TrainingError, match="steps 6 to 8 .*lower the learning rate"):
        go(tmp_path / "always", config, loss_fn=wrong_from(6))
    assert load_model(tmp_path / "always")[1].state["step"] == 4                              # the last good checkpoint


def test_the_count_of_bad_steps_survives_an_interruption(tmp_path):
    config = override(CONFIG, ["micro_batch_size=none", "max_bad_steps=3", "save_every=1"])
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", config, loss_fn=wrong_from(6), on_step=stop_at(7, boom))
    with pytest.raises(TrainingError, match="steps 6 to 8"):
        go(tmp_path / "run", config, loss_fn=wrong_from(6))


def test_a_batch_without_targets_is_refused_by_its_step(tmp_path):
    empty = lambda step: batch_at(step) | ({"labels": torch.full((6, 16), -100)} if step == 3 else {})
    with pytest.raises(TrainingError, match="step 4 has no target"):
        go(tmp_path / "run", batch_at=empty)


# --------------------------------------------------------------------------------------------------------------- the run's folder
@pytest.mark.parametrize("change, words", [
    ({"config": ["lr=0.1"]}, "config.lr"), ({"config": ["seed=3"]}, "config.seed"), ({"config": ["micro_batch_size=2"]}, "micro_batch"),
    ({"config": ["steps=20"]}, "config.steps"), ({"parents": {"pack": "b"}}, "parents.pack"), ({"data": 1}, "other data"),
    ({"model": ["d_ff=128"]}, "model_config.d_ff"),
])
def test_another_run_is_refused_by_name(tmp_path, change, words):
    parents = {"pack": "a"}
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", parents=parents, on_step=stop_at(4, boom))
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    seed_everything(1)
    model, config = TransformerLM(override(TINY, change.get("model", []))), override(CONFIG, change.get("config", []))
    with pytest.raises(TrainingError, match=words):
        train(model, lambda step: batch_at(step, change.get("data", 0)), lm_loss, config, tmp_path / "run",
              parents=change.get("parents", parents), quiet=True)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_a_finished_run_returns_at_once(tmp_path, reference):
    go(tmp_path / "run")
    model = go(tmp_path / "run", on_step=lambda step: pytest.fail("a step was made"))
    assert all(torch.equal(reference[0][k], v) for k, v in model.state_dict().items()) and not model.training


def test_damaged_checkpoints_the_older_one_is_taken_and_none_is_an_error(tmp_path, reference, capsys):
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", on_step=stop_at(9, boom))
    for name, resumed in (("step-00000008", 4), ("step-00000004", None)):
        file = tmp_path / "run" / name / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-100] ^= 1
        file.write_bytes(data)
        run = Run(fresh(), batch_at, CONFIG, tmp_path / "run", {}, {}, {}, "test", True)
        if resumed:
            assert begin(run).step == 4 and name in capsys.readouterr().out
            continue
        with pytest.raises(TrainingError, match="none of them is intact"):
            begin(run)


def test_two_writers_the_second_is_refused(tmp_path):
    def second():
        with pytest.raises(ArtifactError, match=str(os.getpid())):
            go(tmp_path / "run")
    go(tmp_path / "run", on_step=stop_at(2, second))


def test_a_disk_that_is_full_for_a_while_does_not_end_the_run(tmp_path, reference, monkeypatch, capsys):
    import slm.runs
    real = slm.runs.save_checkpoint

    def failing(run_dir, step, *args, **kwargs):
        if step == 8:
            raise ArtifactError("disk full: need 3 MB, have 1 MB")
        return real(run_dir, step, *args, **kwargs)
    monkeypatch.setattr(slm.runs, "save_checkpoint", failing)
    go(tmp_path / "run", quiet=False)
    assert "step 8 is not saved" in capsys.readouterr().out and same(everything(tmp_path / "run"), reference)


def test_a_half_written_log_is_repaired(tmp_path, reference):
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", on_step=stop_at(6, boom))
    with open(tmp_path / "run" / "log.jsonl", "a") as f:
        f.write('{"step": 7, "loss": 1.')
    go(tmp_path / "run")
    assert same(everything(tmp_path / "run"), reference)
    assert "run_id" in json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])


def test_a_checkpoint_holds_what_the_next_chapters_need(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    result = train(fresh(), batch_at, lm_loss, CONFIG, tmp_path / "run", files={"tokenizer.json": tmp_path / "tokenizer.json"}, quiet=True,
                   parents={"pack": "a"}, state_extra={"stage": "x"}, evaluate=lambda model: {"bits_per_byte": np.float32(2)})
    saved = load_checkpoint(result["checkpoint"])
    assert {"step", "config", "model_config", "rng", "tokens_seen", "parents", "stage"} <= saved.state.keys()
    assert (saved.path / "tokenizer.json").read_text() == "{}" and saved.manifest["parents"] == {"pack": "a"}
    assert result["bits_per_byte"] == 2 and result["tokens"] == 14 * 6 * 16 and (tmp_path / "run" / "config.yaml").exists()
    with pytest.raises(TrainingError, match="there is no checkpoint"):
        load_model(tmp_path)


def test_a_state_of_another_optimizer_is_refused_by_name():
    model = fresh()
    with pytest.raises(Exception, match="does not fit this optimizer at 'embed.weight"):
        state = {k: v for k, v in optimizer_tensors(build_optimizer(model, CONFIG)).items() if k != "embed.weight:exp_avg"}
        load_optimizer_tensors(build_optimizer(model, CONFIG), state)


def test_rng_and_save_by_seconds(tmp_path):
    run = Run(fresh(), batch_at, override(CONFIG, ["save_every=none", "save_seconds=0"]), tmp_path / "run", {}, {}, {}, "test", True)
    save(begin(run))
    first = torch.rand(4)
    set_rng_state(load_model(tmp_path / "run")[1].state["rng"])
    assert torch.equal(torch.rand(4), first)
    go(tmp_path / "seconds", override(CONFIG, ["save_every=none", "save_seconds=0", "keep=3"]))
    assert len(list((tmp_path / "seconds").glob("step-*"))) == 3


def test_bits_per_byte_of_an_untrained_model_is_log2_of_the_vocabulary():
    docs = [[0, *rng("doc", i).integers(1, 64, size=40 + i).tolist(), 0] for i in range(8)]
    result = bits_per_byte(fresh(), docs, [len(doc) - 1 for doc in docs])
    assert result["low"] < result["bits_per_byte"] < result["high"] and abs(result["bits_per_byte"] - 6) < 0.3
    assert result["bytes"] == sum(len(doc) - 1 for doc in docs) and result["docs"] == 8


# ---------------------------------------------------------------------------------------------- policies, memory, best, hooks
WHOLE = override(CONFIG, ["micro_batch_size=none"])


def test_stop_names_step_batch_and_layer(tmp_path):
    with pytest.raises(TrainingError, match=r"steps 5 to 5 \(batch 4, [0-9a-f]{8}; gradient of .*; loss nan, learning rate .*lower"):
        go(tmp_path / "run", override(WHOLE, ["on_bad=stop"]), loss_fn=wrong_from(5, 5))
    assert load_model(tmp_path / "run")[1].state["step"] == 4


def test_rollback_strikes_the_batch_off_and_a_resumed_run_does_the_same(tmp_path):
    config = override(WHOLE, ["on_bad=rollback", "save_every=3"])
    go(tmp_path / "run", config, loss_fn=wrong_from(8, 8))
    assert load_model(tmp_path / "run")[1].state["struck"] == [7]
    log = read_log(tmp_path / "run")
    assert [r["step"] for r in log] == list(range(1, 15)) and not any(r["skipped"] for r in log)
    for when in (7, 10):
        with pytest.raises(RuntimeError, match="boom"):
            go(tmp_path / "cut", config, loss_fn=wrong_from(8, 8), on_step=stop_at(when, boom))
    go(tmp_path / "cut", config, loss_fn=wrong_from(8, 8))
    assert same(everything(tmp_path / "run"), everything(tmp_path / "cut"))
    with pytest.raises(TrainingError, match="lower the learning rate"):
        go(tmp_path / "always", config, loss_fn=wrong_from(4))


def test_a_spike_is_skipped_and_remembered_across_a_resume(tmp_path):
    config, spoilt = override(WHOLE, ["spike=4", "steps=30", "save_every=5", "schedule=constant"]), batch_at(24)["ids"]

    def loss_fn(model, batch):
        loss, count, metrics = lm_loss(model, batch)
        return loss * (10 if torch.equal(batch["ids"], spoilt) else 1), count, metrics
    go(tmp_path / "run", config, loss_fn=loss_fn)
    assert [r["step"] for r in read_log(tmp_path / "run") if r["skipped"]] == [25]
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "cut", config, loss_fn=loss_fn, on_step=stop_at(22, boom))
    go(tmp_path / "cut", config, loss_fn=loss_fn)
    assert same(everything(tmp_path / "run"), everything(tmp_path / "cut"))


def test_out_of_memory_halves_the_parts_and_a_resumed_run_keeps_them(tmp_path, capsys):
    def cramped(model, part):
        if len(part["ids"]) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return lm_loss(model, part)
    go(tmp_path / "run", WHOLE, loss_fn=cramped, quiet=False)
    assert "6 rows at once do not fit into memory: 3 from now on" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "cut", WHOLE, loss_fn=cramped, on_step=stop_at(6, boom))
    go(tmp_path / "cut", WHOLE, loss_fn=cramped)
    assert same(everything(tmp_path / "run"), everything(tmp_path / "cut")) and load_model(tmp_path / "cut")[1].state["micro"] == 2
    go(tmp_path / "two", override(WHOLE, ["micro_batch_size=2"]))
    assert all(torch.equal(a, b) for a, b in zip(everything(tmp_path / "run")[0].values(), everything(tmp_path / "two")[0].values()))


def test_not_even_one_row_fits(tmp_path):
    def full(model, part):
        raise MemoryError
    with pytest.raises(TrainingError, match="step 1 does not fit into memory"):
        go(tmp_path / "run", WHOLE, loss_fn=full)


def test_the_best_checkpoint_stays(tmp_path):
    values = iter([3.0, 1.0, 2.0, 2.5, 2.2, 2.1, 2.3])
    go(tmp_path / "run", override(CONFIG, ["eval_every=2", "save_every=2", "keep=2", "keep_best=true"]),
       evaluate=lambda model: {"bits_per_byte": next(values)})
    assert [int(p.name[5:]) for p in sorted((tmp_path / "run").glob("step-*"))] == [4, 12, 14]
    assert load_model(tmp_path / "run")[1].state["best"] == {"step": 4, "measure": "bits_per_byte", "value": 1.0}


@pytest.mark.parametrize("settings", [["checkpointing=true"], ["sinks=[csv,tensorboard]"], ["hooks=[activations,gradient_norms]"]])
def test_what_only_watches_or_recomputes_changes_no_bit(tmp_path, reference, settings):
    go(tmp_path / "run", override(CONFIG, settings))
    assert all(torch.equal(a, b) for a, b in zip(everything(tmp_path / "run")[0].values(), reference[0].values(), strict=True))


def test_hooks_are_part_of_who_a_run_is(tmp_path):
    config = override(CONFIG, ["hooks=[centralize]"])
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", config, on_step=stop_at(6, boom))
    first = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert {"run_id", "git_commit", "config_hash", "seed", "torch", "threads", "parents"} <= first.keys()
    assert first["hooks"] == ["centralize"]
    with pytest.raises(TrainingError, match="config.hooks"):
        go(tmp_path / "run", CONFIG)
    go(tmp_path / "run", config)
    go(tmp_path / "whole", config)
    assert same(everything(tmp_path / "run"), everything(tmp_path / "whole"))
    with pytest.raises(Exception, match="unknown hook 'centralise'.*did you mean 'centralize'"):
        go(tmp_path / "typo", override(CONFIG, ["hooks=[centralise]"]))


def test_the_table_is_the_log(tmp_path):
    import csv
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", on_step=stop_at(6, boom), evaluate=lambda model: {"val_loss": 1.0})
    go(tmp_path / "run", evaluate=lambda model: {"val_loss": 1.0})
    with open(tmp_path / "run" / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(r["step"]) for r in rows] == list(range(1, 15)) and rows[-1]["val_loss"] == "1.0" and rows[0]["val_loss"] == ""
    assert [float(r["loss"]) for r in rows] == [r["loss"] for r in read_log(tmp_path / "run")]


def test_bf16_copies_resume_exactly_and_learn(tmp_path):
    config = override(CONFIG, ["bf16_copies=true", "precision=bfloat16"])
    go(tmp_path / "whole", config)
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "cut", config, on_step=stop_at(6, boom))
    go(tmp_path / "cut", config)
    assert same(everything(tmp_path / "whole"), everything(tmp_path / "cut"))
    assert all(t.dtype == torch.float32 for t in everything(tmp_path / "cut")[0].values())


def test_a_checkpoint_older_than_a_setting_goes_on(tmp_path, reference):
    with pytest.raises(RuntimeError, match="boom"):
        go(tmp_path / "run", on_step=stop_at(6, boom))
    found = load_checkpoint(tmp_path / "run" / "step-00000004")
    for name in ("hooks", "spike", "bf16_copies"):
        del found.state["identity"]["config"][name]
    for name in ("micro", "struck", "recent", "best", "ranks"):
        del found.state[name]
    run = resume(Run(fresh(), batch_at, CONFIG, tmp_path / "run", {}, {}, {}, "test", True), found)
    assert run.step == 4 and run.struck == []


@pytest.mark.slow
@pytest.mark.skipif(not any(Path(folder, "c++").exists() for folder in os.get_exec_path()), reason="compiling needs a C++ compiler")
def test_compiled_layers_give_the_gradient_of_plain_ones():
    """To 1e-4 of its norm in float32 (sums in another order), to three hundredths where products are bfloat16."""
    from slm.speed import compile_layers

    def gradient(model, precision):
        model.zero_grad()
        accumulate(model, batch_at(0), lm_loss, override(CONFIG, [f"precision={precision}"]))
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    model = TransformerLM(override(TINY, ["dropout=0.0"]))
    plain = {precision: gradient(model, precision) for precision in ("float32", "bfloat16")}
    assert compile_layers(model, lambda: gradient(model, "float32"), lambda line: None)
    for precision, limit in (("float32", 1e-4), ("bfloat16", 3e-2)):
        error = (gradient(model, precision) - plain[precision]).norm() / plain[precision].norm()
        assert 0 < error < limit, (precision, error)


# ------------------------------------------------------------------------------------------------------- the fused optimizer
def adamw_after(steps, fused, state=None, weights=None, begin=0):
    """Model and optimizer after some steps of AdamW, from a saved state on where there is one."""
    config = override(CONFIG, ["optimizer=adamw", "precision=float32"])
    model = fresh().eval()
    if weights:
        model.load_state_dict(weights)
    opt = build_optimizer(model, config)
    for part in opt.parts:
        part.fused = fused
    if state:
        load_optimizer_tensors(opt, state)
    for step in range(begin, begin + steps):
        training_step(model, opt, batch_at(step), lm_loss, config, step)
    return model, opt


@pytest.mark.parametrize("first, second", [(None, True), (True, None), (True, True)])
def test_fused_adamw_is_the_same_rule_and_takes_up_the_other_ones_state(first, second):
    model, opt = adamw_after(8, first)
    model, opt = adamw_after(6, second, optimizer_tensors(opt), model.state_dict(), 8)
    plain, other = adamw_after(14, None)
    for name, t in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], t, rtol=1e-5, atol=1e-6)
    for name, t in other.tensors().items():
        assert opt.tensors()[name].dtype == t.dtype
        torch.testing.assert_close(opt.tensors()[name], t, rtol=1e-4, atol=1e-7)


def test_the_fused_kernel_is_for_cuda_devices_and_changes_no_bit_here(monkeypatch):
    class OnCuda(torch.Tensor):                                                             # says that it is there
        device = property(lambda self: torch.device("cuda", 0))
    calls = []
    monkeypatch.setattr("slm.optim.fused_adamw", lambda opt, names, lr: calls.append(names))
    adamw_after(2, None)
    assert calls == []
    far = torch.zeros(3).as_subclass(OnCuda)
    far.grad = torch.ones(3)
    AdamW({"w": far}).step()
    assert calls == [["w"]]
