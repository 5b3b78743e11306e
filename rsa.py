"""Markovian RSA: parallel traces, of which only bounded tails are carried from round to round.

    python rsa.py --checkpoint out/tiny/final "find 06b,85c"
    python rsa.py --endpoint http://localhost:8000/v1 --model Zyphra/ZAYA1-8B "What is 47 * 85?"
    python rsa.py --endpoint … --model … --problems aime.jsonl --budget light,default --trace aime.trace

    population -> tails of tau tokens -> C of them in a prompt -> a new candidate

TR section V (the ZAYA1-8B report), after Recursive Self-Aggregation (arXiv 2509.26626) and the Markovian Thinker
(2510.06557).  Training makes its aggregation prompts with these very functions: a model sees at test time what it was
taught to read.  Any function generate(prompts, max_new_tokens, seed) can write the text.  Two are here: Checkpoint, a
folder of weights, and Endpoint, a server that speaks the chat-completions protocol.

Read in this order: tails and prompts, the algorithm, answers, two sources, a run, the command line.
"""
import argparse
import collections
import contextlib
import functools
import itertools
import json
import os
import random
import re
import socket
import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from fractions import Fraction

# Threads that wait asleep: on a busy machine spinning ones are many times slower, on an idle one they gain nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# ---- tails and prompts ----------------------------------------------------------------------------------------------


class Words:
    """Stands in for a tokenizer: text -> words, which joined give the text again, character by character.  A word is at
    most 16 characters, with up to 16 of white space on either side; in scripts without spaces and in emoji one."""
    ALONE = "\u0e00-\u109f\u1780-\u17ff\u2e80-\U0010ffff"
    encode = re.compile(rf"\s{{0,16}}(?:[{ALONE}]|[^\s{ALONE}]{{1,16}})\s{{0,16}}|\s{{1,16}}").findall
    decode = "".join


def cut_tail(text, tail, tokenizer=None):
    """The last `tail` tokens of a reply's reasoning: of the part before </think>, or of everything without that tag.

    text str, tail int (tokens) -> str.  tokenizer: anything with encode(str) -> list and decode(list) -> str; None
    counts Words.  A reply with blank reasoning hands on what follows it.

    >>> cut_tail("<think>one two three</think>3", 2), cut_tail("not finished yet", 2), cut_tail("<think></think>3", 2)
    ('two three', 'finished yet', '3')
    """
    tokenizer = tokenizer or Words
    opened = re.match(r"(?:\s*</?think>)*", text).end()
    ids = tokenizer.encode(text[opened:].partition("</think>")[0])
    return tokenizer.decode(ids[max(0, len(ids) - tail):])


def count_tokens(text, tokenizer=None):
    """How many tokens (None: Words) a text has; each <think> tag is one."""
    parts = re.split("</?think>", text)
    return len(parts) - 1 + sum(len((tokenizer or Words).encode(part)) for part in parts)


def terse_prompt(problem, tails):
    """The aggregation prompt that small models learn: candidates first, the problem last; the bare problem without any.

    >>> terse_prompt("47+85", ["5+0=12", "7+5+0=12"]), terse_prompt("47+85", [])
    ('|5+0=12|7+5+0=12|47+85', '47+85')
    """
    return "|" + "|".join([*tails, problem]) if tails else problem


def report_prompt(problem, tails):
    r"""The report's order: the problem, the candidates, and the request for one improved solution.  Without candidates
    it asks for the answer in the same form, so that the rounds can be compared.

    >>> print(report_prompt("1+1?", ["so 2"]).split("Candidate ")[1])
    solution 1 (may contain mistakes):
    so 2
    <BLANKLINE>
    Write one improved solution, and put its final answer in \boxed{}.
    """
    blocks = [problem]
    for i, tail in enumerate(tails, 1):
        blocks.append(f"Candidate solution {i} (may contain mistakes):\n{tail}")
    wanted = "one improved solution" if tails else "a solution"
    return "\n\n".join([*blocks, f"Write {wanted}, and put its final answer in \\boxed{{}}."])


PROMPTS = {"terse": terse_prompt, "report": report_prompt}

# ---- the algorithm --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """The five numbers of a run, N, C, T, beta and tau.  ValueError if they make no sense together."""
    population: int
    subset: int
    rounds: int
    budget: int
    tail: int

    def __post_init__(self):
        if not (1 <= self.subset <= self.population and self.rounds >= 0 and 0 <= self.tail <= self.budget >= 1):
            raise ValueError(f"{self} makes no sense: needed are 1 <= subset <= population (C <= N), rounds >= 0 (T) "
                             "and 0 <= tail <= budget (tau <= beta)")

    def __str__(self):
        return f"N={self.population} C={self.subset} T={self.rounds} beta={self.budget} tau={self.tail}"


# The report names four.  default is its AIME setting; of extra-high N and T are known, light and high lie around them.
# tiny is what `python train.py` trains its checkpoint for.
BUDGETS = {"tiny": Budget(16, 4, 2, 160, 24), "light": Budget(8, 4, 1, 40960, 4096),
           "default": Budget(16, 4, 2, 40960, 4096), "high": Budget(16, 4, 4, 40960, 4096),
           "extra-high": Budget(32, 4, 8, 40960, 4096)}


@dataclass
class Candidate:
    """One rollout: its prompt, its text, and the tail that the next round may see.  text and tail None: it failed."""
    prompt: str
    text: str | None
    tail: str | None


@dataclass
class Result:
    """rounds[t]: the candidates of round t, 0 … T."""
    rounds: list = field(default_factory=list)
    generated_tokens: int = 0
    longest_prompt: int = 0                                     # tokens
    empty_tails: int = 0                                        # replies that had nothing to hand on

    @property
    def candidates(self):
        """The last round's, whose mean correctness is what the report reports: no vote, no verifier."""
        return self.rounds[-1] if self.rounds else []

    def tails(self):
        """What the next round may see: the last round's tails without those that failed or are blank."""
        return [c.tail for c in self.candidates if c.tail and c.tail.strip()]

    def add_round(self, prompts, texts, tail, tokenizer):
        self.rounds.append([])
        for prompt, text in zip(prompts, texts):
            kept = None
            if text is not None:
                kept = cut_tail(text, tail, tokenizer)
                self.generated_tokens += count_tokens(text, tokenizer)
                self.empty_tails += not kept.strip()
            self.candidates.append(Candidate(prompt, text, kept))
        for prompt in set(prompts):
            self.longest_prompt = max(self.longest_prompt, count_tokens(prompt, tokenizer))


def markovian_rsa(problem, generate, population=16, subset=4, rounds=2, budget=40960, tail=4096, seed=0, tokenizer=None,
                  build_prompt=terse_prompt):
    """Parallel traces that hand on bounded tails: N candidates, T rounds of aggregation over C of them.

        t = 0:        y_i ~ generate(build_prompt(q, {})),       i = 1 … N, at most beta tokens each
        t = 1 … T:    S_i: C of the last round's N tails, uniformly without replacement
                      y_i ~ generate(build_prompt(q, S_i))       the whole population is replaced
        tail(y):      the last tau tokens of y's reasoning

    N `population`, C `subset`, T `rounds` (of aggregation), beta `budget`, tau `tail`.  A prompt holds q and at most
    C tau tokens of tails, whatever T is.  rounds=0: parallel sampling; subset=1: Delethink; tail=budget: full RSA.

    problem str, or a list of them, which share each call of generate; generate(prompts: list of str, max_new_tokens:
    int, seed: int) -> list of str, None where a rollout failed; tokenizer: anything with encode and decode, None counts
    Words -> Result, or a list of them.  ValueError if an argument makes no sense or generate returns another number of
    texts than it was asked for; RuntimeError if a round fails as a whole.  TR section V; deterministic for a seed if
    generate is.
    """
    Budget(population, subset, rounds, budget, tail)            # checks them
    problems = [problem] if isinstance(problem, str) else list(problem)
    results = [Result() for _ in problems]
    rngs = [random.Random(f"{seed} {i}") for i in range(len(problems))]
    for t in range(rounds + 1):
        # Every candidate's prompt shows tails of its own drawing.  With fewer than C tails it shows all that there are;
        # with none, as in round 0, it asks the bare problem.
        prompts = []
        for q, result, rng in zip(problems, results, rngs):
            tails = result.tails()
            for _ in range(population):
                prompts.append(build_prompt(q, rng.sample(tails, min(subset, len(tails)))))
        # One call asks for the whole round of all problems, so that a source can batch as it likes.
        texts = generate(prompts, budget, random.Random(f"{seed} round {t}").getrandbits(31))
        if len(texts) != len(prompts):
            raise ValueError(f"generate returned {len(texts)} texts for {len(prompts)} prompts")
        if prompts and texts.count(None) == len(texts):
            raise RuntimeError(f"all {len(prompts)} candidates of a round failed: nothing to aggregate")
        for i, result in enumerate(results):
            part = slice(i * population, (i + 1) * population)
            result.add_round(prompts[part], texts[part], tail, tokenizer)
    return results[0] if isinstance(problem, str) else results


# ---- answers --------------------------------------------------------------------------------------------------------


def last_boxed(text):
    r"""What the last complete \boxed{…} (or \fbox{…}) holds, with its braces balanced; None without one."""
    # One pass with a stack of open braces: a looping model may write \boxed{ a thousand times.  \{ and \} are printed
    # characters and group nothing.
    opened, last = [], (-1, None)
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|(?<!\\)\\[{}]|[{}]", text):
        if match[0] in (r"\{", r"\}"):
            continue
        if match[0] != "}":
            opened.append(match)
        elif opened:
            start = opened.pop()
            if start[0] != "{":
                last = max(last, (start.end(), match.start()))
    return text[slice(*last)] if last[1] is not None else None


def final_answer(text):
    r"""A reply's answer: its last \boxed{…}, else <answer>…</answer>, else what follows #### in the last line, else the
    one short line after its reasoning or below a last heading `#### Answer`.  None if the reasoning has not ended, or
    the reply names no answer.

    >>> final_answer("<think>7*6</think>It is \\boxed{42}."), final_answer("<think>7+5=12</think>12")
    ('42', '12')
    >>> final_answer("<think>7+5=12, so"), final_answer("<think>7</think>")
    (None, None)
    """
    if text is None or (text.startswith("<think>") and "</think>" not in text):
        return None
    reply = text.rpartition("</think>")[2].strip()
    answer = last_boxed(reply)
    tagged = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", reply, re.DOTALL)
    if answer is None and tagged:
        answer = tagged[-1]
    if answer is None and "####" in reply:
        # GSM8K ends on this mark; above other lines it is a heading of Markdown and marks no answer.
        heading, _, below = reply.rpartition("####")[2].partition("\n")
        heading = re.sub(r"(?i)^\W{0,9}(the )?(final )?answer( is)?\b[:*\s]*", "", heading)
        if not below:
            answer = heading
        elif not heading:
            reply = below.strip()
    if answer is None and "\n" not in reply and len(reply) <= 100:
        answer = reply
    return (answer or "").strip() or None


# LaTeX has several spellings for one thing.  These rules leave one of them, in this order; a group of one item loses
# its braces.
SPELLINGS = [("[−–]", "-"), ("×", r"\\times "), (r"°|\\degree", r"^\\circ "), (r"\\[dtc]frac", r"\\frac"),
             (r"[$~]|\\[$,!;: ()\[\]]|\\(left|right|big|displaystyle|q?quad)(?![a-zA-Z])", " "),
             (r"(?<![\^_])\\(?:text|mbox|math(?=rm|bf|it))[a-z]*\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r" \1 "),
             (r"\\(frac|sqrt)\s*([0-9])", r"\\\1 \2 "), (r"(\\frac\s*([0-9] |\{[^{}]*\}))\s*([0-9])", r"\1 \3 "),
             (r"\^\s*([0-9]{2,})", r"^{\1}"), (r"\{\s*(\w|\\[a-zA-Z]+)\s*\}", r" \1 ")]
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\.?[0-9]+(?:\.[0-9]+)*(?:[eE][+-]?[0-9]+(?!\w))?|[^\W\d_]+|\S", re.DOTALL)
# Lengths are bounded: no model's 1e999999999 may fill the memory.
N = r"(?:[0-9]{1,300}(?:\.[0-9]{1,300})?|\.[0-9]{1,300})(?:e[-+]?[0-9]{1,3})?"
NUMBER = re.compile(rf"([-+] )?(?:([0-9]{{1,300}}) )?({N})(?: / ({N}))?(?: (?:\\times|\\cdot|\*) 10 \^ "
                    r"((?:- )?[0-9]{1,3}))?(?: \\?%| \^ \\circ)?")
OPENING, CLOSING = {"(", "[", r"\{"}, {")", "]", r"\}"}
MARKS = {",", ";", "=", "<", ">", *OPENING, *CLOSING}


def number(text):
    r"""The value of tokens that are a decimal, a fraction, a mixed number or a \times 10^k; None of any others."""
    text = re.sub(rf"\{{ ((?:- )?{N}) \}}", r"\1", text)
    found = NUMBER.fullmatch(re.sub(rf"\\frac ((?:- )?{N}) ({N})", r"\1 / \2", text))
    if not found:
        return None
    sign, whole, top, bottom, power = found.groups()
    top, bottom = Fraction(top), Fraction(bottom or 1)
    mixed = 0 < top < bottom and top.denominator == bottom.denominator == 1
    if not bottom or (whole and not mixed):                     # 1 10 is two numbers
        return None
    value = int(whole or 0) + top / bottom
    if power:
        value *= Fraction(10) ** int(power.replace(" ", ""))
    return -value if sign == "- " else value


@functools.lru_cache(256)
def normal_form(answer):
    r"""An answer as it is compared: Fraction, or tokens with each number that stands alone between commas, brackets and
    relations as a Fraction.  White space separates; case, $, %, degrees and LaTeX's dressing do not count.  1,234 is a
    number, but in brackets a comma separates and only 1{,}234 is one.

    >>> normal_form(r"$\frac{2469}{2}$"), normal_form(r"\text{Even }."), normal_form("1 1/2")
    (Fraction(2469, 2), 'even', Fraction(3, 2))
    >>> normal_form(r"\left(1,234, \tfrac12\right)"), normal_form("1 10")
    (('(', Fraction(1, 1), ',', Fraction(234, 1), ',', Fraction(1, 2), ')'), '1 10')
    """
    if len(answer) > 1000:                                      # no answer but a loop: word for word, and cheap
        return tuple(answer.split())
    comma = "" if re.search(r"(?<!\\)[(\[]|\\\{", answer) else "|,"
    thousands = rf"(?<![0-9.,])[1-9][0-9]{{0,2}}(?:(?:\{{,\}}|,\\!|\\,{comma})[0-9]{{3}})+(?!,?[0-9])"
    text = re.sub(thousands, lambda match: re.sub("[^0-9]", "", match[0]), answer)
    for pattern, plain in SPELLINGS:
        text = re.sub(pattern, plain, text)
    tokens = TOKEN.findall(text)
    if tokens[-1:] == ["."] and tokens[-2:-1] != ["."]:         # the full stop of a sentence
        tokens.pop()
    # Marks stand alone; the tokens between two of them are one part, which may be a number.
    parts = []
    for token in tokens:
        token = token if token[0] == "\\" else token.lower()
        if token in MARKS or not parts or parts[-1] in MARKS:
            parts.append(token)
        else:
            parts[-1] += " " + token
    form = []
    for before, part, after in zip(["", *parts], parts, [*parts[1:], ""]):
        # Beside a bracket it may be a factor: (x)+2 is not (x) times 2.
        value = None if before in CLOSING or after in OPENING else number(part)
        form.append(part if value is None else value)
    return form[0] if len(form) == 1 else tuple(form)


@functools.lru_cache(4096)
def verified(a, b):
    """Whether math-verify finds two LaTeX answers equal, both ways round, within seconds; False without the package."""
    try:
        from math_verify import LatexExtractionConfig, parse, verify
        config = [LatexExtractionConfig(boxed_match_priority=-1)]
        a = parse(f"${a}$", config, "no_fallback", parsing_timeout=2)
        b = parse(f"${b}$", config, "no_fallback", parsing_timeout=2)
        return verify(a, b, 12, timeout_seconds=2) and verify(b, a, 12, timeout_seconds=2)      # 12 decimals
    except Exception:                                           # sympy raises many
        return False


def same(answer, truth):
    """Whether two answers have one normal form, or are LaTeX that math-verify (pip install math-verify) finds equal."""
    if answer is None or truth is None:
        return False
    a, b = normal_form(answer), normal_form(truth)
    if a == b or len(answer) + len(truth) > 400 or not re.search(r"[\\^]", f"{a} {b}"):
        return a == b
    # math-verify takes words for products of letters, and 2\frac{1}{3} for one; its limits of time work in the main
    # thread alone.
    if re.search(r"\\(text|math|mbox|operator)|[0-9}]\s*\\[dtc]?frac|[0-9](\s|\\.)+[0-9]", f"{answer}|{truth}"):
        return False
    return threading.current_thread() is threading.main_thread() and verified(answer, truth)


def majority(answers):
    """The most frequent answer and its votes, by `same`; the first one of several.  Those that are None have no vote.

    >>> majority(["7", None, "07", "8", None, None]), majority([None])
    (('7', 2), (None, 0))
    """
    votes = collections.Counter()                               # under the first spelling of each answer
    for answer in answers:
        if answer is not None:
            votes[next((first for first in votes if same(first, answer)), answer)] += 1
    return max(votes.items(), key=lambda item: item[1], default=(None, 0))


def interval(rates):
    """95 % interval of the mean over problems, whose samples depend on each other.  All right or all wrong is no proof
    of 1 or 0: never narrower than one problem's worth."""
    rates = [float(rate) for rate in rates]
    if len(rates) < 2:
        return [0.0, 1.0]
    mean = statistics.fmean(rates)
    half = 1.96 * max(statistics.stdev(rates) / len(rates) ** 0.5, 1 / len(rates))
    return [max(0.0, mean - half), min(1.0, mean + half)]


# ---- source 1: a checkpoint -----------------------------------------------------------------------------------------


class Source:
    """Where text comes from: stream(prompts, max_new_tokens, seed, known) yields (index, text, tokens spent, error), as
    rollouts finish, in any order, but for the indices in `known`.  What it yields for an index does not depend on which
    others are known, so a run that goes on after a kill samples what it would have sampled."""

    def __call__(self, prompts, max_new_tokens, seed, progress=iter):
        """As markovian_rsa's generate: list of str -> list of str.  progress: a bar such as tqdm, around the stream."""
        texts = [None] * len(prompts)
        for index, text, *_ in progress(self.stream(prompts, max_new_tokens, seed)):
            texts[index] = text
        return texts


def prompt_ids(tokenizer, prompt):
    """What the model reads before it answers: the user's turn, and the opening of the assistant's."""
    return tokenizer.render([{"role": "user", "content": prompt}], generation_prompt=True)[0]


def left_padded(rows, pad, device):
    """Lists of ids -> input_ids and attention_mask (B, S) int64, padded on the left as generation needs it."""
    import torch
    width, ids, mask = max(map(len, rows)), [], []
    for row in rows:
        gap = width - len(row)
        ids.append([pad] * gap + row)
        mask.append([0] * gap + [1] * len(row))
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def reply(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, top_p=1.0):
    """Sample the assistant's answer to each prompt in one batch: list of str -> list of str, <think> tags included."""
    import torch
    inputs, mask = left_padded([prompt_ids(tokenizer, p) for p in prompts], tokenizer.pad, model.norm.weight.device)
    out = model.generate(inputs, max_new_tokens, temperature, top_p, attention_mask=mask, eos_token_id=tokenizer.end,
                         generator=torch.Generator().manual_seed(seed))[:, inputs.shape[1]:]
    ends = {tokenizer.end} if isinstance(tokenizer.end, int) else set(tokenizer.end)
    opened = getattr(tokenizer, "opened", "")                   # a tag that the chat template has written already
    rows = [itertools.takewhile(lambda token: token not in ends, row) for row in out.tolist()]
    return [opened + tokenizer.decode(row) for row in rows]


def is_ours(folder):
    """Whether a folder's tokenizer is zaya.Tokenizer's, told by its special tokens; also if there is none to read."""
    from zaya import Tokenizer
    try:
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            added = json.load(file)["added_tokens"]
        return {token["content"] for token in added} >= set(Tokenizer.SPECIAL)
    except (OSError, ValueError, KeyError, TypeError):
        return True                                             # its own words say what is missing or damaged


class ChatTokenizer:
    """transformers.AutoTokenizer behind those methods of zaya.Tokenizer that this file uses.  As there, a special token
    that is spelled out in a problem becomes that token.  name: an official folder such as ZAYA1-8B's, or a hub name."""

    def __init__(self, name):
        try:
            from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig
        except ImportError:
            raise ImportError(f"transformers reads the tokenizer of {name!r}: pip install transformers") from None
        self.inner = AutoTokenizer.from_pretrained(name)
        ends = None
        with contextlib.suppress(OSError):                      # it may have no generation_config.json
            ends = GenerationConfig.from_pretrained(name).eos_token_id
        if ends is None:
            with contextlib.suppress(OSError):                  # a tokenizer alone has no config.json
                ends = PretrainedConfig.get_config_dict(name)[0].get("eos_token_id")
        self.end = ends if isinstance(ends, list) else [ends] * (ends is not None)
        if not all(type(end) is int for end in self.end):
            raise ValueError(f"generation_config.json or config.json of {name!r}: eos_token_id must be a token's "
                             f"number, several or null, not {ends!r}")
        self.pad, self.opened = self.inner.pad_token_id or 0, ""
        # ZAYA1-8B's template itself opens the reasoning: the tag then stands in the prompt and not in the reply.
        if self.inner.chat_template and self.decode(prompt_ids(self, "?")).rstrip().endswith("<think>"):
            self.opened = "<think>"

    def render(self, messages, generation_prompt=False):
        """As zaya.Tokenizer's, but the targets, which only training needs, are None."""
        ids = self.inner.apply_chat_template(messages, add_generation_prompt=generation_prompt, return_dict=False)
        return ids, None

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.inner.decode(list(ids), clean_up_tokenization_spaces=False)


class Checkpoint(Source):
    """A folder in the official layout: ours, or ZAYA1-8B itself.  Batches of up to `rows` prompts, those of a length
    together, as few as keep the keys and values below `cache_bytes`; equal prompts are prefilled once.
    share(range of the batches' starts) -> those that this process samples; the others' texts stay None."""

    def __init__(self, model, tokenizer, temperature=1.0, rows=256, cache_bytes=2**31, share=iter, top_p=1.0):
        self.model, self.tokenizer, self.rows = model.eval(), tokenizer, rows
        self.temperature, self.top_p, self.cache_bytes, self.share = temperature, top_p, cache_bytes, share

    @classmethod
    def from_pretrained(cls, folder, int8=False, **options):
        import torch
        from kernels import load
        from zaya import Tokenizer
        tokenizer = Tokenizer.from_pretrained(folder) if is_ours(folder) else ChatTokenizer(folder)
        prompt_ids(tokenizer, "?")                              # ValueError now rather than later without a template
        return cls(load(folder, int8, "cuda" if torch.cuda.is_available() else "cpu"), tokenizer, **options)

    def rows_at_once(self, prompts, max_new_tokens):
        """How many rows of the longest prompt and `max_new_tokens` have keys and values of at most `cache_bytes`."""
        config = self.model.config
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim     # numbers a token
        longest = max((len(prompt_ids(self.tokenizer, prompt)) for prompt in set(prompts)), default=0)
        row_bytes = width * self.model.norm.weight.element_size() * (longest + max_new_tokens)
        return max(1, min(self.rows, self.cache_bytes // row_bytes))

    def stream(self, prompts, max_new_tokens, seed, known=()):
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        rows = self.rows_at_once(prompts, max_new_tokens)
        for start in self.share(range(0, len(order), rows)):
            # A row's sample depends on its place in the batch: a batch with anything unknown is sampled as a whole.
            part = order[start:start + rows]
            if set(part) <= set(known):
                continue
            texts = reply(self.model, self.tokenizer, [prompts[i] for i in part], max_new_tokens, seed + start,
                          self.temperature, self.top_p)
            for i, text in zip(part, texts):
                if i not in known:
                    yield i, text, count_tokens(text, self.tokenizer), None


# ---- source 2: a served model ---------------------------------------------------------------------------------------


def sendable(text):
    """`text` with a ? for what UTF-8 has no bytes for, such as half an emoji."""
    return text.encode("utf-8", "replace").decode()


def joined(content):
    """A message's content, text or a list of parts -> text.  TypeError if it is neither."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return joined(content.get("text") or content.get("thinking") or "")
    return "".join(map(joined, content))


def read_completion(answer):
    """A chat completion, as JSON -> its text with the reasoning in <think> tags, and the tokens it took.  Some servers
    put the reasoning into a field of its own, or into parts of the content; the others leave its tags in."""
    choice = answer["choices"][0]
    message, cut = choice["message"], choice.get("finish_reason") == "length"
    content, thoughts, said = message.get("content") or "", [], []
    for part in content if isinstance(content, list) else [content]:
        is_thought = isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")
        (thoughts if is_thought else said).append(part)
    reasoning, text = joined(message.get("reasoning_content") or message.get("reasoning") or thoughts), joined(said)
    if reasoning:
        text = f"<think>{reasoning}</think>{text}" if text or not cut else f"<think>{reasoning}"
    elif text.lstrip().startswith("<think>"):
        text = text.lstrip()
    elif "</think>" in text and "<think>" not in text:          # the chat template had opened it
        text = "<think>" + text
    elif text and cut and "</think>" not in text:               # whatever it was, it had not ended
        text = "<think>" + text
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return sendable(text), tokens if isinstance(tokens, int) else 0


def error_inside(answer):
    """The status in an error that a server or a proxy wraps in a 200, 0 if it names none; None without an error."""
    error = answer.get("error") or answer["choices"][0].get("error")
    if not error:
        return None
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return int(code) if code.isdigit() else 0


class Endpoint(Source):
    """A server that speaks OpenAI's chat-completions protocol: vLLM, SGLang, transformers serve, a hosted model.

    Up to `concurrency` requests at once.  What may pass (408, 409, 429, 5xx, timeouts, dropped connections, answers
    that are no chat completion) is asked for again up to `retries` times, with back-off.  A rollout that still fails,
    or whose request the server refuses (a prompt too long), is reported in the server's words, not replaced.  A wrong
    key, model or address (401, 403, 404, or no server there) stops the run.
    `request`: other names for the fields max_tokens, seed, temperature and top_p; "" leaves one out.  The key is read
    from the environment, and blotted out of all that is printed.
    """
    back_off = 0.5                                              # seconds before the second try; doubles from there

    def __init__(self, url, model, key_variable="OPENAI_API_KEY", concurrency=16, timeout=1800.0, retries=5,
                 temperature=1.0, top_p=1.0, request=None):
        try:
            import openai
        except ImportError:
            raise SystemExit("--endpoint needs the openai client: pip install openai") from None
        self.openai, self.model, self.concurrency, self.retries = openai, model, concurrency, retries
        self.sampling, self.request = dict(temperature=temperature, top_p=top_p), request or {}
        self.place, self.answered = re.sub("//[^/]*@", "//", url), False
        self.key = os.environ.get(key_variable, "").strip() or "none"
        self.sockets, self.stopped = [], threading.Event()

        def watch(request):
            request.extensions["trace"] = self.trace

        try:
            http = openai.DefaultHttpxClient(event_hooks={"request": [watch]})
            self.client = openai.OpenAI(base_url=url, api_key=self.key, max_retries=0, http_client=http,
                                        timeout=openai.Timeout(timeout, connect=min(timeout, 10.0)))
        except Exception as error:                              # an address that is none, whatever the library calls it
            raise SystemExit(f"--endpoint {url}: {self.hide(error)}") from None

    def trace(self, event, info):
        """httpx's trace extension, for the socket of each connection: nothing else can end a request that waits."""
        if event.endswith(("connect_tcp.complete", "start_tls.complete")):
            self.sockets.append(info["return_value"].get_extra_info("socket"))
            if self.stopped.is_set():
                self.stop()

    def stop(self):
        """End what is under way: the interpreter's exit waits for threads, and a request may take half an hour."""
        self.stopped.set()
        while self.sockets:
            with contextlib.suppress(OSError):                  # closed already
                self.sockets.pop().shutdown(socket.SHUT_RDWR)

    def hide(self, text):
        """`text` without the key, on one line."""
        return " ".join((str(text).replace(self.key, "***") if self.key != "none" else str(text)).split())[:500]

    def ask(self, prompt, max_new_tokens, seed):
        """-> text, tokens, None; or None, 0, what went wrong in the server's words."""
        fields = {}
        for name, value in dict(max_tokens=max_new_tokens, seed=seed, **self.sampling).items():
            fields[self.request.get(name, name)] = value
        fields.pop("", None)
        wait, unreachable, words = 0.0, False, ""
        for attempt in range(self.retries + 1):
            if self.stopped.wait(wait):
                break
            # Back-off with jitter, so that clients refused together do not come back together.
            wait = min(8.0, self.back_off * 2.0 ** attempt) * random.uniform(0.5, 1.0)
            status, body = 0, ""
            try:
                body = self.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=[{"role": "user", "content": sendable(prompt)}],
                    extra_body=fields).http_response.text
                self.answered = True
                answer = json.loads(body)
                status = error_inside(answer)
                if status is None:
                    return *read_completion(answer), None
            except self.openai.APIStatusError as refused:
                status, body, self.answered = refused.status_code, refused.response.text, True
                later = refused.response.headers.get("retry-after", "")
                if re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", later):
                    wait = float(later)
            except self.openai.APIConnectionError as broken:    # timeouts too
                body = f"{broken} {broken.__cause__ or ''}"
                unreachable = type(broken.__cause__).__name__ == "ConnectError"
            except (self.openai.APIError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
                status, body = status or 0, f"no chat completion came back: {body or error}"
            words = self.hide(f"{status or ''} {body}")
            if status in (401, 403, 404):
                if status == 404 and not self.place.rstrip("/").endswith("/v1"):
                    words += f" (most servers' address ends in /v1, but --endpoint is {self.place})"
                raise SystemExit(f"the server refuses model {self.model!r} or this request: {words}")
            if 400 <= status < 500 and status not in (408, 409, 429):
                break
        if unreachable and not self.answered:
            raise SystemExit(f"no server answers at --endpoint {self.place}: {words}")
        return None, 0, words

    def stream(self, prompts, max_new_tokens, seed, known=()):
        fatal = []

        def ask(i):
            if fatal:                                           # a wrong key, say: nobody else need ask
                raise fatal[0]
            try:
                return i, *self.ask(prompts[i], max_new_tokens, random.Random(f"{seed} {i}").getrandbits(31))
            except BaseException as error:
                fatal.append(error)
                raise

        self.stopped.clear()
        pool = ThreadPoolExecutor(self.concurrency)
        try:
            futures = [pool.submit(ask, i) for i in range(len(prompts)) if i not in known]
            for future in as_completed(futures):
                yield future.result()
        finally:
            # Ctrl-C and a refusal end here too, with requests under way.
            pool.shutdown(wait=False, cancel_futures=True)
            self.stop()


# ---- a run: its bar, its trace, and going on after a kill -----------------------------------------------------------


@contextlib.contextmanager
def explained(what, kinds=OSError):
    """Errors of these kinds end the program in one sentence that begins with `what`."""
    try:
        yield
    except kinds as error:
        reason = error if isinstance(error, (OSError, ValueError, ImportError)) else repr(error)
        raise SystemExit(" ".join(f"{what}: {reason}".split())[:500]) from None


class Run:
    """markovian_rsa's generate for one budget: a source with a bar, and a memory.

    trace: a file that takes every finished rollout at once, a JSON line each: run, problem, round, index, prompt, text,
    tail, answer, tokens (or error).  Rollouts the trace already has, to the same prompt, are not asked for again.
    """

    def __init__(self, source, name, budget, tokenizer, problems, trace=None, known=()):
        self.source, self.name, self.budget, self.tokenizer, self.trace = source, name, budget, tokenizer, trace
        self.tokens, self.failed = [], []                       # spent in each round; a sentence for each failure
        self.total = problems * budget.population * (budget.rounds + 1)
        self.known, self.bar = {}, None
        for row in known:
            if row["run"] == name and row.get("text") is not None:
                self.known[row["round"], row["problem"], row["index"], row["prompt"]] = row

    def __call__(self, prompts, max_new_tokens, seed):
        from tqdm import tqdm
        self.bar = self.bar or tqdm(total=self.total, desc=self.name, unit=" rollouts", disable=None)
        # What the trace has of this round is taken from there; the source is asked for the others.
        t, rows, known = len(self.tokens), [], {}
        texts = [None] * len(prompts)
        self.tokens.append(0)
        for i, prompt in enumerate(prompts):
            problem, index = divmod(i, self.budget.population)
            rows.append(dict(run=self.name, problem=problem, round=t, index=index, prompt=prompt))
            if row := self.known.get((t, problem, index, prompt)):
                known[i], texts[i] = row, row["text"]
                self.tokens[t] += row["tokens"]
                self.bar.update()
        with contextlib.closing(self.source.stream(prompts, max_new_tokens, seed, known)) as stream:
            for i, text, tokens, error in stream:
                texts[i] = text
                self.record(rows[i] | dict(text=text), tokens, error)
        self.warn(texts)
        if t == self.budget.rounds:
            self.bar.close()
        return texts

    def record(self, row, tokens, error):
        """Count a finished rollout, and write it down at once: a kill loses no more than what was under way."""
        text = row["text"]
        if text is None:
            row["error"] = error
            self.failed.append(f"problem {row['problem']}, round {row['round']}, candidate {row['index']}: {error}")
            self.bar.write(f"failed, and left out of the subsets: {self.failed[-1]}", file=sys.stderr)
        else:
            tokens = tokens or count_tokens(text, self.tokenizer)                   # some servers do not count
            row |= dict(tail=cut_tail(text, self.budget.tail, self.tokenizer), answer=final_answer(text), tokens=tokens)
            self.tokens[-1] += tokens
        if self.trace is not None:
            write_row(self.trace, row)
        self.bar.update()

    def warn(self, texts):
        """Say of a round what its scores would hide: that many of its replies name no answer."""
        replies = len(texts) - texts.count(None)
        silent = [final_answer(text) for text in texts].count(None) - texts.count(None)
        if replies and silent >= replies / 4:
            self.bar.write(f"{self.name}, round {len(self.tokens) - 1}: {silent} of {replies} replies name no answer "
                           "and count as wrong: cut off by --max-tokens, or not in the form that was asked for",
                           file=sys.stderr)


def write_row(file, row):
    """Append a JSON line to a trace, at once."""
    with explained(f"--trace {file.name}"):
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()


def open_trace(path, settings, resume):
    """-> the file to append to, and the rows it already has.  Its first line holds the settings they were made with."""
    if path is None:
        return None, []
    # What UTF-8 cannot hold (half an emoji) is written as \ud83d, which is just how JSON spells it.
    with explained("--trace"):
        trace = open(path, "a", encoding="utf-8", errors="backslashreplace")
    if os.path.getsize(path) == 0:
        write_row(trace, {"settings": settings})
        return trace, []
    if not resume:
        raise SystemExit(f"--trace {path} exists: add --resume to go on with it, or name another file")
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    rows, kinds = [], dict(run=str, problem=int, round=int, index=int, prompt=str)
    for number, line in enumerate(lines[:-1] or lines, 1):
        try:
            row = json.loads(line)
            if number == 1 and row["settings"] != settings:
                changed = [key for key in settings if row["settings"].get(key) != settings[key]]
                raise SystemExit(f"--trace {path} was made with other settings ({', '.join(changed)}): name another "
                                 "file, or repeat the command that made it")
            wanted = kinds | (dict(text=str, tokens=int) if row.get("text") is not None else {})
            if number > 1 and [type(row.get(name)) for name in wanted] != [*wanted.values()]:
                raise ValueError("a field is missing or of another kind")
            rows.append(row)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise SystemExit(f"{path}, line {number}: not a rollout of rsa.py ({error})") from None
    # A line without an end was being written when the run was killed: that rollout was not finished.
    os.truncate(path, os.path.getsize(path) - len(lines[-1]))
    return trace, rows[1:]


# ---- scores and the picture -----------------------------------------------------------------------------------------


def rates(results, answers, t):
    """Each problem's share of right candidates in round t; one that failed is not right."""
    shares = []
    for result, answer in zip(results, answers):
        right = [same(final_answer(c.text), answer) for c in result.rounds[t]]
        shares.append(sum(right) / len(right))
    return shares


def vote(candidates):
    """The majority of their answers, and how many gave it."""
    return majority([final_answer(c.text) for c in candidates])


def score_table(runs, answers):
    """Markdown: one row a budget.  runs: list of (Run, results)."""
    lines = ["| budget | single | majority of round 0 | Markovian RSA | its majority | tokens a problem | "
             "longest prompt | failed |", "|---" * 8 + "|"]
    for run, results in runs:
        cells = [f"{run.name}: {run.budget}"]
        for t in (0, -1):
            votes = [vote(result.rounds[t])[0] for result in results]
            for scores in rates(results, answers, t), list(map(same, votes, answers)):
                low, high = interval(scores)
                cells.append(f"{statistics.fmean(scores):.3f} [{low:.3f}, {high:.3f}]")
        longest = max(result.longest_prompt for result in results)
        cells += [f"{sum(run.tokens) / len(results):,.0f}", f"{longest:,}", f"{len(run.failed)}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show_rounds(run, result):
    """One problem: how its candidates' answers change from round to round, and the majority."""
    for t, candidates in enumerate(result.rounds):
        counts = collections.Counter((final_answer(c.text) or "no answer")[:40] for c in candidates)
        common = ", ".join(f"{answer} x{count}" for answer, count in counts.most_common(6))
        print(f"round {t}: {run.tokens[t]:,} tokens | {common}")
    answer, votes = vote(result.candidates)
    if votes:
        print(f"majority of the last round: {answer} ({votes} of {len(result.candidates)})")
    else:
        print("no candidate of the last round names an answer")


def draw_run(path, runs, answers=None):
    """PNG: how many candidates of each round are right, and the tokens they cost.  Without answers, the last majority
    stands for the right one: the curve shows how the population comes to agree."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for run, results in runs:
        truths = answers or [vote(result.candidates)[0] for result in results]
        shares = [statistics.fmean(rates(results, truths, t)) for t in range(run.budget.rounds + 1)]
        axes[0].plot(shares, "o-", label=run.name)
        axes[1].plot([tokens / len(results) for tokens in run.tokens], "o-", label=run.name)
    axes[0].set(ylabel="right candidates" if answers else "candidates with the last majority's answer", ylim=(0, 1.02))
    axes[1].set(ylabel="tokens a problem", ylim=(0, None))
    for axis in axes:
        axis.set(xlabel="round (0: no aggregation yet)", xticks=range(max(len(run.tokens) for run, _ in runs)))
        axis.legend()
    figure.savefig(path + ".tmp.png", dpi=130)
    os.replace(path + ".tmp.png", path)
    plt.close(figure)


# ---- the command line -----------------------------------------------------------------------------------------------


def read_problems(path):
    """A .jsonl of {"problem": text, "answer": text, number or a list of one} -> list of (problem, answer), both str."""
    with explained("--problems"), open(path, "rb") as file:
        lines = file.read().split(b"\n")
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem, answer = row["problem"], row["answer"]
            if isinstance(answer, list) and len(answer) == 1:
                answer = answer[0]
            if not isinstance(problem, str) or not problem.strip():
                raise ValueError("the problem must be a text")
            truth = final_answer(str(answer)) or str(answer)    # of a worked answer (… #### 72) what counts
            infinite = isinstance(answer, float) and not abs(answer) < float("inf")
            if type(answer) not in (str, int, float) or infinite or normal_form(truth) == ():
                raise ValueError("the answer must be a text, a finite number or a list of one of them")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise SystemExit(f'{path}, line {number}: not {{"problem": …, "answer": …}} '
                             f"({type(error).__name__}: {error})") from None
        rows.append((problem, truth))
    if not rows:
        raise SystemExit(f"{path} holds no problems")
    return rows


FIELDS = ("max_tokens", "seed", "temperature", "top_p")         # of a request, which some servers call otherwise


def request_names(text):
    """max_tokens=max_completion_tokens,seed= -> {field: its name in a request}, "" to leave it out."""
    names = dict(pair.partition("=")[::2] for pair in text.split(","))
    if text.count("=") != len(names) or not names.keys() <= set(FIELDS):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIELD=NAME,FIELD=,… with each FIELD of {', '.join(FIELDS)}")
    return names


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="python rsa.py", allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("problem", nargs="?", help="the problem to solve")
    add("--problems", metavar="FILE", help="a .jsonl of problem and answer: solve and score them all")
    add("--checkpoint", metavar="FOLDER", help="a folder in the official layout, such as out/tiny/final or ZAYA1-8B")
    add("--quantize", choices=["int8"], help="checkpoint: round its weights to 8 bits while loading")
    add("--endpoint", metavar="URL", help="a chat-completions server, such as http://localhost:8000/v1")
    add("--model", metavar="NAME", help="the served model's name")
    add("--budget", metavar="NAMES", dest="budgets",
        help=f"one or several of {', '.join(BUDGETS)} (default: tiny for a checkpoint of ours, else default)")
    add("--population", type=int, metavar="N", help="N: candidates a round; instead of the budget's")
    add("--subset", type=int, metavar="N", help="C: tails in a prompt, likewise")
    add("--rounds", type=int, metavar="N", help="T: rounds of aggregation, likewise")
    add("--max-tokens", type=int, metavar="N", dest="budget", help="beta: most tokens of a rollout, likewise")
    add("--tail", type=int, metavar="N", help="tau: tokens of reasoning carried on, likewise")
    add("--prompt", choices=PROMPTS, help="aggregation prompt (default: terse for a checkpoint of ours, else report)")
    add("--tokenizer", metavar="NAME", help="endpoint: a folder or hub name, whose tokens tails are cut by, not words")
    add("--seed", type=int, default=0, metavar="N", help="(default 0)")
    add("--temperature", type=float, default=1.0, metavar="X", help="(default 1)")
    add("--top-p", type=float, metavar="X", help="(default: 0.95 for ZAYA1-8B, as its card asks, else 1)")
    add("--concurrency", type=int, default=16, metavar="N", help="requests at once (default 16)")
    add("--timeout", type=float, default=1800.0, metavar="SECONDS", help="of one request (default 1800)")
    add("--retries", type=int, default=5, metavar="N", help="tries after a failed request (default 5)")
    add("--request", type=request_names, metavar="NAMES", help=f"endpoint: names (or none) for {', '.join(FIELDS)}; "
        "OpenAI's reasoning models: max_tokens=max_completion_tokens,temperature=,top_p=")
    add("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the server's key")
    add("--trace", metavar="FILE", help="write every prompt, text, tail and answer there, a JSON line each")
    add("--resume", action="store_true", help="go on with an existing --trace: nothing finished is asked again")
    add("--picture", metavar="FILE", help="draw answers and tokens by round, as PNG")
    given, others = parser.parse_known_args(arguments)
    if given.problem is None and len(others) == 1 and not re.match("-[A-Za-z-][\\w-]*(=|$)", others[0]):
        given.problem, others = others[0], []                   # such as -3+5
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)} (a problem like that: last, after --)")
    if (given.problem is None) == (given.problems is None):
        parser.error("give one problem, or --problems FILE")
    if (given.checkpoint is None) == (given.endpoint is None):
        parser.error("give --checkpoint FOLDER or --endpoint URL")
    if given.endpoint and not given.model:
        parser.error("--endpoint needs --model NAME")
    if given.quantize and not given.checkpoint:
        parser.error("--quantize is for --checkpoint FOLDER; what a server computes with is its own affair")
    if given.resume and not given.trace:
        parser.error("--resume goes on with a --trace FILE; name it")
    picture = given.picture or "x"
    if not os.path.isdir(os.path.dirname(picture) or ".") or (os.path.exists(picture) and not os.path.isfile(picture)):
        parser.error(f"--picture {picture}: no file can be drawn there")            # rather now than after hours
    for name, least, most in (("concurrency", 1, 4096), ("retries", 0, 100), ("timeout", 0.001, 1e6),
                              ("temperature", 0, 100), ("top_p", 1e-6, 1)):
        value = getattr(given, name)
        if value is not None and not least <= value <= most:    # nan, too
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and at most {most:g}, not {value}")
    # What is not said follows from the model: whether it is one of ours, and whether it is ZAYA1-8B.
    ours = given.checkpoint is not None and is_ours(given.checkpoint)
    official = not ours if given.checkpoint else "zaya1-8b" in given.model.lower()
    given.budgets = given.budgets or ("tiny" if ours else "default")
    given.prompt = given.prompt or ("terse" if ours else "report")
    given.top_p = given.top_p or (0.95 if official else 1.0)
    return given


def budgets_asked(given):
    """{name: Budget}, with the command line's numbers in place of the presets'."""
    asked = {}
    for name in given.budgets.split(","):
        if name not in BUDGETS:
            raise SystemExit(f"--budget {name}: there are {', '.join(BUDGETS)}")
        numbers = asdict(BUDGETS[name])
        for key in numbers:
            if getattr(given, key) is not None:
                numbers[key] = getattr(given, key)
        # What was not asked for follows what was: a smaller population or budget takes subset and tail along.
        if given.subset is None:
            numbers["subset"] = min(numbers["subset"], numbers["population"])
        if given.tail is None:
            numbers["tail"] = min(numbers["tail"], numbers["budget"])
        with explained(f"--budget {name}", ValueError):
            asked[name] = Budget(**numbers)
    return asked


def open_source(given):
    """-> the source, the tokenizer that cuts tails (None: words), and the source's name in a trace."""
    sampling, tokenizer = dict(temperature=given.temperature, top_p=given.top_p), None
    if given.checkpoint:
        with explained(f"--checkpoint {given.checkpoint}", Exception):              # damage has many exceptions
            source = Checkpoint.from_pretrained(given.checkpoint, given.quantize == "int8", **sampling)
        return source, source.tokenizer, f"{given.checkpoint} {given.quantize or ''}".strip()
    source = Endpoint(given.endpoint, given.model, given.key_variable, given.concurrency, given.timeout, given.retries,
                      request=given.request, **sampling)
    if given.tokenizer is None:
        print("tails and prompts are counted in words; --tokenizer NAME counts tokens")
    else:
        with explained(f"--tokenizer {given.tokenizer}", Exception):
            tokenizer = ChatTokenizer(given.tokenizer)
    return source, tokenizer, f"{given.model} at {source.place}"


def solve(run, problems, given):
    """One budget: markovian_rsa, with a line before and after -> its results."""
    budget, begun = run.budget, time.perf_counter()
    unit = "tokens" if run.tokenizer else "words"
    print(f"{run.name}: {budget}, {len(problems)} problem{'s' * (len(problems) > 1)}: {run.total:,} rollouts, at most "
          f"{run.total * budget.budget:,} tokens; prompts of at most the problem and {budget.subset * budget.tail:,} "
          f"{unit} of tails; temperature {given.temperature:g}, top-p {given.top_p:g}")
    try:
        results = markovian_rsa(problems, run, **asdict(budget), seed=given.seed, tokenizer=run.tokenizer,
                                build_prompt=PROMPTS[given.prompt])
    except RuntimeError as error:
        if not run.failed:                                      # the machine's trouble, not the rollouts'
            raise
        go_on = f". Go on with --trace {given.trace} --resume" if given.trace else ""
        raise SystemExit(f"{run.name}: {error}; the last one: {run.failed[-1]}{go_on}") from None
    longest = max(result.longest_prompt for result in results)
    blank = sum(result.empty_tails for result in results)
    print(f"{run.name}: {sum(run.tokens):,} tokens generated, longest prompt {longest:,} {unit}, {len(run.failed)} "
          f"failed, {blank} without a tail, {time.perf_counter() - begun:.0f} s")
    return results


def run_command(given):
    budgets, answers = budgets_asked(given), None
    problems = [given.problem]
    if given.problems:
        problems, answers = zip(*read_problems(given.problems))
    problems = list(map(sendable, problems))
    source, tokenizer, place = open_source(given)
    # What decides the samples: a trace made with other settings is another run's.
    settings = dict(source=place, budgets={name: str(budget) for name, budget in budgets.items()}, problems=problems)
    for name in ("prompt", "seed", "temperature", "top_p", "request", "tokenizer"):
        settings[name] = getattr(given, name)
    trace, known = open_trace(given.trace, settings, given.resume)
    runs = []
    for name, budget in budgets.items():
        run = Run(source, name, budget, tokenizer, len(problems), trace, known)
        runs.append((run, solve(run, problems, given)))
        if not answers:
            show_rounds(run, runs[-1][1][0])
    if answers:
        print(score_table(runs, answers))
    if given.picture:
        with explained("--picture"):
            draw_run(given.picture, runs, answers)
        print(f"drawn: {given.picture}")


def main(arguments=None):
    """The command line.  What a file or the disk refuses, and Ctrl-C, end it in one sentence."""
    if hasattr(sys.stdout, "reconfigure"):                      # a code page that lacks a character must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        with explained("stopped"):
            run_command(parse_arguments(arguments))
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; with --trace FILE, the same command and --resume goes on from there") from None


if __name__ == "__main__":
    main()
