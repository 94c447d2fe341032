"""Processes that begin at once: a parent imports what they need, which takes longer than most of them live, and forks for each."""
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARENT = """
import gc, importlib, json, os, runpy, signal, sys, traceback
for name in sys.argv[1:]: importlib.import_module(name)
gc.freeze()                                    # a fork that went through all these objects would copy the pages that they lie on
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if not pid:
        signal.alarm(600)                      # whoever hangs is ended
        for number, path in enumerate(job["files"]): os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        os.chdir(job["folder"]), os.environ.clear(), os.environ.update(job["environment"])
        sys.argv, code = [job["program"], *job["words"]], 0
        try: runpy.run_path(job["program"])
        except SystemExit as end: code = end.code or 0
        except BaseException: code = traceback.print_exc() or 1
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)                         # taking all the modules down would take a second
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@contextmanager
def forks(*modules: str):
    """A function that runs a program (Python text) with its words, folder and environment in a fork of a process with these modules."""
    if not hasattr(os, "fork"):
        pytest.skip("needs fork")
    here = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen([sys.executable, "-c", PARENT, *modules], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=here)

    def run(program: str, words: list[str], folder: Path, environment: dict[str, str] = here) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as heard:
            file, out, err = (Path(heard, name) for name in ("slm", "out", "err"))
            file.write_text(program)
            job = {"program": str(file), "words": words, "folder": str(folder), "environment": environment,
                   "files": [os.devnull, str(out), str(err)]}
            parent.stdin.write(json.dumps(job) + "\n")
            parent.stdin.flush()
            return subprocess.CompletedProcess(words, int(parent.stdout.readline()), out.read_text(), err.read_text())

    run("", [], ROOT)                                                          # the first answer comes when everything has been imported
    yield run
    parent.stdin.close()
    parent.wait(60)
