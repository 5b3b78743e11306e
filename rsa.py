"""Markovian RSA: parallel traces, of which only bounded tails are carried from round to round.

    python rsa.py --checkpoint out/tiny/final "find 06b,85c"
    python rsa.py --endpoint http://localhost:8000/v1 --model Zyphra/ZAYA1-8B "What is 47 * 85?"
    python rsa.py --endpoint … --model … --problems aime.jsonl --budget light,default --trace aime.trace

    population -> tails of tau tokens -> C of them in a prompt -> a new candidate

TR section V (the ZAYA1-8B report), after Recursive Self-Aggregation (arXiv 2509.26626) and the Markovian Thinker
(2510.06557).  Training makes its aggregation prompts with these very functions: a model sees at test time what it was
taught to read.  The text comes from any function generate(prompts, max_new_tokens, seed); here are two: Checkpoint, a
folder of weights, and Endpoint, a server that speaks the chat-completions protocol.

Read in this order: tails and prompts, markovian_rsa, answers, the two sources, Run (bar, trace, resume), main.
"""
import argparse
import collections
import contextlib
import functools
import itertools
import json
import math
import os
import queue
import random
import re
import sys
import threading
import time
from dataclasses import dataclass, field
from fractions import Fraction
from types import SimpleNamespace

# Threads that wait asleep: on a busy machine spinning ones are many times slower, on an idle one they gain nothing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# ---- tails and prompts ----------------------------------------------------------------------------------------------


class Words:
    """What stands in for a tokenizer: text -> units, which joined are the text again, character by character.

    A unit is a word, or 16 characters of a longer one, with up to 16 of white space before and after it.  Scripts
    without spaces between words (Chinese, Japanese, Thai, …), Hangul and emoji have a unit a character.
    """
    ALONE = "\u0e00-\u109f\u1780-\u17ff\u2e80-\U0010ffff"
    encode = re.compile(rf"\s{{0,16}}(?:[{ALONE}]|[^\s{ALONE}]{{1,16}})\s{{0,16}}|\s{{1,16}}").findall
    decode = "".join


def cut_tail(text, tail, tokenizer=None):
    """The last `tail` tokens of a reply's reasoning: of what stands before </think>, or of everything without it.

    text str, tail int (tokens) -> str.  tokenizer: anything with encode(str) -> list and decode(list) -> str; None
    counts Words.  A reply whose reasoning is blank hands on what follows it.

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
    """The aggregation prompt that small models learn: candidates first, the problem last, and alone without any.

    >>> terse_prompt("47+85", ["5+0=12", "7+5+0=12"]), terse_prompt("47+85", [])
    ('|5+0=12|7+5+0=12|47+85', '47+85')
    """
    return "".join(f"|{tail}" for tail in tails) + f"|{problem}" if tails else problem


def report_prompt(problem, tails):
    r"""The report's order: the problem, the candidates, and the request for one improved solution.  Without candidates
    it asks for the answer in the same form, so that the rounds can be compared.

    >>> print(report_prompt("What is 47+85?", ["so 12 and carry 1"]))
    What is 47+85?
    <BLANKLINE>
    Candidate solution 1 (may contain mistakes):
    so 12 and carry 1
    <BLANKLINE>
    Write one improved solution, and put its final answer in \boxed{}.
    >>> report_prompt("What is 47+85?", []).splitlines()[-1]
    'Write a solution, and put its final answer in \\boxed{}.'
    """
    candidates = "".join(f"Candidate solution {i} (may contain mistakes):\n{tail}\n\n"
                         for i, tail in enumerate(tails, 1))
    wanted = "one improved solution" if tails else "a solution"
    return f"{problem}\n\n{candidates}Write {wanted}, and put its final answer in \\boxed{{}}."


PROMPTS = {"terse": terse_prompt, "report": report_prompt}

# ---- the algorithm --------------------------------------------------------------------------------------------------


@dataclass
class Candidate:
    """One rollout: what was asked, what came back, and the tail that the next round may see.  text None: it failed."""
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
        return self.rounds[-1]


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
    Words -> Result, or a list of them.  Subsets leave out what failed and blank tails; a problem with no tail left is
    asked as in round 0.  ValueError if an argument makes no sense, or if generate returns another number of texts than
    it was asked for; RuntimeError if a round fails as a whole.  TR section V; deterministic for a seed if generate is.
    """
    if not (population >= 1 and 1 <= subset <= population and rounds >= 0 and budget >= 1 and 0 <= tail <= budget):
        raise ValueError(f"markovian_rsa needs 1 <= subset <= population, rounds >= 0 and 0 <= tail <= budget; got "
                         f"population={population}, subset={subset}, rounds={rounds}, budget={budget}, tail={tail}")
    problems = [problem] if isinstance(problem, str) else list(problem)
    results, rngs = [Result() for _ in problems], [random.Random(f"{seed} {i}") for i in range(len(problems))]
    for t in range(rounds + 1):
        prompts = []
        for q, result, rng in zip(problems, results, rngs):
            tails = [c.tail for c in result.candidates if c.tail and c.tail.strip()] if t else []
            prompts += [build_prompt(q, rng.sample(tails, min(subset, len(tails)))) for _ in range(population)]
        texts = generate(prompts, budget, random.Random(f"{seed} round {t}").getrandbits(31))
        if len(texts) != len(prompts):
            raise ValueError(f"generate returned {len(texts)} texts for {len(prompts)} prompts")
        if prompts and all(y is None for y in texts):
            raise RuntimeError(f"all {len(prompts)} candidates of a round failed: nothing to aggregate")
        for i, result in enumerate(results):
            part = slice(i * population, (i + 1) * population)
            result.rounds.append([Candidate(p, y, None if y is None else cut_tail(y, tail, tokenizer))
                                  for p, y in zip(prompts[part], texts[part])])
            result.generated_tokens += sum(count_tokens(y, tokenizer) for y in texts[part] if y is not None)
            longest = max(count_tokens(p, tokenizer) for p in set(prompts[part]))
            result.longest_prompt = max(result.longest_prompt, longest)
            result.empty_tails += sum(c.tail is not None and not c.tail.strip() for c in result.candidates)
    return results[0] if isinstance(problem, str) else results


@dataclass(frozen=True)
class Budget:
    """N, C, T, beta, tau of one run."""
    population: int
    subset: int
    rounds: int
    budget: int
    tail: int

    def __str__(self):
        return f"N={self.population} C={self.subset} T={self.rounds} beta={self.budget} tau={self.tail}"


# The report names four.  default is its AIME setting; of extra-high N and T are known, light and high lie around them.
# tiny: what `python train.py` trains its checkpoint for.
BUDGETS = {"tiny": Budget(16, 4, 2, 160, 24), "light": Budget(8, 4, 1, 40960, 4096),
           "default": Budget(16, 4, 2, 40960, 4096), "high": Budget(16, 4, 4, 40960, 4096),
           "extra-high": Budget(32, 4, 8, 40960, 4096)}

# ---- answers --------------------------------------------------------------------------------------------------------


def last_boxed(text):
    r"""What the last complete \boxed{…} (or \fbox{…}) holds, with its braces balanced; None without one.

    >>> last_boxed(r"so \boxed{1}, no, \boxed {\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    opened, last = [], (-1, None)                               # in one pass: text may be \boxed{ a thousand times
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|(?<!\\)\\[{}]|[{}]", text):
        if match[0] in (r"\{", r"\}"):                          # these are printed, as a set's, and group nothing
            continue
        if match[0] != "}":
            opened.append(match)
        elif opened and (start := opened.pop())[0] != "{":
            last = max(last, (start.end(), match.start()))
    return text[slice(*last)] if last[1] is not None else None


def final_answer(text):
    r"""A reply's answer: its last \boxed{…}, else <answer>…</answer>, else what follows #### in the last line, else the
    one short line that stands after its reasoning or below a last heading `#### Answer`.  None if there is none: the
    reasoning has not ended, or the reply names no answer.

    >>> final_answer("<think>7*6</think>It is \\boxed{42}."), final_answer("<think>7+5=12</think>12")
    ('42', '12')
    >>> final_answer("<think>7+5=12, so"), final_answer("<think>7</think>")
    (None, None)
    """
    if text is None or (text.startswith("<think>") and "</think>" not in text):
        return None
    reply = text.rpartition("</think>")[2].strip()
    answer = last_boxed(reply)
    if answer is None and (tagged := re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", reply, re.DOTALL)):
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


# What LaTeX has several spellings for, in this order; a group of one item loses its braces.
SPELLINGS = [("[−–]", "-"), ("×", r"\\times "), (r"°|\\degree", r"^\\circ "), (r"\\[dtc]frac", r"\\frac"),
             (r"[$~]|\\[$,!;: ()\[\]]|\\(left|right|big|displaystyle|q?quad)(?![a-zA-Z])", " "),
             (r"(?<![\^_])\\(?:text|mbox|math(?=rm|bf|it))[a-z]*\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r" \1 "),
             (r"\\(frac|sqrt)\s*([0-9])", r"\\\1 \2 "), (r"(\\frac\s*([0-9] |\{[^{}]*\}))\s*([0-9])", r"\1 \3 "),
             (r"\^\s*([0-9]{2,})", r"^{\1}"), (r"\{\s*(\w|\\[a-zA-Z]+)\s*\}", r" \1 ")]
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\.?[0-9]+(?:\.[0-9]+)*(?:[eE][+-]?[0-9]+(?!\w))?|[^\W\d_]+|\S", re.DOTALL)
N = r"(?:[0-9]{1,300}(?:\.[0-9]{1,300})?|\.[0-9]{1,300})(?:e[-+]?[0-9]{1,3})?"         # never 1e999999999
NUMBER = re.compile(rf"([-+] )?(?:([0-9]{{1,300}}) )?({N})(?: / ({N}))?(?: (?:\\times|\\cdot|\*) 10 \^ "
                    r"((?:- )?[0-9]{1,3}))?(?: \\?%| \^ \\circ)?")
MARKS = {",", ";", "=", "<", ">", "(", ")", "[", "]", r"\{", r"\}"}


def number(text):
    r"""The value of tokens that are a decimal, a fraction, a mixed number or a \times 10^k; None of any others."""
    text = re.sub(rf"\{{ ((?:- )?{N}) \}}", r"\1", text)
    found = NUMBER.fullmatch(re.sub(rf"\\frac ((?:- )?{N}) ({N})", r"\1 / \2", text))
    if not found:
        return None
    sign, whole, top, bottom, power = found.groups()
    top, bottom = Fraction(top), Fraction(bottom or 1)
    if not bottom or (whole and not (0 < top < bottom and top.denominator == bottom.denominator == 1)):
        return None                                             # 1 10 is two numbers
    value = (int(whole or 0) + top / bottom) * Fraction(10) ** int((power or "0").replace(" ", ""))
    return -value if sign == "- " else value


@functools.lru_cache(256)
def normal_form(answer):
    r"""An answer as it is compared: Fraction, or tokens with each number that stands alone between commas, brackets and
    relations as a Fraction.  White space separates; case, $, %, degrees and LaTeX's dressing do not count.  1,234 is a
    number, but in brackets a comma separates and only 1{,}234 is one.

    >>> normal_form("1,234.50") == normal_form(r"$\frac{2469}{2}$"), normal_form(r"\text{Even }."), normal_form("1 1/2")
    (True, 'even', Fraction(3, 2))
    >>> normal_form(r"\left(1,234, \tfrac12\right)"), normal_form("1 10")
    (('(', Fraction(1, 1), ',', Fraction(234, 1), ',', Fraction(1, 2), ')'), '1 10')
    """
    if len(answer) > 1000:                                      # no answer but a loop: word for word, and cheap
        return tuple(answer.split())
    joint = r"(?:\{,\}|,\\!|\\,)" if re.search(r"(?<!\\)[(\[]|\\\{", answer) else r"(?:\{,\}|,\\!|\\,|,)"
    text = re.sub(rf"(?<![0-9.,])[1-9][0-9]{{0,2}}(?:{joint}[0-9]{{3}})+(?!,?[0-9])",
                  lambda match: re.sub("[^0-9]", "", match[0]), answer)
    for pattern, plain in SPELLINGS:
        text = re.sub(pattern, plain, text)
    tokens = [token if token[0] == "\\" else token.lower() for token in TOKEN.findall(text)]
    if tokens[-1:] == ["."] != tokens[-2:-1]:
        tokens.pop()
    runs, form = [" ".join(run) for _, run in itertools.groupby(tokens, MARKS.__contains__)], []
    for before, run, after in zip(["", *runs], runs, [*runs[1:], ""]):
        factor = before.endswith((")", "]", "}")) or after.startswith(("(", "[", r"\{"))    # (x)+2 is not (x) times 2
        value = None if factor else number(run)
        form.append(run if value is None else value)
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
    """Whether two answers have one normal form, or are LaTeX that the package math-verify (optional: pip install
    math-verify) finds equal; it is asked in the main thread alone, where its limits of time work.
    """
    if answer is None or truth is None:
        return False
    a, b = normal_form(answer), normal_form(truth)
    if a == b or len(answer) + len(truth) > 400 or not re.search(r"[\\^]", f"{a} {b}"):
        return a == b
    # It takes words for products of letters, and 2\frac{1}{3} for one.
    misread = re.search(r"\\(text|math|mbox|operator)|[0-9}]\s*\\[dtc]?frac|[0-9](\s|\\.)+[0-9]", f"{answer}|{truth}")
    return not misread and threading.current_thread() is threading.main_thread() and verified(answer, truth)


def majority(answers):
    """The most frequent answer and its votes, by `same`; the first one of several.  Those that are None have no vote.

    >>> majority(["7", None, "07", "8", None, None]), majority([None])
    (('7', 2), (None, 0))
    """
    groups = []
    for answer in answers:
        group = next((group for group in groups if same(group[0], answer)), None)
        if group:
            group.append(answer)
        elif answer is not None:
            groups.append([answer])
    most = max(groups, key=len, default=[None])
    return most[0], len(most) if groups else 0


def interval(rates):
    """95 % interval of the mean over problems, whose samples depend on each other.  All right or all wrong is no proof
    of 1 or 0: never narrower than one problem's worth."""
    rates = [float(rate) for rate in rates]
    if len(rates) < 2:
        return [0.0, 1.0]
    mean = sum(rates) / len(rates)
    deviation = (sum((rate - mean) ** 2 for rate in rates) / (len(rates) - 1)) ** 0.5
    half = 1.96 * max(deviation / len(rates) ** 0.5, 1 / len(rates))
    return [max(0.0, mean - half), min(1.0, mean + half)]


# ---- source 1: a checkpoint of ours ---------------------------------------------------------------------------------


def prompt_ids(tokenizer, prompt):
    """What the model reads before it answers: the user's turn, and the opening of the assistant's."""
    return tokenizer.render([{"role": "user", "content": prompt}], generation_prompt=True)[0]


def left_padded(rows, pad, device):
    """Lists of ids -> input_ids and attention_mask (B, S) int64, padded on the left as generation needs it."""
    import torch
    width = max(map(len, rows))
    return (torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device),
            torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device))


def reply(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, top_p=1.0):
    """Sample the assistant's answer to each prompt in one batch: list of str -> list of str, <think> tags included.

    tokenizer: zaya.Tokenizer or ChatTokenizer.
    """
    import torch
    inputs, mask = left_padded([prompt_ids(tokenizer, p) for p in prompts], tokenizer.pad, model.norm.weight.device)
    out = model.generate(inputs, max_new_tokens, temperature, top_p, attention_mask=mask, eos_token_id=tokenizer.end,
                         generator=torch.Generator().manual_seed(seed))[:, inputs.shape[1]:]
    ends = {tokenizer.end} if isinstance(tokenizer.end, int) else set(tokenizer.end)
    opened = getattr(tokenizer, "opened", "")                   # a tag that the chat template has written already
    rows = [itertools.takewhile(lambda token: token not in ends, row) for row in out.tolist()]
    return [opened + tokenizer.decode(row) for row in rows]


def is_ours(folder):
    """Whether a checkpoint's tokenizer.json is zaya.Tokenizer's, told by its special tokens, or if there is none."""
    from zaya import Tokenizer
    try:
        with open(os.path.join(folder, "tokenizer.json"), encoding="utf-8") as file:
            added = {token["content"] for token in json.load(file)["added_tokens"]}
    except (OSError, ValueError, KeyError, TypeError):
        return True                                             # its own words say what is missing or damaged
    return set(Tokenizer.SPECIAL) <= added


class ChatTokenizer:
    """The tokenizer of an official folder, such as ZAYA1-8B's: tokenizer.json, the Jinja chat template, and the ids
    that end a turn, behind those methods of zaya.Tokenizer that this file uses.

    Prompts have the ids of transformers' AutoTokenizer.apply_chat_template; as there, a special token that is spelled
    out in a problem becomes that token.  ValueError names the file that is missing or damaged; ImportError says what
    to install.
    """

    def __init__(self, folder):
        try:
            import tokenizers
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ImportError(f"{folder!r} has a tokenizer.json of the `tokenizers` library and a Jinja chat template: "
                              f"pip install tokenizers jinja2 ({error})") from None
        path = os.path.join(folder, "tokenizer.json")
        try:
            self.inner = tokenizers.Tokenizer.from_file(path)
        except Exception as error:                              # the library raises nothing narrower
            raise ValueError(f"{path} is damaged: {error}") from None
        self.inner.no_padding()
        self.inner.no_truncation()
        settings, config = self.read(folder, "tokenizer_config.json"), self.read(folder, "config.json")
        ends = self.read(folder, "generation_config.json").get("eos_token_id")
        ends = config.get("eos_token_id", 106) if ends is None else ends
        self.end, self.pad = ends if isinstance(ends, list) else [ends], config.get("pad_token_id") or 0
        self.end = [token for token in self.end if token is not None]
        if not all(type(token) is int for token in (*self.end, self.pad)):
            raise ValueError(f"generation_config.json or config.json in {folder!r}: eos_token_id and pad_token_id must "
                             f"be numbers of tokens or null, not {ends!r} and {self.pad!r}")
        template = settings.get("chat_template")
        if isinstance(template, list):                          # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if os.path.exists(path := os.path.join(folder, "chat_template.jinja")):
            with open(path, encoding="utf-8") as file:
                template = file.read()
        if not template:
            raise ValueError(f"{folder!r} has no chat template: no chat_template.jinja, and no field chat_template in "
                             "tokenizer_config.json")
        jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        jinja.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        jinja.globals |= {"raise_exception": self.refuse, "strftime_now": time.strftime}
        self.template = jinja.from_string(template)
        self.names = {name: token["content"] if isinstance(token, dict) else token for name, token in settings.items()
                      if name.endswith("_token") and token}
        begun = self.chat([{"role": "user", "content": "?"}], True).rstrip()
        self.opened = "<think>" if begun.endswith("<think>") else ""

    @staticmethod
    def read(folder, name):
        path = os.path.join(folder, name)
        if not os.path.exists(path):
            return {}
        try:
            with open(path, encoding="utf-8") as file:
                return dict(json.load(file))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged: {error}") from None

    @staticmethod
    def refuse(message):
        raise ValueError(f"the chat template refuses this: {message}")

    def chat(self, messages, generation_prompt=False):
        return self.template.render(messages=messages, add_generation_prompt=generation_prompt, tools=None,
                                    documents=None, **self.names)

    def render(self, messages, generation_prompt=False):
        """As zaya.Tokenizer's, but the targets, which only training needs, are None."""
        return self.encode(self.chat(messages, generation_prompt)), None

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        return self.inner.decode(list(ids), skip_special_tokens=False)


class Source:
    """Where text comes from: stream(prompts, max_new_tokens, seed, known) yields (index, text, tokens spent, error),
    as rollouts finish, in any order, but for the indices in `known`.  What it yields for an index does not depend on
    which others are known: a run that goes on after a kill samples what it would have sampled."""

    def __call__(self, prompts, max_new_tokens, seed, progress=iter):
        """As markovian_rsa's generate: list of str -> list of str.  progress: a bar such as tqdm, around the stream."""
        texts = [None] * len(prompts)
        for index, text, *_ in progress(self.stream(prompts, max_new_tokens, seed)):
            texts[index] = text
        return texts


class Checkpoint(Source):
    """A folder in the official layout: ours, or ZAYA1-8B itself.  Batches of up to `rows` prompts, those of a length
    together, as few as keep the keys and values below `cache_bytes`; equal prompts are prefilled once.
    share(range of the batches' starts) -> those that this process samples; the others' texts stay None."""

    def __init__(self, model, tokenizer, temperature=1.0, rows=256, cache_bytes=2**31, share=iter, top_p=1.0):
        self.model, self.tokenizer, self.rows = model.eval(), tokenizer, rows
        self.temperature, self.top_p, self.cache_bytes, self.share = temperature, top_p, cache_bytes, share

    @classmethod
    def from_pretrained(cls, folder, int8=False):
        import torch
        from kernels import load
        from zaya import Tokenizer
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = load(folder, int8, device)
        return cls(model, Tokenizer.from_pretrained(folder) if is_ours(folder) else ChatTokenizer(folder))

    def rows_at_once(self, prompts, max_new_tokens):
        """How many rows of the longest prompt and `max_new_tokens` have keys and values of at most `cache_bytes`."""
        config = self.model.config
        a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * \
            self.model.norm.weight.element_size()
        longest = max((len(prompt_ids(self.tokenizer, prompt)) for prompt in set(prompts)), default=0)
        return max(1, min(self.rows, self.cache_bytes // (a_token * (longest + max_new_tokens))))

    def stream(self, prompts, max_new_tokens, seed, known=()):
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        rows = self.rows_at_once(prompts, max_new_tokens)
        for start in self.share(range(0, len(order), rows)):
            part = order[start:start + rows]
            if set(part) <= set(known):
                continue
            texts = reply(self.model, self.tokenizer, [prompts[i] for i in part], max_new_tokens, seed + start,
                          self.temperature, self.top_p)
            for i, text in zip(part, texts):                    # a row's sample depends on its place in the batch
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


class Endpoint(Source):
    """A server that speaks OpenAI's chat-completions protocol: vLLM, SGLang, transformers serve, a hosted model.

    Up to `concurrency` requests at once.  The client library retries 408, 409, 429, 5xx, timeouts and dropped
    connections with back-off; answers that are no chat completion are asked for again here.  A rollout that fails
    `retries` times, or whose request the server refuses (a prompt too long), is reported in the server's words, not
    replaced.  A wrong key, model or address (401, 403, 404, or no server there) stops the run.
    `request`: other names for the fields max_tokens, seed, temperature and top_p; "" leaves one out.  The key is read
    from the environment, and blotted out of all that is printed.
    """

    def __init__(self, url, model, key_variable="OPENAI_API_KEY", concurrency=16, timeout=1800.0, retries=5,
                 temperature=1.0, top_p=1.0, request=None):
        try:
            import openai
        except ImportError:
            raise SystemExit("--endpoint needs the openai client: pip install openai") from None
        self.openai, self.model, self.retries, self.request = openai, model, retries, request or {}
        self.concurrency, self.sampling = concurrency, dict(temperature=temperature, top_p=top_p)
        self.place, self.answered = re.sub("//[^/]*@", "//", url), False
        self.key = os.environ.get(key_variable, "").strip() or "none"
        try:
            self.client = openai.OpenAI(base_url=url, api_key=self.key, timeout=timeout, max_retries=retries)
        except Exception as error:                              # an address that is none, whatever the library calls it
            raise SystemExit(f"--endpoint {url}: {self.hide(error)}") from None

    def hide(self, text):
        """`text` without the key, on one line."""
        return " ".join((str(text).replace(self.key, "***") if self.key != "none" else str(text)).split())[:500]

    def ask(self, prompt, max_new_tokens, seed):
        """-> text, tokens, None; or None, 0, what went wrong in the server's words."""
        values = dict(max_tokens=max_new_tokens, seed=seed, **self.sampling)
        fields = {self.request.get(name, name): value for name, value in values.items() if self.request.get(name, name)}
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(8.0, 0.25 * 2 ** min(attempt, 9)) * (0.5 + random.random() / 2))
            body, tried = "", False
            try:
                body = self.client.chat.completions.with_raw_response.create(
                    model=self.model, messages=[{"role": "user", "content": sendable(prompt)}],
                    extra_body=fields).http_response.text
                self.answered = True
                answer = json.loads(body)
                if (status := self.refusal(answer)) is None:
                    return *self.read(answer), None
            except self.openai.APIStatusError as refused:
                status, body, tried, self.answered = refused.status_code, refused.response.text, True, True
            except self.openai.APIConnectionError as broken:    # timeouts too; the client has tried again
                words = self.hide(f"{broken} {broken.__cause__ or ''}")
                if type(broken.__cause__).__name__ == "ConnectError" and not self.answered:
                    raise SystemExit(f"no server answers at --endpoint {self.place}: {words}") from None
                return None, 0, words
            except (self.openai.APIError, ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
                status, body = 0, f"no chat completion came back: {body or error}"
            words = self.hide(f"{status or ''} {body}")
            if status in (401, 403, 404):
                right = status != 404 or self.place.rstrip("/").endswith("/v1")
                raise SystemExit(f"the server refuses model {self.model!r} or this request: {words}" + (
                    "" if right else f" (most servers' address ends in /v1, but --endpoint is {self.place})"))
            if tried or 400 <= status < 500 and status not in (408, 409, 429):
                break
        return None, 0, words

    @staticmethod
    def refusal(answer):
        """The status in an error that a server or a proxy wraps in a 200, 0 if it names none; None without an error."""
        if not (error := answer.get("error") or answer["choices"][0].get("error")):
            return None
        code = str(error.get("code")) if isinstance(error, dict) else ""
        return int(code) if code.isdigit() else 0

    @staticmethod
    def read(answer):
        """A chat completion, as JSON -> its text with the reasoning in <think> tags, and the tokens it took.

        Servers with a reasoning parser put the reasoning into a field of its own, or into parts of the content; the
        others leave its tags in.
        """
        choice = answer["choices"][0]
        message, cut = choice["message"], choice.get("finish_reason") == "length"
        parts = message.get("content")
        parts = parts if isinstance(parts, list) else [parts or ""]
        thoughts = [part for part in parts if isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")]
        content = joined([part for part in parts if part not in thoughts])
        reasoning = joined(message.get("reasoning_content") or message.get("reasoning") or thoughts)
        if reasoning:
            content = f"<think>{reasoning}" + (f"</think>{content}" if content or not cut else "")
        elif content.lstrip().startswith("<think>"):
            content = content.lstrip()
        elif content and cut and "</think>" not in content:
            content = "<think>" + content                       # cut off: whatever it was, it had not ended
        elif "</think>" in content and "<think>" not in content:        # the chat template had opened it
            content = "<think>" + content
        tokens = (answer.get("usage") or {}).get("completion_tokens")
        return sendable(content), tokens if isinstance(tokens, int) else 0

    def stream(self, prompts, max_new_tokens, seed, known=()):
        todo, done, stopped = queue.SimpleQueue(), queue.SimpleQueue(), threading.Event()
        wanted = [i for i in range(len(prompts)) if i not in known]

        def work():
            while not stopped.is_set():
                try:
                    i = todo.get_nowait()
                    seed_here = random.Random(f"{seed} {i}").getrandbits(31)
                    done.put((i, *self.ask(prompts[i], max_new_tokens, seed_here)))
                except queue.Empty:
                    return
                except BaseException as error:
                    stopped.set()
                    done.put(error)

        for i in wanted:
            todo.put(i)
        for _ in range(min(self.concurrency, len(wanted))):     # daemons: whoever stops does not wait for them, and a
            threading.Thread(target=work, daemon=True).start()  # request may take half an hour
        try:
            for _ in wanted:
                answer = done.get()
                if isinstance(answer, BaseException):
                    raise answer
                yield answer
        finally:
            stopped.set()


# ---- a run: its bar, its trace, and going on after a kill -----------------------------------------------------------


class Run:
    """markovian_rsa's generate for one budget: a source with a bar, and a memory.

    trace: a file that takes every finished rollout at once, a JSON line each: run, problem, round, index, prompt, text,
    tail, answer, tokens (or error).  Rollouts the trace already has, to the same prompt, are not asked for again.
    """

    def __init__(self, source, name, budget, tokenizer, problems, trace=None, known=()):
        self.source, self.name, self.budget, self.tokenizer, self.trace = source, name, budget, tokenizer, trace
        self.known = {(row["round"], row["problem"], row["index"], row["prompt"]): row for row in known
                      if row["run"] == name and row.get("text") is not None}
        self.round, self.tokens, self.failed = 0, [], []
        self.total = problems * budget.population * (budget.rounds + 1)
        self.bar = None

    def __call__(self, prompts, max_new_tokens, seed):
        from tqdm import tqdm
        self.bar = self.bar or tqdm(total=self.total, desc=self.name, unit=" rollouts", disable=None)
        texts, spent = [None] * len(prompts), 0
        places = [divmod(i, self.budget.population) for i in range(len(prompts))]
        found = [self.known.get((self.round, *place, prompt)) for place, prompt in zip(places, prompts)]
        for i, row in enumerate(found):
            if row:
                texts[i], spent = row["text"], spent + row["tokens"]
                self.bar.update()
        known = {i for i, row in enumerate(found) if row}
        with contextlib.closing(self.source.stream(prompts, max_new_tokens, seed, known)) as stream:
            for i, text, tokens, error in stream:
                problem, index = places[i]
                if text is not None:                            # some servers do not count
                    tokens = tokens or count_tokens(text, self.tokenizer)
                texts[i], spent = text, spent + tokens
                row = dict(run=self.name, problem=problem, round=self.round, index=index, prompt=prompts[i], text=text)
                if text is None:
                    row["error"] = error
                    self.failed.append(f"problem {problem}, round {self.round}, candidate {index}: {error}")
                    self.bar.write(f"failed, and left out of the subsets: {self.failed[-1]}", file=sys.stderr)
                else:
                    row |= dict(tail=cut_tail(text, self.budget.tail, self.tokenizer), answer=final_answer(text),
                                tokens=tokens)
                if self.trace is not None:
                    write_row(self.trace, row)
                self.bar.update()
        self.report(texts)
        self.tokens.append(spent)
        self.round += 1
        if self.round > self.budget.rounds:
            self.bar.close()
        return texts


    def report(self, texts):
        """Say of a round what its scores would hide: many replies without an answer, and problems without replies."""
        replies, population = [text for text in texts if text is not None], self.budget.population
        silent, notes = sum(final_answer(text) is None for text in replies), []
        if replies and silent >= len(replies) / 4:
            notes.append(f"{silent} of {len(replies)} replies name no answer and count as wrong: cut off by "
                         "--max-tokens, or not in the form that was asked for")
        for problem in range(len(texts) // population if replies else 0):
            if texts[problem * population:][:population] == [None] * population:
                notes.append(f"all candidates of problem {problem} failed and count as wrong")
        for note in notes:
            self.bar.write(f"{self.name}, round {self.round}: {note}", file=sys.stderr)


def write_row(file, row):
    """Append a JSON line to a trace, at once.  SystemExit if the disk is full."""
    try:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
    except OSError as error:
        raise SystemExit(f"--trace {file.name}: {error.strerror}") from None


def open_trace(path, settings, resume):
    """-> the file to append to, and the rows it already has.  Its first line holds the settings they were made with."""
    if path is None:
        return None, []
    # What UTF-8 cannot hold (half an emoji) is written as \ud83d, which is just how JSON spells it.
    trace, rows = open(path, "a", encoding="utf-8", errors="backslashreplace"), []
    if os.path.getsize(path):
        if not resume:
            raise SystemExit(f"--trace {path} exists: add --resume to go on with it, or name another file")
        with open(path, "rb") as file:
            lines = file.read().split(b"\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError) as error:
                raise SystemExit(f"{path}, line {number}: no JSON object ({error}): no trace of rsa.py") from None
        if not rows or rows[0].get("settings") != settings:
            old = rows[0].get("settings") if rows else None
            other = [key for key in settings if isinstance(old, dict) and old.get(key) != settings[key]]
            raise SystemExit(f"--trace {path} was made with other settings ({', '.join(other) or 'none are there'}): "
                             "name another file, or repeat the command that made it")
        for number, row in enumerate(rows[1:], 2):
            kinds = dict(run=str, problem=int, round=int, index=int, prompt=str)
            if row.get("text") is not None:
                kinds |= dict(text=str, tokens=int)
            if not all(type(row.get(name)) is kind for name, kind in kinds.items()):
                raise SystemExit(f"{path}, line {number}: not a rollout of rsa.py")
        if lines[-1]:                                           # killed while writing: that rollout was not finished
            os.truncate(path, os.path.getsize(path) - len(lines[-1]))
    if not rows:
        write_row(trace, {"settings": settings})
    return trace, rows[1:]


# ---- the command line -----------------------------------------------------------------------------------------------


def read_truth(answer):
    """A text, a finite number or a list of one of them -> str; of a worked answer (… #### 72) what counts."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    infinite = isinstance(answer, float) and not math.isfinite(answer)
    if infinite or isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError("the answer must be a text, a finite number or a list of one of them")
    text = final_answer(str(answer)) or str(answer)
    if normal_form(text) == ():
        raise ValueError("the answer is empty")
    return text


def read_problems(path):
    """A .jsonl of {"problem": text, "answer": text or number} -> list of (problem, answer), both str."""
    rows = []
    try:
        file = open(path, "rb")
    except OSError as error:
        raise SystemExit(f"--problems {path}: {error.strerror}") from None
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if not isinstance(row["problem"], str) or not row["problem"].strip():
                    raise ValueError("the problem must be a text")
                rows.append((row["problem"], read_truth(row["answer"])))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                why = f"{error}" if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
                raise SystemExit(f'{path}, line {number}: not {{"problem": …, "answer": …}} ({why})') from None
    if not rows:
        raise SystemExit(f"{path} holds no problems")
    return rows


def rates(results, answers, t):
    """Each problem's share of right candidates in round t; one that failed is not right."""
    return [sum(same(final_answer(c.text), answer) for c in result.rounds[t]) / len(result.rounds[t])
            for result, answer in zip(results, answers)]


def voted(results, answers, t):
    """Whether each problem's majority in round t is right, 1.0 or 0.0."""
    return [float(same(majority([final_answer(c.text) for c in result.rounds[t]])[0], answer))
            for result, answer in zip(results, answers)]


def score_table(runs, answers):
    """Markdown: one row a budget.  runs: list of (Run, results)."""
    lines = ["| budget | single | majority of round 0 | Markovian RSA | its majority | tokens a problem | "
             "longest prompt | failed |",
             "|---" * 8 + "|"]
    for run, results in runs:
        scores = [rates(results, answers, 0), voted(results, answers, 0), rates(results, answers, -1),
                  voted(results, answers, -1)]
        cells = ["{:.3f} [{:.3f}, {:.3f}]".format(sum(s) / len(s), *interval(s)) for s in scores]
        lines.append(f"| {run.name}: {run.budget} | {' | '.join(cells)} | {sum(run.tokens) / len(results):,.0f} | "
                     f"{max(result.longest_prompt for result in results):,} | {len(run.failed)} |")
    return "\n".join(lines)


def show_rounds(run, result):
    """One problem: how its candidates' answers change from round to round, and the majority."""
    for t, candidates in enumerate(result.rounds):
        answers = [final_answer(c.text) for c in candidates]
        votes = collections.Counter("no answer" if a is None else a[:40] for a in answers).most_common(6)
        print(f"round {t}: {run.tokens[t]:,} tokens | " + ", ".join(f"{answer} x{count}" for answer, count in votes))
    answer, votes = majority([final_answer(c.text) for c in result.candidates])
    print(f"majority of the last round: {answer} ({votes} of {len(result.candidates)})" if votes else
          "no candidate of the last round names an answer")


def draw_run(path, runs, answers=None):
    """PNG: what the rounds answer (one problem: shares of its answers; several: accuracy), and what they cost."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for run, results in runs:
        rounds = range(run.budget.rounds + 1)
        if answers:
            scores = [rates(results, answers, t) for t in rounds]
            means = [sum(s) / len(s) for s in scores]
            bounds = [interval(s) for s in scores]
            left.errorbar(rounds, means, [[m - low for m, (low, _) in zip(means, bounds)],
                                          [high - m for m, (_, high) in zip(means, bounds)]], marker="o", capsize=3,
                          label=run.name)
        right.plot(rounds, [tokens / len(results) for tokens in run.tokens], marker="o", label=run.name)
    if not answers:
        run, results = runs[0]
        given = [[final_answer(c.text) or "no answer" for c in candidates] for candidates in results[0].rounds]
        common = [answer for answer, _ in collections.Counter(sum(given, [])).most_common(6)]
        below = [0.0] * len(given)
        for name in [*common, "others"]:
            share = [sum(a == name or (name == "others" and a not in common) for a in row) / len(row) for row in given]
            if any(share):
                left.bar(range(len(given)), share, bottom=below, width=0.7, label=name[:24].replace("$", r"\$"),
                         color="lightgray" if name in ("others", "no answer") else None)
            below = [a + b for a, b in zip(below, share)]
    left.set(title="right candidates, 95 % interval" if answers else f"answers of the population, {runs[0][0].name}",
             ylabel="share of the candidates", ylim=(0, 1.02))
    most = max(tokens / len(results) for run, results in runs for tokens in run.tokens)
    right.set(title="tokens generated", ylabel="tokens a problem", ylim=(0, 1.1 * most + 1))
    for axis in (left, right):
        axis.set(xlabel="round (0: no aggregation yet)", xticks=range(max(run.budget.rounds for run, _ in runs) + 1))
        axis.grid(alpha=0.3)
    left.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    if len(runs) > 1:
        right.legend(fontsize=8)
    figure.savefig(path + ".tmp.png", dpi=130)
    os.replace(path + ".tmp.png", path)
    plt.close(figure)


FIELDS = ("max_tokens", "seed", "temperature", "top_p")         # of a request, which some servers call otherwise


def request_names(text):
    """max_tokens=max_completion_tokens,seed= -> each field's name in a request, "" to leave it out."""
    names = dict(zip(FIELDS, FIELDS))
    for pair in text.split(","):
        name, equals, other = pair.partition("=")
        names[name] = ""
        if not equals or name not in FIELDS or other and other in ("model", "messages", *names.values()):
            raise argparse.ArgumentTypeError(f"{pair!r} is not NAME=OTHER or NAME= with a NAME of {', '.join(FIELDS)}, "
                                             "or OTHER is in use")
        names[name] = other
    return names


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="python rsa.py", allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("problem", nargs="?", help="the problem to solve")
    add("--problems", metavar="FILE", help="a .jsonl of problem and answer: solve and score them all; with "
        "the package math-verify installed, it compares LaTeX answers that are no plain numbers")
    add("--checkpoint", metavar="FOLDER", help="a folder in the official layout, such as out/tiny/final or ZAYA1-8B")
    add("--quantize", choices=["int8"], help="checkpoint: round its weights to 8 bits while loading; "
        "`python kernels.py --quantize FOLDER TARGET` does it once and for all")
    add("--endpoint", metavar="URL", help="a chat-completions server, such as http://localhost:8000/v1")
    add("--model", metavar="NAME", help="the served model's name")
    add("--budget", metavar="NAMES", help=f"one or several of {', '.join(BUDGETS)} (default: tiny for a checkpoint of "
        "ours, else default)")
    for name, what in (("population", "N: candidates a round"), ("subset", "C: tails in a prompt"),
                       ("rounds", "T: rounds of aggregation"), ("max-tokens", "beta: most tokens of a rollout"),
                       ("tail", "tau: tokens of reasoning carried on")):
        add("--" + name, type=int, metavar="N", help=f"{what}; instead of the budget's")
    add("--prompt", choices=PROMPTS, help="aggregation prompt (default: terse for a checkpoint of ours, else report)")
    add("--tokenizer", metavar="NAME", help="endpoint: cut and count tails with this Hugging Face tokenizer, a folder "
        "or a hub name; without it words are counted")
    add("--seed", type=int, default=0, metavar="N", help="(default 0)")
    add("--temperature", type=float, default=1.0, metavar="X", help="(default 1)")
    add("--top-p", type=float, metavar="X", help="(default: 0.95 for an official folder and for a served model with "
        "ZAYA1-8B in its name, as its card asks, else 1)")
    add("--concurrency", type=int, default=16, metavar="N", help="requests at once (default 16)")
    add("--timeout", type=float, default=1800.0, metavar="SECONDS", help="of one request (default 1800)")
    add("--retries", type=int, default=5, metavar="N", help="tries after a failed request (default 5)")
    add("--request", type=request_names, metavar="NAMES", help="endpoint: other names, or none to leave one out, for "
        f"{', '.join(FIELDS)}; OpenAI's reasoning models: max_tokens=max_completion_tokens,temperature=,top_p=")
    add("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the server's key "
        "(default OPENAI_API_KEY)")
    add("--trace", metavar="FILE", help="write every prompt, text, tail and answer there, a JSON line each")
    add("--resume", action="store_true", help="go on with an existing --trace: nothing finished is asked again, "
        "but for what depends on a rollout that had failed")
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
    for name, least, most in (("concurrency", 1, 4096), ("retries", 0, 100), ("timeout", 0.001, 1e6),
                              ("temperature", 0, 100), ("top_p", 1e-6, 1)):
        if (value := getattr(given, name)) is not None and not least <= value <= most:      # nan, too
            parser.error(f"--{name.replace('_', '-')} must be at least {least} and at most {most:g}, not {value}")
    return given


def budgets_asked(given):
    """{name: Budget}, with the command line's numbers in place of the presets'."""
    asked = {}
    for name in (given.budget or ("tiny" if given.checkpoint and is_ours(given.checkpoint) else "default")).split(","):
        if name not in BUDGETS:
            raise SystemExit(f"--budget {name}: there are {', '.join(BUDGETS)}")
        preset = BUDGETS[name]
        number = {key: preset_value if value is None else value for key, preset_value, value in (
            ("population", preset.population, given.population), ("rounds", preset.rounds, given.rounds),
            ("budget", preset.budget, given.max_tokens))}
        # What was not asked for follows what was: a smaller population or budget takes subset and tail along.
        number["subset"] = min(preset.subset, number["population"]) if given.subset is None else given.subset
        number["tail"] = min(preset.tail, number["budget"]) if given.tail is None else given.tail
        if not (1 <= number["subset"] <= number["population"] and number["rounds"] >= 0
                and 0 <= number["tail"] <= number["budget"] and number["budget"] >= 1):
            raise SystemExit(f"{Budget(**number)} makes no sense: 1 <= C <= N, T >= 0 and 0 <= tau <= beta")
        asked[name] = Budget(**number)
    return asked


def load_tokenizer(name):
    """A Hugging Face tokenizer with the two methods that tails need; None: words."""
    if name is None:
        return None
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise SystemExit("--tokenizer needs transformers: pip install transformers") from None
    try:
        loaded = AutoTokenizer.from_pretrained(name)
    except Exception as error:                                  # a damaged file has no exception of its own
        raise SystemExit(f"--tokenizer {name}: {sentence(error)}") from None
    return SimpleNamespace(encode=lambda text: loaded.encode(text, add_special_tokens=False), decode=loaded.decode)


def sentence(error):
    """An exception in one line: what went wrong, and with which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    name = "" if isinstance(error, (OSError, ValueError, ImportError)) else type(error).__name__
    return " ".join(f"{name} {error}".split())[:500] or type(error).__name__


def main(arguments=None):
    """The command line.  What a file or the disk refuses, and Ctrl-C, end it in one sentence."""
    if hasattr(sys.stdout, "reconfigure"):                      # a code page that lacks a character must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        run_command(parse_arguments(arguments))
        sys.stdout.flush()
    except OSError as error:
        raise SystemExit(sentence(error)) from None
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; with --trace FILE, the same command and --resume goes on from there") from None


def run_command(given):
    if given.picture and os.path.exists(given.picture) and not os.path.isfile(given.picture):
        raise SystemExit(f"--picture {given.picture}: that is no file to draw into")
    if given.picture and not os.path.isdir(os.path.dirname(given.picture) or "."):
        raise SystemExit(f"--picture {given.picture}: there is no such folder")
    budgets = budgets_asked(given)
    rows = read_problems(given.problems) if given.problems else [(given.problem, None)]
    problems, answers = [sendable(q) for q, _ in rows], [a for _, a in rows] if given.problems else None
    official = not is_ours(given.checkpoint) if given.checkpoint else "zaya1-8b" in given.model.lower()
    top_p = given.top_p or (0.95 if official else 1.0)
    if given.checkpoint:
        try:
            source = Checkpoint.from_pretrained(given.checkpoint, given.quantize == "int8")
        except Exception as error:                              # a damaged file has no exception of its own
            raise SystemExit(f"--checkpoint {given.checkpoint}: {sentence(error)}") from None
        source.temperature, source.top_p, tokenizer = given.temperature, top_p, source.tokenizer
        place = f"{given.checkpoint} {given.quantize or ''}".strip()
    else:
        source = Endpoint(given.endpoint, given.model, given.key_variable, given.concurrency, given.timeout,
                          given.retries, given.temperature, top_p, given.request)
        place, tokenizer = f"{given.model} at {source.place}", load_tokenizer(given.tokenizer)
        if tokenizer is None:
            print("tails and prompts are counted in words; --tokenizer NAME counts tokens")
    style = given.prompt or ("terse" if given.checkpoint and not official else "report")
    settings = dict(source=place, budgets={name: str(budget) for name, budget in budgets.items()}, prompt=style,
                    seed=given.seed, temperature=given.temperature, top_p=top_p, request=given.request,
                    tokenizer=given.tokenizer, problems=problems)
    trace, known = open_trace(given.trace, settings, given.resume)
    unit, runs = "tokens" if tokenizer else "words", []
    for name, budget in budgets.items():
        run = Run(source, name, budget, tokenizer, len(problems), trace, known)
        print(f"{name}: {budget}, {len(problems)} problem{'s' * (len(problems) > 1)}: {run.total:,} rollouts, at most "
              f"{run.total * budget.budget:,} tokens; prompts of at most the problem and "
              f"{budget.subset * budget.tail:,} {unit} of tails; temperature {given.temperature:g}, top-p {top_p:g}")
        begun = time.perf_counter()
        try:
            results = markovian_rsa(problems, run, budget.population, budget.subset, budget.rounds, budget.budget,
                                    budget.tail, given.seed, tokenizer, PROMPTS[style])
        except RuntimeError as error:
            if not run.failed:
                raise
            raise SystemExit(f"{name}: {error}; the last one: {run.failed[-1]}"
                             + (f". Go on with --trace {given.trace} --resume" if given.trace else "")) from None
        runs.append((run, results))
        print(f"{name}: {sum(run.tokens):,} tokens generated, longest prompt "
              f"{max(r.longest_prompt for r in results):,} {unit}, {len(run.failed)} failed, "
              f"{sum(r.empty_tails for r in results)} without a tail, "
              f"{time.perf_counter() - begun:.0f} s")
        if not answers:
            show_rounds(run, results[0])
    if answers:
        print(score_table(runs, answers))
    if given.picture:
        draw_run(given.picture, runs, answers)
        print(f"drawn: {given.picture}")


if __name__ == "__main__":
    main()
