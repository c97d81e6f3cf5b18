"""The lab's on-policy pages: equal samples and budgets, what a run reads, keeps and records."""
import pytest
import torch

import train
from lab import experiment, hints, measure, online, rolling, summary, world

ONLINE = {name: special for name, (special, _) in online.ARMS.items()}
HINTS = {name: stages[0] for name, stages in hints.ARMS.items()}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As the lab's workers run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own: nothing of the user's is read or written."""
    monkeypatch.setattr(experiment, "CACHE", tmp_path)


def prompts(count):
    return measure.encoded(world.prompts(world.build(0), 1, count))


class Judge:
    """A reward that remembers what it was asked."""

    def __init__(self):
        self.prompts = []

    def __call__(self, prompts, said, answers):
        self.prompts += prompts
        assert len(said) == len(answers) == len(prompts)
        return [float(i % 2) for i in range(len(said))]


def learned(special, steps=2):
    """(what the judge was asked, the adapters' B of the first layer) of a short run."""
    wanted = rolling.settings(special, 5e-3, 0.1, 1, steps)
    net, optimizer = rolling.fresh(wanted)
    judge = Judge()
    rolling.learn(net, optimizer, wanted, prompts(16), judge)
    return judge.prompts, net.model.layers[0].self_attn.q_proj.lora_B


@pytest.mark.parametrize("name", list(ONLINE))
def test_every_online_arm_moves_the_policy_and_sees_the_same_prompts_as_often(name):
    """Red: lab/rolling.py:learn: `step * wanted.batch_size` -> `0 * wanted.batch_size`
    Red: lab/rolling.py:learn: `range(wanted.updates if online else 1)` -> `range(0)`
    Red: lab/rolling.py:settings: `"group": 4` -> `"group": 3`"""
    seen, moved = learned(ONLINE[name])
    assert seen == [row.prompt for row in prompts(16) for _ in range(4)]
    assert moved.abs().max() > 0


@pytest.mark.parametrize("name", list(HINTS))
def test_every_arm_of_hints_moves_the_policy_and_sft_samples_nothing(name):
    """Red: lab/rolling.py:learn: `if online else [` -> `if not online else [`"""
    seen, moved = learned(HINTS[name])
    assert len(seen) == (0 if "sft" in name else 64)
    assert moved.abs().max() > 0


def test_arms_differ_in_their_loss_alone():
    """Red: lab/online.py: `"una_old": ({"loss": "una_online", ` -> `"una_old": ({"loss": "rloo", `
    Red: lab/hints.py: `"hints": (HINT | {"hint_weight": 0.0},)` -> `"hints": (HINT,)`"""
    assert {special["updates"] for special in ONLINE.values()} == {2}
    assert ONLINE["una_old"] == ONLINE["una_ref"] | {"anchor": "old"}
    assert HINTS["hints"] == HINTS["uft_hint"] | {"hint_weight": 0.0}
    assert {train.LOSSES[s["loss"]].online for s in ONLINE.values()} == {True}


@pytest.mark.parametrize(("page", "score"), [("online", "paid"), ("hints", "content")])
def test_every_arm_tried_as_many_settings_and_the_best_was_taken(page, score):
    """Red: lab/online.py: `(0.04, 0.35))}` -> `(0.04,))}`
    Red: lab/summary.py:load: `{name}.json` -> `scores.json`"""
    tuned = summary.load(page)["tuned"]
    assert len({len(betas) for _, betas in online.ARMS.values()}) == 1
    assert len({len(rows) for rows in tuned.values()}) == 1
    for rows in tuned.values():
        assert [r[score] for r in rows] == sorted((r[score] for r in rows), reverse=True)


def test_an_untrained_run_is_the_base(monkeypatch):
    """Red: lab/online.py:run: `STEPS * (name != "base")` -> `1`
    Red: lab/rolling.py:answered: `next_token_kl(net, base(), said).mean()` -> `torch.ones(())`"""
    monkeypatch.setattr(online, "reward_model", lambda: None)
    monkeypatch.setattr(online, "squashed", lambda prompts, said, answers: [0.5] * len(said))
    monkeypatch.setattr(rolling, "ASKED", 24)
    found = online.run("base", 1e-3, 0.1, 0, "test")
    assert found["kl_policy"] == pytest.approx(0, abs=1e-6) and found["reward"] == 0.5
    assert found["curve"] == [] and found["form"] < 0.2


def test_a_short_run_of_hints_is_measured_and_says_how_often_groups_differ(monkeypatch):
    """Red: lab/hints.py:run: `.std(1) > 0` -> `.std(1) > -1`
    Red: lab/rolling.py:answered: `/ len(said)}` -> `/ len(rows) ** 2}`"""
    monkeypatch.setattr(rolling, "ASKED", 24)
    monkeypatch.setattr(hints, "STEPS", 1)
    found = hints.run("grpo", 1e-3, 1, "validation")
    assert set(hints.COLUMNS) - {"cost"} < set(found)
    assert found["signal"] < 1 and found["reward"] == found["content"] <= found["form"]
    assert 3 < found["length"] <= 24


def test_a_run_that_is_kept_is_not_made_again(tmp_path):
    """Red: lab/rolling.py:kept: `if not path.exists():` -> `if True:`
    Red: lab/rolling.py:kept: `[page, version, ` -> `[page, `"""
    made = []

    def run(x):
        made.append(x)
        return {"x": x}

    for version in (1, 1, 2):
        assert rolling.kept((7,), version, "page", run, tmp_path) == {"x": 7}
    assert made == [7, 7]


def test_a_cost_is_that_of_the_same_seed_over_grpo_s():
    """Red: lab/rolling.py:costed: `r["seconds"] / s` -> `r["seconds"] / spent[0]`"""
    rows = rolling.costed({"grpo": [{"seconds": 2.0}, {"seconds": 4.0}],
                           "ppo": [{"seconds": 3.0}, {"seconds": 6.0}]})
    assert [r["cost"] for r in rows["ppo"]] == [1.5, 1.5]
