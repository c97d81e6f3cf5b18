"""What do the scores add?

Question    Does UFT gain from graded scores, or would any label, or none, do as well?
Prediction  Graded scores beat labels cut at 1/2 a little and shuffled or constant scores clearly;
            a constant score above 1/2 is SFT on everything and teaches form without truth.
Command     python -m lab.scores
Runtime     6 minutes on two cores
Answer      Scores are what teaches truth: with a constant score the mixture stays at 16% truthful
            answers, with shuffled ones at 31%, with its own at 46%. Cut at 1/2 they teach more
            truth (69%) and less form (32% against 45% of instructions followed): a right answer
            that breaks a constraint becomes as good as any. Moving the mean score to 1/2 changes
            nothing that five seeds can see in truth or form. Predicted, but for the labels' truth.

One learning rate, one beta, the same rows in the same order, five seeds: only the scores differ.
"shuffled" swaps the two scores of a prompt in half of the pairs; "constant" gives every answer the
mean score; "centred" moves all scores so that their mean is 1/2, the neutral point of Eq. 7.
"""
from lab import experiment, summary
from lab.experiment import Stage

SEEDS = range(1, 6)
KINDS = ("given", "binary", "shuffled", "constant", "centred")
COLUMNS = ("form_feedback", "form", "content", "truth", "mc2", "pairs", "kl_policy", "length")


def arms() -> dict[str, list[Stage]]:
    out = {f"feedback, {k}": [Stage("uft", "feedback", 5e-3, 0.1, scores=k)] for k in KINDS}
    out["feedback, pairs (dpo)"] = [Stage("dpo", "feedback", 5e-3, 0.1, batch=16)]
    return out | {f"mixture, {k}": [Stage("uft", "both", 5e-3, 0.1, scores=k)] for k in KINDS}


def main() -> None:
    rows = experiment.run_arms(arms(), SEEDS, "test", 2, "scores")
    summary.save("scores", {"rows": rows})
    print(summary.table(rows, COLUMNS))
    print(summary.differences(rows, [(f"{rows_}, given", f"{rows_}, {other}")
          for rows_ in ("feedback", "mixture") for other in KINDS[1:]], COLUMNS))


if __name__ == "__main__":
    main()
