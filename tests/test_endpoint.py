"""rsa.py against servers: one here that fails on purpose, in every way a server can, and a real one."""
import collections
import contextlib
import http.server
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import randomise, trace_rows, unordered

import rsa
from rsa import Endpoint
from zaya import Tokenizer, Zaya, ZayaConfig


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KEY = "sk-very-secret-0123456789"
ROUND_0 = rsa.report_prompt("why?", [])
COLOURS = ["red", "green", "blue", "black", "white", "brown", "grey", "pink"]


def reply_to(body):
    """What the fake model says: the prompt and the seed decide it, and hardly two of them give the same."""
    number = zlib.crc32(f"{body['messages'][0]['content']} {body.get('seed')}".encode())
    return f"<think>{COLOURS[number % 8]} t{number}</think>{number % 5}"


def completion(content, finish_reason="stop", usage=None, **message):
    return {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": [
        {"index": 0, "finish_reason": finish_reason, "message": {"role": "assistant", "content": content, **message}}],
        "usage": usage or {"prompt_tokens": 1, "completion_tokens": 3, "total_tokens": 4}}


def clients_end(others):
    """Wait for the threads that have begun since there were only `others`, such as a compiler's from another test: of
    clients, and of the requests of those that went away."""
    for _ in range(2):
        for thread in {*threading.enumerate()} - others:
            if type(thread) is threading.Thread and "serve_forever" not in thread.name:
                with contextlib.suppress(RuntimeError):         # it has not quite begun
                    thread.join(1 if "process_request" in thread.name else 10)
        time.sleep(0.02)


class FaultyServer(http.server.ThreadingHTTPServer):
    """Answers chat completions, but what `fault(n, attempt, body)` names goes wrong: n counts the different rollouts
    (prompt and seed) in the order in which they first come, attempt the requests for this one, both from 0."""
    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.others = {*threading.enumerate()}
        self.lock = threading.Condition()
        self.release = threading.Event()                        # ends what hangs
        self.fresh()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        threading.Thread(target=self.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()

    def fresh(self, fault=lambda n, attempt, body: None, reply=None):
        """Forget all, and behave like this from now on.  No thread of an earlier run is left that might still ask."""
        self.release.set()
        clients_end(self.others)
        self.generation = object()                              # who still waits from before is not counted
        self.fault, self.reply = fault, reply or (lambda body: completion(reply_to(body)))
        self.bodies, self.keys, self.times, self.rollouts = [], [], [], collections.Counter()
        self.running = self.most = self.crowd = self.left = 0
        self.release.clear()
        return self

    def handle_error(self, request, client_address):            # a client that has gone away is no news
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True                              # 40 ms an answer

    def log_message(self, *_):
        pass

    def send(self, status, content, kind="application/json", cut=0, **headers):
        self.leave()                                            # first: the client's next request may be here at once
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(data[:len(data) - cut])
        if cut:
            self.close_connection = True

    def do_GET(self):
        self.generation = None
        self.send(200, {"object": "list", "data": [{"id": "m", "object": "model", "owned_by": "them"}]})

    def do_POST(self):
        server = self.server
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.loads(raw)
        rollout = str(body["messages"][0]["content"]), body.get("seed")
        with server.lock:
            attempt = server.rollouts[rollout]
            server.rollouts[rollout] += 1
            server.bodies.append(body)
            server.keys.append(self.headers["Authorization"])
            server.times.append(time.monotonic())
            n = list(server.rollouts).index(rollout)
            server.running, self.generation = server.running + 1, server.generation
            server.most = max(server.most, server.running)
            server.lock.notify_all()
            if server.crowd:                                    # answer when that many are here, or nobody else comes
                server.lock.wait_for(lambda: server.most >= server.crowd, timeout=5)
        try:
            self.answer(server.fault(n, attempt, body), body)
        finally:
            self.leave()

    def leave(self):
        with self.server.lock:
            self.server.running -= self.generation is self.server.generation
            self.generation = None

    def answer(self, fault, body):
        answer = self.server.reply(body)
        error = {"error": {"message": f"no: {self.headers['Authorization']} is not welcome", "code": "bad"}}
        if fault in ("slow", "hang"):
            self.server.release.wait(1.5 if fault == "slow" else 300)
        while fault == "watch" and not self.server.release.is_set():                # until the client goes away
            if select.select([self.connection], [], [], 0.01)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                with self.server.lock:
                    self.server.left += 1
                self.close_connection = True
                return
        if isinstance(fault, int):
            self.send(fault, error)
        elif fault == "429 later":
            self.send(429, error, Retry_After="0.25")
        elif fault == "hang up":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "events":
            self.send(200, b'data: {"choices": []}\n\ndata: [DONE]\n\n', kind="text/event-stream", X_Request_Id="7")
        elif fault == "html":
            self.send(200, b"<html>busy</html>", kind="text/html")
        elif isinstance(fault, (bytes, dict)):
            self.send(200, fault["json"] if isinstance(fault, dict) else fault)
        else:
            self.send(200, answer, cut=20 if fault == "cut" else 0)


@pytest.fixture(scope="module")
def running_server():
    server = FaultyServer()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running_server, monkeypatch):
    """The server, and a client that does not sleep between its attempts."""
    monkeypatch.setattr(Endpoint, "back_off", 0.01)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("MY_KEY", KEY)
    yield running_server.fresh()
    running_server.release.set()


def line(server, *arguments):
    return ["--endpoint", server.url, "--model", "m", "--key-variable", "MY_KEY", "--population", "5", "--subset", "3",
            "--rounds", "2", "--max-tokens", "9", "--tail", "1", "--concurrency", "4", "--timeout", "30",
            *map(str, arguments)]


def problem_file(tmp_path, *problems):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps({"problem": problem, "answer": "4"}) + "\n" for problem in problems))
    return path


def ask_once(endpoint, prompt="why?"):
    (_, *found), = endpoint.stream([prompt], 9, 0)
    return found


def solve(server, path, *arguments):
    """One problem on the command line -> the rows of its trace, without the settings."""
    rsa.main(["why?", *line(server, "--trace", path, *arguments)])
    return trace_rows(path)[1:]


# ---- what is asked, and what comes back -----------------------------------------------------------------------------


def test_requests_say_what_the_protocol_wants(server, tmp_path, capsys):
    rows = solve(server, tmp_path / "trace", "--temperature", "0.5")
    assert len(rows) == len(server.bodies) == 15 and set(server.keys) == {f"Bearer {KEY}"}
    for body in server.bodies:
        assert body["model"] == "m" and body["max_tokens"] == 9 and body["temperature"] == 0.5
        assert [message["role"] for message in body["messages"]] == ["user"] and body["top_p"] == 1
    assert len({body["seed"] for body in server.bodies}) == 15                      # equal prompts, different samples
    answers = sorted((body["messages"][0]["content"], reply_to(body)) for body in server.bodies)
    assert answers == sorted((row["prompt"], row["text"]) for row in rows)          # each prompt has its own answer
    for row in rows:
        number = row["text"].split(" t")[1].split("<")[0]
        assert row["tail"] == f"t{number}" and row["answer"] == str(int(number) % 5) and row["tokens"] == 3
        assert row["prompt"].count("Candidate solution") == (3 if row["round"] else 0)
    said = capsys.readouterr().out
    assert "45 tokens generated" in said and "0 failed" in said
    assert "3 words of tails" in said and "majority of the last round" in said
    again = solve(server.fresh(), tmp_path / "again", "--temperature", "0.5")
    assert unordered(again) == unordered(rows)                  # deterministic, if the server is
    other = solve(server.fresh(), tmp_path / "other", "--seed", "1")
    assert not {row["text"] for row in other} & {row["text"] for row in rows}


@pytest.mark.parametrize("concurrency", [1, 3])
def test_as_many_at_once_as_asked(server, concurrency):
    server.crowd = concurrency
    texts = Endpoint(server.url, "m", concurrency=concurrency, timeout=30)([f"p{i}" for i in range(11)], 9, 0)
    assert len(set(texts)) == 11 and server.most == concurrency


@pytest.mark.parametrize("message, text, answer", [
    (completion("It is 4", reasoning_content="two and two"), "<think>two and two</think>It is 4", "It is 4"),
    (completion("4", reasoning="two and two"), "<think>two and two</think>4", "4"),
    (completion("<think>two</think>4"), "<think>two</think>4", "4"),
    (completion("two and two</think>4"), "<think>two and two</think>4", "4"),       # the template opened it
    (completion("just 4"), "just 4", "just 4"),
    (completion(None, "length", reasoning_content="so 4"), "<think>so 4", None),    # cut off inside its reasoning
    (completion("\n<think>so 4", "length"), "<think>so 4", None),
    (completion("4", "length", reasoning_content="so"), "<think>so</think>4", "4"),
    (completion("Maybe \\boxed{3}? No,", "length"), "<think>Maybe \\boxed{3}? No,", None),      # the template opened it
    (completion(None, reasoning_content="4"), "<think>4</think>", None),            # ended, and says nothing
    (completion(None), "", None), (completion("", "length"), "", None),
    (completion("half \ud83d"), "half ?", "half ?"),                                # no text of UTF-8: no trace of it
    (completion([{"type": "text", "text": "It is"}, {"type": "text", "text": " 4"}]), "It is 4", "It is 4"),
    (completion(["It is", " 4"]), "It is 4", "It is 4"), (completion([]), "", None),
    (completion([{"type": "thinking", "thinking": [{"type": "text", "text": "so"}]}, {"type": "text", "text": "4"}]),
     "<think>so</think>4", "4"), (completion("4", reasoning_content=["s", "o"]), "<think>so</think>4", "4"),
    (completion([{"type": "text", "text": "<think>so</th"}, {"text": "ink>4"}]), "<think>so</think>4", "4"),
], ids=lambda value: None)
def test_reasoning_wherever_the_server_puts_it(message, text, answer):
    assert rsa.read_completion(message) == (text, 3) and rsa.final_answer(text) == answer


def test_servers_that_do_not_count_tokens(server, tmp_path):
    usages = [None, {}, {"prompt_tokens": 3}, {"completion_tokens": None}]
    server.fresh(reply=lambda body: completion(reply_to(body)) | {"usage": usages[body["seed"] % 4]})
    rows = solve(server, tmp_path / "trace")
    assert len(rows) == 15 and all(row["tokens"] == 5 for row in rows)              # two tags, two words, the answer


@pytest.mark.parametrize("names, fields", [
    ("max_tokens=max_completion_tokens,seed=,temperature=,top_p=", {"max_completion_tokens": 9}),
    ("seed=random_seed", {"max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "random_seed": None})])
def test_fields_of_a_request_have_other_names_or_none(server, capsys, names, fields):
    """A server that refuses any other field."""
    known = {"model", "messages", *fields}
    server.fresh(lambda n, attempt, body: 400 if body.keys() - known else None, lambda body: completion("4"))
    arguments = ["why?", *line(server, "--temperature", "0.5", "--top-p", "0.9")]
    with pytest.raises(SystemExit, match="all 5 candidates of a round failed.*400"):
        rsa.main(arguments)
    server.bodies.clear()
    rsa.main([*arguments, "--request", names])
    assert len(server.bodies) == 15 and "0 failed" in capsys.readouterr().out
    assert all(body.keys() == known for body in server.bodies)
    assert all(body[name] == value for body in server.bodies for name, value in fields.items() if value is not None)


@pytest.mark.parametrize("model, more, top_p", [("/models/zaya1-8b-int8", [], 0.95), ("m", [], 1),
                                                ("Zyphra/ZAYA1-8B", ["--top-p", "0.6"], 0.6)])
def test_sampling_is_what_the_models_card_asks(model, more, top_p):
    given = rsa.parse_arguments(["q", "--endpoint", "http://x/v1", "--model", model, *more])
    assert (given.temperature, given.top_p) == (1, top_p)


def test_rounds_are_asked_for_the_same_form(server, tmp_path, capsys):
    """A model that is always right, in prose unless it is asked for a box: no round gains from the asking."""
    server.fresh(reply=lambda body: completion("So it is.\n\nThe answer is 4." if "\\boxed" not in
                                               body["messages"][0]["content"] else "So it is.\n\n\\boxed{4}."))
    arguments = ["--problems", str(problem_file(tmp_path, "2+2", "3+1")), *line(server)]
    rsa.main(arguments)
    said = capsys.readouterr()
    assert [cell.split()[0] for cell in said.out.splitlines()[-1].split("|")[2:6]] == ["1.000"] * 4
    assert "name no answer" not in said.err
    rsa.main([*arguments, "--prompt", "terse"])                 # asks for no form: the run says what its zeros mean
    said = capsys.readouterr()
    assert [cell.split()[0] for cell in said.out.splitlines()[-1].split("|")[2:6]] == ["0.000"] * 4
    assert all(f"default, round {t}: 10 of 10 replies name no answer" in said.err for t in (0, 1, 2))


def test_a_problem_that_utf8_cannot_hold_is_asked_and_traced(server, tmp_path):
    path = problem_file(tmp_path, "half \ud83d")
    rsa.main(["--problems", str(path), *line(server, "--trace", tmp_path / "trace")])
    assert {body["messages"][0]["content"].split("\n")[0] for body in server.bodies} == {"half ?"}
    assert len(trace_rows(tmp_path / "trace")) == 16
    assert ask_once(Endpoint(server.url, "m"), "half \ud83d")[2] is None            # from Python too


def test_a_server_is_asked_without_torch(server):
    code = "import sys; sys.modules['torch'] = None; import rsa; rsa.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", code, "why?", *line(server)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "majority of the last round" in done.stdout, done.stderr


# ---- faults ---------------------------------------------------------------------------------------------------------

SHAPES = {"no choices": {}, "empty choices": {"choices": []}, "null choices": {"choices": None}, "list": [1],
          "null": None, "text": "busy", "no message": {"choices": [{"index": 0}]},
          "error in a 200": {"error": {"message": "overloaded"}}, "number": completion(5),
          "503 in a 200": {"error": {"message": "overloaded", "code": 503}}, "parts of numbers": completion([5]),
          "error in a choice": {"choices": [{"error": {"code": 502, "message": "upstream"}, "message": None}]}}
FAULTS = {"429": 429, "429 with Retry-After": "429 later", "408": 408, "500": 500, "503": 503, "cut": "cut",
          "hang up": "hang up", "not JSON": b'{"choices": [{"mess', "empty": b"", "html": "html",
          "not UTF-8": b'{"choices": "\xff\xfe"}', **{name: {"json": shape} for name, shape in SHAPES.items()}}


@pytest.fixture(scope="module")
def undisturbed(running_server, tmp_path_factory):
    """The trace of a run without faults: faults that pass must not change a word of it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "127.0.0.1")
        return solve(running_server.fresh(), tmp_path_factory.mktemp("undisturbed") / "trace")


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_pass_change_nothing(server, undisturbed, tmp_path, capfd, fault):
    """Every second rollout meets it at first, every fourth one twice."""
    server.fresh(lambda n, attempt, body: FAULTS[fault] if attempt < (0, 1, 0, 2)[n % 4] else None)
    rows = solve(server, tmp_path / "trace")
    assert unordered(rows) == unordered(undisturbed)
    assert len(server.bodies) == 15 + sum((0, 1, 0, 2)[n % 4] for n in range(15))
    said = capfd.readouterr()
    assert "failed, and left out" not in said.err and "0 failed" in said.out


def test_slow_answers_are_asked_for_again_and_a_server_says_when_to_come_back(server, undisturbed, tmp_path):
    server.fresh(lambda n, attempt, body: "slow" if n in (2, 7) and attempt == 0 else None)
    assert unordered(solve(server, tmp_path / "trace", "--timeout", "0.5")) == unordered(undisturbed)
    assert len(server.bodies) >= 17
    server.fresh(lambda n, attempt, body: "429 later" if attempt == 0 else None)
    assert Endpoint(server.url, "m")(["p"], 9, 0) == [reply_to(server.bodies[0])]
    assert server.times[1] - server.times[0] >= 0.25


@pytest.mark.parametrize("fault", [500, "hang up", "cut", {"json": {"choices": []}}, "hang"],
                         ids=["500", "hang up", "cut", "empty choices", "hang"])
def test_a_rollout_that_always_fails_is_reported_and_left_out(server, tmp_path, capsys, fault):
    victims = []

    def curse(n, attempt, body):
        if n == 1 and not victims:
            victims.append(body["seed"])
        return fault if body["seed"] in victims else None

    server.fresh(curse)
    path, more = tmp_path / "trace", ("--subset", "5", "--retries", "1", *(("--timeout", "1") * (fault == "hang")))
    rows = solve(server, path, *more)
    said = capsys.readouterr()
    broken, = [row for row in rows if row["text"] is None]
    assert set(broken) == {"run", "problem", "round", "index", "prompt", "text", "error"} and broken["round"] == 0
    assert broken["prompt"] == ROUND_0 and len(broken["error"]) > 10 and "\n" not in broken["error"]
    assert f"failed, and left out of the subsets: problem 0, round 0, candidate {broken['index']}: " \
        f"{broken['error']}" in said.err
    assert "1 failed" in said.out and len(rows) == 15
    assert server.rollouts[ROUND_0, victims[0]] == 2             # one try more than none
    tails = {t: {row["tail"] for row in rows if row["round"] == t and row["text"]} for t in (0, 1, 2)}
    assert [len(tails[t]) for t in (0, 1, 2)] == [4, 5, 5]
    for row in rows:                                            # subsets are as large as can be: 4 are left of 5
        if row["round"]:
            seen = re.findall(r"mistakes\):\n(.*)\n", row["prompt"])
            assert set(seen) == tails[row["round"] - 1] and len(seen) == len(set(seen)) and "None" not in row["prompt"]

    server.fresh()                                              # another day: only what depends on it is asked
    rsa.main(["why?", *line(server, "--trace", path, *more, "--resume")])
    first = [body for body in server.bodies if body["messages"][0]["content"] == ROUND_0]
    assert [body["seed"] for body in first] == victims and "0 failed" in capsys.readouterr().out


def test_when_all_fail_the_run_says_why_and_how_to_go_on(server, tmp_path, capsys):
    path, problems = tmp_path / "trace", problem_file(tmp_path, "a", "b")
    for asked, count, status in ((["why?", "--trace", str(path)], 5, 503), (["--problems", str(problems)], 10, 400)):
        # Round 0 is fine.
        server.fresh(lambda n, attempt, body, status=status, count=count: status if n >= count else None)
        with pytest.raises(SystemExit) as stop:
            rsa.main([*asked, *line(server, "--retries", "1")])
        words = stop.value.code
        assert f"all {count} candidates of a round failed" in words and f" {status} " in words and "\n" not in words
        assert "is not welcome" in words and "with --trace FILE, the same command and --resume goes on" in words
        assert capsys.readouterr().err.count("failed, and left out") == count
    rows = solve(server.fresh(), path, "--retries", "1", "--resume")
    assert len(server.bodies) == 10 and len([row for row in rows if row["text"]]) == 15


def test_no_server_at_all(server, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(SystemExit, match=f"no server answers at --endpoint {re.escape(url)}: .*[Cc]onnect"):
        rsa.main(["why?", *line(server, "--endpoint", url, "--retries", "1")])
    assert "failed, and left out" not in capsys.readouterr().err                    # at once, not after each rollout


@pytest.mark.parametrize("inside", [False, True], ids=["status", "inside a 200"])
@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_refusal_stops_at_once_with_the_servers_words(server, undisturbed, tmp_path, status, inside):
    wrapped = {"json": {"error": {"message": f"{KEY} is not welcome", "code": status}}}
    server.fresh(lambda n, attempt, body: (wrapped if inside else status) if n >= 8 else None)
    path = tmp_path / "trace"
    with pytest.raises(SystemExit) as stop:
        solve(server, path)
    words = stop.value.code
    clients_end(server.others)                                  # what was under way may come in
    assert f"refuses model 'm' or this request: {status} " in words and "*** is not welcome" in words
    assert "\n" not in words and max(server.rollouts.values()) == 1
    assert 9 <= len(server.bodies) <= 15                        # 4 at once, and none of them again
    done = len(trace_rows(path)) - 1                            # and leaves a trace to go on with
    assert 5 <= done <= 8
    assert unordered(solve(server.fresh(), path, "--resume")) == unordered(undisturbed)
    assert len(server.bodies) == 15 - done == len(server.rollouts)


@pytest.mark.parametrize("status", [400, 402, 422])
def test_a_prompt_that_is_refused_is_one_failed_rollout(server, tmp_path, capsys, status):
    """One problem of three is too long, and the aggregation prompts of a second.  Again with --resume."""
    problems = problem_file(tmp_path, "short", "long " * 50, "middle")
    def fault(n, attempt, body):
        prompt = body["messages"][0]["content"]
        return status if "long" in prompt or "middle" in prompt and "Candidate" in prompt else None
    path = tmp_path / "trace"
    for more in ([], ["--resume"]):
        server.fresh(fault, lambda body: completion("<think>so</think>4"))
        rsa.main(["--problems", str(problems), *line(server, "--rounds", "1", "--trace", path, *more)])
        said = capsys.readouterr()
        cells = said.out.splitlines()[-1].split("|")
        assert [cell.split()[0] for cell in cells[2:6]] == ["0.667", "0.667", "0.333", "0.333"]
        assert cells[-2].strip() == "15" == str(said.err.count("failed, and left out"))
        assert said.err.count(f": {status} " + '{"error": {"message": "no: Bearer *** is not welcome') == 15
        assert len(server.bodies) == (15 if more else 30) and max(server.rollouts.values()) == 1    # never twice


@pytest.mark.parametrize("path, hint", [("", True), ("/v1/chat/completions", True), ("/v1", False), ("/v1/", False)])
def test_an_unknown_address_is_said_in_the_servers_words(server, path, hint):
    server.fresh(lambda n, attempt, body: 404)
    url = server.url.removesuffix("/v1") + path
    with pytest.raises(SystemExit) as stop:
        rsa.main(["why?", *line(server, "--endpoint", url)])
    words = stop.value.code
    assert "404" in words and "is not welcome" in words and KEY not in words
    assert (f"address ends in /v1, but --endpoint is {url}" in words) == hint


@pytest.mark.parametrize("body, words, tries", [
    ({"error": {"message": "Insufficient credits", "code": 402}}, "Insufficient credits", 1),
    ({"error": {"message": "too long", "code": "400"}}, "too long", 1),
    ({"error": {"message": "overloaded", "code": 503}}, "overloaded", 3), ({"error": "no stock"}, "no stock", 3),
    ({"error": {"message": "odd", "code": "insufficient_quota"}, "choices": []}, "odd", 3),
    ({"object": "error", "message": "old words", "code": 40303}, "old words", 3), ({"detail": "no room"}, "no room", 3),
    ({"choices": [{"error": {"code": 429, "message": "slow down"}, "message": {"content": ""}}]}, "slow down", 3),
    ({"choices": None, "message": "null choices"}, "null choices", 3), (["a list"], "a list", 3)])
def test_an_error_inside_a_200_is_said_in_the_servers_words(server, body, words, tries):
    server.fresh(reply=lambda _: body)
    text, tokens, error = ask_once(Endpoint(server.url, "m", retries=2))
    assert text is None and tokens == 0 and words in error and "Error" not in error and len(server.bodies) == tries


def test_another_servers_trace_is_refused(server, tmp_path):
    path = tmp_path / "trace"
    solve(server, path)
    for more, says in ((("--model", "other"), "model"), (("--temperature", "0.5"), "temperature"),
                       (("--tail", "2"), "budget"), (("--seed", "3", "--prompt", "terse"), "prompt, seed")):
        with pytest.raises(SystemExit, match=re.escape(f"was made with other settings ({says})")):
            solve(server, path, *more, "--resume")
    assert len(server.bodies) == 15


@pytest.mark.parametrize("fault, key", [(401, KEY), (401, KEY + "\n"), (500, "  " + KEY), ("hang up", KEY),
                                        ({"json": [KEY]}, KEY), ({"json": {"choices": KEY}}, KEY)], ids=str)
def test_the_key_is_seen_nowhere(server, tmp_path, monkeypatch, fault, key):
    """In nothing that is printed or written.  A key from a file ends in a newline, which no header may hold."""
    monkeypatch.setenv("MY_KEY", key)
    server.fresh(lambda n, attempt, body: fault)
    path, printed = tmp_path / "trace", []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=printed.append, flush=lambda: None))
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=printed.append, flush=lambda: None))
    with pytest.raises(SystemExit) as stop:
        rsa.main(["why?", *line(server, "--retries", "1", "--trace", path)])
    assert set(server.keys) == {f"Bearer {KEY}"}
    seen = "".join(printed) + str(stop.value.code) + path.read_text()
    assert KEY not in seen and "very-secret" not in seen


def test_without_a_key_the_server_is_asked_all_the_same(server, monkeypatch):
    monkeypatch.delenv("MY_KEY")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-of-another-server")                    # not the variable that was named
    assert Endpoint(server.url, "m", "MY_KEY")(["p"], 9, 0) == [reply_to(server.bodies[0])]
    assert "another" not in server.keys[0]
    Endpoint(server.url, "m")(["p"], 9, 0)
    assert server.keys[1] == "Bearer sk-of-another-server"
    server.fresh(reply=lambda body: {"message": "none of these"})
    monkeypatch.delenv("OPENAI_API_KEY")
    assert "none of these" in ask_once(Endpoint(server.url, "m", retries=0))[2]     # nothing to hide


# ---- killed ---------------------------------------------------------------------------------------------------------


def start(server, path, *arguments):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "rsa.py"), "why?",
                             *line(server, "--trace", path, *arguments)], cwd=ROOT, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            # a script's background job, with all that it starts, would ignore Ctrl-C
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def ended(process):
    """What a process prints until it ends by itself: before what hangs comes back, long after that."""
    try:
        return process.communicate(timeout=60)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_what_was_finished_before_a_kill_is_not_asked_again(server, undisturbed, tmp_path, kill):
    """8 rollouts are answered, those after them hang.  Ctrl-C ends the run at once: neither it nor the interpreter's
    exit waits for requests that may take half an hour."""
    path = tmp_path / "trace"
    server.fresh(lambda n, attempt, body: "hang" if n >= 8 else None)
    with start(server, path, "--timeout", "250") as process:
        while process.poll() is None and not (path.exists() and path.read_bytes().count(b"\n") > 8):
            time.sleep(0.02)
        process.send_signal(kill)
        said = ended(process)
    if kill == signal.SIGINT:
        assert process.returncode == 1 and "Traceback" not in said
        assert said.splitlines()[-1] == rsa.GO_ON
    server.release.set()
    finished = {(row["prompt"], row["text"]) for row in trace_rows(path)[1:]}
    assert len(finished) == 8
    rows = solve(server.fresh(), path, "--resume")
    assert not finished & {(body["messages"][0]["content"], reply_to(body)) for body in server.bodies}
    assert len(server.bodies) == 7 and unordered(rows) == unordered(undisturbed)


def test_a_refusal_does_not_wait_for_what_hangs(server, tmp_path):
    server.fresh(lambda n, attempt, body: 401 if n == 3 else "hang")
    with start(server, tmp_path / "trace", "--timeout", "250") as process:
        said = ended(process)
    assert process.returncode == 1 and "Traceback" not in said and KEY not in said
    assert "the server refuses model 'm'" in said.splitlines()[-1] and len(server.bodies) in (4, 5)


# ---- a real server --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A random model that says printable characters, tags and <|end|> only, served: (its folder, the server's URL)."""
    for name in ("transformers", "fastapi", "uvicorn"):
        pytest.importorskip(name)
    folder = tmp_path_factory.mktemp("served")
    tokenizer = Tokenizer()
    config = ZayaConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=24,
                        router_hidden_size=12, eos_token_id=tokenizer.end, pad_token_id=tokenizer.pad,
                        bos_token_id=tokenizer.end_of_text, max_position_embeddings=512)
    model = randomise(Zaya(config), 272)
    with torch.no_grad():
        spoken = [*range(32, 127), tokenizer.special["<think>"], tokenizer.special["</think>"], tokenizer.end]
        silent = [i for i in range(tokenizer.vocab_size) if i not in spoken]
        model.embed_tokens.weight[silent] *= 0.01               # tied: the logits of what is not to be said
        model.embed_tokens.weight[spoken[-3:]] *= torch.tensor([[2.0], [1.3], [2.2]])
        for layer in model.layers:
            layer.gate.balancing_biases[-1] = -1.0              # HF puts this one back to -1 when it loads
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "server.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "no_proxy": "127.0.0.1"}
    with open(log, "w") as file:
        process = subprocess.Popen([os.path.join(os.path.dirname(sys.executable), "transformers"), "serve", str(folder),
                                    "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"], env=environment,
                                   stdout=file, stderr=subprocess.STDOUT)
    try:
        body = {"model": str(folder), "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                         {"Content-Type": "application/json"})
        for _ in range(240):
            try:
                urllib.request.urlopen(request, timeout=60).read()
                break
            except (urllib.error.URLError, OSError):
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        else:
            raise AssertionError(log.read_text()[-3000:])
        yield str(folder), f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def test_a_real_server_says_what_the_checkpoint_says_and_samples_by_the_seeds(served, tmp_path, monkeypatch):
    """Greedily, the same folder through both sources: the same texts, tags and all, tails, prompts and answers."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder, url = served
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"problem": p, "answer": "7"}) + "\n"
                                for p in ("3+4", "find x", "a", "7*6-1", "b b", "one more problem", "3", " z3c8")))
    common = ["--problems", str(problems), "--prompt", "terse", "--population", "2", "--subset", "1", "--rounds", "1",
              "--max-tokens", "8", "--tail", "8", "--temperature", "0"]
    rsa.main([*common, "--checkpoint", folder, "--trace", str(tmp_path / "ours")])
    rsa.main([*common, "--endpoint", url, "--model", folder, "--tokenizer", folder, "--budget", "tiny", "--concurrency",
              "2", "--timeout", "60", "--trace", str(tmp_path / "theirs")])
    ours, theirs = (trace_rows(tmp_path / name)[1:] for name in ("ours", "theirs"))
    assert len(ours) == 32 and len({row["text"] for row in ours}) > 8
    assert any(re.fullmatch("<think>[^<]+", row["text"]) for row in ours)
    assert any(re.match("<think>[^<]+</think>", row["text"]) for row in ours)
    assert any(row["text"] == "%%%%" for row in ours)           # ended by <|end|>, which a server may count or not
    for row in ours + theirs:
        row.pop("tokens")
        if "</think>" in row["text"] and "<think>" not in row["text"]:              # what Endpoint adds
            row["text"] = "<think>" + row["text"]
        elif "</think>" not in row["text"]:                     # cut off: to Endpoint all of it was reasoning
            row["text"] = row["text"].removeprefix("<think>")
            row.pop("answer")
    assert unordered(ours) == unordered(theirs)
    # By the seeds, one at a time: the seed is the whole server's.  And another model is refused in its words.
    source = Endpoint(url, folder, concurrency=1, timeout=60)
    texts = source(["3+4"] * 5, 8, 0)
    assert len(set(texts)) == 5 and source(["3+4"] * 5, 8, 0) == texts and not set(source(["3+4"], 8, 1)) & set(texts)
    with pytest.raises(SystemExit, match="all 16 candidates of a round failed.* 400 .*pinned"):
        rsa.main(["q", "--endpoint", url, "--model", "other", "--max-tokens", "8"])


def test_our_server_stands_before_a_real_one(served, monkeypatch):
    """Asked by OpenAI's client and by curl: the model itself as if it were asked directly, and Markovian RSA on it."""
    openai = pytest.importorskip("openai")
    from test_server import serving
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    folder, url = served
    asked = dict(messages=[{"role": "user", "content": "3+4"}], max_tokens=8, seed=1, temperature=0)
    budget, numbers = rsa.Budget(2, 1, 1, 8, 8), {"population": 2, "subset": 1, "rounds": 1, "budget": 8, "tail": 8}
    source = Endpoint(url, folder, concurrency=1, timeout=60)
    with serving(source, budget, None, rsa.terse_prompt, folder) as (_, front):
        ours = openai.OpenAI(base_url=front, api_key="none", timeout=60)
        theirs = openai.OpenAI(base_url=url, api_key="none", timeout=60)
        said = [[chunk.choices[0].delta.content for chunk in client.chat.completions.create(
            model=folder, stream=True, **asked) if chunk.choices] for client in (ours, theirs)]
        assert said[0] == said[1] and len(said[0]) > 1
        assert {model.id for model in theirs.models.list()} <= {model.id for model in ours.models.list()}
        with pytest.raises(openai.BadRequestError) as refused:
            ours.chat.completions.create(model="other", **asked)
        assert "pinned" in refused.value.response.text
        answer = ours.chat.completions.create(model=folder + "-mrsa", **{**asked, "temperature": 1, "seed": 5})
        result = rsa.markovian_rsa("3+4", source, **numbers, seed=5)
        texts = [candidate.text for candidate in result.candidates]
        assert answer.choices[0].message.content in [text.rpartition("</think>")[2].strip() for text in texts] + [""]
        assert answer.rsa["failed"] == 0 and answer.usage.completion_tokens > 0 and answer.usage.prompt_tokens > 0
        if shutil.which("curl"):
            body = json.dumps({"model": folder + "-mrsa-light", "stream": True, "rsa": numbers, **asked})
            lines = subprocess.run(["curl", "-sN", front + "/chat/completions", "-d", body], check=True, text=True,
                                   capture_output=True).stdout.split("\n\n")
            events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
            assert lines[-2:] == ["data: [DONE]", ""] and events[-1]["rsa"]["population"] == 2
            assert any("round 1" in (event["choices"][0]["delta"].get("reasoning_content") or "") for event in events)
