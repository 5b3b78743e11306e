"""What the evidence rests on: the intervals, the verdicts, the drills, and the arms that stand beside ZAYA1's parts."""
import dataclasses
import doctest
import json
import os
import sys

import numpy as np
import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, os.path.join(ROOT, "notebooks", "experiments"))

import arms  # noqa: E402
import cca  # noqa: E402
import evidence  # noqa: E402
import residual_scaling  # noqa: E402
import rl_parts  # noqa: E402
import router  # noqa: E402
from zaya import CCA, Zaya, ZayaConfig  # noqa: E402


@pytest.mark.parametrize("module", [arms, router], ids=lambda module: module.__name__)
def test_examples_in_docstrings(module):
    tested = doctest.testmod(module)
    assert tested.attempted and not tested.failed


def store(folder, losses, other):
    """Results of an experiment: arms a and b, a loss for each seed."""
    for seed, pair in enumerate(zip(losses, other)):
        rows = {name: {"held out": {"text": loss}} for name, loss in zip("ab", pair)}
        os.makedirs(folder / "made", exist_ok=True)
        (folder / "made" / f"seed-{seed}.json").write_text(json.dumps({"seed": seed, "arms": rows}))


@pytest.mark.parametrize("losses, verdict", [
    ([1.0, 1.1, 0.9], "reproduced"), ([3.0, 3.1, 2.9], "not at this scale: the opposite"),
    ([1.0, 3.2, 2.0], "not at this scale")])
def test_a_verdict_follows_from_the_seeds(tmp_path, monkeypatch, losses, verdict):
    """The claim: a's loss is lower than b's, which is 2 in each seed."""
    store(tmp_path, losses, [2.0, 2.0, 2.0])
    monkeypatch.setattr(arms, "RESULTS", str(tmp_path))
    found = evidence.row("lower", "0.1", "02_cca", "made", [("loss", "a", "b")])
    assert found[4] == f"**{verdict}**" and found[3] == 3 and f"{np.mean(losses) - 2:+.3f}" in found[2]


def test_half_of_the_effects_are_partly(tmp_path, monkeypatch):
    store(tmp_path, [1.0, 1.1, 0.9], [2.0, 2.0, 2.0])
    monkeypatch.setattr(arms, "RESULTS", str(tmp_path))
    assert evidence.row("", "", "", "made", [("loss", "a", "b"), ("loss", "b", "a")])[4].startswith("**partly")


def test_an_experiment_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(arms, "RESULTS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["made.py", "--seeds", "2"])
    measured = []

    def measure(setting, arm, rows):
        if len(measured) == 3:
            raise KeyboardInterrupt
        measured.append((setting, arm))
        return {"held out": {"text": 1.0}}

    given = ("about", "made", lambda seed, steps: seed, measure, {"a": None, "b": "a"}, {"loss": (arms.loss, ".1f")}, 5)
    with pytest.raises(KeyboardInterrupt):
        arms.main(*given)
    stopped, measured[:] = list(measured), []
    arms.main(*given)
    assert stopped == [(0, "a"), (0, "b"), (1, "a")] and measured == [(1, "b")]
    stored = json.loads((tmp_path / "made" / "seed-1.json").read_text())
    assert stored["arithmetic"] == torch.backends.cpu.get_cpu_capability().lower()
    assert list(stored["arms"]) == ["a", "b"]
    assert "| b | 1.0 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", cca.DRILLS)
def test_a_drills_answers_follow_from_what_stands_before(name):
    for index in range(20):
        ids, marks = cca.Drill(name, 0).get(index, held_out=False)
        assert len(ids) == len(marks) <= cca.DRILL_STAGE.context and ids != cca.Drill(name, 0).get(index, True)[0]
        answers = [i for i, mark in enumerate(marks) if mark]
        if name == "copy":
            assert [ids[i] for i in answers] == ids[:8] and len(answers) == 8
            continue
        leads_to, hops = dict(zip(ids[0:18:3], ids[1:18:3])), int(name[0])
        for i in answers:
            found = ids[i - hops - 1]
            for _ in range(hops):
                found = leads_to[found]
            assert ids[i - hops:i] == [2] * hops and ids[i] == found
        assert len(answers) == 6


def test_the_drills_train(monkeypatch):
    monkeypatch.setattr(cca, "DRILL_STAGE", dataclasses.replace(cca.DRILL_STAGE, steps=2))
    found = cca.drill("canon", arms.train.parse_arguments(["--preset", "smoke"])[0])
    assert list(found) == list(cca.DRILLS) and all(0 <= share < 0.5 for share in found.values())


@torch.no_grad()
@pytest.mark.parametrize("kind", cca.ARMS)
def test_an_attention_arm_is_causal_and_keeps_samples_apart(kind):
    torch.manual_seed(0)
    attention, x = cca.attention(kind, 128, 16), torch.randn(1, 12, 128)
    alone = [attention(part, CCA.positions(part, None, 1e4, 8)) for part in x.split([5, 7], 1)]
    position_ids = torch.cat([torch.arange(5), torch.arange(7)])[None]
    packed = attention(x, CCA.positions(x, position_ids, 1e4, 8))
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-4)
    x[0, 8:] += 1
    later = attention(x, CCA.positions(x, position_ids, 1e4, 8))
    torch.testing.assert_close(later[:, :8], packed[:, :8], atol=1e-5, rtol=1e-4)


def test_the_attention_arms_have_equal_parameters():
    shape = ZayaConfig.preset("smoke", **cca.SHAPE)
    sizes = [cca.build(kind, shape, 0).parameter_counts()["total"] for kind in cca.ARMS]
    assert max(sizes) / min(sizes) < 1.005


def test_what_is_kept_is_the_product_of_the_scales():
    model = Zaya(ZayaConfig.preset("smoke"))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, residual_scaling.ResidualScaling):
                module.residual_scale.fill_(0.5)
    assert residual_scaling.kept(model) == pytest.approx(0.5 ** (2 * model.config.num_hidden_layers))


def test_the_masks_agree_where_nothing_has_moved():
    """At pi = mu both keep all; far above 1 both drop what the advantage would push on, and only that."""
    mu = torch.full((2,), 0.1)
    pushed = torch.tensor([1.0, -1.0])
    assert rl_parts.ppo_mask(mu, mu, pushed).all()
    assert rl_parts.ppo_mask(3 * mu, mu, pushed).tolist() == [False, True]
    assert rl_parts.ppo_mask(mu / 3, mu, pushed).tolist() == [True, False]
