"""Data sets of the hub, through the command line and the real libraries, from a hub on this machine: configs, splits, tokens, troubles."""
import io
import json
import os
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import fake_hub
from forks import forks

SECRET = "hf_plantedAndNowhereToBeFound0123456789"
PREPARE = "--vocab-size 300 --val-fraction 0.1 --workers 1"


def shard(texts: list[str], field: str = "text") -> bytes:
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({field: texts}), buffer)
    return buffer.getvalue()


def texts(kind: str, n: int = 40) -> list[str]:
    return [f"Story {i} of the {kind} kind tells about {i} mills and a quiet river." for i in range(n)]


def configs(*names: str) -> bytes:
    files = {name: "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in ("train", "test")) for name in names}
    parts = "".join(f"- config_name: {name}\n  data_files:\n{files[name]}" for name in names)
    return f"---\nlicense: mit\nconfigs:\n{parts}---\nNot a story.\n".encode()


def layout(field: str = "text") -> dict[str, bytes]:
    """A data set with two configs and two splits, in two shards each."""
    files = {"README.md": configs("small", "large")}
    for config in ("small", "large"):
        for split in ("train", "test"):
            told = texts(f"{config} {split}")
            for number in (0, 1):
                files[f"{config}/{split}-{number:05d}-of-00002.parquet"] = shard(told[20 * number:20 * number + 20], field)
    return files


def card(licence: str) -> bytes:
    return f"---\nlicense: {licence}\n---\nNot a story.\n".encode()


LONG = [f"{text} The miller had a lamp, a cat and a letter from the town, and he read it every evening." for text in texts("ready")]
SETS = {
    "owner/stories": layout(), "owner/gated": layout(), "owner/renamed": layout("body"),
    "roneneldan/TinyStories": {"README.md": card("cdla-sharing-1.0"), "data/train-00000-of-00001.parquet": shard(LONG)},
    "Salesforce/wikitext": {"README.md": card("other"), "data/train-00000-of-00001.parquet": shard(LONG)},
    # a program on its main branch, as old data sets are, and what it gave on another one
    "Skylion007/openwebtext": {"README.md": card("cc0-1.0"), "openwebtext.py": b"import datasets\n"},
    "Skylion007/openwebtext@refs/convert/parquet": {"plain_text/train/0000.parquet": shard([f"{text} {text[::-1]}" for text in 4 * LONG])},
}


@pytest.fixture
def hub(tmp_path):
    with fake_hub(SETS, gated=("owner/gated",), token=SECRET) as server:
        server.here = tmp_path
        yield server


DRIVER = """
import json, sys
import slm.cli
from slm.shell import app, run_words
for line in sys.argv[1:]:
    print(json.dumps(run_words(app, line.split())))
"""


# Nothing that reads the address of the hub when it is imported.
MODULES = "torch pandas pyarrow.parquet pyarrow.dataset aiohttp httpx dill multiprocess matplotlib.pyplot typer.testing slm.cli".split()


@pytest.fixture(scope="module")
def fork():
    with forks(*MODULES) as run:
        yield run


@pytest.fixture
def python(fork, hub):
    """A function that runs a program in a process of its own whose hub is ours."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.here / "hf"), "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}

    def python(program: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
        done = fork(program, words, hub.here, {**clean, **places, **environment})
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    return python


@pytest.fixture
def slm(python):
    """A function that gives (exit code, what was printed) of each `slm LINE`, run one after another in such a process."""
    def slm(*lines: str, **environment: str) -> list[tuple[int, str]]:
        done = python(DRIVER, *lines, **environment)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert all(code == 0 or (code == 2 and len(err.strip().splitlines()) == 1) for code, _, err in answers), answers
        return [(code, out + err) for code, out, err in answers] + [(0, done.stderr)]

    return slm


def corpus(folder: Path) -> str:
    return "".join((folder / "corpus" / f"{side}.jsonl").read_text() for side in ("train", "val"))


def test_a_config_and_a_split_by_name_and_the_same_from_a_folder(slm, hub):
    for name, content in SETS["owner/stories"].items():
        (hub.here / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.here / "copy" / name).write_bytes(content)
    lines = [f"data prepare {name}:small --split test --out {out} {PREPARE}" for name, out in (("owner/stories", "net"), ("copy", "disk"))]
    assert [code for code, _ in slm(*lines)] == [0, 0, 0]
    told = corpus(hub.here / "net")
    assert all(text in told for text in texts("small test")) and "train" not in told and "large" not in told and "Not a story" not in told
    assert corpus(hub.here / "disk") == told
    assert any("/resolve/" + "a" * 40 in path for path, _ in hub.asked)          # the revision that was announced is the one that is read


def test_a_token_opens_a_gated_set_and_is_found_nowhere(slm, hub):
    [(code, refused), _] = slm(f"data prepare owner/gated:small --out g {PREPARE}")
    assert code == 2 and "gated" in refused and ".env" in refused and "hf download" in refused
    (hub.here / ".env").write_text(f"# mine\nHF_TOKEN={SECRET}\n")
    told = slm(f"data prepare owner/gated:small --out g {PREPARE}", "data prepare owner/gated:nothing --out n",
               "data prepare owner/gated:small --split dev --out n", "data prepare owner/gated:small --text-field tale --out n")
    (hub.here / ".env").unlink()
    told += slm(f"data prepare owner/gated:large --out e {PREPARE}", HF_TOKEN=SECRET)
    assert [code for code, _ in told] == [0, 2, 2, 2, 0, 0, 0]
    assert any(SECRET in authorization for _, authorization in hub.asked)
    assert SECRET not in "".join(text for _, text in told)
    held = [path for path in hub.here.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not held, held


def test_what_is_gone_or_changed_is_said_in_a_sentence(slm, hub):
    sentences = {"owner/vanished": "should it have vanished, give a copy", "owner/stories:medium": "medium",
                 "owner/stories:small --split dev": "dev", "owner/renamed:small": "its fields are body"}
    told = slm(*(f"data prepare {words} --out x {PREPARE}" for words in sentences))
    for (words, sentence), (code, text) in zip(sentences.items(), told):
        assert code == 2 and sentence in text, words
    assert not (hub.here / "x" / "corpus").exists()


def test_no_network(slm):
    line = f"data prepare owner/stories:small --out x {PREPARE}"
    [(code, told), _] = slm(line, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and "cannot be reached" in told and "check the network" in told and "hf download" in told
    [(code, told), _] = slm(line, HF_HUB_OFFLINE="1")
    assert code == 2 and "owner/stories" in told and "hf download" in told


def test_ready_names_and_lists_are_known_to_every_command(slm, hub):
    (hub.here / "mix.yml").write_text("- {name: web, kind: hub, location: owner/stories, config: small}\n"
                                      "- {name: mine, kind: file, location: mine.txt}\n")
    (hub.here / "mine.txt").write_text("<|endoftext|>".join(LONG))
    good = [f"data prepare tinystories --out t {PREPARE}", "tokenizer train tinystories --vocab-size 300 --out tok",
            "tokenizer train mix.yml --vocab-size 300 --out mixed"]
    assert [code for code, _ in slm(*good)] == [0] * 4
    assert all(text in corpus(hub.here / "t") for text in LONG)
    bad = {"tokenizer train tinystory --out x": "slm data list", "tokenizer train other.yml --out x": "cannot read the list other.yml",
           "run x --corpus tinystory": "slm data list", "run x --corpus other.yml": "cannot read the list other.yml",
           "tokenizer train wikitext --out x": "cc-by-sa-3.0 was expected"}
    for (words, sentence), (code, told) in zip(bad.items(), slm(*bad)):
        assert code == 2 and sentence in told, (words, told)


RUN = """
import sys
from slm.makers import make_corpus
from slm.run import plan_run
for name in sys.argv[1:]:
    run = plan_run(corpus=name, preset="tiny", quiet=True)
    run.dir.mkdir(parents=True)
    print(run.dir.name, make_corpus(run))
"""


def test_a_run_learns_from_a_ready_name_and_from_a_list(python, hub):
    (hub.here / "mine.yml").write_text("- {name: web, kind: hub, location: owner/stories, config: small}\n"
                                       "- {name: told, kind: storyworld}\n")
    told = python(RUN, "tinystories", "mine.yml").stdout.splitlines()
    assert told[0].startswith("tinystories 40 documents") and told[1].startswith("mine ")
    assert all(text in (hub.here / "checkpoints/tinystories/corpus/train.jsonl").read_text() +
               (hub.here / "checkpoints/tinystories/corpus/val.jsonl").read_text() for text in LONG)


def test_an_old_data_set_is_read_from_the_branch_that_holds_what_it_gave(slm, hub):
    told = slm(f"data prepare Skylion007/openwebtext --out x {PREPARE}", f"data prepare openwebtext --out web {PREPARE}")
    assert told[0][0] == 2 and "Skylion007/openwebtext@refs/convert/parquet" in told[0][1]
    assert told[1][0] == 0 and LONG[0] in corpus(hub.here / "web")
    assert any("/resolve/" + "b" * 40 in path for path, _ in hub.asked)
