"""rsa.py --serve: OpenAI's own client, a server in between, and one behind it that fails on purpose."""
import asyncio
import collections
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch
from conftest import randomise
from test_endpoint import KEY, ROOT, FaultyServer, completion, reply_to

import rsa
from zaya import Tokenizer, Zaya, ZayaConfig

for name in ("openai", "starlette", "uvicorn", "httpx"):
    pytest.importorskip(name)

import openai                                                   # noqa: E402
import uvicorn                                                  # noqa: E402

SMALL = {"population": 5, "subset": 3, "rounds": 2, "budget": 9, "tail": 1, "seed": 3}
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "why?"}]


def reply_to_last(body):
    """As `reply_to`, which knows conversations of one message."""
    return completion(reply_to({**body, "messages": body["messages"][-1:]}),
                      usage={"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10})


@pytest.fixture(scope="module")
def behind():
    server = FaultyServer()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def serving(source, budget=rsa.BUDGETS["light"], tokenizer=None, build_prompt=rsa.report_prompt, model="m"):
    """A Server on a free port of this process -> itself, its URL."""
    application = rsa.Server(source, model, budget, tokenizer, build_prompt)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application, "127.0.0.1", port, log_level="warning", lifespan="off",
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, name="serve_forever", daemon=True)
    thread.start()
    wait_for(lambda: server.started)
    try:
        yield application, f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def front(behind, monkeypatch):
    """(the fake model's server, ours, its URL)"""
    monkeypatch.setattr(rsa.Endpoint, "back_off", 0.01)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("MY_KEY", "the server's own")
    behind.fresh(reply=reply_to_last)
    source = rsa.Endpoint(behind.url, "m", "MY_KEY", concurrency=4, timeout=30, retries=1)
    with serving(source) as (server, url):
        yield behind, server, url
        behind.release.set()
        settled(server)


def settled(server):
    """Wait until nothing is under way: no job, and no thread of one."""
    for _ in range(500):
        busy = [thread for thread in threading.enumerate() if "work" in thread.name or "run)" in thread.name]
        if not server.jobs and not busy:
            return
        time.sleep(0.02)
    raise AssertionError((server.jobs, busy))


def client(url, **options):
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=30, **options)


def create(url, model="m-mrsa", messages=TALK, rsa=SMALL, **more):
    return client(url).chat.completions.create(model=model, messages=messages, extra_body={"rsa": rsa}, **more)


def post(url, body, path="/chat/completions", **headers):
    """Without a client's help -> status, headers, bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers, refused.read()


def by_hand(behind, seed=3, **changes):
    """What the algorithm gives on the same model, asked in the same words."""
    source = rsa.Endpoint(behind.url, "m", concurrency=4)
    source.before = TALK[:-1]
    numbers = {key: value for key, value in {**SMALL, **changes}.items() if key != "seed"}
    return rsa.markovian_rsa("why?", source, **numbers, seed=seed, build_prompt=rsa.report_prompt)


# ---- what comes back ------------------------------------------------------------------------------------------------


def test_the_whole_conversation_is_solved_by_markovian_rsa(front):
    behind, _, url = front
    answer = create(url)
    assert len(behind.bodies) == 15 and set(behind.keys) == {f"Bearer {KEY}"}       # the caller's key
    assert all(body["messages"][:-1] == TALK[:-1] and body["max_tokens"] == 9 for body in behind.bodies)
    shown = [body["messages"][-1]["content"].count("Candidate solution") for body in behind.bodies]
    assert collections.Counter(shown) == {0: 5, 3: 10}
    behind.fresh(reply=reply_to_last)
    last = by_hand(behind).candidates
    answers = [rsa.final_answer(candidate.text) for candidate in last]
    best, votes = rsa.majority(answers)
    message, about = answer.choices[0].message, answer.rsa
    assert message.content == best and answer.choices[0].finish_reason == "stop" and answer.model == "m-mrsa"
    assert about["answer"] == best and about["votes"] == votes and about["failed"] == 0
    assert about["tokens"] == [15, 15, 15] and {key: about[key] for key in SMALL} == SMALL
    assert answer.usage.completion_tokens == 45 and answer.usage.prompt_tokens == 7 * 15
    assert 0 < answer.usage.completion_tokens_details.reasoning_tokens < 45
    lines = message.reasoning_content.split("\n")
    assert [line.split(",")[0] for line in lines[:3]] == ["round 0", "round 1", "round 2"]
    assert lines[2].startswith("round 2, rollouts: 1 2 3 4 5 | ") and f"{best} x{votes}" in lines[2]
    chosen = last[answers.index(best)].text
    assert lines[3] == chosen.split("</think>")[0].removeprefix("<think>")          # the first of the majority


def test_streaming_tells_the_same_as_it_happens(front):
    behind, _, url = front
    whole = create(url)
    behind.fresh(reply=reply_to_last)
    chunks = list(create(url, stream=True, stream_options={"include_usage": True}))
    reasoning = "".join(getattr(c.choices[0].delta, "reasoning_content", None) or "" for c in chunks if c.choices)
    content = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert content == whole.choices[0].message.content and reasoning == whole.choices[0].message.reasoning_content
    assert len({chunk.id for chunk in chunks}) == 1 and chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage == whole.usage and not chunks[-1].choices and chunks[-2].usage is None
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-2].rsa == whole.rsa
    assert len(chunks) >= 15 + 3                                # a piece for each rollout
    _, headers, raw = post(url, {"model": "m-mrsa", "messages": TALK, "rsa": SMALL, "stream": True})
    assert headers["Content-Type"].startswith("text/event-stream") and raw.endswith(b"data: [DONE]\n\n")
    assert b"usage" in raw                                      # also where nobody asked for it


@pytest.mark.parametrize("body, numbers", [
    ({"model": "m-mrsa"}, rsa.BUDGETS["light"]), ({"model": "m-mrsa-tiny"}, rsa.BUDGETS["tiny"]),
    ({"model": "m-mrsa-extra-high", "max_tokens": 50}, rsa.Budget(32, 4, 8, 50, 50)),
    ({"model": "m", "rsa": {}, "rsa_t": 1, "rsa_n": 3, "rsa_k": 2}, rsa.Budget(3, 2, 1, 40960, 4096)),
    ({"model": "m", "rsa": True}, rsa.BUDGETS["light"]),
    ({"model": "m-mrsa", "rsa": {"population": 2}, "max_completion_tokens": 7}, rsa.Budget(2, 2, 1, 7, 7)),
    ({"model": "m-mrsa-high", "rsa": {"rounds": 0, "budget": 5}, "max_tokens": 9}, rsa.Budget(16, 4, 0, 5, 5)),
])
def test_names_and_numbers_say_the_budget(front, body, numbers):
    behind, _, url = front
    status, _, raw = post(url, {"messages": TALK, "temperature": 0.5, "top_k": 40, "user": "me", **body})
    about = json.loads(raw)["rsa"]
    assert status == 200 and rsa.Budget(*(about[key] for key in rsa.Budget.__dataclass_fields__)) == numbers
    assert len(behind.bodies) == numbers.population * (numbers.rounds + 1)
    for asked in behind.bodies:
        assert asked["max_tokens"] == numbers.budget and (asked["temperature"], asked["top_k"]) == (0.5, 40)
        assert asked["model"] == "m" and "user" not in asked and "rsa" not in asked


def test_one_more_reply_instead_of_the_majority(front):
    behind, _, url = front
    answer = create(url, rsa={**SMALL, "select": "aggregate"})
    assert len(behind.bodies) == 16 and answer.rsa["tokens"] == [15, 15, 15, 3] and answer.rsa["select"] == "aggregate"
    last = behind.bodies[-1]
    assert last["messages"][-1]["content"].count("Candidate solution") == 3
    assert answer.choices[0].message.content == reply_to_last(last)["choices"][0]["message"]["content"][-1]


def test_parts_of_a_message_stay_beside_the_tails(front):
    behind, _, url = front
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
    create(url, messages=[{"role": "user", "content": [{"type": "text", "text": "why?"}, image]}])
    for body in behind.bodies:
        kept, text = body["messages"][0]["content"]
        assert kept == image and text["text"].startswith("why?")


def test_failures_are_counted_and_not_hidden(front):
    behind, _, url = front
    behind.fresh(lambda n, attempt, body: 400 if n in (1, 7) else None, reply_to_last)
    answer = create(url)
    assert answer.rsa["failed"] == 2 and answer.rsa["tokens"] == [12, 12, 15] and answer.usage.completion_tokens == 39
    assert all("400" in failure for failure in answer.rsa["failures"])


def test_an_answer_where_none_is_named(front):
    behind, _, url = front
    essay = "First line.\n\nSecond line, long enough to be no answer. " * 4
    behind.fresh(reply=lambda body: completion(f"<think>so</think>{essay}"))
    answer = create(url)
    assert answer.choices[0].message.content == essay.strip() and answer.rsa["answer"] is None
    behind.fresh(reply=lambda body: completion("<think>on and on", "length"))
    answer = create(url)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content == ""


# ---- what passes through --------------------------------------------------------------------------------------------


def test_the_model_itself_passes_through_untouched(front):
    behind, _, url = front
    asked = {"model": "m", "messages": TALK, "n": 2, "seed": 1, "tools": [{"type": "function"}], "new": [None, 1.5]}
    status, headers, raw = post(url, asked, Authorization=f"Bearer {KEY}")
    assert status == 200 and json.loads(raw) == reply_to_last(asked) and behind.bodies == [asked]
    assert behind.keys == [f"Bearer {KEY}"]
    for body in ({**asked, "rsa": False}, {**asked, "model": "m-mrsa-high", "rsa": False}):
        assert post(url, body)[0] == 200 and behind.bodies[-1] == asked
    assert behind.keys[-1] == "Bearer the server's own"         # of a caller without one
    behind.fresh(lambda n, attempt, body: "events")
    _, headers, raw = post(url, {**asked, "stream": True})
    assert raw == b'data: {"choices": []}\n\ndata: [DONE]\n\n' and headers["X-Request-Id"] == "7"
    assert headers["Content-Type"] == "text/event-stream"
    assert post(url, {"seed": 1, "messages": [{"content": "x"}]}, "/completions")[0] == 200         # other paths too


@pytest.mark.parametrize("status", [400, 401, 404, 429, 500, 503])
@pytest.mark.parametrize("model", ["m", "m-mrsa"])
@pytest.mark.parametrize("stream", [False, True])
def test_errors_keep_their_status_and_words(front, status, model, stream):
    behind, _, url = front
    behind.fresh(lambda n, attempt, body: "429 later" if status == 429 else status)
    own = SMALL if model == "m-mrsa" else None
    with pytest.raises(openai.APIStatusError) as refused:
        create(url, model, rsa=own, stream=stream)
    words = f"no: Bearer {KEY if model == 'm' else '***'} is not welcome"
    assert refused.value.status_code == status and words in str(refused.value)
    if status == 429 and model == "m":
        assert refused.value.response.headers["Retry-After"] == "0.25"


@pytest.mark.parametrize("fault", ["hang up", "cut", "html", {"json": {"choices": []}}], ids=str)
def test_a_server_that_talks_nonsense_is_a_bad_gateway(front, fault):
    behind, _, url = front
    behind.fresh(lambda n, attempt, body: fault)
    with pytest.raises(openai.APIStatusError) as refused:
        create(url)
    assert refused.value.status_code == 502 and "all 5 candidates of a round failed" in str(refused.value)


def test_no_server_behind(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving(rsa.Endpoint("http://127.0.0.1:9/v1", "m", retries=0)) as (_, url):
        for model, own in (("m", None), ("m-mrsa", SMALL)):
            with pytest.raises(openai.APIStatusError, match="no (server answers|answer from)") as refused:
                create(url, model, rsa=own)
            assert refused.value.status_code == 502


def test_an_error_after_the_first_rollout_is_an_event(front):
    behind, _, url = front
    behind.fresh(lambda n, attempt, body: 401 if n >= 5 else None, reply_to_last)
    with pytest.raises(openai.APIError, match="is not welcome"):
        for _ in create(url, stream=True):
            pass


def test_models_are_listed(front):
    behind, _, url = front
    names = [model.id for model in client(url).models.list()]
    assert names == ["m", "m-mrsa", *(f"m-mrsa-{name}" for name in rsa.BUDGETS)]


@pytest.mark.parametrize("body, words", [
    (b'{"model": "m-mrsa"', "must be JSON"), (b"\xff", "must be JSON"), ([1], "must be JSON"), ({}, "must be JSON"),
    ({"model": 5}, "must be JSON"), ({"model": "m-mrsa", "stream": "yes"}, "must be JSON"),
    ({"model": "m-mrsa", "rsa": 3}, "must be JSON"),
    ({"model": "m-mrsa"}, "messages must be"), ({"model": "m-mrsa", "messages": "hi"}, "messages must be"),
    ({"model": "m-mrsa", "messages": []}, "messages must be"),
    ({"model": "m-mrsa", "messages": [3]}, "messages must be"),
    ({"model": "m-mrsa", "messages": TALK[:3]}, "last message must be the user's"),
    ({"model": "m-mrsa", "messages": [{"role": "user", "content": " "}]}, "last message must be the user's"),
    ({"model": "m-mrsa", "messages": [{"role": "user", "content": None}]}, "last message must be the user's"),
    ({"model": "m-mrsa", "messages": TALK, "tools": []}, "'tools'"),
    ({"model": "m-mrsa", "messages": TALK, "n": 2}, "n must be 1"),
    ({"model": "m-mrsa", "messages": TALK, "seed": "x"}, "seed 'x'"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"population": 0}}, "makes no sense"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"population": 3, "subset": 4}}, "makes no sense"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"population": 10**6}}, "too much"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"rounds": 10**9}}, "too much"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"budget": 10**9}}, "too much"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"rounds": True}}, "rounds True"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"rounds": 1.5}}, "rounds 1.5"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"round": 1}}, "round 1"),
    ({"model": "m-mrsa", "messages": TALK, "rsa": {"select": "best"}}, "rsa.select"),
    ({"model": "other", "messages": TALK, "rsa": {"rounds": 1}}, "'other'")], ids=str)
def test_a_bad_request_is_one_sentence_in_openais_shape(front, body, words):
    behind, _, url = front
    status, headers, raw = post(url, body)
    error = json.loads(raw)["error"]
    assert status == (404 if words == "'other'" else 400) and words in error["message"] and not behind.bodies
    assert headers["Content-Type"] == "application/json" and error["type"] == "invalid_request_error"


def test_a_body_has_a_limit(front, monkeypatch):
    _, server, url = front
    monkeypatch.setattr(server, "most_bytes", 1000)
    status, _, raw = post(url, {"model": "m-mrsa", "messages": TALK, "user": "x" * 2000})
    assert status == 413 and "1000 bytes" in json.loads(raw)["error"]["message"]


# ---- who goes away, and crowds --------------------------------------------------------------------------------------


def wait_for(condition, seconds=10):
    for _ in range(int(seconds / 0.01)):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


PHASES = {"waiting": (0, 4), "first round": (2, 3), "second round": (5, 4), "last aggregate": (15, 1),
          "passing through": (0, 1)}                            # from which request on nobody answers, how many wait


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_ends_what_runs_for_it(front, phase, stream):
    """The server behind sees its connections close at once, and nobody asks it for more."""
    behind, server, url = front
    begins, waiting = PHASES[phase]
    behind.fresh(lambda n, attempt, body: "watch" if n >= begins else None, reply_to_last)
    before = {*threading.enumerate()}
    model = "m" if phase == "passing through" else "m-mrsa"
    own = {"rsa": {**SMALL, "select": "aggregate" if phase == "last aggregate" else "majority"}} if model != "m" else {}
    body = json.dumps({"model": model, "messages": TALK, "stream": stream, "seed": 1, **own})
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
                     f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_for(lambda: behind.running == waiting)
    wait_for(lambda: behind.left == waiting)
    asked = len(behind.bodies)
    settled(server)
    time.sleep(0.1)
    assert len(behind.bodies) == asked and not server.jobs
    wait_for(lambda: all("process_request" in thread.name for thread in {*threading.enumerate()} - before))


def test_a_client_that_reads_slowly_holds_up_nobody(front):
    """Its answer, larger than what a connection holds, waits for it; others are served meanwhile."""
    behind, server, url = front
    answer = "long " * 400_000
    behind.fresh(reply=lambda body: completion(answer) if "slow" in str(body["messages"]) else reply_to_last(body))
    body = json.dumps({"model": "m-mrsa", "messages": [{"role": "user", "content": "slow?"}], "stream": True,
                       "rsa": {**SMALL, "population": 1, "subset": 1, "rounds": 0}})
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect((host, int(port)))
        line.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
                     f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        wait_for(lambda: len(behind.bodies) == 1)
        assert create(url).rsa["failed"] == 0
        with line.makefile("rb") as stream:
            read = stream.read().decode()
    assert read.count("long ") > 399_000 and "[DONE]" in read   # the protocol's own lines may split a few
    settled(server)


def test_a_client_may_go_away_while_it_asks(front):
    behind, server, url = front
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port))) as line:
        line.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 900\r\n\r\n{{".encode())
        time.sleep(0.2)
    assert create(url).rsa["failed"] == 0 and len(behind.bodies) == 15
    settled(server)                                             # a job ends a moment after its answer


def test_fifty_clients_at_once_leave_nothing_behind(front):
    behind, server, url = front
    own = {"population": 2, "subset": 1, "rounds": 1, "budget": 9, "tail": 1}
    open_files = len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
    before, results = threading.active_count(), []

    async def crowd():
        async with openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=60) as asking:
            create = asking.chat.completions.create
            each = [create(model="m-mrsa", messages=TALK, extra_body={"rsa": {**own, "seed": i}}) for i in range(50)]
            results.extend(await asyncio.gather(*each))

    asyncio.run(crowd())
    assert len(behind.bodies) == 50 * 4 and all(answer.usage.completion_tokens == 12 for answer in results)
    assert len({answer.id for answer in results}) == 50
    settled(server)
    wait_for(lambda: threading.active_count() <= before)
    if open_files:
        wait_for(lambda: len(os.listdir("/proc/self/fd")) <= open_files + 2)


def test_more_problems_than_a_server_takes(front, monkeypatch):
    behind, server, url = front
    monkeypatch.setattr(server, "most_jobs", 2)
    behind.fresh(lambda n, attempt, body: "hang", reply_to_last)
    threads = [threading.Thread(target=create, args=(url,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(server.jobs) == 2)
    with pytest.raises(openai.RateLimitError, match="come back later"):
        create(url)
    behind.release.set()
    for thread in threads:
        thread.join(20)


def test_silence_is_broken_by_comments(front, monkeypatch):
    behind, server, url = front
    monkeypatch.setattr(server, "quiet", 0.05)
    behind.fresh(lambda n, attempt, body: "slow" if n == 1 else None, reply_to_last)
    raw = post(url, {"model": "m-mrsa", "messages": TALK, "rsa": SMALL, "stream": True})[2].decode()
    assert raw.count(": still at work\n\n") >= 5 and raw.endswith("data: [DONE]\n\n")


def test_no_key_is_printed(front, capsys):
    behind, server, url = front
    behind.fresh(lambda n, attempt, body: 401 if n == 3 else None, reply_to_last)
    with pytest.raises(openai.AuthenticationError):
        create(url)
    settled(server)
    said = capsys.readouterr()
    assert "m-mrsa: " in said.out and KEY not in said.out + said.err


# ---- a checkpoint here ----------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint():
    tokenizer = Tokenizer()
    config = ZayaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=24,
                        router_hidden_size=12, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad,
                        bos_token_id=tokenizer.end_of_text, max_position_embeddings=512)
    return rsa.Checkpoint(randomise(Zaya(config), 272), tokenizer)


def test_a_checkpoint_is_served_without_another_server(checkpoint):
    budget = rsa.Budget(4, 2, 1, 12, 6)
    with serving(checkpoint, budget, checkpoint.tokenizer, rsa.terse_prompt) as (server, url):
        answer = create(url, rsa={"seed": 5})
        assert answer.rsa["population"] == 4 and answer.usage.completion_tokens > 0
        checkpoint.before = TALK[:-1]
        result = rsa.markovian_rsa("why?", checkpoint, 4, 2, 1, 12, 6, 5, checkpoint.tokenizer)
        checkpoint.before = ()
        assert sum(answer.rsa["tokens"]) == result.generated_tokens
        plain = create(url, "m", rsa=None, max_tokens=12, seed=5, temperature=0)
        assert plain.rsa["population"] == 1 and "round" not in plain.choices[0].message.reasoning_content
        assert [model.id for model in client(url).models.list()][:2] == ["m", "m-mrsa"]
        for model, own, words in (("x", None, "no model 'x'"), ("m", {"rounds": 1}, "two numbers")):
            with pytest.raises(openai.APIStatusError, match=words):
                create(url, model, rsa=own, stop="x")
        with pytest.raises(openai.APIStatusError, match="role 'tool'"):
            create(url, messages=[{"role": "tool", "content": "x", "tool_call_id": "y"}, TALK[-1]])
        assert post(url, {}, "/embeddings")[0] == 404
        with pytest.raises(openai.BadRequestError, match="reads text alone"):
            create(url, messages=[{"role": "user", "content": [{"text": "x"}, {"type": "image_url"}]}])
        pieces = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, {"role": "assistant"}]
        assert create(url, messages=[*pieces, TALK[-1]], rsa={"seed": 5}).rsa["failed"] == 0
        assert "hidden_states" not in vars(checkpoint.model)


def test_a_checkpoints_generation_ends_with_its_client(checkpoint):
    endless = checkpoint.model.generate
    checkpoint.model.generate = lambda *given, eos_token_id, **more: endless(*given, **more)
    with serving(checkpoint, rsa.Budget(4, 2, 1, 2**19, 6), checkpoint.tokenizer, rsa.terse_prompt) as (server, url):
        with pytest.raises(openai.APITimeoutError):
            openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=1.0).chat.completions.create(
                model="m-mrsa", messages=TALK)
        settled(server)                                         # long before half a million tokens
        del checkpoint.model.generate
        assert create(url, rsa={"budget": 4, "tail": 2, "rounds": 0}).rsa["rounds"] == 0            # and it still works


# ---- the command line -----------------------------------------------------------------------------------------------


def test_the_command_serves_until_ctrl_c(behind, monkeypatch):
    behind.fresh(reply=reply_to_last)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, os.path.join(ROOT, "rsa.py"), "--serve", f"127.0.0.1:{port}", "--endpoint", behind.url,
               "--model", "m", "--population", "3", "--rounds", "1", "--max-tokens", "9", "--tail", "1"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env={**os.environ, "no_proxy": "127.0.0.1"},
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as process:
        timer = threading.Timer(60, process.kill)               # or a failure below would be waited for
        timer.start()
        said = process.stdout.readline()
        assert f"http://127.0.0.1:{port}/v1 answers for m, m-mrsa, m-mrsa-tiny" in said
        url = f"http://127.0.0.1:{port}/v1"
        for _ in range(100):
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port)).close()
                break
            time.sleep(0.05)
        about = create(url, rsa=None).rsa
        assert (about["population"], about["subset"], about["rounds"], about["budget"]) == (3, 3, 1, 9)
        process.send_signal(signal.SIGINT)
        rest = process.communicate(timeout=20)[0]
        timer.cancel()
    assert "Traceback" not in rest and "m-mrsa: " in rest and "tokens [9, 9]" in rest


@pytest.mark.parametrize("arguments, words", [
    (["--serve", "8080"], "HOST:PORT"), (["--serve", "127.0.0.1:80", "--trace", "x"], "writes no --trace"),
    (["--serve", "127.0.0.1:80", "why?"], "not allowed with")])
def test_mistakes_on_the_command_line(arguments, words):
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        rsa.main([*arguments, "--endpoint", "http://127.0.0.1:9/v1", "--model", "m"])
    assert re.search(words, said.getvalue())


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit, match="pip install starlette uvicorn"):
        rsa.main(["--serve", "127.0.0.1:8080", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m"])
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(SystemExit, match="pip install httpx"):
        rsa.main(["why?", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m"])


assert torch                                                    # its threads start before any is counted
