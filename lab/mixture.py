"""How many demonstrations to how much feedback?

Question    The paper's Tables 7-9 add demonstrations and see truthfulness fall. Is that the share
            of demonstrations, or the larger number of steps, or fewer looks at the feedback?
Prediction  At a fixed number of steps truth falls because feedback is seen less often; at fixed
            looks at the feedback it falls because demonstrations are true less often (60%) than
            what the scores prefer.
Command     python -m lab.mixture
Runtime     4 minutes on two cores
Answer      It is the share. Truth falls from 84% to 45% with 192 to 3072 demonstrations although
            the feedback is always read once, and from 81% to 35% at 96 steps. The two designs
            differ most where feedback is read two thirds as often (3072: 45% against 35%, not
            significant). Instructions followed rise with demonstrations only if steps do.

Feedback stays at 1536 answers. "one pass" reads every row once, so that steps grow with the
demonstrations (the paper's design, as far as it is stated) and feedback is always seen once;
"96 steps" always takes the steps of the 1536 + 1536 mixture.
"""
from lab import experiment, summary
from lab.experiment import Stage

SEEDS = range(1, 6)
COUNTS = (192, 768, 1536, 3072)
COLUMNS = ("form", "form_demonstrations", "form_feedback", "truth", "mc2", "sums", "skills",
           "kl_policy")


def arms() -> dict[str, list[Stage]]:
    return {f"{count} demonstrations, {'96 steps' if steps else 'one pass'}":
            [Stage("uft", "both", 5e-3, 0.1, sizes=(count, 1536),
                   steps=0 if count == 1536 else steps)]
            for steps in (0, 96) for count in COUNTS}


def main() -> None:
    rows = experiment.run_arms(arms(), SEEDS, "test", 2, "mixture")
    summary.save("mixture", {"rows": rows})
    print(summary.table(rows, COLUMNS))


if __name__ == "__main__":
    main()
