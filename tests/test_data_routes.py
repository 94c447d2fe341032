"""Token in, token out: by every route, what a source holds is what a pack gives back, document by document."""
import http.server
import json
import threading
from pathlib import Path

import pytest
from every_format import write_every_format

import slm.cli  # noqa: F401  its commands join the program
from slm.data import Pack
from slm.shell import expect_ok
from slm.sources import clean, open_source
from slm.tokenizer import load_tokenizer

TEXTS = [f"Text {i} — naïve café, “{chr(0x4e00 + i)}” and 🙂 — tells\n\nof {i} mills.\tThe end <|endoftext |>" for i in range(24)]
BOOK = "*** START OF THE PROJECT GUTENBERG EBOOK {0} ***\n\n{1}\n\n*** END OF THE PROJECT GUTENBERG EBOOK {0} ***\nlicence"


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A working folder with a tokenizer, and the same texts in every form."""
    folder = tmp_path_factory.mktemp("routes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_every_format(TEXTS)
        Path("mix.yml").write_text("- {name: a, kind: file, location: a.jsonl}\n- {name: w, kind: storyworld, max_docs: 9, share: 0.1}\n")
        expect_ok("tokenizer train e.txt --vocab-size 300 --out tok")
        yield folder


def through(source: str, out: str) -> list[str]:
    """The documents of a pack that was prepared from a source, decoded, sorted."""
    expect_ok(f"data prepare {source} --tokenizer tok --val-fraction 0.2 --shard-tokens 500 --workers 1 --out {out}")
    tok, pack = load_tokenizer("tok"), Pack(f"{out}/pack")
    return sorted(tok.decode(ids[1:-1]) for side in ("train", "val") for ids in pack.documents(side))


@pytest.mark.parametrize("source", ["a.jsonl", "b.jsonl.gz", "c.csv", "d.parquet", "e.txt", "folder", "copy"])
def test_files_tables_and_folders(here, monkeypatch, source):
    monkeypatch.chdir(here)
    assert through(source, f"out-{source}") == sorted(map(clean, TEXTS))


def test_story_world(here, monkeypatch):
    monkeypatch.chdir(here)
    assert through("storyworld --max-docs 30", "world") == sorted(item["text"] for item in open_source("storyworld", limit_docs=30))


def test_mixture(here, monkeypatch):
    monkeypatch.chdir(here)
    told, stories = through("--sources mix.yml", "mixed"), {item["text"] for item in open_source("storyworld", limit_docs=9)}
    assert set(told) <= set(map(clean, TEXTS)) | stories and set(told) & stories and len(told) == len(set(told))
    assert set(told) >= set(map(clean, TEXTS)) or set(told) >= stories            # one of the two ran dry


class Library(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        site = f"http://127.0.0.1:{self.server.server_port}"
        books = [{"id": i, "title": f"Book {i}", "formats": {"text/plain; charset=utf-8": f"{site}/{i}"}} for i in range(4)]
        catalogue = json.dumps({"next": None, "results": books})
        body = catalogue if self.path.startswith("/books") else BOOK.format(self.path[1:], TEXTS[int(self.path[1:])])
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body.encode())


def test_gutenberg(here, monkeypatch):
    monkeypatch.chdir(here)
    monkeypatch.setattr("slm.gutenberg.Guest.pause", 0.01)
    monkeypatch.setattr("slm.gutenberg.Guest.__init__.__defaults__", (Path("kept"), 0.01, 5, -1e9))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Library) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert through(f"gutenberg:http://127.0.0.1:{server.server_port}/books", "books") == sorted(map(clean, TEXTS[:4]))
        server.shutdown()
