"""docs/math.md and docs/exercises.md: names exist, numbers are computed, GitHub can typeset them.

And the theorems that they state and no other file proves. u = beta D, D = l - l0, s = sigmoid(u).
"""
import ast
import importlib.util
import re
from pathlib import Path

import pytest
import red
import torch
from calculus import BETA, LOGPS, REF, close, rated, real, slope

import losses
import policy_gradients
from lab import figures, math_figures, summary

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("math.md", "exercises.md")
SOLUTIONS = ROOT / "docs/solutions/test_exercises.py"
NUMBER = r"(\d+\.\d+|\d+)"
U = torch.linspace(-5, 5, 100_001, dtype=torch.float64)


def page(name):
    return (ROOT / "docs" / name).read_text("utf-8")


def prose(name):
    """The page as one line, so that a phrase may be wrapped anywhere."""
    return " ".join(page(name).split())


def defined(path):
    return {n.name for n in ast.parse(path.read_text("utf-8")).body if hasattr(n, "name")}


# Theorems


def test_uft_with_a_small_beta_is_sft_weighted_by_r_minus_one_half():
    """(2 / beta) (L - (1/2 - r)^2) = -(r - 1/2) D + beta D^2 / 8 + O(beta^2).
    Red: losses.py:uft: `- rewards)` -> `- rewards**2)`
    Red: losses.py:implicit_reward: `return beta *` -> `return 2 * beta *`"""
    d = real(3.0, -2.0)
    for r in (0.0, 0.25, 0.5, 0.9, 1.0):
        for beta in (1e-2, 1e-3, 1e-4):
            rise = (2 / beta) * (rated(losses.uft, r, beta)(d) - (0.5 - r)**2)
            close((rise + (r - 0.5) * d) / beta, d.square() / 8, 3 * beta)


def test_una_reward_gradient_is_two_beta_times_the_error_of_the_reward():
    """dL/dl = 2 beta (u - r), r any real number.
    Red: losses.py:una_reward: `.square()` -> `.abs()`"""
    rewards = 5 * REF
    close(slope(lambda l: losses.una_reward(l, REF, rewards, BETA), LOGPS),
          2 * BETA * (BETA * (LOGPS - REF) - rewards), 1e-13)


def test_any_score_beyond_the_reach_of_the_policy_pulls_up_for_ever():
    """u <= -beta l0, so r >= sigmoid(-beta l0) leaves dL/dl < 0 for every l < 0, not only r = 1.
    Red: losses.py:implicit_reward: `(logps - ref_logps)` -> `(logps - 2 * ref_logps)`"""
    lowered = -torch.logspace(-3, 3, 50, dtype=torch.float64)
    for l0 in (-2.0, -9.0):
        ref = torch.full_like(lowered, l0)
        r = torch.sigmoid(-BETA * ref)
        assert (slope(lambda l, ref=ref, r=r: losses.uft(l, ref, r, BETA), lowered) < 0).all()
        close(slope(lambda l, ref=ref, r=r: losses.uft(l, ref, r, BETA), 0 * lowered), 0.0, 1e-16)


@pytest.mark.parametrize("name", sorted(defined(SOLUTIONS)))
def test_every_solution_holds(name):
    """Red: losses.py:uft: `.square()` -> `.abs()`
    Red: losses.py:bco_pair: `logsigmoid(-rejected)` -> `logsigmoid(rejected)`
    Red: policy_gradients.py:grpo_advantages: `return centred / (std + eps)` -> `return centred`
    Red: docs/solutions/test_exercises.py:apo_zero: `+ torch.sigmoid(rej` -> `- torch.sigmoid(rej`
    Red: docs/solutions/test_exercises.py:uft_shifted: `u + shift` -> `u - shift`"""
    spec = importlib.util.spec_from_file_location("solutions", SOLUTIONS)
    solutions = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(solutions)
    if name.startswith("test_"):
        getattr(solutions, name)()


# Names


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_a_page_names_is_there(name):
    """Red: tests/test_losses_pairs.py: `def test_una_pair_is_dpo` -> `def test_una_is_dpo`
    Red: docs/solutions/test_exercises.py: `def test_3_cross` -> `def test_three_cross`
    Red: tests/test_losses_kto.py: `def test_kto_z0_is_a_clamped` -> `def test_z0_is_a_clamped`"""
    named = set(re.findall(r"`(test_\w+)`", page(name)))
    there = {i.split("::")[1] for i in red.tests("")} | defined(SOLUTIONS)
    assert len(named) > 10 and named - there == set()


@pytest.mark.parametrize("name", PAGES)
def test_every_function_and_file_that_a_page_links_is_there(name):
    """Red: losses.py: `def simpo(` -> `def simple(`
    Red: lab/optimum.py: `def optimum(` -> `def best(`"""
    for text, link in re.findall(r"\[`?([^]`]+)`?\]\(([^)]+)\)", page(name)):
        path = ROOT / "docs" / link
        assert path.exists(), link
        if path.suffix == ".py" and "/" not in text:
            module, _, function = text.rpartition(".")
            assert path.resolve() == ROOT / (module.replace(".", "/") + ".py"), text
            assert function in defined(path), text


@pytest.mark.parametrize("module", (losses, policy_gradients))
def test_every_function_of_the_mathematics_is_on_the_page(module):
    """Red: losses.py: `def sft(` -> `def new(`
    Red: policy_gradients.py: `def whiten(` -> `def normalise(`"""
    missing = {f for f in defined(Path(module.__file__))
               if f"[`{module.__name__}.{f}`]" not in page("math.md")}
    assert missing == set()


# Numbers


def reached(share):
    """The u > 0 at which a demonstration's weight under Eq. 7 is this share of the first."""
    weight = 4 * slope(rated(losses.uft, beta=1.0), U).abs()
    return U[(weight >= share).nonzero().max()].item()


def left(u):
    """A demonstration's weight under Eq. 7 at u, 1 at the start."""
    return 4 * slope(rated(losses.uft, beta=1.0), real(u)).abs().item()


def medians():
    """The weights that lab/saturation.py found at the end of its runs, in per cent."""
    return [100 * run["steps"][-1]["demonstrations weight 50"]
            for run in summary.load("saturation").values()]


def distances(*names):
    """Total variation to pi* on the bandit."""
    tv = {row["name"]: row["tv"] for row in summary.load("optimum")["rows"]}
    return [tv[name] for name in names]


def floor():
    rows = {row["name"]: row["loss"] for row in summary.load("optimum")["rows"]}
    return [rows["UFT, uniform, all > 1/2"]]


def shares(*betas):
    return [p for beta in betas for p in math_figures.shown(beta).tolist()[:2]]


def advantages():
    """Of the better of two answers: GRPO twice, RLOO twice."""
    rewards = torch.stack((real(0.1, 0.9), real(0.50, 0.51)))
    return [f(rewards)[i, 1].item() for f in (
        policy_gradients.grpo_advantages, policy_gradients.rloo_advantages) for i in (0, 1)]


def stiffness(r):
    return [2 * r * (1 - r)]


QUOTED = (  # (page, phrase with {} for each number, the numbers)
    ("math.md", "is a half at $u = {}$, a tenth at $u = {}$, a hundredth at $u = {}$",
     lambda: [reached(share) for share in (0.5, 0.1, 0.01)]),
    ("math.md", r"A tenth is a gain of {} nats with $\beta = 0.01$, of {} nats with $\beta = 0.1$",
     lambda: [reached(0.1) / beta for beta in (0.01, 0.1)]),
    ("math.md", "are {} a token for 20 tokens, {} for 1000",
     lambda: [round(reached(0.1) / 0.01) / tokens for tokens in (20, 1000)]),
    ("math.md",
     r"{}% of the weight is left with $\beta = 0.01$, {}% with $0.1$, {}% with $0.3$, {}%",
     medians),
    ("math.md", "Two responses shown {} and {} of the time, the reference giving them {} and {}",
     lambda: [*math_figures.DATA[:2].tolist(), *math_figures.REF.exp()[:2].tolist()]),
    ("math.md", r"UFT ends at {} and {} with $\beta = 0.1$, and prefers the other one, {} and {},",
     lambda: shares(0.1, 1.0)),
    ("math.md", r"with $\beta = 0.01$ and $l_0 = -20$, $s$ stays below {} and the weight above {}%",
     lambda: [torch.sigmoid(real(0.2)).item(), 100 * left(0.2)]),
    ("math.md", r"($4/\beta$ is {} with $\beta = 0.01$)",
     lambda: [1 / slope(rated(losses.uft, beta=0.01), real(0)).abs().item()]),
    ("math.md", "the mean of Eq. 7 cannot fall below {}", floor),
    ("math.md", "cross-entropy on-policy is {} away in total variation, UFT on-policy {},",
     lambda: distances("BCE, on-policy", "UFT, on-policy")),
    ("math.md", "the two on uniform data {} and {}, GRPO {} and without its division {}, IPO {},",
     lambda: distances("BCE, uniform", "UFT, uniform", "GRPO", "GRPO without std",
                       "IPO, tau = beta")),
    ("math.md", "KTO {}, the authors' online loss {}.",
     lambda: distances("KTO, z0 = KL, uniform", "authors' online loss")),
    ("exercises.md", "below the reference, {} times as hard",
     lambda: [4 * slope(rated(losses.uft, beta=1.0), U).abs().max().item()]),
    ("exercises.md", "a score of 0.9?", list),
    ("exercises.md", "and {} for a score of 0.9", lambda: stiffness(0.9)),
    ("exercises.md", "from 0.1 to 0.05, and the learning rate doubled", list),
    ("exercises.md", "and it is pulled {} times as hard", lambda: [left(1.0) / left(2.0)]),
    ("exercises.md", "if the score is 0.6? If it is 0.4?", list),
    ("exercises.md", "earn 0.1 and 0.9; two others 0.50 and 0.51", list),
    ("exercises.md", "GRPO: {} and {}; RLOO: {} and {}", advantages))


def pattern(phrase):
    return re.escape(phrase).replace(r"\{\}", NUMBER)


@pytest.mark.parametrize(("name", "phrase", "values"), QUOTED)
def test_every_number_that_a_page_quotes_is_what_the_code_gives(name, phrase, values):
    """To the last digit that is printed.
    Red: losses.py:uft: `).square()` -> `).pow(4)`
    Red: policy_gradients.py:grpo_advantages: `eps: float = 1e-4` -> `eps: float = 1e-2`
    Red: lab/math_figures.py: `(0.7, 0.3, 0.0)` -> `(0.6, 0.4, 0.0)`"""
    found = re.findall(pattern(phrase), prose(name))
    assert len(found) == 1, phrase
    printed = re.findall(NUMBER, " ".join(re.search(pattern(phrase), prose(name)).groups()))
    for text, value in zip(printed, values(), strict=True):
        digits = len(text.partition(".")[2])
        assert abs(float(text) - value) <= 0.5 * 10**-digits + 1e-9, (text, value)


@pytest.mark.parametrize("name", PAGES)
def test_no_decimal_stands_on_a_page_unproved(name):
    """Every decimal and every per cent is inside a phrase of QUOTED.
    Red: tests/test_math.py:pattern: `NUMBER)` -> `"x")`
    Red: tests/test_math.py:prose: `page(name).split()` -> `page(name).split() + ["7.5"]`"""
    text = prose(name)
    for where, phrase, _ in QUOTED:
        if where == name:
            text = re.sub(pattern(phrase), "", text)
    assert re.findall(r"\d*\.\d+|\d+%", text) == []


# Typesetting


def formulas(name):
    """(line, formula, what stands before it, what behind) of each; code is taken out first."""
    text = re.sub(r"```.*?```", "", page(name), flags=re.DOTALL)
    for line in re.sub(r"`[^`\n]*`", "x", text).splitlines():
        assert line.count("$") % 2 == 0, line
        parts = re.split(r"\$\$?", line)
        for i in range(1, len(parts), 2):
            yield line, parts[i], parts[i - 1][-1:], parts[i + 1][:1]


@pytest.mark.parametrize("name", PAGES)
def test_github_can_typeset_every_formula(name):
    """Delimiters touch no letter; nothing that markdown would read first: a backslash before a
    mark, an underscore behind a bracket, a star, a bar in a table; no macro that is forbidden.
    Red: tests/test_math.py:page: `("utf-8")` -> `("utf-8").replace("\\pi^", "\\pi_{a}_")`
    Red: tests/test_math.py:page: `("utf-8")` -> `("utf-8").replace("}$", "$")`
    Red: tests/test_math.py:page: `("utf-8")` -> `("utf-8").replace("$ ", "$")`"""
    for line, formula, before, behind in formulas(name):
        assert formula.count("{") == formula.count("}"), line
        assert formula.count("(") == formula.count(")"), line
        assert not re.search(r"\\[^a-zA-Z]|[})\]]_|\*|operatorname|\\text\{[^}]*_", formula), line
        assert "|" not in formula or not line.startswith("|"), line
        assert before in ("", " ", "(") and behind in ("", *" .,;:)"), line
        if not line.startswith("$$"):
            assert formula == formula.strip(), line


@pytest.mark.parametrize("name", PAGES)
def test_displayed_formulas_stand_on_lines_of_their_own(name):
    """So do folds, with a blank line inside at both ends.
    Red: tests/test_math.py:page: `("utf-8")` -> `("utf-8").replace("\\n\\n", "\\n")`"""
    lines = page(name).splitlines()
    for i, line in enumerate(lines):
        if "$$" in line:
            assert re.fullmatch(r"\$\$ [^$]+ \$\$", line), line
            assert lines[i - 1] == lines[i + 1] == "", line
    assert page(name).count("<details>") == page(name).count("</details>")
    assert not re.search(r"</summary>\n\S|\S\n</details>", page(name))


@pytest.mark.parametrize(("name", "most"), [(PAGES[0], 350), (PAGES[1], 200)])
def test_a_page_has_the_width_of_the_readme_and_an_end(name, most):
    """Red: tests/test_math.py:page: `("utf-8")` -> `("utf-8").replace("\\n", " ")`
    Red: tests/test_math.py:page: `("utf-8")` -> `("utf-8") * 2`"""
    lines = page(name).splitlines()
    assert len(lines) <= most and max(map(len, lines)) <= 140
    assert not any(re.match(r"[>=+]", line) or line != line.rstrip() for line in lines)


# Figures


def test_every_figure_of_the_mathematics_is_on_the_page():
    """Red: lab/math_figures.py: `("pulls", 6.5` -> `("pull", 6.5`"""
    named = set(re.findall(r"\]\(figures/(\w+)\.svg\)", page("math.md")))
    assert named == {name for name, *_ in math_figures.FIGURES} | {"optimum"}


def test_the_committed_figures_are_those_of_the_code(tmp_path, monkeypatch):
    """Each number in the drawing to 0.02 points; small_beta's ends are among the quoted numbers.
    Red: lab/math_figures.py:demonstrations: `2 * s(u) * s(-u)**2` -> `2 * s(u) * s(-u)`
    Red: losses.py:uft: `).square()` -> `).square() / 2`
    Red: losses.py:dpo: `z = beta * margin` -> `z = 2 * beta * margin`
    Red: policy_gradients.py:kl: `torch.expm1(-d) + d` -> `torch.expm1(d) - d`"""
    drawn = tuple(one for one in math_figures.FIGURES if one[0] != "small_beta")
    monkeypatch.setattr(math_figures, "FIGURES", drawn)
    monkeypatch.setattr(figures, "OUT", tmp_path)
    math_figures.main()
    for name, *_ in drawn:
        new, old = (folder / f"{name}.svg" for folder in (tmp_path, ROOT / "docs/figures"))
        texts = [re.sub(r"id=\S+|url\S+|href=\S+", "", x.read_text("utf-8")) for x in (new, old)]
        numbers = [real(*map(float, re.findall(r"-?\d+\.?\d*", text))) for text in texts]
        close(*numbers, 0.02)


def test_the_pulls_of_the_figure_are_those_that_autograd_finds():
    """|dL/du| of SFT, UFT, BCE and KTO on a demonstration: closed form and losses.py.
    Red: losses.py:kto: `(1 - torch.sigmoid(advantage))` -> `(1 - torch.sigmoid(2 * advantage))`
    Red: losses.py:uft_bce: `-rewards * logsigmoid(u)` -> `-2 * rewards * logsigmoid(u)`"""
    for loss, form in math_figures.demonstrations().values():
        close(math_figures.pull(loss, math_figures.LINE), form(math_figures.LINE), 1e-15)


def test_uft_ends_where_the_weighted_frequencies_balance():
    """At rest pi(y) is data(y) c(s_y) over its sum, c of Eq. 7, whatever beta.
    Red: lab/math_figures.py:shown: `REF, torch.ones_like(x)` -> `REF, torch.zeros_like(x)`
    Red: lab/optimum.py:settle: `> 1e-13` -> `> 1e-1`"""
    for beta in (0.1, 1.0):
        end = math_figures.shown(beta)[:2]
        pull = slope(lambda l, b=beta: losses.uft(l, math_figures.REF[:2], torch.ones(2), b),
                     end.log()).abs() * math_figures.DATA[:2]
        close(pull / pull.sum(), end, 1e-9)
