"""Markovian RSA: parallel traces, of which only bounded tails are carried from round to round.

    python rsa.py --checkpoint out/tiny/final "find 06b,85c"
    python rsa.py --endpoint http://localhost:8000/v1 --model Zyphra/ZAYA1-8B --problems aime.jsonl --trace aime.trace

    population -> tails of tau tokens -> C of them in a prompt -> a new candidate

TR section V (the ZAYA1-8B report), after Recursive Self-Aggregation (arXiv 2509.26626) and the Markovian Thinker
(2510.06557).  Training makes its aggregation prompts with these very functions: a model sees at test time what it was
taught to read.  Any function generate(prompts, max_new_tokens, seed) can write the text.  Two are here: Checkpoint, a
folder of weights, and Endpoint, a server that speaks the chat-completions protocol.
"""
import argparse
import collections
import contextlib
import functools
import http.client
import itertools
import json
import os
import random
import re
import statistics
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from multiprocessing.pool import ThreadPool

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
    """The report's order: the problem, the candidates, and the request for one improved solution.  Without candidates
    it asks for the answer in the same form, so that the rounds can be compared."""
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

    @property
    def candidates(self):
        """The last round's, whose mean correctness is what the report reports: no vote, no verifier."""
        return self.rounds[-1] if self.rounds else []


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
            tails = [c.tail for c in result.candidates if c.tail and c.tail.strip()]
            for _ in range(population):
                prompts.append(build_prompt(q, rng.sample(tails, min(subset, len(tails)))))
        # One call asks for the whole round of all problems, so that a source can batch as it likes.
        texts = generate(prompts, budget, random.Random(f"{seed} round {t}").getrandbits(31))
        if len(texts) != len(prompts):
            raise ValueError(f"generate returned {len(texts)} texts for {len(prompts)} prompts")
        if prompts and texts.count(None) == len(texts):
            raise RuntimeError(f"all {len(prompts)} candidates of a round failed: nothing to aggregate")
        for q, result in enumerate(results):
            candidates = []
            for i in range(q * population, (q + 1) * population):
                kept = None if texts[i] is None else cut_tail(texts[i], tail, tokenizer)
                candidates.append(Candidate(prompts[i], texts[i], kept))
                result.generated_tokens += count_tokens(texts[i] or "", tokenizer)
                result.longest_prompt = max(result.longest_prompt, count_tokens(prompts[i], tokenizer))
            result.rounds.append(candidates)
    return results[0] if isinstance(problem, str) else results


# ---- answers --------------------------------------------------------------------------------------------------------


def last_boxed(text):
    r"""What the last complete \boxed{…} (or \fbox{…}) holds, with its braces balanced; None without one."""
    # One pass with a stack of open braces: a looping model may write \boxed{ a thousand times.  \{ and \} are printed
    # characters and group nothing.
    opened, last = [], None
    for match in re.finditer(r"\\(?:boxed|fbox)\s*\{|(?<!\\)\\[{}]|[{}]", text):
        if match[0] == "}" and opened:
            start = opened.pop()
            if start[0] != "{" and (last is None or start.end() > last[0]):
                last = start.end(), match.start()
        elif match[0].endswith("{") and match[0] != r"\{":
            opened.append(match)
    return text[slice(*last)] if last else None


def final_answer(text):
    r"""A reply's answer: its last \boxed{…}, else <answer>…</answer>, else what follows #### in the last line, else the
    one short line after its reasoning or below a last heading `#### Answer`.  None if the reasoning has not ended, or
    the reply names no answer.

    >>> final_answer("<think>7*6</think>It is \\boxed{42}."), final_answer("<think>7+5=12, so")
    ('42', None)
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


# LaTeX has several spellings for one thing.  These rules leave one of them, in this order.
SPELLINGS = [
    ("[−–]", "-"),                                              # Unicode's minus and dash
    ("×", r"\\times "),
    (r"°|\\degree", r"^\\circ "),
    (r"\\[dtc]frac", r"\\frac"),
    (r"[$~]|\\[$,!;: ()\[\]]", " "),                            # dollars, and spaces of every width
    (r"\\(left|right|big|displaystyle|q?quad)(?![a-zA-Z])", " "),
    (r"(?<![\^_])\\(?:text|mbox|math(?=rm|bf|it))[a-z]*\s*\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}", r" \1 "),
    (r"\\(frac|sqrt)\s*([0-9])", r"\\\1 \2 "),                  # \frac12 is \frac 1 2, \sqrt23 is \sqrt 2 times 3
    (r"(\\frac\s*([0-9] |\{[^{}]*\}))\s*([0-9])", r"\1 \3 "),
    (r"\^\s*([0-9]{2,})", r"^{\1}"),                            # 2^10 means 2^{10}
    (r"\{\s*(\w|\\[a-zA-Z]+)\s*\}", r" \1 ")]                   # a group of one item loses its braces
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\.?[0-9]+(?:\.[0-9]+)*(?:[eE][+-]?[0-9]+(?!\w))?|[^\W\d_]+|\S", re.DOTALL)
MARK = re.compile(r" ?(?<!\S)([,;=<>()\[\]]|\\[{}])(?!\S) ?")
# Exponents are bounded: no model's 1e999999999 may fill the memory.
N = r"(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:e[-+]?[0-9]{1,3})?"
NUMBER = re.compile(rf"([-+] )?(?:([0-9]+) )?({N})(?: / ({N}))?(?: (?:\\times|\\cdot|\*) 10 \^ ((?:- )?[0-9]{{1,3}}))?"
                    r"(?: \\?%| \^ \\circ)?")


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
    >>> normal_form(r"\left(1, \tfrac12\right)")
    ('(', Fraction(1, 1), ',', Fraction(1, 2), ')')
    """
    if len(answer) > 1000:                                      # no answer but a loop: word for word, and cheap
        return tuple(answer.split())
    comma = "" if re.search(r"(?<!\\)[(\[]|\\\{", answer) else "|,"
    thousands = rf"(?<![0-9.,])[1-9][0-9]{{0,2}}(?:(?:\{{,\}}|,\\!|\\,{comma})[0-9]{{3}})+(?!,?[0-9])"
    text = re.sub(thousands, lambda match: re.sub("[^0-9]", "", match[0]), answer)
    for pattern, plain in SPELLINGS:
        text = re.sub(pattern, plain, text)
    text = " ".join(TOKEN.findall(text))
    text = re.sub(r"(?<!\\)\b\w+", lambda word: word[0].lower(), text)              # \Delta is not \delta
    text = re.sub(r"(^|(?<!\.) )\.$", "", text)                 # the full stop of a sentence
    # Marks stand alone, at the odd places; what is between two of them is one part, which may be a number.  Beside a
    # bracket it may be a factor: (x)+2 is not (x) times 2.
    parts = ["", *MARK.split(text), ""]
    form = []
    for before, part, after in zip(parts, parts[1:], parts[2:]):
        value = None if before in (")", "]", r"\}") or after in ("(", "[", r"\{") else number(part)
        if part:
            form.append(part if value is None else value)
    return form[0] if len(form) == 1 else tuple(form)


@functools.lru_cache(4096)
def same(answer, truth):
    """Whether two answers have one normal form, or are LaTeX that math-verify (pip install math-verify) finds equal, to
    12 decimals and both ways round."""
    if answer is None or truth is None:
        return False
    a, b = normal_form(answer), normal_form(truth)
    if a == b or len(answer) + len(truth) > 400 or not re.search(r"[\\^]", f"{a} {b}"):
        return a == b
    # math-verify takes words for products of letters, and 2\frac{1}{3} for one.
    if re.search(r"\\(text|math|mbox|operator)|[0-9}]\s*\\[dtc]?frac|[0-9](\s|\\.)+[0-9]", f"{answer}|{truth}"):
        return False
    try:
        from math_verify import LatexExtractionConfig, parse, verify
        config = [LatexExtractionConfig(boxed_match_priority=-1)]
        a = parse(f"${answer}$", config, "no_fallback", parsing_timeout=2)
        b = parse(f"${truth}$", config, "no_fallback", parsing_timeout=2)
        return verify(a, b, 12, timeout_seconds=2) and verify(b, a, 12, timeout_seconds=2)
    except Exception:                                           # no such package, no main thread; sympy raises many
        return False


def majority(answers):
    """The most frequent answer and its votes, by `same`; the first one of several.  None has no vote."""
    votes = collections.Counter()                               # under the first spelling of each answer
    for answer in answers:
        if answer is not None:
            votes[next((first for first in votes if same(first, answer)), answer)] += 1
    return max(votes.items(), key=lambda item: item[1], default=(None, 0))


def interval(rates):
    """95 % interval of a mean over problems.  All right is no proof of 1: never narrower than one problem's worth."""
    rates = list(map(float, rates))
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
        """As markovian_rsa's generate.  progress: a bar such as tqdm, around the stream."""
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
    from torch.nn.utils.rnn import pad_sequence
    rows = list(map(torch.tensor, rows))
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence(list(map(torch.ones_like, rows)), batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def reply(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, top_p=1.0):
    """Sample the assistant's answer to each prompt in one batch: list of str -> list of str, <think> tags included."""
    import torch
    inputs, mask = left_padded([prompt_ids(tokenizer, p) for p in prompts], tokenizer.pad, model.norm.weight.device)
    out = model.generate(inputs, max_new_tokens, temperature, top_p, attention_mask=mask, eos_token_id=tokenizer.end,
                         generator=torch.Generator().manual_seed(seed))[:, inputs.shape[1]:]
    ends = {tokenizer.end} if isinstance(tokenizer.end, int) else set(tokenizer.end)
    # ZAYA1-8B's chat template itself opens the reasoning: the tag then stands in the prompt and not in the reply.
    asked = tokenizer.decode(inputs[0, -4:].tolist())
    opened = "<think>" if asked.rstrip().endswith("<think>") else ""
    texts = []
    for row in out.tolist():
        kept = itertools.takewhile(lambda token: token not in ends, row)
        texts.append(opened + tokenizer.decode(kept))
    return texts


def is_ours(folder):
    """Whether a folder's tokenizer has zaya.Tokenizer's special tokens; also if there is none to read."""
    from zaya import Tokenizer
    path = os.path.join(folder, "tokenizer.json")
    if not os.path.isfile(path):
        return True                                             # its own words say what is missing
    with open(path, encoding="utf-8", errors="replace") as file:
        text = file.read()
    return all(f'"{token}"' in text for token in Tokenizer.SPECIAL)


class ChatTokenizer:
    """transformers.AutoTokenizer behind those methods of zaya.Tokenizer that this file uses.  As there, a special token
    that is spelled out in a problem becomes that token.  name: an official folder such as ZAYA1-8B's, or a hub name."""

    def __init__(self, name):
        from transformers import AutoTokenizer
        self.inner, ends = AutoTokenizer.from_pretrained(name), None
        for file in ("generation_config.json", "config.json"):  # a hub name has none here: it is for counting alone
            path = os.path.join(name, file)
            if ends is None and os.path.exists(path):
                with open(path, encoding="utf-8") as config:
                    ends = json.load(config).get("eos_token_id")
        self.end = ends if isinstance(ends, list) else [ends] * (ends is not None)
        self.pad = self.inner.pad_token_id or 0

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
    together, as few as keep the keys and values below `cache_bytes`; equal prompts are prefilled once."""

    def __init__(self, model, tokenizer, temperature=1.0, rows=256, cache_bytes=2**31, top_p=1.0):
        self.model, self.tokenizer, self.rows = model.eval(), tokenizer, rows
        self.temperature, self.top_p, self.cache_bytes = temperature, top_p, cache_bytes

    @classmethod
    def from_pretrained(cls, folder, **options):
        import torch
        from kernels import load
        from zaya import Tokenizer
        tokenizer = Tokenizer.from_pretrained(folder) if is_ours(folder) else ChatTokenizer(folder)
        prompt_ids(tokenizer, "?")                              # ValueError now rather than later without a template
        return cls(load(folder, device="cuda" if torch.cuda.is_available() else "cpu"), tokenizer, **options)

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
        for start in range(0, len(order), rows):
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
    content = message.get("content") or ""
    parts = content if isinstance(content, list) else [content]
    thoughts = [part for part in parts if isinstance(part, dict) and part.get("type") in ("thinking", "reasoning")]
    reasoning = joined(message.get("reasoning_content") or message.get("reasoning") or thoughts)
    text = joined([part for part in parts if part not in thoughts]).lstrip()
    if reasoning:
        text = f"<think>{reasoning}</think>{text}" if text or not cut else f"<think>{reasoning}"
    elif not text.startswith("<think>") and ("</think>" in text or (text and cut)):
        text = "<think>" + text                                 # the chat template had opened it; cut, it had not ended
    tokens = (answer.get("usage") or {}).get("completion_tokens")
    return sendable(text), tokens if isinstance(tokens, int) else 0


class Endpoint(Source):
    """A server that speaks OpenAI's chat-completions protocol: vLLM, SGLang, transformers serve, a hosted model.

    Up to `concurrency` requests at once.  What may pass (408, 409, 429, 5xx, timeouts, dropped connections, answers
    that are no chat completion) is asked for again up to `retries` times, with back-off.  A rollout that still fails,
    or whose request the server refuses (a prompt too long), is reported in the server's words, not replaced.  A wrong
    key, model or address (401, 403, 404, or no server there) ends the stream with ConnectionError.  `request`: other
    names for the fields max_tokens, seed, temperature and top_p; "" leaves one out.  The key is never printed.
    """
    back_off = 0.5                                              # seconds before the second try; doubles from there

    def __init__(self, url, model, key_variable="OPENAI_API_KEY", concurrency=16, timeout=1800.0, retries=5,
                 temperature=1.0, top_p=1.0, request=None):
        self.url = url.rstrip("/")
        self.model, self.concurrency = model, concurrency
        self.timeout, self.retries, self.answered = timeout, retries, False
        self.sampling, self.names = dict(temperature=temperature, top_p=top_p), request or {}
        self.key = os.environ.get(key_variable, "").strip() or "none"

    def post(self, body):
        """One request: a dict -> status, the answer's text, and the seconds after which to come back."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}", "User-Agent": "rsa.py"}
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        try:
            response = urllib.request.urlopen(request, timeout=self.timeout)
        except urllib.error.HTTPError as refused:
            response = refused                                  # it has a body, too
        with response:
            self.answered, later = True, response.headers.get("Retry-After", "")
            later = float(later) if re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", later) else 0.0
            return response.status, response.read().decode("utf-8", "replace"), later

    def ask(self, prompt, max_new_tokens, seed, stopped=None):
        """-> text, tokens, None; or None, 0, what went wrong in the server's words.  stopped: an Event that ends it."""
        body = {"model": self.model, "messages": [{"role": "user", "content": sendable(prompt)}]}
        for name, value in dict(max_tokens=max_new_tokens, seed=seed, **self.sampling).items():
            body[self.names.get(name, name)] = value
        body.pop("", None)
        stopped, wait = stopped or threading.Event(), 0.0
        status, words, unreachable = 0, "stopped", False
        for attempt in range(self.retries + 1):
            if stopped.wait(wait):
                break
            # Back-off with jitter, so that clients refused together do not come back together.
            wait = min(8.0, self.back_off * 2.0 ** attempt) * random.uniform(0.5, 1.0)
            status, said, unreachable = 0, "", False
            try:
                status, said, later = self.post(body)
                wait = max(wait, later)
                if status < 300:
                    status, answer = 0, json.loads(said)
                    error = answer.get("error") or answer["choices"][0].get("error")
                    if not error:
                        return *read_completion(answer), None
                    status = int(error["code"])                 # a proxy wraps what it was told in a 200
            except (OSError, http.client.HTTPException) as error:                   # timeouts, too
                said, unreachable = repr(error), isinstance(error, urllib.error.URLError) and not self.answered
            except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
                said = f"no chat completion came back: {said or error}"
            words = f"{status or ''} {said}"
            if self.key != "none":
                words = words.replace(self.key, "***")
            words = " ".join(words.split())[:500]
            if 400 <= status < 500 and status not in (408, 409, 429):
                break
        fatal = None
        if status in (401, 403, 404):
            hint = ""
            if status == 404 and not self.url.endswith("/v1"):
                hint = f" (most servers' address ends in /v1, but --endpoint is {self.url})"
            fatal = f"the server refuses model {self.model!r} or this request{hint}: {words}"
        if unreachable:
            fatal = f"no server answers at --endpoint {self.url}: {words}"
        if fatal:
            stopped.set()                                       # nobody else need ask
            raise ConnectionError(fatal)
        return None, 0, words

    def stream(self, prompts, max_new_tokens, seed, known=()):
        stopped = threading.Event()

        def ask(i):
            return i, *self.ask(prompts[i], max_new_tokens, random.Random(f"{seed} {i}").getrandbits(31), stopped)

        # Ctrl-C and a refusal end here too, with requests under way: nothing waits for this pool's threads, not even
        # the interpreter's exit, as it would for those of concurrent.futures.
        with ThreadPool(self.concurrency) as pool:
            try:
                yield from pool.imap_unordered(ask, [i for i in range(len(prompts)) if i not in known])
            finally:
                stopped.set()


# ---- a run: its bar, its trace, and going on after a kill -----------------------------------------------------------

GO_ON = "Stopped; with --trace FILE, the same command and --resume goes on from there"


@contextlib.contextmanager
def explained(what, kinds=OSError):
    """The guard of what users bring: errors of these kinds end the program in one sentence that begins with `what`."""
    try:
        yield
    except kinds as error:
        reason = error if isinstance(error, (OSError, ValueError, ImportError)) else repr(error)
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}"
        raise SystemExit(" ".join(f"{what}: {reason}".split())[:700]) from None


class Run:
    """markovian_rsa's generate for one budget: a source with a bar, and a memory.  trace: a file that takes every
    rollout, a JSON line each.  known, of `open_trace`: rollouts to the same prompt that are not asked for again."""

    def __init__(self, source, name, budget, tokenizer, trace=None, known=None):
        self.source, self.name, self.budget, self.tokenizer = source, name, budget, tokenizer
        self.trace, self.known = trace, known or {}
        self.tokens, self.failed = [], []                       # spent in each round; a sentence for each failure

    def __call__(self, prompts, max_new_tokens, seed):
        from tqdm import tqdm
        say = functools.partial(tqdm.write, file=sys.stderr)
        t, rows, texts, known = len(self.tokens), [], [None] * len(prompts), set()
        self.tokens.append(0)
        for i, prompt in enumerate(prompts):
            problem, index = divmod(i, self.budget.population)
            rows.append(dict(run=self.name, problem=problem, round=t, index=index, prompt=prompt))
            if (t, problem, index, prompt) in self.known:
                texts[i], tokens = self.known[t, problem, index, prompt]
                self.tokens[t] += tokens
                known.add(i)
        bar = tqdm(total=len(rows), initial=len(known), desc=f"{self.name}, round {t}", unit=" rollouts", disable=None)
        with bar, contextlib.closing(self.source.stream(prompts, max_new_tokens, seed, known)) as stream:
            for i, text, tokens, error in stream:
                row, texts[i] = rows[i] | dict(text=text), text
                if text is None:
                    row["error"] = error
                    self.failed.append(f"problem {row['problem']}, round {t}, candidate {row['index']}: {error}")
                    say(f"failed, and left out of the subsets: {self.failed[-1]}")
                else:
                    row["tail"] = cut_tail(text, self.budget.tail, self.tokenizer)
                    row["answer"] = final_answer(text)
                    row["tokens"] = tokens or count_tokens(text, self.tokenizer)    # some servers do not count
                    self.tokens[t] += row["tokens"]
                if self.trace:
                    write_row(self.trace, row)                  # at once: a kill loses only what was under way
                bar.update()
        replies = len(texts) - texts.count(None)
        if not replies:
            raise SystemExit(f"all {len(texts)} candidates of a round failed, the last one: {self.failed[-1]}. {GO_ON}")
        # Say of a round what its scores would hide: that many of its replies name no answer.
        silent = list(map(final_answer, texts)).count(None) - texts.count(None)
        if silent >= replies / 4:
            say(f"{self.name}, round {t}: {silent} of {replies} replies name no answer and count as wrong: cut off by "
                "--max-tokens, or not in the form that was asked for")
        return texts


def write_row(file, row):
    """Append a JSON line to a trace, at once."""
    with explained(f"--trace {file.name}"):
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()


def open_trace(path, settings, resume):
    """-> the file to append to, and the rollouts it has, {(round, problem, index, prompt): (text, tokens)}.  Its first
    line holds the settings they were made with."""
    if path is None:
        return None, {}
    # What UTF-8 cannot hold (half an emoji) is written as \ud83d, which is just how JSON spells it.
    trace = open(path, "a", encoding="utf-8", errors="backslashreplace")
    if os.path.getsize(path) == 0:
        write_row(trace, {"settings": settings})
        return trace, {}
    if not resume:
        raise SystemExit(f"--trace {path} exists: add --resume to go on with it, or name another file")
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    known = {}
    for number, line in enumerate(lines[:-1] or lines, 1):
        with explained(f"{path}, line {number}: not a rollout of rsa.py", Exception):
            row = json.loads(line)
            if number == 1:
                changed = [key for key in settings if row["settings"].get(key) != settings[key]]
                if changed:
                    raise SystemExit(f"--trace {path} was made with other settings ({', '.join(changed)})")
            elif row["text"] is not None:
                known[row["round"], row["problem"], row["index"], row["prompt"]] = row["text"], row["tokens"]
    # A line without an end was being written when the run was killed: that rollout was not finished.
    os.truncate(path, os.path.getsize(path) - len(lines[-1]))
    return trace, known


# ---- scores ---------------------------------------------------------------------------------------------------------


def score_table(run, results, answers):
    """Markdown: the share of right candidates, and of right majorities, in the first and in the last round.  A rollout
    that failed is not right."""
    cells = [f"{run.name}: {run.budget}"]
    for t in (0, -1):
        shares, votes = [], []
        for result, answer in zip(results, answers):
            found = [final_answer(c.text) for c in result.rounds[t]]
            shares.append([same(one, answer) for one in found].count(True) / len(found))
            votes.append(same(majority(found)[0], answer))
        for scores in (shares, votes):
            low, high = interval(scores)
            cells.append(f"{statistics.fmean(scores):.3f} [{low:.3f}, {high:.3f}]")
    longest = max(result.longest_prompt for result in results)
    cells += [f"{sum(run.tokens) / len(results):,.0f}", f"{longest:,}", f"{len(run.failed)}"]
    titles = ("budget | single | majority of round 0 | Markovian RSA | its majority | tokens a problem | longest prompt"
              " | failed")
    return f"| {titles} |\n{'|---' * 8}|\n| {' | '.join(cells)} |"


def show_rounds(run, result):
    """One problem: how its candidates' answers change from round to round, and the majority."""
    for t, candidates in enumerate(result.rounds):
        found = [final_answer(c.text) for c in candidates]
        counts = collections.Counter((answer or "no answer")[:40] for answer in found)
        common = ", ".join(f"{answer} x{count}" for answer, count in counts.most_common(6))
        print(f"round {t}: {run.tokens[t]:,} tokens | {common}")
    answer, votes = majority(found)
    print(f"majority of the last round: {answer or 'none names an answer'} ({votes} of {len(found)})")


# ---- the command line -----------------------------------------------------------------------------------------------


def read_problems(path):
    """A .jsonl of {"problem": text, "answer": text, number or a list of one} -> list of (problem, answer), both str."""
    rows = []
    with open(path, "rb") as file:
        lines = file.read().split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        with explained(f'{path}, line {number}: not {{"problem": …, "answer": …}}', Exception):
            row = json.loads(line)
            problem, answer = row["problem"], row["answer"]
            if isinstance(answer, list) and len(answer) == 1:
                answer = answer[0]
            truth = final_answer(str(answer)) or str(answer)    # of a worked answer (… #### 72) what counts
            if not isinstance(problem, str) or not problem.strip():
                raise ValueError("the problem must be a text")
            infinite = isinstance(answer, float) and not abs(answer) < float("inf")
            if type(answer) not in (str, int, float) or infinite or normal_form(truth) == ():
                raise ValueError("the answer must be a text, a finite number or a list of one of them")
            rows.append((sendable(problem), truth))
    if not rows:
        raise SystemExit(f"{path} holds no problems")
    return rows


def bounded(kind, least, most):
    """An argparse type: a number of this kind within these bounds."""
    def number(text):
        if not least <= kind(text) <= most:                     # nan, too
            raise argparse.ArgumentTypeError(f"must be at least {least} and at most {most:g}, not {text}")
        return kind(text)
    return number


FIELDS = {"max_tokens", "seed", "temperature", "top_p"}         # of a request, which some servers call otherwise


def request_names(text):
    """max_tokens=max_completion_tokens,seed= -> {field: its name in a request}, "" to leave it out."""
    names = dict(pair.split("=") for pair in text.split(","))
    if not names.keys() <= FIELDS:
        raise ValueError
    return names


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(prog="python rsa.py", allow_abbrev=False, description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser._negative_number_matcher = re.compile(r"-[0-9(.]")   # -3+5 is a problem and no option
    problem = parser.add_mutually_exclusive_group(required=True)
    model = parser.add_mutually_exclusive_group(required=True)
    problem.add_argument("problem", nargs="?", help="the problem to solve")
    problem.add_argument("--problems", metavar="FILE", help="a .jsonl of problem and answer: solve and score them all")
    model.add_argument("--checkpoint", metavar="FOLDER", help="in the official layout: out/tiny/final or ZAYA1-8B")
    model.add_argument("--endpoint", metavar="URL", help="a chat-completions server: http://HOST:PORT/v1")
    add = parser.add_argument
    add("--model", metavar="NAME", help="endpoint: the served model's name")
    add("--budget", choices=BUDGETS, dest="name", help="(default: tiny for a checkpoint of ours, else default)")
    add("--population", type=int, metavar="N", help="N: candidates a round; instead of the budget's")
    add("--subset", type=int, metavar="N", help="C: tails in a prompt, likewise")
    add("--rounds", type=int, metavar="N", help="T: rounds of aggregation, likewise")
    add("--max-tokens", type=int, metavar="N", dest="budget", help="beta: most tokens of a rollout, likewise")
    add("--tail", type=int, metavar="N", help="tau: tokens of reasoning carried on, likewise")
    add("--prompt", choices=PROMPTS, help="aggregation prompt (default: terse for a checkpoint of ours, else report)")
    add("--tokenizer", metavar="NAME", help="endpoint: a folder or hub name, whose tokens tails are cut by, not words")
    add("--seed", type=int, default=0, metavar="N", help="(default 0)")
    add("--temperature", type=bounded(float, 0, 100), default=1.0, metavar="X", help="(default 1)")
    add("--top-p", type=bounded(float, 1e-6, 1), metavar="X", help="(default: ZAYA1-8B's card's 0.95, for others 1)")
    add("--concurrency", type=bounded(int, 1, 4096), default=16, metavar="N", help="requests at once (default 16)")
    add("--timeout", type=bounded(float, 0.001, 1e6), default=1800.0, metavar="SECONDS", help="(default 1800)")
    add("--retries", type=bounded(int, 0, 100), default=5, metavar="N", help="tries after a failed request (default 5)")
    add("--request", type=request_names, metavar="FIELD=NAME,FIELD=,…", help="endpoint: names (or none) of a request's "
        "fields; OpenAI's reasoning models: max_tokens=max_completion_tokens,temperature=,top_p=")
    add("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="environment variable with the server's key")
    add("--trace", metavar="FILE", help="write every prompt, text, tail and answer there, a JSON line each")
    add("--resume", action="store_true", help="go on with an existing --trace: nothing finished is asked again")
    given = parser.parse_args(arguments)
    if given.endpoint and not given.model:
        parser.error("--endpoint needs --model NAME")
    if given.endpoint and not re.fullmatch(r"https?://[^/@\s]+(/\S*)?", given.endpoint):
        parser.error("--endpoint must be http://HOST:PORT/v1 or https://…, without a password, as traces hold it")
    if given.resume and not given.trace:
        parser.error("--resume goes on with a --trace FILE; name it")
    # What is not said follows from the model: whether it is one of ours, and whether it is ZAYA1-8B.
    ours = given.checkpoint is not None and is_ours(given.checkpoint)
    official = not ours if given.checkpoint else "zaya1-8b" in given.model.lower()
    given.prompt = given.prompt or ("terse" if ours else "report")
    given.top_p = given.top_p or (0.95 if official else 1.0)
    given.name = given.name or ("tiny" if ours else "default")
    return given


def asked_budget(given):
    """A Budget of the command line's numbers, and else of the preset's."""
    numbers = asdict(BUDGETS[given.name])
    for key in numbers:
        if getattr(given, key) is not None:
            numbers[key] = getattr(given, key)
    # What was not asked for follows what was: a smaller population or budget takes subset and tail along.
    if given.subset is None:
        numbers["subset"] = min(numbers["subset"], numbers["population"])
    if given.tail is None:
        numbers["tail"] = min(numbers["tail"], numbers["budget"])
    with explained(f"--budget {given.name}", ValueError):
        return Budget(**numbers)


def run_command(given):
    budget = asked_budget(given)
    problems = [sendable(given.problem or "")]
    answers = None
    if given.problems:
        problems, answers = zip(*read_problems(given.problems))
    sampling = dict(temperature=given.temperature, top_p=given.top_p)
    if given.checkpoint:
        with explained(f"--checkpoint {given.checkpoint}", Exception):              # damage has many exceptions
            source = Checkpoint.from_pretrained(given.checkpoint, **sampling)
        tokenizer = source.tokenizer
    else:
        source = Endpoint(given.endpoint, given.model, given.key_variable, given.concurrency, given.timeout,
                          given.retries, request=given.request, **sampling)
        with explained(f"--tokenizer {given.tokenizer}", Exception):
            tokenizer = ChatTokenizer(given.tokenizer) if given.tokenizer else None
    # What decides the samples: a trace made with other settings is another run's.
    settings = dict(problems=list(problems), budget=str(budget))
    for name in ("checkpoint", "endpoint", "model", "prompt", "seed", "temperature", "top_p", "request", "tokenizer"):
        settings[name] = getattr(given, name)
    run = Run(source, given.name, budget, tokenizer, *open_trace(given.trace, settings, given.resume))
    unit = "tokens" if tokenizer else "words"
    total = len(problems) * budget.population * (budget.rounds + 1)
    print(f"{run.name}: {budget}, problems: {len(problems)}, rollouts: {total:,}, of at most {total * budget.budget:,} "
          f"tokens; prompts of at most the problem and {budget.subset * budget.tail:,} {unit} of tails; temperature "
          f"{given.temperature:g}, top-p {given.top_p:g}")
    results = markovian_rsa(list(problems), run, **asdict(budget), seed=given.seed, tokenizer=tokenizer,
                            build_prompt=PROMPTS[given.prompt])
    longest = max(result.longest_prompt for result in results)
    print(f"{sum(run.tokens):,} tokens generated, longest prompt {longest:,} {unit}, {len(run.failed)} failed")
    if answers:
        print(score_table(run, results, answers))
    else:
        show_rounds(run, results[0])


def main(arguments=None):
    """The command line.  What a file, the disk or a server refuses, and Ctrl-C, end it in one sentence."""
    if hasattr(sys.stdout, "reconfigure"):                      # a code page that lacks a character must not end a run
        sys.stdout.reconfigure(errors="replace")
    try:
        with explained("stopped"):
            run_command(parse_arguments(arguments))
            sys.stdout.flush()
    except KeyboardInterrupt:
        raise SystemExit("\n" + GO_ON) from None


if __name__ == "__main__":
    main()
