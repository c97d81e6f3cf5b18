"""The paper's tables in miniature: every arm with the same tuning budget, eight seeds, intervals.

Question    Is one stage with one loss (UFT) better than SFT, and than SFT followed by alignment?
Prediction  UFT on demonstrations equals SFT; on the mixture it pays no alignment tax; what the
            scores add is truth, and sequential UNA adds as much.
Command     python -m lab.tables            (--quick: two settings, two seeds, four arms)
Runtime     384 runs of about 12 CPU seconds, 40 minutes on two cores; --quick 2 minutes
Answer      As predicted, and more: UFT equals SFT with a little less drift; on the mixture it
            forgets nothing that eight seeds can see while every sequential arm forgets sums and
            demonstrated constraints. But the sequential arms end up more truthful, and rehearsing
            the demonstrations in any other way does as well as the single stage.

Each arm tries BUDGET settings on the validation split with the seeds TUNING and the best mean of
six scores (measure.SELECT) goes to the test split with the seeds SEEDS; the budget is checked
before anything runs. Sequential arms tune their stage of feedback; their SFT stage has the setting
that SFT itself won with. All rows are read once a stage. KTO's labels are score > 1/2. Gradients
are clipped at 1, as in train.py, which only the SFT sums reach (norms of 1 to 3).
"""
import argparse
from collections.abc import Callable, Sequence

from lab import experiment, summary
from lab.experiment import Stage

BUDGET = 8
TUNING, SEEDS = (101, 102), tuple(range(1, 9))
QUICK = ("sft", "uft", "sft_then_una", "uft_mixed")
LRS = (1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2, 1.5e-2, 2e-2)
Setting = tuple[float, float]  # learning rate, beta


def grid(lrs: Sequence[float], betas: Sequence[float]) -> list[Setting]:
    return [(lr, beta) for lr in lrs for beta in betas]


def one(loss: str, rows: str) -> Callable[[Setting, list[Stage]], list[Stage]]:
    """An arm of one stage."""
    return lambda setting, sft: [Stage(loss, rows, *setting)]


def after_sft(loss: str, rows: str, batch: int = 32) -> Callable:
    """An arm that goes on from SFT; 16 pairs are as many rows as 32 single ones."""
    return lambda setting, sft: [*sft, Stage(loss, rows, *setting, batch=batch)]


RATES = grid(LRS, (0.1,))  # for losses that know no beta, or whose beta only scales them
USUAL = grid((3e-3, 5e-3, 1e-2, 2e-2), (0.05, 0.2))
GENTLE = [*grid((2e-3, 5e-3, 1e-2), (0.1, 0.4)), (5e-3, 1.0), (1e-2, 1.0)]
ARMS: dict[str, tuple[Callable, list[Setting]]] = {  # sft first: others start from its winner
    "sft": (one("sft", "demonstrations"), RATES),
    "sft_token_mean": (one("sft_token_mean", "demonstrations"), RATES),
    "uft": (one("uft", "demonstrations"), USUAL),
    "uft_bce": (one("uft_bce", "demonstrations"), USUAL),
    "una": (one("uft", "feedback"), USUAL),
    "sft_then_dpo": (after_sft("dpo", "feedback", 16), GENTLE),
    "sft_then_kto": (after_sft("kto", "feedback"), GENTLE),
    "sft_then_una": (after_sft("uft", "feedback"), USUAL),
    "una_then_sft": (lambda s, sft: [Stage("uft", "feedback", *s), *sft], USUAL),
    "sft_good": (one("sft", "good"), RATES),
    "uft_mixed": (one("uft", "both"), USUAL),
    "uft_bce_mixed": (one("uft_bce", "both"), USUAL),
    "sft_una_mixed": (one("sft_una", "both"), USUAL),
    "weighted_sft": (one("weighted_sft", "both"), RATES),
    "interleaved": (lambda s, sft: [Stage("sft_una", "both", *s, alternate=True)], USUAL),
    "sft_then_uft_mixed": (after_sft("uft", "both"), USUAL),
}


def check_budget(arms: dict) -> None:
    """ValueError unless every arm tries the same number of different settings."""
    wrong = {n: len(set(tried)) for n, (_, tried) in arms.items() if len(set(tried)) != BUDGET}
    if wrong:
        raise ValueError(f"every arm must try {BUDGET} settings, these do not: {wrong}")


def tune(arms: dict, seeds: Sequence[int], settings: int, workers: int) -> dict[str, list[dict]]:
    """Every setting of every arm on the validation split, best first; sft before the others."""
    out: dict[str, list[dict]] = {}
    for names in (["sft"], [n for n in arms if n != "sft"]):
        sft = arms["sft"][0](best(out["sft"]), []) if out else []
        tried = [(n, s) for n in names for s in arms[n][1][::BUDGET // settings]]
        jobs = [(arms[n][0](s, sft), seed, "validation") for n, s in tried for seed in seeds]
        found = experiment.run_all(jobs, workers, "tuning")
        for i, (name, setting) in enumerate(tried):
            runs = found[i * len(seeds):(i + 1) * len(seeds)]
            row = {"lr": setting[0], "beta": setting[1]} | means(runs)
            out.setdefault(name, []).append(row)
        for name in names:
            out[name].sort(key=lambda row: -row["select"])
    return out


def best(rows: list[dict]) -> Setting:
    return rows[0]["lr"], rows[0]["beta"]


def means(runs: list[dict]) -> dict[str, float]:
    return {k: sum(r[k] for r in runs) / len(runs) for k in runs[0]}


def test(arms: dict, tuned: dict, seeds: Sequence[int], workers: int) -> dict[str, list[dict]]:
    """Every arm at its best setting on the test split, one row of numbers a seed."""
    sft = arms["sft"][0](best(tuned["sft"]), [])
    tried = {n: arms[n][0](best(tuned[n]), sft) for n in arms}
    base, = experiment.run_all([([], 0, "test")], 1, "base")
    return {"base": [base]} | experiment.run_arms(tried, seeds, "test", workers, "test")


def steps(arms: dict, tuned: dict) -> dict[str, str]:
    """The steps of every stage of an arm, as `48 + 96`."""
    sft = arms["sft"][0](best(tuned["sft"]), [])
    return {n: " + ".join(str(experiment.count_steps(stage, experiment.units(stage, 1)))
                          for stage in arms[n][0](best(tuned[n]), sft)) for n in arms}


QUALITY = ("form", "form_demonstrations", "form_feedback", "form_mixed", "content", "truth", "mc2",
           "sums", "skills", "select")
DRIFT = ("kl_policy", "kl_base", "kl_text", "length", "ended", "nll", "pairs")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The paper's tables in miniature.")
    parser.add_argument("--quick", action="store_true", help="few arms, two settings, two seeds")
    parser.add_argument("--workers", type=int, default=2, help="processes, one thread each")
    args = parser.parse_args(argv)
    check_budget(ARMS)
    arms = {n: ARMS[n] for n in QUICK} if args.quick else ARMS
    tuning, seeds, settings = ((101,), (1, 2), 2) if args.quick else (TUNING, SEEDS, BUDGET)
    tuned = tune(arms, tuning, settings, args.workers)
    rows = test(arms, tuned, seeds, args.workers)
    print(summary.table(rows, QUALITY) + "\n\n" + summary.table(rows, DRIFT))
    if not args.quick:
        scores = {n: [s["select"] for s in r] for n, r in tuned.items()}
        value = {"machine": summary.machine(), "seeds": seeds, "tuning_seeds": tuning,
                 "budget": BUDGET, "tuned": tuned, "steps": steps(arms, tuned), "rows": rows,
                 "best_of": {n: summary.best_of(values) for n, values in scores.items()}}
        print(f"\nwritten: {summary.save('tables', value)}; make results draws the figures")


if __name__ == "__main__":
    main()
