"""What a response earns: by a rule, by a user's function, by a reward model in its own words."""
import json
import math
import shutil
from dataclasses import replace

import folder
import numpy as np
import pytest
import test_train
import tiny
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

import config
import data
import heads
import lora
import losses
import model
import rewards
import scoring
import tokens
import train
import verifiers

ASKED = (("user", "How many?"),)


def settings(reward, **changes):
    return config.Config(model="m", data=("d",), loss="grpo", reward=str(reward), **changes)


@pytest.mark.parametrize(("response", "answer", "right"), [
    ("7 + 11 = 18\n#### 18", "9 * 2 = 18\n#### 18", True), ("####18", "x #### 18 ", True),
    ("#### 1,018", "#### 1018", True), ("#### 1018", "1,018", True), ("18", "#### 18", True),
    (" 18\n", "18", True), ("#### 1 #### 18", "18", True), ("1,234,567", "1234567", True),
    ("18.0", "18", False), ("#### 180", "#### 18", False), ("18 ####", "18", False),
    ("1,2345", "12345", False), ("a,b", "ab", False), ("", "18", False), ("blue", "blue", True)])
def test_exact_compares_what_follows_the_last_marks_without_blanks_and_commas(
        response, answer, right):
    """Of thousands only; without marks the whole text counts.
    Red: verifiers.py:final: `.rpartition("####")[2]` -> `.partition("####")[2]`
    Red: verifiers.py:final: `.strip()` -> ``
    Red: verifiers.py:final: `(?=\\d{3}(?!\\d))` -> `(?=\\d)`
    Red: verifiers.py:final: `(?<=\\d),` -> ` `"""
    found, = rewards.load(settings("exact"))([ASKED], [response], [answer])
    assert found == float(right)


def test_exact_without_an_answer_is_refused():
    """Else every empty response would be right.
    Red: verifiers.py:exact: `if not answer.strip():` -> `if False:`"""
    with pytest.raises(ValueError, match="exact .* no answer to compare with"):
        rewards.load(settings("exact"))([ASKED], [""], [""])


def test_a_users_function_is_given_the_last_turn_the_response_and_the_answer(tmp_path, monkeypatch):
    """It is found in the folder the command is given in; whatever is a real number will do.
    Red: verifiers.py:each: `prompt[-1][1], ` -> `prompt[0][1], `
    Red: verifiers.py:each: `out.append(float(earned))` -> `out.append(earned)`
    Red: verifiers.py:each: `isinstance(earned, Real)` -> `isinstance(earned, float)`"""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given_rule.py").write_text(
        "import json\ndef f(*given): return GAVE.append(given) or NEXT.pop()\nGAVE, NEXT = [], []\n"
        "class inner: pass\n", "utf-8")
    reward = rewards.load(settings("given_rule:f"))
    import given_rule
    given_rule.NEXT += [np.float32(0.5), -7, True]
    prompts = [(("user", "a"), ("assistant", "b"), ("user", f"c{i}")) for i in range(3)]
    found = reward(prompts, ["x", "y", "z"], ["1", "", "3"])
    assert given_rule.GAVE == [("c0", "x", "1"), ("c1", "y", ""), ("c2", "z", "3")]
    assert found == [1.0, -7.0, 0.5] and {type(r) for r in found} == {float}


@pytest.mark.parametrize(("gives", "told"), [
    (math.nan, "nan is what it gives"), (math.inf, "inf is what"), (None, "None is what it gives"),
    ("0.5", "'0.5' is what it gives"), ([1.0], "is what it gives"), (1j, "is what it gives"),
    (10**400, "fails on the response 'said': OverflowError"),
    (KeyError("k"), r"fails on the response 'said': KeyError\('k'\) \(.*test_rewards.py:\d+\)")])
def test_what_is_no_finite_number_is_refused_with_the_response(gives, told):
    """And what a function raises, with the line that did.
    Red: verifiers.py:each: `if not finite:` -> `if False:`
    Red: verifiers.py:each: `and math.isfinite(earned)` -> ``
    Red: verifiers.py:each: `except Exception as error` -> `except ValueError as error`
    Red: verifiers.py:each: `error.__traceback__)[-1]` -> `error.__traceback__)[0]`"""
    def rule(*_):
        if isinstance(gives, Exception):
            raise gives
        return gives

    with pytest.raises(ValueError, match=f"^--reward r:f.*{told}"):
        verifiers.each(rule, "r:f")([ASKED], ["said"], ["a"])


@pytest.mark.parametrize(("name", "told"), [
    ("exacct", "found 'exacct', expected exact, a folder, or"), ("runs/0001", "expected exact"),
    (".m:f", "expected exact"), ("a b:f", "expected exact"), (":f", "expected exact"),
    ("no_such_module:f", "no_such_module:f cannot be imported: ModuleNotFound"),
    ("math:no_such", "math:no_such cannot be imported: AttributeError"),
    ("math:pi", "math:pi is 3.14.*, which is no function"),
    ("spoiled_rule:f", "spoiled_rule:f cannot be imported: SyntaxError")])
def test_a_reward_that_cannot_be_found_is_named(name, told, tmp_path, monkeypatch):
    """Red: verifiers.py:found: `except Exception as error` -> `except ImportError as error`
    Red: verifiers.py:found: `if not callable(rule):` -> `if False:`
    Red: verifiers.py:found: `if not colon or not re` -> `if False and not re`"""
    (tmp_path / "spoiled_rule.py").write_text("def f(:\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^--reward.*{told}"):
        rewards.load(settings(name))


def other_words() -> Tokenizer:
    """A tokenizer that knows no merge, with other control tokens in another order."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=262, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(t, special=True) for t in (
            "<|im_end|>", "<|im_start|>", "</s>", "<s>", "<x>", "<y>")])
    made.train_from_iterator(["a"], trainer)
    return made


@pytest.fixture(scope="module")
def judge(tmp_path_factory, files):
    """A run of reward_model over a base with a tokenizer and a template of its own, whose head and
    adapters are random."""
    place = tmp_path_factory.mktemp("judge")
    base = folder.write_model(place / "base", seed=3)
    other_words().save(str(base / "tokenizer.json"))
    config_path = base / "generation_config.json"
    config_path.write_text(json.dumps({"bos_token_id": 3, "eos_token_id": 2}), "utf-8")
    out = test_train.run(base, files / "pairs.jsonl", place / "run", "--loss", "reward_model",
                         "--steps", "1", "--template", "chatml")
    net, generator = model.load(base, torch.float32), torch.Generator().manual_seed(0)
    lora.load(net, out / "adapter")
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
    net.score.weight.data.copy_(torch.randn(1, tiny.D, generator=generator))
    lora.save(net, out / "adapter", str(base))
    return out


def said(count=6):
    """(prompts, responses of all lengths, answers)."""
    return ([(("user", q),) for q, _ in folder.questions()[:count]],
            [a * i for i, (_, a) in enumerate(folder.questions()[:count])], [""] * count)


@pytest.mark.parametrize("place", ["run", "adapter"])
def test_a_reward_model_reads_the_text_in_its_own_tokens_and_template(judge, place):
    """Its score is that of rows encoded for its own training: ChatML and another tokenizer.
    Red: rewards.py:sources: `if (folder / "adapter").is_dir() else folder` -> ``
    Red: rewards.py:RewardModel.__init__: `"checkpoint", adapter)` -> `"plain")`
    Red: rewards.py:sources: `(base), inner` -> `(base), None`"""
    base, prompts = judge.parent / "base", said()[0]
    reward = rewards.load(settings(judge if place == "run" else judge / "adapter"))
    chat, net = tokens.Chat(base, "chatml"), model.load(base, torch.float32).eval()
    lora.load(net, judge / "adapter")
    rows = [tokens.encode(data.Example(p, r, 1.0, "scored", ""), chat, 128)
            for p, r, _ in zip(*said(), strict=True)]
    with torch.no_grad():
        expected = [scoring.judge(net, tokens.collate([row])).item() for row in rows]
        states = [net(torch.tensor([row.ids]))[0, -1] for row in rows]
    assert reward(*said()) == pytest.approx(expected, abs=1e-5)
    assert expected == pytest.approx([net.score.weight[0].dot(h).item() for h in states], abs=1e-5)
    assert len({round(x, 3) for x in expected}) == len(prompts)


def test_a_score_depends_on_no_neighbour_and_no_padding(judge):
    """Red: model.py:Transformer.end_states: `mask_BT.flip(1)` -> `mask_BT`
    Red: model.py:Transformer.end_states: `(last_B + 1,` -> `(0 * last_B + last_B.max(),`"""
    together = rewards.load(settings(judge))(*said())
    apart = rewards.load(settings(judge, micro_batch_tokens=1))(*said())
    alone = [rewards.load(settings(judge))(*([x] for x in one))[0] for one in zip(
        *said(), strict=True)]
    assert together == pytest.approx(apart, abs=1e-5) and alone == pytest.approx(apart, abs=1e-5)


def test_a_prompt_too_long_for_the_judge_is_cut_and_a_response_is_refused(judge):
    """Red: rewards.py:RewardModel.__call__: `self.longest, True)` -> `self.longest)`
    Red: rewards.py:RewardModel.__call__: `if lost:` -> `if False:`"""
    reward = rewards.load(settings(judge))
    assert len(reward([(("user", "a" * 300),)], ["b"], [""])) == 1
    with pytest.raises(ValueError, match="cannot read the response 'bbb.*--response_tokens"):
        reward([ASKED], ["b" * 300], [""])


def test_a_folder_without_a_score_head_is_no_reward_model(base, judge, tmp_path):
    """A model, and an adapter of another loss.
    Red: rewards.py:RewardModel.__init__: `if not hasattr(self.net, "score"):` -> `if False:`"""
    plain, silent = tmp_path / "plain", tmp_path / "silent"
    shutil.copytree(base, plain)
    shutil.copytree(judge / "adapter", silent / "adapter")
    shutil.copy(judge / "adapter/chat_template.jinja", plain)
    (silent / "adapter" / heads.FILE).unlink()
    for place in (plain, silent):
        with pytest.raises(ValueError, match=f"--reward {place}: it has no score head"):
            rewards.load(settings(place))


def test_every_file_of_a_reward_counts_as_an_input(judge):
    """Red: rewards.py:inputs: `(".json", ".jinja", ".safetensors")` -> `(".json", ".jinja")`
    Red: rewards.py:inputs: `if not name or name == "exact":` -> `if not name:`"""
    found = {name.removeprefix("reward file ") for name in rewards.inputs(str(judge))}
    assert {"base/model.safetensors", "base/tokenizer.json", "adapter/heads.safetensors",
            "adapter/adapter_model.safetensors", "adapter/chat_template.jinja"} <= found
    assert rewards.inputs("exact") == rewards.inputs("") == {}
    assert rewards.inputs("builtins:len") == {}  # it has no file
    verifiers.found("tiny:letters")
    assert [*rewards.inputs("tiny:letters")] == ["reward module tiny:letters"]


@pytest.mark.parametrize("centre", [0.0, 0.5])
def test_the_gradient_of_a_reward_model_through_its_head_is_the_closed_form(centre):
    """w . h: the mean over pairs of (s_w - 1)(h_w - h_l) + 2 c (r_w + r_l)(h_w + h_l).
    Red: objectives.py:scored: `(chosen + rejected).square()` -> `(chosen - rejected).square()`
    Red: objectives.py:scored: `(chosen, rejected) + centre` -> `(rejected, chosen) + centre`"""
    units, net = test_train.units_of("reward_model"), test_train.policy("reward_model")
    with torch.no_grad():
        h = [[net(torch.tensor([row.ids]))[0, -1] for row in unit] for unit in units]
    w = net.score.weight.detach()[0].clone()
    expected = sum(
        -torch.sigmoid(w @ (bad - good)) * (good - bad)
        + 2 * centre * (w @ (good + bad)) * (good + bad) for good, bad in h) / len(h)
    setup = test_train.settings("reward_model", center_rewards=centre, micro_batch_tokens=30)
    metrics, _ = test_train.step(net, units, setup)
    test_train.close(w - net.score.weight.detach()[0], expected)
    margins = [(w @ (good - bad)).item() for good, bad in h]
    assert metrics["rewards/margins"] == pytest.approx(sum(margins) / 6)
    assert metrics["rewards/accuracies"] == sum(m > 0 for m in margins) / 6


def test_a_reward_model_learns_an_easy_order_and_centring_pulls_its_scores_to_zero(
        base, files, tmp_path):
    """Answers before their mirror images: held-out pairs, 1/2 right before, 9/10 after.
    Red: evaluate.py:held_out: `[[scoring.judge(` -> `[[0 * scoring.judge(`
    Red: objectives.py:scored: `t.config.center_rewards *` -> `0 *`"""
    held = []
    for centre in ("0", "1"):
        out = test_train.run(
            base, files / "pairs.jsonl", tmp_path / centre, "--loss", "reward_model", "--steps",
            "30", "--held_out", "20", "--batch_size", "10", "--center_rewards", centre)
        held.append(json.loads((out / "results.json").read_text("utf-8"))["held_out"])
    assert held[0]["before"]["rewards/accuracies"] == 0.5 and held[0]["before"]["rewards/mean"] == 0
    assert held[0]["after"]["rewards/accuracies"] >= 0.9
    assert held[1]["after"]["rewards/accuracies"] >= 0.9
    assert abs(held[1]["after"]["rewards/mean"]) < abs(held[0]["after"]["rewards/mean"]) / 2


def test_bradley_terry_at_equal_scores_is_log_two():
    """Red: losses.py:reward_model: `-logsigmoid(chosen - rejected)` -> `-logsigmoid(chosen)`"""
    x = torch.tensor([3.0, -2.0], dtype=torch.float64)
    test_train.close(losses.reward_model(x, x), torch.full_like(x, math.log(2)))
    assert train.LOSSES["reward_model"].start(x, None) == math.log(2)


def test_una_online_is_given_the_sigmoid_of_a_score_unless_it_compares_rewards(judge):
    """Others, and `--una_target reward`, get the score.
    Red: rewards.py:RewardModel.__call__: `scores.sigmoid() if self.squashed` -> `scores if True`
    Red: rewards.py:RewardModel.__init__: `config.una_target == "score"` -> `True`"""
    raw = rewards.load(settings(judge))(*said())
    for target, expected in (("reward", raw), ("score", torch.tensor(raw).sigmoid().tolist())):
        setup = replace(settings(judge), loss="una_online", una_target=target)
        assert rewards.load(setup)(*said()) == pytest.approx(expected, abs=1e-6)


def test_a_reward_folder_that_cannot_be_judged_with_says_what_it_lacks(judge, tmp_path):
    """A run that has not ended; a base that is not here.
    Red: rewards.py:sources: `if inner == folder and` -> `if False and`
    Red: rewards.py:load: `f"--reward {name}: {error}"` -> `error`"""
    unfinished, moved = tmp_path / "unfinished", tmp_path / "moved"
    unfinished.mkdir()
    (unfinished / "metrics.jsonl").touch()
    shutil.copytree(judge / "adapter", moved)
    about = json.loads((moved / "adapter_config.json").read_text("utf-8"))
    (moved / "adapter_config.json").write_text(
        json.dumps(about | {"base_model_name_or_path": str(tmp_path / "gone")}), "utf-8")
    for place, told in ((unfinished, "has not ended"), (moved, "gone is not a model folder")):
        with pytest.raises(ValueError, match=f"{place}.*{told}"):
            rewards.load(settings(place))


def test_a_reward_model_adapts_no_head_that_it_never_reads(base):
    """Its gradient would be missing, as if something were broken.
    Red: train.py:adapted: `== "score" and "lm_head" in` -> `== "score" and "none" in`"""
    setup = config.Config(model=str(base), data=("d",), loss="reward_model", lora_r=2,
                          lora_targets=("q_proj", "lm_head"))
    with pytest.raises(ValueError, match="a reward model does not read lm_head"):
        train.adapted(setup, base)
    net, _ = train.adapted(replace(setup, loss="ppo"), base)
    assert "lm_head" in lora.adapters(net)
