"""Markovian RSA's two text functions: cut the tail of a reasoning, and ask for one better solution.

    population -> tails of tau tokens -> C of them in a prompt -> a new candidate

TR section V (the ZAYA1-8B report), after Recursive Self-Aggregation (arXiv 2509.26626) and the Markovian Thinker
(2510.06557).  Training makes its aggregation prompts with these very functions: a model sees at test time what it was
taught to read.  Does NOT include yet: the rounds themselves, served endpoints.
"""


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
