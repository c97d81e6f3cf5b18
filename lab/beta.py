"""What does beta do that the learning rate does not?

Question    The paper tunes learning rate x beta. Does beta buy less drift at equal quality?
Prediction  For small beta UFT is SFT on the sequence sum: Adam divides the factor beta/4 out. A
            larger beta moves along the frontier that SFT walks with a smaller rate.
Command     python -m lab.beta
Runtime     4 minutes on two cores
Answer      As predicted. With beta .001 and .01 UFT's nll is SFT's within .04 nats at every rate.
            Beta .1 and .3 trade nll for drift about as a smaller rate does (5.32 nats at KL 1.74,
            5.55 at 1.44; SFT has 5.74 at 1.41 and 5.22 at 2.01); beta 1 falls behind that curve.
            The differences within a rate are of the size of the intervals.

Demonstrations only, one pass, three seeds, AdamW without clipping (a clip of 1 would hit SFT's
gradients, which are 4/beta times larger; its first step is the same for both). Held-out nll against
both KLs is the frontier. At beta .001 gradients come near AdamW's eps, which shortens steps.
"""
from lab import experiment, summary
from lab.experiment import Stage

SEEDS, BETAS, LRS = range(1, 4), (1e-3, 0.01, 0.1, 0.3, 1.0), (1e-3, 3e-3, 1e-2)
COLUMNS = ("form_demonstrations", "content", "nll", "kl_policy", "kl_base", "kl_text")


def arms() -> dict[str, list[Stage]]:
    named = [("sft", 0.1), ("sft_token_mean", 0.1), *(("uft", b) for b in BETAS)]
    return {f"{loss}{f' beta {b:g}' if loss == 'uft' else ''}, lr {lr:g}":
            [Stage(loss, "demonstrations", lr, b, clip=1e9)] for loss, b in named for lr in LRS}


def main() -> None:
    rows = experiment.run_arms(arms(), SEEDS, "test", 2, "beta")
    summary.save("beta", {"rows": rows})
    print(summary.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
