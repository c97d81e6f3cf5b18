"""What does the shape of the loss do to demonstrations?

Question    Eq. 7 stops pushing a demonstration that has gained about 2/beta nats. Is that the "KL
            regularisation" the paper credits UFT with, and is it worth more than stopping SFT?
Prediction  SFT that stops row by row at 2/beta behaves like UFT; an explicit KL penalty does not;
            BCE and KTO, which never let a row go, sit between SFT and UFT.
Command     python -m lab.shapes
Runtime     6 minutes on two cores
Answer      Trained too long, UFT drifts less than SFT (KL 4.4 against 6.2 nats) and forgets less
            (skills 43% against 37%), and SFT that stops row by row cannot be told from it: it is
            early stopping per example. An explicit KL is another thing: 1 nat of drift, and half of
            the instructions not learned. SFT for a third of the steps beats all of them in nll
            (5.2 against 6.0) and drift (3.6). BCE and KTO lie between UFT and SFT, as predicted.

256 demonstrations, about 14% of them bad, seen 24 times, one learning rate, four seeds; beta is .3,
so that rows can saturate (2/beta = 6.7 nats). "sft_quarter" is SFT, "sft_quarter, 8 passes" a
shorter run with its own schedule. "sft_kl" adds KL(policy||base) of weight 1, exact over the next
token along the demonstrations; "sft_stop" drops a row that has gained 2/beta; "kto_rows" is KTO
with z0 = 0. Every loss is scaled so that its first gradient is beta/4 of SFT's.
"""
from lab import experiment, summary
from lab.experiment import Stage

SEEDS, BETA, ROWS = range(1, 5), 0.3, 256
COLUMNS = ("form_demonstrations", "content", "truth", "skills", "nll", "kl_policy", "kl_base",
           "kl_text")


def arms() -> dict[str, list[Stage]]:
    """Every loss for 24 passes, and SFT stopped after 8."""
    def passes(loss: str, count: int) -> list[Stage]:
        return [Stage(loss, "demonstrations", 5e-3, BETA, steps=count * ROWS // 32,
                      sizes=(ROWS, 0), clip=1e9)]

    losses = ("sft_quarter", "uft", "uft_bce_half", "kto_rows", "sft_stop", "sft_kl")
    return {"sft_quarter, 8 passes": passes("sft_quarter", 8)} | {
        f"{loss}, 24 passes": passes(loss, 24) for loss in losses}


def main() -> None:
    rows = experiment.run_arms(arms(), SEEDS, "test", 2, "shapes")
    summary.save("shapes", {"rows": rows})
    print(summary.table(rows, COLUMNS))
    print(summary.differences(rows, [("uft, 24 passes", other) for other in rows
                                     if not other.startswith("uft,")], COLUMNS))


if __name__ == "__main__":
    main()
