"""Reinforcement learning's parts: formulas, rollouts and their replay, the actor's bookkeeping, the reward model."""
import io
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import kernels
import train
from conftest import randomise
from train import Actor, Group, LogisticBelief, Problem, RLStage
from zaya import PIDBalancer, Tokenizer, Zaya, ZayaConfig

BYTES = Tokenizer()
PROMPTS = [[65, 66, 67, 68, 69], list(range(70, 79)), [80, 81, 82]]
ADD = Problem("add", 1, "47+85", {"a": 47, "b": 85})


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def sharp_model(seed=0):
    """Small, with routers that tell tokens apart, and every parameter visible."""
    return randomise(Zaya(ZayaConfig.preset("smoke", vocab_size=BYTES.vocab_size)), seed)


@torch.no_grad()
def short_spoken(model):
    """The same, with an end token that comes after some ten tokens: it reads what all hidden states have in common."""
    model.input_hidden_states_bias += 1.0
    some = torch.arange(BYTES.vocab_size - 8).view(16, 16)
    direction = model.hidden_states(some).mean((0, 1))
    model.embed_tokens.weight[BYTES.end] = 5.5 * direction / direction.square().sum()
    return model


@torch.no_grad()
def perturb_routers(model, size=0.5):
    generator = torch.Generator().manual_seed(5)
    for layer in model.layers:
        for parameter in layer.gate.parameters():
            parameter += size * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return model


def roll(model, prompts=PROMPTS, group_size=4, context=24, end=-1, seed=1):
    uniform = torch.rand(context, len(prompts) * group_size, generator=torch.Generator().manual_seed(seed))
    groups, speaks = [Group(ADD, prompt) for prompt in prompts], SimpleNamespace(end=end, decode=BYTES.decode)
    for group, rolled in zip(groups, train.roll_out(model, prompts, group_size, context, [end], uniform=uniform)):
        for rollout in rolled:
            group.add(speaks, *rollout)
    return groups


def rollouts(groups):
    """(prompt, tokens, log probabilities, choices) of each."""
    return [(group.prompt, *rollout) for group in groups for rollout in zip(group.tokens, group.logps, group.choices)]


def collated(groups, advantage=1.0):
    return train.collate([(*rollout, advantage) for rollout in rollouts(groups)], BYTES.pad, "cpu")


# ---- formulas -------------------------------------------------------------------------------------------------------

def test_advantages_with_a_bonus_and_without_a_signal():
    """Their docstrings have the rest."""
    rewards = torch.tensor([[1., 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    bonus = torch.tensor([[0.05, 0, 0, 0], [0.1, -0.1, 0, 0], [0.5] * 4, [0.2, 0, 0, -0.2]])
    expected = torch.tensor([[3.2, -1, -1, -1], [1.2, 0.8, -1, -1], [0, 0, 0, 0], [0.2, 0, 0, -0.2]])
    assert torch.allclose(train.maxrl_advantage(rewards, bonus), expected, atol=1e-6)
    rewards = torch.tensor([[1., 3, 1, 3], [0, 0, 0, 8], [0.3] * 4])
    expected = torch.tensor([[-0.5, 1.5, -0.5, 1.5], [-1.5 / 12**0.5] * 3 + [6.5 / 12**0.5], [5000] * 4])
    assert torch.allclose(train.grpo_advantage(rewards, torch.full((3, 4), 0.5)), expected, rtol=1e-3)
    assert not train.has_signal([0, 0, 0]) and not train.has_signal([0.3, 0.3005]) and train.has_signal([0.3, 0.31])


@pytest.mark.parametrize("lengths, correct, best, expected", [
    ((10, 20, 30, 5), (1, 1, 1, 0), 0.75, (0.15, 0, -0.15, 0)),             # the short wrong one is no yardstick
    ((10, 11, 20, 15), (1, 1, 1, 1), 1.0, (0.2, 0.2, -0.2, 0)),             # 11 is within a tenth of 10
    ((10, 12, 20, 20), (1, 1, 1, 1), 1.0, (0.2, 0.12, -0.2, -0.2)),         # 12 is not
    ((10, 20, 5, 5), (1, 1, 0, 0), 0.55, (0.1, -0.1, 0, 0)),                # half solved: half the reward
    ((10, 20, 5, 5), (1, 1, 0, 0), 0.75, (0, 0, 0, 0)),                     # was better before: learn it first
    ((10, 20, 30, 40), (0, 1, 0, 0), 0.25, (0, 0, 0, 0)),                   # one alone is neither short nor long
])
def test_shorter_correct_rollouts_get_more(lengths, correct, best, expected):
    result = train.length_reward(tensor(*lengths), tensor(*correct), best, coefficient=0.4)
    assert torch.allclose(result, tensor(*expected), atol=1e-6)


def gradient(pi, mu, advantage, **more):
    logp = pi.log().requires_grad_()
    train.policy_loss(logp, mu.log(), advantage, **more).backward()
    return logp.grad


@pytest.mark.parametrize("pi, mu, advantage, more, expected", [
    ((0.05,), (0.001,), (1,), {}, (-20,)),                      # the ratio is capped: 50 without it …
    ((0.015,), (0.001,), (1,), {}, (-15,)),                     # … and carries no gradient
    ((0.7, 0.5, 0.7, 0.3), (0.5,) * 4, (1, 1, -1, -1), {}, (0, -1, 1.4, 0)),        # masked tokens teach nothing
    ((0.7,), (0.5,), (1,), {"delta": 0.25}, (-1.4,)),
    ((0.02, 0.59, 0.61, 0.41), (0.001, 0.5, 0.5, 0.5), (1, 1, 1, -1), {}, (-20, -1.18, 0, 0.82)),   # by the difference
])
def test_gradients_of_the_policy_loss(pi, mu, advantage, more, expected):
    assert torch.allclose(gradient(tensor(*pi), tensor(*mu), tensor(*advantage), rollouts=1, divisor=1, **more),
                          tensor(*expected))


def test_repetition_is_seen_in_any_piece_of_a_text():
    noise = "".join(random.choice("0123456789+-*=,;") for _ in range(2048))
    assert train.repetitive("7+5=12," * 100) and train.repetitive(noise + "a" * 2048)
    assert not train.repetitive(noise * 2) and not train.repetitive("") and not train.repetitive("a" * 40)
    assert not train.repetitive("\ud800" * 9)                   # no text stops a run


@pytest.mark.parametrize("middle, slope", [(3, 2.0), (6, 1.0), (10, 1.0)])
def test_the_belief_finds_the_middle(middle, slope):
    near = 0
    for seed in range(20):
        rng, belief = random.Random(seed), LogisticBelief()
        for _ in range(8):
            d = belief.propose(rng)
            right = sum(rng.random() < 1 / (1 + math.exp(-slope * (middle - d))) for _ in range(8))
            belief.update(d, right, 8 - right)
        near += abs(belief.middle() - middle) <= 1
    assert near >= 18


def test_proposals_are_spread_at_first_and_close_later():
    belief, rng = LogisticBelief(), random.Random(0)
    first = [belief.propose(rng) for _ in range(300)]
    assert min(first) == 1 and max(first) == 13 and len(set(first)) == 13 and np.std(first) > 3
    for d, right in ((2, 40), (5, 20), (8, 0)):
        belief.update(d, right, 40 - right)
    later = [belief.propose(rng) for _ in range(300)]
    assert np.std(later) < 0.8 and belief.middle() == 5
    for _ in range(1000):
        belief.update(1, 0, 10)                                 # hopeless: no overflow, and never below 1
    assert belief.middle() == belief.propose(rng) == 1 and np.isfinite(belief.weights()).all()


def test_bradley_terry_and_kl_by_hand():
    assert abs(train.bradley_terry_loss(tensor(1, 0), tensor(0, 0)) - (0.313262 + 0.693147) / 2) < 1e-5
    assert abs(train.bradley_terry_loss(tensor(-2), tensor(1)) - 3.048587) < 1e-5
    assert train.bradley_terry_loss(tensor(-200), tensor(200)) == 400           # and no overflow
    assert train.kl(tensor(-1, -2), tensor(-1, -2)) == 0
    assert abs(train.kl(tensor(0.5, 1).log(), tensor(0.25, 1).log()) - 0.193147 / 2) < 1e-6
    assert abs(train.kl(tensor(0.25).log(), tensor(0.5).log()) - (1 - math.log(2))) < 1e-6


# ---- rollouts -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def plain_forward(model, prompt, tokens, choices=None):
    """Log probabilities of `tokens` and all choices, without padding, cache or batch."""
    routing = [] if choices is None else [choice[None].long() for choice in choices]
    ids = torch.tensor([prompt + tokens])[:, :-1]
    hidden = model.hidden_states(ids, routing=routing)[0, len(prompt) - 1:]
    logp = model.logits(hidden).log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
    return logp, torch.stack(routing)[:, 0]


@pytest.mark.parametrize("context", [24, 90])                   # 90: more than the caches hold at first
@pytest.mark.parametrize("ends", [False, True])
def test_rollouts_are_what_a_plain_forward_says(context, ends):
    """Rows that leave the batch take their cache rows, positions and records with them."""
    model, used = sharp_model(), set()
    model = short_spoken(model) if ends else model
    groups = roll(model, group_size=8 if ends else 4, context=context, end=BYTES.end if ends else -1)
    for prompt, tokens, logps, choices in rollouts(groups):
        logp, choice = plain_forward(model, prompt, tokens)
        assert torch.allclose(logps, logp, atol=2e-5) and logps.dtype == torch.float32
        assert choices.shape == (2, len(prompt) + len(tokens) - 1) and torch.equal(choices.long(), choice)
        used |= set(choice.flatten().tolist())
    assert len(used) >= 4                                       # else equal choices would say nothing
    assert not ends or len({length for group in groups for length in group.lengths()}) > 8


def test_rollouts_fill_the_context_or_end():
    model = sharp_model()
    free = [tokens for _, tokens, *_ in rollouts(roll(model, group_size=8, context=30))]
    assert set(map(len, free)) == {30}
    flat = sum(free, [])
    end, ended = max(set(flat), key=flat.count), 0
    for before, (_, tokens, logps, _) in zip(free, rollouts(roll(model, group_size=8, context=30, end=end))):
        expected = before[:before.index(end) + 1] if end in before else before
        assert tokens == expected and len(logps) == len(tokens)     # others that ended change nothing
        ended += end in before
    assert 4 < ended


def test_a_rollout_may_end_at_once():
    model = sharp_model()
    tokens = roll(model)[0].tokens
    assert len(set(map(tuple, tokens))) == len(tokens)          # of a group each its own
    end = roll(model, PROMPTS[:1], 1)[0].tokens[0][0]
    group, = roll(model, PROMPTS[:1], 1, end=end)
    assert group.tokens == [[end]] and group.texts == [""] and group.choices[0].shape == (2, 5)


def test_temperature_is_one():
    """Of 2,000 first tokens each likely one comes as often as the model says."""
    model = sharp_model()
    first = torch.tensor([tokens[0] for tokens in roll(model, [PROMPTS[0]], 2000, context=1)[0].tokens])
    with torch.no_grad():
        p, likely = model(torch.tensor([PROMPTS[0]]))[0, -1].softmax(-1).topk(5)
    share = (first[:, None] == likely).float().mean(0)
    assert ((share - p).abs() < 4 * (p * (1 - p) / 2000).sqrt()).all()


# ---- replay ---------------------------------------------------------------------------------------------------------

def test_a_rollout_that_fills_up_a_batch_is_padding():
    """Of many processes each gets as many rows; what is missing counts in no loss and in no router's load."""
    rollout = [1, 2, 3], [4, 5], torch.zeros(2), torch.zeros(2, 4, dtype=torch.int16)
    _, targets, positions, _, logps, advantages = train.collate([(*rollout, 1.0), (*rollout, None)], 0, "cpu")
    assert (targets[1] == -100).all() and (positions[1] == -1).all() and positions[0].tolist() == [0, 1, 2, 3]
    assert len(logps) == len(advantages) == (targets >= 0).sum() == 2


def test_collate_by_hand():
    one = ([5, 6], [7, 8, 9], tensor(-1, -2, -3), torch.tensor([[1, 2, 3, 1]], dtype=torch.uint8), 0.5)
    two = ([4], [3], tensor(-4), torch.tensor([[2]], dtype=torch.uint8), -1.0)
    inputs, targets, positions, choices, logps, advantage = train.collate([one, two], 99, "cpu")
    assert inputs.tolist() == [[5, 6, 7, 8], [4, 99, 99, 99]]
    assert targets.tolist() == [[-100, 7, 8, 9], [3, -100, -100, -100]]
    assert positions.tolist() == [[0, 1, 2, 3], [0, -1, -1, -1]]
    assert len(choices) == 1 and choices[0].tolist()[0] == [1, 2, 3, 1] and choices[0][1, 0] == 2
    assert logps.tolist() == [-1, -2, -3, -4] and advantage.tolist() == [0.5, 0.5, 0.5, -1]


def test_what_c_samples_the_trainer_replays():
    """The sampler's log probabilities from the C decoder are the trainer's, through the experts that it recorded."""
    model = kernels.fuse(short_spoken(sharp_model()))
    library, why = kernels.decoding_in_c(model)
    if library is None:
        pytest.skip(why)
    groups = roll(model, group_size=8, context=60, end=BYTES.end)
    assert len({length for group in groups for length in group.lengths()}) > 8
    inputs, targets, positions, choices, sampled_logp, _ = collated(groups)
    logp = train.token_logps(model.train(), inputs, targets, positions, list(choices))
    assert torch.allclose(logp, sampled_logp, rtol=0, atol=1e-4)
    assert len(torch.stack(choices).unique()) >= 4              # else one expert would do for all


def test_the_replay_knows_more_than_256_experts():
    torch.manual_seed(0)
    model = Zaya(ZayaConfig.preset("smoke", vocab_size=BYTES.vocab_size, num_experts=300)).eval()
    for layer in model.layers:                                  # the last experts are the chosen ones
        layer.gate.balancing_biases[:-1] = torch.linspace(0, 1, 300)
    (_, tokens, logps, choices), = rollouts(roll(model, [PROMPTS[0]], 1, context=6))
    logp, choice = plain_forward(model, PROMPTS[0], tokens, choices)
    assert choices.min() > 255 and torch.equal(plain_forward(model, PROMPTS[0], tokens)[1], choices.long())
    assert torch.allclose(logps, logp, atol=2e-5) and torch.equal(choice, choices.long())


def test_other_weights_take_the_replayed_experts():
    model = sharp_model()
    rolled = roll(model)
    inputs, targets, positions, choices, *_ = collated(rolled)
    other, taken = perturb_routers(sharp_model()), []
    hooks = [layer.gate.register_forward_hook(lambda gate, given, out: taken.append(out[1])) for layer in other.layers]
    logp = train.token_logps(other, inputs, targets, positions, list(choices))
    assert all(torch.equal(a[positions >= 0], b[positions >= 0]) for a, b in zip(taken, choices))
    for hook in hooks:
        hook.remove()
    alone = [plain_forward(other, prompt, tokens, choice)[0] for prompt, tokens, _, choice in rollouts(rolled)]
    assert torch.allclose(logp, torch.cat(alone), atol=2e-5)
    with torch.no_grad():
        live = train.token_logps(other, inputs, targets, positions, [])
    assert (live - logp).abs().max() > 1e-2                     # its own router would have gone elsewhere
    logp.sum().backward()                                       # the expert is given, its weight is not: it learns
    for layer in other.layers:
        assert all(parameter.grad.abs().max() > 1e-6 for parameter in layer.gate.parameters())


def test_the_gap_is_zero_for_equal_weights_and_flips_for_others():
    model = sharp_model()
    batch = collated(roll(model))
    *inputs, choices, sampled, _ = batch
    flips, with_replay, without = train.replay_gap(model, batch)
    assert flips == 0 and abs(with_replay) < 1e-7 and abs(without) < 1e-7
    for routing in (list(choices), []):                         # and each token's ratio is one
        assert ((train.token_logps(model, *inputs, routing) - sampled).exp() - 1).abs().max() < 5e-5
    other = perturb_routers(sharp_model()).train()
    flips, with_replay, without = train.replay_gap(other, batch)
    assert 0 < flips < 1 and 0 < with_replay < without
    assert other.training and sum(layer.gate.load.sum() for layer in other.layers) == 0     # looking is no load
    real, other = inputs[2] >= 0, [choice.clone() for choice in choices]
    other[0][2, 3] = (other[0][2, 3] + 1) % 4                   # one of 2 layers' choices, of a real token
    other[1][~real] += 1                                        # padding's choices mean nothing
    flips, *_ = train.replay_gap(model, (*inputs, other, *batch[4:]))
    assert abs(flips - 1 / (2 * real.sum().item())) < 1e-6


# ---- the trainer ----------------------------------------------------------------------------------------------------

def step(model, groups, advantages, lr=1e-3, micro_batch=10**6):
    config = train.TrainConfig(preset="smoke")
    optimizers, balancer = train.make_optimizers(model, lr, momentum=0.0), PIDBalancer(model, 1e-4)
    batches = train.rl_batches(groups, torch.tensor(advantages), micro_batch, BYTES.pad, "cpu")
    lengths = [length for group in groups for length in group.lengths()]
    return train.rl_step(model, optimizers, balancer, batches, len(lengths), sum(lengths), config, torch.float32, lr)


def log_probabilities(model, groups):
    return [plain_forward(model, prompt, tokens, choice)[0].sum().item()
            for prompt, tokens, _, choice in rollouts(groups)]


def test_a_step_raises_the_good_and_lowers_the_bad():
    model = sharp_model()
    groups = roll(model, PROMPTS[:2], 2)
    before = log_probabilities(model, groups)
    advantages = [[1.0, -1.0], [-1.0, 1.0]]
    row = step(model, groups, advantages)
    change = np.array(log_probabilities(model, groups)) - before
    assert change[0] > 0 > change[1] and change[3] > 0 > change[2]
    expected = -(before[0] - before[1] - before[2] + before[3]) / 4 / 64        # on policy all ratios are 1
    assert abs(row["loss"] - expected) < 1e-5
    assert row["masked"] == row["flips"] == 0 and abs(row["kl"]) < 1e-7 and row["norm"] > 0 and row["load"] >= 1
    step(model, groups, advantages, lr=0.05)
    row = step(model, groups, advantages, lr=0.05)              # the weights have moved: now it is off policy
    assert row["kl"] > 1e-4 and row["flips"] > 0 and 0 < row["masked"] < 1


def test_a_step_replays_the_samplers_experts():
    """The loss by hand, for a trainer whose own routers would choose others."""
    groups, other = roll(sharp_model(), PROMPTS[:2], 2), perturb_routers(sharp_model(), 0.1)
    loss = {"replayed": 0.0, "live": 0.0}
    for group, sign in zip(groups, (1, -1)):
        for prompt, tokens, mu, choice in rollouts([group]):
            for kind, routing in (("replayed", choice), ("live", None)):
                logp, _ = plain_forward(other, prompt, tokens, routing)
                keep = (sign * (logp.exp() - mu.exp()) <= 0.1).float()
                loss[kind] -= (sign * (logp - mu).exp().clamp_max(20) * logp * keep).sum().item() / 4 / 64
    row = step(other, groups, [[1.0, 1.0], [-1.0, -1.0]])
    assert abs(row["loss"] - loss["replayed"]) < 1e-4 < 1e-3 < abs(loss["live"] - loss["replayed"])
    assert row["flips"] > 0


def test_every_row_of_a_step_keeps_its_own_advantage():
    """Rollouts are sorted by length into micro-batches of any size: the update is the same."""
    start = short_spoken(sharp_model())
    groups = roll(start, PROMPTS, 4, context=40, end=BYTES.end)
    advantages = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).tolist()
    before = log_probabilities(start, groups)
    rows = [step(short_spoken(sharp_model()), groups, advantages, micro_batch=size) for size in (10**6, 45, 8)]
    expected = -np.dot(np.ravel(advantages), before) / 12 / 64
    assert all(abs(row["loss"] - expected) < 1e-5 for row in rows)
    assert all(abs(rows[0]["norm"] - row["norm"]) < 1e-4 for row in rows)    # 8: every rollout is longer, and alone


# ---- the actor ------------------------------------------------------------------------------------------------------

def tiny_stage(**changes):
    usual = dict(steps=4, context=48, rope_theta=1e4, lr=1e-3, lr_end=1e-4, tasks=("add", "sort", "falsify"), groups=2,
                 group_size=4, learned=4)
    return RLStage(**{**usual, **changes})


def said(text, end=True):
    """The rollout of a model that says this."""
    tokens = BYTES.render([{"role": "assistant", "content": text}])[0][1:]
    tokens = tokens if end else tokens[:-1]
    return tokens, torch.zeros(len(tokens)), torch.zeros(2, len(tokens), dtype=torch.int16)


def say(group, text, end=True):
    group.add(BYTES, *said(text, end))


@pytest.fixture
def talk(monkeypatch):
    """Rollouts from a list of texts instead of a model."""
    texts = ["<think>one</think>1", "<think>two</think>2", "<think>three</think>3", "no form"]

    def roll_out(model, prompts, group_size, *_, **__):
        return [[said(texts[i % len(texts)]) for i in range(group_size)] for _ in prompts]
    monkeypatch.setattr(train, "roll_out", roll_out)


def first_half(group):
    return [float(i < len(group.texts) // 2) for i in range(len(group.texts))]


def make_actor(score=first_half, seed="s", **changes):
    model = Zaya(ZayaConfig.preset("smoke", vocab_size=BYTES.vocab_size))
    return Actor(model, BYTES, tiny_stage(**changes), seed, score)


def test_only_ended_unrepetitive_right_answers_are_rewarded(monkeypatch):
    texts = ["<think>x</think>132", "<think>x</think>132", "<think>x</think>131", "132",
             "<think>" + "7+5=12," * 400 + "</think>132", "<think></think>132"]
    rolled = [said(text, end=i != 1) for i, text in enumerate(texts)]
    monkeypatch.setattr(train, "roll_out", lambda *_, **__: [rolled])
    group, = make_actor(score=train.verifier_rewards).sample([Group(ADD, [65])], 6)
    assert group.rewards == [1, 0, 0, 0, 0, 1]


def test_the_least_sampled_environment_is_asked_its_next_level(talk):
    actor, levels = make_actor(context=300), train.TASKS["sort"].levels
    rounds = [[group.problem for group in actor.generate()] for _ in range(6)]
    assert [problem.task for problem in sum(rounds[:2], [])] == ["add", "sort", "falsify"] * 2 + ["add", "sort"]
    problems = [problem for problem in sum(rounds, []) if problem.task == "sort"]
    assert [problem.difficulty for problem in problems] == [levels[i % len(levels)] for i in range(8)]
    assert not any(train.is_held_out(problem) for problem in problems) and len({p.prompt for p in problems}) > 5
    actor.asked["falsify"] = 0
    assert [group.problem.task for group in actor.generate()] == ["falsify"] * 4


def test_the_buffer_gives_the_oldest_and_drops_the_stale(talk):
    actor = make_actor()
    taken, generated = actor.take(0)
    assert len(generated) == 4 and len(actor.buffer) == 2 and [id(g) for g in taken] == [id(g) for g in generated[:2]]
    again, more = actor.take(1)
    assert more == [] and [id(g) for g in again] == [id(g) for g in generated[2:]]
    actor.sync(actor.sampler, 2)
    actor.take(2)
    kept = list(actor.buffer)
    taken, generated = actor.take(4)                            # two versions old: not stale yet
    assert generated == [] and [id(g) for g in taken] == [id(g) for g in kept] and {g.version for g in taken} == {2}
    actor.take(4)
    actor.sync(actor.sampler, 5)
    assert {group.version for group in actor.buffer} == {2}
    taken, generated = actor.take(5)
    assert {group.version for group in taken + actor.buffer} == {5} and len(generated) == 4


def test_groups_without_signal_are_replaced_for_three_rounds_at_most(talk):
    actor = make_actor(score=lambda group: [1.0] * 4)
    taken, generated = actor.take(0)
    assert taken == [] and len(generated) == 4 + 5 + 7          # a round asks for more as fewer groups were of use
    actor = make_actor(score=lambda group: [1.0, 1.0, 1.0, float(group.problem.task != "add")])
    taken, generated = actor.take(0)
    assert [group.problem.task for group in taken] == ["add", "add"]


def test_the_sampler_lags_until_it_is_synced(talk):
    model = sharp_model()
    actor = Actor(model, BYTES, tiny_stage(), "s")
    with torch.no_grad():
        model.norm.weight += 1
    assert not torch.equal(actor.sampler.norm.weight, model.norm.weight)
    actor.sync(model, 7)
    assert torch.equal(actor.sampler.norm.weight, model.norm.weight)
    assert {group.version for group in actor.generate()} == {7}


def describe(groups):
    return [(g.problem, g.prompt, g.version, g.tokens, g.texts, g.ended, g.rewards, torch.cat(g.logps).tolist(),
             torch.cat(g.choices, 1).tolist()) for g in groups]


def test_an_actor_goes_on_where_it_stopped():
    """Through a file, and into an actor that was made from other weights."""
    changes = dict(aggregation=0.5, tail=4, context=64, adaptive=True, tasks=("add", "find"))
    one = Actor(short_spoken(sharp_model()), BYTES, tiny_stage(**changes), "s", first_half)
    one.take(0)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = Actor(sharp_model(seed=9), BYTES, tiny_stage(**changes), "s", first_half)
    two.load_state_dict(torch.load(file, weights_only=True))
    assert one.pool and one.pool == two.pool and one.buffer
    for version in (1, 2, 3):
        a, b = one.take(version), two.take(version)
        assert describe(a[0]) == describe(b[0]) and describe(a[1]) == describe(b[1])
    assert all(getattr(one, name) == getattr(two, name) for name in Actor.STATE) and one.rounds > 1


def test_aggregation_prompts_come_at_their_share(talk):
    actor, rng = make_actor(aggregation=0.3, context=300), random.Random(0)
    assert train.prompt_ids(BYTES, ADD.prompt) != actor.draw_prompt(rng).prompt     # an empty pool: an ordinary problem
    actor.pool = [(ADD, ["t1", "t2", "t3", "t4", "t5"]), (ADD, ["u"])]
    before = sum(actor.asked.values())
    texts = [BYTES.decode(actor.draw_prompt(rng).prompt) for _ in range(500)]
    asked = [text for text in texts if text.startswith("<|user|>|")]
    assert 0.23 < len(asked) / 500 < 0.37
    assert all(text.endswith("|47+85<|end|><|assistant|>") for text in asked)
    assert "<|user|>|u|47+85<|end|><|assistant|>" in asked and {text.count("|t") for text in asked} == {0, 4}
    assert sum(actor.asked.values()) - before == 500 - len(asked)
    actor.stage.aggregation = 0.0
    assert not any(BYTES.decode(actor.draw_prompt(rng).prompt).startswith("<|user|>|") for _ in range(50))


def test_the_pool_holds_tails_of_what_is_not_solved_yet(talk):
    actor = make_actor(aggregation=1e-9, tail=3, tasks=("find", "synthesize"))
    groups = actor.generate()
    assert actor.pool == [(group.problem, ["one", "two", "ree", "orm"]) for group in groups]
    actor.score = lambda group: [1.0] * 4                       # all right: nothing to improve
    actor.generate()
    assert len(actor.pool) == 4
    actor.score = first_half
    for _ in range(20):
        last = actor.generate()
    assert len(actor.pool) == actor.pool_size and actor.pool[-1][0] == last[-1].problem
    for changes in (dict(aggregation=0.0, tasks=("find",)), dict(aggregation=0.5, tasks=("add",))):    # add reads none
        actor = make_actor(**changes)
        actor.generate()
        assert actor.pool == []


def test_adaptive_difficulty_follows_the_solve_rate(talk):
    actor = make_actor(score=lambda group: [1.0] * 4, tasks=("add",), adaptive=True, context=100)
    asked = [{group.problem.difficulty for group in actor.generate()} for _ in range(4)]
    assert asked == [{1}, {2}, {3}, {4}]                        # one level a round: the round's others were easier
    actor.score = first_half
    assert actor.generate() and actor.difficulty["add"] == 5 and actor.best(Group(ADD, [], level=4)) == 1
    actor.score = lambda group: [0.0] * 4
    assert actor.generate() and actor.difficulty["add"] < 5
    short = make_actor(score=lambda group: [1.0] * 4, tasks=("add",), adaptive=True, context=48)
    for _ in range(9):
        short.generate()
    assert short.difficulty["add"] == 7                         # "<think>0+5+0=05,…</think>12345" has 50 tokens at 8
    still = make_actor(score=lambda group: [1.0] * 4, tasks=("add",))
    assert still.generate() and still.difficulty["add"] == 1


def test_the_start_is_where_half_passes(talk):
    def score(group):
        if group.problem.task == "sort":
            return [0.0] * 8
        return [float(group.problem.difficulty <= 6)] * 8       # passes up to 6, fails from 7 on
    actor = make_actor(score=score, tasks=("add", "sort"), adaptive=True, context=300)
    actor.init_difficulty()
    assert actor.difficulty["add"] in (5, 6, 7, 8) and actor.difficulty["sort"] <= 2


# ---- the reward model -----------------------------------------------------------------------------------------------

def test_preferences_are_about_warm_words():
    assert train.warmth("dear kind sun!") == train.warmth("love love.") == 2 and train.warmth("endear kindly") == 0
    prompts, obedient = {}, []
    for held_out in (False, True):
        rng = random.Random(0)
        pairs = [train.preference_pair(rng, held_out) for _ in range(150)]
        prompts[held_out] = {problem.prompt for problem, *_ in pairs}
        for problem, better, worse in pairs:
            assert train.warmth(train.split_answer(better)) > train.warmth(train.split_answer(worse))
            assert train.is_held_out(problem) == held_out
            obedient.append(train.TASKS["constraints"].verify(problem, better)[0])
    assert prompts[True] and not prompts[True] & prompts[False]
    assert 0.3 < np.mean(obedient) < 0.7                        # warm words please, obedient or not: hence the gate


def test_a_score_does_not_depend_on_padding():
    scorer = train.RewardModel(sharp_model()).eval()
    torch.nn.init.normal_(scorer.head.weight)
    conversations = [[65, 66, 67], list(range(70, 90)), [91]]
    with torch.no_grad():
        together = scorer(conversations)
        alone = torch.cat([scorer([ids]) for ids in conversations])
        last = scorer.backbone.hidden_states(torch.tensor([conversations[0]]))[0, -1]
    assert together.shape == (3,) and torch.allclose(together, alone, atol=1e-4) and alone.std() > 0.1
    assert torch.allclose(alone[0], scorer.head(last)[0], atol=1e-4)            # of the last token


def test_a_reward_model_starts_without_an_opinion_and_learns_apart_from_the_policy():
    torch.manual_seed(0)
    model = Zaya(ZayaConfig.preset("smoke", vocab_size=BYTES.vocab_size))
    before, scorer = [tensor.clone() for tensor in model.state_dict().values()], train.RewardModel(model)
    assert scorer([[65], [66, 67]]).tolist() == [0, 0]
    agreement = train.train_reward_model(scorer, BYTES, 20, 1e-2, seed=0, pairs=8)
    assert 0.55 < agreement <= 1 and not scorer.training
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values()))


def test_the_gate_kills_the_score():
    asked = train.Problem("constraints", 1, "write 2 words,has sun", {"rules": {"count": 2, "has": "sun"}})

    def score(conversations):
        assert BYTES.decode(conversations[0]) == \
            "<|user|>write 2 words,has sun<|end|><|assistant|><think></think>sun map<|end|>"
        return tensor(2, 5, -1)
    group = Group(asked, [], texts=["<think></think>sun map", "<think></think>sun", "<think></think>map sun"])
    scores = train.GatedReward(score, BYTES)(group)
    assert np.allclose(scores, [0.880797, 0, 0.268941], atol=1e-5) and scores[1] == 0
    # Other tasks have no use for a score.
    assert train.GatedReward(score, BYTES)(Group(ADD, [], texts=["<think></think>132", "132"])) == [1, 0]
    scores = train.GatedReward(score, BYTES, gate=lambda group: [0, 1, 0])(group)
    assert np.allclose(scores, [0, 0.993307, 0], atol=1e-5)
