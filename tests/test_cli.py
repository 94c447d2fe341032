"""The command line: help for everything, exit codes, one sentence for every bad input, nothing half-written left behind."""
from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from slm.cli import app
from slm.shell import expect_ok, expect_refusal, run_words

SLM = [sys.executable, "-c", "from slm.cli import main; main()"]


def leaves(command, words=()):
    if hasattr(command, "commands"):
        return [leaf for name in command.list_commands(None) for leaf in leaves(command.commands[name], (*words, name))]
    return [(words, command)]


COMMANDS = leaves(get_command(app))


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def babble(tmp_path_factory):
    """A tiny model with random weights, saved as a checkpoint."""
    from slm.config import ModelConfig
    from slm.ground import seed_everything
    from slm.model import TransformerLM
    from slm.sample import LM
    from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer

    seed_everything(0)    # with some seeds the greedy answer is too short to be interrupted
    tok = BPETokenizer.train(["Mia has a red kite. " * 20], vocab_size=270, special_tokens=SPECIAL_TOKENS)
    folder = tmp_path_factory.mktemp("babble") / "model"
    LM(TransformerLM(ModelConfig(vocab_size=tok.vocab_size, context_length=4096, n_layer=1, n_head=1, d_model=16)), tok).save(folder)
    return folder


# ------------------------------------------------------------------------------------------------------------------- help
@pytest.mark.parametrize("words,command", COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_help_teaches(words, command):
    """What it does in one short sentence, an example to copy, a meaning for every word, every default that is not empty."""
    text = expect_ok(" ".join((*words, "--help")))
    assert "\n  slm " + " ".join(words) in text, "no example"
    assert command.help.split("\n")[0].endswith(".") and len(command.help.split("\n")[0]) < 70
    short = [word for parameter in command.params for word in parameter.opts if len(word) == 2]
    assert len(short) == len(set(short)), f"one letter, two meanings: {sorted(short)}"
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} is not explained"
        if parameter.default not in (None, (), [], False) and not callable(parameter.default):
            assert f"default: {parameter.default}" in " ".join(text.split()), f"the default of {parameter.name} is not shown"


def test_all_commands_are_there():
    alone = {"run", "chat", "sample", "plan", "pretrain", "sft", "dpo", "quantize", "export", "import", "eval", "lineage", "test"}
    families = {"tokenizer train", "tokenizer encode", "tokenizer show", "tokenizer bench", "tokenizer compare", "data prepare",
                "data check", "data list", "bench constrain", "bench data", "bench decode", "bench train", "bench muon",
                "bench shakespeare", "bench loss", "bench recipe"}
    later = {"verify-resume", "ablate", "scale", "doctor", "inspect", "serve", "grpo", "judge", "pairs"}
    assert {" ".join(words) for words, _ in COMMANDS} == alone | families | later
    shown = expect_ok("--help")
    assert all(words[-1] in shown or words[0] in shown for words, _ in COMMANDS)


def processor_seconds(program: str) -> float:
    """What a Python program that prints [] takes of the processor: others that use it do not count."""
    before = os.times()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def test_help_is_fast_and_imports_nothing_heavy():
    heavy = "sorted({'torch', 'numpy', 'yaml'} & set(sys.modules))"
    program = f"import sys\nfrom slm.cli import app\ntry: app(['--help'])\nfinally: print({heavy})"
    bare, times = [], []
    for _ in range(3):
        bare.append(processor_seconds("import typer; print([])"))
        times.append(processor_seconds(program))
    assert min(times) < 4 * min(bare), f"slm --help took {min(times):.2f} s of the processor, its library alone {min(bare):.2f}"


def test_no_words_is_help(here):
    assert run_words(app, [])[:2] == (0, run_words(app, ["--help"])[1])


# ------------------------------------------------------------------------------------------------------------- exit codes
MISTYPED = ["rum", "run --pretest tiny", "sample --top-p 2", "plan --steps many", "plan --steps 0", "plan --minutes 0", "tokenizer"]
MISTYPED += ["export a", "import a", "data", "tokenizer train"]


@pytest.mark.parametrize("line", MISTYPED)
def test_mistyped_lines(here, line):
    assert "--help" in expect_refusal(line)
    assert tree(here) == {}


@pytest.mark.parametrize("error,code,words", [
    (KeyboardInterrupt(), 130, "goes on"),
    (KeyboardInterrupt("saved at step 7"), 130, "saved at step 7"),
    (ZeroDivisionError("x"), 1, "--debug"),
    (OSError(28, "No space left on device", "out"), 2, "disk full"),
    (OSError(30, "Read-only file system", "out"), 2, "read-only"),
    (PermissionError(13, "Permission denied", "out"), 2, "permission"),
    (MemoryError(), 2, "--batch-size"),
])
def test_every_ending(here, monkeypatch, error, code, words):
    def fail(*args, **more):
        raise error
    monkeypatch.setattr("slm.make.plan_lines", fail)
    got, out, err = run_words(app, ["plan", "--speed", "1000"])
    assert (got, out) == (code, "") and words in err
    assert "Traceback" not in err and len(err.strip().splitlines()) == 1
    with pytest.raises(type(error) if code != 130 else BaseException):
        run_words(app, ["plan", "--speed", "1000", "--debug"])


def test_closed_pipe_is_no_traceback():
    line = f'"{sys.executable}" -c "from slm.cli import main; main()" run --help | head -1'
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.stdout.startswith("Usage") and "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------------------------------- bad input
def fill(here: Path) -> None:
    """The sources that cannot be used, each under its name."""
    (here / "empty.txt").write_text("")
    (here / "blank.txt").write_text(" \n\n \n")
    (here / "binary.txt").write_bytes(bytes(range(256)) * 40)
    (here / "nothing").mkdir()
    (here / "nothing" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    (here / "hollow").mkdir()
    (here / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    (here / "good.txt").write_text("\n<|endoftext|>\n".join(f"Mia has {n} red kites. A kite is in the tree." for n in range(200)))


SOURCES = ["missing.txt", "missing/", "empty.txt", "blank.txt", "binary.txt", "nothing", "hollow", "broken.jsonl"]
READERS = {
    "run": "run x --preset tiny --corpus {}",
    "data prepare": "data prepare {} --out out",
    "tokenizer train": "tokenizer train {} --out out",
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("reader", READERS)
def test_bad_source(here, reader, source):
    fill(here)
    before = tree(here)
    sentence = expect_refusal(READERS[reader].format(source))
    assert source.strip("/") in sentence
    after = {name: data for name, data in tree(here).items() if not name.endswith((".lock", "run.lock"))}
    leftovers = [name for name in after if name not in before and (here / name).is_file() and "stages" not in name]
    assert not leftovers, f"left behind: {leftovers}"


@pytest.mark.parametrize("words", ["tokenizer train", "data prepare"])
def test_vocabulary_too_large(here, words):
    fill(here)
    sentence = expect_refusal(f"{words} good.txt --vocab-size 60000 --out out")
    assert "60000" in sentence.replace(",", "") and not list(here.rglob("tokenizer.json"))


@pytest.mark.parametrize("line", ["run --preset huge", "plan --preset huge", "pretrain pack --preset huge"])
def test_unknown_preset(here, line):
    fill(here)
    before = tree(here)
    sentence = expect_refusal(line)
    assert "huge" in sentence or "pack" in sentence
    assert tree(here) == before


USES = ["sample {}", "chat {}", "eval {} --judge 1", "quantize {}", "lineage {}", "tokenizer show {}", "data check {}"]
USES += ["sft {} storyworld --rows 2 --out out", "dpo {} storyworld --rows 2 --out out", "export {} out", "import {} out"]
USES += ["grpo {} storyworld --rows 20 --out out", "judge {0} again={0}"]


@pytest.mark.parametrize("line", USES)
@pytest.mark.parametrize("what", ["missing", "hollow", "good.txt"])
def test_no_such_checkpoint(here, line, what):
    fill(here)
    before = tree(here)
    assert what in expect_refusal(line.format(what))
    assert tree(here) == before


@pytest.mark.parametrize("line", ["sample", "chat", "eval", "quantize", "lineage"])
def test_no_run_yet(here, line):
    assert "slm run" in expect_refusal(line)


SETTINGS = ["run --minutes 0", "run --minutes nan", "run --redo nonsense"]
SETTINGS += ["plan --set n_layer=3", "plan --set model.n_lair=3", "plan --set model.n_head=7"]


@pytest.mark.parametrize("line", SETTINGS)
def test_bad_settings(here, line):
    assert expect_refusal(line)
    assert not [p for p in here.rglob("*") if p.is_file() and p.suffix != ".lock"]


def test_file_where_a_folder_is_needed(here):
    fill(here)
    before = tree(here)
    assert "good.txt" in expect_refusal("data prepare good.txt --out good.txt/inside")
    assert tree(here) == before


def mounted(folder: Path, options: str, line: str) -> subprocess.CompletedProcess:
    """Run `slm LINE` with a small file system at `folder`, in a mount namespace of its own. Skips where that is not allowed."""
    folder.mkdir(exist_ok=True)
    mount = f"mount -t tmpfs -o {options} tmpfs '{folder}'"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not let a test mount a file system")
    script = f"{mount} && cd '{folder.parent}' && exec \"$@\""
    return subprocess.run(["unshare", "-rm", "sh", "-c", script, "sh", *SLM, *line.split()], capture_output=True, text=True)


WRITERS = ["data prepare good.txt --vocab-size 270", "tokenizer train good.txt --vocab-size 270", "quantize model"]
WRITERS += ["run --preset tiny --corpus good.txt"]


@pytest.mark.parametrize("line", WRITERS)
@pytest.mark.parametrize("options,word", [("ro", "read-only"), ("size=4k", "disk full")])
def test_read_only_and_full_disk(here, babble, line, options, word):
    fill(here)
    shutil.copytree(babble, here / "model")
    done = mounted(here / "disk", options, f"{line} --out disk/out")
    assert done.returncode == 2 and word in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr[-2000:]


# ------------------------------------------------------------------------------------------------- chat, sample, the rest
def test_chat_through_a_pipe(babble):
    line = f"chat {babble} -n 6 --seed 3"
    two = expect_ok(line, stdin="Hello\nHello again\n")
    assert two == expect_ok(line, stdin="Hello\n\n\nHello again\n/quit\nignored\n")
    assert expect_ok(line, stdin="/what\n").startswith("/reset forgets")
    assert expect_ok(line, stdin="") == ""


def test_chat_as_a_process_streams_and_ends_with_the_pipe(babble):
    done = subprocess.run([*SLM, "chat", str(babble), "-n", "4"], input="Hello\n", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.endswith("\n")


class Person:
    """Somebody at a terminal, who reads what is shown and types."""

    def __init__(self, handle: int):
        self.handle, self.shown = handle, ""

    def sees(self, *wanted: str, seconds: float = 120) -> str | None:
        """Read on until one of these patterns is shown, and forget what came before; which it was, None for none."""
        end = time.monotonic() + seconds
        while True:
            for one in wanted:
                if found := re.search(one, self.shown):
                    self.shown = self.shown[found.end():]
                    return one
            if time.monotonic() > end:
                return None
            if select.select([self.handle], [], [], 0.2)[0]:
                self.shown += os.read(self.handle, 4096).decode("utf-8", "replace")

    def insists(self, typed: bytes, wanted: str) -> bool:
        """Type it, and again when nothing came of it: the prompt is shown a moment before anybody listens."""
        for _ in range(12):
            os.write(self.handle, typed)
            if self.sees(wanted, seconds=10):
                return True
        return False


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_ctrl_c_stops_the_answer_and_not_the_program(babble):
    """A person at a terminal: an answer is interrupted, the next question is answered, Ctrl-C at the prompt only reminds, /quit leaves."""
    import pty

    child, terminal = pty.fork()
    if child == 0:
        os.execv(SLM[0], [*SLM, "chat", str(babble), "-n", "4000", "--temperature", "0"])
    person, stopped, reminded = Person(terminal), r"…\r\n> ", "/quit leaves"
    try:
        assert person.sees("> "), person.shown
        for _ in range(5):                                        # whose Ctrl-C comes when the answer is over already asks again
            os.write(terminal, b"Hello\n")
            assert person.sees(r"Hello\r\n(?:\x1b\[[\d;?]*\w|\s)*[^\s\x1b]"), person.shown         # and the beginning of an answer
            os.write(terminal, b"\x03")
            if (seen := person.sees(stopped, reminded)) == stopped:
                break
            assert seen and person.sees("> "), person.shown
        assert seen == stopped
        assert person.insists(b"\x03", reminded), person.shown
        assert person.insists(b"/seed 7\n", r"[^/]seed 7\r\n.*> "), person.shown
        os.write(terminal, b"/quit\n")
        assert os.waitpid(child, 0)[1] == 0
    finally:
        os.close(terminal)


def test_sample_is_reproducible_and_seeds_differ(babble):
    first = expect_ok(f"sample {babble} --prompt Mia -n 12 --seed 5")
    assert first == expect_ok(f"sample {babble} --prompt Mia -n 12 --seed 5") and first.startswith("Mia")
    assert first != expect_ok(f"sample {babble} --prompt Mia -n 12 --seed 6")


@pytest.mark.parametrize("words, out", [("--format hf", "there"), ("--format gguf --dtype f32", "there.gguf")])
def test_export_and_import_give_the_same_model_back(here, babble, words, out):
    if "gguf" in words:
        pytest.importorskip("gguf")
    assert out in expect_ok(f"export {babble} {out} {words}") and "parameters" in expect_ok(f"import {out} back")
    ask = "sample {} --prompt Mia -n 12 --temperature 0"
    assert expect_ok(ask.format("back")) == expect_ok(ask.format(babble)) == expect_ok(ask.format(out))
    assert "ok" in expect_ok("data check back")


@pytest.mark.parametrize("words, said", [("--format onnx", "onnx"), ("--dtype int3", "int3"), ("--format gguf --dtype float32", "float32")])
def test_exports_that_nobody_reads_are_refused(here, babble, words, said):
    assert said in expect_refusal(f"export {babble} out {words}") and tree(here) == {}


def test_import_of_an_unknown_architecture_is_refused(here, babble):
    expect_ok(f"export {babble} there")
    config = here / "there" / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "MambaForCausalLM"))
    (here / "there" / "manifest.json").unlink()
    assert "MambaForCausalLM" in expect_refusal("import there back") and not (here / "back").exists()


def test_plan_says_what_fits():
    lines = dict(line.split(maxsplit=1) for line in expect_ok("plan --preset 15m --minutes 30 --speed 9000").splitlines())
    assert lines["parameters"].startswith("15,") and "30 minutes: 16,200,000 tokens in 7,910 steps" in lines["in"]
    assert lines["would"].startswith("suit") and "depth" in lines["would"]
    assert "100 steps" in expect_ok("plan --preset tiny --steps 100 --speed 7")
    assert expect_ok("plan --preset tiny --speed 7 -b 32") == expect_ok("plan --preset tiny --speed 7 --set train.batch_size=32")
    assert "batch_size" in expect_refusal("plan --preset tiny --speed 7 --set train.batch_size=0")
    if Path("/proc/meminfo").exists():
        assert "does not fit" in expect_ok("plan --preset tiny --speed 9 --batch-size 100000000")
    assert "tokens/s" in expect_ok("plan --preset tiny --batch-size 1 --context-length 16")       # a short calibration


def test_plan_and_pretrain_reckon_with_the_batch_of_the_recipe():
    import inspect

    from slm.make import plan_command
    from slm.stages import RUN_PRESETS
    from slm.train_cli import pretrain_command
    for command in (plan_command, pretrain_command):
        defaults = {name: p.default for name, p in inspect.signature(command).parameters.items()}
        for recipe in RUN_PRESETS.values():
            assert (defaults["batch_size"], defaults["context_length"]) == (recipe.pretrain.batch_size, recipe.pretrain.context_length)


def test_prompt_from_a_file_and_from_stdin(here, babble):
    Path("prompt.txt").write_text("Mia has")
    line = f"sample {babble} -n 3 --prompt"
    assert expect_ok(f"{line} @prompt.txt") == expect_ok(f"{line} -", stdin="Mia has")
    assert "missing.txt" in expect_refusal(f"{line} @missing.txt")


def test_checkpoint_with_a_flipped_bit_is_refused(here, babble):
    shutil.copytree(babble, here / "model")
    weights = here / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    assert "model.safetensors" in expect_refusal("sample model -n 2")
    assert "model.safetensors" in expect_refusal("data check model")


def test_ctrl_c_saves_and_the_same_command_goes_on(here):
    """A real signal to a real process: exit code 130, a sentence that says how to go on, and then the run is finished."""
    expect_ok("data prepare storyworld --max-docs 60 --part-megabytes 0.1 --vocab-size 300 --val-fraction 0.1 --out stories")
    shape = "--preset tiny --set model.d_model=16 --set model.n_layer=1 --context-length 32 --batch-size 2"
    words = f"pretrain stories/pack {shape} --steps 100000 --out base".split()
    process = subprocess.Popen([*SLM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, deadline = here / "base" / "log.jsonl", time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and not (log.exists() and log.stat().st_size > 3000):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "step" in err.splitlines()[-1] and "Traceback" not in err
    assert (here / "base" / "latest").exists() and "ok" in expect_ok("data check base")


def test_slm_test_refuses_elsewhere(here):
    assert "pip install" in expect_refusal("test")
    for name in ("nbs", "tests", "slm"):
        (here / name).mkdir()
    (here / "settings.ini").write_text("")
    assert "not the one in this folder" in expect_refusal("test")
    assert os.listdir(here / "tests") == []
