"""Theorems about the page of a run: whole in itself, safe, and true to its folder's files."""
import html
import json
import re
import shlex
import xml.etree.ElementTree as ET
from dataclasses import asdict

import pytest

import charts
import config
import page
import train

EVIL = "<script>x&y"
GAIN = {"before": 0.125, "after": 0.5, "change": 0.375, "interval": [0.25, 0.5], "n": 240}
RESULTS = {
    "held_out": {"before": {"uft_loss": 0.25, EVIL: 0.0}, "after": {"uft_loss": 0.0625, EVIL: 1.0}},
    "tests": {"words correct": GAIN, EVIL: GAIN | {"interval": None, "n": 1}},
    "samples": [{"prompt": EVIL, "before": "", "after": EVIL, "right_before": False,
                 "right_after": True}],
    "lengths": {"before": {EVIL: 4.0}, "after": {EVIL: 2.5}},
    "verdict": f"words correct rose; {EVIL}", "seconds": 61.4}
REFERENCE = ("rewards/sft", "rewards/scored", "rewards/chosen", "rewards/rejected", "dlogp/sft",
             "dlogp/scored", "dlogp/chosen", "dlogp/rejected")
ALWAYS = ("loss", "grad_norm", "learning_rate")


def settings(**changes):
    return asdict(config.Config(**{"model": "m", "data": ("d",)} | changes))


def steps(count, names=ALWAYS + REFERENCE):
    return [{"step": i + 1} | {n: (i * 7 + k) % 5 - 1.5 for k, n in enumerate(names)}
            for i in range(count)]


@pytest.fixture
def made(tmp_path):
    """Writes the files of a run and returns the text of its page."""
    def make(rows, results=None, **changes):
        log = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "metrics.jsonl").write_text(log, "utf-8")
        (tmp_path / "config.json").write_text(json.dumps(settings(**changes)), "utf-8")
        if results is not None:
            (tmp_path / "results.json").write_text(json.dumps(results), "utf-8")
        return page.write(tmp_path).read_text("utf-8")
    return make


def well_formed(text):
    """The body as a tree: every tag closed, every & an entity."""
    return ET.fromstring(re.search(r"<body>.*</body>", text, re.DOTALL)[0])


def cells(text):
    return [[html.unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
            for row in re.findall(r"<tr>(.*?)</tr>", text)]


def test_the_page_is_whole_in_itself_and_escapes_whatever_a_user_supplied(made):
    """Texts that are markup arrive as text: prompts, answers, names of tests, paths.
    Red: page.py:table: `{escape(name)}` -> `{name}`
    Red: page.py:sample: `{escape(shown["prompt"])}` -> `{shown["prompt"]}`
    Red: page.py:sample: `{escape(shown[when]) or` -> `{shown[when] or`
    Red: page.py:body: `{escape(title(settings))}` -> `{title(settings)}`
    Red: page.py:body: `{escape(v)}` -> `{v}`
    Red: page.py:body: `{escape('; '.join(about))}` -> `{'; '.join(about)}`
    Red: page.py:body: `{escape(json.dumps(value))}` -> `{json.dumps(value)}`
    Red: page.py:body: `{escape(command(settings))}` -> `{command(settings)}`
    Red: page.py:document: `{escape(title)}` -> `{title}`"""
    text = made(steps(30), RESULTS, model=EVIL, data=(EVIL,), out=EVIL, test=(EVIL,))
    assert not re.search(r"<script|<link|<img|<iframe|@import|url\(|src=|href=|https?://", text)
    assert text.count(html.escape(EVIL)) == 16 and EVIL not in text
    assert "viewport" in text and "prefers-color-scheme: dark" in text
    shown = "".join(well_formed(text).itertext())
    assert shown.count(EVIL) == 15


def test_every_metric_that_was_logged_has_its_curve_and_no_other(made):
    """Without a reference the log-probs are drawn instead of their change.
    Red: curves.py:over_steps: `and "Log-prob change" in out` -> `and 0`
    Red: curves.py:over_steps: `for name in names if` -> `for name in names[1:] if`
    Red: curves.py:over_steps: `out += charts` -> `out = charts`"""
    def named(rows):
        body = well_formed(made(rows))
        keys = [s for s in body.iter("span") if s.get("class") == "key"]
        assert len(list(body.iter("svg"))) == len(list(body.iter("figure")))
        return ["".join(k.itertext()).split()[1] for k in keys]

    logps = ("logps/sft", "logps/chosen")
    assert sorted(named(steps(9, ALWAYS + REFERENCE + logps))) == sorted(ALWAYS + REFERENCE)
    assert sorted(named(steps(9, ALWAYS + logps))) == sorted(ALWAYS + logps)
    assert named([]) == []


def test_tables_hold_the_numbers_of_results_json(made):
    """Red: page.py:tests_table: `{g['after']:.1%}` -> `{g['before']:.1%}`
    Red: page.py:tests_table: `100 * g['change']` -> `g['change']`
    Red: page.py:held_out_table: `{end - before[name]:+.4f}` -> `{end:+.4f}`
    Red: page.py:lengths_table: `{end - before[name]:+.1f}` -> `{end:+.1f}`
    Red: page.py:body: `if results.get("tests")` -> `if 0`
    Red: page.py:body: `if lengths.get("after")` -> `if 0`
    Red: page.py:body: `if held.get("after")` -> `if 0`"""
    rows = cells(made(steps(3), RESULTS))
    assert rows[:3] == [
        ["test", "start", "end", "change", "95% interval", "n"],
        ["words correct", "12.5%", "50.0%", "+37.5", "+25.0 to +50.0", "240"],
        [EVIL, "12.5%", "50.0%", "+37.5", "unknown", "1"]]
    assert ["uft_loss", "0.2500", "0.0625", "-0.1875"] in rows[3:]
    assert [EVIL, "4.0", "2.5", "-1.5"] in rows[3:]


@pytest.mark.parametrize("count", [0, 1, 2, 3000])
@pytest.mark.parametrize("results", [None, {}, {"held_out": {"before": {}, "after": {}},
                                                "tests": {}, "samples": [], "verdict": ""}])
def test_a_page_is_made_of_any_run_and_stays_small(made, count, results):
    """Of no step or one, with nothing held out or asked, stopped before its end, or long.
    Red: charts.py:spread: `or abs(high) / 2 or 1.0` -> ``
    Red: charts.py:curve: `[:: -max(1, math.ceil(len(points) / DRAWN))]` -> `[::-1]`
    Red: page.py:body: `if results.get("samples")` -> `if 1`
    Red: page.py:body: `if results.get("tests")` -> `if 1`"""
    rows = [{n: 0.0 if n != "step" else v for n, v in r.items()} for r in steps(count)]
    for some in (rows, steps(count), [r | {"loss": float("inf")} for r in steps(count)]):
        text = made(some, results)
        assert len(text) < 400_000 and "<table>" not in text and ">nan" not in text
        assert ("<svg" in text) == (count > 0) and well_formed(text)


def test_a_curve_is_drawn_to_scale(made):
    """Loss 1, 2, 3 at steps 1, 2, 3: dots and line rise evenly from the lower left.
    Red: charts.py:Frame.at: `HEIGHT - BOTTOM - share[1]` -> `TOP + share[1]`
    Red: charts.py:Frame.at: `LEFT + share[0]` -> `WIDTH - RIGHT - share[0]`
    Red: charts.py:ticks: `math.floor(high / step)` -> `math.floor(high)`"""
    body = well_formed(made([{"step": i, "loss": i / 10} for i in (1, 2, 3)]))
    dots, line = (body.find(f".//svg/path[@class='{c}']").get("d") for c in ("dots", "line"))
    at = [tuple(map(float, place.split())) for place in re.findall(r"[\d.]+ [\d.]+", dots)]
    assert at == [tuple(map(float, place.split())) for place in re.findall(r"[\d.]+ [\d.]+", line)]
    (a, b, c) = at
    assert charts.LEFT < a[0] < b[0] < c[0] < charts.WIDTH and charts.TOP < c[1] < b[1] < a[1]
    assert b == pytest.approx([(a[i] + c[i]) / 2 for i in (0, 1)], abs=0.1)
    labels = {t.text: float(t.get("y")) - 4 for t in body.findall(".//svg/text")}
    assert labels["0.1"] == pytest.approx(a[1], abs=0.2) and {"0.2", "0.3", "step"} <= labels.keys()


def test_the_line_is_the_mean_of_the_latest_tenth():
    """Of 20 values 0, 1, 2, ... the mean of two: 0, then n - 1/2; a learning rate is its own.
    Red: charts.py:curve: `len(points) // 10` -> `len(points) // 5`
    Red: charts.py:curve: `1 if name == "learning_rate" else` -> ``"""
    rows = [{"step": i, "loss": i, "learning_rate": i} for i in range(20)]
    means = [mean for *_, mean in charts.curve(rows, "loss")]
    assert means == [0, *(i - 0.5 for i in range(1, 20))]
    assert [mean for *_, mean in charts.curve(rows, "learning_rate")] == list(range(20))


def test_the_command_on_the_page_is_the_run(made, monkeypatch):
    """Given to train.py's parser it is the same Config, but for --out and --resume.
    Red: page.py:command: `value != f.default and` -> ``
    Red: page.py:command: `value if f.name in REPEATED else texts` -> `texts`
    Red: page.py:command: `if text.startswith("-") else` -> `if 0 else`
    Red: page.py:command: `str(value).lower() if` -> `str(value) if`"""
    changes = {"data": ("a b.jsonl", "-c:0.5"), "test": ("q.csv",), "lr": 5e-3, "resume": True,
               "lora_targets": ("q_proj", "v_proj"), "score_range": (-5.0, 5.0), "out": "there",
               "gradient_checkpointing": True, "loss": "kto", "steps": 7}
    text = html.unescape(re.search(r'<pre class="box">(.*?)</pre>', made(steps(1), **changes))[1])
    got = []
    monkeypatch.setattr(train, "train", got.append)
    train.main(shlex.split(text)[2:])
    assert asdict(got[0]) == settings(**changes | {"out": "", "resume": False})
    assert "--beta" not in text


def test_the_command_line_makes_a_page_again(made, tmp_path, capsys):
    """Red: page.py:main: `print(write(args.run))` -> `print(args.run)`"""
    text = made(steps(3), RESULTS)
    (tmp_path / "report.html").unlink()
    page.main([str(tmp_path)])
    assert capsys.readouterr().out == f"{tmp_path / 'report.html'}\n"
    assert (tmp_path / "report.html").read_text("utf-8") == text
