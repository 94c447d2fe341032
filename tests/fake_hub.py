"""A hub of data sets on this machine: enough of its HTTP protocol for the real `datasets` and `huggingface_hub` libraries."""
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from contextlib import contextmanager


def children(files: dict[str, bytes], folder: str, deep: bool) -> list[dict]:
    """What the hub lists below a folder."""
    found = {}
    for name, content in files.items():
        if folder and not name.startswith(folder + "/"):
            continue
        rest = name[len(folder) + 1:] if folder else name
        if "/" in rest and not deep:
            name = (folder + "/" if folder else "") + rest.split("/")[0]
            found[name] = {"type": "directory", "path": name, "oid": "0" * 40}
        else:
            found[name] = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    return list(found.values())


class Answers(http.server.BaseHTTPRequestHandler):
    """`server.sets` holds {"owner/name": {path: bytes}}, a branch of it under "owner/name@refs/convert/parquet"; those in `server.gated`
    want `server.token`."""

    def log_message(self, *args):
        pass

    def answer(self, code: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        self.server.asked.append((path, self.headers.get("Authorization", "")))
        parts = urllib.parse.unquote(path).removeprefix("/api").removeprefix("/datasets/").split("/")
        repo, sha = "/".join(parts[:2]), "b" * 40 if "b" * 40 in parts or "convert" in parts else "a" * 40
        files = self.server.sets.get(repo if sha[0] == "a" else f"{repo}@refs/convert/parquet")
        if files is None:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if repo in self.server.gated and self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self.answer(403, X_Error_Code="GatedRepo")
        if not path.startswith("/api"):
            return self.file(files, "/".join(parts[parts.index(sha) + 1 if sha in parts else 4:]), sha)
        if "tree" in parts:
            listed = children(files, "/".join(parts[4:]), "recursive=true" in query.lower())
            return self.answer(200, json.dumps(listed).encode(), Content_Type="application/json")
        stated = re.search(rb"^license: (\S+)", files.get("README.md", b""), re.M)
        facts = {"id": repo, "sha": sha, "gated": repo in self.server.gated, "private": False, "tags": [],
                 "cardData": {"license": stated[1].decode()} if stated else {}, "siblings": [{"rfilename": name} for name in files]}
        return self.answer(200, json.dumps(facts).encode(), Content_Type="application/json")

    do_HEAD = do_GET

    def file(self, files: dict[str, bytes], name: str, sha: str) -> None:
        if name not in files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        body, wanted = files[name], self.headers.get("Range")
        facts = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X_Repo_Commit": sha, "Accept_Ranges": "bytes"}
        if not wanted:
            return self.answer(200, body, **facts)
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        first, last = int(first), int(last or len(body) - 1)
        return self.answer(206, body[first:last + 1], Content_Range=f"bytes {first}-{last}/{len(body)}", **facts)


@contextmanager
def fake_hub(sets: dict[str, dict[str, bytes]], gated: tuple[str, ...] = (), token: str = ""):
    """The server, listening on a free port of this machine; its address is `server.url`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.sets, server.gated, server.token, server.asked = sets, gated, token, []
    server.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
