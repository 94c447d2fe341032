"""The server as its clients and its enemies meet it: the official client, schemathesis, disconnects, floods, hostile bytes, and the end.

Everything happens on the loopback interface with a tiny random model: what it says makes no sense, and how it is served is what counts.
"""
from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import pytest
from pydantic import BaseModel

from slm.guard import Rules
from slm.hostile import ATTACKS, attack, besiege, hear
from slm.serve import Background
from slm.serve_bench import is_settled, load, percentiles, right_answers
from slm.serving import Sizes

ROOT = Path(__file__).resolve().parents[1]
JSON = {"Content-Type": "application/json"}
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
TEXT = "/v1/completions"
PLAIN = {"verify": False}                              # no client needs certificates here, and to load them takes longer than to ask
PATIENCE = 120                                         # seconds until a test gives up: only paid when something is broken
HELLO = [{"role": "user", "content": "Who has a kite?"}]


def tiny(context_length: int = 256):
    from slm.config import ModelConfig, seed_everything
    from slm.model import TransformerLM
    from slm.sample import LM
    from slm.tokenizer import SPECIAL_TOKENS, BPETokenizer

    seed_everything(0)
    tok = BPETokenizer.train(["Mia has a red kite. Tom has a blue boat. " * 20], vocab_size=286, special_tokens=SPECIAL_TOKENS)
    return LM(TransformerLM(ModelConfig(vocab_size=286, context_length=context_length, n_layer=2, n_head=2, d_model=32)).eval(), tok)


@pytest.fixture(scope="module")
def lm():
    return tiny()


@contextlib.contextmanager
def serving(lm, seconds: float):
    """A server that gives a head and a body so much time."""
    background = Background(lm, "tiny", sizes=Sizes(slots=4), rules=Rules(head_seconds=seconds, body_seconds=seconds))
    with background as url:
        background.url = url
        yield background


@pytest.fixture(scope="module")
def server(lm):
    with serving(lm, PATIENCE) as background:
        background.service.forms.seconds = PATIENCE
        yield background


@pytest.fixture(scope="module")
def hasty_server(lm):
    """With limits that a test can wait for, and that an honest client keeps even when the machine stands still for a while."""
    with serving(lm, 2) as background:
        yield background


@pytest.fixture
def lonely_server(lm):
    """With no clients but those of one test: nobody else holds a line."""
    with serving(lm, PATIENCE) as background:
        yield background


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0)


def post(url: str, body, path: str = "/v1/completions", **headers) -> httpx.Response:
    data = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    return httpx.post(url + path, content=data, headers=JSON | headers, timeout=PATIENCE, **PLAIN)


def get(url: str, **more) -> httpx.Response:
    return httpx.get(url, timeout=PATIENCE, **PLAIN, **more)


def comes_true(condition, seconds: float = PATIENCE, pause: float = 0.01) -> bool:
    """Wait for a condition; whether it became true in time."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(pause)
    return bool(found)


def forgets_everybody(server) -> bool:
    """Whether a server has nothing to do any more for clients that have left: connections are accepted in the order in which they came."""
    get(server.url + "/health")
    state = server.server.server_state
    return comes_true(lambda: not state.connections and not state.tasks) and is_settled(server)


@contextlib.contextmanager
def standing_still(server):
    """The engine takes no step: who has a slot keeps it, and who waits goes on waiting, however fast or slow this machine is."""
    scheduler, go_on = server.service.scheduler, threading.Event()
    step = scheduler.step

    def late():
        go_on.wait()
        return step()

    scheduler.step = late
    try:
        yield scheduler
    finally:
        go_on.set()
        scheduler.step = step


# --------------------------------------------------------------------------------------------------- the official client
def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").owned_by == "slm"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat_is_what_the_package_says(client, lm):
    answer = client.chat.completions.create(model="tiny", messages=HELLO, seed=7, max_tokens=24, temperature=1.0)
    assert answer.choices[0].message.content == lm.chat(HELLO, seed=7, max_new_tokens=24, temperature=1.0)
    assert answer.usage.prompt_tokens == len(lm.chat_ids(HELLO)) and answer.usage.total_tokens == answer.usage.prompt_tokens + 24
    assert answer.choices[0].finish_reason == "length" and answer.object == "chat.completion"
    again = client.chat.completions.create(model="tiny", messages=HELLO, seed=7, max_completion_tokens=24, temperature=1.0)
    assert again.choices[0].message.content == answer.choices[0].message.content


def test_stream_with_usage(client, lm):
    stream = client.chat.completions.create(model="tiny", messages=HELLO, seed=3, max_tokens=20, stream=True,
                                            stream_options={"include_usage": True}, logprobs=True, top_logprobs=2)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 20
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == lm.chat(HELLO, seed=3, max_new_tokens=20)
    entries = [entry for c in chunks[:-1] if c.choices[0].logprobs for entry in c.choices[0].logprobs.content]
    assert len(entries) == 20 and all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)
    assert chunks[-2].choices[0].finish_reason == "length" and len({c.id for c in chunks}) == 1


def test_n_stop_and_seeds(client, lm):
    answer = client.completions.create(model="tiny", prompt="Mia has", n=3, seed=5, max_tokens=30, stop=[" a", "q"], temperature=1.0)
    expected = [lm.generate("Mia has", seed=5 + i, max_new_tokens=30, stop=(" a", "q"), temperature=1.0) for i in range(3)]
    assert [choice.text for choice in answer.choices] == expected and [choice.index for choice in answer.choices] == [0, 1, 2]
    several = client.completions.create(model="tiny", prompt=["Mia", "Tom"], seed=1, max_tokens=5)
    assert [c.text for c in several.choices] == [lm.generate(p, seed=1, max_new_tokens=5) for p in ("Mia", "Tom")]
    drawn = {client.completions.create(model="tiny", prompt="Mia", max_tokens=30, temperature=1.5).choices[0].text for _ in range(3)}
    assert len(drawn) > 1                            # without a seed, chance decides


def test_completions_echo_with_logprobs_as_harnesses_ask(client, lm):
    text = "Mia has a red kite."
    answer = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=1, temperature=0)
    scores = answer.choices[0].logprobs
    assert answer.choices[0].text == text == "".join(scores.tokens) and scores.text_offset[0] == 0
    told = lm.logits(lm.prompt_ids(text))[0, :-1, :lm.tokenizer.vocab_size].log_softmax(-1)
    wanted = [float(row[i]) for row, i in zip(told, lm.tokenizer.encode(text))]
    assert scores.token_logprobs == pytest.approx(wanted, abs=1e-4)
    ids = lm.tokenizer.encode(text)
    by_ids = client.completions.create(model="tiny", prompt=ids, max_tokens=1, echo=True, logprobs=0, temperature=0).choices[0].logprobs
    assert by_ids.token_logprobs[0] is None and len(by_ids.tokens) == len(ids) + 1


def test_penalties_change_what_is_written(client):
    plain, pushed = (client.completions.create(model="tiny", prompt="Mia", seed=1, max_tokens=60, temperature=0, **more).choices[0].text
                     for more in ({}, {"frequency_penalty": 2.0, "presence_penalty": 2.0}))
    assert len(set(pushed)) > len(set(plain))


def test_a_small_top_p_leaves_the_likeliest_token(client):
    greedy, narrow, wide = (client.completions.create(model="tiny", prompt="Mia", seed=1, max_tokens=30, **how).choices[0].text
                            for how in ({"temperature": 0}, {"temperature": 1.5, "top_p": 0.0001}, {"temperature": 1.5}))
    assert greedy == narrow != wide


class Kite(BaseModel):
    red: bool
    owner: str


@pytest.mark.skipif(find_spec("slm.constrain") is None, reason="needs slm.constrain")
def test_json_schema_through_the_client(client):
    parsed = client.chat.completions.parse(model="tiny", messages=HELLO, response_format=Kite, seed=1, max_tokens=200, temperature=1.0)
    choice = parsed.choices[0]
    assert choice.finish_reason == "length" or isinstance(choice.message.parsed, Kite)
    schema = {"type": "object", "properties": {"mood": {"enum": ["glad", "sad"]}}, "required": ["mood"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "mood", "schema": schema}}
    answer = client.chat.completions.create(model="tiny", messages=HELLO, response_format=form, seed=2, max_tokens=60)
    assert json.loads(answer.choices[0].message.content)["mood"] in ("glad", "sad")


@pytest.mark.parametrize("wrong,kind,status", [
    (dict(model="other"), openai.NotFoundError, 404), (dict(temperature=3), openai.UnprocessableEntityError, 422),
    (dict(messages=[]), openai.UnprocessableEntityError, 422), (dict(n=10**9), openai.UnprocessableEntityError, 422),
    (dict(tools=[{"type": "function", "function": {"name": "f"}}]), openai.UnprocessableEntityError, 422),
    (dict(messages=[{"role": "user", "content": "x" * 3000}]), openai.BadRequestError, 400),
    (dict(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}), openai.BadRequestError, 400),
    (dict(messages=[{"role": "user", "content": "x" * 2**21}]), openai.APIStatusError, 413),
])
def test_errors_are_the_clients_own(client, wrong, kind, status):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": HELLO, "max_tokens": 4} | wrong)
    assert caught.value.status_code == status and {"message", "type", "param", "code"} == set(caught.value.body)


def test_key_host_and_origin(lm):
    with Background(lm, "tiny", rules=Rules(api_key="s3cret")) as url:
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url + "/v1", api_key="wrong", max_retries=0).models.list()
        good = {"Authorization": "Bearer s3cret"}
        assert openai.OpenAI(base_url=url + "/v1", api_key="s3cret").models.list().data
        assert get(url + "/health").status_code == 200 and get(url + "/metrics").status_code == 401
        assert get(url + "/v1/models", headers=good | {"Host": "evil.example"}).status_code == 403
        assert get(url + "/v1/models", headers=good | {"Origin": "http://evil.example"}).status_code == 403
        assert get(url + "/v1/models", headers=good | {"Origin": url}).status_code == 200
        preflight = httpx.options(url + TEXT, headers={"Origin": "http://evil.example"}, timeout=PATIENCE)
        assert preflight.status_code == 403 and "access-control-allow-origin" not in preflight.headers


def test_tokenize_there_and_back(server, lm):
    ids = post(server.url, {"text": "Mia 😀 <|end|>"}, "/tokenize").json()
    assert ids["tokens"] == lm.tokenizer.encode("Mia 😀 <|end|>") and ids["count"] == len(ids["tokens"])
    assert post(server.url, {"tokens": ids["tokens"]}, "/detokenize").json() == {"text": "Mia 😀 <|end|>"}
    assert post(server.url, {"tokens": [10**6]}, "/detokenize").status_code == 404


def test_other_paths_speak_the_same_language(server):
    for path, method, status in (("/v1/responses", "POST", 404), ("/v1/completions", "GET", 405), ("/nothing", "GET", 404),
                                 ("/v1/models/..%2f..%2fetc", "GET", 404), ("/v1/models/a/b", "GET", 404)):
        answer = httpx.request(method, server.url + path, headers=JSON, content=b"{}", timeout=PATIENCE)
        assert answer.status_code == status and answer.json()["error"]["message"], path
    assert get(server.url + "/docs").text.count("<h2>") == 7 and get(server.url + "/openapi.json").json()["openapi"] == "3.1.0"


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"])
@pytest.mark.parametrize("value", [5e-324, 1e-113, 1.1754943508222875e-38])
def test_numbers_too_small_for_float32(server, name, value):
    answer = post(server.url, {"prompt": "Mia", "seed": 1, "max_tokens": 5, "temperature": 1.0, name: value})
    refused = name == "repetition_penalty"
    assert answer.status_code == (422 if refused else 200), answer.text


# ------------------------------------------------------------------------------------------------------ the document holds
def schemathesis(url: str, examples: int, folder: Path) -> subprocess.CompletedProcess:
    words = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run", url + "/openapi.json", "--url", url,
             "--max-examples", str(examples), "--seed", "1", "--no-color", "--request-timeout", "60",
             "--phases", "examples,coverage,fuzzing", "--suppress-health-check", "all"]
    return subprocess.run(words, capture_output=True, text=True, timeout=900, cwd=folder)


@pytest.fixture(scope="module")
def quiet_server():
    """As `server`, with answers so short that thousands of requests take little time."""
    from slm.serving import Service

    background = Background(tiny(4096), "tiny", sizes=Sizes(slots=8))
    with background as url:
        background.url, submit = url, background.service.scheduler.submit

        def brief(job):
            from dataclasses import replace

            job.sampling = replace(job.sampling, max_new_tokens=min(job.sampling.max_new_tokens, 2))
            submit(job)

        background.service.scheduler.submit = brief
        assert isinstance(background.service, Service)
        yield background


def test_schemathesis_finds_no_failure(quiet_server, tmp_path):
    done = schemathesis(quiet_server.url, 8, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
def test_schemathesis_at_length(quiet_server, tmp_path):
    done = schemathesis(quiet_server.url, 200, tmp_path)
    assert done.returncode == 0, done.stdout[-6000:]


# ------------------------------------------------------------------------------------------------------ clients that leave
async def stream_until(url: str, tokens: int, number: int, **fields) -> int:
    """Read so many events of a long stream, then hang up; how many came."""
    body = {"prompt": "Mia", "stream": True, "max_tokens": 10**5, "user": str(number)} | fields
    seen = 0
    async with httpx.AsyncClient(timeout=PATIENCE, **PLAIN) as http:
        async with http.stream("POST", url + "/v1/completions", json=body) as answer:
            if tokens == 0:
                return 0
            async for line in answer.aiter_lines():
                seen += line.startswith("data: {")
                if seen >= tokens:
                    return seen
    return seen


def tokens_written(server) -> float:
    return server.service.meters.counters["tokens"]._value.get()


def test_a_client_that_leaves_frees_its_slot(lonely_server, lm):
    """50 clients hang up after 0, 1 or 5 events, streaming or not, in a slot or in the queue; a neighbour is not disturbed."""
    async def leave_whole(number: int) -> None:
        try:
            async with httpx.AsyncClient(timeout=0.05 + number / 200) as http:
                await http.post(lonely_server.url + "/v1/completions", json={"prompt": "Tom", "max_tokens": 10**5})
        except httpx.TimeoutException:
            pass

    async def stay() -> list[str]:
        async with httpx.AsyncClient(timeout=PATIENCE, **PLAIN) as http:
            asked = [http.post(lonely_server.url + "/v1/completions", json={"prompt": "Mia", "seed": i, "max_tokens": 20, "user": "stays"})
                     for i in range(6)]
            return [answer.json()["choices"][0]["text"] for answer in await asyncio.gather(*asked)]

    async def everybody():
        leaving = [stream_until(lonely_server.url, (0, 1, 5)[i % 3], i) for i in range(30)] + [leave_whole(i) for i in range(20)]
        return (await asyncio.gather(stay(), *leaving))[0]

    assert asyncio.run(everybody()) == [lm.generate("Mia", seed=i, max_new_tokens=20) for i in range(6)]
    assert forgets_everybody(lonely_server)
    before = tokens_written(lonely_server)
    time.sleep(0.3)
    assert tokens_written(lonely_server) == before                                         # nothing is written for nobody


def test_a_client_that_never_reads_frees_its_slot(server):
    body = json.dumps({"prompt": "Mia", "stream": True, "max_tokens": 10**5, "logprobs": 20, "n": 4}).encode()
    before = tokens_written(server)
    with socket.create_connection(server.socket.getsockname()) as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        assert comes_true(lambda: tokens_written(server) > before)                 # it has a slot by now
        assert is_settled(server) and post(server.url, {"prompt": "Tom", "max_tokens": 2}).status_code == 200


def test_a_full_queue_says_429_and_when_to_return(lm):
    """One slot, two places to wait, twelve requests: the first has its slot before the others come, so exactly three are answered."""
    background = Background(lm, "tiny", sizes=Sizes(slots=1, max_waiting=2))
    with background as url, ThreadPoolExecutor(12) as pool:
        with standing_still(background) as scheduler:
            asked = [pool.submit(post, url, {"prompt": "Mia", "max_tokens": 20})]
            assert comes_true(lambda: len(scheduler.running) == 1)
            asked += [pool.submit(post, url, {"prompt": "Mia", "max_tokens": 20}) for _ in range(11)]
            assert comes_true(lambda: sum(one.done() for one in asked) == 9) and len(scheduler.mail.waiting) == 2
            refused = [one.result() for one in asked if one.done()]
        assert sorted(one.result().status_code for one in asked) == [200] * 3 + [429] * 9 and asked[0].result().status_code == 200
        assert all(int(a.headers["Retry-After"]) >= 1 and a.json()["error"]["type"] == "rate_limit_error" for a in refused)
        assert is_settled(background)


def test_busy_and_loading_are_the_clients_own_errors(lm):
    loaded = threading.Event()
    background = Background(lambda: loaded.wait(PATIENCE) and lm, "tiny", sizes=Sizes(slots=1, max_waiting=1))
    with ThreadPoolExecutor(8) as pool:
        entering = pool.submit(background.__enter__)
        assert comes_true(lambda: hasattr(background, "socket"))
        client = openai.OpenAI(base_url="http://{}:{}/v1".format(*background.socket.getsockname()), api_key="any", max_retries=0)
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model="tiny", prompt="Mia")
        assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"]
        loaded.set()
        entering.result()
        ask = lambda: pool.submit(client.completions.create, model="tiny", prompt="Mia", max_tokens=20)
        with standing_still(background) as scheduler:
            asked = [ask()]
            assert comes_true(lambda: len(scheduler.running) == 1)                  # one in the slot, one waits, four are too many
            asked += [ask() for _ in range(5)]
            assert comes_true(lambda: sum(one.done() for one in asked) == 4)
        kinds = [type(one.exception()) for one in asked]
        assert kinds.count(openai.RateLimitError) == 4 and kinds.count(type(None)) == 2
        background.__exit__()


def test_a_slot_is_free_within_two_steps(lm):
    """The engine's own count: after `cancel` at most the step that is being taken ends, then the slot is another's."""
    from slm.engine import Engine
    from slm.scheduler import Job, Scheduler
    from slm.strategies import Sampling

    scheduler = Scheduler(lambda: Engine(lm, slots=2), slots=2).start()
    for _ in range(50):
        events: list = []
        job = Job(lm.prompt_ids("Mia"), Sampling(max_new_tokens=200), heard=events.append)
        scheduler.submit(job)
        assert comes_true(lambda events=events: len(events) >= 5, pause=0)
        scheduler.cancel(job)
        before = len(events)
        assert comes_true(lambda job=job: job.over, pause=0)
        assert len(events) <= before + 2
    scheduler.close()
    assert scheduler.join(PATIENCE)


# -------------------------------------------------------------------------------------------------------------- hostile input
@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_input_is_refused_and_hurts_nobody(hasty_server, name):
    """Who sends slowly is cut off before all has come; and nothing costs seconds of the processor, to which other programs add none."""
    began = time.process_time()
    (told, status, said, _), *ill = besiege(hasty_server, [name])
    assert told == name and not ill and status in ATTACKS[name].allowed, (status, said)
    assert said and time.process_time() - began < 8 and is_settled(hasty_server)


def test_one_connection_too_many_hears_429(lm):
    with Background(lm, "tiny", rules=Rules(max_connections=3, head_seconds=PATIENCE)) as url:
        held = [socket.create_connection(address_of(url)) for _ in range(3)]        # accepted in this order, before what comes now
        answer = get(url + "/health")
        assert answer.status_code == 429 and answer.headers["Retry-After"] == "1" and answer.json()["error"]["code"] == "crowded"
        for one in held:
            one.close()
        assert comes_true(lambda: get(url + "/health").status_code == 200)


def test_slow_loris_is_closed_and_disturbs_nobody(hasty_server):
    with httpx.Client(timeout=PATIENCE) as http:
        ask, sockets = lambda: http.get(hasty_server.url + "/health"), []
        quiet = times_of(ask, 20)[50]
        for _ in range(150):
            sockets.append(socket.create_connection(hasty_server.socket.getsockname()))
            sockets[-1].sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        assert times_of(ask, 20)[50] < 300 + 20 * quiet                              # ms, in the middle: a few may be late by chance
    for one in sockets:
        one.settimeout(PATIENCE)
        assert hear(one).startswith(b"HTTP/1.1 408")                                  # and then closed
        one.close()


def test_health_answers_while_a_megabyte_is_read(server):
    async def both():
        times, codes = [], []
        async with httpx.AsyncClient(timeout=PATIENCE, **PLAIN) as http:
            while len(times) < 20:                                                   # so many that the middle one is no accident
                big = asyncio.create_task(http.post(server.url + "/tokenize", json={"text": "word " * 200_000}))
                while not big.done():
                    began = time.monotonic()
                    await http.get(server.url + "/health")
                    times.append(time.monotonic() - began)
                    await asyncio.sleep(0.01)
                codes.append((await big).status_code)
        return times, codes

    times, codes = asyncio.run(both())
    assert set(codes) == {200} and sorted(times)[len(times) // 2] < 0.25


@pytest.mark.parametrize("extra,status", [(0, 400), (-1, 200)])
def test_prompts_at_the_edge_of_the_context(server, extra, status):
    answer = post(server.url, {"prompt": [5] * (256 + extra), "max_tokens": 50})
    assert answer.status_code == status
    if status == 200:
        assert answer.json()["choices"][0]["finish_reason"] == "length" and answer.json()["usage"]["completion_tokens"] == 1


# ------------------------------------------------------------------------------------------------------- start and end
@pytest.fixture(scope="module")
def folder(lm, tmp_path_factory):
    return tiny(4096).save(tmp_path_factory.mktemp("served") / "tiny")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "consolidated.pth"])
def test_code_in_a_file_of_weights_is_never_run(tmp_path, name):
    """A pickle that would make a file, under each name that weights go by."""
    from slm.config import SLMError
    from slm.sample import load

    mark = tmp_path / "mark"
    bad = tmp_path / "model" / name
    bad.parent.mkdir()
    bad.write_bytes(b"cos\nsystem\n(S'touch " + str(mark).encode() + b"'\ntR.")
    (bad.parent / "config.json").write_text("{}")
    for path in (bad.parent, bad):
        with pytest.raises(SLMError):
            load(path)
    assert not mark.exists()


def start(folder: Path, port: int = 0) -> tuple[subprocess.Popen, str]:
    words = [sys.executable, "-c", "from slm.cli import main; main()", "serve", str(folder), "--port", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    said = "".join(process.stdout.readline() for _ in range(5))
    url = re.search(r"http://\S+:\d+", said)[0]
    assert "chat page" in said
    while get(url + "/health").json()["status"] == "loading":       # the first waits for torch
        time.sleep(0.05)
    return process, url


def lonely_port() -> int:
    """A free port below those that systems give out by themselves (from 32768): nobody is given it while it is free for a moment."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def test_the_port_is_free_after_a_kill_and_sigterm_ends_streams_cleanly(folder):
    port, ends = lonely_port(), []
    process, url = start(folder, port)
    process.kill(), process.wait()
    process, url = start(folder, port)                                              # at once, on the same port
    assert get(url + "/health").status_code == 200

    async def listen(number: int, begun: asyncio.Event) -> None:
        last = ""
        async with httpx.AsyncClient(timeout=PATIENCE, **PLAIN) as http:
            body = {"prompt": "Mia's secret", "stream": True, "max_tokens": 4000, "seed": number}
            async with http.stream("POST", url + TEXT, json=body) as answer:
                async for line in answer.aiter_lines():
                    begun.set()
                    last = line or last
        ends.append(last)

    async def scene() -> float:
        begun = [asyncio.Event() for _ in range(4)]
        listeners = [asyncio.create_task(listen(i, event)) for i, event in enumerate(begun)]
        await asyncio.gather(*(event.wait() for event in begun))                    # all four are being written
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        await asyncio.gather(*listeners)
        return time.monotonic() - began

    assert asyncio.run(scene()) < 30 and process.wait(PATIENCE) == 0
    assert len(ends) == 4 and all(end == "data: [DONE]" or "shutting down" in end for end in ends), ends
    log = process.stderr.read() + process.stdout.read()
    assert "Traceback" not in log and "secret" not in log                            # not a word of what was asked


# ----------------------------------------------------------------------------------------------------------------- load
def test_64_clients_for_a_few_seconds(lm):
    background = Background(lm, "tiny", sizes=Sizes(slots=16))
    with background:
        seen = load(background, right_answers(lm, 24), 3, 64, 24)
    assert not seen["errors"] and seen["wrong"] == 0 and not seen["leaked"] and seen["answers"] >= 16, seen


def test_many_clients_at_once(lm):
    """300 requests in the same moment: each is answered, or refused with 429."""
    background = Background(lm, "tiny", sizes=Sizes(slots=16))
    with background as url:
        async def everybody():
            async with httpx.AsyncClient(timeout=PATIENCE, limits=httpx.Limits(max_connections=None)) as http:
                asked = [http.post(url + TEXT, json={"prompt": "Mia", "max_tokens": 4, "user": str(i)}) for i in range(300)]
                return [answer.status_code for answer in await asyncio.gather(*asked)]

        codes = asyncio.run(everybody())
        assert set(codes) <= {200, 429} and codes.count(200) >= 256 and is_settled(background)      # as many as may wait, at least


def trained_like(d_model: int = 288):
    """A model of 15 million parameters with random weights: the size at which speed is quoted."""
    from slm.config import ModelConfig, seed_everything
    from slm.model import TransformerLM
    from slm.sample import LM

    seed_everything(0)
    tok = tiny().tokenizer
    config = ModelConfig(vocab_size=32000, context_length=256, n_layer=6, n_head=6, d_model=d_model, d_ff=768)
    return LM(TransformerLM(config).eval(), tok)


@pytest.mark.slow
def test_64_clients_for_a_minute():
    """The full minute; its figures go to nbs/results/serve.json, which the notebook shows."""
    from slm.ground import describe_machine

    lm = trained_like()
    known = right_answers(lm, 48)
    background = Background(lm, "tiny", sizes=Sizes(slots=32))
    with background:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        alone = load(background, known, 10, 1, 48, moody=False)
        seen = load(background, known, 60, 64, 48)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
    facts = {"alone": alone, "together": seen, "ratio": seen["tokens_per_second"] / alone["tokens_per_second"], "grown_mb": grown,
             "machine": describe_machine()}
    (ROOT / "nbs" / "results" / "serve.json").write_text(json.dumps(facts) + "\n")
    assert not seen["errors"] and seen["wrong"] == 0 and not seen["leaked"], seen
    assert facts["ratio"] >= 3, facts


# --------------------------------------------------------------------------------------------------------- long and many (slow)
def note(name: str, **facts) -> None:
    """Keep a trial's figures, which the notebook shows."""
    path = ROOT / "nbs" / "results" / "serve_trials.json"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | {name: facts}, indent=1) + "\n")


def megabytes(process: subprocess.Popen) -> float:
    """Memory that a process holds."""
    return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def address_of(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rsplit(":", 1)[1])


def times_of(work, n: int) -> list[float]:
    """Percentiles, in ms, of n calls one after the other."""
    found = []
    for _ in range(n):
        began = time.perf_counter()
        assert work().status_code == 200
        found.append(1000 * (time.perf_counter() - began))
    return percentiles(found)


@pytest.fixture
def served(folder):
    process, url = start(folder)
    yield process, url
    process.terminate()
    assert process.wait(PATIENCE) == 0
    log = process.stderr.read()
    assert "Traceback" not in log, log[-2000:]


def test_small_answers_do_not_wait_for_acknowledgements(served):
    """40 ms a packet, when the kernel collects small ones: then none is fast; otherwise some are, on a busy machine too."""
    with httpx.Client(timeout=PATIENCE) as http:
        ask = lambda: http.get(served[1] + "/health")
        times_of(ask, 20)                                                            # the first packets of a connection are never collected
        assert times_of(ask, 50)[10] < 30


@pytest.mark.slow
def test_a_thousand_clients_at_once(served):
    """1000 streams asked for in the same moment: each is written to its end or refused with 429, and memory comes back."""
    process, url = served

    async def one(http: httpx.AsyncClient, number: int) -> int:
        body = {"prompt": "Mia", "max_tokens": 8, "stream": True, "user": str(number)}
        async with http.stream("POST", url + TEXT, json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]" if answer.status_code == 200 else int(answer.headers["Retry-After"]) >= 1
            return answer.status_code

    async def everybody(n: int) -> list[int]:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as http:
            return await asyncio.gather(*(one(http, i) for i in range(n)))

    asyncio.run(everybody(1000))                                                     # so that everything has its size
    before = megabytes(process)
    began = time.monotonic()
    codes = asyncio.run(everybody(1000))
    took = time.monotonic() - began
    after = megabytes(process)
    counts = {str(code): codes.count(code) for code in sorted(set(codes))}
    note("a thousand clients", statuses=counts, seconds=round(took, 1), mb_before=round(before), mb_after=round(after))
    assert set(codes) <= {200, 429} and codes.count(200) >= 264 and abs(after / before - 1) < 0.1


@pytest.mark.slow
def test_a_thousand_idle_connections(served):
    process, url = served
    with httpx.Client() as http:
        quiet = times_of(lambda: http.get(url + "/health"), 300)
        idle = [socket.create_connection(address_of(url)) for _ in range(1000)]
        busy = times_of(lambda: http.get(url + "/health"), 300)
        assert http.post(url + TEXT, json={"prompt": "Mia", "max_tokens": 4}).status_code == 200
    note("a thousand idle connections", health_p99_ms=round(busy[99], 1), without_them_ms=round(quiet[99], 1))
    assert busy[99] < 100
    for one in idle:
        one.settimeout(15)
        assert one.recv(10) == b""                                                   # closed, as nothing was ever asked
        one.close()


@pytest.mark.slow
def test_slow_heads_and_bodies_hardly_delay_others(served):
    """500 heads and 200 bodies that come a byte every half second."""
    _, url = served
    body = POST + b"Content-Length: 1000\r\n\r\n{"
    starts = [b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "] * 500 + [body] * 200
    over = threading.Event()

    def drip() -> None:
        lines = [socket.create_connection(address_of(url)) for _ in starts]
        for line, begin in zip(lines, starts):
            line.sendall(begin)
        while not over.wait(0.5):
            for i, line in enumerate(lines):
                try:
                    line.send(b"a")
                except OSError:                                                      # closed by the server: come again
                    lines[i] = socket.create_connection(address_of(url))
                    lines[i].sendall(starts[i])
        for line in lines:
            line.close()

    with httpx.Client() as http:
        def work():
            return http.post(url + TEXT, json={"prompt": "Mia", "max_tokens": 16, "seed": 1})

        times_of(work, 50)
        quiet = times_of(work, 300)
        dripping = threading.Thread(target=drip)
        dripping.start()
        time.sleep(2)
        under = times_of(work, 300)
        over.set()
        dripping.join()
    note("slow heads and bodies", p50_ms=round(under[50], 1), p99_ms=round(under[99], 1), p50_without_ms=round(quiet[50], 1),
         p99_without_ms=round(quiet[99], 1))
    assert under[99] < 2 * quiet[99], (quiet[50], quiet[99], under[50], under[99])


def keep_busy(url: str, everything: bool) -> None:
    """A megabyte of text, again and again; with `everything` also eight long answers, and new schemas."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string", "pattern": "[a-z]{1,40}"} for i in range(20)}}
    works = [("/tokenize", lambda i: {"text": "word " * 200_000})]
    works += [(TEXT, lambda i: {"prompt": "Mia", "max_tokens": 200})] * 8 * everything
    works += everything * [("/v1/chat/completions", lambda i: {"messages": HELLO, "max_tokens": 4, "response_format": {
        "type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"title": str(i)}}}})]

    def keep(path: str, make) -> None:
        with httpx.Client(timeout=60) as http:
            for number in range(10**6):
                http.post(url + path, json=make(number))

    for path, make in works:
        threading.Thread(target=keep, args=(path, make), daemon=True).start()
    threading.Event().wait(120)


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True], ids=["a_megabyte", "everything"])
def test_health_answers_in_time(served, everything):
    """While a megabyte is tokenised, or all slots are busy and schemas compiled as well; the clients are another process."""
    _, url = served
    clients = multiprocessing.get_context("spawn").Process(target=keep_busy, args=(url, everything), daemon=True)
    clients.start()
    with httpx.Client() as http:
        time.sleep(3)
        while everything and "slm_active 8.0" not in http.get(url + "/metrics").text:
            time.sleep(0.1)
        found = times_of(lambda: http.get(url + "/health"), 500)
    clients.kill(), clients.join()
    name = "health while busy" if everything else "health during a megabyte"
    note(name, p50_ms=round(found[50], 1), p99_ms=round(found[99], 1))
    assert found[99] < 100


@pytest.mark.slow
def test_soak(served):
    """A mixed run of 24 minutes (SLM_SOAK_MINUTES): answers, streams, people who leave, new schemas, attacks. Memory must not grow."""
    process, url = served
    minutes, number, rows = float(os.environ.get("SLM_SOAK_MINUTES", "24")), 0, []
    names = [name for name, one in ATTACKS.items() if not one.trickle and len(one.raw) < 2**20]
    began = time.monotonic()
    with httpx.Client(timeout=60) as http:
        while (now := time.monotonic() - began) < 60 * minutes:
            number += 1
            if not rows or now - rows[-1][0] > 10:
                rows.append((now, megabytes(process)))
            properties = {f"p{number}": {"enum": ["a", "b"]}}
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "properties": properties}}}
            assert http.post(url + TEXT, json={"prompt": f"Mia {number}", "max_tokens": 12, "n": 2, "logprobs": 3}).status_code == 200
            http.post(url + "/v1/chat/completions", json={"messages": HELLO, "max_tokens": 8, "response_format": form})
            asyncio.run(stream_until(url, number % 6, number))                       # hangs up
            attack(address_of(url), ATTACKS[names[number % len(names)]])
            http.post(url + "/tokenize", json={"text": f"word {number} " * 300})
            time.sleep(0.1)
        assert http.get(url + "/health").json() == {"status": "ok"}
    late = rows[len(rows) // 4:]                                                     # the caches are full by then
    mean = [sum(column) / len(late) for column in zip(*late)]
    slope = 60 * sum((t - mean[0]) * (mb - mean[1]) for t, mb in late) / sum((t - mean[0]) ** 2 for t, _ in late)
    note("soak", minutes=round(minutes, 1), rounds=number, mb_first=round(rows[0][1]), mb_quarter=round(late[0][1]),
         mb_last=round(rows[-1][1]), mb_per_minute=round(slope, 3))
    assert slope < 1
