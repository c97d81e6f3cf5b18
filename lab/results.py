"""Writes docs/results.md from lab/results/*.json: tables, settings, and a verdict per claim.

A verdict states what the numbers must show for it to hold (`shows`); where they no longer do, this
stops and says so, instead of printing a sentence that has become untrue.

    make results        runs every experiment that is not cached, draws the figures, writes the page
    python -m lab.results       writes the page only
"""
import ast
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from lab import (
    beta,
    figures,
    hints,
    mixture,
    online,
    saturation,
    scores,
    shapes,
    summary,
    tables,
)

OPENING = """# The paper in miniature

A language model of 0.78 million weights that knows a small world
([`lab/world.py`](../lab/world.py)) is fine-tuned in every way the paper names. {seeds} seeds draw
the training rows, the adapters and the order; the base, the facts and the test questions stay.
Every arm tried {budget} settings on validation prompts with {tuning} other seeds; the best mean
of form, content, truth, mc2, sums and skills was then run on the test prompts. Numbers are means
+- half a 95% t-interval over seeds, differences are paired by seed, a star marks an interval that
excludes zero, and no correction for many comparisons is made.

```
make results
```
runs what is not cached in `runs/lab`, draws the figures and writes this page. It was made on:
{machine}. Another machine rounds differently, and greedy answers can flip; a test trains one cell
anew and compares.

What the columns are: [`lab/measure.py`](../lab/measure.py). In short: `form` is instructions
followed to the letter (`form_demonstrations`, `form_feedback`, `form_mixed` by what taught the
constraints), `content` the same and right, `truth` and `mc2` contaminated facts of entities that
no training prompt mentions, `sums` and `skills` what the base already could, `kl_policy`
KL(policy||base) and `kl_base` KL(base||policy) of an answer in nats, `kl_text` drift per token of
pretraining text, `ended` answers that end within 40 tokens, `nll` of held-out demonstrations,
`pairs` held-out pairs in score order.
"""
CLOSING = """## What this cannot decide

One base, one world, one model size, LoRA only. 0.78 million weights say nothing about what a 7B
model does with real instructions, and the world was built so that truth can be elicited. What
carries over are the mechanisms (the limit of small beta, saturation, what scores add over labels)
and the controls: which differences vanish when the baselines are tuned as much as the method."""
LAB = Path(__file__).parent
PAGE = LAB.parent / "docs/results.md"
EDGE = """`edge`: the winner has the largest or the smallest learning rate tried. `steps`: of every
stage. The expected best is optimistic, as any maximum of noisy means."""
WORTH = {"paid": "reward (of rule arms: form)", "content": "content"}  # what chose a setting
MARGIN = 0.03  # of a share: what counts as the same
HEADS = ("Question", "Prediction", "Command", "Runtime", "Answer")


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, what came of it here, and the differences that must show it.

    shows: (a, b, column, sign): sign +1 or -1 where the interval of a - b must lie above or below
    zero; "same" where all of it must lie within MARGIN of zero; "open" where it includes zero and
    reaches further, so that nothing can be said.
    """

    text: str
    verdict: str  # reproduced, not reproduced, or undecidable here
    reason: str
    shows: tuple[tuple[str, str, str, int | str], ...]
    source: str = "tables"  # whose recorded runs they are


COLUMNS = ("form", "form_demonstrations", "form_feedback", "content", "truth", "sums", "skills",
         "select", "kl_policy", "kl_text", "length")
PAIRS = (("uft", "sft"), ("uft", "sft_token_mean"), ("uft_bce", "uft"), ("sft_then_dpo", "sft"),
         ("sft_then_kto", "sft"), ("sft_then_una", "sft"), ("uft_mixed", "sft"),
         ("uft_mixed", "sft_then_dpo"), ("uft_mixed", "sft_then_kto"),
         ("uft_mixed", "sft_then_una"), ("uft_mixed", "una"), ("uft_mixed", "sft_good"),
         ("uft_mixed", "uft_bce_mixed"), ("uft_mixed", "sft_una_mixed"),
         ("uft_mixed", "weighted_sft"), ("uft_mixed", "interleaved"),
         ("uft_mixed", "una_then_sft"), ("uft_mixed", "sft_then_uft_mixed"))
CLAIMS = (
    Claim("UFT on demonstrations is as good as SFT or better", "reproduced, as a tie",
          "for small beta UFT is SFT on the sequence sum",
          (("uft", "sft", "select", "same"), ("uft", "sft", "content", "same"),
           ("uft", "sft", "truth", "same"), ("uft", "sft", "form", "open"))),
    Claim("... and stays closer to the base", "reproduced, and small",
          "rows that have gained fade; a smaller learning rate does as much (see beta.py)",
          (("uft", "sft", "kl_policy", -1), ("uft", "sft", "kl_text", -1))),
    Claim("SFT followed by DPO or KTO pays an alignment tax", "reproduced",
          "no setting tried gains truth and keeps the sums (see the frontier)",
          (("sft_then_dpo", "sft", "form_demonstrations", -1), ("sft_then_dpo", "sft", "sums", -1),
           ("sft_then_kto", "sft", "form_demonstrations", -1), ("sft_then_kto", "sft", "sums", -1),
           ("sft_then_kto", "sft", "form", -1))),
    Claim("SFT followed by UNA pays one too", "reproduced",
          "it forgets the demonstrated constraints while it learns the others",
          (("sft_then_una", "sft", "form_demonstrations", -1), ("sft_then_una", "sft", "sums", -1),
           ("sft_then_una", "sft", "skills", -1), ("sft_then_una", "sft", "form_feedback", 1))),
    Claim("UFT on the mixture pays none", "reproduced, within wide intervals",
          "nothing is lost against SFT that eight seeds can see",
          (("uft_mixed", "sft", "form", 1), ("uft_mixed", "sft", "skills", "same"),
           ("uft_mixed", "sft", "form_demonstrations", "open"),
           ("uft_mixed", "sft", "sums", "open"))),
    Claim("UFT follows instructions best",
          "reproduced against DPO and KTO, undecidable here against UNA",
          "SFT on demonstrations and well-scored answers follows them better still",
          (("uft_mixed", "sft_then_dpo", "form", 1), ("uft_mixed", "sft_then_kto", "form", 1),
           ("uft_mixed", "sft_then_una", "form", "open"), ("uft_mixed", "sft_good", "form", -1))),
    Claim("UFT is the most truthful", "not reproduced",
          "demonstrations, true in 57%, pull against the scores; alignment that comes last, or "
          "alone, is more truthful",
          (("uft_mixed", "sft_then_una", "truth", -1), ("uft_mixed", "sft_then_kto", "truth", -1),
           ("uft_mixed", "una", "truth", -1), ("uft_mixed", "sft_then_dpo", "truth", "open"))),
    Claim("UFT has the best average", "not reproduced",
          "better than SFT and SFT+DPO, but UNA alone and SFT+UNA gain more truth than they lose "
          "elsewhere in this mean of six",
          (("uft_mixed", "sft", "select", 1), ("uft_mixed", "sft_then_dpo", "select", 1),
           ("uft_mixed", "sft_then_una", "select", -1), ("uft_mixed", "una", "select", -1))),
    Claim("It is the single stage that does it", "not reproduced",
          "batches that alternate, UNA before SFT, and SFT before the mixture (48 more steps) do "
          "as well or better: what helps is that demonstrations are still rehearsed",
          (("uft_mixed", "interleaved", "form", -1),
           ("uft_mixed", "una_then_sft", "select", "same"),
           ("uft_mixed", "sft_then_uft_mixed", "form", -1),
           ("uft_mixed", "sft_then_uft_mixed", "select", -1))),
    Claim("It is the loss of Eq. 7 that does it", "in part",
          "cross-entropy on the same targets is the same; without saturation, as SFT with weight "
          "r - 1/2, the gains are the same but drift and forgetting are larger",
          (("uft_mixed", "uft_bce_mixed", "select", "same"),
           ("uft_mixed", "weighted_sft", "kl_text", -1), ("uft_mixed", "weighted_sft", "sums", 1),
           ("uft_mixed", "weighted_sft", "skills", 1),
           ("uft_mixed", "sft_una_mixed", "skills", 1))),
    Claim("Scores say more than labels", "for form reproduced, for truth the reverse",
          "a label cannot say that a true answer ignored the constraint; constant scores teach "
          "no truth at all",
          (("mixture, given", "mixture, binary", "form", 1),
           ("mixture, given", "mixture, binary", "truth", -1),
           ("mixture, given", "mixture, constant", "truth", 1),
           ("mixture, given", "mixture, shuffled", "truth", 1)), "scores"),
    Claim("More demonstrations lower truthfulness (Tables 7-9)", "reproduced",
          "at fixed looks at the feedback and at fixed steps alike: it is their share, and it is "
          "so by design here, where demonstrations are true in 57%",
          tuple((f"3072 demonstrations, {how}", f"192 demonstrations, {how}", "truth", -1)
                for how in ("one pass", "96 steps")), "mixture"),
    Claim("UFT regularises like a KL penalty", "not reproduced",
          "it stops row by row; SFT that does so cannot be told from it, SFT stopped early is "
          "better than both",
          (("uft, 24 passes", "sft_quarter, 24 passes", "kl_policy", -1),
           ("uft, 24 passes", "sft_stop, 24 passes", "kl_policy", "open"),
           ("uft, 24 passes", "sft_kl, 24 passes", "form_demonstrations", 1),
           ("uft, 24 passes", "sft_quarter, 8 passes", "nll", 1)), "shapes"),
    Claim("Online UNA does what RLHF with PPO does (UNA, online)",
          "reproduced for the model's reward, not for the rest",
          "the same reward a nat further from the base, and less of it is true; RLOO, as simple, "
          "earns it without that nat",
          (("una_ref", "ppo", "reward", "same"), ("una_ref", "ppo", "kl_policy", 1),
           ("una_ref", "ppo", "graded", -1), ("una_ref", "rloo", "reward", "same"),
           ("una_ref", "rloo", "kl_policy", 1)), "online"),
    Claim("... for less time and memory", "undecidable here",
          "sampling costs more than a value head, and the policy is 3 MB of a process of 700",
          (("una_ref", "ppo", "cost", "open"), ("una_ref", "ppo", "mib", "open")), "online"),
    Claim("A loss that is anchored at the policy itself (the authors' code) stays near the base",
          "not reproduced", "nothing in it looks at the reference",
          (("una_old", "una_ref", "reward", "same"), ("una_old", "una_ref", "kl_policy", 1)),
          "online"),
    Claim("Online UNA takes any reward in [0, 1], a rule's as well",
          "reproduced, with half of GRPO's gain",
          "where most rewards are 0 it pushes nearly every answer down, for it has no baseline; at "
          "the larger learning rate nothing is left of the policy",
          (("una_ref, rule", "base", "form", 1), ("una_ref, rule", "grpo, rule", "form", -1),
           ("una_ref, rule", "grpo, rule", "sums", -1)), "online"),
    Claim("Reward from a model becomes true reward", "hardly, here",
          "the model puts 57% of new pairs in order; what all arms learn of it is to be brief",
          tuple((n, "base", c, sign) for n in ("ppo", "una_ref", "rloo") for c, sign in (
              ("reward", 1), ("length", -1))) + (("ppo", "base", "graded", 1),
          ("una_ref", "base", "graded", "same")), "online"),
    Claim("Hints and RL beat RL where reward is sparse (Liu et al.)",
          "not reproduced at the paper's weight, reproduced at fifty times it",
          "hints make groups of answers differ; our reading: behind a hint the policy learns to "
          "end an answer, and to begin one only from the hint's likelihood",
          (("hints", "grpo", "signal", 1), ("hints", "grpo", "content", -1),
           ("uft_hint", "grpo", "content", "open"),
           ("uft_hint_strong", "grpo", "content", 1)), "hints"),
    Claim("... and beat SFT", "not reproduced",
          "SFT on the same solutions at the same rate does as well as the best of them, in a "
          "seventh of the time, and RL after it adds nothing",
          (("uft_hint", "sft", "content", -1), ("uft_hint_strong", "sft", "content", "open"),
           ("sft_then_grpo", "sft", "content", "open"), ("uft_hint_strong", "sft", "cost", 1)),
          "hints"),
)


def check(claim: Claim, rows: summary.Rows) -> None:
    """ValueError where the numbers do not show what the verdict says."""
    for a, b, column, wanted in claim.shows:
        mean, half = summary.difference(rows[a], rows[b], column)
        found = {1 if mean > 0 else -1} if abs(mean) > half else {"open"}
        found |= {"same"} if abs(mean) + half <= MARGIN else set()
        if wanted not in found or (wanted == "open" and "same" in found):
            raise ValueError(f"the verdict on {claim.text!r} needs {column} of {a} - {b} to be "
                             f"{wanted}, found {summary.cell(mean, half, column, True)}: "
                             "rewrite the verdict in lab/results.py")


def evidence(claim: Claim, rows: summary.Rows) -> str:
    def shown(a: str, b: str, column: str) -> str:
        return summary.cell(*summary.difference(rows[a], rows[b], column), column, True)

    return "; ".join(f"{a} - {b}: {c} {shown(a, b, c)}" for a, b, c, _ in claim.shows)


def opening(name: str) -> dict[str, str]:
    """Question, Prediction, Command, Runtime and Answer from the opening of lab/NAME.py."""
    text = ast.get_docstring(ast.parse((LAB / f"{name}.py").read_text("utf-8"))) or ""
    parts, head = {"Title": text.split("\n")[0]}, ""
    for line in text.splitlines():
        if line.split(" ")[0] in HEADS:
            head, _, rest = line.partition(" ")
            parts[head] = rest.strip()
        elif head and line.startswith(" "):
            parts[head] += " " + line.strip()
        else:
            head = ""
    return parts


def question(name: str, body: str) -> str:
    """The section of one question: what was asked, expected and found, then its numbers."""
    parts = opening(name)
    said = "\n".join(f"- **{head}.** {parts[head]}" for head in HEADS if head != "Command")
    return f"## {parts['Title']}\n\n`{parts['Command']}`\n\n{said}\n\n{body}"


def tried(tuned: dict[str, list[dict]], names: Sequence[str]) -> str:
    """Every setting of the arms on the validation split, the best of each first."""
    columns = ("form", "content", "truth", "sums", "skills", "kl_text", "length", "select")
    rows = [[name, f"{r['lr']:g}", f"{r['beta']:g}", *(
        f"{r[c]:.3f}" if c == "kl_text" else f"{r[c]:.2f}" if c in summary.NO_SHARES else
        f"{100 * r[c]:.1f}" for c in columns)] for name in names for r in tuned[name]]
    return summary.markdown(["arm", "lr", "beta", *columns], rows)


def figure(name: str, text: str) -> str:
    return f"![{text}](figures/{name}.svg)"


def edge(rows: list[dict]) -> bool:
    """Whether the best of the settings (the first) has an extreme learning rate."""
    rates = [r["lr"] for r in rows]
    return rates[0] in (min(rates), max(rates))


def main_tables(held: dict) -> str:
    """The arms on the test split: quality, drift, differences, then how they were tuned."""
    rows, tuned = held["rows"], held["tuned"]
    settings = [[n, f"{r[0]['lr']:g}", f"{r[0]['beta']:g}", "yes" if edge(r) else "",
                 held["steps"][n], *(f"{100 * v:.1f}" for v in held["best_of"][n])]
                for n, r in tuned.items()]
    return "\n\n".join((
        "### What the arms can do", summary.table(rows, tables.QUALITY),
        "### How far they went", summary.table(rows, tables.DRIFT),
        "### Differences, paired by seed", summary.differences(rows, PAIRS, COLUMNS),
        "### Settings chosen, and the expected best validation score of k settings",
        EDGE, summary.markdown(["arm", "lr", "beta", "edge", "steps", *(
            f"k = {k + 1}" for k in range(held["budget"]))], settings),
        figure("best_of", "expected best validation score against the number of settings tried"),
        "### The frontier: every setting tried, on the validation split",
        figure("frontier", "instructions followed against truth and against drift, per setting"),
        tried(tuned, ("uft_mixed", *figures.SEQUENTIAL))))


def on_policy(name: str, rows: summary.Rows, page: ModuleType, score: str) -> str:
    """The arms, their differences, and what was tried: the settings and their score, best first."""
    settings = [[arm, *(f"{r['lr']:g}" + (f", {r['beta']:g}" if "beta" in r else "")
                        + f": {100 * r[score]:.1f}" for r in tried)]
                for arm, tried in summary.load(name)["tuned"].items()]
    head = ["arm", *(f"setting {i + 1}" for i in range(len(settings[0]) - 1))]
    return "\n\n".join((
        summary.table(rows, page.COLUMNS), summary.differences(rows, page.PAIRS, page.COLUMNS),
        f"Settings tried (lr, beta) and their {WORTH[score]} on the validation split:",
        summary.markdown(head, settings)))


def page() -> str:
    """The whole of docs/results.md."""
    held = summary.load("tables")
    runs = {n: summary.load(n)["rows"] for n in (
        "tables", "scores", "mixture", "shapes", "beta", "online", "hints")}
    for claim in CLAIMS:
        check(claim, runs[claim.source])
    verdicts = summary.markdown(["claim", "verdict", "why", "numbers"], [
        [c.text, f"**{c.verdict}**", c.reason, evidence(c, runs[c.source])] for c in CLAIMS])
    bandit = summary.markdown(["loss", "is given", "TV to pi*", "J* - J"], [
        [r["name"], r["given"], f"{r['tv']:.3f}", f"{r['gap']:.3f}"]
        for r in summary.load("optimum")["rows"]])
    parts = [
        OPENING.format(machine=held["machine"], seeds=len(held["seeds"]), budget=held["budget"],
                       tuning=len(held["tuning_seeds"])),
        "## Verdicts", verdicts, "## The arms", main_tables(held),
        question("scores", summary.table(runs["scores"], scores.COLUMNS) + "\n\n"
                 + figure("scores", "truth and form with scores kept, cut, shuffled, constant")),
        question("mixture", summary.table(runs["mixture"], mixture.COLUMNS) + "\n\n"
                 + figure("mixture", "truth and form against the number of demonstrations")),
        question("shapes", summary.table(runs["shapes"], shapes.COLUMNS)),
        question("beta", summary.table(runs["beta"], beta.COLUMNS) + "\n\n"
                 + figure("drift", "held-out nll against both KLs")),
        question("saturation", saturation.table(summary.load("saturation")) + "\n\n"
                 + figure("saturation", "weight and gain of demonstrations over training")),
        question("optimum", bandit + "\n\n"
                 + figure("optimum", "total variation to the exact optimum")),
        question("online", on_policy("online", runs["online"], online, "paid") + "\n\n"
                 + figure("online", "both rewards over training, reward against divergence")),
        question("hints", on_policy("hints", runs["hints"], hints, "content") + "\n\n"
                 + figure("hints", "content and form per arm")),
        CLOSING]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(), "utf-8")
    print("docs/results.md")


if __name__ == "__main__":
    main()
