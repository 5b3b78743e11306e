"""Markovian RSA: parallel traces, of which only bounded tails are carried from round to round.

    python rsa.py --checkpoint out/tiny/final "find 06b,85c"
    python rsa.py --endpoint http://localhost:8000/v1 --model Zyphra/ZAYA1-8B --problems aime.jsonl --trace aime.trace
    python rsa.py --serve 127.0.0.1:8080 --endpoint http://localhost:8000/v1 --model Zyphra/ZAYA1-8B

    population -> tails of tau tokens -> C of them in a prompt -> a new candidate

TR section V (the ZAYA1-8B report), after Recursive Self-Aggregation (arXiv 2509.26626) and the Markovian Thinker
(2510.06557).  Training makes its aggregation prompts with these very functions: a model sees at test time what it was
taught to read.  Any function generate(prompts, max_new_tokens, seed) can write the text.  Two are here: Checkpoint, a
folder of weights, and Endpoint, a server that speaks the chat-completions protocol.
"""
import argparse
import asyncio
import collections
import contextlib
import copy
import functools
import itertools
import json
import os
import random
import re
import queue
import statistics
import sys
import threading
import time
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
    others are known, so a run that goes on after a kill samples what it would have sampled.

    before: the messages that stand before each prompt, and parts: of its own message, what is no text."""
    before, parts, stopped = (), (), False

    def stop(self):
        """From any thread: end what is under way, and begin nothing more."""
        self.stopped = True

    def check(self):
        if self.stopped:
            raise ConnectionError("stopped")

    def __call__(self, prompts, max_new_tokens, seed, progress=iter):
        """As markovian_rsa's generate.  progress: a bar such as tqdm, around the stream."""
        texts = [None] * len(prompts)
        for index, text, *_ in progress(self.stream(prompts, max_new_tokens, seed)):
            texts[index] = text
        return texts


def prompt_ids(tokenizer, prompt, before=()):
    """What the model reads before it answers: the messages `before`, the user's, the opening of the assistant's."""
    return tokenizer.render([*before, {"role": "user", "content": prompt}], generation_prompt=True)[0]


def left_padded(rows, pad, device):
    """Lists of ids -> input_ids and attention_mask (B, S) int64, padded on the left as generation needs it."""
    import torch
    from torch.nn.utils.rnn import pad_sequence
    rows = list(map(torch.tensor, rows))
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence(list(map(torch.ones_like, rows)), batch_first=True, padding_side="left")
    return ids.to(device), mask.to(device)


def reply(model, tokenizer, prompts, max_new_tokens, seed, temperature=1.0, top_p=1.0, before=()):
    """Sample the assistant's answer to each prompt in one batch: list of str -> list of str, <think> tags included."""
    import torch
    rows = [prompt_ids(tokenizer, prompt, before) for prompt in prompts]
    inputs, mask = left_padded(rows, tokenizer.pad, model.norm.weight.device)
    out = model.generate(inputs, max_new_tokens, temperature, top_p, attention_mask=mask, eos_token_id=tokenizer.end,
                         generator=torch.Generator().manual_seed(seed))[:, inputs.shape[1]:]
    ends, opened, texts = end_tokens(tokenizer), opening(tokenizer, rows[0]), []
    for row in out.tolist():
        kept = itertools.takewhile(lambda token: token not in ends, row)
        texts.append(opened + tokenizer.decode(kept))
    return texts


def end_tokens(tokenizer):
    return [tokenizer.end] if isinstance(tokenizer.end, int) else tokenizer.end


def opening(tokenizer, prompt):
    """ZAYA1-8B's chat template opens the reasoning: then the tag stands in the prompt (ids) and not in the reply."""
    return "<think>" if tokenizer.decode(prompt[-4:]).rstrip().endswith("<think>") else ""


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
    """transformers.AutoTokenizer behind zaya.Tokenizer's methods.  As there, a special token that is spelled out in a
    problem becomes that token.  name: an official folder such as ZAYA1-8B's, or a hub name.

    chat: give a base model's, which has no chat template, ChatML; a reply then ends with <|im_end|>, or its own end.
    """
    CHATML = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}END\n{% endfor %}"
              "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

    def __init__(self, name, chat=False):
        from transformers import AutoConfig, AutoTokenizer
        path, options, ends = os.path.join(name, "config.json"), {}, None
        if os.path.exists(path):
            with open(path, encoding="utf-8") as config:        # transformers refuses what a legacy config.json holds
                if re.search('"(cca|zaya_layers)"', config.read()):
                    options["config"] = AutoConfig.for_model("zaya")
        self.inner = AutoTokenizer.from_pretrained(name, **options)
        for file in ("generation_config.json", "config.json"):  # a hub name has none here: it is for counting alone
            path = os.path.join(name, file)
            if ends is None and os.path.exists(path):
                with open(path, encoding="utf-8") as config:
                    ends = json.load(config).get("eos_token_id")
        self.end = ends if isinstance(ends, list) else [ends] * (ends is not None)
        self.pad = self.inner.pad_token_id or 0
        self.ranks, self.vocab_size = self.inner.get_vocab(), len(self.inner)
        self.end_of_text = self.inner.eos_token_id
        if self.end_of_text is None:
            self.end_of_text = (self.end or [self.pad])[0]
        if chat and self.inner.chat_template is None:
            end = "<|im_end|>" if "<|im_end|>" in self.ranks else self.decode([self.end_of_text])
            self.inner.chat_template = self.CHATML.replace("END", end)
            self.end = [self.ranks[end], *self.end]

    def ids(self, messages, generation_prompt=False):
        if not messages:
            return []
        return self.inner.apply_chat_template(messages, add_generation_prompt=generation_prompt, return_dict=False)

    def render(self, messages, generation_prompt=False):
        """As zaya.Tokenizer's.  A reply that the template changes when others follow it is never learned."""
        ids = self.ids(messages, generation_prompt)
        targets = [False] * len(ids)
        for i, message in enumerate(messages):
            if message["role"] == "assistant" and message.get("weight", 1) != 0:
                said = self.ids(messages[:i + 1])
                # What asks for a reply is not the assistant's, so far as the reply goes on from it.
                begun = len(os.path.commonprefix([said, self.ids(messages[:i], True)]))
                if ids[:len(said)] == said:
                    targets[begun:len(said)] = [True] * (len(said) - begun)
        return ids, targets

    def encode(self, text):
        return self.inner.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.inner.decode(list(ids), clean_up_tokenization_spaces=False)

    def decode_bytes(self, ids):
        return self.decode(ids).encode()

    def save_pretrained(self, folder):
        self.inner.save_pretrained(folder)


def open_tokenizer(folder, chat=False):
    """A checkpoint's tokenizer, ours or the official one."""
    from zaya import Tokenizer
    return Tokenizer.from_pretrained(folder) if is_ours(folder) else ChatTokenizer(folder, chat)


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
        tokenizer = open_tokenizer(folder)
        prompt_ids(tokenizer, "?")                              # ValueError now rather than later without a template
        return cls(load(folder, device="cuda" if torch.cuda.is_available() else "cpu"), tokenizer, **options)

    def set_sampling(self, fields):
        """Of a request; ValueError for what `generate` does not do."""
        if not fields.keys() <= {"temperature", "top_p"} or {type(each) for each in fields.values()} - {int, float}:
            raise ValueError("a checkpoint samples by temperature and top_p, two numbers, alone")
        vars(self).update(fields)

    def hidden_states(self, *given, **more):
        """The model's.  `generate` asks for them at every token and piece of a prompt, and so learns of a `stop`."""
        self.check()
        return type(self.model).hidden_states(self.model, *given, **more)

    def rows_at_once(self, prompts, max_new_tokens):
        """How many rows of the longest prompt and `max_new_tokens` have keys and values of at most `cache_bytes`."""
        config = self.model.config
        width = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim     # numbers a token
        longest = max((len(prompt_ids(self.tokenizer, prompt, self.before)) for prompt in set(prompts)), default=0)
        row_bytes = width * self.model.norm.weight.element_size() * (longest + max_new_tokens)
        return max(1, min(self.rows, self.cache_bytes // row_bytes))

    def stream(self, prompts, max_new_tokens, seed, known=()):
        self.check()
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        rows = self.rows_at_once(prompts, max_new_tokens)
        for start in range(0, len(order), rows):
            # A row's sample depends on its place in the batch: a batch with anything unknown is sampled as a whole.
            part = order[start:start + rows]
            if set(part) <= set(known):
                continue
            self.model.hidden_states = self.hidden_states
            try:
                texts = reply(self.model, self.tokenizer, [prompts[i] for i in part], max_new_tokens, seed + start,
                              self.temperature, self.top_p, self.before)
            finally:
                del self.model.hidden_states
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


@functools.cache
def certificates():
    """What a client trusts: read once, as it takes longer than a request."""
    import httpx
    return httpx.create_ssl_context()


class Endpoint(Source):
    """A server that speaks OpenAI's chat-completions protocol: vLLM, SGLang, transformers serve, a hosted model.

    Up to `concurrency` requests at once.  What may pass (408, 409, 429, 5xx, timeouts, dropped connections, answers
    that are no chat completion) is asked for again up to `retries` times, with back-off.  A rollout that still fails,
    or whose request the server refuses (a prompt too long), is reported in the server's words, not replaced.  A wrong
    key, model or address (401, 403, 404, or no server there) ends the stream with ConnectionError.  `request`: other
    names for the fields max_tokens, seed, temperature and top_p; "" leaves one out.  The key is never printed (one of
    less than eight characters is taken for a dummy).
    """
    back_off = 0.5                                              # seconds before the second try; doubles from there

    def __init__(self, url, model, key_variable="OPENAI_API_KEY", concurrency=16, timeout=1800.0, retries=5,
                 temperature=1.0, top_p=1.0, request=None):
        self.url = url.rstrip("/")
        self.model, self.concurrency = model, concurrency
        self.timeout, self.retries, self.answered = timeout, retries, False
        self.sampling, self.names = dict(temperature=temperature, top_p=top_p), request or {}
        self.key = os.environ.get(key_variable, "").strip() or "none"
        self.usages, self.refusal, self.running = [], None, None

    def set_sampling(self, fields):
        """Of a request, which the server judges."""
        self.sampling = {**self.sampling, **fields}

    async def post(self, client, body):
        """One request: a dict -> status, the answer's text, and the seconds after which to come back."""
        headers = {"Authorization": f"Bearer {self.key}", "User-Agent": "rsa.py"}
        response = await client.post(f"{self.url}/chat/completions", json=body, headers=headers)
        self.answered, later = True, response.headers.get("Retry-After", "")
        later = float(later) if re.fullmatch(r"[0-9]{1,2}(\.[0-9]+)?", later) else 0.0
        return response.status_code, response.content.decode("utf-8", "replace"), later

    async def ask(self, client, gate, prompt, max_new_tokens, seed):
        """-> text, tokens, None; or None, 0, what went wrong in the server's words."""
        import httpx
        content = sendable(prompt)
        if self.parts:
            content = [*self.parts, {"type": "text", "text": content}]
        body = {"model": self.model, "messages": [*self.before, {"role": "user", "content": content}]}
        for name, value in dict(max_tokens=max_new_tokens, seed=seed, **self.sampling).items():
            body[self.names.get(name, name)] = value
        body.pop("", None)
        wait = 0.0
        for attempt in range(self.retries + 1):
            await asyncio.sleep(wait)
            # Back-off with jitter, so that clients refused together do not come back together.
            wait = min(8.0, self.back_off * 2.0 ** attempt) * random.uniform(0.5, 1.0)
            status, said, unreachable = 0, "", False
            try:
                async with gate:
                    status, said, later = await self.post(client, body)
                wait = max(wait, later)
                if status < 300:
                    status = 0
                    answer = json.loads(said)
                    error = answer.get("error") or answer["choices"][0].get("error")
                    if not error:
                        text, tokens = read_completion(answer)
                        self.usages.append(answer.get("usage") or {})
                        return text, tokens, None
                    status = int(error["code"])                 # a proxy wraps what it was told in a 200
            except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:           # timeouts, too
                said = repr(error)
                unreachable = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)) and not self.answered
            except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
                said = f"no chat completion came back: {said or error}"
            if len(self.key) >= 8:                              # "x", a dummy, stands in many words
                said = said.replace(self.key, "***")
            if 400 <= status < 500 and status not in (408, 409, 429):
                break
        self.refusal = status, said
        words = " ".join(f"{status or ''} {said}".split())[:500]
        if status in (401, 403, 404):
            hint = ""
            if status == 404 and not self.url.endswith("/v1"):
                hint = f" (most servers' address ends in /v1, but --endpoint is {self.url})"
            raise ConnectionError(f"the server refuses model {self.model!r} or this request{hint}: {words}")
        if unreachable:
            raise ConnectionError(f"no server answers at --endpoint {self.url}: {words}")
        return None, 0, words

    def stream(self, prompts, max_new_tokens, seed, known=()):
        import httpx
        results = queue.SimpleQueue()

        async def ask(client, gate, i):
            number = random.Random(f"{seed} {i}").getrandbits(31)
            results.put((i, *await self.ask(client, gate, prompts[i], max_new_tokens, number)))

        async def ask_all():
            self.running = asyncio.get_running_loop(), asyncio.current_task()
            self.check()
            gate = asyncio.Semaphore(self.concurrency)
            async with httpx.AsyncClient(timeout=self.timeout, limits=httpx.Limits(), verify=certificates()) as client:
                asked = [asyncio.ensure_future(ask(client, gate, i)) for i in range(len(prompts)) if i not in known]
                try:
                    await asyncio.gather(*asked)
                finally:                                        # after a refusal nobody else need ask
                    for each in asked:
                        each.cancel()
                    await asyncio.gather(*asked, return_exceptions=True)

        def run():
            try:
                results.put(asyncio.run(ask_all()))
            except asyncio.CancelledError:
                results.put(ConnectionError("stopped"))
            except Exception as error:
                results.put(error)

        # A loop in a thread of its own: it works in a notebook too, which has one already, and Ctrl-C waits for nobody.
        threading.Thread(target=run, daemon=True).start()
        try:
            while isinstance(found := results.get(), tuple):
                yield found
            if found:
                raise found
        finally:
            self.cancel()

    def cancel(self):
        """What is under way ends, and its connections close, at once."""
        if self.running:
            loop, task = self.running
            with contextlib.suppress(RuntimeError):             # it has ended, and closed its loop
                loop.call_soon_threadsafe(task.cancel)

    def stop(self):
        super().stop()
        self.cancel()


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


# ---- a server before another one ------------------------------------------------------------------------------------


class Refusal(Exception):
    """What a request gets instead of an answer: a status, and words or a server's own JSON."""

    def __init__(self, status, words):
        super().__init__(words)
        self.status = status

    def content(self):
        with contextlib.suppress(ValueError):
            own = json.loads(sendable(str(self)))
            if isinstance(own, dict) and own.get("error"):
                json.dumps(own, allow_nan=False)                # ValueError: no JSON that others read
                return own
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": None, "code": self.status}}


# Fields of a request for Markovian RSA: those that decide it, those that each rollout is asked with, and idle ones.
DECIDE = {"model", "messages", "stream", "stream_options", "n", "seed", "max_tokens", "max_completion_tokens", "rsa",
          "rsa_t", "rsa_n", "rsa_k"}
EACH = {"temperature", "top_p", "top_k", "min_p", "stop", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "logit_bias", "reasoning_effort", "chat_template_kwargs"}
IDLE = {"user", "metadata", "store", "service_tier", "safety_identifier"}


def changed(budget, own):
    """A budget with a request's or the command line's `own` numbers.  ValueError if they make no sense together."""
    numbers = {**asdict(budget), **own}
    # What was not asked for follows what was: a smaller population or budget takes subset and tail along.
    numbers["subset"] = own.get("subset", min(numbers["subset"], numbers["population"]))
    numbers["tail"] = own.get("tail", min(numbers["tail"], numbers["budget"]))
    return Budget(**numbers)


class Job:
    """A request for Markovian RSA: what it asks for, and in a thread of its own the work.  ValueError for a bad one.

    The conversation is the problem: each prompt has all of its messages, and tails beside the text of the last one.
    The answer is the first reply of the last round that gives the answer of the round's majority (of a tie, the first
    one's); if none gives any, the first whose reasoning ended.  select="aggregate": one more reply, to the last tails.
    Answers are compared by `same`, but outside of the main thread math-verify has no say.
    """
    most_rollouts, longest = 1024, 2**20                        # in all; tokens of one, and of its prompt's tails

    def __init__(self, body, budget, source, tokenizer, build_prompt):
        # Without what UTF-8 and JSON do not hold; null is what is not given.
        body = json.loads(sendable(json.dumps(body, ensure_ascii=False, allow_nan=False)))
        body = {key: value for key, value in body.items() if value is not None}
        unknown = body.keys() - DECIDE - EACH - IDLE
        if unknown:
            raise ValueError(f"Markovian RSA does not know the field {min(unknown)!r}; the model by itself may")
        if body.get("n", 1) != 1:
            raise ValueError("Markovian RSA gives one answer: n must be 1")
        own = {"rounds": body.get("rsa_t"), "population": body.get("rsa_n"), "subset": body.get("rsa_k"),
               "budget": body.get("max_completion_tokens", body.get("max_tokens")), "seed": body.get("seed")}
        own |= body["rsa"] if isinstance(body.get("rsa"), dict) else {}
        own = {key: value for key, value in own.items() if value is not None}
        self.select = own.pop("select", "majority")
        if self.select not in ("majority", "aggregate"):
            raise ValueError(f"rsa.select must be 'majority' or 'aggregate', not {self.select!r}")
        for key, value in own.items():
            if type(value) is not int or key not in [*Budget.__dataclass_fields__, "seed"]:
                raise ValueError("rsa holds integers (population, subset, rounds, budget, tail, seed) and select, not "
                                 f"{key} {value!r}")
        self.seed = own.pop("seed", random.getrandbits(31))
        self.budget = changed(budget, own)
        rollouts, tails = self.budget.population * (self.budget.rounds + 1), self.budget.subset * self.budget.tail
        if rollouts > self.most_rollouts or max(tails, self.budget.budget) > self.longest:
            raise ValueError(f"{self.budget} is too much: at most {self.most_rollouts} rollouts of {self.longest} "
                             "tokens")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(each, dict) for each in messages):
            raise ValueError("messages must be a list of objects with role and content")
        content = messages[-1].get("content")
        texts, others = [], []
        for part in content if isinstance(content, list) else [{"text": content}]:
            has_text = isinstance(part, dict) and isinstance(part.get("text"), str)
            (texts if has_text else others).append(part)
        self.problem = "\n".join(part["text"] for part in texts)
        if messages[-1].get("role") != "user" or not self.problem.strip():
            raise ValueError("the last message must be the user's, and hold a text")
        if isinstance(source, Checkpoint):
            if others:
                raise ValueError("this checkpoint reads text alone")
            messages = [{**each, "content": joined(each.get("content") or "")} for each in messages]
        self.source, self.tokenizer, self.build_prompt = copy.copy(source), tokenizer, build_prompt
        self.source.before, self.source.parts, self.source.usages = messages[:-1], others, []
        self.source.set_sampling({key: value for key, value in body.items() if key in EACH})
        self.tokens, self.failed, self.asked, self.reasoning, self.spent = [], [], 0, 0, {}

    def generate(self, prompts, max_new_tokens, seed):
        """markovian_rsa's; it says how far a round is, and at its end what the population answers."""
        t, texts = len(self.tokens), [None] * len(prompts)
        self.tokens.append(0)
        for done, (i, text, tokens, error) in enumerate(self.source.stream(prompts, max_new_tokens, seed), 1):
            texts[i] = text
            if text is None:
                self.failed.append(f"round {t}, candidate {i}: {error}")
                continue
            if len(prompts) > 1:
                self.say(f" {done}" if self.tokens[t] else f"round {t}, rollouts: {done}")
            # The server counts the tokens, and we which share of them is reasoning.
            whole, answer = count_tokens(text, self.tokenizer), text.rpartition("</think>")[2]
            spent = tokens or whole
            if text.startswith("<think>"):
                thought = whole - count_tokens(answer, self.tokenizer) if "</think>" in text else whole
                self.reasoning += round(spent * thought / whole)
            self.tokens[t] += spent
            self.spent[text] = spent
            self.asked += count_tokens(prompts[i], self.tokenizer)
        votes = collections.Counter((final_answer(text) or "no answer")[:40] for text in texts if text is not None)
        if votes and len(prompts) > 1:
            self.say(" | " + ", ".join(f"{answer} x{count}" for answer, count in votes.most_common(6)) + "\n")
        return texts

    def choose(self, candidates):
        """-> the text to answer with, and the last round's majority with its votes."""
        texts = [candidate.text for candidate in candidates if candidate.text is not None]
        answers = list(map(final_answer, texts))
        answer, votes = majority(answers)
        if self.select == "aggregate":
            tails = [candidate.tail for candidate in candidates if candidate.tail]
            tails = random.Random(f"{self.seed} last").sample(tails, min(self.budget.subset, len(tails)))
            seed = random.Random(f"{self.seed} last reply").getrandbits(31)
            last, = self.generate([self.build_prompt(self.problem, tails)], self.budget.budget, seed)
            if last is not None:                                # if it failed, which is counted, the majority's
                return last, answer, votes
        if answer is not None:
            return texts[answers.index(answer)], answer, votes
        ended = [text for text in texts if not text.startswith("<think>") or "</think>" in text]
        return (ended or texts)[0], answer, votes

    def __call__(self, say):
        """Do the work, and `say` how far it is -> content, finish_reason, usage, what the `rsa` object tells."""
        self.say = say
        try:
            result = markovian_rsa(self.problem, self.generate, **asdict(self.budget), seed=self.seed,
                                   tokenizer=self.tokenizer, build_prompt=self.build_prompt)
            text, answer, votes = self.choose(result.candidates)
        except (RuntimeError, ConnectionError, ValueError) as error:
            # Where a server said why, its status and its words.
            status, said = getattr(self.source, "refusal", None) or (0, "")
            words = said if status else f"{error} {self.failed[-1:] or ''}"
            if not 400 <= status < 600:                         # of a proxy with codes of its own, too
                status = 400 if isinstance(error, ValueError) else 502
            raise Refusal(status, words) from None
        reasoning, tag, content = text.rpartition("</think>")
        if text.startswith("<think>"):
            reasoning, content = (reasoning, content) if tag else (text, "")
            say(reasoning.removeprefix("<think>"))
        asked = sum(usage.get("prompt_tokens") or 0 for usage in self.source.usages) or self.asked
        details = [usage.get("completion_tokens_details") or {} for usage in self.source.usages]
        reasoning = sum(each.get("reasoning_tokens") or 0 for each in details) or self.reasoning
        spent = sum(self.tokens)
        usage = {"prompt_tokens": asked, "completion_tokens": spent, "total_tokens": asked + spent,
                 "completion_tokens_details": {"reasoning_tokens": reasoning}}
        about = {**asdict(self.budget), "seed": self.seed, "select": self.select, "answer": answer, "votes": votes,
                 "tokens": self.tokens, "failed": len(self.failed), "failures": self.failed[:8]}
        cut = (text.startswith("<think>") and not tag) or self.spent.get(text, 0) >= self.budget.budget
        return content.strip(), "length" if cut else "stop", usage, about


class Server:
    """An ASGI application, OpenAI's protocol: MODEL-mrsa and MODEL-mrsa-BUDGET think by Markovian RSA.

    MODEL itself, and every other path below /v1, passes through untouched to the server behind, if one is there.  A
    request's `rsa` object overrides the budget; false passes it through, too.  When a client goes away, what runs for
    it ends, here and behind, in every phase.
    """
    quiet, most_jobs, most_bytes = 10.0, 64, 2**24              # seconds of silence; problems at once; a body's bytes
    # Headers of one connection, which are not passed on.
    HOP = {b"host", b"content-length", b"connection", b"keep-alive", b"transfer-encoding", b"te", b"upgrade",
           b"trailer", b"expect"}

    def __init__(self, source, model, budget, tokenizer, build_prompt):
        self.source, self.model, self.tokenizer, self.build_prompt = source, model, tokenizer, build_prompt
        self.budgets = {f"{model}-mrsa": budget}
        self.budgets |= {f"{model}-mrsa-{name}": each for name, each in BUDGETS.items()}
        self.jobs, self.turn = set(), threading.Lock()          # a checkpoint solves one problem after another

    async def __call__(self, scope, receive, send):
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse
        asked, raw = Request(scope, receive), bytearray()
        try:
            async for piece in asked.stream():
                raw += piece[:self.most_bytes + 1 - len(raw)]
        except ClientDisconnect:
            return

        async def answer():
            async with contextlib.AsyncExitStack() as after:
                try:
                    response = await self.respond(asked, bytes(raw), after)
                except Refusal as refusal:
                    response = JSONResponse(refusal.content(), refusal.status)
                await response(scope, asyncio.Event().wait, send)

        async def leave():
            while (await receive())["type"] != "http.disconnect":
                pass

        # Whoever has gone needs no answer: cancelled, it closes all that `after` knows of.
        work, left = asyncio.ensure_future(answer()), asyncio.ensure_future(leave())
        with contextlib.suppress(asyncio.CancelledError):       # Ctrl-C: uvicorn ends what is under way
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
        work.cancel()
        left.cancel()
        ended, _ = await asyncio.gather(work, left, return_exceptions=True)
        if isinstance(ended, Exception) and not type(ended).__module__.startswith("http"):
            raise ended                                         # a defect; else the server behind was cut in mid-answer

    async def respond(self, asked, raw, after):
        """A request and its body -> the response.  after: an exit stack for what ends with it."""
        if len(raw) > self.most_bytes:
            raise Refusal(413, f"the body is longer than {self.most_bytes} bytes")
        path = asked.url.path
        if path == "/v1/models":
            return await self.models(asked, after)
        if path != "/v1/chat/completions":
            return await self.forward(asked, raw, after)
        try:
            body = json.loads(raw)
            model, own = body["model"], body.get("rsa")
            stream, options = body.get("stream") or False, body.get("stream_options") or {}
            if not (type(model) is str and type(stream) is bool and type(options) is dict and
                    (own is None or type(own) in (bool, dict))):
                raise TypeError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Refusal(400, "the body must be JSON with a model's name; stream is true or false, stream_options an "
                               "object, rsa an object, true or false") from None
        thinks = own is not False and (model in self.budgets or bool(own) or
                                       not body.keys().isdisjoint({"rsa_t", "rsa_n", "rsa_k"}))
        budget, prompt = self.budgets.get(model, self.budgets[f"{self.model}-mrsa"]), self.build_prompt
        if thinks and model not in {self.model, *self.budgets}:
            raise Refusal(404, f"there is no model {model!r} here: Markovian RSA is for {self.model}")
        if not thinks and isinstance(self.source, Endpoint):
            if own is not None or model in self.budgets:        # rewritten no more than needed
                body.pop("rsa", None)
                raw = json.dumps({**body, "model": self.model if model in self.budgets else model}).encode()
            return await self.forward(asked, raw, after)
        if not thinks:                                          # of a checkpoint here: one sample
            if model not in {self.model, *self.budgets}:
                raise Refusal(404, f"there is no model {model!r} here, but {self.model}")
            body["rsa"], prompt = dict(population=1, subset=1, rounds=0, tail=0), terse_prompt
        if len(self.jobs) >= self.most_jobs:
            raise Refusal(429, f"{self.most_jobs} problems are under way: come back later")
        try:
            job = Job(body, budget, self.source, self.tokenizer, prompt)
        except ValueError as error:
            raise Refusal(400, str(error)) from None
        scheme, _, key = asked.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and key.strip():
            job.source.key = key.strip()
        return await self.solve(job, model, stream, bool(options.get("include_usage")), after)

    async def solve(self, job, model, stream, include_usage, after):
        """The response to a job: JSON at its end, or events from its first rollout on."""
        from starlette.responses import JSONResponse, StreamingResponse
        loop, said, begun = asyncio.get_running_loop(), asyncio.Queue(), time.monotonic()
        head = {"id": f"chatcmpl-{random.getrandbits(64):016x}", "created": int(time.time()), "model": model}

        def say(piece):
            with contextlib.suppress(RuntimeError):             # the loop has ended, and nobody listens
                loop.call_soon_threadsafe(said.put_nowait, piece)

        def work():
            try:
                with self.turn if isinstance(job.source, Checkpoint) else contextlib.nullcontext():
                    say(job(say))
            except Exception as error:                          # a defect of ours, too, is an answer
                say(error if isinstance(error, Refusal) else Refusal(500, repr(error)))

        def end():
            job.source.stop()
            self.jobs.discard(job)
            took = time.monotonic() - begun
            print(f"{model}: {took:.1f} s, {job.budget}, tokens {job.tokens}, failed {len(job.failed)}", flush=True)

        async def heard():
            """What the job says, and "" after `quiet` seconds of silence."""
            try:
                return await asyncio.wait_for(said.get(), self.quiet)
            except asyncio.TimeoutError:
                return ""

        def event(delta=None, finish_reason=None, **more):
            choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
            return f"data: {json.dumps({**head, 'object': 'chat.completion.chunk', 'choices': choices, **more})}\n\n"

        async def events(piece):
            yield event({"role": "assistant", "content": ""})
            while isinstance(piece, str):
                yield event({"reasoning_content": piece}) if piece else ": still at work\n\n"
                piece = await heard()
            if isinstance(piece, Refusal):
                yield f"data: {json.dumps(piece.content())}\n\n"
            else:
                content, finish_reason, usage, about = piece
                yield event({"content": content})
                yield event({}, finish_reason, rsa=about, **({} if include_usage else {"usage": usage}))
                if include_usage:                               # once: some clients add up
                    yield event(usage=usage)
            yield "data: [DONE]\n\n"

        self.jobs.add(job)
        after.callback(end)
        threading.Thread(target=work, daemon=True).start()
        told, piece = [], await heard()
        if stream and not isinstance(piece, Refusal):
            return StreamingResponse(events(piece), 200, {"Cache-Control": "no-cache"}, "text/event-stream")
        while isinstance(piece, str):
            told.append(piece)
            piece = await heard()
        if isinstance(piece, Refusal):
            raise piece
        content, finish_reason, usage, about = piece
        message = {"role": "assistant", "content": content, "reasoning_content": "".join(told)}
        return JSONResponse({**head, "object": "chat.completion", "usage": usage, "rsa": about, "choices": [
            {"index": 0, "message": message, "finish_reason": finish_reason}]})

    async def behind(self, asked, raw, after, only=None):
        """Pass a request on as it came, or with `only` these headers -> the answer of the server behind, whose body is
        still to come."""
        import httpx
        if not isinstance(self.source, Endpoint):
            raise Refusal(404, f"{asked.method} {asked.url.path} is not served here")
        # httpx by itself would ask for compressed answers, which the client may not read.
        headers = {b"authorization": f"Bearer {self.source.key}".encode(), b"accept-encoding": b"identity"}
        for name, value in asked.headers.raw:
            if name not in self.HOP and (not only or name in only):
                headers[name] = value
        client = await after.enter_async_context(httpx.AsyncClient(timeout=self.source.timeout, verify=certificates()))
        path = asked.scope.get("raw_path", asked.scope["path"].encode()).decode("latin-1").removeprefix("/v1")
        url = httpx.URL(self.source.url + path, query=asked.scope["query_string"] or None)
        request = client.build_request(asked.method, url, content=raw, headers=headers)
        try:
            answer = await client.send(request, stream=True)
        except httpx.HTTPError as error:
            status = 504 if isinstance(error, httpx.TimeoutException) else 502
            raise Refusal(status, f"no answer from {self.source.url}: {error!r}") from None
        after.push_async_callback(answer.aclose)
        return answer

    async def forward(self, asked, raw, after):
        from starlette.responses import StreamingResponse
        answer = await self.behind(asked, raw, after)
        response = StreamingResponse(answer.aiter_raw(), answer.status_code)
        headers = [(name.lower(), value) for name, value in answer.headers.raw]
        response.raw_headers = [(name, value) for name, value in headers if name not in self.HOP]
        return response

    async def models(self, asked, after):
        """What the server behind lists, and the names for Markovian RSA."""
        from starlette.responses import JSONResponse
        listed = []
        if isinstance(self.source, Endpoint):
            answer = await self.behind(asked, b"", after, {b"authorization"})
            text = (await answer.aread()).decode("utf-8", "replace")
            if answer.status_code != 200:
                raise Refusal(answer.status_code, text)
            with contextlib.suppress(ValueError, LookupError, TypeError):
                listed = list(json.loads(text)["data"])
        known = {each.get("id") for each in listed if isinstance(each, dict)}
        for name in [self.model, *self.budgets]:
            if name not in known:
                listed.append({"id": name, "object": "model", "created": 0, "owned_by": "rsa.py"})
        return JSONResponse({"object": "list", "data": listed})


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
    problem.add_argument("--serve", metavar="HOST:PORT", help="answer chat completions there, by Markovian RSA for the "
                         "models NAME-mrsa and NAME-mrsa-BUDGET; whoever brings no key asks the endpoint with yours")
    model.add_argument("--checkpoint", metavar="FOLDER", help="in the official layout: out/tiny/final or ZAYA1-8B")
    model.add_argument("--endpoint", metavar="URL", help="a chat-completions server: http://HOST:PORT/v1")
    add = parser.add_argument
    add("--model", metavar="NAME", help="endpoint: the served model's name; of a served checkpoint: the folder's")
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
    add("--concurrency", type=bounded(int, 1, 4096), default=16, metavar="N", help="requests at once, with --serve of "
        "each problem (default 16)")
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
    port = re.fullmatch(r"[^:\s]+:([0-9]{1,5})", given.serve or "x:1")
    if given.serve and (given.trace or not port or int(port[1]) > 65535):
        parser.error("--serve must be HOST:PORT, such as 127.0.0.1:8080, and writes no --trace")
    if given.resume and not given.trace:
        parser.error("--resume goes on with a --trace FILE; name it")
    # What is not said follows from the model: whether it is one of ours, and whether it is ZAYA1-8B.
    ours = given.checkpoint is not None and is_ours(given.checkpoint)
    official = not ours if given.checkpoint else "zaya1-8b" in given.model.lower()
    given.prompt = given.prompt or ("terse" if ours else "report")
    given.top_p = given.top_p or (0.95 if official else 1.0)
    given.name = given.name or ("tiny" if ours else "default")
    return given


def serve(given, source, budget, tokenizer):
    """Serve until Ctrl-C."""
    import uvicorn
    model = given.model or os.path.basename(os.path.normpath(given.checkpoint))
    server = Server(source, model, budget, tokenizer, PROMPTS[given.prompt])
    host, port = given.serve.rsplit(":", 1)
    print(f"http://{given.serve}/v1 answers for {model}, {', '.join(server.budgets)}; Ctrl-C ends it", flush=True)
    uvicorn.run(server, host=host, port=int(port), log_level="warning", lifespan="off", ws="none", date_header=False,
                server_header=False, timeout_graceful_shutdown=1)


def asked_budget(given):
    """A Budget of the command line's numbers, and else of the preset's."""
    own = {key: getattr(given, key) for key in Budget.__dataclass_fields__ if getattr(given, key) is not None}
    with explained(f"--budget {given.name}", ValueError):
        return changed(BUDGETS[given.name], own)


def run_command(given):
    budget = asked_budget(given)
    problems = [sendable(given.problem or "")]
    answers = None
    if given.problems:
        problems, answers = zip(*read_problems(given.problems))
    sampling = dict(temperature=given.temperature, top_p=given.top_p)
    if given.serve:
        with explained("--serve needs: pip install starlette uvicorn", ImportError):
            import starlette                                    # noqa: F401
            import uvicorn                                      # noqa: F401
    if given.checkpoint:
        with explained(f"--checkpoint {given.checkpoint}", Exception):              # damage has many exceptions
            source = Checkpoint.from_pretrained(given.checkpoint, **sampling)
        tokenizer = source.tokenizer
    else:
        with explained("--endpoint needs: pip install httpx", ImportError):
            import httpx                                        # noqa: F401
        source = Endpoint(given.endpoint, given.model, given.key_variable, given.concurrency, given.timeout,
                          given.retries, request=given.request, **sampling)
        with explained(f"--tokenizer {given.tokenizer}", Exception):
            tokenizer = ChatTokenizer(given.tokenizer) if given.tokenizer else None
    if given.serve:
        return serve(given, source, budget, tokenizer)
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
