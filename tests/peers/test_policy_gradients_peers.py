"""Rollout losses against TRL 1.16, reward models against TRL, transformers and peft.

RLOO and GRPO run from rewards to loss in TRL's installed code: `_generate_and_score_completions`
and `_compute_loss` of a stub trainer, whose model, sampler and reward are given tensors. Here the
same numbers go through rollouts.credit and objectives.LOSSES, summed as train.train_step does.
TRL 1.16 has no PPO trainer: PPO is checked against loops written here from its definition, and
that is no code of TRL's.

    python -m pytest tests/peers/test_policy_gradients_peers.py
"""
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from test_lora_peers import families, logits, randomise
from test_losses_peers import random, same, stub
from test_model_peers import float64_islands, ids, near, peer, random_peer
from transformers import AutoConfig, AutoModelForSequenceClassification
from trl import GRPOTrainer, RewardTrainer, RLOOTrainer

import heads
import lora
import merging
import model
import objectives
import rollouts
import scoring
import tokens
from config import Config

P, G, T, CLIP = 3, 3, 6, 0.2
B = P * G  # 9 / 8 is exact in float32, in which TRL's nanstd computes n / (n - 1)
LENGTHS = torch.tensor([3, 1, 5, 2, 4, 6, 1, 6, 4])  # of the responses
MASK = torch.arange(T) < LENGTHS[:, None]
REWARDS = torch.tensor([1, 0, 0.5, 2, -1, 0, 1, 3, -2], dtype=torch.float64)
INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages",
          "old_logps", "old_per_token_logps", "ref_per_token_logps")  # one row per response


def settings(**changes) -> SimpleNamespace:
    """A Config that may also have a beta of 0."""
    return SimpleNamespace(**vars(Config("base", ("file",), clip=CLIP, group=G)) | changes)


def tables(spread):
    """log-probs of policy, sampler and reference, (B, T): arbitrary numbers behind a response."""
    now = -random(B, T, seed=1).abs()
    old, ref = now + spread * random(B, T, seed=2), now + 0.3 * random(B, T, seed=3)
    return now.requires_grad_(), old, ref


def trl_trainer(trainer_class, now, old, ref, **attributes):
    """A TRL trainer that samples nothing: G responses of LENGTHS tokens, which earn REWARDS."""
    policy, reference = SimpleNamespace(training=True, is_gradient_checkpointing=False), object()
    said = [[5] * n for n in LENGTHS.tolist()]
    drawn = ([[7]] * B, said, None, said, None, {}, None, None)
    passes, zeros = {id(policy): old, id(reference): ref}, torch.zeros_like(old)
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x, process_index=0, num_processes=1)
    args = SimpleNamespace(
        per_device_train_batch_size=B, gradient_checkpointing_kwargs=None, delta=None,
        use_bias_correction_kl=False, steps_per_generation=1, gradient_accumulation_steps=1)
    return stub(trainer_class, **{
        "model": policy, "ref_model": reference, "accelerator": accelerator, "args": args,
        "_generate": lambda _: drawn if trainer_class is GRPOTrainer else (drawn[0], said, said),
        "_get_per_token_logps_and_entropies": lambda net, *_, **__: (
            passes.get(id(net), now), zeros, None),
        "_calculate_rewards": lambda *_: REWARDS[:, None], "reward_weights": torch.ones(1).double(),
        "reward_func_names": ["reward"], "reward_funcs": [None], "reward_clip_range": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0), "pad_to_multiple_of": None,
        "_logs": defaultdict(list) | {"rewards": defaultdict(list)}, "_pending_extra_logs": {},
        "_pending_metrics": {}, "log_multimodal": False, "mask_truncated_completions": False,
        "num_generations": G, "num_iterations": 2, "tools": None, "environments": None,
        "environment_factories": None, "use_vllm": False, "normalize_advantages": False,
        "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group",
        "epsilon_low": CLIP, "epsilon_high": CLIP, "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None, "importance_sampling_level": "token",
        "max_completion_length": 9, "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False} | attributes)


def cuts(count):
    """The rows of each of `count` micro-batches."""
    return torch.arange(B).chunk(count)


def trl_parts(trainer_class, now, old, ref, count, **attributes):
    """(TRL's loss of each micro-batch, its advantages), from rewards on."""
    trainer = trl_trainer(trainer_class, now, old, ref, **attributes)
    trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = count
    trainer.current_gradient_accumulation_steps = count
    made = trainer._generate_and_score_completions([{"prompt": "p"}] * B)
    parts = []
    for rows in cuts(count):
        trainer._get_per_token_logps_and_entropies = (
            lambda *_, part=now[rows], **__: (part, torch.zeros_like(part), None))
        batch = {n: x[rows] if n in INPUTS else x for n, x in made.items()}
        parts.append(trainer._compute_loss(None, batch))
    return parts, made["advantages"]


def our_parts(now, old, ref, count, config, tokens_per_row=None):
    """(our sum over the rows of each micro-batch, our advantages (B, T)), from rewards on."""
    old, ref, zeros = old * MASK, ref * MASK, torch.zeros(B, T).double()
    advantages, _ = rollouts.credit(REWARDS, old, ref, zeros, MASK, config)
    tokens_per_row, parts = tokens_per_row or LENGTHS.double().mean().item(), []
    for rows in cuts(count):
        sampled = tokens.Sampled(*(x[rows] for x in (old, ref, advantages, zeros, zeros, zeros)))
        logps = (now * MASK)[rows]
        parts.append(objectives.LOSSES[config.loss].loss(objectives.Terms(
            logps.sum(-1), None, logps, MASK[rows], None, sampled, REWARDS[rows],
            ["sampled"] * len(rows), torch.zeros(()), tokens_per_row, config)).sum())
    return parts, advantages


def clipped(ratio, advantages):
    """How many ratios are held from above, held from below, and free."""
    high = ((ratio > 1 + CLIP) & (advantages > 0)).sum()
    low = ((ratio < 1 - CLIP) & (advantages < 0)).sum()
    return min(high, low, ratio.numel() - high - low)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 3])
def test_rloo_is_that_of_trl_from_rewards_to_gradient(beta, count):
    """Leave-one-out advantages of r - beta k1, one clipped ratio a response, in float64: 1e-12.

    TRL returns the mean of a micro-batch, which its base class divides by their number.
    Red: policy_gradients.py:rloo_advantages: `rewards_PG.shape[1] - 1` -> `rewards_PG.shape[1]`
    Red: policy_gradients.py:ppo_clip: `ratio.clamp(1 - clip, 1 + clip)` -> `ratio`
    Red: rollouts.py:credit: `earned_B - config.beta * k1.sum(-1)` -> `earned_B`
    Red: objectives.py:rloo: ` / t.mask.sum(-1), t` -> `, t`
    """
    now, old, ref = tables(0.5)
    theirs, advantages = trl_parts(RLOOTrainer, now, old, ref, count, beta=beta)
    ours, mine = our_parts(now, old, ref, count, settings(loss="rloo", beta=beta))
    near(mine, advantages[:, None] * MASK, 1e-12)
    assert clipped((((now - old) * MASK).sum(-1)).exp(), advantages) > 0
    same(sum(theirs) / count, sum(ours) / B, now)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("theirs, ours", [
    ("grpo", "row"), ("dapo", "batch"), ("dr_grpo", "constant")])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_is_that_of_trl_from_rewards_to_gradient(theirs, ours, scale, count, beta):
    """Advantages by three scales, clipped ratios, k3, three lengths, in float64: 1e-12.

    However the step is cut: dapo divides by the tokens of all its micro-batches, as ours does.
    Red: policy_gradients.py:grpo_advantages: `rewards_PG.std()` -> `centred.std()`
    Red: policy_gradients.py:grpo_advantages: `return centred / (std + eps)` -> `return centred`
    Red: policy_gradients.py:grpo_advantages: `if scale == "none"` -> `if False`
    Red: policy_gradients.py:ppo_clip: `ratio.clamp(1 - clip, 1 + clip)` -> `ratio`
    Red: policy_gradients.py:kl: `torch.expm1(-d) + d` -> `torch.expm1(d) - d`
    Red: policy_gradients.py:grpo: `beta * kl(` -> `kl(`
    Red: objectives.py:length: `"row": drawn` -> `"row": t.tokens_per_row`
    Red: objectives.py:length: `"batch": t.tokens_per_row` -> `"batch": drawn`
    Red: objectives.py:length: `t.config.response_tokens` -> `t.tokens_per_row`
    """
    now, old, ref = tables(0.3)
    parts, advantages = trl_parts(GRPOTrainer, now, old, ref, count, beta=beta, loss_type=theirs,
                                  scale_rewards=scale)
    config = settings(loss="grpo", beta=beta, grpo_length=ours, grpo_scale=scale,
                      response_tokens=9)
    mine, own = our_parts(now, old, ref, count, config)
    near(own, advantages[:, None] * MASK, 1e-12)
    assert clipped((now - old).exp()[MASK], own[MASK]) > 0
    same(sum(parts), sum(mine) / B, now)


def test_bnpo_of_trl_is_a_step_of_its_own_for_each_micro_batch():
    """bnpo divides by the tokens of a micro-batch, so that their cut moves its gradient: it is the
    mean of our "batch" losses of the micro-batches, each with its own tokens per row. Uncut it is
    dapo.

    Red: policy_gradients.py:grpo: `.sum(-1) / length` -> `.sum(-1)`
    Red: objectives.py:length: `"batch": t.tokens_per_row` -> `"batch": drawn`
    """
    now, old, ref = tables(0.3)
    config = settings(loss="grpo", beta=0.3, grpo_length="batch")
    whole, _ = our_parts(now, old, ref, 1, config)
    for count in (1, 3):
        parts, _ = trl_parts(GRPOTrainer, now, old, ref, count, beta=0.3, loss_type="bnpo")
        mine = [our_parts(now, old, ref, count, config, LENGTHS[rows].double().mean().item())[0][i]
                for i, rows in enumerate(cuts(count))]
        same(sum(parts), sum(mine) / B, now)
        assert (abs(sum(parts) - whole[0] / B) > 1e-3) == (count > 1)


def by_loops(now, values, old, ref, old_values, earned, mask, config):
    """PPO's loss from its definition, a token at a time: mean over all response tokens.

    A_t = sum_l (gamma lam)^(l - t) delta_l, whitened with n - 1 below the variance.
    """
    advantages, returns = {}, {}
    for b in range(len(mask)):
        place = mask[b].nonzero()[:, 0].tolist()
        deltas = []
        for i, t in enumerate(place):
            reward = -config.beta * (old[b, t] - ref[b, t]) + earned[b] * (i + 1 == len(place))
            later = old_values[b, place[i + 1]] if i + 1 < len(place) else 0.0
            deltas.append(reward + config.ppo_gamma * later - old_values[b, t])
        for i, t in enumerate(place):
            advantages[b, t] = sum((config.ppo_gamma * config.ppo_lam)**(j - i) * deltas[j]
                                   for j in range(i, len(place)))
            returns[b, t] = advantages[b, t] + old_values[b, t]
    n, mean = len(advantages), sum(advantages.values()) / len(advantages)
    variance = sum((a - mean)**2 for a in advantages.values()) / (n - 1)
    total = 0.0
    for (b, t), a in advantages.items():
        a, ratio = (a - mean) / (variance + 1e-8)**0.5, (now[b, t] - old[b, t]).exp()
        held = min(max(ratio, 1 - config.clip), 1 + config.clip)
        v, v0, r = values[b, t], old_values[b, t], returns[b, t]
        near_v0 = min(max(v, v0 - config.clip), v0 + config.clip)
        total += max(-a * ratio, -a * held) + (
            config.ppo_value_weight * 0.5 * max((v - r)**2, (near_v0 - r)**2))
    return total / n


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.9, 0.0)])
def test_ppo_is_its_definition_token_by_token(gamma, lam):
    """GAE, whitening and both clips against loops of this file, not TRL's code: 1e-12.

    The conventions are those of TRL 0.13: k1 in the reward, the score at the last token, whitened
    over all tokens, half the larger squared error of the value, one mean over tokens.
    Red: policy_gradients.py:gae: `gamma * lam * later` -> `lam * later`
    Red: policy_gradients.py:gae: `gamma * value - values` -> `value - values`
    Red: policy_gradients.py:gae: `value = values_BT[:, t] * mask_BT[:, t]` -> `value = 1.0`
    Red: policy_gradients.py:whiten: `x.var(` -> `0.9 * x.var(`
    Red: policy_gradients.py:value_clip: `torch.maximum` -> `torch.minimum`
    Red: policy_gradients.py:value_clip: `returns).square()) / 2` -> `returns).square())`
    Red: policy_gradients.py:ppo: `value_weight * value_clip` -> `value_clip`
    Red: rollouts.py:credit: `-config.beta * k1 + F` -> `F`
    Red: rollouts.py:credit: `- 1 - mask.flip(1)` -> `- 2 - mask.flip(1)`
    """
    config = settings(loss="ppo", beta=0.3, ppo_gamma=gamma, ppo_lam=lam)
    mask = torch.cat((torch.zeros(B, 2).bool(), MASK), 1)  # behind two tokens of prompt
    now, old, ref, values, old_values = (random(B, T + 2, seed=s) * mask for s in range(5))
    old, old_values = now + 0.3 * old * mask, values + 0.3 * old_values * mask
    now.requires_grad_(), values.requires_grad_()
    theirs = by_loops(now, values, old, ref, old_values, REWARDS, mask, config)
    advantages, returns = rollouts.credit(REWARDS, old, ref, old_values, mask, config)
    assert clipped((now - old).exp()[mask], advantages[mask]) > 0
    sampled = tokens.Sampled(old, ref, advantages, old_values, returns, torch.zeros_like(old))
    each = objectives.LOSSES["ppo"].loss(objectives.Terms(
        now.sum(-1), None, now, mask, values, sampled, REWARDS, ["sampled"] * B, torch.zeros(()),
        mask.sum().item() / B, config))
    same(theirs, each.sum() / B, now, values)


def test_whitened_advantages_of_a_single_token_are_zero():
    """Its variance has n - 1 = 0 below it: nan, were it not for that. (TRL 0.13 refused it.)

    Red: policy_gradients.py:whiten: `min(1, len(x) - 1)` -> `1`
    """
    mask = torch.tensor([[False, True, False]])
    config, zeros = settings(loss="ppo", group=1), torch.zeros(1, 3)
    advantages, returns = rollouts.credit(torch.ones(1), zeros, zeros, zeros, mask, config)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]] and returns.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("centre", [0.0, 0.01, 2.0])
def test_a_centred_reward_model_loss_is_that_of_trl(centre):
    """-log sigmoid(w - l) + c (w + l)^2; TRL has the chosen rows first, here they alternate.

    Red: objectives.py:scored: `(chosen + rejected).square()` -> `(chosen - rejected).square()`
    Red: objectives.py:scored: `t.config.center_rewards * ` -> ``
    """
    scores = random(2 * P, 1).requires_grad_()
    trainer = stub(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=centre))
    theirs = trainer.compute_loss(lambda **inputs: SimpleNamespace(logits=scores),
                                  {"attention_mask": torch.ones(2 * P, T)})
    turned = scores[:, 0].view(2, P).T.flatten()
    mine = objectives.LOSSES["reward_model"].loss(objectives.Terms(
        turned, *[None] * 5, torch.zeros(2 * P), [], torch.zeros(()), 0.0,
        settings(loss="reward_model", center_rewards=centre)))
    same(theirs, mine.mean(), scores)


def judged(net, lengths=(17, 4, 9)):
    """Our scores of rows of these lengths, padded to one batch."""
    mask = torch.arange(17) < torch.tensor(lengths)[:, None]
    batch = tokens.Batch(rows() * mask, mask & (torch.arange(17) > 1), torch.zeros(3), ("",) * 3,
                         None)
    with torch.no_grad():
        return scoring.judge(net, batch)


def rows():
    return ids((3, 17)).clamp(min=1)  # 0 is for padding


@torch.no_grad()
def classified(net, lengths=(17, 4, 9)):
    """Those of transformers, each row alone, in the dtype it has."""
    return torch.cat([net(rows()[i:i + 1, :n], use_cache=False).logits[:, 0]
                      for i, n in enumerate(lengths)])


def shards(source, kind, folder, pieces):
    """The base in one file, or in several with an index."""
    if not pieces:
        return source
    peer(source, torch.float32, "sdpa").save_pretrained(folder, max_shard_size=pieces)
    assert (folder / "model.safetensors.index.json").is_file(), kind
    return folder


def trained(base: Path, adapter: Path) -> model.Transformer:
    """A reward model of random adapters and a random head, saved as a run saves its own."""
    net = model.load(base, torch.float32)
    lora.inject(net, 4, 4, generator=torch.Generator().manual_seed(0))
    heads.attach(net, "score").weight.data.copy_(0.05 * random(1, 64))
    lora.save(randomise(net), adapter, str(base))
    return net


@families
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pieces", [None, "60KB"])
def test_a_merged_reward_model_is_a_classifier_of_transformers(tmp_path, kind, tied, pieces):
    """Scores of rows and of a padded batch, nothing missing and nothing left over: float32 1e-5,
    float64 1e-10; and the folder opens here again.

    Red: merging.py:merge: `{"score.weight": score}` -> `{"score.weight": -score}`
    Red: merging.py:merge: `tensors.pop("lm_head.weight", None)` -> `None`
    Red: merging.py:classify: `"num_labels": 1` -> `"num_labels": 2`
    Red: merging.py:classify: `"architectures": [kind]` -> `"architectures": []`
    Red: merging.py:classify: `{"score.weight": first}` -> `{}`
    Red: heads.py:Head.forward: `@ self.weight[0]` -> `@ -self.weight[0]`
    Red: model.py:Transformer.end_states: `last_B + 1,` -> `last_B,`
    """
    random_peer(tmp_path / "base", model_type=kind, tie_word_embeddings=tied)
    base = shards(tmp_path / "base", kind, tmp_path / "shards", pieces)
    net = trained(base, tmp_path / "adapter")
    merging.merge(base, [tmp_path / "adapter"], tmp_path / "out")
    opened, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()) and opened.config.num_labels == 1
    assert opened.config.architectures == [type(opened).__name__]
    want = judged(net)
    assert want.std() > 0.1
    near(classified(opened.eval()), want, 1e-5)
    opened.config.pad_token_id, mask = 0, torch.arange(17) < torch.tensor((17, 4, 9))[:, None]
    with torch.no_grad():
        near(opened(rows() * mask, attention_mask=mask.long()).logits[:, 0], want, 1e-5)
    again = model.load(tmp_path / "out", torch.float64, judge=True)
    near(judged(again).float(), want, 1e-5)
    opened.config.pad_token_id = None
    with float64_islands(opened.double()):
        found = classified(opened)
    near(found, judged(again), 1e-10)


def test_a_response_whose_end_is_the_pad_keeps_its_score_in_transformers(tmp_path):
    """Transformers would read before the end token; the merged folder names no such pad: 1e-5.

    Red: merging.py:classify: `names["pad_token_id"] = None` -> `pass`
    """
    random_peer(tmp_path / "base", model_type="mistral", pad_token_id=2)
    net = trained(tmp_path / "base", tmp_path / "adapter")
    merging.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    opened = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", dtype=torch.float32).eval()
    row = torch.tensor([[5, 6, 7, 8, 2]])  # 2 is the end
    batch = tokens.Batch(row, row > 6, torch.zeros(1), ("",), None)
    batch.response_mask[0, -1] = True
    with torch.no_grad():
        near(opened(row).logits[:, 0], scoring.judge(net, batch), 1e-5)


@families
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pieces", [None, "60KB"])
def test_a_classifier_of_transformers_is_a_reward_model_here(tmp_path, kind, tied, pieces):
    """And written by model.save it opens there again: float32 1e-5, float64 1e-10.

    Red: heads.py:Head.forward: `@ self.weight[0]` -> `@ -self.weight[0]`
    Red: model.py:Transformer.end_states: `last_B + 1,` -> `last_B,`
    Red: model.py:save: `if judges(config) else "ForCausalLM"` -> `if False else "ForCausalLM"`
    """
    random_peer(tmp_path / "base", model_type=kind, tie_word_embeddings=tied)
    config = AutoConfig.from_pretrained(tmp_path / "base", num_labels=1)
    made = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", config=config, dtype=torch.float32).eval()
    made.score.weight.data.copy_(0.05 * random(1, 64))
    made.save_pretrained(tmp_path / "judge", max_shard_size=pieces or "1GB")
    assert (tmp_path / "judge/model.safetensors.index.json").is_file() == bool(pieces)
    near(judged(model.load(tmp_path / "judge", torch.float32, judge=True)), classified(made), 1e-5)
    net = model.load(tmp_path / "judge", torch.float64, judge=True)
    model.save(net.float(), tmp_path / "again")
    again, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "again", dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()) and type(again).__name__ in (
        json.loads((tmp_path / "again/config.json").read_text())["architectures"])
    want = judged(net.double())
    for opened in (made, again.eval()):
        with float64_islands(opened.double()):
            found = classified(opened)
        near(found, want, 1e-10)


def test_a_reward_models_adapter_opens_in_peft_without_its_head(tmp_path, recwarn):
    """PEFT does not look at heads.safetensors: logits within 1e-10, not a word about keys.

    Red: lora.py:save: `"lora_alpha": alphas[first]` -> `"lora_alpha": 2 * alphas[first]`
    """
    random_peer(tmp_path / "base", model_type="mistral")
    net = trained(tmp_path / "base", tmp_path / "adapter")
    assert (tmp_path / "adapter" / heads.FILE).is_file()
    opened = PeftModel.from_pretrained(peer(tmp_path / "base", torch.float32, "sdpa"),
                                       tmp_path / "adapter").eval()
    assert not [w for w in recwarn if "adapter key" in str(w.message)]
    near(logits(opened), logits(net.double()), 1e-10)
