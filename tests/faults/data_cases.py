"""Families D01 to D32: data files that are cut, foreign, misspelt, contradictory or hostile.

Most cases put one bad line behind a good one, so that every message must name data.jsonl:2.
"""
import gzip
import io
import json
import os
import zipfile
from pathlib import Path

from faults.case import Case, Change, remove, several, write

GOOD = {"prompt": "Say one.", "response": "one"}
LINE = json.dumps(GOOD) + "\n"
USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
FORMATS = {  # a good row of each
    "demonstration": {"prompt": "q", "response": "a"},
    "Alpaca": {"instruction": "q", "input": "i", "output": "a"},
    "GSM8K": {"question": "q", "answer": "a"},
    "conversation": {"messages": [USER, ASSISTANT]},
    "ShareGPT": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "UltraChat": {"data": ["q", "a"]},
    "score": {"prompt": "q", "response": "a", "score": 0.5},
    "HelpSteer2": {"prompt": "q", "response": "a", "helpfulness": 1, "correctness": 2,
                   "coherence": 3},
    "label": {"prompt": "q", "completion": "a", "label": True},
    "labelled messages": {"messages": [USER, ASSISTANT], "label": False},
    "pair": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "scored pair": {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 8,
                    "score_rejected": 3},
    "history": {"instruction": "q", "output": "a", "system": "s", "history": [["x", "y"]]},
}
STRANGE = {"a number": 7, "null": None, "a list of numbers": [7], "an object": {"a": 1},
           "an object in a list": [{"a": 1}], "a nested list": [["x"]], "true": True}
FINE = {("input", "null"), ("system", "null"), ("history", "null"), ("label", "true"),
        ("score_chosen", "a number"), ("score_rejected", "a number"), ("answer", "a number")}


NAMES = {"messages": "message", "instruction": "prompt", "question": "prompt", "data": "",
         "completion": "response", "output": "response", "answer": "response",
         "conversations": "messages"}  # how a message calls a column that has a second name
BOTH = {"train": "", "evaluate": ", to evaluate"}  # what the name of a case ends with


def text(row: object) -> str:
    return row if isinstance(row, str) else json.dumps(row)


def second(row: object) -> Change:
    """A data file whose second line is this one, an object or a text."""
    return write("data.jsonl", (LINE + text(row) + "\n" + LINE).encode("utf-8", "surrogatepass"))


def only(*lines: object) -> Change:
    """A data file of these lines."""
    return write("data.jsonl", "".join(text(line) + "\n" for line in lines))


def bad(name: str, row: object, words: str, program: str = "train", flags: str = "") -> Case:
    """A line that is refused by file and number."""
    return Case(name, program, second(row), flags, f"data.jsonl:2; {words}")


def dropped(name: str, row: object, reason: str) -> list[Case]:
    """A line that is left out, counted, and listed with its reason; alone it is refused."""
    return [Case(name, "train", only(*[GOOD] * 9, row), "--held_out 0", "1 unusable; dropped 1",
                 "V"),
            Case(f"{name}, alone", "evaluate", only(row), "",
                 f"no usable row; 1 dropped; {reason}")]


def good(name: str, row: object, program: str = "evaluate", words: str = "3 rows") -> Case:
    return Case(name, program, second(row), "--held_out 0" * (program == "train"), words, "V")


def grown(name: str, start: bytes, size: int) -> Change:
    """A file with a start and a hole behind it, up to `size` bytes."""
    def change(place: Path) -> None:
        with open(place / name, "wb") as file:
            file.write(start)
            file.truncate(size)

    return change


def special(name: str, make) -> Change:
    """Something that is no regular file stands where data is expected."""
    def change(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        make(place / name)

    return change


def bomb(name: str, content: bytes, times: int) -> Change:
    """Members of gzip, one behind the other: reading them gives content * times."""
    return write(name, gzip.compress(content) * times)


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("data.jsonl", LINE)
    return out.getvalue()


def contents() -> dict[str, tuple]:
    """Of files that are not what their names say: (name, content, words)."""
    csv = "prompt,response\nq,a\n"
    return {
        "a zip": ("data.jsonl", zipped(), "zip archive"),
        "gzip without its name": ("data.jsonl", gzip.compress(LINE.encode()), "gzip"),
        "parquet without its name": ("data.jsonl", b"PAR1 x PAR1", "parquet"),
        "bzip2": ("data.jsonl", b"BZh91AY&SY", "compressed"),
        "xz": ("data.jsonl", b"\xfd7zXZ\x00 x", "compressed"),
        "zstandard": ("data.jsonl", b"\x28\xb5\x2f\xfd x", "compressed"),
        "a table": ("data.jsonl", csv, "data.jsonl:1; not valid JSON; prompt,response"),
        "text called gzip": ("data.jsonl.gz", LINE, "damaged"),
        "a gzip cut short": ("data.jsonl.gz", gzip.compress(LINE.encode() * 99)[:-30], "damaged"),
        "a gzip with a wrong sum": ("data.jsonl.gz", gzip.compress(LINE.encode())[:-8] + b"x" * 8,
                                    "damaged"),
        "a zip called gzip": ("data.jsonl.gz", zipped(), "zip archive"),
        "an empty gzip": ("data.jsonl.gz", b"", "no usable row"),
        "a picture": ("data.jsonl", b"\x89PNG\r\n\x1a\n\x00\x00", "data.jsonl:1; UTF-8"),
        "random bytes": ("data.jsonl", bytes(range(255, 0, -1)), "data.jsonl:1; UTF-8"),
        "a json list cut": ("data.json", "[" + LINE[:-1] + ",", "not valid JSON"),
        "a json object": ("data.json", json.dumps({"rows": [GOOD]}), "data.json:1; ['rows']"),
        "a json list of numbers": ("data.json", "[1, 2]", "item 1; expected an object; int 1"),
        "a json list with one bad item": ("data.json", json.dumps([GOOD, "x"]), "item 2; 'x'"),
        "an indented json object": ("data.json", json.dumps(GOOD, indent=1), "data.json:1"),
        "an empty json list": ("data.json", "[]", "no usable row"),
    }


def files() -> list[Case]:
    """D01 D02 D21 D22: what the file is."""
    out = [Case(f"D21 {name}{to}", program, write(file, content), f"--data DIR/{file}", words)
           for name, (file, content, words) in contents().items() for program, to in BOTH.items()]
    out += [
        Case("D01 no file", "train", remove("data.jsonl"), "", "data.jsonl; No such file"),
        Case("D01 no file to evaluate", "evaluate", remove("data.jsonl"), "", "No such file"),
        Case("D01 no parquet", "train", None, "--data DIR/x.parquet", "x.parquet"),
        Case("D01 no table", "evaluate", None, "--data DIR/x.csv", "x.csv; No such file"),
        Case("D01 an empty file", "train", only(), "", "data.jsonl; no usable row"),
        Case("D01 only blank lines", "train", write("data.jsonl", "\n \n\r\n\t\n"), "",
             "data.jsonl; no usable row"),
        Case("D01 a link to nothing", "train", special(
            "data.jsonl", lambda p: p.symlink_to("none")), "", "data.jsonl; No such file"),
        Case("D01 a link to data", "evaluate", special(
            "data.jsonl", lambda p: p.symlink_to("scores.jsonl")), "", "40 rows", "V"),
        Case("D01 a link to itself", "train", special(
            "data.jsonl", lambda p: p.symlink_to("data.jsonl")), "", "data.jsonl"),
        Case("D01 a name with a line feed", "train", None, "--data 'DIR/a\nb.jsonl'",
             "a\\nb.jsonl; No such file"),
        Case("D02 a last line cut", "train", write("data.jsonl", LINE + LINE[:30]), "",
             "data.jsonl:2; not valid JSON"),
        Case("D21 a bomb of zeros", "train", bomb("b.jsonl.gz", b"\0" * 2**22, 40),
             "--data DIR/b.jsonl.gz", "b.jsonl.gz:1; longer than 16 MiB"),
        Case("D21 a bomb of blanks", "train", bomb("b.jsonl.gz", (b" " * 1023 + b"\n") * 2**12, 40),
             "--data DIR/b.jsonl.gz", "b.jsonl.gz:; more than 200 times"),
        Case("D21 a bomb of rows", "evaluate", bomb(
            "b.jsonl.gz", LINE[:-1].encode() + b" " * 10**6 + b"\n", 90),
            "--data DIR/b.jsonl.gz", "b.jsonl.gz:; more than 200 times"),
        Case("D21 a bomb of a list", "train", bomb("b.json.gz", b"[" + b" " * 2**22, 40),
             "--data DIR/b.json.gz", "b.json.gz; more than 64 MiB"),
        Case("D21 parquet without pyarrow, or damaged", "train", write("d.parquet", "x"),
             "--data DIR/d.parquet", "d.parquet; parquet"),
    ]
    kinds = {"a pipe": os.mkfifo, "a folder": os.mkdir,
             "/dev/zero": lambda p: p.symlink_to("/dev/zero"),
             "/dev/null": lambda p: p.symlink_to("/dev/null")}
    for name, make in kinds.items():
        for ending in (".jsonl", ".json", ".jsonl.gz", ".csv"):
            for program in ("train", "evaluate")[:1 if ending == ".csv" else 2]:
                out.append(Case(f"D22 {name} called {ending}, {program}", program,
                                special(f"x{ending}", make), f"--data DIR/x{ending}",
                                f"x{ending}; regular file"))
    return [*out, Case("D22 closed input", "train", None, "--data /dev/stdin", "regular file")]


def syntax() -> list[Case]:
    """D03 D07: lines that are no JSON, or more than that."""
    lines = {
        "a trailing comma": '{"prompt": "q", "response": "a",}', "single quotes":
        "{'prompt': 'q', 'response': 'a'}", "two objects": LINE[:-1] + LINE[:-1],
        "no quotes": "{prompt: 1}", "a comment": "// " + LINE[:-1], "a bare word": "nul",
        "an open text": '{"prompt": "q', "an open object": '{"prompt": "q"', "a tab in a text":
        '{"prompt": "a\tb", "response": "a"}', "a raw 0x0b":
        '{"prompt": "a\x0bb", "response": "a"}', "a raw 0x1c":
        '{"prompt": "a\x1cb", "response": "a"}', "a wrong escape":
        '{"prompt": "\\x", "response": "a"}', "a wrong number": '{"prompt": 01}', "NaN": "NaN",
        "NaN as a score": '{"prompt": "q", "response": "a", "score": NaN}',
        "Infinity as a score": '{"prompt": "q", "response": "a", "score": Infinity}',
        "-Infinity as a score": '{"prompt": "q", "response": "a", "score": -Infinity}',
        "half an emoji cut": '{"prompt": "\\ud83', "a lone NUL": "\0",
        "a comma between lines": LINE[:-1] + ","}
    values = {"an array": '[{"prompt": "q"}]', "null": "null", "a number": "7", "a text": '"x"',
              "true": "true", "an empty array": "[]", "a huge float": "1e999"}
    twice = {"prompt": '{"prompt": "q", "prompt": "r", "response": "a"}', "score":
             '{"prompt": "q", "response": "a", "score": 1, "score": 0}', "chosen":
             '{"prompt": "q", "chosen": "a", "chosen": "c", "rejected": "b"}', "role":
             '{"messages": [{"role": "user", "role": "system", "content": "q"}]}', "x":
             '{"prompt": "q", "response": "a", "x": 1, "x": 1}', "label":
             '{"prompt": "q", "response": "a", "label": true, "label": false}'}
    out = [bad(f"D03 {n}", line, "not valid JSON") for n, line in lines.items()]
    out += [bad(f"D03 {n}, to evaluate", line, "not valid JSON", "evaluate")
            for n, line in list(lines.items())[:6]]
    out += [bad(f"D03 {n} as a row", line, "expected an object") for n, line in values.items()]
    return out + [bad(f"D07 {n} twice", line, f"'{n}'; comes twice") for n, line in twice.items()]


def sizes() -> list[Case]:
    """D20 D32: deep, long, and what a terminal would obey."""
    deep = {"an array": "[" * 10**5, "an object": '{"a":' * 10**5,
            "closed": "[" * 10**5 + "]" * 10**5, "in a field":
            '{"prompt": ' + "[" * 10**5 + "]" * 10**5 + ', "response": "a"}'}
    escapes = {"an escape code in a column": {"\x1b[31mred": 1}, "a line feed in a column":
               {"a\nb": 1}, "an escape code in a score": GOOD | {"score": "\x1b]0;x\x07"},
               "an escape code in a role": {"messages": [{"role": "\x1b[2J\n", "content": "q"}]},
               "an escape code in a label": GOOD | {"label": "\x1b[1m\r"},
               "a turned text in a role": {"messages": [{"role": "\u202eresu", "content": "q"}]},
               "C1 codes in a label": GOOD | {"label": "\x9b31m\x85"},
               "a line separator in a score": GOOD | {"score": "a\u2028b"}}
    out = [bad(f"D20 deep, {n}", line, "") for n, line in deep.items()]
    out += [bad(f"D20 {n} levels", GOOD | {"score": json.loads("[" * n + "]" * n)}, "score")
            for n in (90, 400)]
    out += [
        bad("D20 an integer of 5000 digits", '{"prompt": ' + "7" * 5000 + "}", "digits"),
        bad("D20 a score of 4000 digits", '{"prompt": "q", "response": "a", "score": '
            + "7" * 4000 + "}", "score; --score_range"),
        bad("D20 a float of 5000 digits", '{"prompt": "q", "response": "a", "score": 0.'
            + "7" * 5000 + "e9}", "score; --score_range"),
        bad("D20 a key of a megabyte", {"x" * 10**6: 1}, "cannot tell the format"),
        bad("D20 10000 columns", {f"c{i}": 1 for i in range(10**4)}, "cannot tell the format"),
        bad("D20 a role of a megabyte", {"messages": [{"role": "x" * 10**6, "content": "q"}]},
            "role"),
        Case("D20 a line of 100 MB", "train", grown("data.jsonl", b'{"prompt": "', 10**8), "",
             "data.jsonl:1; longer than 16 MiB"),
        Case("D20 a second line of 100 MB", "train", grown("data.jsonl", LINE.encode(), 10**8), "",
             "data.jsonl:2; longer than 16 MiB"),
        Case("D20 a line of 100 MB, to evaluate", "evaluate", grown("data.jsonl", b"{", 10**8), "",
             "data.jsonl:1; longer than 16 MiB"),
        Case("D20 a line of 20 MB", "train", grown("data.jsonl", LINE.encode(), 2 * 10**7), "",
             "data.jsonl:2; longer than 16 MiB"),
        Case("D20 a list of 2 GB", "train", grown("data.json", b"[", 2 * 10**9),
             "--data DIR/data.json", "data.json; more than 1024 MiB"),
        Case("D20 one question of 100 MB", "evaluate", grown("q.csv", b"Question\n\"", 10**8),
             "--data DIR/q.csv", "q.csv"),
    ]
    return out + [bad(f"D32 {n}", row, "\\") for n, row in escapes.items()] + [
        bad("D32 an escape code in a broken line", '{"a": \x1b[31m', "not valid JSON; \\x1b[31m")]


def encodings() -> list[Case]:
    """D04 D05 D06: bytes that are text otherwise, and characters that only look like line ends."""
    row = {"prompt": "Say caf\u00e9.", "response": "caf\u00e9"}
    raw = json.dumps(row, ensure_ascii=False)
    wrong = {"latin-1": raw.encode("latin-1"), "cp1252": raw.encode("cp1252"),
             "half a character": raw.encode()[:-3] + b'"}', "an overlong zero":
             b'{"prompt": "\xc0\x80"}', "an encoded surrogate": b'{"prompt": "\xed\xa0\xbd"}',
             "a lone 0xff": b'{"prompt": "\xff"}', "a tail byte": b'{"prompt": "\x80"}'}
    out = [Case(f"D04 {n} in line 2{to}", program,
                write("data.jsonl", LINE.encode() + line + b"\n"), "",
                "data.jsonl:2; byte; UTF-8")
           for n, line in wrong.items() for program, to in BOTH.items()]
    utf = {"UTF-16": "utf-16", "UTF-16 little end": "utf-16-le", "UTF-16 big end": "utf-16-be",
           "UTF-32": "utf-32"}
    out += [Case(f"D04 a file in {n}", "train", write("data.jsonl", (LINE * 2).encode(code)), "",
                 "data.jsonl:1; UTF-16; save it as UTF-8") for n, code in utf.items()]
    out += [Case("D04 UTF-16 as a list", "train", write("data.json", "[]".encode("utf-16")),
                 "--data DIR/data.json", "data.json; UTF-")]
    clean = {"a BOM": "\ufeff" + LINE * 3, "CRLF": (LINE * 3).replace("\n", "\r\n"),
             "no last line feed": (LINE * 3)[:-1], "blank lines": "\n\n" + (LINE + " \n\n") * 3,
             "indented": "\t" + LINE + "  " + LINE * 2, "a BOM and CRLF":
             "\ufeff" + (LINE * 3).replace("\n", "\r\n")}
    out += [Case(f"D05 {n}{to}", program, write("data.jsonl", content),
                 "--held_out 0" * (program == "train"), "3 rows", "V")
            for n, content in clean.items() for program, to in BOTH.items()]
    ends = {"U+2028": "\u2028", "U+2029": "\u2029", "U+0085": "\x85", "a no-break space": "\xa0",
            "U+10FFFF": "\U0010ffff", "a BOM within": "\ufeff", "a byte of DEL": "\x7f"}
    out += [Case(f"D06 {n} inside a text{to}", program, second(json.dumps(
        {"prompt": f"q{c}r", "response": f"a{c}b"}, ensure_ascii=False)),
        "--held_out 0" * (program == "train"), "3 rows", "V")
        for n, c in ends.items() for program, to in BOTH.items()]
    return out + [good(f"D06 {n} escaped inside a text", {"prompt": f"q{c}r", "response": f"a{c}b"})
                  for n, c in {"0x0b": "\x0b", "0x1c": "\x1c", "NUL": "\0", "0x1d": "\x1d", "0x1e":
                               "\x1e", "a line feed": "\n", "a carriage return": "\r"}.items()] + [
        bad("D06 a lone surrogate", '{"prompt": "\\ud83d", "response": "a"}', "surrogates"),
        bad("D06 a lone surrogate as an answer", '{"prompt": "q", "response": "\\udc00"}',
            "surrogates"),
        bad("D06 a lone surrogate as a column", '{"\\ud83d": "q"}', "cannot tell")]


def columns() -> list[Case]:
    """D08 D09 D29: names and types of every field of every format."""
    out = []
    for form, row in FORMATS.items():
        for field in row:
            less = {k: v for k, v in row.items() if k != field}
            alone = less.keys() <= {"prompt", "instruction", "question", "input", "system",
                                     "history"}
            if field not in ("input", "system", "history", "label", "score") and (
                    not alone or not less.keys() & {"prompt", "instruction", "question"}):
                out.append(bad(f"D09 {form} without {field}", less, ""))
            out += [bad(f"D09 {form} with {n} as {field}", row | {field: value},
                        NAMES.get(field, field)) for n, value in STRANGE.items()
                    if (field, n) not in FINE]
    misspelt = {
        "scoer": "score", "Score": "score", "scores": "score", "SCORE": "score", "score ": "score",
        "scre": "score", "Label": "label", "lable": "label", "labels": "label", "ratings": "rating",
        "helpfullness": "helpfulness", "Helpfulness": "helpfulness", "score_chosn": "score_chosen",
        "sytem": "system", "histroy": "history", "inputs": "input", "System": "system"}
    out += [bad(f"D08 {wrong!r} for {right}", GOOD | {wrong: 0}, f"{right!r}; misspelt")
            for wrong, right in misspelt.items()]
    out += [bad(f"D08 {wrong} for {right}", {
        (wrong if k == right else k): v for k, v in FORMATS["pair"].items()},
        f"{right!r}; misspelt")
        for wrong, right in {"Prompt": "prompt", "promt": "prompt", "choosen": "chosen",
                             "rejectd": "rejected", "Chosen": "chosen"}.items()]
    out += [bad(f"D08 unread {n}", row, f"{n!r}; does not read") for n, row in {
        "rating": GOOD | {"rating": -1}, "reward": GOOD | {"reward": 0.1}, "helpfulness": GOOD | {
            "helpfulness": 0}, "score": FORMATS["conversation"] | {"score": 0}, "chosen": GOOD | {
            "chosen": "a"}, "rejected": GOOD | {"rejected": "b"}, "label":
        FORMATS["pair"] | {"label": False},
        "coherence": FORMATS["score"] | {"coherence": 1}}.items()]
    out += [bad(f"D29 {n}", row, words) for n, (row, words) in {
        "messages and response": (FORMATS["conversation"] | {"response": "a"}, "'response'"),
        "score and label": (FORMATS["score"] | {"label": True}, "'score'"),
        "two prompts": (GOOD | {"instruction": "q"}, "two columns"),
        "two answers": (GOOD | {"completion": "q"}, "two columns"),
        "pairs and scores": (FORMATS["pair"] | {"score": 1}, "'score'"),
        "HelpSteer2 and score": (FORMATS["HelpSteer2"] | {"score": 1}, "'score'")}.items()]
    out += [bad(f"D08 {n}", row, "cannot tell the format; prompt+response") for n, row in {
        "no column": {}, "one column": {"text": "q"}, "a prompt and more": {"prompt": "q", "id": 1},
        "other columns": {"source": 1, "target": 2}, "half a pair": {"prompt": "q", "chosen": "a"}
        }.items()]
    extra = {"id": 7, "source": "web", "date": "2024", "category": None, "meta": {"a": [1]}}
    return out + [good(f"D08 {form} with further columns", row | extra, words=" rows")
                  for form, row in FORMATS.items()] + [
        good(f"D09 a good {form}", row, "train", "to train on") for form, row in FORMATS.items()]


def feedback() -> list[Case]:
    """D10 D11 D12 D18: numbers that feedback cannot be."""
    scores = {"NaN as a text": "NaN", "a text": "0.7", "true": True, "false": False, "null": None,
              "-0.1": -0.1, "1.0000001": 1.0000001, "4": 4, "-1": -1, "1e300": 1e300, "a list": [1],
              "an object": {"value": 1}, "100": 100, "an empty text": ""}
    out = [bad(f"D10 a score of {n}", GOOD | {"score": value}, "score") for n, value in
           scores.items()]
    out += [bad("D10 a score of 1e999", '{"prompt": "q", "response": "a", "score": 1e999}', "inf"),
            bad("D10 a score of -1e999", '{"prompt": "q", "response": "a", "score": -1e999}',
                "inf"),
            bad("D10 a scale of its own", GOOD | {"score": 4}, "4; [0, 1]; --score_range"),
            bad("D10 outside the range given", GOOD | {"score": 6}, "6; [1, 5]", "train",
                "--score_range 1,5"),
            bad("D10 outside the range given, to evaluate", GOOD | {"score": 0}, "0; [1, 5]",
                "evaluate", "--score_range 1,5"),
            Case("D10 a scale that is given", "train", only(*(
                {"prompt": f"q{s}", "response": "a", "score": s} for s in (1, 2, 3, 4, 5))),
                "--score_range 1,5 --held_out 0", "scores, 5 rows", "V")]
    out += [bad(f"D10 {field} of {n}", FORMATS["HelpSteer2"] | {field: value}, f"{field}")
            for field in ("helpfulness", "correctness", "coherence")
            for n, value in {"5": 5, "-1": -1, "a text": "4", "true": True}.items()]
    out += [bad(f"D10 {field} of {n}", FORMATS["scored pair"] | {field: value}, f"{field}")
            for field in ("score_chosen", "score_rejected")
            for n, value in {"0": 0, "11": 11, "a text": "8", "null": None}.items()]
    out += [bad("D10 only one score of a pair", FORMATS["pair"] | {"score_chosen": 8},
                "score_rejected"),
            bad("D10 only one score in metadata", FORMATS["pair"] | {
                "metadata": {"score_rejected": 8}}, "score_chosen")]
    out += [bad(f"D11 a label of {n}", GOOD | {"label": value}, f"label; {words}")
            for n, value, words in (
                ("good", "good", "'good'"), ("2", 2, "2"), ("'1'", "1", "'1'"),
                ("null", None, "None"), ("-1", -1, "-1"), ("0.5", 0.5, "0.5"),
                ("'true'", "true", "'true'"),
                ("a list", [True], "True"), ("an empty text", "", "''"))]
    out += [good(f"D11 a label of {n}", GOOD | {"label": value})
            for n, value in {"1": 1, "0": 0, "1.0": 1.0, "0.0": 0.0}.items()]
    out += [bad("D12 a score of -1 for none", GOOD | {"score": -1}, "-1"),
            bad("D12 a rating of -1 beside an answer", GOOD | {"rating": -1}, "rating"),
            *dropped("D12 DUMMY_ANSWER", {"prompt": "q", "response": "DUMMY_ANSWER"},
                     "DUMMY_ANSWER"),
            *dropped("D12 DUMMY_ANSWER of a pair", FORMATS["pair"] | {"rejected": "DUMMY_ANSWER "},
                     "DUMMY_ANSWER")]
    return out + dropped("D18 the rejected one scores higher", FORMATS["scored pair"] | {
        "score_chosen": 2}, "higher score")


def answers() -> list[Case]:
    """D13 to D17, D28: answers that are none, and turns out of turn."""
    row, out = FORMATS["pair"], []
    blank = {"empty": "", "of blanks": "  ", "of line feeds": "\n\n", "of U+2028": "\u2028"}
    for n, value in blank.items():
        out += dropped(f"D13 an answer {n}", {"prompt": "q", "response": value}, "empty")
        out += dropped(f"D13 a rejected one {n}", row | {"rejected": value}, "empty")
    out += dropped("D13 an answer of no messages", {"prompt": "q", "response": []}, "no message")
    out += dropped("D13 no prompt", {"prompt": [], "response": "a"}, "empty prompt")
    out += dropped("D17 chosen and rejected alike", row | {"rejected": "a"}, "the same text")
    out += dropped("D17 no common prompt", {"chosen": [USER, ASSISTANT], "rejected": [
        {"role": "user", "content": "r"}, ASSISTANT]}, "no common prompt")
    out += dropped("D17 no prompt in HH's form", {"chosen": "x", "rejected": "y"}, "no common")
    turns = {"the user speaks last": ([USER, ASSISTANT, USER], "last turn"),
             "two users in a row": ([USER, USER, ASSISTANT], "user comes another"),
             "two assistants in a row": ([USER, ASSISTANT, ASSISTANT], "assistant comes another"),
             "two systems": ([SYSTEM, SYSTEM, USER, ASSISTANT], "system comes another"),
             "a system in the middle": ([USER, ASSISTANT, SYSTEM, USER, ASSISTANT], "system"),
             "only the user": ([USER], "no assistant turn"),
             "only the assistant": ([ASSISTANT], "no assistant turn"),
             "nobody": ([], "no assistant turn"),
             "an empty turn": ([USER, {"role": "assistant", "content": " "}, USER, ASSISTANT],
                               "empty")}
    for n, (messages, reason) in turns.items():
        out += dropped(f"D28 {n}", {"messages": messages}, reason)
    out += dropped("D28 labelled, the user speaks last", {
        "messages": [USER, ASSISTANT, USER], "label": True}, "last turn")
    out += dropped("D28 labelled, nobody", {"messages": [], "label": True}, "no message")
    wrong = {"no role": {"content": "q"}, "no content": {"role": "user"}, "an unknown role":
             {"role": "narrator", "content": "q"},
             "a number as content": {"role": "user", "content": 5},
             "parts as content": {"role": "user", "content": [{"type": "text", "text": "q"}]},
             "a list as role": {"role": [], "content": "q"}, "null as content":
             {"role": "user", "content": None}, "a text": "q", "a number": 7, "null": None,
             "a list": ["user", "q"]}
    out += [bad(f"D28 a message is or has {n}", {"messages": [m, ASSISTANT]}, "message")
            for n, m in wrong.items()]
    long = {"prompt": "Say one.", "response": "one two " * 99}
    out += [
        Case("D14 the prompt fills the window", "train", only(*[GOOD] * 9, {
            "prompt": "one two " * 99, "response": "a"}), "--held_out 0",
            "1 longer than 100 tokens; dropped 1", "V"),
        Case("D15 an answer beyond the window", "train", only(*[GOOD] * 9, long), "--held_out 0",
             "1 longer than 100 tokens; dropped 1", "V"),
        Case("D15 no answer fits, prompts cut", "train", only(long), "--truncate_prompt true "
             "--held_out 0", "nothing is left; 1 longer; data.jsonl:1"),
        Case("D16 a long prompt, cut", "train", only(*[GOOD] * 9, {
            "prompt": "one two " * 99, "response": "a"}), "--held_out 0 --truncate_prompt true",
            "10 rows; to train on: 10", "V"),
        Case("D16 nothing fits", "evaluate", only(long), "--max_length 20", "up to 20 tokens"),
        Case("D16 too long for the model", "evaluate", only(GOOD, long), "", "1 rows, 1 too long",
             "V")]
    return out


def mixtures() -> list[Case]:
    """D19 D24 to D27, D30 D31: rows against each other, weights, losses."""
    scored = [GOOD | {"score": s} for s in (1, 0)]
    other = several(write("b.jsonl", text(scored[1]) + "\n"), only(*[scored[0]] * 2))
    wrong = LINE + "{\n" * 1000 + LINE
    out = [
        Case("D19 one answer scored 1 and 0", "train", only(*scored, *scored), "--held_out 0",
             "said before with OTHER feedback", "V"),
        Case("D19 scored 1 here and 0 there", "train", other,
             "--held_out 0 --data DIR/data.jsonl --data DIR/b.jsonl",
             "b.jsonl: scores; 1 said before with OTHER feedback", "V"),
        Case("D27 one line a thousand times", "train", only(*[GOOD] * 1000), "--held_out 0",
             "999 said before", "V"),
        Case("D27 one file twice", "train", None,
             "--held_out 0 --data DIR/data.jsonl --data DIR/data.jsonl", "40 said before", "V"),
        Case("D31 a thousand bad lines", "train", write("data.jsonl", wrong), "",
             "data.jsonl:2; and 999 more rows are wrong"),
        Case("D31 a thousand bad lines, to evaluate", "evaluate", write("data.jsonl", wrong), "",
             "data.jsonl:2; and 999 more rows are wrong"),
        Case("D31 bad rows of two kinds", "train", only(GOOD, {"x": 1}, GOOD | {"score": 7}), "",
             "data.jsonl:2; and 1 more"),
        Case("D25 fewer rows than the batch", "train", only(*[GOOD] * 3), "--held_out 0", "", "V"),
        Case("D25 one row", "train", only(GOOD), "--held_out 0", "1 rows", "V"),
        Case("D25 rows that the batch does not divide", "train", None, "--batch_size 7", "", "V"),
        Case("D25 everything is held out", "train", only(GOOD), "", "nothing is left; --held_out"),
        Case("D26 KTO, only good rows", "train", only(*[FORMATS["label"]] * 9),
             "--loss kto --held_out 0", "labels", "V"),
        Case("D26 KTO, one row a batch", "train", None, "--data DIR/labels.jsonl --loss kto "
             "--batch_size 1", "kto", "V"),
        Case("D26 KTO, three rows a batch", "train", None, "--data DIR/labels.jsonl --loss kto "
             "--batch_size 3", "kto", "V"),
        Case("D23 hundred files", "train", None, "--data DIR/data.jsonl " * 100, "said before",
             "V")]
    weights = {"0": "0", "0.0": "0.0", "-1": "-1", "nan": "nan", "inf": "inf", "1e9": "1e9",
               "400 digits": "9" * 400, "-inf": "-inf", "1e": "1e", "two dots": "1.2.3",
               "1001": "1001"}
    out += [Case(f"D24 a weight of {n}", "train", None, f"--data DIR/data.jsonl:{w}",
                 f"data.jsonl:{w[:40]}; weight" if len(w) < 40 else "weight")
            for n, w in weights.items()]
    out += [Case(f"D24 a weight of {w}", "train", None, f"--data DIR/data.jsonl:{w}", "times:", "V")
            for w in ("0.5", "2", "1.5", "1e1", "1000")]
    out += [Case(f"D24 {w!r} is no weight", "train", None, f"--data DIR/data.jsonl:{w}",
                 "data.jsonl; No such file") for w in ("", "x", "2x", "half", "\u00b2")]
    out += [Case("D24 a weight of no row", "train", None, "--data DIR/data.jsonl:0.01",
                 "nothing is left; FILE:WEIGHT"),
            Case("D24 a weight of no row beside another file", "train", None,
                 "--data DIR/data.jsonl:0.01 --data DIR/scores.jsonl", "0.01 times: 0 an epoch",
                 "V"),
            Case("D24 a colon in a name", "train", write("a:2", LINE * 9),
                 "--data DIR/a:2 --held_out 0", "9 rows", "V")]
    reads = {"dpo": ("data", "labels"), "ipo": ("data",), "simpo": ("labels",), "orpo": ("data",),
             "bco_pair": ("labels",), "una_pair": ("data",), "sft": ("scores",),
             "sft_token_mean": ("scores",)}
    return out + [Case(f"D30 {loss} on {name}", "train", None,
                       f"--loss {loss} --data DIR/{name}.jsonl", f"nothing is left; --loss {loss}")
                  for loss, names in reads.items() for name in names]


def cases() -> list[Case]:
    return [*files(), *syntax(), *sizes(), *encodings(), *columns(), *feedback(), *answers(),
            *mixtures()]
