"""The chat page in a real browser: send, stream, stop, retry, edit, alternatives at a token, history after a reload, narrow screens.

Chromium is driven through its debugging pipe (two file descriptors, JSON messages that end with a zero byte), so no driver and no library
is needed. Without a Chromium the tests are skipped. `SLM_SHOTS=folder` keeps the screenshots.
"""
from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", "--remote-debugging-pipe", "--window-size=1180,820", "--hide-scrollbars"]
STORY = ("# The Red Kite\n\nOnce upon a time a fox named **WHO** had a *red kite*. One day the wind HOW.\n\n"
         "- He looked by the river.\n- He looked WHERE.\n\n> \"There it is!\" said HELPER.\n\n"
         "WHO said `thank you`, and they flew it together until WHEN.")
CHANCES = {"WHO": ["Tom", "Tom", "Finn", "Pip"], "HOW": ["took it", "took it", "blew it away", "was too strong"],
           "WHERE": ["on the hill", "on the hill", "in the woods", "behind the old mill"],
           "WHEN": ["the sun went down", "the sun went down", "it was dark", "the stars came out"],
           "HELPER": ["Mia", "Mia", "the owl", "his friend Mia"]}
PATIENCE = 120                                             # seconds until a test gives up: only paid when something is broken
TALKS = [("Tell me a story about a fox who lost a kite.", STORY),
         ("Who is your best friend?", "My best friend is Mia. She has a blue boat."),
         ("Who has the kite?", "Tom has the kite, and Mia has the string."), ("Is it red?", "Yes, it is red 🪁 and very fast.")]


def told(text: str, chance: random.Random) -> str:
    """The text with every open place filled by chance, so that there is something to be unsure about."""
    for place, words in CHANCES.items():
        text = text.replace(place, chance.choice(words))
    return text


class Browser:
    """A Chromium with one page. `run` evaluates JavaScript in it and waits for promises."""

    def __init__(self, folder: Path):
        down, self.into = os.pipe()
        self.out, up = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (down, up)]
        self.process = subprocess.Popen([CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"], pass_fds=(3, 4),
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                        preexec_fn=lambda: [os.dup2(fd, place) for fd, place in zip(high, (3, 4))])
        for fd in high:
            os.close(fd)
        os.close(down), os.close(up)
        self.number, self.held, self.session, self.said = 0, b"", None, []
        while not (pages := [t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page"]):
            time.sleep(0.05)                               # the browser speaks before its first page is there
        self.session = self.send("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params) -> dict:
        answer = self.answer_to(method, **params)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def answer_to(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params} | ({"sessionId": self.session} if self.session else {})
        os.write(self.into, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive()
            if answer.get("id") == self.number:
                return answer
            if answer.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(json.dumps(answer["params"]))

    def receive(self) -> dict:
        while b"\0" not in self.held:
            assert select.select([self.out], [], [], PATIENCE)[0], "the browser says nothing any more"
            more = os.read(self.out, 2**16)
            assert more, "the browser has ended"
            self.held += more
        one, _, self.held = self.held.partition(b"\0")
        return json.loads(one)

    def run(self, code: str):
        found = self.send("Runtime.evaluate", expression=f"(async () => {{ {code} }})()", awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def holds(self, condition: str) -> bool:
        """Whether something is true on the page; it is not while one page gives way to the next."""
        found = self.answer_to("Runtime.evaluate", expression=f"!!({condition})", returnByValue=True)
        return found.get("result", {}).get("result", {}).get("value") is True

    def wait(self, condition: str) -> None:
        end = time.monotonic() + PATIENCE
        while not self.holds(condition):
            assert time.monotonic() < end, f"never true: {condition}; page: {self.run('return document.body.innerText')[:500]}; {self.said}"
            time.sleep(0.03)

    def open(self, url: str) -> None:
        self.run("window.left = true")                     # `navigate` answers while the old page can still be asked
        self.send("Page.navigate", url=url)
        self.wait("!window.left && document.readyState === 'complete' && document.querySelector('#log > *')")

    def key(self, key: str, code: str = "", **more) -> None:
        virtual = {"Enter": 13, "Escape": 27, "ArrowRight": 39, "ArrowLeft": 37, "ArrowUp": 38}.get(key, 0)
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=code or key, windowsVirtualKeyCode=virtual, **more,
                      **(text if kind == "keyDown" else {}))

    def type(self, text: str) -> None:
        self.run("document.getElementById('words').focus()")
        self.send("Input.insertText", text=text)

    def mouse(self, x: float, y: float, press: bool = False) -> None:
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for kind in ("mousePressed", "mouseReleased") if press else ():
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def at(self, selector: str, n: int = 0) -> tuple[float, float]:
        return tuple(self.run(f"const r = document.querySelectorAll({json.dumps(selector)})[{n}].getClientRects()[0];"
                              "return [r.x + r.width / 2, r.y + r.height / 2]"))

    def click(self, selector: str, n: int = 0) -> None:
        self.mouse(*self.at(selector, n), press=True)

    def shot(self, name: str) -> bytes:
        data = base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])
        if folder := os.environ.get("SLM_SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            Path(folder, f"{name}.png").write_bytes(data)
        return data

    def close(self) -> None:
        os.close(self.into)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.out)


def parrot():
    """A model that has learned a few talks by heart, in some seconds."""
    from slm.config import ModelConfig, seed_everything
    from slm.model import TransformerLM
    from slm.sample import LM
    from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer, render_chat

    seed_everything(0)
    chance = random.Random(0)
    tok = BPETokenizer.train([" ".join(" ".join((q, told(a, chance))) for q, a in TALKS) for _ in range(9)], vocab_size=480,
                             special_tokens=SPECIAL_TOKENS, strict=False)
    model = TransformerLM(ModelConfig(vocab_size=tok.vocab_size, context_length=256, n_layer=2, n_head=2, d_model=96))
    optimizer, end = torch.optim.AdamW(model.parameters(), lr=3e-3), -100
    for _ in range(140):
        talks = [(q, told(a, chance)) for q, a in (*TALKS[:1] * 2, *TALKS)]
        rows = [render_chat(tok, [{"role": "user", "content": q}, {"role": "assistant", "content": a}]) for q, a in talks]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([i + [0] * (width - len(i)) for i, _ in rows])
        labels = torch.tensor([[t if m else end for t, m in zip(i, mask)] + [end] * (width - len(i)) for i, mask in rows])
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), labels[:, 1:].flatten(), ignore_index=end)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return LM(model.eval(), tok)


@pytest.fixture(scope="module")
def server():
    from slm.serve import Background

    background = Background(parrot(), "parrot")
    with background as url:
        background.url = url
        yield background


@pytest.fixture
def page(server, tmp_path):
    browser = Browser(tmp_path)
    browser.open(server.url)
    browser.run("localStorage.setItem('slm-settings', JSON.stringify({ temperature: 0.7, seed: '1' }))")
    browser.open(server.url)
    yield browser
    wrong = [line for line in browser.said if "favicon" not in line and "status of 4" not in line]    # 4…: refusals
    browser.close()
    assert not wrong, wrong                         # no exception in the script, nothing that the policy had to stop


@contextlib.contextmanager
def after_steps(server, n: int):
    """The engine takes n steps and then stands still until the block is left, however fast or slow this machine is."""
    scheduler, go_on, taken = server.service.scheduler, threading.Event(), []
    step = scheduler.step

    def counted():
        taken.append(1)
        if len(taken) > n:
            go_on.wait()
        return step()

    scheduler.step = counted
    try:
        yield scheduler
    finally:
        go_on.set()
        scheduler.step = step


def comes_true(condition) -> bool:
    end = time.monotonic() + PATIENCE
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return bool(condition())


DONE = "!document.getElementById('send').hidden && document.querySelectorAll('.assistant').length"
STILL = "document.getAnimations().length === 0"
LAST = "[...document.querySelectorAll('.assistant .said')].at(-1).innerText"


def ask(page, text: str) -> str:
    before = page.run("return document.querySelectorAll('.assistant').length")
    page.type(text)
    page.key("Enter")
    page.wait(f"{DONE} > {before}")
    return page.run(f"return {LAST}")


def test_send_stream_and_reload(page, server):
    page.shot("light-hello")
    page.type(TALKS[0][0])
    with after_steps(server, 12):
        page.key("Enter")
        page.wait("document.querySelector('.assistant .said')?.innerText.length > 3")       # the answer comes piece by piece
        part = page.run(f"return {LAST}")
        assert not page.holds(DONE)
    page.wait(DONE)
    said = page.run(f"return {LAST}")
    assert 3 < len(part) < len(said) / 2
    assert "The Red Kite" in said and "#" not in said and "**" not in said
    assert page.run("return ['h3', 'strong', 'em', 'li', 'blockquote', 'code'].every(t => document.querySelector('.assistant ' + t))")
    assert "tokens/s" in page.run("return document.querySelector('.assistant .tools').innerText")
    page.wait("document.getElementById('room').innerText.includes('of 256 tokens')")
    page.shot("light-talk")
    page.run("document.getElementById('new').click()")
    second = ask(page, TALKS[1][0])
    page.open(server.url)                             # everything is still there
    assert page.run("return document.querySelectorAll('.turn').length") == 2 and page.run(f"return {LAST}") == second
    assert page.run("return document.querySelectorAll('#chats .open').length") == 2
    page.click("#chats .open", 1)
    page.wait(f"{LAST} === {json.dumps(said)}")


def test_alternatives_at_a_token_and_branches(page):
    said = ask(page, TALKS[2][0])
    n = page.run("return document.querySelectorAll('.assistant .t').length")
    assert "".join(page.run("return [...document.querySelectorAll('.assistant .t')].map(t => t.textContent)")) == said and n > 5
    page.mouse(*page.at(".assistant .t", 2))
    page.wait("!document.getElementById('card').hidden")
    card = page.run("return document.getElementById('card').innerText")
    assert "%" in card and page.run("return document.querySelectorAll('#card button').length") >= 6
    page.shot("light-card")
    page.click("#card button", 3)                       # take another token there
    page.wait("document.querySelector('.assistant .tools').innerText.includes('2 / 2')")
    assert page.run(f"return {LAST}") != said
    page.click(".assistant .tools button[title='Earlier version']")
    page.wait(f"{LAST} === {json.dumps(said)}")
    page.run("const out = () => document.getElementById('log').dispatchEvent(new PointerEvent('pointerout', { pointerType: 'mouse' }));"
             "out(), out()")                               # the mouse leaves one thing after another
    page.run("document.querySelector('.assistant .said').focus()")
    page.key("ArrowRight"), page.key("ArrowRight")
    page.run("await new Promise(done => setTimeout(done, 400))")           # longer than a card stays that the mouse has left: keys lead now
    assert page.run("return document.querySelector('.t.at').dataset.i") == "1"
    page.run("document.getElementById('log').dispatchEvent(new Event('scroll'))")             # a late scroll takes nothing away
    assert not page.run("return document.getElementById('card').hidden")
    page.key("Escape")
    assert page.run("return document.getElementById('card').hidden")
    ask(page, TALKS[0][0])
    page.click("#tint")
    page.mouse(5, 400)
    strength = page.run("return [...document.querySelectorAll('.assistant:last-child .t')].map(t => ["
                        "Number(t.style.getPropertyValue('--p')),"
                        "Number(getComputedStyle(t).backgroundColor.match(/[\\d.]+\\)$/)[0].slice(0, -1))])")
    assert min(p for p, _ in strength) < 0.6 < 0.95 < max(p for p, _ in strength)          # unsure here and there, and it shows:
    assert all(abs(alpha - 0.75 * (1 - p)) < 0.02 for p, alpha in strength)
    page.shot("light-tint")


def test_stop_retry_edit_and_errors(page, server):
    said = ask(page, TALKS[0][0])
    assert "The Red Kite" in said
    with after_steps(server, 0) as scheduler:
        page.click(".assistant .tools button[title='Try again']")
        assert comes_true(lambda: scheduler.running)
        page.key("Escape")                              # stop at once: nothing of the answer is there yet
        page.wait(DONE)
    tools = page.run("return document.querySelector('.assistant .tools').innerText")
    assert "2 / 2" in tools and "stopped" in tools
    assert comes_true(lambda: not scheduler.running)    # stopping freed the slot
    page.mouse(*page.at(".user .said"))
    page.run("document.querySelector('.user .tools button[title^=Edit]').click()")
    page.shot("light-edit")
    page.run("const f = document.querySelector('.turn textarea'); f.value = " + json.dumps(TALKS[1][0]))
    page.run("document.querySelector('.turn .main').click()")
    page.wait("document.querySelectorAll('.assistant').length === 1 && !document.getElementById('send').hidden")
    assert TALKS[1][0] in page.run("return document.querySelector('.user .said').innerText")
    page.run("document.getElementById('new').click()")
    page.type("word " * 400)
    page.key("Enter")
    page.wait("document.querySelector('.fault')")
    assert "tokens" in page.run("return document.querySelector('.fault').innerText")
    assert page.run("return document.querySelector('.fault button').getClientRects()[0].height") < 45         # on one line
    page.shot("light-fault")


def test_dark_narrow_settings_and_deletion(page):
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    ask(page, TALKS[0][0])
    page.shot("dark-talk")
    page.click("#gear")
    page.wait("document.getElementById('settings').open")
    page.shot("dark-settings")
    page.key("Escape")
    page.send("Emulation.setDeviceMetricsOverride", width=380, height=760, deviceScaleFactor=1, mobile=True)
    page.wait(f"innerWidth === 380 && {STILL}")
    assert page.run("return document.documentElement.scrollWidth") <= 380          # nothing sticks out
    page.shot("dark-narrow")
    page.click(".assistant .t", 4)
    page.wait("!document.getElementById('card').hidden")
    page.shot("dark-narrow-card")
    page.key("Escape")
    page.run("document.getElementById('menu').click()")
    page.wait(STILL)
    page.shot("dark-drawer")
    page.run("window.confirm = () => true; document.querySelector('#chats .small').click()")
    page.wait(f"document.getElementById('hello') && {STILL}")
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    page.shot("light-narrow-hello")
    ask(page, TALKS[3][0])
    assert "🪁" in page.run(f"return {LAST}")
    page.shot("light-narrow")


def test_what_a_user_writes_never_becomes_html(page):
    evil = "<img src=x onerror=document.title='owned'> <script>document.title='owned'</script>"
    ask(page, evil)
    assert page.run("return document.title") != "owned"
    assert page.run("return document.querySelectorAll('#log img, #log script').length") == 0
    assert page.run("return document.querySelector('.user .said').textContent") == evil
    page.run("const s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s)")
    assert page.run("return window.ran") is None                              # the policy stops even a script that got in
    page.said.clear()


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("SLM_CHAT"), reason="SLM_CHAT names no model, such as checkpoints/story")
def test_picture_for_the_readme(tmp_path):
    """`SLM_SLOW=1 SLM_CHAT=checkpoints/story SLM_SHOTS=nbs/images pytest tests/test_chat_page.py -k picture` draws nbs/images/chat.png."""
    from slm.sample import load
    from slm.serve import Background

    with Background(load(os.environ["SLM_CHAT"]), "story") as url:
        browser = Browser(tmp_path)
        try:
            browser.send("Emulation.setDeviceMetricsOverride", width=1000, height=600, deviceScaleFactor=1, mobile=False)
            browser.open(url)
            settings = {"temperature": 0.7, "seed": "3", "max_tokens": 400}
            browser.run(f"localStorage.setItem('slm-settings', {json.dumps(json.dumps(settings))})")
            browser.open(url)
            browser.type("Write a story about a fox who lost a kite.")
            browser.key("Enter")
            browser.wait(f"{DONE} && document.querySelectorAll('.assistant .t').length")
            browser.click("#tint")
            unsure = browser.run("const all = [...document.querySelectorAll('.assistant .t')];"
                                 "const p = all.map(t => Number(t.style.getPropertyValue('--p')));"
                                 "return p.findIndex((p, i) => i > 25 && p > 0.1 && p < 0.4)")
            browser.run("document.getElementById('log').scrollTo({ top: 0, behavior: 'instant' })")
            browser.mouse(*browser.at(".assistant .t", unsure))
            browser.wait("!document.getElementById('card').hidden")
            assert len(browser.shot("chat")) > 10_000
        finally:
            browser.close()
