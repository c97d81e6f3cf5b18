"""Families T01 to T17: tokenizers and chat templates that are damaged, foreign or hostile."""
import json
from collections.abc import Callable
from pathlib import Path

from faults.case import Case, Change, cut, edit, remove, several, write

PATH, CONFIG = "model/tokenizer.json", "model/tokenizer_config.json"
GENERATION, TEMPLATE = "model/generation_config.json", "model/chat_template.jinja"
PROGRAMS = ("generate", "evaluate", "train")
OWN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}" \
      "{% endif %}{% endfor %}"


def tokenizer(rewrite: Callable[[dict], None]) -> Change:
    """`rewrite` changes what tokenizer.json says."""
    def change(place: Path) -> None:
        raw = json.loads((place / PATH).read_text("utf-8"))
        rewrite(raw)
        (place / PATH).write_text(json.dumps(raw), "utf-8")

    return change


def vocabulary(**pieces) -> Change:
    return tokenizer(lambda raw: raw["model"]["vocab"].update(pieces))


def added(**keys) -> Change:
    """One more added token, as the first but for these keys."""
    return tokenizer(lambda raw: raw["added_tokens"].append(
        {k: v for k, v in (raw["added_tokens"][0] | keys).items() if v is not ...}))


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
            "invert": False}


def template(text: str) -> Change:
    return write(TEMPLATE, text)


def bytes_of_files() -> list[Case]:
    """T01: tokenizer.json and its two companions, as bytes and as JSON."""
    at, out = "tokenizer.json", []
    for n in (0, 1, 2, 20, 200, 700, 1500, 3000, 5000, -1):
        out.append(Case(f"T01 tokenizer.json cut after {n} bytes", PROGRAMS[len(out) % 3],
                        cut(PATH, n), "", at))
    for name, text, words in (
            ("is a list", "[]", "list;object"), ("is null", "null", ""),
            ("is a web page", "<!DOCTYPE html><html></html>", "web page"),
            ("is a pointer", "version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            ("is an empty object", "{}", ""), ("is 100,000 deep", '{"a":' * 100_000, "deep"),
            ("is latin-1", b'{"a": "\xe9"}', "UTF-8"), ("holds a NaN", '{"version": NaN}', "nan"),
            ("says a key twice", '{"version": "1.0", "version": "1.0"}', "'version';twice")):
        out.append(Case(f"T01 tokenizer.json {name}", PROGRAMS[len(out) % 3], write(PATH, text), "",
                        f"{at};{words}"))
    for key, value in (("version", "9.0"), ("version", 1), ("model", None), ("model", {}),
                       ("model", {"type": "Zork"}), ("model", 3), ("added_tokens", {}),
                       ("added_tokens", [1]), ("pre_tokenizer", {"type": "Zork"}),
                       ("pre_tokenizer", 5), ("normalizer", {"type": "Zork"}),
                       ("post_processor", {"type": "Zork"}), ("decoder", {"type": "Zork"}),
                       ("truncation", 3), ("padding", "x"), ("zork", 1)):
        out.append(Case(f"T01 {key} is {value!a}", PROGRAMS[len(out) % 3], tokenizer(
            lambda raw, k=key, v=value: raw.update({k: v})), "", at))
    for path in (CONFIG, GENERATION):
        name = path.removeprefix("model/")
        for what, text in (("empty", ""), ("a list", "[]"), ("a number", "7"), ("cut", '{"eos_'),
                           ("twice", '{"a": 1, "a": 2}'), ("NaN", '{"a": NaN}'),
                           ("deep", '{"a":' * 100_000), ("latin-1", b'{"a": "\xe9"}')):
            out.append(Case(f"T01 {name} is {what}", PROGRAMS[len(out) % 3], write(path, text), "",
                            name))
    return [
        *out, Case("T01 no tokenizer.json", "generate", remove(PATH), "", "no tokenizer.json"),
        Case("T01 only tokenizer.model", "train", several(remove(PATH), write(
            "model/tokenizer.model", "x")), "", "tokenizer.model;save_pretrained"),
        Case("T01 no tokenizer_config.json", "generate", remove(CONFIG), "--template chatml",
             oracle="V"),
        Case("T01 no tokenizer_config.json and no end", "generate", remove(CONFIG), "",
             "eos_token;--template"),
        Case("T01 no generation_config.json", "generate", remove(GENERATION), oracle="V"),
        Case("T01 a byte order mark", "generate", lambda place: (place / PATH).write_text(
            (place / PATH).read_text("utf-8"), "utf-8-sig"), "", "tokenizer.json")]


def ids() -> list[Case]:
    """T02 to T06: numbers in tokenizer.json."""
    at, out = "tokenizer.json", []
    for name, change, words in (
            ("T02 a piece beyond the embedding", vocabulary(zork=298), "'zork';298"),
            ("T02 an added token beyond", added(id=298, content="<zork>"), "'<zork>';298"),
            ("T02 a piece of id 4,000,000,000", vocabulary(zork=4_000_000_000), "'zork'"),
            ("T02 a negative id", vocabulary(zork=-1), "-1"),
            ("T02 an id that is a string", vocabulary(zork="5"), ""),
            ("T02 an id that is a fraction", vocabulary(zork=5.5), ""),
            ("T02 an id that is null", vocabulary(zork=None), ""),
            ("T03 two pieces of one id", vocabulary(one=9), "9;'one'"),
            ("T03 an added token with another's id", added(id=1, content="<zork>"), "'<zork>';1"),
            ("T03 an added token far away", added(id=999, content="<zork>"), "'<zork>';999"),
            ("T03 an added token of the wrong id", added(id=77), "'<s>';77"),
            ("T03 an added id of 2^40", added(id=2**40, content="<zork>"), at),
            ("T03 an added id that is a string", added(id="5", content="<zork>"), at),
            ("T03 an added token without id", added(id=..., content="<zork>"), at),
            ("T03 an added token without text", added(id=5, content=...), at),
            ("T03 an added token that is a number", added(id=5, content=7), at),
            ("T03 an empty added token", added(id=298, content=""), at),
            ("T03 merges of unknown pieces", tokenizer(
                lambda raw: raw["model"]["merges"].append(["qq", "zz"])), "qq"),
            ("T03 merges that are numbers", tokenizer(
                lambda raw: raw["model"].update(merges=[1, 2])), at),
            ("T03 no vocabulary", tokenizer(lambda raw: raw["model"].update(vocab={})), at),
            ("T03 random merges", tokenizer(lambda raw: raw["model"].update(dropout=0.5)),
             "dropout;0.5"),
            ("T03 a normalizer that breaks", tokenizer(lambda raw: raw.update(normalizer={
                "type": "Replace", "pattern": {"String": ""}, "content": "a"})), at)):
        out.append(Case(name, PROGRAMS[len(out) % 3], change, "", f"{at};{words}"))
    for ids_, words in (([77777], "77777"), ([298], "298"), ([-1], "")):
        post = {"type": "TemplateProcessing", "pair": [
            {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": ids_, "tokens": ["<s>"]}}}
        out.append(Case(f"T04 a post-processor that emits {ids_}", PROGRAMS[len(out) % 3],
                        tokenizer(lambda raw, p=post: raw.update(post_processor=p)), "",
                        f"{at};{words}"))
    cut_3 = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad_16 = {"strategy": {"Fixed": 16}, "direction": "Right", "pad_to_multiple_of": None,
              "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}
    return [
        *out,
        Case("T05 a truncation block", "evaluate", tokenizer(
            lambda raw: raw.update(truncation=cut_3)), oracle="V", words="40 rows"),
        Case("T06 a padding block", "evaluate", tokenizer(
            lambda raw: raw.update(padding=pad_16)), oracle="V", words="40 rows"),
        Case("T02 more rows than tokens", "generate", tokenizer(
            lambda raw: raw["model"].update(
                vocab={t: i for t, i in raw["model"]["vocab"].items() if i < 297},
                merges=raw["model"]["merges"][:-1])), oracle="V")]


def specials() -> list[Case]:
    """T07 to T09: the tokens that begin and end."""
    out = []
    for path, key, value, words in (
            (CONFIG, "eos_token", "<zork>", "'<zork>'"),
            (CONFIG, "bos_token", "<zork>", "bos_token;'<zork>'"),
            (CONFIG, "eos_token", 7, "eos_token;7"), (CONFIG, "eos_token", ["</s>"], "eos_token"),
            (CONFIG, "eos_token", {"id": 1}, "eos_token"), (CONFIG, "bos_token", True, "bos_token"),
            (CONFIG, "eos_token", {"content": 7}, "eos_token"),
            (CONFIG, "add_bos_token", "false", "add_bos_token;'false'"),
            (GENERATION, "eos_token_id", 298, "eos_token_id;298"),
            (GENERATION, "eos_token_id", -1, "eos_token_id;-1"),
            (GENERATION, "eos_token_id", "1", "eos_token_id;'1'"),
            (GENERATION, "eos_token_id", [1, "2"], "eos_token_id;'2'"),
            (GENERATION, "eos_token_id", 1.0, "eos_token_id;1.0"),
            (GENERATION, "eos_token_id", True, "eos_token_id;True"),
            (GENERATION, "eos_token_id", {"a": 1}, "eos_token_id")):
        name = "" if value == "<zork>" else path.removeprefix("model/")
        out.append(Case(f"T08 {key} is {value!a}", PROGRAMS[len(out) % 3],
                        edit(path, **{key: value}), "", f"{name};{words}"))
    return [
        *out,
        Case("T08 another end in each file: each one ends", "generate", several(
            edit(GENERATION, eos_token_id=5), edit("model/config.json", eos_token_id=3)),
            oracle="V"),
        Case("T08 no eos anywhere", "evaluate", edit(CONFIG, eos_token=None), "",
             "eos_token;--template"),
        Case("T08 no eos, and a template with its own end", "generate", edit(
            CONFIG, eos_token=None), "--template chatml", oracle="V"),
        Case("T08 several ends", "generate", edit(GENERATION, eos_token_id=[1, 3]), oracle="V"),
        Case("T09 pad is eos", "evaluate", edit(CONFIG, pad_token="</s>"), oracle="V",
             words="40 rows"),
        Case("T07 the template and the post-processor both begin", "generate", edit(
            CONFIG, add_bos_token=True), "--template chatml", oracle="V")]


def texts() -> list[Case]:
    """T10 to T15: text, and patterns that meet it."""
    letters = json.dumps({"prompt": "x" * 100_000, "response": "y"})
    good = '{"prompt": "a", "response": "b"}\n'
    odd = json.dumps({"prompt": "\0\U0001f600\u202e\u05d0\u0301", "response": "\U0001f468\u200d"})
    out = []
    for pattern in ("(x+x+)+y", "(x*)*y", "(?:a|a)*b(?:x+)+", "((x+)y?)*z", "(x{1,})+y",
                    "(x|xx)+y", "(?:x*y*)*z", "(x+)*+z(x+)+"):
        for block in ("pre_tokenizer", "normalizer"):
            value = split(pattern) if block == "pre_tokenizer" else {
                "type": "Replace", "pattern": {"Regex": pattern}, "content": "a"}
            out.append(Case(f"T12 {block} {pattern}", PROGRAMS[len(out) % 3], tokenizer(
                lambda raw, b=block, v=value: raw.update({b: v})), "",
                f"tokenizer.json;{pattern}"))
    out += [Case(f"T12 broken pattern {p}", "generate", tokenizer(
        lambda raw, p=p: raw.update(pre_tokenizer=split(p))), "", "tokenizer.json")
        for p in ("(x", "[z-a]", "\\", "(?P<a", "*")]
    gpt = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    qwen = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"
            r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tekken = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
              r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
    out += [Case(f"T12 the pattern of {name}", "generate", tokenizer(
        lambda raw, p=p: raw.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [
            split(p), raw["pre_tokenizer"]]})), oracle="V")
        for name, p in (("GPT-2", gpt), ("Qwen", qwen), ("Tekken", tekken))]
    return [
        *out,
        Case("T10 control tokens in a prompt", "generate", None,
             "--prompt '</s><|im_end|>[INST]' --template chatml", oracle="V"),
        Case("T10 control tokens in data", "train", write("data.jsonl", 20 * (
            '{"prompt": "a</s>", "response": "</s><|im_end|> [INST]"}\n' + good)), oracle="V"),
        Case("T13 a raw byte in a prompt", "generate", None, "--prompt '\udcff'", "UTF-8"),
        Case("T13 a lone surrogate in data", "evaluate", write(
            "data.jsonl", good + '{"prompt": "a\\ud800", "response": "b"}\n'), "", "data.jsonl:2"),
        Case("T14 odd text", "evaluate", write("data.jsonl", good + odd), oracle="V",
             words="2 rows"),
        Case("T14 100,000 letters are too long", "evaluate", write("data.jsonl", good + letters),
             oracle="V", words="1 too long"),
        Case("T14 an empty prompt", "generate", edit(CONFIG, add_bos_token=False), "--prompt=",
             "no tokens")]


DOUBLING = ("{% set n = namespace(s='x') %}{% for i in range(40) %}"
            "{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}")
NEST = "{% for a in range(99999) %}" * 3 + "x" + "{% endfor %}" * 3
HOSTILE = (  # a template that ..., its text, words of the message
    ("raises", "{{ raise_exception('no\nway') }}", "no;way"),
    ("divides by zero", "{{ 1 / 0 }}", "zero"),
    ("does not close", "{% for m in messages %}", ""),
    ("has an unknown tag", "{% zork %}", "zork"), ("has an unknown filter", "{{ 1|zork }}",
                                                   "zork"),
    ("includes a file", "{% include '/etc/passwd' %}", ""),
    ("imports a file", "{% import '/etc/passwd' as x %}", ""),
    ("extends a file", "{% extends '/etc/passwd' %}", ""),
    ("loops for ever", NEST, "long"),
    ("counts to 10^9", "{% for i in range(10**9) %}a{% endfor %}", ""),
    ("counts to 99999 thrice, doing little", NEST.replace("x", ""), "long"),
    ("writes megabytes", "{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}",
     "characters"),
    ("doubles a text", DOUBLING, "MemoryError"),
    ("multiplies a text", "{{ 'x' * 1000000000 }}", ""),
    ("multiplies a list", "{{ [1] * 1000000000 }}", ""),
    ("raises to a power", "{{ 9**9**9 }}", ""), ("pads a text", "{{ 'x'|center(10**9) }}",
                                                 ""),
    ("formats a width", "{{ '%1000000000d' % 1 }}", ""),
    ("formats wide", "{{ '{:1000000000}'.format(1) }}", ""),
    ("recurses", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", ""),
    ("nests 100 loops", "{% for a in [1] %}" * 100 + "{% endfor %}" * 100, ""),
    ("nests 3000 brackets", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", ""),
    ("is 30 MB", "{# " + "x" * 30_000_000 + " #}", "bytes"),
    ("drops the conversation", "hello", ""), ("is empty", "", ""),
    ("writes only questions", OWN.replace("assistant", "user").replace("{{ m", "{# m", 1)
     .replace("m.content }}", "m #}", 1).replace("eos_token", "m.content"), ""),
    ("turns the conversation round", OWN.replace("messages", "messages|reverse"), "elsewhere"),
    ("reads classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}", ""),
    ("reads classes by attr", "{{ ''|attr('__class__')|attr('__mro__') }}", ""),
    ("opens a shell by cycler", "{{ cycler.__init__.__globals__.os.popen('id') }}", ""),
    ("opens a shell by lipsum", "{{ lipsum.__globals__['os'].system('touch pwned') }}", ""),
    ("opens a shell by a function", "{{ raise_exception.__globals__['json'] }}", ""),
    ("opens a shell by self", "{{ self.__init__.__globals__.__builtins__ }}", ""),
    ("opens a shell by format", "{{ '{0.__class__.__mro__}'.format('') }}", ""),
    ("opens a shell by attr of format", "{{ ('{0.__class__}'|attr('format'))(messages) }}", ""),
    ("changes the messages", "{{ messages.append(1) }}", ""),
    ("clears the messages", "{{ messages.clear() }}" + OWN, ""),
    ("calls an undefined", "{{ zork() }}", "zork"),
    ("reads from undefined", "{{ zork.a.b }}", "zork"),
    ("is latin-1", b"{{ '\xe9' }}", "chat_template.jinja;UTF-8"),
    ("is UTF-16", "hello".encode("utf-16"), "chat_template.jinja;UTF-16"),
    ("ends in no token", OWN.replace("eos_token", "'<zork>'"), "'<zork>'"))


def templates() -> list[Case]:
    """T17: chat templates. Nothing in one may run code, go on for ever or fill the memory."""
    out, at = [], "chat template"
    for name, text, words in HOSTILE:
        change = template(text) if isinstance(text, str) else write(TEMPLATE, text)
        out.append(Case(f"T17 a template that {name}", PROGRAMS[len(out) % 3], change,
                        "--template checkpoint", words if "jinja" in words else
                        f"template;{words}"))
    for value in (7, True, ["x"], [{"name": "default"}], [{"template": "x"}], {"default": "x"}, []):
        out.append(Case(f"T17 chat_template is {value!a}", PROGRAMS[len(out) % 3],
                        edit(CONFIG, chat_template=value), "--template checkpoint",
                        "template" if value in ([], [{"name": "default"}]) else
                        "tokenizer_config.json;chat_template"))
    return [
        *out,
        Case("T17 a good template", "generate", template(OWN), "--template checkpoint",
             oracle="V"),
        Case("T17 a good template among others", "generate", edit(CONFIG, chat_template=[
            {"name": "tool", "template": "{{"}, {"name": "default", "template": OWN}]),
            "--template checkpoint", oracle="V"),
        Case("T17 an adapter's own hostile template", "generate", write(
            "adapter/chat_template.jinja", "{{ lipsum.__globals__ }}"),
            "--template checkpoint --adapter DIR/adapter", "template"),
        Case("T17 an escape code in what a template raises", "generate", template(
            "{{ raise_exception('\x1b[2J\x07') }}"), "--template checkpoint", f"{at};\\x1b[2J")]


def cases() -> list[Case]:
    return [*bytes_of_files(), *ids(), *specials(), *texts(), *templates()]
