"""Markovian RSA: parallel traces, of which only bounded tails are carried from round to round.

    population -> tails of tau tokens -> C of them in a prompt -> a new candidate

TR section V (the ZAYA1-8B report), after Recursive Self-Aggregation (arXiv 2509.26626) and the Markovian Thinker
(2510.06557).  Training makes its aggregation prompts with these very functions: a model sees at test time what it was
taught to read.  Does NOT include yet: a command line, served endpoints.
"""
import random
from dataclasses import dataclass


def cut_tail(text, tail, tokenizer=None):
    """The last `tail` tokens of a reply's reasoning: of what stands before </think>, or of everything without it.

    text str, tail int (tokens) -> str.  tokenizer: anything with encode(str) -> list and decode(list) -> str; None
    counts words.

    >>> cut_tail("<think>one two three</think>3", 2), cut_tail("not finished yet", 2)
    ('two three', 'finished yet')
    """
    reasoning = text.partition("</think>")[0].removeprefix("<think>")
    if tokenizer is None:
        return " ".join(reasoning.split()[-tail:] if tail else [])
    ids = tokenizer.encode(reasoning)
    return tokenizer.decode(ids[max(0, len(ids) - tail):])


def terse_prompt(problem, tails):
    """The aggregation prompt that small models learn: candidates first, the problem last.

    >>> terse_prompt("47+85", ["5+0=12", "7+5+0=12"])
    '|5+0=12|7+5+0=12|47+85'
    """
    return "".join(f"|{tail}" for tail in tails) + f"|{problem}"


def report_prompt(problem, tails):
    """The report's order: the problem, the candidates, and the request for one improved solution.

    >>> print(report_prompt("What is 47+85?", ["so 12 and carry 1"]))
    What is 47+85?
    <BLANKLINE>
    Candidate solution 1 (may contain mistakes):
    so 12 and carry 1
    <BLANKLINE>
    Write one improved solution, and mark the final answer.
    """
    candidates = "".join(f"Candidate solution {i} (may contain mistakes):\n{tail}\n\n"
                         for i, tail in enumerate(tails, 1))
    return f"{problem}\n\n{candidates}Write one improved solution, and mark the final answer."


@dataclass
class Candidate:
    """One rollout: what was asked, what came back, and the tail that the next round may see."""
    prompt: str
    text: str
    tail: str


@dataclass
class Result:
    """rounds[t]: the candidates of round t, 0 … T."""
    rounds: list
    generated_tokens: int
    longest_prompt: int                                         # tokens

    @property
    def candidates(self):
        """The last round's, whose mean correctness is what the report reports: no vote, no verifier."""
        return self.rounds[-1]


def markovian_rsa(problem, generate, population=16, subset=4, rounds=2, budget=40960, tail=4096, seed=0, tokenizer=None,
                  build_prompt=terse_prompt):
    """Parallel traces that hand on bounded tails: N candidates, T rounds of aggregation over C of them.

        t = 0:        y_i ~ generate(q),                         i = 1 … N, at most beta tokens each
        t = 1 … T:    S_i: C of the last round's N tails, uniformly without replacement
                      y_i ~ generate(build_prompt(q, S_i))       the whole population is replaced
        tail(y):      the last tau tokens of y's reasoning

    N `population`, C `subset`, T `rounds` (of aggregation), beta `budget`, tau `tail`.  A prompt holds q and at most
    C tau tokens of tails, whatever T is.  rounds=0: parallel sampling; subset=1: Delethink; tail=budget: full RSA.

    problem str; generate(prompts: list of str, max_new_tokens: int, seed: int) -> list of str; tokenizer: anything with
    encode and decode, None counts words -> Result.  ValueError if an argument makes no sense, or if `generate` returns
    another number of texts than it was asked for.  TR section V; deterministic for a seed if `generate` is.
    """
    if not (population >= 1 and 1 <= subset <= population and rounds >= 0 and budget >= 1 and 0 <= tail <= budget):
        raise ValueError(f"markovian_rsa needs 1 <= subset <= population, rounds >= 0 and 0 <= tail <= budget; got "
                         f"population={population}, subset={subset}, rounds={rounds}, budget={budget}, tail={tail}")
    rng, history, tokens, longest = random.Random(seed), [], 0, 0
    for t in range(rounds + 1):
        prompts = [problem] * population if t == 0 else \
            [build_prompt(problem, [c.tail for c in rng.sample(history[-1], subset)]) for _ in range(population)]
        texts = generate(prompts, budget, rng.getrandbits(31))
        if len(texts) != population:
            raise ValueError(f"generate returned {len(texts)} texts for {population} prompts")
        history.append([Candidate(p, x, cut_tail(x, tail, tokenizer)) for p, x in zip(prompts, texts)])
        tokens += sum(count_tokens(text, tokenizer) for text in texts)
        longest = max(longest, *(count_tokens(prompt, tokenizer) for prompt in prompts))
    return Result(history, tokens, longest)


def count_tokens(text, tokenizer=None):
    return len(text.split() if tokenizer is None else tokenizer.encode(text))
