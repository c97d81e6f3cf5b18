"""Theorems about the page of several runs: what differs, who ended highest, what separates them."""
import html
import json
import re
from dataclasses import asdict

import pytest

import config
from lab import compare

GAIN = {"before": 0.25, "after": 0.5, "change": 0.25, "interval": [0.2, 0.3], "n": 40}


def run(folder, name, tests=None, held=None, log=(), **changes):
    """The files of a run that train.py would leave in folder/name."""
    (folder / name).mkdir(parents=True)
    settings = asdict(config.Config(**{"model": "m", "data": ("d",), "out": name} | changes))
    for file, value in (("config", settings), ("results", {
            "tests": tests or {}, "held_out": held or {}, "lengths": {}, "rows": {}})):
        (folder / name / f"{file}.json").write_text(json.dumps(value), "utf-8")
    (folder / name / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in log), "utf-8")
    return str(folder / name)


def gain(after, low, high):
    return GAIN | {"after": after, "change": after - 0.25, "interval": [low - 0.25, high - 0.25]}


def log(*names, steps=4):
    return [{"step": i + 1} | {name: i * (k + 1.0) for k, name in enumerate(names)}
            for i in range(steps)]


def cells(text, head):
    part = text.split(f"<h2>{head}</h2>")[1].split("</table>")[0]
    return [[html.unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", part)]


def test_the_table_of_settings_holds_only_what_differs(tmp_path):
    """And never where a run was written.
    Red: lab/compare.py:differing: `if any(v != values[0] for v in values)` -> ``
    Red: lab/compare.py:differing: `("out", "resume")` -> `("resume",)`"""
    runs = compare.read([run(tmp_path, "a", lr=1e-3, data=("x", "y")), run(tmp_path, "b", lr=1e-3),
                         run(tmp_path, "c", lr=1e-3, loss="dpo", seed=3)])
    found = cells(compare.body(runs), "Settings that differ")
    assert found == [["", "a", "b", "c"], ["data", "x, y", "d", "d"],
                     ["loss", "uft", "uft", "dpo"], ["seed", "0", "0", "3"]]


def test_a_test_names_the_highest_run_and_whether_the_intervals_separate_it(tmp_path):
    """Ends 40 (35 to 45) and 50 (44 to 56) overlap at 44 to 45; 50 (46 to 54) lies above.
    Red: lab/compare.py:judge: `>= ends(gains[first[0]])[0]` -> `>= gains[first[0]]["after"]`
    Red: lab/compare.py:judge: `max(g["after"]` -> `min(g["after"]`
    Red: lab/compare.py:ends: `gain["before"] + low` -> `low`"""
    def told(*ends):
        return compare.judge("t", dict(zip("abc", ends, strict=False)))

    low = gain(0.4, 0.35, 0.45)
    assert told(low, gain(0.5, 0.44, 0.56)) == (
        "b ended highest in t, 50.0%; the 95% intervals do not separate it from a")
    assert told(low, gain(0.5, 0.46, 0.54), low) == (
        "b ended highest in t, 50.0%; its 95% interval lies above every other")
    assert told(low, low).startswith("a and b ended highest in t, 40.0%; alike")
    assert "do not separate it from a" in told(low, GAIN | {"interval": None})


def test_results_stand_side_by_side(tmp_path):
    """Red: lab/compare.py:percent: `{gain['after']:.1%}` -> `{gain['before']:.1%}`
    Red: lab/compare.py:tables: `r.get("held_out", {}).get("after", {})` -> `{}`
    Red: lab/compare.py:tables: `if v is None` -> `if 0`"""
    ends = ({"score_mse": 0.125, "logps/sft": -3.5}, {"logps/sft": -2.0})
    runs = compare.read([
        run(tmp_path, name, {"t": g}, {"before": {"logps/sft": -4.0}, "after": after})
        for name, g, after in zip("ab", (gain(0.5, 0.4, 0.6), GAIN | {"interval": None}), ends,
                                  strict=True)])
    text = compare.body(runs)
    assert cells(text, r"Tests: end (95% interval)") == [
        ["", "a", "b"], ["t", "50.0% (40.0 to 60.0)", "50.0% (unknown)"]]
    assert cells(text, "Held-out rows: end") == [
        ["", "a", "b"], ["score_mse", "0.125", ""], ["logps/sft", "-3.5", "-2"]]


def test_held_out_numbers_are_judged_only_where_the_rows_are_the_same(tmp_path):
    """Lower is better for errors, higher for rewards.
    Red: lab/compare.py:same_start: `any(starts) and` -> ``
    Red: lab/compare.py:same_start: `all(s == starts[0] for s in starts)` -> `1`
    Red: lab/compare.py:verdict: `if word == "highest"` -> `if word`"""
    def told(starts, **names):
        runs = {name: ({}, [], {"held_out": {
            "before": {"logps/sft": start}, "after": {k: v[i] for k, v in names.items()}}})
            for i, (name, start) in enumerate(zip("ab", starts, strict=True))}
        return compare.verdict(runs)

    assert told((-4.0, -4.000001), score_mse=(0.2, 0.1), reward=(0.2, 0.1)) == [
        "a ended highest in held-out reward, 0.2000 (no interval)",
        "b ended lowest in held-out score_mse, 0.1000 (no interval)"]
    assert told((-4.0, -5.0), score_mse=(0.2, 0.1)) == [compare.APART]
    nothing = {name: ({}, [], {}) for name in "ab"}
    assert compare.verdict(nothing) == [compare.APART]


def test_a_metric_that_two_runs_logged_is_one_chart_with_a_line_for_each(tmp_path):
    """The loss only where it is the same loss.
    Red: lab/compare.py:overlaid: `len(lines) > 1` -> `lines`
    Red: lab/compare.py:overlaid: `len(losses) == 1` -> `losses`"""
    paths = [run(tmp_path, "a", log=log("loss", "rewards/sft", "grad_norm")),
             run(tmp_path, "b", log=log("loss", "rewards/sft", "kl")),
             run(tmp_path, "c", log=log("loss", "grad_norm"), beta=0.5)]

    def drawn(some):
        text = compare.overlaid(compare.read(some))
        names = re.findall(r"<figcaption><b>(.*?)</b>", text)
        assert text.count('class="line"') == 2 * len(names) or len(some) > 2
        return names

    assert drawn(paths[:2]) == ["Loss", "Implicit reward: sft"]
    assert drawn(paths) == ["Implicit reward: sft", "Gradient norm"]


def test_the_command_writes_a_page_and_says_its_verdict(tmp_path, capsys):
    """Runs whose folders share a name go by their paths; markup in them is text.
    Red: lab/compare.py:read: `names.count(name) == 1` -> `1`
    Red: lab/compare.py:body: `{escape(name)}` -> `{name}`
    Red: lab/compare.py:read: `2 <= len(paths)` -> `1 <= len(paths)`"""
    paths = [run(tmp_path / name, "r&d", {"t": GAIN}) for name in ("a", "b")]
    out = tmp_path / "two.html"
    compare.main([*paths, "--out", str(out)])
    text = out.read_text("utf-8")
    assert capsys.readouterr().out.splitlines() == [
        f"{' and '.join(paths)} ended highest in t, 50.0%; alike", compare.APART, str(out)]
    assert "r&amp;d" in text and "r&d" not in text and "<script" not in text
    with pytest.raises(SystemExit):
        compare.main([paths[0]])
    assert "found 1 runs, expected 2 to 8" in capsys.readouterr().err
