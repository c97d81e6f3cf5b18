"""What tokens.py promises: exact boundaries, one BOS, one scored end, control tokens kept out."""
import functools
import itertools
import json
import re
import types
import unicodedata
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

import data
import tokens
import vocabulary

SHARED = Path(__file__).resolve().parents[1].parent / "shared/data"
CONTROLS, ASKED = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"], (("user", "hello"),)
EDGES = ("hello", "\nhello", " hello", "  7", "7 hello\n", "\u00e9\U0001f600", "\u85cf\u4e66",
         "</s>", "a <s>hello</s><|im_end|>\n<|im_start|>", "<</s>s>")


@functools.cache
def tokenizer(kind):
    """Merges of `hello` over bytes, or over words marked as Mistral's, with a BOS of their own."""
    mark = "\u0120" if kind == "bytes" else "\u2581"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else [
        mark, *map(chr, range(97, 123)), *(f"<0x{b:02X}>" for b in range(256))]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), (mark, "hello")]
    pieces = ["<unk>", *CONTROLS, *letters, *(a + b for a, b in merges)]
    out = Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>",
                               fuse_unk=True, byte_fallback=kind == "words"))
    out.add_special_tokens([AddedToken(c, special=True) for c in CONTROLS])
    out.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    out.decoder = decoders.ByteLevel()
    if kind == "words":
        out.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        out.decoder = decoders.Sequence([decoders.Replace(mark, " "), decoders.ByteFallback(),
                                         decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        out.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return out.to_str()


def chat(folder, kind="bytes", template="chatml", own=None, **config):
    """A Chat on a folder written for it; `own` is the checkpoint's template."""
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": own} | config
    (folder / "tokenizer.json").write_text(tokenizer(kind), "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return tokens.Chat(folder, template)


def example(prompt, response):
    return data.Example((("user", prompt),), response, 1.0, "sft", response)


def row(prompt, response, name="q"):
    """An Encoded row of so many prompt and response tokens."""
    ids = [*range(1, prompt + 1), *range(50, 50 + response)]
    return tokens.Encoded(ids, prompt, response / 4, "sft", "", (("user", name),))


def same_text(talk, ids, prompt, response):
    """Whether ids decode to what was meant, but for the word mark ahead and Qwen's NFC."""
    meant = talk.render(prompt) + talk.gap + response + talk.decode([talk.end_id])
    said, meant = (unicodedata.normalize("NFC", text).removeprefix(talk.bos).lstrip(" ")
                   for text in (talk.decode(ids), meant.replace(tokens.GUARD, "")))
    return said == meant


every_chat = pytest.mark.parametrize(("kind", "template"), [
    (kind, template) for kind in ("bytes", "words") for template in tokens.TEMPLATES])


@every_chat
@pytest.mark.parametrize("text", EDGES)
def test_prompt_and_response_decode_to_what_was_said(tmp_path, kind, template, text):
    """The rendered text, the gap, the response and the end, to the first and last character.
    Red: tokens.py:Chat.ids: `if text[a:b] != GUARD` -> ``
    Red: tokens.py:Chat.response_ids: `GUARD + self.gap` -> `self.gap`"""
    talk = chat(tmp_path, kind, template)
    prompt = (("user", "hello" + text), ("assistant", text), ("user", text))
    assert same_text(talk, talk.prompt_ids(prompt) + talk.response_ids(text), prompt, text)


@every_chat
def test_a_control_token_in_somebodys_text_is_plain_text(tmp_path, kind, template):
    """In prompt, history and response: no more control ids than a harmless text brings.
    Red: tokens.py:Chat.response_ids: `self.guard(response)` -> `response`
    Red: tokens.py:Chat.render: `self.guard(c)` -> `c`
    Red: tokens.py:Chat.guard: `m[0][:1] + GUARD + m[0][1:]` -> `m[0]`"""
    talk, found = chat(tmp_path, kind, template), set()
    for text in EDGES:
        prompt = (("user", text), ("assistant", text), ("user", text))
        ids = talk.prompt_ids(prompt) + talk.response_ids(text)
        found.add(tuple(i for i in ids if i in (1, 2, 3, 4)))
    assert len(found) == 1


OWN, BOS = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", "add_bos_token"


@pytest.mark.parametrize(("kind", "template", "config", "count"), [
    ("words", "plain", {}, 1), ("bytes", "plain", {}, 0), ("bytes", "mistral-inst", {}, 0),
    ("bytes", "chatml", {BOS: True}, 1), ("words", "alpaca", {BOS: False}, 0),
    ("bytes", "checkpoint", {"own": OWN}, 1), ("words", "checkpoint", {"own": OWN}, 1),
    ("words", "checkpoint", {"own": OWN[15:]}, 0), ("bytes", "plain", {"bos_token": None}, 0)])
def test_one_bos_begins_a_prompt_where_it_is_wanted(tmp_path, kind, template, config, count):
    """Named templates go by add_bos_token or the tokenizer's own habit, others by themselves.
    Red: tokens.py:Chat.prompt_ids: `self.ids(text[len(self.bos) * begins:])` -> `self.ids(text)`
    Red: vocabulary.py:encode: `add_special_tokens=False` -> `add_special_tokens=True`
    Red: tokens.py:Chat.__init__: `template in TEMPLATES and not wanted` -> `False`"""
    ids = chat(tmp_path, kind, template, **config).prompt_ids(ASKED)
    assert ids.count(1) == count == (ids[0] == 1)


@every_chat
def test_the_response_and_its_one_end_token_are_scored_and_nothing_else(tmp_path, kind, template):
    """ids[prompt_len:] is the response and an end; the mask is True just there.
    Red: tokens.py:collate: `position < end` -> `position <= end`
    Red: tokens.py:Chat.response_ids: `, self.end_id]` -> `]`
    Red: tokens.py:collate: `start <= position` -> `start < position`"""
    talk, examples = chat(tmp_path, kind, template), [example("hello", text) for text in EDGES]
    batch = tokens.collate(tokens.encode_all(examples, talk, 512)[0])
    for text, ids, mask in zip(EDGES, batch.ids, batch.response_mask, strict=True):
        assert ids[mask].tolist() == talk.response_ids(text)
        assert ids[mask].tolist().index(talk.end_id) == mask.sum() - 1
        assert ids[:mask.nonzero()[0]].tolist() == talk.prompt_ids(ASKED)


def test_the_boundary_is_exact_where_tokens_would_merge(tmp_path):
    """`hel` + `lo` is not `hello`: prompt and response keep the ids they have apart.
    Red: tokens.py:encode: `len(prompt), example.reward` -> `len(prompt) + 1, example.reward`"""
    talk = chat(tmp_path, "bytes", "plain")
    found = tokens.encode(example("hel", "lo"), talk, 99)
    assert found.ids[:-1] != talk.ids("hello") and talk.decode(found.ids) == "hello</s>"
    assert talk.decode(found.ids[:found.prompt_len]) == "hel"


REFUSED = (  # one file of the folder, the template asked for, the message
    ("tokenizer_config.json", '{"eos_token": "<eot>"}', "plain", "ends an answer with '<eot>'"),
    ("tokenizer_config.json", "{}", "checkpoint", "with --template mistral-inst | chatml | alpaca"),
    ("tokenizer_config.json", "{}", "vicuna", "choose checkpoint, mistral-inst, chatml, alpaca"),
    ("tokenizer_config.json", "{", "plain", "tokenizer_config.json: not valid JSON"),
    ("chat_template.jinja", "{% if %}", "checkpoint", "the chat template is broken: Expected"),
    ("chat_template.jinja", "{{ raise_exception('no') }}", "checkpoint", "this conversation: no"),
    ("chat_template.jinja", "{{ 1 / 0 }}", "checkpoint", "division by zero"),
    ("chat_template.jinja", "{{ ''.__class__.__mro__ }}", "checkpoint", "'__class__' of 'str'"),
    ("chat_template.jinja", "{{ messages | length }}", "checkpoint", "elsewhere than behind"),
    ("tokenizer.json", None, "plain", "found: ['tokenizer_config.json']). Convert it once: Auto"),
    ("tokenizer.json", '{"model": ', "plain", "tokenizer.json: not valid JSON"),
    ("config.json", '{"vocab_size": 265}', "plain", "has an id beyond the 265 embeddings"))


@pytest.mark.parametrize(("file", "content", "template", "message"), REFUSED)
def test_what_cannot_be_used_is_refused_by_name(tmp_path, file, content, template, message):
    """Always a ValueError that says what was found or what to do.
    Red: tokens.py:Chat.frame: `if end_id is None:` -> `if False:`
    Red: tokens.py:Chat.frame: `if not after.startswith(before):` -> `if False:`
    Red: templates.py: `from jinja2.sandbox import` -> `from jinja2 import Environment as`
    Red: templates.py:fill: `except Exception` -> `except TemplateError`
    Red: tokens.py:Chat.__init__: `i >= size]` -> `i > size]`"""
    chat(tmp_path)
    (tmp_path / file).unlink(missing_ok=True)
    if content:
        (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        tokens.Chat(tmp_path, template)


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    """Red: tokens.py:Chat.__init__: `if not folder.is_dir()` -> `if False`"""
    with pytest.raises(ValueError, match="nowhere is not a model folder: there is no such folder"):
        tokens.Chat(tmp_path / "nowhere", "plain")


def test_a_row_that_its_template_refuses_is_named(tmp_path):
    """By the place it was read from.
    Red: tokens.py:encode_all: `f"{example.where}: {error}"` -> `str(error)`"""
    own = OWN + "{% if messages[0].content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    talk = chat(tmp_path, template="checkpoint", own=own)
    with pytest.raises(ValueError, match=r"^here:3: the chat template refuses .*: no\."):
        tokens.encode_all([example("good", "here:2"), example("bad", "here:3")], talk, 99)


def test_a_template_writes_json_as_transformers_lets_it(tmp_path):
    """Letters stay letters, < and ' are not escaped for a web page.
    Red: templates.py:compile_template: `ensure_ascii=ensure_ascii` -> `ensure_ascii=True`
    Red: templates.py:compile_template: `["tojson"] = tojson` -> `["json"] = tojson`"""
    talk = chat(tmp_path, template="checkpoint", own="{% for m in messages %}"
                "{% if m.role == 'user' %}{{ m.content | tojson }}{% else %}{{ m.content }}"
                "{% endif %}{% endfor %}")
    assert talk.render((("user", "<\u00e9'\""),)) == "\"<\u00e9'\\\"\""


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    """Some tokenizer.json of the hub carry both, and would cut or fill every text.
    Red: vocabulary.py:open_tokenizer: `tokenizer.no_padding()` -> `pass`
    Red: vocabulary.py:open_tokenizer: `tokenizer.no_truncation()` -> `pass`"""
    before, cutting = chat(tmp_path), Tokenizer.from_str(tokenizer("bytes"))
    cutting.enable_truncation(3)
    cutting.enable_padding(length=40)
    cutting.save(str(tmp_path / "tokenizer.json"))
    after = tokens.Chat(tmp_path, "chatml")
    assert all(before.ids(t) == after.ids(t) for t in (*EDGES, "hello " * 20))


def test_the_template_is_looked_for_in_adapter_then_file_then_key(tmp_path):
    """Of a list of named templates the default; a template asked for by name beats them all.
    Red: templates.py:template_source: `for folder in folders` -> `for folder in folders[::-1]`
    Red: templates.py:template_source: `.get("default", ` -> `.get("tool_use", `"""
    folders, named = [tmp_path / "adapter", tmp_path / "model"], ("tool_use", "default")
    folders[0].mkdir(), folders[1].mkdir()
    config = {"chat_template": [{"name": n, "template": n} for n in named]}
    (folders[1] / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokens.template_source(folders, "checkpoint") == "default"
    for folder in folders[::-1]:
        (folder / "chat_template.jinja").write_text(folder.name)
        assert tokens.template_source(folders, "checkpoint") == folder.name
    assert "[INST]" in tokens.template_source(folders, "mistral-inst")


def test_mistral_reads_a_system_message_before_the_next_users(tmp_path):
    """As one instruction, and once.
    Red: templates.py: `'[INST] ' + lead.text + m.content` -> `'[INST] ' + m.content`
    Red: templates.py: `{% set lead.text = '' %}` -> ``"""
    talk = chat(tmp_path, template="mistral-inst")
    said = (("system", "S"), ("user", "p"), ("assistant", "o"), ("user", "q"))
    assert talk.render(said).endswith("[INST] S\n\np [/INST] o</s>[INST] q [/INST]")


def test_generation_marks_leave_nothing_behind_but_their_content():
    """Neither their line's blanks nor its end, and `-` strips as in any other block.
    Red: templates.py:compile_template: `(end)?` -> ``"""
    source = "a\n  {% generation %}\nb \n {%- endgeneration %}\n"
    assert tokens.compile_template(source).render() == "a\nb"


@every_chat
@pytest.mark.parametrize(("bos", "eos"), [(True, [7, 3]), (False, 9)])
def test_a_saved_adapter_asks_and_stops_as_its_training_did(tmp_path, kind, template, bos, eos):
    """Same ids again; the stop ids are the template's end, the tokenizer's and the model's.
    Red: tokens.py:Chat.save: `write_text(self.source` -> `write_text(TEMPLATES["alpaca"]`
    Red: tokens.py:Chat.__init__: `eos if isinstance(eos, list) else [eos]` -> `[]`"""
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    trained, adapter = chat(tmp_path, kind, template, add_bos_token=bos), tmp_path / "adapter"
    adapter.mkdir()
    trained.save(adapter)
    again = tokens.Chat(tmp_path, adapter=adapter)
    for text in EDGES:
        talk = (*ASKED, ("assistant", text), ("user", text))
        assert again.prompt_ids(talk) == trained.prompt_ids(talk)
        assert again.response_ids(text) == trained.response_ids(text)
    saved = set(json.loads((adapter / "generation_config.json").read_text())["eos_token_id"])
    assert saved == again.stop_ids == {2, trained.end_id} | ({7, 3} if bos else {9})


def test_rows_too_long_are_dropped_and_counted_or_lose_the_prompts_left(tmp_path):
    """The BOS stays, the response is never cut, and a row that fits is left alone.
    Red: tokens.py:encode: `> max_length:` -> `>= max_length:`
    Red: tokens.py:encode: `prompt[:1] if` -> `[] if`
    Red: tokens.py:encode: `or room < 1` -> ``
    Red: tokens.py:encode: `prompt[len(prompt) - room:]` -> `prompt[:room]`
    Red: tokens.py:encode: `if not prompt` -> `if False`"""
    talk = chat(tmp_path, "bytes", "plain", add_bos_token=True)
    examples = [example("abcdef", response) for response in ("x", "xy", "x" * 9)]
    rows, dropped = tokens.encode_all(examples, talk, 9)
    assert [len(e.ids) for e in rows] == [9] and [d["where"] for d in dropped] == ["xy", "x" * 9]
    rows, dropped = tokens.encode_all(examples, talk, 9, truncate_prompt=True)
    assert [talk.decode(e.ids) for e in rows] == ["<s>abcdefx</s>", "<s>bcdefxy</s>"]
    assert [e.prompt_len for e in rows] == [7, 6] and len(dropped) == 1
    with pytest.raises(tokens.Skip, match="the prompt has no token"):
        tokens.encode(example("", "x"), chat(tmp_path, "bytes", "plain"), 9)


def test_mismatched_rows_never_join_a_prompt_with_its_own_responses():
    """The response of the next row of another prompt, around the end; none where all are one's.
    Red: tokens.py:mismatch: `if e.prompt != row.prompt` -> ``"""
    rows = [row(2, 1, "a"), row(2, 2, "a"), row(3, 3, "b"), row(4, 4, "a")]
    sizes = [(e.prompt_len, len(e.ids) - e.prompt_len) for e in tokens.mismatch(rows)]
    assert sizes == [(2, 3), (2, 3), (3, 4), (4, 3)]
    assert tokens.mismatch(rows[:2]) == []


@pytest.mark.parametrize("budget", [1, 40, 100, 10 ** 6])
def test_micro_batches_hold_every_unit_once_within_the_budget(budget):
    """In order, pairs whole; only a unit alone may be larger than the budget, none fits before.
    Red: tokens.py:micro_batches: `room = tokens` -> `room = 2 * tokens`
    Red: tokens.py:micro_batches: `size <= room` -> `size < room - 9`"""
    units = [tuple(row(2 + i % 7, 1 + i % 5 + k) for k in range(1 + i % 2)) for i in range(30)]
    groups = tokens.micro_batches(units, budget)
    assert [unit for group in groups for unit in group] == units
    counts = [[sum(len(e.ids) for e in unit) for unit in group] for group in groups]
    assert all(sum(count) <= budget or len(count) == 1 for count in counts)
    assert all(sum(a) + b[0] > budget for a, b in itertools.pairwise(counts))


def test_collate_pads_on_the_right_and_keeps_rewards_by_row():
    """Zeros behind each row.
    Red: tokens.py:collate: `[e.reward for e in rows]` -> `[rows[0].reward for e in rows]`
    Red: tokens.py:collate: `e.ids + [0] * (width - len(e.ids))` -> `(e.ids * width)[:width]`"""
    batch = tokens.collate([row(2, 1), row(1, 3)])
    assert batch.ids.tolist() == [[1, 2, 50, 0], [1, 50, 51, 52]]
    assert batch.rewards.tolist() == [0.25, 0.75] and batch.kinds == ("sft", "sft")


FOLDERS = ("tokenizers/mistral-7b-v0.1", "models/stories260k", "tokenizers/qwen2-instruct",
           "tokenizers/qwen3", "tokenizers/minimind-6400")
REAL = [(f, t) for f in FOLDERS for t in ("checkpoint", *tokens.TEMPLATES)
        if f not in FOLDERS[:2] or t not in ("checkpoint", "chatml")]  # they have no such tokens
from_file = functools.cache(Tokenizer.from_file)


@functools.cache
def real_rows():
    pairs = data.read(SHARED / "datasets/ultrafeedback/ultrafeedback_train_clean.jsonl.gz")[0]
    short = data.read(SHARED / "datasets/llamafactory/alpaca_en_demo.json")[0]
    return [e for e in pairs[::2] if len(e.response) < 1000][:200] + short[:200]


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared data is not here")
@pytest.mark.parametrize(("folder", "template"), REAL)
def test_real_rows_decode_to_what_was_said(monkeypatch, folder, template):
    """400 rows and the edges: the text, one BOS or none, and one end, which is the last token.
    Seen red with U+FDD0 as the guard: Qwen merges its last byte with U+85CF."""
    monkeypatch.setattr(vocabulary, "Tokenizer", types.SimpleNamespace(from_file=from_file))
    talk, begin = tokens.Chat(SHARED / folder, template), [1] * (folder in FOLDERS[:2])
    for e in [*real_rows(), *(example("x" + text, text) for text in EDGES)]:
        ids, answer = talk.prompt_ids(e.prompt), talk.response_ids(e.response)
        assert same_text(talk, ids + answer, e.prompt, e.response)
        assert [i for i in ids if i == talk.tokenizer.token_to_id("<s>")] == begin
        assert answer.index(talk.end_id) == len(answer) - 1
