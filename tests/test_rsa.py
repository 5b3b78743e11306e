"""rsa.py: the rounds, on generators whose behaviour can be worked out by hand."""
import doctest
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rsa
from rsa import cut_tail, markovian_rsa, report_prompt, terse_prompt
from zaya import Tokenizer


BYTES = Tokenizer({bytes([i]): i for i in range(256)})


def test_docstring_examples():
    result = doctest.testmod(rsa)
    assert result.failed == 0 and result.attempted >= 3


def test_a_tail_is_the_end_of_the_reasoning_only():
    assert cut_tail("<think>abcdef</think>xyz", 3, BYTES) == "def" and cut_tail("<think>abcdef", 3, BYTES) == "def"
    assert cut_tail("abc", 9, BYTES) == "abc" and cut_tail("<think>a b c</think>d", 2) == "b c"
    assert cut_tail("<think>abc</think>", 0, BYTES) == "" and cut_tail("a b c", 0) == ""


def chatter(prompts, max_new_tokens, seed):
    """Random words, some with an answer, at most `max_new_tokens` of them."""
    rng = random.Random(seed)
    texts = [" ".join(str(rng.randrange(1000)) for _ in range(rng.randint(1, max_new_tokens))) for _ in prompts]
    return [f"<think>{text}</think>{rng.randrange(9)}" if rng.random() < 0.5 else text for text in texts]


@settings(max_examples=60, deadline=None)
@given(population=st.integers(1, 6), subset=st.integers(1, 6), rounds=st.integers(0, 4), tail=st.integers(0, 20))
def test_prompts_stay_bounded_whatever_the_rounds(population, subset, rounds, tail):
    subset = min(subset, population)
    for build, words in ((terse_prompt, 4), (report_prompt, 4 + 7 * subset + 9)):
        result = markovian_rsa("what is it ?", chatter, population, subset, rounds, budget=20, tail=tail, seed=3,
                               build_prompt=build)
        assert [len(r) for r in result.rounds] == [population] * (rounds + 1)
        assert result.longest_prompt <= words + subset * tail
        assert result.generated_tokens == sum(len(c.text.split()) for r in result.rounds for c in r)


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
    delethink = markovian_rsa("q", chatter, population=4, subset=1, rounds=1, budget=9, tail=3)
    tails = {c.tail for c in delethink.rounds[0]}
    assert all(c.prompt.split("|")[1] in tails for c in delethink.rounds[1])                    # one chain, its tail
    full = markovian_rsa("q", chatter, population=4, subset=2, rounds=1, budget=9, tail=9)      # full RSA
    whole = {cut_tail(c.text, 99) for c in full.rounds[0]}
    assert all(set(c.prompt.split("|")[1:-1]) <= whole for c in full.rounds[1])


@pytest.mark.parametrize("wrong", [dict(subset=17), dict(subset=0), dict(rounds=-1), dict(tail=9, budget=8),
                                   dict(population=0), dict(budget=0, tail=0)])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValueError, match="subset <= population"):
        markovian_rsa("q", chatter, **wrong)


def test_a_generator_that_loses_texts_is_named():
    with pytest.raises(ValueError, match="returned 1 texts for 16"):
        markovian_rsa("q", lambda prompts, n, seed: ["x"], budget=4, tail=2)
