"""losses.py against TRL 1.16: its own loss methods run on a trainer that has no model.

A stub trainer holds only the attributes its loss reads, and the stub model returns random
log-probabilities, so every formula compared here is TRL's installed code, none is a copy.
TRL returns the mean over the batch; equal gradients in the token log-probs then show that the two
agree row by row. TRL puts the chosen rows first and the rejected rows behind them.

    python -m pytest tests/peers/test_losses_peers.py
"""
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl import DPOTrainer, KTOTrainer, RewardTrainer
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer

import losses

BETA, PAIRS, V = 0.3, 4, 11
LENGTHS = torch.tensor([3, 1, 5, 2, 4, 4, 1, 6])  # response tokens: 4 chosen, 4 rejected rows
MASK = torch.arange(7) >= 7 - LENGTHS[:, None]  # one prompt token at least, right-aligned
LABELS = torch.tensor([True, False, False, True, True, False, True, False])


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def tokens(seed):
    """Token log-probs (8, 6), zero outside the responses: what TRL's fused head returns."""
    return (-random(8, 6, seed=seed).abs() * MASK[:, 1:]).requires_grad_()


def stub(trainer_class, **attributes):
    """A trainer with no model: the attributes its loss method reads and nothing else."""
    trainer = object.__new__(trainer_class)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x,
                                  gather_for_metrics=lambda x: x)
    vars(trainer).update(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0, _tp_size=1,
        beta=BETA, precompute_ref_logps=True, label_smoothing=0.0)
    vars(trainer).update(attributes)
    return trainer


def model(token_logps):
    """A model whose fused head returns `token_logps`, and zeros for what is only logged."""
    zeros = torch.zeros_like(token_logps)
    return lambda **inputs: SimpleNamespace(log_probs=token_logps, entropy=zeros,
                                            mean_logits=zeros, is_top1=zeros.bool())


def same(theirs, ours, *inputs, tolerance=1e-12):
    """Equal values, and equal gradients in every input."""
    assert abs(theirs.item() - ours.item()) <= tolerance
    for a, b in zip(torch.autograd.grad(theirs, inputs), torch.autograd.grad(ours, inputs),
                    strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def trl_dpo(loss_type, token_logps, ref_logps):
    """The loss TRL's DPOTrainer computes for one batch."""
    trainer = stub(DPOTrainer, ld_alpha=None, f_divergence_type="reverse_kl", use_weighting=False,
                   loss_types=[loss_type], loss_weights=[1.0])
    ids = torch.zeros(8, 7, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "completion_mask": MASK.long(),
              "ref_chosen_logps": ref_logps[:PAIRS], "ref_rejected_logps": ref_logps[PAIRS:]}
    return trainer._compute_loss(model(token_logps), inputs, False)


@pytest.mark.parametrize(("loss_type", "ours"), [
    ("sigmoid", losses.dpo), ("sigmoid", losses.una_pair), ("bco_pair", losses.bco_pair)])
def test_dpo_and_bco_pair_are_those_of_trl(loss_type, ours):
    """TRL's "sigmoid" is DPO and "bco_pair" is BCE on both rows; sums, as here.

    Red: losses.py:dpo: `z = beta * margin` -> `z = margin`
    Red: losses.py:bco_pair: `logsigmoid(-rejected)` -> `logsigmoid(rejected)`
    """
    token_logps, ref = tokens(1), tokens(2).detach().sum(-1)
    l = token_logps.sum(-1)
    mine = ours(l[:PAIRS], l[PAIRS:], ref[:PAIRS], ref[PAIRS:], BETA)
    same(trl_dpo(loss_type, token_logps, ref), mine.mean(), token_logps)


def test_ipo_on_mean_logps_is_that_of_trl():
    """TRL divides each log-ratio by the response length first; fed with means, ours is the same.

    Red: losses.py:ipo: `(2 * beta)).square()` -> `beta).square()`
    """
    token_logps, ref = tokens(1), tokens(2).detach().sum(-1)
    m, m0 = token_logps.sum(-1) / LENGTHS, ref / LENGTHS
    mine = losses.ipo(m[:PAIRS], m[PAIRS:], m0[:PAIRS], m0[PAIRS:], BETA)
    same(trl_dpo("ipo", token_logps, ref), mine.mean(), token_logps)


def test_token_mean_sft_is_that_of_trl():
    """TRL's "sft" on the chosen rows: the mean over their response tokens.

    Red: losses.py:sft_token_mean: `float(mask.sum()) / len(mask)` -> `mask.sum(-1)`
    """
    token_logps, ref = tokens(1), tokens(2).detach().sum(-1)
    mine = losses.sft_token_mean(token_logps[:PAIRS], MASK[:PAIRS, 1:])
    same(trl_dpo("sft", token_logps, ref), mine.mean(), token_logps)


def test_kto_without_a_reference_point_is_apo_zero_of_trl():
    """z0 = 0: 1 - sigmoid(u_w) + sigmoid(u_l).

    Red: losses.py:kto: `torch.sigmoid(-advantage)` -> `torch.sigmoid(advantage)`
    """
    token_logps, ref = tokens(1), tokens(2).detach().sum(-1)
    labels = torch.arange(8) < PAIRS
    mine = losses.kto(token_logps.sum(-1), ref, labels, torch.tensor(0.0), BETA)
    same(trl_dpo("apo_zero", token_logps, ref), mine.sum() / PAIRS, token_logps)


@pytest.mark.parametrize("shift", (2.0, -20.0))
def test_kto_and_its_z0_are_those_of_trl(shift):
    """Both weights, both classes in one mean; the z0 of a shift of -20 is clamped to 0.

    Red: losses.py:kto: `- beta * z0` -> `- z0`
    Red: losses.py:kto_z0: `.clamp(min=0)` -> ``
    """
    token_logps, ref = tokens(1), tokens(2).detach().sum(-1)
    mismatched, mismatched_ref = tokens(3).detach(), tokens(4).detach().sum(-1) - shift
    trainer = stub(KTOTrainer, loss_type="kto", calculate_KL=True, desirable_weight=1.5,
                   undesirable_weight=0.5)
    ids = torch.zeros(8, 7, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids, "completion_mask": MASK.long(),
             "KL_input_ids": ids + 1, "KL_attention_mask": ids, "KL_completion_mask": MASK.long(),
             "label": LABELS, "ref_logps": ref, "ref_KL_logps": mismatched_ref}

    def either(input_ids, **inputs):
        return model(mismatched if input_ids.any() else token_logps)()

    theirs = trainer._compute_loss(either, batch, False)
    z0 = losses.kto_z0(mismatched.sum(-1), mismatched_ref)
    assert (z0 > 0) == (shift > 0)
    mine = losses.kto(token_logps.sum(-1), ref, LABELS, z0, BETA, 1.5, 0.5)
    same(theirs, mine.mean(), token_logps)


def test_orpo_is_that_of_trl_where_the_prompt_is_one_token():
    """TRL's NLL is the token mean over prompt AND response of all chosen rows, ours the mean over
    rows of response means: equal for one-token prompts, which nothing predicts, and responses of
    one length. TRL computes the odds ratio in float32.

    Red: losses.py:orpo: `- weight * logsigmoid` -> `+ weight * logsigmoid`
    """
    logits = random(2 * PAIRS, 6, V).float().requires_grad_()
    ids = torch.arange(2 * PAIRS * 6).view(2 * PAIRS, 6) * 7 % V
    labels = ids.where(torch.arange(6) > 0, -100)
    batch = {f"{side}_{key}": x[rows]
             for side, rows in (("chosen", slice(PAIRS)), ("rejected", slice(PAIRS, None)))
             for key, x in (("input_ids", ids), ("attention_mask", torch.ones_like(ids)),
                            ("labels", labels))}
    trainer = stub(ORPOTrainer, is_encoder_decoder=False, padding_value=0)
    theirs, _ = trainer.get_batch_loss_metrics(
        lambda *inputs, **options: SimpleNamespace(logits=logits), batch)
    log_probs = logits[:, :-1].log_softmax(-1)
    m = log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1).mean(-1)
    same(theirs, losses.orpo(m[:PAIRS], m[PAIRS:], BETA).mean(), logits, tolerance=1e-6)


def test_orpo_odds_ratio_is_that_of_trl_from_certain_to_unlikely():
    """The odds-ratio term alone in float32, for mean log-probs from -1e-4 to -40.

    Red: losses.py:orpo: `(chosen - log1mexp(chosen))` -> `chosen`
    """
    chosen = -torch.logspace(-4, 1.6, 20)
    rejected = chosen.flip(0)
    theirs = -stub(ORPOTrainer).odds_ratio_loss(chosen, rejected)[0]
    mine = losses.orpo(chosen, rejected, BETA) + chosen
    torch.testing.assert_close(theirs, mine, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("gamma", (0.0, 0.5, 1.4))
def test_simpo_is_that_of_trl(gamma):
    """Mean log-probs; TRL's simpo_gamma is the margin itself, as here.

    Red: losses.py:simpo: `_logps) - gamma)` -> `_logps) - beta * gamma)`
    """
    m = (-random(8).abs()).requires_grad_()
    trainer = stub(CPOTrainer, loss_type="simpo", simpo_gamma=gamma, alpha=0.0)
    theirs = trainer.cpo_loss(m[:PAIRS], m[PAIRS:])[0]
    mine = losses.simpo(m[:PAIRS], m[PAIRS:], BETA, gamma)
    torch.testing.assert_close(theirs, mine, atol=1e-12, rtol=0)
    same(theirs.mean(), mine.mean(), m)


def test_smoothed_dpo_under_a_uniform_reference_is_cpo_of_trl():
    """TRL's DPOTrainer lacks conservative DPO; its CPO is that with a constant reference.

    Red: losses.py:dpo: `-(1 - label_smoothing)` -> `-1`
    """
    l, ref = tokens(1).detach().sum(-1).requires_grad_(), torch.full((PAIRS,), -3.0)
    trainer = stub(CPOTrainer, loss_type="sigmoid", alpha=0.0, label_smoothing=0.1)
    theirs = trainer.cpo_loss(l[:PAIRS], l[PAIRS:])[0]
    mine = losses.dpo(l[:PAIRS], l[PAIRS:], ref, ref, BETA, 0.1)
    same(theirs.mean(), mine.mean(), l)


def test_reward_model_loss_is_that_of_trl():
    """Bradley-Terry on the scores of a classifier with one output.

    Red: losses.py:reward_model: `chosen - rejected)` -> `rejected - chosen)`
    """
    scores = random(8, 1).requires_grad_()
    trainer = stub(RewardTrainer, args=SimpleNamespace(center_rewards_coefficient=None))
    theirs = trainer.compute_loss(lambda **inputs: SimpleNamespace(logits=scores),
                                  {"attention_mask": torch.ones(8, 7)})
    mine = losses.reward_model(scores[:PAIRS, 0], scores[PAIRS:, 0]).mean()
    same(theirs, mine, scores)
