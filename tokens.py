"""From text to ids to a padded batch: a chat template and a tokenizer give Encoded, then Batch.

Prompt and response are encoded apart and joined as ids, so the boundary is exact by construction
and generation sees the very prompt that training saw. A response is followed by the template's
end-of-turn token, which is scored. Masks come from lengths, never from comparing ids with a pad id.
A control token spelled inside somebody's text is encoded as plain text.
Letters: B rows, T tokens.
"""
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import bounds
import strict
import vocabulary
from templates import TEMPLATES, compile_template, fill, template_source

GUARD = "\U0010ffff"  # a Unicode noncharacter: no token merges with it, and `ids` drops it again


class Skip(Exception):
    """A row that does not fit, with the reason: dropped, counted and listed."""


class Sampled(NamedTuple):
    """What sampling leaves with a response: one number per token; (B, T) in a Batch, zero outside.

    See policy_gradients.py.
    """

    old_logps: Sequence[float] | Tensor
    ref_logps: Sequence[float] | Tensor
    advantages: Sequence[float] | Tensor
    values: Sequence[float] | Tensor
    returns: Sequence[float] | Tensor
    given: Sequence[float] | Tensor  # 1 where the token was a hint, not drawn


@dataclass(frozen=True)
class Encoded:
    """Token ids of prompt and response; ids[prompt_len:] is scored, its end token included."""

    ids: list[int]
    prompt_len: int
    reward: float
    kind: str  # as data.Example has it; "sampled" of a response that was
    where: str
    prompt: tuple  # the messages: rows of one prompt are held out, paired or mismatched by it
    ref_logps: float | None = None  # log pi_ref of the response, where it is known already
    answer: str = ""  # what a reward may compare a sampled response with
    sampled: Sampled | None = None  # of a response that was sampled for this step


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right with id 0, which nothing reads."""

    ids: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool
    rewards: Tensor  # (B,) float32
    kinds: tuple[str, ...]  # B of "sft", "chosen", "rejected", "scored"
    ref_logps: Tensor | None  # (B,) float64
    sampled: Sampled | None = None  # (B, T) each, where a row was sampled


def special(config: dict, name: str, where: Path) -> str:
    """The text of bos_token or eos_token, "" where there is none."""
    value = config.get(name)
    text = value.get("content", value) if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: {name} is {strict.show(value)}, expected a text")
    return text or ""


class Chat:
    """The tokenizer of a model folder and the template that turns conversations into prompts.

    template is "checkpoint" or a name in TEMPLATES; an adapter folder's own template goes first.
    ValueError for a missing or broken file, template or end token, and for ids beyond the
    embedding.
    """

    def __init__(self, folder: str | Path, template: str = "checkpoint",
                 adapter: str | Path | None = None) -> None:
        folder = Path(folder)
        path, where = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not folder.is_dir():
            raise ValueError(f"{folder} is not a model folder: {strict.found(folder)}")
        if not strict.exists(path):
            found = sorted(p.name for p in folder.glob("tokenizer*"))
            raise ValueError(f"{folder} has no tokenizer.json (found: {found}). Convert it once: "
                             "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)")
        config, self.tokenizer = strict.optional_json(where), vocabulary.open_tokenizer(path)
        self.generation_config = strict.optional_json(folder / "generation_config.json")
        self.bos, self.eos = (special(config, n, where) for n in ("bos_token", "eos_token"))
        self.source = template_source([Path(p) for p in (adapter, folder) if p], template)
        self.bos_id = self.tokenizer.token_to_id(self.bos) if self.bos else None
        first = self.tokenizer.encode("").ids[:1]
        wanted = bounds.boolean(config, "add_bos_token", where) if "add_bos_token" in config else (
            first == [self.bos_id])
        if template in TEMPLATES and not wanted:
            self.bos, self.source = "", self.source.replace("{{ bos_token }}", "")
        added = self.tokenizer.get_added_tokens_decoder().values()
        controls = [re.escape(t.content) for t in added if t.special]
        self.control = re.compile("|".join(controls) or "(?!)")
        self.template = compile_template(self.source)
        with bounds.memory(1 << 30):  # a hostile template is noticed here
            self.gap, self.end_id = self.frame(template)
        for name, token in (("bos_token", self.bos), ("eos_token", self.eos)):
            if token and self.tokenizer.token_to_id(token) is None:
                raise ValueError(f"{where}: {name} is {token!r}, which is no token of {path.name}")
        eos = self.generation_config.get("eos_token_id")
        stops = [i for i in (eos if isinstance(eos, list) else [eos]) if i is not None]
        for i in stops:
            if type(i) is not int or i < 0 or self.tokenizer.id_to_token(i) is None:
                raise ValueError(f"{folder / 'generation_config.json'}: eos_token_id holds "
                                 f"{strict.show(i)}, which is the id of no token")
        own = self.tokenizer.token_to_id(self.eos)
        self.stop_ids = {self.end_id, *stops} | ({own} - {None})
        sizes = strict.optional_json(folder / "config.json")
        key = f"{folder / 'config.json'}: vocab_size"
        size = bounds.whole(key, sizes["vocab_size"]) if "vocab_size" in sizes else 2**32
        if beyond := [t for t, i in self.tokenizer.get_vocab().items() if i >= size]:
            raise ValueError(f"{path}: token {beyond[0]!r} has an id beyond the {size} embeddings")

    def frame(self, name: str) -> tuple[str, int]:
        """(blank that precedes a response, id of the token that ends it), read off a rendering.

        What else a template puts before an answer (Qwen3's empty <think>) is left out: responses
        follow the generation prompt directly, as they will when sampled.
        """
        asked = (("user", "?"),)
        before = self.render(asked)
        after = self.render((*asked, ("assistant", GUARD)), generation=False)
        between, answer, end = after.removeprefix(before).partition(GUARD)
        end = end.strip() or self.eos
        end_id = self.tokenizer.token_to_id(end)
        if not after.startswith(before):
            raise ValueError(f"template {name!r} writes an answer elsewhere than behind its own "
                             "generation prompt: choose another --template")
        if not answer or before == self.render((("user", "!"),)):
            raise ValueError(f"template {name!r} leaves out what the "
                             f"{'user' if answer else 'model'} says: choose another --template")
        if end_id is None:
            raise ValueError(f"template {name!r} ends an answer with {end!r}, which is no token of "
                             f"this tokenizer (eos_token is {self.eos!r}): choose another "
                             "--template")
        return between if between.isspace() else "", end_id

    def render(self, messages: tuple, generation: bool = True) -> str:
        """The template's text, as transformers renders it, but for guarded control tokens."""
        listed = [{"role": r, "content": self.guard(c)} for r, c in messages]
        return fill(self.template, listed, generation, self.bos, self.eos)

    def guard(self, text: str) -> str:
        """Breaks every control token that `text` spells, so that it is encoded as plain text."""
        return self.control.sub(lambda m: m[0][:1] + GUARD + m[0][1:], text)

    def ids(self, text: str) -> list[int]:
        """Token ids, control tokens recognised, guards dropped, nothing added."""
        found = vocabulary.encode(self.tokenizer, text)
        return [i for i, (a, b) in zip(*found, strict=True) if text[a:b] != GUARD]

    def prompt_ids(self, messages: tuple) -> list[int]:
        """Ids of a conversation up to where the assistant speaks; a BOS if the template has it."""
        text = self.render(messages)
        begins = bool(self.bos) and text.startswith(self.bos)
        return [self.bos_id] * begins + self.ids(text[len(self.bos) * begins:])

    def response_ids(self, response: str) -> list[int]:
        """Ids of a response in mid-text (the guard hides that it starts a text), then the end."""
        return [*self.ids(GUARD + self.gap + self.guard(response)), self.end_id]

    def save(self, folder: Path) -> None:
        """Leaves template and stop ids in an adapter folder, for whoever samples from it."""
        config = self.generation_config | {"eos_token_id": sorted(self.stop_ids)}
        (folder / "chat_template.jinja").write_text(self.source, "utf-8")
        (folder / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    def answer(self, prompt: list[int], ids: list[int]) -> str:
        """What a response's ids say behind the prompt's, without their end token."""
        ids = ids[:-1] if ids and ids[-1] in self.stop_ids else ids
        return self.decode(prompt + ids)[len(self.decode(prompt)):].removeprefix(self.gap)

    def decode(self, ids: list[int]) -> str:
        """The text of ids, control tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def encode(example, chat: Chat, max_length: int, truncate_prompt: bool = False,
           reads: str = "rows") -> Encoded:
    """The Encoded row of a data.Example.   Skip beyond max_length tokens, or with no prompt token.

    truncate_prompt cuts such a prompt from the left, behind its BOS; a response is never cut. A
    loss that reads "prompts" is given an empty one, whatever the length of the record's.
    """
    response = "" if reads == "prompts" else example.response
    prompt, answer = chat.prompt_ids(example.prompt), chat.response_ids(response)
    if not prompt:
        raise Skip("the prompt has no token")
    if len(prompt) + len(answer) > max_length:
        keep = prompt[:1] if prompt[0] == chat.bos_id else []
        room = max_length - len(answer) - len(keep)
        if not truncate_prompt or room < 1:
            raise Skip(f"{len(prompt)} + {len(answer)} tokens, more than {max_length}")
        prompt = keep + prompt[len(prompt) - room:]
    return Encoded(prompt + answer, len(prompt), example.reward, example.kind, example.where,
                   example.prompt, answer=example.answer or example.response)


def encode_all(examples: Sequence, chat: Chat, max_length: int, truncate_prompt: bool = False,
               reads: str = "rows") -> tuple[list[Encoded], list[dict]]:
    """(rows, dropped rows with their reason) of data.Examples, in order."""
    out, dropped = [], []
    for example in examples:
        try:
            out.append(encode(example, chat, max_length, truncate_prompt, reads))
        except Skip as reason:
            dropped.append({"where": example.where, "reason": str(reason)})
        except ValueError as error:
            raise ValueError(f"{example.where}: {error}") from None
    return out, dropped


def mismatch(rows: Sequence[Encoded]) -> list[Encoded]:
    """Each prompt with the response of the next row that has another prompt: KTO's z0 rows."""
    out = []
    for i, row in enumerate(rows):
        others = [e for e in (*rows[i + 1:], *rows[:i]) if e.prompt != row.prompt]
        out += [replace(row, ids=row.ids[: row.prompt_len] + e.ids[e.prompt_len:], ref_logps=None)
                for e in others[:1]]
    return out


def micro_batches(units: Sequence[Sequence[Encoded]], tokens: int) -> list[list]:
    """Groups of units, in order, each of at most `tokens` tokens (or one unit)."""
    groups, room = [], 0
    for unit in units:
        size = sum(len(e.ids) for e in unit)
        if groups and size <= room:
            groups[-1].append(unit)
        else:
            groups.append([unit])
            room = tokens
        room -= size
    return groups


def collate(rows: Sequence[Encoded]) -> Batch:
    """Rows as tensors, padded on the right; ref_logps where every row has one."""
    width = max(len(e.ids) for e in rows)
    ids = torch.tensor([e.ids + [0] * (width - len(e.ids)) for e in rows])
    position = torch.arange(width)
    start, end = (torch.tensor(n)[:, None] for n in zip(
        *((e.prompt_len, len(e.ids)) for e in rows), strict=True))
    mask = (start <= position) & (position < end)
    rewards, known = torch.tensor([e.reward for e in rows]), [e.ref_logps for e in rows]
    return Batch(ids, mask, rewards.float(), tuple(e.kind for e in rows),
                 None if None in known else torch.tensor(known, dtype=torch.float64),
                 collate_sampled(rows, mask) if any(e.sampled for e in rows) else None)


def collate_sampled(rows: Sequence[Encoded], mask_BT: Tensor) -> Sampled:
    """The numbers per token at the tokens' places, (B, T) each; rows not sampled are all zeros."""
    out = [torch.zeros(mask_BT.shape) for _ in Sampled._fields]
    for i, row in enumerate(rows):
        for table, numbers in zip(out, row.sampled or (), strict=False):
            table[i, mask_BT[i]] = torch.as_tensor(numbers)
    return Sampled(*out)
