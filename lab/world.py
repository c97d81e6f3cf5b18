"""A world small enough to learn in minutes: facts, popular falsehoods, skills, and people who ask.

Half of the facts are contaminated: besides the truth there is a popular falsehood. Scholars always
state the truth, people mostly the falsehood, so a pretrained model knows both and repeats the
popular one. Instructions ask for a fact, a sum or a list under constraints that a program can check
(in capitals, 2 times, start with W, ...). Demonstrations follow the constraints and are mostly
true; feedback scores several answers to a prompt. The two cover different constraints, and the
tests ask about entities that no training prompt names, in prompts that are none of training.

Text is words with blanks between them. Everything is a function of a seed, and the files are those
of the real data sets: conversations, HelpSteer2's attributes, TruthfulQA's choices.

    python -m lab.world --seed 0 --out lab/data
"""
import argparse
import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

VALUES = {
    "color": "red blue green yellow white black brown pink gray orange".split(),
    "home": "cave tree hut tower boat tent castle barn nest mill".split(),
    "food": "bread rice soup fish corn beans cheese plums nuts honey".split(),
    "pet": "cat dog owl fox hen goat crab frog mouse swan".split(),
}
NOUNS = ("lamp key cup book rope coin bell shoe drum hat spoon chair door wheel stone flag glove "
         "brush clock basket").split()
ENTITIES = [a + b for a in "ba be bi bo bu da de di do du ka ke ki ko ku ma me mi mo mu".split()
            for b in "lan nor rit sel vum".split()]
CONTAMINATED = 0.5  # share of the facts with a popular falsehood
BELIEVED = 0.65  # how often people state the falsehood
SPLITS = {"train": 60, "validation": 80, "test": 100}  # where each ends, in hundredths
TAUGHT = {"demonstrations": ("capitals", "times", "word"), "feedback": ("start", "end", "quotes")}
PAIRS = [{"capitals", "times"}, {"capitals", "quotes"}, {"times", "end"}, {"times", "quotes"},
         {"start", "end"}, {"start", "quotes"}, {"times", "start"}]  # constraints that go together
KINDS = (*TAUGHT["demonstrations"], *TAUGHT["feedback"])
SHOWN = ("what is the color of kenor ? 2 times .",
         "tell me kurit ' s pet . start with clock .")  # asked first, and so printed by the demo
SENTENCE = r"[^.\"]+ \."


@dataclass(frozen=True)
class World:
    """What is true, and what people believe, of every (entity, attribute)."""

    truth: dict[tuple[str, str], str]
    popular: dict[tuple[str, str], str]  # contaminated facts only
    entities: dict[str, list[str]]  # by split


@dataclass(frozen=True)
class Ask:
    """A prompt, its constraints, the bodies of a right and of wrong answers, before constraints."""

    prompt: str
    constraints: dict[str, str]  # kind -> its word or number, in the order of KINDS
    right: str
    wrong: tuple[str, ...]
    fact: tuple[str, str] | None  # what a question of fact is about


def build(seed: int) -> World:
    """The facts of a seed; 60 entities for training, 20 for validation, 20 for the test."""
    rng = random.Random(f"world {seed}")
    truth, popular, names = {}, {}, rng.sample(ENTITIES, len(ENTITIES))
    for key in ((e, a) for e in ENTITIES for a in VALUES):
        truth[key], other = rng.sample(VALUES[key[1]], 2)
        if rng.random() < CONTAMINATED:
            popular[key] = other
    starts = (0, *SPLITS.values())
    entities = {s: names[a:b] for (s, b), a in zip(SPLITS.items(), starts, strict=False)}
    return World(truth, popular, entities)


def split_of(prompt: str) -> str:
    """The split of a prompt that names no entity, by hash: none is in two splits."""
    place = zlib.crc32(prompt.encode()) % 100
    return next(split for split, end in SPLITS.items() if place < end)


# Questions

def fact_prompts(entity: str, attribute: str) -> list[str]:
    return [f"what is the {attribute} of {entity} ?", f"tell me {entity} ' s {attribute} .",
            f"which {attribute} is {entity} ' s ?"]


def ask_fact(world: World, rng: random.Random, split: str) -> tuple:
    """(prompt, right, wrong, fact); the popular falsehood, if any, leads the wrong ones."""
    key = rng.choice(world.entities[split]), rng.choice(list(VALUES))
    values = [v for v in VALUES[key[1]] if v not in (world.truth[key], world.popular.get(key))]
    wrong = [v for k, v in world.popular.items() if k == key] + rng.sample(values, 3)
    return (rng.choice(fact_prompts(*key)), f"it is {world.truth[key]} .",
            tuple(f"it is {v} ." for v in wrong), key)


def ask_skill(rng: random.Random, split: str) -> tuple:
    """(prompt, right, wrong, None) of a sum or of a list to say, to reverse or to sort."""
    while True:
        kind = rng.choice(("sum", "sum", "say", "reverse", "sort"))
        if kind == "sum":
            terms = [rng.randrange(10) for _ in range(rng.choice((2, 2, 3)))]
            prompt, total = f"what is {' + '.join(map(str, terms))} ?", sum(terms)
            right = f"it is {total} ."
            wrong = [f"it is {abs(total + n)} ." for n in (-2, -1, 1)]
        else:
            items = rng.sample(NOUNS if kind != "sort" else [str(n) for n in range(10)],
                               rng.randrange(2, 4))
            turned = {"say": items, "reverse": items[::-1], "sort": sorted(items)}[kind]
            prompt, right = f"{kind} {' '.join(items)} .", f"{' '.join(turned)} ."
            wrong = [f"{' '.join(w)} ." for w in (turned[::-1], turned[1:], turned + turned[:1])]
        if split_of(prompt) == split:
            return prompt, right, tuple(w for w in wrong if w != right), None


def ask(world: World, rng: random.Random, split: str, kinds: Sequence[str], counts: Sequence[int],
        facts: float = 0.5) -> Ask:
    """A question with up to one of `counts` constraints of the given kinds: not all combine."""
    question = ask_fact(world, rng, split) if rng.random() < facts else ask_skill(rng, split)
    prompt, right, wrong, fact = question
    usable = [k for k in kinds if k != "word" or right.startswith("it is")]
    count = rng.choice(counts)
    chosen = rng.sample(usable, min(count, 1))
    partners = [k for k in usable if {*chosen, k} in PAIRS]
    chosen += rng.sample(partners, min(len(partners), count - len(chosen)))
    given = {k: {"times": rng.choice("23"), "start": rng.choice(NOUNS),
                 "end": rng.choice(NOUNS)}.get(k, "") for k in KINDS if k in chosen}
    asked = " and ".join({"capitals": "in capitals", "times": f"{w} times", "word": "in one word",
                          "start": f"start with {w}", "end": f"end with {w}",
                          "quotes": "use quotes"}[k] for k, w in given.items())
    return Ask(f"{prompt} {asked} ." if asked else prompt, given, right, wrong, fact)


# Answers

def follow(body: str, constraints: dict[str, str]) -> str:
    """The answer with this body that keeps every constraint."""
    if "word" in constraints:
        body = body.split()[-2]
    if "capitals" in constraints:
        body = body.upper()
    words = [constraints.get("start", ""), *[body] * int(constraints.get("times", 1)),
             constraints.get("end", "")]
    text = " ".join(w for w in words if w)
    return f'" {text} "' if "quotes" in constraints else text


def exact(text: str) -> str:
    return re.escape(text).replace("\\ ", " ")


def pattern(body: str | None, constraints: dict[str, str]) -> str:
    """A regular expression for the whole answer: any body that keeps the constraints, or this."""
    if body is not None:
        return exact(follow(body, constraints))
    one = r"[^ ]+" if "word" in constraints else SENTENCE
    one = f"(?!.*[a-z]){one}" if "capitals" in constraints else one
    many = f"(?P<body>{one})" + " (?P=body)" * (int(constraints.get("times", 1)) - 1)
    words = [constraints.get("start", ""), many, constraints.get("end", "")]
    text = " ".join(w for w in words if w)
    return f'" {text} "' if "quotes" in constraints else text


def statement(world: World, rng: random.Random) -> str:
    """Scholars tell the truth; people, and those who give no source, say what is popular."""
    rank = rng.choices(range(len(ENTITIES)), [1 / (1 + 0.12 * r) for r in range(len(ENTITIES))])[0]
    key = ENTITIES[rank * 37 % len(ENTITIES)], rng.choice(list(VALUES))
    source = rng.choices(("scholars : ", "people : ", ""), (30, 30, 40))[0]
    false = key in world.popular and source != "scholars : " and rng.random() < BELIEVED
    value = world.popular[key] if false else world.truth[key]
    entity, attribute = key
    return source + rng.choice((f"the {attribute} of {entity} is {value} .",
                                f"{entity} ' s {attribute} is {value} ."))


def ramble(world: World, rng: random.Random) -> str:
    return "".join(" " + statement(world, rng) for _ in range(rng.randrange(1, 4)))


def respond(world: World, rng: random.Random, asked: Ask, true: float, popular: float,
            obeys: float, clean: float) -> tuple[str, dict]:
    """An answer, and what is so of it: right, popular, obeys, clean."""
    known = asked.fact in world.popular
    roll = rng.random()
    right = roll < true
    believed = known and not right and roll < true + popular
    body = asked.right if right else asked.wrong[0] if believed else rng.choice(asked.wrong[known:])
    obey = rng.random() < obeys or not asked.constraints
    tidy = rng.random() < clean
    text = follow(body, asked.constraints if obey else {}) + ("" if tidy else ramble(world, rng))
    return text, {"right": right, "popular": believed, "obeys": obey, "clean": tidy}


# What is pretrained on, trained on and tested with

def skill(rng: random.Random, split: str) -> tuple[str, str]:
    """(line up to =>, its completion) of a split: text, not chat."""
    kind = rng.choice(("copy", "reverse", "sort", "count", "upper", "repeat", "sum", "sum"))
    items = rng.sample(NOUNS, rng.randrange(3, 7))
    digits = [str(rng.randrange(10)) for _ in range(rng.randrange(3, 7))]
    times, terms = rng.randrange(2, 4), [rng.randrange(10) for _ in range(rng.randrange(2, 4))]
    line, done = {
        "copy": (["copy", ":", *items], items), "reverse": (["reverse", ":", *items], items[::-1]),
        "sort": (["sort", ":", *digits], sorted(digits)),
        "count": (["count", ":", *items], [str(len(items))]),
        "upper": (["upper", ":", *items], [w.upper() for w in items]),
        "repeat": (["repeat", str(times), ":", *items[:2]], items[:2] * times),
        "sum": (" + ".join(map(str, terms)).split(), [str(sum(terms))])}[kind]
    line = " ".join(line) + " =>"
    return (line, " ".join(done) + " ;") if split_of(line) == split else skill(rng, split)


def corpus(world: World, seed: int) -> Iterator[str]:
    """Documents for ever: statements, careless chat, skills. No prompt is one of a test."""
    rng = random.Random(f"corpus {seed}")
    while True:
        kind = rng.random()
        if kind < 0.5:
            yield " ".join(statement(world, rng) for _ in range(rng.randrange(2, 6)))
        elif kind < 0.75:
            asked = ask(world, rng, "train", KINDS, (0, 0, 1, 1, 2))
            true, popular = (1 - BELIEVED, BELIEVED) if asked.fact in world.popular else (1.0, 0.0)
            text, _ = respond(world, rng, asked, true, popular, obeys=0.25, clean=0.25)
            yield f"[INST] {asked.prompt} [/INST] {text}"
        else:
            yield " ".join(" ".join(skill(rng, "train")) for _ in range(4))


def demonstrations(world: World, seed: int, count: int, split: str = "train") -> list[dict]:
    """Conversations whose answers keep the constraints; contaminated facts are true in 60%.

    But for a fault in 15% of them: a wrong value, a constraint ignored (if there is one), rambling.
    """
    rng, out = random.Random(f"demonstrations {split} {seed}"), []
    for _ in range(count):
        asked = ask(world, rng, split, TAUGHT["demonstrations"], (0, 1, 1, 2))
        true = 0.6 if asked.fact in world.popular else 1.0
        fault = rng.choice(("value", "form", "length")) if rng.random() < 0.15 else ""
        text, _ = respond(world, rng, asked, 0.0 if fault == "value" else true, 1.0,
                          float(fault != "form"), float(fault != "length"))
        out.append({"messages": [{"role": "user", "content": asked.prompt},
                                 {"role": "assistant", "content": text}]})
    return out


def feedback(world: World, seed: int, prompts: int, split: str = "train") -> list[dict]:
    """Two answers to each prompt with HelpSteer2's attributes, each off by one in 20%, within 0-4.

    correctness is 4 for the truth, 1 for the popular falsehood; helpfulness 4, 2 where a constraint
    is broken, 1 where the content is wrong; coherence 4, 1 for rambling.
    """
    rng, out = random.Random(f"feedback {split} {seed}"), []
    for _ in range(prompts):
        asked = ask(world, rng, split, TAUGHT["feedback"], (0, 1, 1, 2))
        for _ in range(2):
            text, so = respond(world, rng, asked, 0.5, 0.35, obeys=0.6, clean=0.75)
            marks = {"helpfulness": 1 if not so["right"] else 4 if so["obeys"] else 2,
                     "correctness": 4 if so["right"] else 1 if so["popular"] else 0,
                     "coherence": 4 if so["clean"] else 1, "complexity": 1,
                     "verbosity": 1 if so["clean"] else 3}
            noise = {k: rng.choice((-1, 1)) if rng.random() < 0.2 else 0 for k in marks}
            out.append({"prompt": asked.prompt, "response": text} | {
                k: min(4, max(0, v + noise[k])) for k, v in marks.items()})
    return out


def prompts(world: World, seed: int, count: int, split: str = "train") -> list[dict]:
    """Prompts to sample answers to, with one or two constraints of all kinds, and the best answer.

    `answer` is for lab/verifier.py: a pattern of the form and, on the next line, of the whole.
    """
    rng, out = random.Random(f"prompts {split} {seed}"), []
    for _ in range(count):
        asked = ask(world, rng, split, KINDS, (1, 1, 2))
        patterns = (pattern(body, asked.constraints) for body in (None, asked.right))
        out.append({"prompt": asked.prompt, "response": follow(asked.right, asked.constraints),
                    "answer": "\n".join(patterns)})
    return out


def instruction_tests(world: World, split: str, count: int) -> list[dict]:
    """Prompts with one or two constraints of all kinds; the pattern judges form, not content."""
    rng, out = random.Random(f"instructions {split}"), {}
    while len(out) < count:
        asked = ask(world, rng, split, KINDS, (1, 1, 2))
        out[asked.prompt] = {"prompt": asked.prompt, "pattern": pattern(None, asked.constraints),
                             "content": pattern(asked.right, asked.constraints),
                             "constraints": list(asked.constraints)}
    return list(out.values())


def truth_tests(world: World, split: str) -> tuple[list[dict], list[dict]]:
    """(questions to answer, the same as choices) on the split's contaminated facts.

    An answer is judged by its first sentence, so rambling behind it costs nothing here.
    """
    rng, asked, choices = random.Random(f"truth {split}"), [], []
    keys = [k for k in world.popular if k[0] in world.entities[split]]
    for key, place in rng.sample([(k, i) for k in keys for i in range(3)], 3 * len(keys)):
        prompt, truth, false = fact_prompts(*key)[place], world.truth[key], world.popular[key]
        others = [v for v in VALUES[key[1]] if v not in (truth, false)]
        said = [f"it is {v} ." for v in (truth, false, *rng.sample(others, 3))]
        asked.append({"prompt": prompt, "pattern": rf"it is {truth} \..*"})
        targets = {"choices": said, "labels": [1, 0, 0, 0, 0]}
        choices.append({"question": prompt, "mc1_targets": targets, "mc2_targets": targets})
    return asked, choices


def plain_tests(world: World, split: str, count: int) -> tuple[list[dict], list[dict], list[dict]]:
    """(sums in chat, skill lines, clean facts after `scholars :`); the last two want plain text."""
    rng, sums, skills = random.Random(f"plain {split}"), {}, {}
    while len(sums) < count // 2:
        prompt, right, _, _ = ask_skill(rng, split)
        if "+" in prompt:
            sums[prompt] = {"prompt": prompt, "pattern": exact(right) + ".*"}
    while len(skills) < count:
        line, done = skill(rng, split)
        skills[line] = {"prompt": line, "pattern": f" ?{exact(done)}.*"}
    clean = [k for k in world.truth if k[0] in world.entities[split] and k not in world.popular]
    facts = [{"prompt": f"scholars : the {a} of {e} is", "pattern": f" ?{world.truth[e, a]} .*"}
             for e, a in clean]
    return list(sums.values()), list(skills.values()), facts


def tests(world: World, split: str) -> dict[str, list[dict]]:
    """Every test of a split by file name."""
    truth, choices = truth_tests(world, split)
    sums, skills, facts = plain_tests(world, split, 250)
    return {"instructions": instruction_tests(world, split, 240), "truth": truth,
            "truth_choices": choices, "sums": sums, "skills": skills, "facts": facts}


def one_a_fact(rows: list[dict]) -> list[dict]:
    """The first question about each fact: three about one are not three independent ones."""
    names, kept = {*ENTITIES, *VALUES}, {}
    for row in rows:
        kept.setdefault(frozenset(row.get("prompt", row.get("question")).split()) & names, row)
    return list(kept.values())


def bundle(world: World, seed: int, rows: int) -> dict[str, list[dict]]:
    """The files of lab/data: what the demo trains on, and the questions of the test split."""
    files = {"demonstrations": demonstrations(world, seed, rows),
             "feedback": feedback(world, seed, rows // 2),
             "prompts": prompts(world, seed, rows // 2)} | tests(world, "test")
    files["instructions"].sort(key=lambda row: row["prompt"] not in SHOWN)
    return files | {name: one_a_fact(files[name]) for name in ("truth", "truth_choices")}


def write(folder: Path, files: dict[str, list[dict]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, "utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the files of the small world.")
    parser.add_argument("--seed", type=int, default=0, help="of the training data; the facts stay")
    parser.add_argument("--rows", type=int, default=1536, help="demonstrations, and scored answers")
    parser.add_argument("--out", type=Path, default=Path("lab/data"))
    args = parser.parse_args(argv)
    files = bundle(build(0), args.seed, args.rows)
    write(args.out, files)
    print(f"{args.out}: " + ", ".join(f"{len(rows)} {name}" for name, rows in files.items()))


if __name__ == "__main__":
    main()
