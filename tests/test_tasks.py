"""train.py's appendix: problems, teachers, verifiers, and the language that programs are written in."""
import builtins
import json
import os
import re
import subprocess
import sys
import time
import timeit
from functools import partial

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train
from train import TASKS, run_expression, run_program


@pytest.mark.parametrize("name", TASKS)
def test_problems_teachers_and_held_out_problems(name):
    """Problems are functions of seed and difficulty; the teacher is right where it says so, one who slips never is; a
    harder problem takes longer (constraints up to d = 4 only get more rules); what is held out is never trained on."""
    task, rewards, length = TASKS[name], [], {}
    for d in (1, 3, 7, 12):
        problems = [task.make(seed, d) for seed in range(40)]
        assert len({problem.prompt for problem in problems}) > (10 if d > 1 else 3)
        for seed, problem in enumerate(problems[:20]):
            assert problem == task.make(seed, d)
            assert json.loads(json.dumps(problem.data)) == problem.data     # a verifier can be rebuilt from JSON
            reply, wrong = task.solve(problem, seed), task.corrupt(problem, seed)
            assert reply == task.solve(problem, seed) and task.verify(problem, wrong) == (0, 1)
            rewards.append(task.verify(problem, reply))
        solved = sum(len(task.solve(problem, seed)) for seed, problem in enumerate(problems))
        length[d] = solved + (name == "constraints") * sum(len(problem.prompt) for problem in problems)
    assert {form for _, form in rewards} == {1} and length[1] < length[3] < length[7]
    right = sum(reward for reward, _ in rewards)
    assert right == len(rewards) if task.exact else 0 < right < len(rewards)
    for d in (1, 2, 4):
        train_set = {train.draw(task, f"a{seed}", d, held_out=False).prompt for seed in range(150)}
        held = {train.draw(task, f"b{seed}", d, held_out=True).prompt for seed in range(50)}
        assert held and not held & train_set


FIND = {"columns": [dict(a=0, sign="+", than="<", t=6, label="b"), dict(a=8, sign="+", than="<", t=5, label="c")]}
PASS = {"columns": [dict(a=7, sign="*", than="<", t=4, label="b"), dict(a=3, sign="-", than=">", t=5, label="c")]}


@pytest.mark.parametrize("name, data, right, wrong", [
    ("column_sums", {"columns": [[7, 5, "c"], [3, 9, "d"]]}, ["c2d2"], ["c2d3", "22", "d2c2", "c2d2d2"]),
    ("add", {"a": 47, "b": 85}, ["132"], ["0132", "131", "+132", "１３２"]),
    ("sort", {"digits": "3917"}, ["1379"], ["9731", "137", "13799"]),
    ("registers", {"lines": ["a=3", "b=a+4", "a=b*2"]}, ["a4b7"], ["a3b7", "b7a4", "a4"]),
    ("find", FIND, ["b5c6", "b0c2", "b3c4"], ["b6c6", "b5c.", "b5", "c6b5", "b٣c6"]),
    ("pass", PASS, ["b0c4", "b3c7", "b9c5"], ["b1c4", "b0c3", "b0c.", "b0", "c4b0", "b0c８"]),
    ("program", {"lines": ["a=x+4", "a=3-a"]},                  # 9 - x; 9 and x+9 hold on one and on two inputs
     ["a=x+4;a=3-a", "a=9-x", "a=x*9+9", "b=x+1;a=9-x", "x=x+4;a=3-x", ";".join(["a=9-x"] * 32)],
     ["", "a=x+4", "a=9", "a=x+9", "b=9-x", "a=9-x;", "a=9-x;a=a+1", "a = 9-x", "a=９-x", "a=9-x\n", "9-x"]),
    ("synthesize", {"examples": [[0, 3], [4, 1]]},              # (3+x)*2: operator precedence would make it right
     ["x*2+3", "2*x+3", "x+x+3", "x*7+3", "x*2+3" + "+0" * 47],
     ["", "3", "x+3", "3+x*2", "X*2+3", "x*2+13", "x*2+٣", "y*2+3", "(x*2)+3", "x*2+3 ", "x*2+3" + "+0" * 48]),
    ("falsify", {"right": "x*2+3", "other": "x*7+3", "branch": "x<6"}, ["1", "3", "5"],     # odd, in the branch
     ["", "0", "7", "13", "-1", "x", "3\n", "٣", "³"]),
    ("constraints", {"rules": {"count": 3, "no": "e", "begins": "s", "ends": "!"}}, ["sun bird map!", "s x y!"],
     ["", "sun sun sun!", "!", "sun bird map", "sun bird map!!", "sun bird map.", "sun bird!", "bird sun map!",
      "sun red map!", "Sun bird map!", "sun  bird map!", "sun bird map !", "sun bird mäp!", "sun bird map!\n"]),
    ("constraints", {"rules": {"count": 2, "has": "sun"}}, ["sun map", "map sun"], ["sun sun", "sun", "sunny map"]),
])
def test_verdicts_by_hand(name, data, right, wrong):
    assert all(TASKS[name].verify_answer(data, answer) for answer in right)
    assert not any(TASKS[name].verify_answer(data, answer) for answer in wrong)


def refuse_code(patch):
    def refuse(*_, **__):
        raise AssertionError("a verifier ran code")
    for owner, name in [*((builtins, name) for name in ("eval", "exec", "compile", "open")), (os, "system")]:
        patch.setattr(owner, name, refuse)


anything = st.one_of(st.text(), st.text("0123456789+-*=<>thinkabcdexyz#.,;/|!?()'_ \n\0٣３−"),
                     st.binary().map(lambda b: b.decode("utf-8", "surrogateescape")))


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=60, deadline=None)
@given(text=anything)
def test_verifiers_are_total(name, text):
    problem = TASKS[name].make(3, 3)
    with pytest.MonkeyPatch.context() as patch:
        refuse_code(patch)
        for reply in (text, f"<think>x</think>{text}", f"<think>{text}</think>{text}<|end|>"):
            reward, form = TASKS[name].verify(problem, reply)
            assert reward in (0, 1) and form in (0, 1) and reward <= form


@pytest.mark.parametrize("name", TASKS)
def test_verifiers_answer_at_once(name):
    """Linear in a text cut at 1,000 characters: 10 ms are plenty.  The best of three: other processes are no fault."""
    task, problem = TASKS[name], TASKS[name].make(3, 6)
    answers = ("1+" * 500, "9" * 1000, "a=x;" * 250, ("a=" + "x*" * 48 + "x;") * 10, "1+2-" * 250, problem.prompt * 9,
               "".join(f"{v}+" for v in range(1, 8)) * 71, "a " * 500, "!" * 1000, "a=x;" * 10**5,
               ";".join(["a=x*x*x*x*x*x*x*x*x*x*x*x*x*x"] * 32))
    for text in ("9" * 10**6, "<think>" * 10**5, "</think>" * 10**5, *(f"<think></think>{a}" for a in answers)):
        seconds = timeit.repeat(partial(task.verify, problem, text), timer=time.process_time, number=1, repeat=3)
        assert min(seconds) < 0.01, text[:40]


@pytest.mark.parametrize("name, data, answer, trial, wrong, failed", [
    ("synthesize", {"examples": [[0, 3], [4, 1]], "count": 2}, "x*2+3", "x*2+3:0*2=0,0+3=3>3/4*2=8,8+3=1>1", "x*2+2",
     "x*2+2:0*2=0,0+2=2>3"),
    ("falsify", {"right": "x*2+3", "other": "x*7+3", "branch": "x<6"}, "3", "3y:3*2=6,6+3=9/3*7=1,1+3=4", "8", "8n"),
])
def test_searchers_say_what_they_found_and_take_it_over(monkeypatch, name, data, answer, trial, wrong, failed):
    task, problem = TASKS[name], train.Problem(name, 2, "?", data)
    replies = ["<think>long</think>wrong", f"<think>bad reasoning</think>{answer}", answer]
    right = f"<think>{trial}#y{answer}</think>{answer}"
    assert {task.aggregate(problem, replies, seed) for seed in range(5)} == {right}
    monkeypatch.setattr(task, "guess", lambda *_: answer)
    assert task.solve(problem) == right
    monkeypatch.setattr(task, "guess", lambda *_: wrong)
    text, trials = task.solve(problem), f"{re.escape(failed)}(;{re.escape(failed)})*"
    assert re.fullmatch(f"<think>{trials}#n{re.escape(wrong)}</think>{re.escape(wrong)}", text)
    assert task.good_rollout(problem) == task.solve(problem)    # it never works


def test_readers_choose_among_right_candidates():
    """Of find's columns b may be 0 to 5, c 2 to 6; only b4, c3 and c6 hold and are in an answer."""
    assert [name for name, task in TASKS.items() if task.reads] == ["column_sums", "find", "pass", "synthesize"]
    problem = train.Problem("falsify", 1, "?", {"right": "x*2+3", "other": "x*7+3", "branch": "x<6"})
    replies = [f"<think></think>{x}" for x in (1, 2, 5, 8)]
    assert {TASKS["falsify"].aggregate(problem, replies, seed)[-1] for seed in range(20)} == {"1", "5"}
    assert {TASKS["falsify"].aggregate(problem, replies[3:], seed)[-1] for seed in range(99)} == set("0123456789")
    problem = train.Problem("find", 2, "find 06b,85c", FIND)
    replies = ["<think>b1</think>b4c.", "<think></think>b9c3", "b0c2 without the form", "<think></think>c6"]
    texts = {TASKS["find"].aggregate(problem, replies, seed) for seed in range(20)}
    assert texts == {"<think>b:0+4=4<64;c:8+3=1<53#b4c3</think>b4c3", "<think>b:0+4=4<64;c:8+6=4<56#b4c6</think>b4c6"}
    guessed = {TASKS["find"].aggregate(problem, replies[:1], seed) for seed in range(200)}
    assert {text[-3:] for text in guessed} == {"4c.", *(f"4c{x}" for x in range(2, 7))}          # nobody solved c
    task, problems = TASKS["synthesize"], [TASKS["synthesize"].make(seed, 4) for seed in range(40)]
    assert sum(task.verify(p, task.good_rollout(p, 7))[0] for p in problems) > 30       # its own replies hardly are
    assert sum(task.verify(p, task.solve(p, 7))[0] for p in problems) < 10


@pytest.mark.parametrize("task, answer, form, reward", [
    ("find", "b5c6", "#b5c6", 1.0), ("find", "b5c.", "#b5c.", 0.5), ("find", "b5c1", "#b5c1", 0.0),
    ("find", "b.c.", "#b.c.", 0.0), ("find", "c5b6", "#c5b6", 0.0), ("find", "b5", "#b5", 0.0),
    ("find", "b5c6", "#b5c.", 0.0), ("find", "b5c6", "b5c6", 0.0), ("find", "b5c6", "#b5c6;", 0.0),
    ("pass", "b0c4", "#b0c4", 1.0), ("pass", "b0c4", "", 0.0)])
def test_a_reader_is_paid_for_what_the_next_round_lives_on(task, answer, form, reward):
    problem = train.Problem(task, 2, "?", {"find": FIND, "pass": PASS}[task])
    assert TASKS[task].reward(problem, f"<think>…{form}</think>{answer}") == reward
    assert TASKS[task].reward(problem, f"{form}</think>{answer}") == 0                  # no reasoning


def test_only_readers_must_end_in_their_answer():
    problem = train.Problem("synthesize", 1, "?", {"examples": [[0, 3], [4, 1]]})
    for form, reward in (("#yx*2+3", 1), ("#nx*2+3", 1), ("#x*2+3", 1), ("#yx*2", 0), ("x*2+3", 0)):
        assert TASKS["synthesize"].reward(problem, f"<think>{form}</think>x*2+3") == reward
    problem = train.Problem("add", 2, "?", {"a": 47, "b": 85})
    assert TASKS["add"].reward(problem, "<think></think>132") == 1 > TASKS["add"].reward(problem, "<think></think>131")


@settings(max_examples=400, deadline=None)
@given(text=st.one_of(st.text("0123456789xa+-*", max_size=9), st.text("09xabz+-*=; ()\n\0٣３", max_size=20), anything))
@example("1" + "+1" * 49)
@example("1" + "+1" * 50)
@example("__import__('os').system('x')")
@example("3１+3")
@example("11\n")
def test_the_interpreter_knows_its_language_and_nothing_else(text):
    """A regular expression says what the language is; nothing may run code while a text is interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        refuse_code(patch)
        values = run_expression(text, {"x": 4, "a": 7})
        runs = [run_program(program, {"x": 4, "a": 7}) for program in (text, f"a={text}", f"a=1;b={text}")]
    expected = re.fullmatch("[0-9xa]([-+*][0-9xa])*", text) is not None and len(text) <= 100
    assert (values is not None) == expected
    assert values is None or all(0 <= value <= 9 for value in values) and len(values) == max(1, len(text) // 2)
    for states in runs:
        assert states is None or len(states) <= 32 and all(0 <= value <= 9 for s in states for value in s.values())


def test_expressions_and_programs_by_hand():
    assert run_expression("7", {}) == [7] and run_expression("x", {"x": 4}) == [4] and run_expression("0", {}) == [0]
    assert run_expression("1+2*3", {}) == [3, 9]                # left to right
    assert run_expression("2-3-4", {}) == [9, 5]                # a remainder is never negative
    assert run_expression("x*x+a-3", {"x": 8, "a": 5}) == [4, 9, 6] and run_expression("x+y", {"x": 4}) is None
    assert run_expression("x+1", {"x": 0}) == [1]               # a register of 0 is a register
    states = [{"x": 6, "a": 0}, {"x": 6, "a": 0, "b": 9}, {"x": 6, "a": 7, "b": 9}]
    assert run_program("a=x+4;b=a-1;a=b*3", {"x": 6}) == states and run_program("x=x+1", {"x": 6}) == [{"x": 7}]
    for text in ("a=b;b=1", "a=1;", ";a=1", "a=1;;b=2", "a==1", "a=", "=1", "a", "f=1", "A=1", "a:1", "a=1\nb=2"):
        assert run_program(text, {}) is None
    assert len(run_program(";".join(["a=1"] * 32), {})) == 32
    assert run_program(";".join(["a=1"] * 33), {}) is run_program("a=1;" * 10**6, {}) is None


def test_problems_are_the_same_in_every_process():
    """Sets of strings have another order in each process: nothing may depend on it."""
    code = "import train; print([t.make(s, 4) for t in train.TASKS.values() for s in range(20)])"
    said = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": "1"}, text=True,
                          capture_output=True, cwd=os.path.dirname(train.__file__), check=True).stdout
    assert said.strip() == str([task.make(seed, 4) for task in TASKS.values() for seed in range(20)])


def test_reasoning_gym_datasets_are_tasks():
    pytest.importorskip("reasoning_gym")
    task = train.find_task("reasoning_gym:chain_sum")
    problem, harder = task.make(5, 2), task.make(5, 9)
    assert problem == task.make(5, 2) and json.loads(json.dumps(problem.data)) == problem.data
    assert len(harder.prompt) > len(problem.prompt) + 5
    assert task.verify(problem, task.solve(problem)) == (1, 1) and task.verify(problem, task.corrupt(problem)) == (0, 1)
    assert all(task.verify(problem, f"<think></think>{text}")[0] == 0 for text in ("", "x", "٣", "\0", "9" * 900))
    with pytest.raises(SystemExit, match="did you mean chain_sum"):
        train.find_task("reasoning_gym:chain_summ")


def test_reasoning_gym_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(SystemExit, match="pip install reasoning-gym"):
        train.ReasoningGym("reasoning_gym:chain_sum")
