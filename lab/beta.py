"""What does beta do that the learning rate does not?

Question    The paper tunes learning rate x beta, 16 settings for UFT against 5 for SFT. Does beta
            buy less drift at equal quality, and what is a larger grid worth by itself?
Prediction  For small beta UFT is SFT on the sequence sum: Adam divides the factor beta/4 out. A
            larger beta moves along the frontier that SFT walks by stopping earlier or with a
            smaller rate. The best of 16 settings is better than the best of 5 for any arm.
Command     python -m lab.beta
Runtime     RUNTIME
Answer      ANSWER

Demonstrations only, three seeds, AdamW without clipping (a clip of 1 would hit SFT's gradients,
which are 4/beta times larger). Held-out nll against both KLs is the frontier.
"""
from lab import experiment, summary
from lab.experiment import Stage

SEEDS, BETAS, LRS = range(1, 4), (0.001, 0.01, 0.05, 0.2, 0.6), (1e-3, 2.5e-3, 5e-3, 1e-2)
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
