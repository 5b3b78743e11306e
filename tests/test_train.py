"""train.py's parts: trimming, packing, sources, optimizers, checkpoints (its tasks: test_tasks.py)."""
import doctest
import gzip
import json
import math
import random
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import rsa
import train
import zaya
from train import TASKS, FileSource, Loader, Muon, Stage, TaskSource, split_think, trim
from zaya import PIDBalancer, Tokenizer, Zaya, ZayaConfig

BYTES = Tokenizer()                                             # one token per byte: sizes can be read off the text


def tiny_stage(**changes):
    usual = dict(steps=4, context=64, rope_theta=1e4, traces=0.5, lr=1e-2, lr_end=1e-3, difficulty=2, turns=1)
    return Stage(**{**usual, **changes})


def tiny_model(**changes):
    torch.manual_seed(0)
    return Zaya(ZayaConfig.preset("smoke", vocab_size=BYTES.vocab_size, **changes))


@pytest.mark.parametrize("module", [train, zaya])
def test_docstring_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and (module is zaya or result.attempted > 8)


# ---- trimming and packing -------------------------------------------------------------------------------------------

words = st.text("abc é\n", min_size=0, max_size=12)
blocks_of = st.lists(st.tuples(words, words), max_size=4)


def bare(messages):
    """The questions, and the answers without their reasoning."""
    return [{**m, "content": split_think(m["content"])[1]} if m["role"] == "assistant" else m for m in messages]


def size(messages):
    return len(BYTES.render(messages)[0])


@settings(max_examples=500, deadline=None)
@given(turns=st.lists(st.tuples(words, words, blocks_of), min_size=1, max_size=4), context=st.integers(5, 120))
def test_trimming_keeps_problem_and_answer_and_moves_nothing(turns, context):
    """What is left is the conversation with a tail of the last turn's reasoning taken out, wherever its blocks are."""
    messages = []
    for question, first, blocks in turns:
        reply = first + "".join(f"<think>{reasoning}</think>{answer}" for reasoning, answer in blocks)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    before = json.dumps(messages)
    result, verdict = trim(messages, context, BYTES)
    assert json.dumps(messages) == before
    if verdict == "dropped":
        assert result is None and size(bare(messages)) > context
        return
    assert size(result) <= context and bare(result) == bare(messages)
    assert (verdict == "kept") == (size(messages) <= context) and (verdict != "kept" or result == messages)
    assert result[:-1] == (bare(messages[:-1]) if verdict == "stripped" else messages[:-1])
    _, first, blocks = turns[-1]
    kept, (reasoning, _) = result[-1]["content"], split_think(result[-1]["content"])
    assert split_think(messages[-1]["content"])[0].startswith(reasoning)        # cut from the end, at a character
    expected, left = first, len(reasoning)
    for reasoning, answer in blocks:                            # a block is whole, or cut and then all later ones gone
        block = f"<think>{reasoning[:left]}</think>"
        expected += (block if kept.startswith(expected + block) else "") + answer
        left = max(0, left - len(reasoning))
    assert kept == expected
    if verdict == "cut" and "<think>" in kept:
        # It just fits: a character more, of two bytes and with two tags of each block up to its own, would not.
        assert size(result) > context - 2 * len(blocks)


def test_trimming_follows_the_four_rules_in_order():
    talk = [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "<think>first</think>a1"},
            {"role": "user", "content": "q2"}, {"role": "assistant", "content": "<think>second</think>a2"}]
    assert size(talk) == 31 and trim(talk, 31, BYTES) == (talk, "kept")
    assert trim(talk, 28, BYTES)[0][3]["content"] == "<think>sec</think>a2"
    assert trim(talk, 23, BYTES) == ([*talk[:3], {"role": "assistant", "content": "a2"}], "cut")
    short = bare(talk)
    stripped = [*short[:3], {"role": "assistant", "content": "<think>seco</think>a2"}]
    assert trim(talk, 22, BYTES) == (stripped, "stripped") and trim(talk, 16, BYTES) == (short, "stripped")
    assert trim(talk, 15, BYTES) == (None, "dropped")
    short_end = [*talk[:3], {"role": "assistant", "content": "<think>s</think>a2"}]
    assert trim(short_end, 20, BYTES) == ([*short[:3], short_end[3]], "stripped")      # the last turn stays whole
    talk = [{"role": "user", "content": "q"},
            {"role": "assistant", "content": "a<think>one</think>b<think>two</think>c"}]
    for context, reply in [(18, talk[1]["content"]), (16, "a<think>one</think>b<think>t</think>c"),
                           (15, "a<think>one</think>bc"), (12, "a<think>on</think>bc"), (9, "abc")]:
        assert trim(talk, context, BYTES)[0][1]["content"] == reply             # the last block's end goes first
    assert split_think(talk[1]["content"]) == ("onetwo", "abc")


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), max_size=40), capacity=st.integers(10, 40), bins=st.integers(1, 6))
def test_packing_keeps_samples_whole(lengths, capacity, bins):
    rows = train.pack(lengths, capacity, bins)
    packed = [index for row in rows for index in row]
    assert len(rows) <= bins and len(set(packed)) == len(packed)
    room = [capacity - sum(lengths[i] for i in row) for row in rows]
    assert min(room, default=0) >= 0
    left = [lengths[i] for i in range(len(lengths)) if i not in packed and lengths[i] <= capacity]
    assert all(length > max(room) for length in left) and (not left or len(rows) == bins)


def test_packing_is_tight_on_real_lengths():
    rng = random.Random(0)
    problems = [rng.choice(list(TASKS.values())).make(rng.random(), rng.randint(1, 4)) for _ in range(600)]
    lengths = [len(BYTES.encode(problem.prompt + TASKS[problem.task].solve(problem))) for problem in problems]
    rows = train.pack(lengths, 256, 30)
    assert sum(lengths) > 1.05 * 30 * 256 and sum(lengths[i] for row in rows for i in row) > 0.97 * 30 * 256


# ---- data -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("line, says", [
    ("{", "Expecting property name"), ("[1]", "a list"), ("{}", "no 'messages'"), ('{"prompt": 3}', "no 'messages'"),
    ('{"messages": []}', "at least one"), ('{"messages": [{"role": "user"}]}', "message 0"),
    ('{"messages": [{"role": "robot", "content": "x"}]}', "'robot'"), ('{"messages": 3}', "no 'messages'"),
    ('{"messages": [{"role": "assistant", "content": "<think>x"}]}', "<think>"), (b"\xff", "utf-8"),
    ('{"question": "q", "answer": "a", "x": ' + "[" * 100_000, "recursion"),
    ('{"question": "q", "answer": "a"}'.encode("utf-16"), "utf-8"), (b'{"question": "q\0", "answer": "a"}', "control"),
    ('{"question": "q", "answer": "half \\ud83d"}', "'answer' must be a text of whole characters"),
    ('{"question": "nul \\u0000", "answer": "a"}', "'question' must be a text of whole characters"),
    ('{"question": "q", "answer": NaN}', "this is NaN"), ('{"question": "q", "answer": true}', "this is true"),
    ('{"question": "q", "answer": ["a"]}', "'answer' must be"), ('{"question": "q", "answer": ' + "7" * 5000, "4300"),
    ('{"messages": ["hello"]}', "message 0: a JSON object"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', "has role ['user']"),
    ('{"messages": [{"role": "assistant", "content": "x", "reasoning": "</think>"}]}', "<think>"),
    ('{"messages": [{"role": "assistant", "content": "x", "thinking": "a", "reasoning": "b"}]}', "two fields"),
    ('{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}', "there are 0 and 1")])
def test_a_bad_line_is_named_or_skipped(tmp_path, capsys, line, says):
    path, good = tmp_path / "rows.jsonl", b'{"question": "1+1?", "answer": "2"}\n'
    path.write_bytes(good + b"\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n" + good)
    with pytest.raises(SystemExit) as stop:
        list(train.read_jsonl(str(path)))
    assert f"{path}:3:" in str(stop.value) and says in str(stop.value) and "--skip-bad-lines" in str(stop.value)
    assert len(list(train.read_jsonl(str(path), skip_bad_lines=True))) == 2
    assert "skipped 1 bad line" in capsys.readouterr().out


Q, A, QA = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"question": "q", "answer": "a"}


@pytest.mark.parametrize("row, messages", [
    ({"instruction": "q", "input": "i", "output": "a"}, ["user: q\n\ni", "assistant: a"]),
    ({"instruction": "Double it.", "input": 0, "output": 0.5}, ["user: Double it.\n\n0", "assistant: 0.5"]),
    ({"system_prompt": "s", "question": "q", "response": "", "answer": 42}, ["system: s", "user: q", "assistant: 42"]),
    ({"system": "s", "messages": [Q, A]}, ["system: s", "user: q", "assistant: a"]),
    ({"system": "s", "messages": [{"role": "system", "content": "s"}, Q]}, ["system: s", "user: q"]),
    ({"passage": "c", "instruction": "q", "response": "a"}, ["user: c\n\nq", "assistant: a"]),
    ({"question": "q", "reasoning": "r", "answer": "a\n#### 1"}, ["user: q", "assistant: <think>r</think>a\n#### 1"]),
    ({"messages": [Q, {**A, "thinking": "r", "reasoning": "r", "reasoning_content": ""}]},
     ["user: q", "assistant: <think>r</think>a"]),
    ({"messages": [Q, {"role": "assistant", "content": "<think>\nr\n</think>a", "reasoning_content": "r"}]},
     ["user: q", "assistant: <think>\nr\n</think>a"]),
    ({"messages": [Q, {"role": "assistant", "content": "b<think>s</think>a", "reasoning": "r"}]},
     ["user: q", "assistant: <think>r</think>b<think>s</think>a"]),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                        {"from": "gpt", "value": "a"}]}, ["system: s", "user: q", "assistant: a"]),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "6*"}, {"type": "text", "text": "7?"}]},
                   {"role": "assistant", "content": 42}]}, ["user: 6*7?", "assistant: 42"]),
    ({"messages": [{"role": "developer", "content": "s"}, Q, A, {"role": "tool", "tool_call_id": "1", "content": "t"},
                   A]}, ["system: s", "user: q", "assistant: a", "user: t", "assistant: a"]),
    ({"messages": [Q, {**A, "content": "", "reasoning": " ", "tool_calls": []}]}, ["user: q", "assistant: "]),
    ({"messages": [{**Q, "id": "1"}, {**A, "timestamp": "8 am"}], "prompt": "q"}, ["user: q", "assistant: a"]),
    ({"messages": [{"role": "user", "content": "what does <think> mean?"}]}, ["user: what does <think> mean?"]),
    ({"problem": "6*7", "solution": "It is 42.", "answer": "42"}, ["user: 6*7", "assistant: It is 42."]),
    ({"question": "q", "answer": 10**400}, ["user: q", f"assistant: 1{'0' * 400}"]),
    *[({pair[0]: "q", pair[1]: "a", "extra": 1}, ["user: q", "assistant: a"]) for pair in train.PAIRS],
    *[({"prompt": "q", "completion": text}, ["user: q", f"assistant: {text}"]) for text in      # headings, not answers
      ("Intro.\n#### Step 1\nDo it.\n#### Step 2\nDone.", "a #### b", "<think>a\n#### b</think>4", "#### 5")],
])
def test_what_a_field_says_reaches_the_model(row, messages):
    harmless = {"id": "a-1", "prompt_id": "x y", "source": "a book, chapter 2", "url": "https://a.b/c", "score": "0.5",
                "difficulty": "very hard", "problem_type": "word problem", "tags": ["a b"], "metadata": {"by": "Ann"},
                "n": 3, "ok": True, "nothing": None, "no_tools": [], "note": "", "License": "CC BY 4.0", "Meta": "x",
                "loss_before": math.nan}
    for more in ({}, harmless):
        assert [f"{m['role']}: {m['content']}" for m in train.to_messages({**row, **more})] == messages


@pytest.mark.parametrize("row, says", [
    ({"messages": [Q, {**A, "tool_calls": [{"function": {"name": "weather"}}]}]}, "message 1 has a field 'tool_calls'"),
    ({"messages": [Q, {"role": "assistant", "content": None, "function_call": {"name": "f"}}]}, "'function_call'"),
    ({"messages": [{**Q, "reasoning": "r"}, A]}, "message 0 has a field 'reasoning'"),
    ({"messages": [{**Q, "content": [{"type": "image_url", "image_url": "x"}]}, A]}, "message 0 must be a text"),
    ({"messages": [{**Q, "content": [{"type": "text", "text": "a"}, {"type": "file"}]}, A]}, "message 0 must be"),
    ({"messages": [Q, A], "tools": [{"name": "weather"}]}, "the row has a field 'tools'"),
    ({"messages": [Q, A], "context": "c"}, "'context'"),
    ({"messages": [Q, A], "prompt": "another"}, "'prompt'"), ({"messages": "x", **QA}, "'messages'"),
    *[({**QA, key: value}, repr(key)) for key, value in dict(choices=["b", "c"], hint="h", image="p.png", image_id="7",
                                                             solution="s", weight=0, history=[["b", "c"]]).items()],
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, "no pair"),
])
def test_a_row_that_says_more_is_refused_by_name(row, says):
    with pytest.raises(ValueError, match=re.escape(says)):
        train.to_messages(row)


@pytest.mark.parametrize("field, mask_prompts", [("weight", False), ("train", True), ("loss", False), ("weight", True)])
def test_a_message_of_weight_0_is_read_and_never_learned(tmp_path, field, mask_prompts):
    turns = [Q, {**A, "content": "wrong", field: 0}, Q, {**A, "content": "right", field: 1}]
    ids, targets = BYTES.render(train.to_messages({"messages": turns}))
    assert BYTES.decode([i for i, w in zip(ids, targets) if w]) == "right<|end|>" and set(targets) == {False, True}
    (tmp_path / "a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 20, encoding="utf-8")
    source = FileSource("a", *train.cached_tokens(str(tmp_path / "a.jsonl"), str(tmp_path), BYTES, 64, False))
    assert source.size(False) == 19 and source.get(3, False)[0] == ids
    _, targets, _, _ = Loader([source], tiny_stage(mask_prompts=mask_prompts), 64, 0, BYTES.pad).next()
    first = targets[0][:len(ids)]
    text = BYTES.decode(first[first >= 0].tolist())
    assert text == ("right<|end|>" if mask_prompts else "q<|end|>" "<|user|>q<|end|><|assistant|>right<|end|>")


@pytest.mark.parametrize("name, write", [
    ("A.JSONL", lambda rows: b"\xef\xbb\xbf" + "\r\n".join(map(json.dumps, rows)).encode()),
    ("a.jsonl.gz", lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    ("a.Json.gz", lambda rows: gzip.compress(json.dumps(rows, indent=2).encode("utf-8-sig"))),
])
def test_rows_are_read_from_every_kind_of_file(tmp_path, name, write):
    path = tmp_path / name
    path.write_bytes(write([{"question": f"{i} on and on and on?", "answer": i, "answer_id": "x"} for i in range(30)]))
    assert [m[1]["content"] for m in train.read_jsonl(str(path))] == [str(i) for i in range(30)]
    config = train.TrainConfig(data=[str(path)], tasks="none", out=str(tmp_path / "out"))
    source, = train.make_sources(config, tiny_stage(), BYTES, 0)
    assert source.is_traces and source.size(False) + source.size(True) == 30
    assert "<|user|>7 on and on and on?<|end|>" in BYTES.decode(source.get(7, False)[0])
    assert train.make_tokenizer(config, 268).vocab_size == 268


def test_a_json_file_is_one_row_or_an_array_of_rows(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(QA), encoding="utf-8")
    assert list(train.read_jsonl(str(path))) == [[Q, A]]
    path.write_text(json.dumps([QA, {**QA, "hint": "h"}, QA]), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"a\.json:row 2: .*'hint'.*--skip-bad-lines"):
        list(train.read_jsonl(str(path)))
    assert len(list(train.read_jsonl(str(path), skip_bad_lines=True))) == 2
    for text, says in [('{"a": 1}\n{"a": 2}', "line 2.*name it .jsonl"), ("[" * 10**5, "recursion")]:
        path.write_text(text, encoding="utf-8")
        with pytest.raises(SystemExit, match=rf"a\.json: .*{says}"):
            list(train.read_jsonl(str(path), skip_bad_lines=True))


@pytest.mark.parametrize("name, content, says", [
    ("a.txt", "Grüße\n".encode("utf-16"), "a.txt:1: 'utf-8' codec"),
    ("a.txt", "one\ntwo\n".encode("utf-16-le"), "a.txt:1: .*NUL"),
    ("a.txt", b"one\ntwo\nthr\xe9e\n", "a.txt:3: .*0xe9.*Save the file as UTF-8"),
    ("a.TXT", "é\n".encode() * 700_000 + b"\xff", "a.TXT:700001: .*0xff"),
    ("a.txt", b"x" * 3_000_000 + "\né".encode()[:-1], "a.txt:2: .*unexpected end"),
    ("a.txt.gz", gzip.compress(b"one\n\xff"), "a.txt.gz:2: "),
    ("a.txt.gz", gzip.compress(b"one\n" * 9000)[:-20], "a.txt.gz is damaged: "),
    ("a.jsonl.gz", gzip.compress(b'{"question": "q", "answer": "a"}\n' * 9)[:-9], "a.jsonl.gz is damaged: "),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz is damaged: Not a gzipped file"),
    ("a.txt", b"", "a.txt gave no tokens: it is empty"), ("a.jsonl", b"\n", "a.jsonl gave no tokens"),
    ("a.jsonl", (json.dumps(QA) + "\n").encode("utf-16"), "a.jsonl gave no tokens"),
], ids=range(12))
def test_a_file_that_is_no_text_is_named_and_never_trained_on(tmp_path, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SystemExit, match=says):
        train.cached_tokens(str(path), str(tmp_path / "data"), BYTES, 64, skip_bad_lines=True)
    with pytest.raises(SystemExit, match=re.escape(name)):
        train.make_tokenizer(train.TrainConfig(data=[str(path)], skip_bad_lines=True), 280)


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_text_is_read_whatever_its_characters_and_line_ends(tmp_path, pack):
    text = "Grüße 123 \U0001f600\r\n" * 30_000 + "é" * 700_000 + "\n" + "\U0001f600" * 300_001 + "x\ufeff"
    path = tmp_path / ("A.Txt" + ".gz" * (pack is gzip.compress))
    path.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))
    pieces = list(train.read_text(str(path)))
    assert "".join(pieces) == text and max(map(len, pieces)) < 1.1 * 2**20
    tokens, *_ = train.cached_tokens(str(path), str(tmp_path / "data"), BYTES, 64, False)
    assert BYTES.decode_bytes(tokens.tolist()).decode() == text


@pytest.mark.parametrize("length", [5, 64, 65, 1280, 1281, 5000])
def test_windows_cover_a_text_once(length):
    source = FileSource("t", np.arange(length), train.windows(np.arange(length), 64))
    samples = [source.get(i, held_out)[0] for held_out in (False, True) for i in range(source.size(held_out))]
    assert sorted(token for sample in samples for token in sample) == list(range(length))
    assert source.size(False) > 0 and max(map(len, samples)) <= 64


def test_conversations_are_tokenised_once(tmp_path, capsys):
    path, folder = str(tmp_path / "b.jsonl"), str(tmp_path / "data")
    rows = [{"question": f"{i}?", "answer": f"{'so ' * i}\n#### {i}"} for i in range(60)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tokens, offsets, targets = train.cached_tokens(path, folder, BYTES, 64, False)
    assert " cut" in capsys.readouterr().out
    assert isinstance(tokens, np.memmap) and len(offsets) == 61 and np.diff(offsets).max() == 64
    source = FileSource("b", tokens, offsets, targets)
    assert source.size(False) == 57 and source.size(True) == 3
    assert len({tuple(source.get(i, h)[0]) for h in (False, True) for i in range(source.size(h))}) == 60
    ids, wanted = source.get(2, False)
    told, said = "<|user|>2?<|end|><|assistant|>", "<think>so so</think>2<|end|>"
    assert BYTES.decode(ids) == told + said and BYTES.decode([i for i, w in zip(ids, wanted) if w]) == said
    train.cached_tokens(path, folder, BYTES, 64, False)         # as they lie there
    train.cached_tokens(path, folder, BYTES, 48, False)         # trimmed anew for another context
    assert capsys.readouterr().out.count("trimmed to") == 1


def make_loader(**changes):
    stage = tiny_stage(**changes)
    text = np.frombuffer((zaya.__doc__ * 3).encode(), np.uint8)
    sources = [FileSource("text", text, train.windows(text, stage.context)), TaskSource(list(TASKS), stage, BYTES, 0)]
    return Loader(sources, stage, 512, 0, BYTES.pad)


def samples_in(inputs, positions):
    """Where a batch's samples lie: (row, start, end)."""
    for row in range(len(inputs)):
        starts = [i for i in range(64) if positions[row, i] == 0] + [64]
        for start, end in zip(starts, starts[1:]):
            yield row, start, start + int((positions[row, start:end] >= 0).sum())


@pytest.mark.parametrize("mask_prompts", [False, True])
def test_batches_hold_whole_samples_apart(mask_prompts):
    loader = make_loader(mask_prompts=mask_prompts)
    for _ in range(4):
        inputs, targets, positions, origins = loader.next()
        assert inputs.shape == targets.shape == positions.shape == (8, 64)
        samples = {tuple(loader.sample(*origin)[0]): loader.sample(*origin)[1] for origin in origins}
        for row, start, end in samples_in(inputs, positions):
            ids = inputs[row, start:end].tolist()
            wanted = samples[tuple(ids)]
            assert positions[row, start:end].tolist() == list(range(end - start))
            expect = [t if w or not mask_prompts else -100 for t, w in zip(ids[1:], wanted[1:])] + [-100]
            assert targets[row, start:end].tolist() == expect
        assert (targets[positions < 0] == -100).all()


def test_the_mixture_is_what_the_stage_asks_for_and_a_text_is_read_once_before_it_is_read_twice():
    for share in (0.86, 0.0):
        loader = make_loader(traces=share)
        for _ in range(30):
            loader.next()
        assert abs(loader.given["traces"] / sum(loader.given.values()) - share) < 0.02
    count = loader.sources["text"].size(False)
    order = [[loader.sample("text", epoch * count + number)[0] for number in range(count)] for epoch in (0, 1)]
    assert len(set(map(tuple, order[0]))) == count and sorted(order[0]) == sorted(order[1]) and order[0] != order[1]


def test_a_loader_goes_on_where_it_stopped():
    one, two = make_loader(), make_loader()
    for _ in range(5):
        one.next()
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(one.next()[:3], two.next()[:3]))


def test_packed_samples_get_the_logits_they_get_alone():
    model, (inputs, _, positions, _) = tiny_model(), make_loader().next()
    with torch.no_grad():
        packed = model(inputs, position_ids=positions)
        for row, start, end in samples_in(inputs, positions):
            assert (packed[row, start:end] - model(inputs[row:row + 1, start:end])[0]).abs().max() < 1e-5


def test_aggregation_rows_hold_cut_tails_and_a_right_answer(monkeypatch):
    """Tails of right and of wrong replies; the target is right, but for a dot where no reply solved a column, and for
    an honest search where no reply is right."""
    cuts, problems, right, honest, longest = [], [], [], [], []
    monkeypatch.setattr(train, "cut_tail", lambda *call: cuts.append((call[0], rsa.cut_tail(*call))) or cuts[-1][1])
    draw = train.draw
    monkeypatch.setattr(train, "draw", lambda *call: problems.append(draw(*call)) or problems[-1])
    source = TaskSource(["add", "find", "synthesize"], tiny_stage(aggregation=1.0, tail=9), BYTES, 0)
    for index in range(100):
        cuts.clear()
        problems.clear()
        question, answer = source.exchange(random.Random(index), held_out=False)
        problem = problems[0]                                   # a later one is for corrupt
        assert question == rsa.terse_prompt(problem.prompt, [tail for _, tail in cuts]) and 1 <= len(cuts) <= 4
        assert all("</think>" not in tail and text.split("</think>")[0].endswith(tail) for text, tail in cuts)
        longest.append(max(len(tail) for _, tail in cuts))
        task = TASKS[problem.task]
        assert task.reads                                       # add does not: it has no such rows
        rewards = [task.verify(problem, text)[0] for text, _ in cuts]
        right += rewards
        if task.name == "find" and "." in answer:               # a guess of its own that failed
            label = answer[answer.rindex(".") - 1]
            column = next(c for c in problem.data["columns"] if c["label"] == label)
            found = re.findall(f"{label}([0-9])", "".join(text.split("</think>")[1] for text, _ in cuts))
            assert not any((column["a"] + int(x)) % 10 < column["t"] for x in found)
        elif task.name == "synthesize" and not any(rewards):
            honest.append("#n" in answer)                       # nobody found it, and it may well not either
        else:
            assert task.verify(problem, answer)[0] == 1
    assert 0.2 < np.mean(right) < 0.8 and any(honest)
    assert longest.count(9) > 50 and min(longest) < 9 and max(longest) > 30    # most tails are of the usual length


# ---- optimizers and steps -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(16, 16), (48, 16), (16, 48), (3, 24, 8)])
def test_orthogonalize_gives_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = train.orthogonalize(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.5 and values.max() < 1.35
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    assert (result - u @ v).norm() / (u @ v).norm() < 0.35      # and the singular vectors are the matrix's own
    assert torch.allclose(train.orthogonalize(2.0**13 * matrices), result, atol=1e-4)


def test_muon_moves_each_matrix_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 4, generator=generator), torch.randn(8, 4, generator=generator),
               torch.randn(3, 8, 4, generator=generator), torch.randn(4, 8, generator=generator)]
    gradients = [[torch.randn(w.shape, generator=generator) for w in weights] for _ in range(3)]
    together = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = Muon(together, lr=0.1, momentum=0.9, weight_decay=0.5)
    for step in gradients:
        for parameter, gradient in zip(together, step):
            parameter.grad = gradient.clone()
        optimizer.step()
    for i, weight in enumerate(weights):
        flat = weight.clone().reshape(-1, *weight.shape[-2:])
        momentum = torch.zeros_like(flat)
        for step in gradients:
            gradient = step[i].reshape_as(flat)
            momentum = 0.9 * momentum + 0.1 * gradient
            update = torch.stack([train.orthogonalize(0.9 * m + 0.1 * g) for m, g in zip(momentum, gradient)])
            flat = flat * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 8 ** 0.5 * update
        assert torch.allclose(together[i].data.reshape_as(flat), flat, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 3, 3), (2, 2, 2, 4, 4)])
def test_muon_refuses_what_is_no_matrix(shape):
    """Biases of one length would be orthogonalised together, and a convolution's kernels taken for matrices."""
    matrix, other = torch.nn.Parameter(torch.zeros(4, 4)), torch.nn.Parameter(torch.zeros(shape))
    for add in (lambda: Muon([matrix, other]), lambda: Muon([matrix]).add_param_group({"params": [other]})):
        with pytest.raises(ValueError, match=re.escape(str(shape))):
            add()


@pytest.mark.parametrize("clip, moves", [(0, [3, 4]), (10, [3, 4]), (1, [0.6, 0.8])])
def test_gradients_are_clipped_unless_the_bound_is_zero(clip, moves):
    layer = torch.nn.Linear(2, 1, bias=False)
    layer.weight.data.zero_()
    layer.weight.grad = torch.tensor([[3.0, 4.0]])
    assert train.optimizer_step(layer, [torch.optim.SGD(layer.parameters(), 1.0)], clip, 1.0) == pytest.approx(5)
    assert (-layer.weight.data[0]).tolist() == pytest.approx(moves)


def test_muon_updates_are_as_large_as_adamw_ones():
    """AdamW-RMS matching: the same learning rate moves a weight by about 0.2 lr, whatever the matrix's shape."""
    for shape in ((256, 64), (64, 256), (4, 64, 64)):
        weight = torch.nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape)
        Muon([weight], lr=1.0).step()
        assert 0.1 < weight.data.square().mean().sqrt() < 0.3


def test_every_parameter_has_one_optimizer():
    model = tiny_model()
    muon, adamw = train.make_optimizers(model, 1e-3)
    groups = [[id(p) for group in optimizer.param_groups for p in group["params"]] for optimizer in (muon, adamw)]
    assert sorted(groups[0] + groups[1]) == sorted(id(p) for p in model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    in_muon = {names[i] for i in groups[0]}
    assert "layers.0.experts.gate_up_proj" in in_muon and "layers.1.gate.fc2.weight" in in_muon
    assert not any(word in name for name in in_muon for word in ("conv", "embed", "norm", "scale", "bias", "temp"))


def train_steps(model, batch, steps=1, micro_batch=10**6, twin=None):
    """Updates on one batch -> their rows."""
    config = train.TrainConfig(preset="smoke")
    config.micro_batch = micro_batch
    optimizers, balancer = train.make_optimizers(model, 1e-2), PIDBalancer(model, 1e-2)
    return [train.train_step(model, optimizers, balancer, batch, config, torch.float32, 1e-2, twin=twin)
            for _ in range(steps)]


def test_micro_batches_add_up_to_the_batch():
    *batch, _ = make_loader(mask_prompts=True).next()
    models = [tiny_model() for _ in range(2)]
    rows = [train_steps(model, batch, micro_batch=micro)[0] for model, micro in zip(models, (10**6, 128))]
    assert rows[0].keys() == rows[1].keys()
    assert all(abs(rows[0][key] - rows[1][key]) < 1e-4 for key in rows[0])
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values()):
        assert torch.allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("micro_batch", [10**6, 128])
def test_two_threads_learn_what_one_learns(micro_batch):
    """The twin is on the same weights after every step, and its gradients and its routers' load are the model's."""
    *batch, _ = make_loader(mask_prompts=True).next()
    models, threads = [tiny_model() for _ in range(2)], torch.get_num_threads()
    assert train.make_twin(models[0]) is None or threads > 1
    torch.set_num_threads(2)
    try:
        twin = train.make_twin(models[1])
        one = train_steps(models[0], batch, 3, micro_batch)
        two = train_steps(models[1], batch, 3, micro_batch, twin)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert all(abs(a[key] - b[key]) < 1e-4 for a, b in zip(one, two) for key in a) and one[2]["loss"] < one[0]["loss"]
    b, c = models[1].state_dict(), twin.copy.state_dict()
    for name, a in models[0].state_dict().items():
        assert torch.allclose(a, b[name], atol=2e-4) and torch.equal(b[name], c[name]), name
    assert all(parameter.grad is None for parameter in twin.copy.parameters())


def test_a_batch_without_targets_has_loss_zero():
    inputs, targets, positions, _ = make_loader().next()
    row, = train_steps(tiny_model(), (inputs, torch.full_like(targets, -100), positions))
    assert row["loss"] == 0 and row["norm"] == 0


def test_a_step_on_nan_changes_nothing():
    model, (*batch, _) = tiny_model(), make_loader().next()
    model.layers[0].experts.down_proj.data[:, 0, 0] = float("nan")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    row, = train_steps(model, batch)
    assert not np.isfinite(row["loss"])
    for name, tensor in model.state_dict().items():
        assert "down_proj" in name or torch.equal(tensor, before[name])


def test_prompts_do_not_teach_when_they_are_masked():
    loader, model = make_loader(mask_prompts=True, traces=1.0), tiny_model()
    inputs, targets, positions, _ = loader.next()
    loss = F.cross_entropy(model(inputs, position_ids=positions).flatten(0, 1), targets.flatten())
    other = inputs.clone()
    last_of_row = positions == -1                               # nothing reads padding, so nothing changes
    other[last_of_row] = 7
    again = F.cross_entropy(model(other, position_ids=positions).flatten(0, 1), targets.flatten())
    assert abs(loss.item() - again.item()) < 1e-5               # padding changes how many rows an expert gets at once
    assert 0.3 < (targets >= 0).float().mean() < 0.9


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_is_consistent(preset):
    config = train.TrainConfig(preset=preset)
    shape = ZayaConfig.preset(preset)
    longest = max(config.context.values())
    assert config.micro_batch >= longest <= shape.max_position_embeddings
    assert config.context["pretrain"] < config.context["midtrain"]
    stages = [train.stage_settings(config, stage) for stage in train.STAGES]
    bases = [stage.rope_theta for stage in stages]
    assert bases[0] < bases[1] < bases[2] and set(bases[2:]) == {bases[2]}      # RL goes on with SFT's positions
    for stage in stages:
        assert not isinstance(stage, train.RLStage) or set(stage.tasks) <= set(TASKS)


def test_training_learns_and_balances():
    """Twelve updates on one batch: the loss falls a lot, and every router's choices stay counted."""
    *batch, _ = make_loader().next()
    rows = train_steps(tiny_model(), batch, steps=12)
    assert rows[-1]["loss"] < 0.75 * rows[0]["loss"]
    assert all(0 < row["entropy"] <= 1.0001 and row["load"] >= 1 for row in rows)


# ---- checkpoints ----------------------------------------------------------------------------------------------------

def test_a_checkpoint_survives_a_kill_between_its_renames(tmp_path):
    folder, model = str(tmp_path / "stage"), tiny_model()
    saved = {"step": 3, "seconds": 1.0, "settings": {}, "parts": {}}
    train.save_checkpoint(folder, model, BYTES, saved)
    (tmp_path / "stage").rename(tmp_path / "stage.old")         # killed after the first rename
    (tmp_path / "stage.new").mkdir()
    loaded, tokenizer, state = train.load_checkpoint(folder, "cpu")
    assert state == saved and tokenizer.vocab_size == BYTES.vocab_size
    for a, b in zip(model.state_dict().values(), loaded.state_dict().values()):
        assert torch.equal(a, b)
    assert train.load_checkpoint(str(tmp_path / "nothing"), "cpu") is None
    train.save_checkpoint(folder, model, BYTES, saved)
    assert [p.name for p in tmp_path.iterdir()] == ["stage"]


def test_a_disk_that_is_full_leaves_the_old_checkpoint(tmp_path):
    """torch.save hides what the system says; the sentence that ends the run has it."""
    resource = pytest.importorskip("resource")
    folder, model, (soft, hard) = str(tmp_path / "stage"), tiny_model(), resource.getrlimit(resource.RLIMIT_FSIZE)
    state = {"step": 3, "seconds": 1.0, "settings": {}, "parts": {}}
    train.save_checkpoint(folder, model, BYTES, state)
    size = (tmp_path / "stage" / "model.safetensors").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 100_000, hard))
    try:
        with pytest.raises(SystemExit, match="too large"), \
                train.explained("stopped", (OSError, train.SafetensorError)):
            train.save_checkpoint(folder, model, BYTES, {**state, "step": 4, "parts": torch.zeros(size)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert train.load_checkpoint(folder, "cpu")[2] == state


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"stage,step,loss\npretrain,x,1\n", b"stage,step\npretrain,1,9\n",
                                     b"stage,step,loss\npretrain,1,\xff\n", b"stage,step\nnowhere,1\n", b"\x00\x01\n"])
def test_a_damaged_log_is_named(tmp_path, content):
    (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(SystemExit, match="log.csv is damaged"):
        train.Log(str(tmp_path), "pretrain", 2)


def test_the_log_forgets_what_will_be_trained_again(tmp_path):
    log = train.Log(str(tmp_path), "pretrain", 0)
    for step in (1, 2, 3, 4):
        log.add(stage="pretrain", step=step, loss=float(step))
    with open(tmp_path / "log.csv", "a") as file:
        file.write("pretrain,5,1.")                             # a kill in the middle of a row
    log = train.Log(str(tmp_path), "pretrain", 2)
    log.add(stage="pretrain", step=3, loss=7.0)
    assert [(row["step"], row["loss"]) for row in train.read_log(str(tmp_path))] == [("1", "1"), ("2", "2"), ("3", "7")]


def test_pass_at_1_counts_right_answers(monkeypatch):
    """A source that adds like the teacher and says nothing else."""
    solved = {}
    for i in range(9):
        for attempt in range(60):                               # whichever of these are asked
            d = TASKS["add"].levels[i % len(TASKS["add"].levels)] + attempt // 50
            problem = train.draw(TASKS["add"], f"eval {i} {attempt}", d, held_out=True)
            solved[problem.prompt] = TASKS["add"].solve(problem)
    monkeypatch.setattr(train, "Checkpoint", lambda *_: lambda prompts, *_: [solved.get(p, "no") for p in prompts])
    result = train.pass_at_1(None, BYTES, ["add", "sort"], problems=9, samples=4)
    assert result["tasks"] == {"add": 1.0, "sort": 0.0} and result["pass@1"] == 0.5 and result["problems"] == 18
    low, high = result["ci95"]
    assert low < 0.5 < high and 0.4 < high - low < 0.6
    assert train.pass_at_1(None, BYTES, ["add"], problems=9, samples=0)["problems"] == 0


# ---- test-time compute ----------------------------------------------------------------------------------------------

def test_votes_count_answers_and_never_their_absence():
    problem = train.Problem("add", 1, "47+85", {"a": 47, "b": 85})
    none = ["no form", "<think>", "<think></think>"]
    replies = [none * 2 + ["<think>x</think>132"], none, ["<think></think>131"] * 2 + ["<think></think>132"]]
    assert train.majority_rates([problem] * 3, replies).tolist() == [1, 0, 0]


class Parrot:
    """A source that solves every fourth single prompt (its tail then ends in `ok`), never two columns by the same wrong
    answer, and every aggregation prompt that shows it one `ok`."""

    def __init__(self, *_):
        self.calls = []

    def __call__(self, prompts, max_new_tokens, seed, progress=iter):
        self.calls.append((len(prompts), "|" in prompts[0]))
        texts = []
        for i, prompt in enumerate(prompts):
            problem, single = prompt.rpartition("|")[2], not prompt.startswith("|")
            columns = problem.removeprefix("find ").split(",")
            right = "".join(f"{c[2]}{-int(c[0]) % 10}" for c in columns)                    # (a + x) mod 10 = 0 < t
            if i % 4 == 0 if single else "ok" in prompt:
                texts.append(f"<think>{'far ' * 20}ok</think>{right}")
            else:
                texts.append(f"<think>no</think>{''.join(c[2] + '.' for c in columns)}")
        return texts


def test_test_time_compute_by_hand(monkeypatch):
    """Three tokens of tail show the `ok`; a quarter of the singles are right, the rest agree on nothing found."""
    eval_spec = train.Evaluation({"find": 3}, 5, rsa.Budget(8, 2, 1, 64, 3))
    parrot = Parrot()
    monkeypatch.setattr(train, "Checkpoint", lambda *_, **__: parrot)
    row = train.evaluate_ttc(None, BYTES, "find", eval_spec)
    assert row["problems"] == 5 and row["difficulty"] == 3 and row["single"] == 0.25
    assert row["maj@equal_tokens"] == 0                         # twelve of sixteen say that they found nothing
    curve = row["rounds"]["markovian_rsa"]
    assert curve[0] == 0.25 < curve[1] == row["markovian_rsa"]
    assert row["delethink"] < row["markovian_rsa"] == row["full_rsa"]           # one tail shows less than two
    assert len(row["rounds"]["delethink"]) == len(row["rounds"]["vote"]) == len(curve) == 2
    longest = row["longest_prompt"]
    assert longest["markovian_rsa"] < longest["full_rsa"] > 80                  # full RSA carries all of `far far …`
    assert row["tokens"]["vote"][1] == pytest.approx(2 * row["tokens"]["vote"][0]) and \
        row["tokens"]["markovian_rsa"][1] == row["generated_tokens"]
    for key in ("single", "maj@equal_tokens", "markovian_rsa", "markovian_rsa_majority", "full_rsa", "delethink"):
        assert 0 <= row[key + "_ci95"][0] <= row[key] <= row[key + "_ci95"][1] <= 1
    # Two rounds' worth of samples, which are everyone's first round, and one of aggregation each.
    assert [size for size, _ in parrot.calls] == [5 * 16] + [5 * 8] * 3
