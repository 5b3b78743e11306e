"""rsa.py: the rounds and the answers on examples worked out by hand, a run that is killed, and a tiny random Zaya."""
import contextlib
import doctest
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from conftest import randomise, trace_rows, unordered
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
import rsa
from rsa import (Budget, Candidate, Checkpoint, Result, Run, Source, Words, count_tokens, cut_tail, final_answer,
                 interval, last_boxed, majority, markovian_rsa, normal_form, open_trace, read_problems, report_prompt,
                 same, score_table, terse_prompt)
from zaya import Tokenizer, Zaya, ZayaConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BYTES = Tokenizer()


def test_docstring_examples():
    result = doctest.testmod(rsa)
    assert result.failed == 0 and result.attempted >= 3


@pytest.mark.parametrize("tokenizer", [None, BYTES], ids=["words", "bytes"])
@pytest.mark.parametrize("text, tail", [
    ("abc", "abc"), (" a  b\n", " a  b\n"), ("\n<think>a b</think>c", "a b"), ("<think>a b", "a b"),
    ("<think>\n</think>answer", "answer"), ("<think></think>\n\nIt is 4", "\n\nIt is 4"), ("</think>4", "4"),
    ("\n<think>\n\n</think>4", "4"), ("<think>\u3000\t</think>4", "4"), ("<think></think><think>so</think>4", "so"),
    ("<think></think>", ""), ("<think>", ""), ("", ""), ("<think> \n</think> \n", " \n"),
    ("</think>" * 50000 + "4", "4")])
def test_a_tail_is_the_end_of_the_reasoning_or_of_the_reply_behind_blank_reasoning(text, tail, tokenizer):
    assert cut_tail(text, 99, tokenizer) == tail and cut_tail(text, 0, tokenizer) == ""
    assert cut_tail("<think>abcdef</think>xyz", 3, BYTES) == "def" and cut_tail("<think>a b c</think>d", 2) == "b c"


LANGUAGES = ["天地玄黃宇宙洪荒", "これはペンです", "ภาษาไทย", "ភាសាខ្មែរ", "မြန်မာဘာသာ", "한국어", "🙂🙃", "x", "word ",
             "a+b=", "\n", " ", "\u3000", "é", "ا", "9", "\ud83d"]


@pytest.mark.parametrize("piece", LANGUAGES)
def test_words_bound_any_language(piece):
    text = (piece * 40000)[:40000]
    assert 0 < len(cut_tail(text, 100)) <= 100 * 33 and count_tokens(text) >= 40000 / 33
    assert text.endswith(cut_tail(text, 100)) and count_tokens(cut_tail(text, 100)) == 100
    if piece in LANGUAGES[:7]:
        assert cut_tail(piece * 9, 5) == (piece * 9)[-5:]       # a character each
    assert cut_tail("x" * 1000, 3) == "x" * (1000 - 16 * 60)    # 62 pieces of 16 and a rest of 8
    assert cut_tail("def f(x):\n    return x\n\nprint(f(1))", 3) == "return x\n\nprint(f(1))"


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(LANGUAGES), max_size=40).map("".join)), st.integers(0, 9))
def test_words_keep_each_character(text, n):
    assert "".join(Words.encode(text)) == text and all(0 < len(unit) <= 48 for unit in Words.encode(text))
    tail = cut_tail("<think>" + text, n)
    assert text.endswith(tail) and count_tokens(tail) == min(n, count_tokens(text))
    assert count_tokens(f"before {tail}\n\nafter") <= n + 2


def chatter(prompts, max_new_tokens, seed):
    """Random words, some with an answer, at most `max_new_tokens` of them."""
    rng = random.Random(seed)
    texts = [" ".join(str(rng.randrange(1000)) for _ in range(rng.randint(1, max_new_tokens))) for _ in prompts]
    return [f"<think>{text}</think>{rng.randrange(9)}" if rng.random() < 0.5 else text for text in texts]


@settings(max_examples=60, deadline=None)
@given(population=st.integers(1, 6), subset=st.integers(1, 6), rounds=st.integers(0, 4), tail=st.integers(0, 20))
def test_prompts_stay_bounded_whatever_the_rounds(population, subset, rounds, tail):
    subset = min(subset, population)
    for build, words in ((terse_prompt, 4 + subset), (report_prompt, 4 + 7 * subset + 11)):
        result = markovian_rsa("what is it ?", chatter, population, subset, rounds, budget=20, tail=tail, seed=3,
                               build_prompt=build)
        assert [len(r) for r in result.rounds] == [population] * (rounds + 1)
        assert result.longest_prompt <= words + subset * tail
        tags = [re.sub("(</?think>)", r" \1 ", c.text) for r in result.rounds for c in r]
        assert result.generated_tokens == sum(len(text.split()) for text in tags)


def test_the_rounds_by_hand():
    """Texts name their call, so it can be read off which tails went where: C of the last round, none twice."""
    calls = []

    def named(prompts, max_new_tokens, seed):
        calls.append((prompts, max_new_tokens, seed))
        return [f"<think>lost t{len(calls) - 1}c{i}</think>{i}" for i in range(len(prompts))]

    result = markovian_rsa("q", named, population=5, subset=3, rounds=2, budget=7, tail=1, seed=1)
    assert calls[0][0] == ["q"] * 5 and len(calls) == 3 and {budget for _, budget, _ in calls} == {7}
    assert len({seed for *_, seed in calls}) == 3
    for t in (1, 2):
        seen = set()
        for prompt in calls[t][0]:
            *tails, problem = prompt.split("|")[1:]
            assert problem == "q" and len(tails) == len(set(tails)) == 3
            assert all(tail in {f"t{t - 1}c{i}" for i in range(5)} for tail in tails)
            seen |= set(tails)
        assert len(seen) >= 4                                   # 5 draws of 3 leave hardly anyone out
    assert [c.tail for c in result.candidates] == [f"t2c{i}" for i in range(5)]
    first, same, other = (markovian_rsa("q", chatter, 5, 3, 2, 7, 1, seed=seed) for seed in (1, 1, 2))
    assert first == same != other


def test_special_cases_fall_out():
    assert len(markovian_rsa("q", chatter, rounds=0, budget=9, tail=3).rounds) == 1             # parallel sampling
    for subset, tail in ((1, 3), (2, 9)):                       # Delethink: one chain, its tail; full RSA: whole texts
        result = markovian_rsa("q", chatter, population=4, subset=subset, rounds=1, budget=9, tail=tail)
        shown = {cut_tail(c.text, tail) for c in result.rounds[0]}
        assert all(set(c.prompt.split("|")[1:-1]) <= shown and c.prompt.count("|") == 1 + subset
                   for c in result.rounds[1])


@pytest.mark.parametrize("wrong, says", [
    (dict(subset=17), "subset <= population"), (dict(subset=0), "makes no sense"), (dict(rounds=-1), "makes no sense"),
    (dict(tail=9, budget=8), "makes no sense"), (dict(budget=0, tail=0), "makes no sense"),
    (dict(generate=lambda prompts, n, seed: ["x"]), "returned 1 texts for 16")])
def test_nonsense_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        markovian_rsa("q", **dict(generate=chatter) | wrong)


# ---- several problems, failed rollouts ------------------------------------------------------------------------------


def test_every_call_has_the_prompts_of_all_problems_in_order():
    calls = []

    def watched(prompts, max_new_tokens, seed):
        calls.append(prompts)
        return [f"<think>{i}</think>" for i in range(len(prompts))]

    results = markovian_rsa(iter(["a", "b"]), watched, population=3, subset=3, rounds=1, budget=4, tail=4)
    assert calls[0] == ["a"] * 3 + ["b"] * 3 and len(calls) == 2
    assert [prompt[-1] for prompt in calls[1]] == ["a"] * 3 + ["b"] * 3
    assert [[c.text for c in result.rounds[0]] for result in results] == \
        [[f"<think>{i}</think>" for i in part] for part in ((0, 1, 2), (3, 4, 5))]
    assert all(set(prompt.split("|")[1:-1]) == set("012") for prompt in calls[1][:3])
    assert all(set(prompt.split("|")[1:-1]) == set("345") for prompt in calls[1][3:])
    calls.clear()
    markovian_rsa(["q", "q"], watched, population=4, subset=1, rounds=6, budget=4, tail=4)
    drawn = [[int(prompt[1]) % 4 for call in calls[1:] for prompt in call[part]] for part in (slice(4), slice(4, 8))]
    assert drawn[0] != drawn[1]                                 # each problem has its own luck
    assert markovian_rsa([], watched) == []


def test_failed_rollouts_are_left_out_of_the_subsets():
    calls = []

    def half_fail(prompts, max_new_tokens, seed):
        calls.append(prompts)
        return [None if i % 4 in (1, 3) else f"<think>t{len(calls) - 1}c{i}</think>5" for i in range(len(prompts))]

    a, b = markovian_rsa(["a", "b"], half_fail, population=4, subset=3, rounds=2, budget=9, tail=1)
    for result, first in ((a, 0), (b, 4)):
        for t in (0, 1, 2):
            assert [c.text is None for c in result.rounds[t]] == [False, True, False, True]
            assert [c.tail for c in result.rounds[t]] == [f"t{t}c{first}", None, f"t{t}c{first + 2}", None]
        for t in (1, 2):                                        # 2 of 4 are left: a subset of 3 has those two
            assert all(set(c.prompt.split("|")[1:-1]) == {f"t{t - 1}c{first}", f"t{t - 1}c{first + 2}"}
                       for c in result.rounds[t])
    assert a.generated_tokens == 3 * 2 * 4 and "None" not in str(calls)         # two tags, t0c0, 5


def test_a_problem_that_fails_as_a_whole_ends_nothing_for_the_others():
    def first_fails(prompts, max_new_tokens, seed):
        return [None if prompt == "q" else "<think>so</think>4" for prompt in prompts]
    shape = dict(population=3, subset=2, rounds=2, budget=4, tail=2)
    bad, good = markovian_rsa(["q", "r"], first_fails, **shape)
    assert [c.text for row in bad.rounds for c in row] == [None] * 9 and bad.generated_tokens == 0
    assert {c.prompt for row in bad.rounds for c in row} == {"q"}                   # asked as in round 0
    assert {c.prompt for row in good.rounds[1:] for c in row} == {"|so|so|r"}
    for problems, count in (("q", 3), (["q", "q"], 6)):         # but if all do, there is nothing to aggregate
        with pytest.raises(RuntimeError, match=f"all {count} candidates of a round failed"):
            markovian_rsa(problems, first_fails, **shape)


@pytest.mark.parametrize("build", [terse_prompt, report_prompt])
def test_blank_tails_are_left_out(build):
    """Every second reply has nothing to hand on, and one problem's none at all."""
    def half_blank(prompts, max_new_tokens, seed):
        return [("<think> \n</think>", "<think>so</think>4")["R?" in p and i % 2] for i, p in enumerate(prompts)]
    blank, half = markovian_rsa(["Q?", "R?"], half_blank, 4, 3, 1, 9, 3, build_prompt=build)
    assert {c.prompt for c in blank.rounds[1]} == {build("Q?", [])}
    assert {c.prompt for c in half.rounds[1]} == {build("R?", ["so"] * 2)}           # 2 of 4 are left


def test_tokens_are_counted_with_tags_as_one_each():
    assert count_tokens("<think>ab</think>c", BYTES) == 5 and count_tokens("abc", BYTES) == 3
    assert count_tokens("", BYTES) == count_tokens("") == 0 and count_tokens("<think>a b</think> c") == 5
    assert count_tokens("<think><think>é", BYTES) == 4
    result = markovian_rsa("qq", lambda prompts, n, seed: ["<think>ab</think>c"] * len(prompts), population=2, subset=1,
                           rounds=1, budget=9, tail=2, tokenizer=BYTES)
    assert result.generated_tokens == 2 * 2 * 5 and result.longest_prompt == len("|ab|qq")


# ---- answers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, inside", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{1} and \boxed{2", "1"),
    (r"\boxed{}", ""), (r"\boxed{a \boxed{b} c}", "b"), (r"\boxed{a {b} {c {d}}} }}", "a {b} {c {d}}"),
    (r"} \boxed{x}", "x"), (r"\boxed{ \boxed{3} {", "3"), (r"\boxed{{}", None), ("boxed{1}", None), ("", None),
    (r"\boxed{1}\boxed{ {", "1"), (r"\boxed {42}", "42"), ("\\boxed\n{ 42 }", " 42 "), (r"\fbox{7}", "7"),
    (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{\left\{x\right.}", r"\left\{x\right."), (r"\\boxed{5}", "5"),
    (r"\boxed{\begin{array}{c}1\\{2}\end{array}}", r"\begin{array}{c}1\\{2}\end{array}")])
def test_the_last_complete_box_counts(text, inside):
    assert last_boxed(text) == inside


@pytest.mark.parametrize("text, answer", [
    ("<think>7*6</think>It is \\boxed{42}.", "42"), ("<think>so \\boxed{1}", None), ("<think>\\boxed{1}</think>", None),
    ("<think>\\boxed{1}</think>2", "2"), ("<think>a</think>b</think> c ", "c"), ("12", "12"), ("", None), (None, None),
    ("<think></think>\n\n 5 \n", "5"), ("<think></think>two\nlines", None), ("<think></think>" + "9" * 100, "9" * 100),
    ("<think></think>" + "9" * 101, None), ("long\ntext\n#### 1,000\n", "1,000"), ("a #### 1 #### 2", "2"),
    ("x\n<answer> 3 </answer>\n<answer>4\n</answer>", "4"), ("<answer>1</answer> \\boxed{2} #### 3", "2"),
    ("<answer>1</answer> #### 3", "1"), ("\\boxed{ }", None), ("x\n<answer>5", None), ("x\n####", None),
    ("reasoning without an opening tag</think>8", "8"),
    ("#### Step 1\nWe add.\n#### Step 2\nSo it is clear.", None), ("#### Step 1\nWe add.\n#### 72\n", "72"),
    ("#### Step 1\nWe add.\n#### Answer\n\n42", "42"), ("Sure.\r\n#### **Final Answer:**\r\n42\r\n", "42"),
    ("#### Step 1\nWe add.\n#### **Answer:** 42", "42"), ("#### The answer is 42", "42"), ("a\n#### Answer", None),
    ("#### Answer\nWe think\nof many lines", None), ("#### Step 2\nSo \\boxed{5}\n#### Check\nit is", "5"),
    ("#### 72\nThat is 72 in all,\nI think.", None), ("#### Answers vary\n42", None)])
def test_final_answers_by_hand(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize("spellings", [
    ["7", "07", "7.0", "+7", "$7$", " 7 . ", "7\\%", "7^\\circ", r"\text{7}", "14/2", r"\frac{14}{2}", r"\dfrac{7}{1}"],
    ["1234567", "1,234,567", "$1,234,567.00$", r"1{,}234{,}567".replace("{,}", "\\,")], ["-1/2", "-0.5", "-2/4"],
    ["Even", "even", r"\text{Even}", "\\mathrm{even}.", r"\text{Even.}"], ["12,34", "12, 34"],
    [r"\left(1,2\right)", "(1, 2)", "(1,2)", r"(1.0,\frac42)", r"\left( 1 ,{2} \right)."],
    [r"\sqrt{2}", r"\sqrt{ 2 }", r"\sqrt2"],
    ["18", r"\$18", "$18", r"$\$18.00$", "18%", "18°", r"18^{\circ}", r"18\degree"], ["-5", "−5", "–5", "- 5", r"-\$5"],
    ["1/2", r"\frac12", r"\dfrac12", r"\tfrac{1}{2}", r"\frac1{2}", r"\frac{1}2", ".5", "0.50", r"5\times10^{-1}"],
    ["3/2", "1 1/2", r"1\frac{1}{2}", r"1\frac12", r"1\,\tfrac{1}{2}", "1.5", r"\frac{3}{2}", r"0.15 \cdot 10^1"],
    ["1234", "1,234", "1{,}234", r"1,\!234", r"1\,234", "1.234e3", "1.234×10^3"], ["(1,234)", "(1, 234)"],
    ["5 cm", r"5\text{ cm}", r"5\,\mathrm{cm}", "5cm"], ["New York", r"\text{New  York}", r"\text{new} \text{york}"],
    ["x = 1/2", r"x=\frac12", "x=.5"], ["x^2", "x^{2}"], ["2^10", "2^{10}"], ["(-1, 0.5]", r"\left(-1,\frac12\right]"],
    [r"\frac{\sqrt{3}}{2}", r"\dfrac{\sqrt3}2", r"\frac{ \sqrt{3} }{ 2 }"], ["A", "a", r"\textbf{A}"]])
def test_spellings_of_one_answer_are_the_same(spellings):
    assert len(set(map(normal_form, spellings))) == 1
    assert all(same(a, b) for a in spellings for b in spellings)
    assert majority(spellings) == (spellings[0], len(spellings))


def test_different_answers_are_different():
    answers = ["7", "-7", "0.7", "1/7", "7/0", "(7)", "seven", "7e3", "1e999999999", "12,34", "1234", "7.7.7", "",
               ".", "1 10", "11 0", "110", "1 2 3", "123", "1 23", "12 34", "1 234", "1. 5", "1.5", "15", "1 15",
               r"2\frac{1}{3}", "21/3 x", "2/3", "5.5", r"1\frac{3}{2}", "1/2/3", "--2", "2", "5-3", "0,125", "125",
               "0.333...", "0.333", "10,100,1000", "(1,234)", "(1{,}234)", "[1,234]", r"\{1,234\}", "(1,23)", "x=5",
               "y=5", "5", "5 m", "5 cm", "50 cm", "x+2", "x2", "(x)+2", "(x)2", "x^{2}3", "x^23", r"\sqrt{23}",
               r"\sqrt23", r"\binom{n}{k+1}", r"\binom{n}{k}+1", r"\sqrt[3]{x+1}", r"\sqrt[3]{x}+1", "2^x+1",
               "2^{x+1}", r"2^\text{x+1}", "a part", "apart", r"\Delta", r"\delta", "10^{10^{10}}", "10^10^9",
               "1e301 x", "½", "٣", "3"]
    forms = [normal_form(answer) for answer in answers]
    assert len(set(forms)) == len(answers) - 1 and normal_form("") == normal_form(".")
    assert normal_form("0.1") == Fraction(1, 10) and not same(None, "7") and not same("8", "7")
    assert not same(None, "none") and not same("", "7")


def test_none_never_wins_a_vote():
    assert majority([None] * 9 + ["3"]) == ("3", 1) and majority([]) == (None, 0)
    assert majority(["a", "b", "b", "a"]) == ("a", 2)           # the first of several


NUMBERS = st.builds(Fraction, st.one_of(st.integers(-30, 30), st.integers(-10 ** 7, 10 ** 7)),
                    st.one_of(st.just(1), st.integers(1, 12), st.sampled_from([100, 1000, 625])))


def bare_spellings(value):
    """An absolute value in digits: as decimal, with exponents, groups of thousands, fractions and mixed numbers."""
    n, d = value.numerator, value.denominator
    yield from (f"{n}/{d}", f"{7 * n} / {7 * d}", rf"\frac{{{n}}}{{{d}}}", rf"\dfrac{{ {3 * n} }}{{ {3 * d} }}")
    if n < 10 and d < 10:
        yield from (rf"\frac{n}{d}", rf"\tfrac {n} {d}", rf"\frac{{{n}}}{d}", rf"\frac{n}{{{d}}}")
    if 1 < d < n:
        yield from (f"{n // d} {n % d}/{d}", rf"{n // d}\frac{{{n % d}}}{{{d}}}", rf"{n // d} \dfrac{{{n % d}}}{{{d}}}")
    if 10 ** 9 % d == 0:
        whole, part = divmod(n * 10 ** 9 // d, 10 ** 9)
        digits = f"{part:09}".rstrip("0")
        yield from (f"{whole}.{digits}0", f"{whole:,}.{digits}00", f"{n * 10 ** 9 // d}e-9",
                    rf"{n * 10 ** 9 // d} \times 10^{{-9}}", rf"{whole:,}.{digits}0".replace(",", "{,}"))
        yield f".{digits}0" if whole == 0 else f"00{whole}.{digits}0"
    if d == 1:
        yield from (f"{n}", f"{n:,}", f"{n:,}".replace(",", r"\,"), f"{n:,}".replace(",", r",\!"), f"{n}.", f"{{{n}}}")


@st.composite
def spelled(draw, value, commas=True):
    """A value in full dress; commas=False: as a member of a tuple, where a comma separates."""
    given = [bare for bare in bare_spellings(abs(value)) if commas or not re.search(r"(?<!\{),|\.$", bare)]
    sign = draw(st.sampled_from(["-", "− ", "–"] if value < 0 else ["", "", "+"]))
    text = sign + draw(st.sampled_from(["", r"\$", "$"])) + draw(st.sampled_from(given))
    if text.endswith("."):
        return text
    text += draw(st.sampled_from(["", "", "%", r"\%", "°", r"^\circ", r"^{\circ}"]))
    forms = ["?", " ? ", "$?$", r"\displaystyle ?", r"\text{?}"] + [r"?.", r"\(?\)"] * commas
    return draw(st.sampled_from(forms)).replace("?", text)


@settings(max_examples=200, deadline=None)
@given(st.data(), NUMBERS, NUMBERS)
def test_a_value_agrees_with_its_spellings_and_with_no_other_value(data, value, other):
    a, b, c = (data.draw(spelled(number)) for number in (value, value, other))
    assert normal_form(a) == value and same(a, b) and same(b, a)
    assert same(a, c) == same(c, a) == (value == other)
    assert majority([None, c, a, b]) == ((c, 3) if value == other else (a, 2))


WORDS = st.lists(st.one_of(st.integers(0, 120).map(str), st.sampled_from(["x", "xy", "y"])), min_size=1, max_size=4)


@given(WORDS, WORDS)
def test_white_space_separates(ours, others):
    assert same("  ".join(ours), "\n".join(ours)) and same(" ".join(ours), " ".join(others)) == (ours == others)


PIECES = ["\\boxed{", "\\boxed {", "}", "{", "<answer>", "</answer>", "####", "<think>", "</think>", "\\frac{",
          "\\frac", "\\text{", "\\sqrt", "^", "_", "{,}", "\\left(", ")", "[", "=", "1", "0", "12", "1,234", "/", ",",
          ".", "-", "%", "e999999999", "10^", "10^{10^{10}}", "9" * 5000, "0" * 5000, "$", "\\", " ", "\n", "^\\circ",
          "٣", "²", "\ud800"]
ANY_TEXT = st.one_of(st.text(), st.lists(st.sampled_from(PIECES), max_size=12).map("".join))


@settings(max_examples=400, deadline=None)
@given(ANY_TEXT)
def test_any_text_has_an_answer_or_none(text):
    answer, boxed = final_answer(text), last_boxed(text)
    assert answer is None or (answer == answer.strip() != "" and answer in text)
    assert boxed is None or re.search(r"\\(boxed|fbox)\s*\{" + re.escape(boxed) + r"\}", text)
    braces = re.findall(r"(?<!\\)\\[{}]|([{}])", boxed or "")
    assert braces.count("{") == braces.count("}")
    assert normal_form(text) == normal_form(f" {text}") and hash(normal_form(text)) is not None and same(text, text)
    assert majority([None, text, None]) == (text, 1)
    assert cut_tail(text, 3, BYTES) is not None and count_tokens(text, BYTES) >= 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.none(), ANY_TEXT, NUMBERS.map(str)), max_size=6))
def test_votes_are_for_answers_that_are_the_same(answers):
    winner, votes = majority(answers)
    counts = [sum(same(a, b) for b in answers) for a in answers if a is not None]
    assert all(same(a, b) == same(b, a) for a in answers for b in answers)
    assert votes == max(counts, default=0) == sum(same(winner, a) for a in answers)


LATEX = [(r"\sqrt{49}", "7"), (r"\frac{\sqrt{3}}{2}", r"\sqrt{3}/2"), ("x^2+1", "1+x^2"), (r"4\sqrt{2}", "32^{1/2}"),
         (r"\{1,2\}", r"\{2,1\}")]
NOT_LATEX = [("1 10", "110"), (r"1\ 10", "110"), (r"2\frac{1}{3}\pi", r"\frac{2\pi}{3}"), (r"\text{no}", r"\text{on}"),
             (r"\frac12", "2/3"), ("no", "on"), (r"5\text{ m}", "5"),
             (r"(1,\frac12)", "(1,2/3)")]


def test_math_verify_is_asked_about_latex_alone_and_may_fail(monkeypatch):
    """A stand-in for the package, which answers yes to everything, or raises: who asks it, and when."""
    asked = []

    def parse(text, *_, **__):
        asked.append(text)
        return text
    fake = SimpleNamespace(LatexExtractionConfig=lambda **_: None, parse=parse, verify=lambda *_, **__: True)
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    same.cache_clear()
    try:
        assert all(same(a, b) for a, b in LATEX) and asked.count(r"$\sqrt{49}$") == 1
        assert majority([r"\sqrt{49}", "8", "7", "7.0"]) == (r"\sqrt{49}", 4)         # it says yes to 8, too
        before = list(asked)
        assert not any(same(a, b) or same(b, a) for a, b in NOT_LATEX) and same(r"\sqrt{2}", r"\sqrt 2")
        assert not same(r"\pi" + " x" * 300, r"\pi") and not same(None, r"\pi") and asked == before
        fake.verify = lambda *_, **__: 1 / 0
        assert not same(r"\sqrt{51}", "7") and len(asked) > len(before)
        fake.verify = lambda a, b, *_, **__: a < b              # one way round only
        assert not same(r"\sqrt{52}", "7") and not same("7", r"\sqrt{52}")
        monkeypatch.setitem(sys.modules, "math_verify", None)   # not installed
        assert not same(r"\sqrt{53}", "7")
    finally:
        same.cache_clear()


def test_math_verify_itself():
    pytest.importorskip("math_verify")
    same.cache_clear()
    assert all(same(a, b) and same(b, a) for a, b in LATEX) and not any(same(a, b) for a, b in NOT_LATEX)
    assert majority(["8", r"\frac{14}{\sqrt{4}}", "8", r"\sqrt{49}", "7"]) == (r"\frac{14}{\sqrt{4}}", 3)
    hardest = ["10^{10^{10}}", "9^{9^{9^9}}", r"\binom{10^9}{500000000}", r"10^{9}!", r"\frac{1}{0}", r"\frac{"]
    for hard in [*hardest, "{" * 99]:
        assert not same(hard, r"\sqrt{2}")
    assert not same(r"\sqrt{2}", "1.414214") and not same(r"\frac{\pi}{2}", r"\pi")


@pytest.mark.parametrize("piece", ["\\boxed{", "{", "}", "<answer>", "\\frac{1}{", "\\frac", "\\text{", "1,111",
                                   "1{,}111", "9", "1/", "####", "</think>", ".", "\\", "^", "^{a", "(", "-", "1 "])
def test_what_a_model_repeats_for_ever_is_read_at_once(piece):
    """No stopwatch: what is done well takes milliseconds here, what is not takes minutes."""
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    short = piece * (900 // len(piece))                         # what is longer is not read as LaTeX
    try:
        for text in (piece * 60000 + "}" * 60000, "1/" + piece * 60000 + "1", short, short + "}" * 90):
            signal.alarm(60)
            final_answer(text)
            same(text, text + "x")
            majority([text + str(i) for i in range(3)])
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_intervals():
    assert interval([]) == interval([1.0]) == [0.0, 1.0]
    assert interval([1] * 10) == pytest.approx([1 - 0.196, 1.0]) and interval([0] * 10) == pytest.approx([0, 0.196])
    spread = 1.96 * (25 / 99) ** 0.5 / 10                       # 100 problems, half of them right
    assert interval([0, 1] * 50) == pytest.approx([0.5 - spread, 0.5 + spread])
    assert interval([True, False]) == [0.0, 1.0]
    low, high = interval([0.5] * 4)
    assert low == pytest.approx(0.01) and high == pytest.approx(0.99)


# ---- a run, its trace, and going on ---------------------------------------------------------------------------------


class Fake(Source):
    """A source that remembers what it was asked; `fails` of (prompt) says which rollouts fail."""

    def __init__(self, fails=lambda prompt: False):
        self.asked, self.fails = [], fails

    def stream(self, prompts, max_new_tokens, seed, known=()):
        for i in reversed(range(len(prompts))):
            if i not in known:
                self.asked.append(prompts[i])
                if self.fails(prompts[i]):
                    yield i, None, 0, "it broke"
                else:
                    yield i, f"<think>{random.Random(prompts[i]).randrange(999)} é\u2028 so</think>{i}", 4, None


SMALL = Budget(population=3, subset=2, rounds=2, budget=9, tail=2)
SETTINGS = dict(source="fake", seed=0, problems=["p", "q"])


def fake_run(source, path=None, resume=False, problems=("p", "q"), budget=SMALL, known=None):
    file, rows = open_trace(path and str(path), SETTINGS, resume)
    run = Run(source, "small", budget, None, file, rows or known)
    with file or contextlib.nullcontext():
        return run, markovian_rsa(list(problems), run, budget.population, budget.subset, budget.rounds, budget.budget,
                                  budget.tail)


@pytest.mark.parametrize("lost", [0, 1, 17, 400, 1500])
def test_a_trace_has_every_rollout_and_a_torn_line_is_asked_again(tmp_path, lost):
    path = tmp_path / "trace"
    run, results = fake_run(Fake(), path)
    head, *rows = trace_rows(path)
    assert head == {"settings": SETTINGS} and len(rows) == 2 * 3 * 3
    for row in rows:
        candidate = results[row["problem"]].rounds[row["round"]][row["index"]]
        assert row == dict(run="small", problem=row["problem"], round=row["round"], index=row["index"],
                           prompt=candidate.prompt, text=candidate.text, tail=candidate.tail, tokens=4,
                           answer=final_answer(candidate.text))
    assert run.tokens == [24, 24, 24] and run.failed == [] and fake_run(Fake())[1] == results       # without a trace
    torn = path.read_bytes()[:len(path.read_bytes()) - lost]
    path.write_bytes(torn)
    again = Fake()
    resumed, same_results = fake_run(again, path, resume=True)
    assert same_results == results and resumed.tokens == run.tokens
    assert len(again.asked) == 18 - (torn.count(b"\n") - 1) and (len(again.asked) > 0) == (lost > 0)
    assert unordered(trace_rows(path)) == unordered([head, *rows])
    assert path.read_bytes().startswith(torn[:torn.rindex(b"\n") + 1])


def test_only_the_same_prompt_is_known(tmp_path):
    path = tmp_path / "trace"
    fake_run(Fake(), path)
    known = open_trace(str(path), SETTINGS, True)[1]
    for problems, asked in ((("p", "other"), 9), (("p", "q"), 0)):
        source = Fake()
        fake_run(source, known=known, problems=problems)
        assert len(source.asked) == asked
    victim = next(key for key in known if key[:2] == (0, 1))
    known[victim] = "<think>but</think>", 4                     # its tail changes: so do prompts that show it
    source = Fake()
    results = fake_run(source, known=known)[1]
    assert 0 < len(source.asked) < 9 and all(prompt.endswith("|q") for prompt in source.asked)
    assert any("but" in prompt for prompt in source.asked)
    assert results[1].rounds[0][victim[2]].text == "<think>but</think>"


def test_what_failed_is_reported_traced_and_asked_again(tmp_path, capsys):
    path = tmp_path / "trace"
    fails = []

    def fail_once_a_problem(prompt):
        fails.append(prompt)
        return fails.count(prompt) == 1 and "|" not in prompt

    run, results = fake_run(Fake(fail_once_a_problem), path)
    said = capsys.readouterr()
    assert run.failed == ["problem 1, round 0, candidate 2: it broke", "problem 0, round 0, candidate 2: it broke"]
    assert all(f"failed, and left out of the subsets: {line}" in said.err for line in run.failed)
    broken = [row for row in trace_rows(path)[1:] if row["text"] is None]
    assert [(row["problem"], row["round"], row["index"], row["error"]) for row in broken] == \
        [(1, 0, 2, "it broke"), (0, 0, 2, "it broke")]
    assert results[0].rounds[0][2] == Candidate("p", None, None) and run.tokens == [16, 24, 24]
    again = Fake()
    resumed, whole = fake_run(again, path, resume=True)
    assert sorted(prompt for prompt in again.asked if "|" not in prompt) == ["p", "q"] and resumed.failed == []
    assert whole == fake_run(Fake())[1]


def test_a_round_without_answers_is_warned_about(capsys):
    """A fifth without an answer is no news, a quarter is."""
    class Silent(Source):
        def stream(self, prompts, max_new_tokens, seed, known=()):
            for i in range(len(prompts)):
                yield i, "no\nanswer" if i < silent.pop(0) else "<think>so</think>4", 3, None
    for population, counts, warned in ((4, [1, 0, 4], ["round 0: 1 of 4", "round 2: 4 of 4"]), (5, [1, 1, 1], [])):
        silent = [count for count in counts for _ in range(population)]
        fake_run(Silent(), problems=["p"], budget=Budget(population, 2, 2, 9, 2))
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("small, round")]
        assert [line.removeprefix("small, ").split(" replies name no answer")[0] for line in said] == warned


def test_a_trace_holds_what_utf8_does_not(tmp_path):
    for i, text in enumerate(["half \ud83d", "\udcff", "é\u2028\U0001f642", "\udc00\ud800"]):
        path, here = tmp_path / f"{i}", SETTINGS | dict(problems=[text])
        open_trace(str(path), here, False)[0].close()
        assert trace_rows(path) == [{"settings": here}]
        file, rows = open_trace(str(path), here, True)          # and knows it again
        file.close()
        assert rows == {}


@pytest.mark.parametrize("damaged", ["half a line", "[]", "5", '{"text": "x", "tokens": 3}',
                                     '{"text": "", "round": [0], "problem": 0, "index": 0, "prompt": "", "tokens": 3}'])
def test_a_damaged_row_of_a_trace_is_located(tmp_path, damaged):
    path = tmp_path / "trace"
    fake_run(Fake(), path)
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[4] = damaged
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(SystemExit, match=re.escape(f"{path}, line 5: not a rollout")):
        open_trace(str(path), SETTINGS, True)


def test_a_trace_of_something_else_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "trace"
    fake_run(Fake(), path)
    for now, resume, says in ((SETTINGS, False, "exists: add --resume"),
                              (SETTINGS | dict(seed=1), True, r"with other settings \(seed\)"),
                              (SETTINGS | dict(seed=1, source="x"), True, r"\(source, seed\)")):
        before = path.read_bytes()
        with pytest.raises(SystemExit, match=says):
            open_trace(str(path), now, resume)
        assert path.read_bytes() == before
    for content in (b'{"settings": 5}\n', b'{"settings": null}\n', b"[" * 100000 + b"\n", b"my notes\nand more",
                    b'{"problem": "1+1", "answer": "2"}\n{"problem": "2+2", "answer": "4"}', b"my only line",
                    b'{"settings": {"seed": 0}}\n{"a": 1'):
        path.write_bytes(content)
        with pytest.raises(SystemExit, match="line 1: not a rollout of rsa.py|with other settings"):
            open_trace(str(path), SETTINGS, True)
        assert path.read_bytes() == content                     # also without a line end: nothing is cut off
    assert open_trace(None, SETTINGS, False) == (None, {})
    path.write_bytes(b"")                                       # an empty file is a new one
    open_trace(str(path), SETTINGS, False)[0].close()
    assert trace_rows(path) == [{"settings": SETTINGS}]


# ---- the command line -----------------------------------------------------------------------------------------------


def asked(*arguments):
    return rsa.asked_budget(rsa.parse_arguments(["q", *arguments]))


def test_budgets_with_the_command_lines_numbers():
    here, there = ["--checkpoint", "x"], ["--endpoint", "http://x", "--model", "m"]
    assert asked(*here) == rsa.BUDGETS["tiny"] and asked(*there) == rsa.BUDGETS["default"]
    assert asked(*here, "--population", "3", "--max-tokens", "9") == Budget(3, 3, 2, 9, 9)
    assert asked(*here, "--population", "32", "--subset", "1", "--rounds", "0", "--tail", "0", "--budget", "light") == \
        Budget(32, 1, 0, 40960, 0)
    assert asked(*there, "--max-tokens", "99999", "--tail", "99999") == Budget(16, 4, 2, 99999, 99999)
    for wrong in (["--population", "0"], ["--subset", "17"], ["--rounds", "-1"], ["--tail", "9", "--max-tokens", "8"]):
        with pytest.raises(SystemExit, match="--budget tiny: .* makes no sense: needed are 1 <= subset"):
            asked(*here, *wrong)


def test_problems_are_read_and_mistakes_located(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"problem": "1+1", "answer": 2}\n\n{"problem": "é", "answer": "x", "more": 1}\n', encoding="utf-8")
    assert read_problems(str(path)) == [("1+1", "2"), ("é", "x")]
    path.write_text(json.dumps({"problem": "q", "answer": "3 * 4 = 12\n12 + 60\n#### 72"}))
    assert read_problems(str(path)) == [("q", "72")]
    path.write_text("\n".join(f'{{"problem": "q", "answer": {truth}}}' for truth in (
        "42", "-3", "0.1", "1e22", '["42"]', "[2.5]", '"a, b"', '["#### 5"]', "0", '"\\\\text{no}"')))
    answers = [answer for _, answer in read_problems(str(path))]
    assert answers == ["42", "-3", "0.1", "1e+22", "42", "2.5", "a, b", "5", "0", r"\text{no}"]
    refused = [f'{{"problem": "q", "answer": {truth}}}'.encode() for truth in (
        "null", '""', '"$"', '{"value": 42}', "[]", "[1, 2]", "[null]", "[[1]]", '[""]', "true", "NaN", "-Infinity",
        "1e999", "[" * 100000)]
    refused += [f'{{"problem": {problem}, "answer": 42}}'.encode() for problem in (
        "null", '" \\n"', "7", '["q"]', '[{"role": "user", "content": "6*7?"}]')]
    refused += [b"nonsense", b'{"problem": "q"}', b'{"answer": 1}', b"[1]", b'"problem"', b'{"problem": "\xff"}']
    for bad in refused:
        path.write_bytes(b'{"problem": "1+1", "answer": 2}\n' + bad + b"\n")
        with pytest.raises(SystemExit, match=re.escape(str(path)) + ", line 2: not"):
            read_problems(str(path))
    path.write_text("\n \n")
    with pytest.raises(SystemExit, match="holds no problems"):
        read_problems(str(path))


def test_scores_by_hand():
    """answers[problem][round]: the candidates' answers, None for one that failed."""
    answers = [[["5", "5", "6", "7"], ["5", "05", "5.0", "7"]], [["1", "2", "2", None], ["1", "1", "2", "3"]]]
    results = [Result([[Candidate("q", a and f"<think>t</think>{a}", a and "t") for a in row] for row in rounds],
                      longest_prompt=1234) for rounds in answers]
    run = SimpleNamespace(name="light", budget=Budget(4, 1, 1, 9, 3), tokens=[1000, 2000], failed=["one"])
    titles, _, cells = ([cell.strip() for cell in line.strip("|").split("|")]
                        for line in score_table(run, results, ["5", "1"]).split("\n"))
    # right in round 0: 2 of 4 and 1 of 4 (the failed one is not right); in round 1: 3 of 4 and 2 of 4
    assert cells == ["light: N=4 C=1 T=1 beta=9 tau=3", "0.375 [0.000, 1.000]", "0.500 [0.000, 1.000]",
                     "0.625 [0.000, 1.000]", "1.000 [0.020, 1.000]", "1,500", "1,234", "1"]
    assert titles == ["budget", "single", "majority of round 0", "Markovian RSA", "its majority", "tokens a problem",
                      "longest prompt", "failed"]


# ---- a checkpoint of ours -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    config = ZayaConfig(vocab_size=BYTES.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                        num_key_value_heads=2, head_dim=8, num_experts=4, moe_intermediate_size=24,
                        router_hidden_size=12, eos_token_id=BYTES.end, pad_token_id=BYTES.pad,
                        max_position_embeddings=512)
    return randomise(Zaya(config), 6)


PROMPTS = ["47+85", "a longer prompt", "x", "47+86", "x", "another prompt of that size", "47+85"]


def test_a_checkpoint_answers_each_prompt_its_own(model):
    greedy = Checkpoint(model, BYTES, temperature=0)
    alone = [greedy([prompt], 12, 0)[0] for prompt in PROMPTS]
    assert len(set(alone)) == len(set(PROMPTS)) == 5
    for rows in (1, 2, 3, 256):
        assert Checkpoint(model, BYTES, 0, rows)(PROMPTS, 12, 5) == alone


def test_a_checkpoint_samples_by_its_seed(model):
    source = Checkpoint(model, BYTES)
    texts = source(PROMPTS, 12, 5)
    for i, text, tokens, error in source.stream(PROMPTS, 12, 5):
        assert text == texts[i] and tokens == count_tokens(text, BYTES) > 0 and error is None
    assert texts != source(PROMPTS, 12, 6)
    distinct = sorted(set(PROMPTS))
    texts, turned = dict(zip(distinct, source(distinct, 12, 5))), distinct[2:] + distinct[:2]
    assert dict(zip(turned, source(turned, 12, 5))) == texts    # whatever their order
    for rows in (3, 256):                                       # also over several batches
        assert len(set(Checkpoint(model, BYTES, 1.0, rows)(["x"] * 9, 12, 5))) == 9
    for sharp in (Checkpoint(model, BYTES, 0), Checkpoint(model, BYTES, top_p=1e-6)):               # they arrive
        assert sharp(["x"] * 3, 12, 5) == Checkpoint(model, BYTES, 0)(["x"], 12, 5) * 3


def test_rows_that_are_equal_are_prefilled_once_and_stay_themselves(model, monkeypatch):
    """Left-padded too; two of them differ in their padding only."""
    rows = [[5, 6, 7, 8], [9, 9], [5, 6, 7, 8], [6, 7, 8], [9, 9], [5, 6, 7, 8], [BYTES.pad, 9, 9]]
    ids, mask = rsa.left_padded(rows, BYTES.pad, "cpu")
    assert ids.shape == mask.shape == (7, 4) and ids[4].tolist() == [BYTES.pad, BYTES.pad, 9, 9]
    alone = [model.generate(torch.tensor([row]), 10, 0)[0, len(row):].tolist() for row in rows]
    shapes, hidden_states = [], Zaya.hidden_states
    monkeypatch.setattr(Zaya, "hidden_states", lambda self, input_ids, *rest, **options: shapes.append(
        tuple(input_ids.shape)) or hidden_states(self, input_ids, *rest, **options))
    assert model.generate(ids, 10, 0, attention_mask=mask)[:, 4:].tolist() == alone
    assert shapes == [(4, 4)] + [(7, 1)] * 9


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    BYTES.save_pretrained(path)
    return str(path)


def shortened(folder, *arguments):
    return ["--checkpoint", folder, "--population", "4", "--subset", "2", "--max-tokens", "12", "--tail", "6",
            *map(str, arguments)]


def test_one_problem_on_the_command_line(folder, tmp_path, capsys):
    trace = tmp_path / "x.trace"
    rsa.main(["3+4", *shortened(folder, "--trace", trace)])
    said = capsys.readouterr().out
    assert "tiny: N=4 C=2 T=2 beta=12 tau=6, problems: 1, rollouts: 12, of at most 144 tokens; prompts of at most " \
        "the problem and 12 tokens of tails; temperature 1, top-p 1\n" in said
    assert "majority of the last round: " in said
    head, *rows = trace_rows(trace)
    assert head["settings"]["problems"] == ["3+4"] and head["settings"]["top_p"] == 1 and len(rows) == 12
    assert {row["prompt"] for row in rows if row["round"] == 0} == {"3+4"}                  # as in training
    source = Checkpoint.from_pretrained(folder)
    by_hand = markovian_rsa("3+4", source, 4, 2, 2, 12, 6, 0, source.tokenizer)
    assert {(row["round"], row["index"]): (row["prompt"], row["text"], row["tail"]) for row in rows} == \
        {(t, i): (c.prompt, c.text, c.tail) for t, row in enumerate(by_hand.rounds) for i, c in enumerate(row)}
    spent = [sum(row["tokens"] for row in rows if row["round"] == t) for t in (0, 1, 2)]
    assert all(f"round {t}: {spent[t]:,} tokens" in said for t in (0, 1, 2))
    assert f"{sum(spent):,} tokens generated" in said and "0 failed" in said


def test_a_checkpoint_goes_on_with_the_very_samples_it_would_have_drawn(folder, tmp_path, monkeypatch):
    """Equal prompts share a batch: the missing ones must not get the random numbers of those that are there."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["3+4", *shortened(folder, "--rounds", 1)]
    rsa.main([*arguments, "--trace", str(whole)])
    lines = whole.read_text(encoding="utf-8").split("\n")
    for keep in (1, 3, 6):                                      # nothing, a part of a round, a round and a part
        cut.write_text("\n".join([*lines[:keep], lines[keep][:20]]), encoding="utf-8")
        rsa.main([*arguments, "--trace", str(cut), "--resume"])
        assert unordered(trace_rows(cut)) == unordered(trace_rows(whole))
    assert len({row["text"] for row in trace_rows(cut)[1:] if row["round"] == 0}) == 4
    monkeypatch.setattr(Zaya, "generate", None)                 # and what is finished needs no model at all
    rsa.main([*arguments, "--trace", str(cut), "--resume"])


@pytest.mark.parametrize("arguments, says", [
    ("--checkpoint x", "one of the arguments problem --problems --serve is required"),
    ("q --problems x --checkpoint x", "not allowed with argument"),
    ("q", "one of the arguments --checkpoint --endpoint is required"),
    ("q --checkpoint x --endpoint http://x --model m", "not allowed with argument"),
    ("q --endpoint http://localhost:1/v1", "--endpoint needs --model NAME"),
    ("q --endpoint localhost:1/v1 --model m", "--endpoint must be http://HOST:PORT/v1"),
    ("q --endpoint http://me:secret@localhost:1/v1 --model m", "--endpoint must be http://HOST:PORT/v1"),
    ("q --checkpoint x --resume", "--resume goes on with a --trace FILE"),
    ("q --checkpoint x --budget huge", "invalid choice"), ("q --checkpoint x --prompt long", "invalid choice"),
    ("q --checkpoint x --population 2 --subset 3", "makes no sense: needed are"),
    ("q --checkpoint x --concurrency 0", "--concurrency: must be at least 1 and at most 4096, not 0"),
    ("q --checkpoint x --retries -1", "--retries: must be at least 0"),
    *((f"q --checkpoint x --temperature {value}", "--temperature: must be at least 0") for value in ("-0.1", "nan")),
    ("q --checkpoint x --top-p 0", "--top-p: must be at least"), ("q --checkpoint x --timeout 0", "--timeout: must be"),
    *((f"q --checkpoint x --request {names}", "argument --request: ") for names in ("n=2", "seed", "seed=x=y", ",")),
    ("-3+5 --checkpoint x", "--checkpoint x: "),
    ("q --checkpoint MODEL --trace MODEL", "MODEL: Is a directory"),
    ("q --checkpoint MODEL --trace /dev/full", "--trace /dev/full: [Errno 28] No space left on device"),
    ("q --checkpoint MODEL --trace no/such/folder/x", "no/such/folder"),
    ("--problems MODEL --checkpoint MODEL", "Is a directory"), ("q --checkpoint /dev/null", "--checkpoint /dev/null: "),
    ("--problems no/such/file --checkpoint MODEL", "no/such/file"),
    ("q --checkpoint x --rounds two", "invalid int value"), ("q --checkpoint x --pop 4", "unrecognized arguments"),
    ("q --checkpoint no/such/folder", "--checkpoint no/such/folder: "),
    ("q --endpoint http://127.0.0.1:1/v1 --model m --tokenizer no/such/tokenizer", "--tokenizer no/such/tokenizer: ")])
def test_mistakes_get_one_clear_sentence(folder, capsys, monkeypatch, arguments, says):
    if "--tokenizer" in arguments:
        pytest.importorskip("transformers")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as stop:
        rsa.main(arguments.replace("MODEL", folder).split())
    said = capsys.readouterr().err
    code = stop.value.code
    assert says.replace("MODEL", folder) in (code if isinstance(code, str) else said.splitlines()[-1])
    assert code == 2 or isinstance(code, str) and "\n" not in code


def test_a_problem_may_begin_with_a_minus():
    for problem in ("-3", "-x^2 + 4x = 0", "-x=5"):
        assert rsa.parse_arguments(["--checkpoint", "x", "--seed", "3", "--", problem]).problem == problem


@pytest.mark.parametrize("encoding, line", [("ascii", ["-h"]), ("cp1252", ["天", "--rounds", 0, "--trace", "天"])])
def test_any_stdout_does(folder, tmp_path, encoding, line):
    """A random model answers with any bytes; the help has an ellipsis."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, "rsa.py"), *shortened(folder, *line)], cwd=tmp_path,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": encoding}, capture_output=True)
    assert done.returncode == 0 and b"Error" not in done.stderr, done.stderr
    assert "?" in done.stdout.decode(encoding) and (encoding == "ascii" or len(trace_rows(tmp_path / "天")) == 5)


@pytest.mark.parametrize("name, content", [
    ("model.safetensors", b""), ("model.safetensors", b"\xff" * 900), ("config.json", b"[1]"), ("config.json", b"{"),
    ("config.json", b'{"model_type": "zaya", "hidden_size": "x"}'), ("tokenizer.json", b"{"),
    ("tokenizer.json", b'{"added_tokens": [5]}')])
def test_a_damaged_checkpoint_is_one_sentence(folder, tmp_path, name, content):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / name).write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        rsa.main(["q", *shortened(str(broken))])
    assert stop.value.code.startswith(f"--checkpoint {broken}: ") and "\n" not in stop.value.code


# ---- a folder as Zyphra publishes it ---------------------------------------------------------------------------------

CHATML = """{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages if message.role != 'system' %}
    {{- bos_token if loop.first else '' }}
    {{- '<|im_start|>' + message.role + '\n' + message.content | trim + '<|im_end|>' + '\n' }}
{%- endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}OPENED{% endif %}"""


def official_folder(folder, opened=""):
    """A tiny model in shards, with a byte-level BPE and a chat template that are none of ours."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers.models import BPE
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(["What is 47 + 85? so 12 and carry 1"] * 9, trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=["<pad>", "<eos>", "<bos>", "<|im_start|>", "<|im_end|>"]))
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    tokenizer.enable_truncation(5)                              # what a file may ask for, and a prompt must not get
    config = ZayaConfig.preset("smoke", eos_token_id=1)
    randomise(Zaya(config)).save_pretrained(str(folder))
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "pad_token": "<pad>",
                "eos_token": {"__type": "AddedToken", "content": "<|im_end|>"}}
    (folder / "chat_template.jinja").write_text(CHATML.replace("OPENED", opened))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [1, tokenizer.token_to_id("<|im_end|>")]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return str(folder)


@pytest.mark.parametrize("opened", ["", "<think>\n"])
def test_an_official_folder_gets_the_ids_that_transformers_gives_it(tmp_path, opened):
    theirs = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(official_folder(tmp_path, opened))
    ours = rsa.ChatTokenizer(str(tmp_path))
    assert not rsa.is_ours(str(tmp_path)) and ours.end == [1, theirs.convert_tokens_to_ids("<|im_end|>")]
    for problem in ("What is 47 + 85?", "  é\n\n<think> 12 <|im_end|>", "x"):
        messages = [{"role": "user", "content": problem}]
        wanted = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert rsa.prompt_ids(ours, problem) == wanted
        assert ours.decode(ours.encode(problem)) == problem
    messages = [{"role": "system", "content": "s"}, *messages, {"role": "assistant", "content": "<think>a</think> b"}]
    assert ours.render(messages)[0] == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]


@pytest.mark.parametrize("how", ["as it is", "8 bits", "4 bits"])
def test_an_official_folder_on_the_command_line(tmp_path, capsys, how):
    folder = official_folder(tmp_path, "<think>\n")
    if how != "as it is":
        kernels.main(["--quantize", folder, str(tmp_path / "rounded"), "--bits", how[0]])
        folder = str(tmp_path / "rounded")
    trace = tmp_path / "x.trace"
    rsa.main(["3+4", *shortened(folder, "--rounds", 1, "--trace", trace)])
    said = capsys.readouterr().out
    assert "default: N=4 C=2 T=1 beta=12 tau=6" in said         # not tiny's: it is not ours
    assert "temperature 1, top-p 0.95\n" in said                # as the card of ZAYA1-8B asks
    rows = trace_rows(trace)[1:]
    assert len(rows) == 8 and all(row["text"].startswith("<think>") for row in rows)
    assert all("Candidate solution 2" in row["prompt"] for row in rows if row["round"])


def test_what_an_official_folder_may_lack(tmp_path, monkeypatch):
    folder = official_folder(tmp_path)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "transformers", None)
        with pytest.raises(SystemExit, match=f"^--checkpoint {re.escape(folder)}: .*transformers"):
            rsa.main(["x", "--checkpoint", folder])
    (tmp_path / "generation_config.json").unlink()
    assert rsa.ChatTokenizer(folder).end == [1]                 # config.json's, as in transformers' generate
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(SystemExit, match=f"^--checkpoint {re.escape(folder)}: .*TemplateSyntaxError"):
        rsa.main(["x", "--checkpoint", folder])


def test_token_ids_of_an_official_folder_may_be_null(tmp_path):
    folder = official_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"pad_token_id": None, "bos_token_id": None}
    for generation, in_config, ends in ((None, None, []), (None, 7, [7]), (8, None, [8]), ([8, 9], 7, [8, 9])):
        (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": in_config}))
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        source = Checkpoint.from_pretrained(folder)
        assert source.tokenizer.end == ends and len(source(["3+4", "a longer problem"], 5, 0)) == 2


def test_a_batch_is_as_large_as_the_memory_for_its_keys(folder):
    source = Checkpoint.from_pretrained(folder)
    a_token = 2 * 2 * 16 * 4                                    # keys and values, 2 layers, 1 KV head of 16, fp32
    length = len(rsa.prompt_ids(source.tokenizer, "3+4")) + 12
    for room, rows in ((1, 1), (3 * a_token * length, 3), (3 * a_token * length - 1, 2), (2**31, 256)):
        source.cache_bytes = room
        assert source.rows_at_once(["3+4", "3"], 12) == rows
    source.cache_bytes = 3 * a_token * length
    assert len(source(["3+4"] * 7, 12, 0)) == 7
