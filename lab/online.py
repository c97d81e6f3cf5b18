"""RLHF or online UNA?   UNA's claim, and UFT's "online" column

Question    At equal samples, reward model and tuning budget: does UNA's loss on answers of the
            policy do what PPO, RLOO and GRPO do, and does the model's reward become true reward?
Prediction  Every arm raises the model's reward and less of the true one: the model puts 6 of 10 new
            pairs in order and saw half of the constraints only. PPO, RLOO and GRPO end alike; UNA
            from pi_ref earns a little less at a smaller KL, UNA from pi_old drifts furthest. UNA
            costs what RLOO and GRPO cost, PPO with its value head a little more; memory is one.
Command     python -m lab.online
Runtime     15 minutes on one core
Answer      Every arm lifts the model's reward from .66 to .78 or more, mostly by being brief (16
            tokens to 5), and the true one from 2% to 7% at best (PPO): the model puts 57% of new
            pairs in order. UNA from pi_ref earns what PPO and RLOO earn, but a nat further from the
            base, not nearer, and less of it is true than PPO's; UNA from pi_old goes 1.7 nats
            further. GRPO earns a point more and leaves furthest of all (5 to 30 nats), at the
            smaller beta, which the reward had chosen. PPO's and UNA's costs cannot be told apart.
            With a rule for a reward GRPO follows 48% of the instructions and UNA 26%: most rewards
            are 0 then, UNA has no baseline and pushes nearly every answer down; at the larger
            learning rate it ends at nothing (0%, 280 nats), with either beta.

The reward model is the base with a head, trained on lab/data/feedback.jsonl (--loss reward_model);
what a response earns is sigmoid(its score). A step answers 8 prompts 4 times and updates twice on
them; STEPS steps. una_ref and una_old differ in --anchor alone, the second is the authors' code.
UNA's beta is in units of the score, RLOO's and PPO's in units of its sigmoid, whose slope is 1/4 at
most, so that .1 and .025 ask for nearly the same policy; GRPO divides rewards by their deviation.
Each arm tries 2 learning rates x 2 betas with the seed TUNING; the best reward on the validation
split is run on the test split with SEEDS, in turns. "rule" arms earn lab.verifier:form instead, and
are chosen by it among as many settings. Columns, of one sampled answer to each of ASKED prompts:
reward, the model's; form, content and graded, lab/verifier.py's on the same answers;
kl_policy and length of them too. truth and sums as in lab/measure.py; cost is CPU seconds over
those of GRPO with that seed, mib the peak of a process.

What this cannot show: one reward model, and one that a model of this size cannot make good (20
times the pairs do not help it); 40 steps; most winners have the larger learning rate tried; a
policy of 3 MB, beside which a value head or a second model weighs nothing.
"""
import argparse
import functools
import time
from collections.abc import Sequence

import torch

import report
import rewards
import scoring
import tokens
import train
import verifiers
from config import Config
from lab import experiment, summary, verifier, world
from lab.measure import BASE, encoded, held_out
from lab.rolling import answered, costed, fresh, learn, run_all, settings

VERSION, STEPS = 1, 40
TUNING, SEEDS = 101, (1, 2, 3, 4, 5)
LRS = (2e-3, 5e-3)
ARMS = {  # what is special about an arm, its betas
    "ppo": ({"loss": "ppo", "updates": 2}, (0.025, 0.075)),
    "una_ref": ({"loss": "una_online", "updates": 2}, (0.1, 0.3)),
    "una_old": ({"loss": "una_online", "updates": 2, "anchor": "old"}, (0.3, 1.0)),
    "rloo": ({"loss": "rloo", "updates": 2}, (0.025, 0.075)),
    "grpo": ({"loss": "grpo", "updates": 2}, (0.04, 0.35))}
RULE = ("grpo", "una_ref")  # run again with a rule for a reward
COLUMNS = ("reward", "graded", "form", "content", "truth", "sums", "kl_policy", "length", "cost",
           "mib")
PAIRS = (("ppo", "base"), ("una_ref", "base"), ("una_old", "base"), ("rloo", "base"),
         ("grpo", "base"), ("una_ref", "ppo"), ("una_ref", "rloo"), ("una_ref", "grpo"),
         ("una_old", "una_ref"), ("rloo", "grpo"), ("una_ref, rule", "grpo, rule"),
         ("grpo, rule", "grpo"))


@functools.cache
def reward_model() -> rewards.RewardModel:
    """Trained once, on the bundled pairs, and kept beside the other runs."""
    folder = experiment.CACHE / f"reward-{experiment.world_hash()}"
    wanted = Config(model=str(BASE), data=(str(BASE.parent / "data/feedback.jsonl"),), lr=3e-3,
                    loss="reward_model", batch_size=16, steps=48, max_length=96, sample_tokens=0,
                    out=str(folder), resume=(folder / "config.json").exists())
    if not (folder / "results.json").exists():
        train.train(wanted)
    return rewards.RewardModel(folder, wanted)


def squashed(prompts: Sequence, said: Sequence[str], answers: Sequence[str]) -> list[float]:
    return torch.tensor(reward_model()(prompts, said, answers)).sigmoid().tolist()


def pairs_in_order(split: str) -> dict:
    """{"pairs": share of pairs, but for ties, that the reward model puts in their order}."""
    rows, net = held_out(split)[1], reward_model().net
    with torch.no_grad():
        said = scoring.judge(net, tokens.collate(rows))
    given = torch.tensor([row.reward for row in rows])
    said, given = ((x[0::2] - x[1::2]).sign() for x in (said, given))
    return {"pairs": (said == given)[given != 0].float().mean().item()}


def run(name: str, lr: float, beta: float, seed: int, split: str) -> dict:
    """One run of an arm, measured; its curve is [model's reward, true reward] of every step."""
    arm, rule = name.removesuffix(", rule"), name.endswith("rule")
    wanted = settings(ARMS.get(arm, ARMS["grpo"])[0], lr, beta, seed, STEPS * (name != "base"))
    rows = encoded(world.prompts(world.build(0), seed, STEPS * wanted.batch_size))
    curve, (net, optimizer) = [], fresh(wanted)
    reward_model()

    def judge(prompts: Sequence, said: Sequence[str], answers: Sequence[str]) -> list[float]:
        asked = verifiers.each(verifier.form, "form") if rule else squashed
        earned = asked(prompts, said, answers)
        true = [verifier.graded("", s, a) for s, a in zip(said, answers, strict=True)]
        curve.append([sum(x) / len(x) for x in (earned, true)])
        return earned

    began = time.process_time()
    learn(net, optimizer, wanted, rows, judge)
    spent = {"seconds": time.process_time() - began, "mib": report.memory_mib("cpu")}
    return answered(net, split, squashed) | spent | {"curve": curve}


def tried() -> list[tuple[str, float, float]]:
    """(arm, lr, beta) of every setting that is tried."""
    arms = [*ARMS, *(f"{name}, rule" for name in RULE)]
    return [(name, lr, beta) for name in arms for lr in LRS
            for beta in ARMS[name.removesuffix(", rule")][1]]


def tune(workers: int) -> dict[str, list[dict]]:
    """Every setting of every arm on the validation split, best first in what the arm is paid."""
    found = run_all(run, [(*job, TUNING, "validation") for job in tried()], VERSION, "online",
                    workers)
    out: dict[str, list[dict]] = {}
    for (name, lr, beta), r in zip(tried(), found, strict=True):
        paid = r["form" if name.endswith("rule") else "reward"]
        row = {"lr": lr, "beta": beta} | r | {"paid": paid}
        out.setdefault(name, []).append({k: v for k, v in row.items() if k != "curve"})
    return {name: sorted(rows, key=lambda r: -r["paid"]) for name, rows in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="RLHF or online UNA?")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    workers = parser.parse_args().workers
    splits = [("validation",), ("test",)]
    pairs = run_all(pairs_in_order, splits, VERSION, "online", 1)  # trains the reward model
    tuned = tune(workers)
    best = {n: (r[0]["lr"], r[0]["beta"]) for n, r in tuned.items()}
    jobs = [(n, *best[n], seed, "test") for seed in SEEDS for n in best]
    base, *found = run_all(run, [("base", 1e-3, 0.1, 0, "test"), *jobs], VERSION, "online",
                           workers)
    curves = [r.pop("curve") for r in (base, *found)][1:]
    rows, curves = ({n: [x for x, job in zip(values, jobs, strict=True) if job[0] == n]
                     for n in dict.fromkeys(job[0] for job in jobs)} for values in (found, curves))
    curves = {n: torch.tensor(of).mean(0).tolist() for n, of in curves.items()}
    rows = {"base": [base | {"cost": 0.0}] * len(SEEDS)} | costed(rows)
    known = {s: p["pairs"] for (s,), p in zip(splits, pairs, strict=True)}
    summary.save("online", {"rows": rows, "tuned": tuned, "curves": curves, "steps": STEPS,
                            "pairs": known})
    print(summary.table(rows, COLUMNS) + "\n\n" + summary.differences(rows, PAIRS, COLUMNS))


if __name__ == "__main__":
    main()
