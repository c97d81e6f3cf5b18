"""The small world: its splits, its constraints, its files, its base."""
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import data
import tokens
from lab import pretrain, world

LAB = Path(__file__).resolve().parent.parent / "lab"
HERE = world.build(0)
ASKS = {name: {"start": "lamp", "end": "key", "times": "2"}.get(name, "") for name in world.KINDS}
COMBINED = [(k,) for k in world.KINDS] + [
    tuple(k for k in world.KINDS if k in pair) for pair in world.PAIRS]


def prompts(rows):
    """The user's words in rows of any of the world's files."""
    return {r["messages"][0]["content"] if "messages" in r else r.get("prompt", r.get("question"))
            for r in rows}


def pretrained():
    """Every chat prompt and every skill line in the first 4000 documents of the base's corpus."""
    text = list(itertools.islice(world.corpus(HERE, 100), 4000))
    chat = {m for t in text for m in re.findall(r"\[INST\] (.*) \[/INST\]", t)}
    return chat | {line.strip() + " =>" for t in text if "=>" in t
                   for line in re.findall(r"(?:^|;)([^;]*?) =>", t)}


@pytest.mark.parametrize(("here", "there"), [
    ("train", "validation"), ("train", "test"), ("validation", "test")])
def test_splits_share_no_prompt(here, there):
    """Red: lab/world.py:ask_skill: `if split_of(prompt) == split:` -> `if prompt:`
    Red: lab/world.py:skill: `if split_of(line) == split` -> `if line`
    Red: lab/world.py:ask_fact: `rng.choice(world.entities[split])` -> `rng.choice(ENTITIES)`"""
    of = {}
    for split in ("train", "validation", "test"):
        rows = [*world.demonstrations(HERE, 5, 600, split), *world.feedback(HERE, 5, 300, split)]
        of[split] = prompts(rows)
        if split != "train":
            of[split] |= prompts(r for n, t in world.tests(HERE, split).items() if n != "facts"
                                 for r in t)
    of["train"] |= pretrained()
    assert of[here] and of[there] and of[here] & of[there] == set()


@pytest.mark.parametrize("kinds", COMBINED, ids="+".join)
def test_an_answer_that_follows_the_constraints_is_accepted(kinds):
    """Red: lab/world.py:follow: `body.upper()` -> `body`
    Red: lab/world.py:follow: `body.split()[-2]` -> `body`
    Red: lab/world.py:follow: `* int(constraints.get("times", 1))` -> ``"""
    constraints = {k: ASKS[k] for k in kinds}
    text = world.follow("it is bread .", constraints)
    assert re.fullmatch(world.pattern(None, constraints), text)
    assert re.fullmatch(world.pattern("it is bread .", constraints), text)


@pytest.mark.parametrize("kinds", COMBINED, ids="+".join)
def test_an_answer_that_ignores_one_constraint_is_refused(kinds):
    """Also one that rambles on behind a good answer.
    Red: lab/world.py:pattern: `(?!.*[a-z])` -> ``
    Red: lab/world.py:pattern: `" (?P=body)" * (` -> `" (?P=body)" * 0 * (`
    Red: lab/world.py:pattern: `if "quotes" in constraints else text` -> `if not text else text`
    Red: lab/world.py: `SENTENCE = r"[^.\\"]+ \\."` -> `SENTENCE = ".*"`"""
    constraints = {k: ASKS[k] for k in kinds}
    for missing in kinds:
        less = {k: w for k, w in constraints.items() if k != missing}
        text = world.follow("it is bread .", less)
        assert not re.fullmatch(world.pattern(None, constraints), text)
    text = world.follow("it is bread .", constraints) + " the pet of balan is owl ."
    assert not re.fullmatch(world.pattern(None, constraints), text)


def test_the_content_pattern_accepts_only_the_right_answer():
    """Red: lab/world.py:instruction_tests: `pattern(asked.right,` -> `pattern(asked.wrong[0],`"""
    rows = world.instruction_tests(HERE, "test", 60)
    assert all("prompt" in r and r["content"] != r["pattern"] for r in rows)
    facts = [(r, re.search(r"(\w+) of (\w+) \?", r["prompt"])) for r in rows]
    for row, said in [(r, m) for r, m in facts if m and m[2] in world.ENTITIES]:
        truth = HERE.truth[said[2], said[1]]
        assert truth in row["content"].lower()


def test_scholars_never_err_and_people_believe_the_popular_falsehood():
    """Red: lab/world.py:statement: `source != "scholars : "` -> `source`
    Red: lab/world.py: `BELIEVED = 0.65` -> `BELIEVED = 0.35`"""
    said = Counter()
    for text in itertools.islice(world.corpus(HERE, 1), 4000):
        stated = r"(scholars : |people : )the (\w+) of (\w+) is (\w+)"
        for source, a, e, v in re.findall(stated, text):
            if (e, a) in HERE.popular:
                said[source, v == HERE.truth[e, a]] += 1
    assert said["scholars : ", False] == 0 < said["scholars : ", True]
    believed = said["people : ", False] / (said["people : ", False] + said["people : ", True])
    assert believed == pytest.approx(0.65, abs=0.05)


def test_demonstrations_are_mostly_true_and_keep_their_constraints():
    """Red: lab/world.py:demonstrations: `true = 0.6 if` -> `true = 0.3 if`
    Red: lab/world.py:demonstrations: `rng.random() < 0.15` -> `rng.random() < 0.6`"""
    kept, true, count = 0, Counter(), 2000
    for row in world.demonstrations(HERE, 9, count):
        ask, answer = (m["content"] for m in row["messages"])
        if said := re.search(r"the (\w+) of (\w+) \?", ask):
            key = said[2], said[1]
            if key in HERE.popular:
                true[HERE.truth[key] in answer.lower().split()[:4]] += 1
        asked = {"capitals": "in capitals" in ask, "word": "in one word" in ask}
        kept += (not asked["capitals"] or answer == answer.upper()) and (
            not asked["word"] or len(answer.split()) == 1)
    assert kept / count > 0.88
    assert true[True] / sum(true.values()) == pytest.approx(0.57, abs=0.08)


def test_feedback_is_read_as_helpsteer_and_prefers_truth_form_and_brevity():
    """Red: lab/world.py:feedback: `1 if not so["right"] else 4` -> `4 if not so["right"] else 1`
    Red: lab/world.py:feedback: `4 if so["right"] else 1` -> `4 if so["popular"] else 1`
    Red: lab/world.py:feedback: `"coherence": 4 if` -> `"coherence": 1 if`"""
    rows = world.feedback(HERE, 3, 1000)
    reward, format_ = [], set()
    for i, row in enumerate(rows):
        name, (example,) = data.parse(row, f"row {i}", (0, 1))
        format_.add(name)
        reward.append(example.reward)
    assert format_ == {"HelpSteer2 scores"}

    def mean(wanted):
        picked = [r for r, row in zip(reward, rows, strict=True) if wanted(row)]
        return sum(picked) / len(picked)

    assert mean(lambda r: r["response"].count(" .") == 1) > 0.1 + mean(
        lambda r: r["response"].count(" .") > 2)
    assert mean(lambda r: is_true(r) is True) > 0.3 + mean(lambda r: is_true(r) is False)


def is_true(row):
    """Whether the answer to a question of fact is true; None for other prompts."""
    asked = re.search(r"the (\w+) of (\w+) \?", row["prompt"])
    return asked and HERE.truth[asked[2], asked[1]] in row["response"].split()[:7]


@pytest.mark.parametrize("name", ["demonstrations", "feedback", *world.tests(HERE, "test")])
def test_the_bundled_files_are_what_the_generator_writes(name):
    """Red: lab/world.py:follow: `f'" {text} "'` -> `f'" {text}  "'`
    Red: lab/world.py:truth_tests: `rng.sample(others, 3)` -> `others[:3]`
    Red: lab/world.py:plain_tests: `count // 2` -> `count // 3`"""
    rows = world.bundle(HERE, 0, 1536)[name]
    held = (LAB / "data" / f"{name}.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in held] == rows


def test_every_word_of_the_world_is_one_token_and_comes_back():
    """Red: lab/pretrain.py:train_tokenizer: `50_000` -> `5_000`
    Red: lab/pretrain.py:train_tokenizer: `re.sub(r"\\[/?INST\\]", "", text)` -> `text`"""
    chat = tokens.Chat(LAB / "base")
    for row in world.feedback(HERE, 4, 100):
        ids = chat.response_ids(row["response"])
        assert len(ids) == len(row["response"].split()) + 1
        assert chat.decode(ids[:-1]) == row["response"]
    said = [*world.NOUNS, *(v for values in world.VALUES.values() for v in values)]
    for word in (*said, *(w.upper() for w in said), *world.ENTITIES):
        assert chat.tokenizer.token_to_id(word), word
    fresh = pretrain.train_tokenizer(HERE)
    assert sorted(fresh.get_vocab().values()) == list(range(fresh.get_vocab_size()))
    assert fresh.get_vocab() == chat.tokenizer.get_vocab()


def test_the_base_knows_both_truth_and_falsehood():
    """Scholars tell the truth, people do not, and so the base answers as people do.
    Red: lab/pretrain.py:probe: `"scholars": ("scholars :", list` -> `"scholars": ("", list`
    Red: lab/world.py:build: `random.Random(f"world {seed}")` -> `random.Random(seed)`"""
    found = pretrain.probe(LAB / "base")
    assert found["clean"] >= 0.98
    assert found["scholars"] >= 0.95
    assert found["people"] <= 0.35
    assert found["chat"] <= 0.45


def size(folder):
    return sum(p.stat().st_size for p in folder.iterdir())


def test_the_base_is_small():
    """Red: tests/test_world.py:size: `p.stat().st_size` -> `3 * p.stat().st_size`"""
    assert size(LAB / "base") < 4e6


def test_pretraining_is_a_function_of_its_seed(tmp_path, monkeypatch):
    """Red: lab/pretrain.py:main: `manual_seed(args.seed)` -> `manual_seed(time.time_ns())`
    Red: lab/pretrain.py:initialise: `, generator=generator)` -> `)`"""
    threads, made = torch.get_num_threads(), []
    tokenizer = tokens.Chat(LAB / "base").tokenizer
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda here: tokenizer)
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        pretrain.main(["--out", str(tmp_path / name), "--steps", "2", "--seed", seed])
        made.append((tmp_path / name / "model.safetensors").read_bytes())
    torch.set_num_threads(threads)
    assert made[0] == made[1] != made[2]
