"""Data sets of the hub, through the command line and the real libraries, from a hub on this machine: configs, splits, tokens, troubles."""
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from fake_hub import fake_hub

ROOT = Path(__file__).resolve().parents[1]
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


SETS = {"owner/stories": layout(), "owner/gated": layout(), "owner/renamed": layout("body")}


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


def slm(hub, *lines: str, **environment: str) -> list[tuple[int, str]]:
    """(exit code, what was printed) of each `slm LINE`, run one after another in a process of its own whose hub is ours."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(hub.here / "hf"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
              "NO_PROXY": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", DRIVER, *lines], cwd=hub.here, env={**clean, **places, **environment}, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(code == 0 or (code == 2 and len(err.strip().splitlines()) == 1) for code, _, err in answers), answers
    return [(code, out + err) for code, out, err in answers] + [(0, done.stderr)]


def corpus(folder: Path) -> str:
    return "".join((folder / "corpus" / f"{side}.jsonl").read_text() for side in ("train", "val"))


def test_a_config_and_a_split_by_name_and_the_same_from_a_folder(hub):
    for name, content in SETS["owner/stories"].items():
        (hub.here / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (hub.here / "copy" / name).write_bytes(content)
    lines = [f"data prepare {name}:small --split test --out {out} {PREPARE}" for name, out in (("owner/stories", "net"), ("copy", "disk"))]
    assert [code for code, _ in slm(hub, *lines)] == [0, 0, 0]
    told = corpus(hub.here / "net")
    assert all(text in told for text in texts("small test")) and "train" not in told and "large" not in told and "Not a story" not in told
    assert corpus(hub.here / "disk") == told
    assert any("/resolve/" + "a" * 40 in path for path, _ in hub.asked)          # the revision that was announced is the one that is read


def test_a_token_opens_a_gated_set_and_is_found_nowhere(hub):
    [(code, refused), _] = slm(hub, f"data prepare owner/gated:small --out g {PREPARE}")
    assert code == 2 and "gated" in refused and ".env" in refused and "hf download" in refused
    (hub.here / ".env").write_text(f"# mine\nHF_TOKEN={SECRET}\n")
    told = slm(hub, f"data prepare owner/gated:small --out g {PREPARE}", "data prepare owner/gated:nothing --out n",
               "data prepare owner/gated:small --split dev --out n", "data prepare owner/gated:small --text-field tale --out n")
    (hub.here / ".env").unlink()
    told += slm(hub, f"data prepare owner/gated:large --out e {PREPARE}", HF_TOKEN=SECRET)
    assert [code for code, _ in told] == [0, 2, 2, 2, 0, 0, 0]
    assert any(SECRET in authorization for _, authorization in hub.asked)
    assert SECRET not in "".join(text for _, text in told)
    held = [path for path in hub.here.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]
    assert not held, held


def test_what_is_gone_or_changed_is_said_in_a_sentence(hub):
    sentences = {"owner/vanished": "should it have vanished, give a copy", "owner/stories:medium": "medium",
                 "owner/stories:small --split dev": "dev", "owner/renamed:small": "its fields are body"}
    told = slm(hub, *(f"data prepare {words} --out x {PREPARE}" for words in sentences))
    for (words, sentence), (code, text) in zip(sentences.items(), told):
        assert code == 2 and sentence in text, words
    assert not (hub.here / "x" / "corpus").exists()


def test_no_network(hub):
    line = f"data prepare owner/stories:small --out x {PREPARE}"
    [(code, told), _] = slm(hub, line, HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 2 and "cannot be reached" in told and "check the network" in told and "hf download" in told
    [(code, told), _] = slm(hub, line, HF_HUB_OFFLINE="1")
    assert code == 2 and "owner/stories" in told and "hf download" in told
