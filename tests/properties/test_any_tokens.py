"""Properties of tokens.py and reference.py: any text, any rows, any budget."""
import itertools
import math

import folder
import pytest
import torch
from anything import batches, encoded, roles, texts, words
from hypothesis import assume, given
from hypothesis import strategies as st

import data
import reference
import tokens

control = st.lists(st.sampled_from([*folder.CONTROL, "a", " ", "<", "|>", "\n"]), max_size=6)
spelled = st.one_of(texts, control.map("".join))
talks = st.lists(st.tuples(roles.filter(lambda r: r in ("user", "assistant")), spelled),
                 min_size=1, max_size=3).map(tuple)
budgets = st.integers(1, 30)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """A chat a template, on one tiny tokenizer."""
    base = folder.write_model(tmp_path_factory.mktemp("chat") / "tiny")
    return {name: tokens.Chat(base, name) for name in tokens.TEMPLATES}


templates = st.sampled_from(sorted(tokens.TEMPLATES))


@given(templates, talks, spelled)
def test_ids_decode_to_exactly_what_was_said(chats, template, talk, answer):
    """The rendered prompt, the gap, the answer and its end, whatever the text.
    Red: tokens.py:Chat.ids: `if text[a:b] != GUARD` -> ``
    Red: tokens.py:Chat.response_ids: `GUARD + self.gap` -> `GUARD`"""
    chat = chats[template]
    ids = chat.prompt_ids(talk) + chat.response_ids(answer)
    meant = chat.render(talk) + chat.gap + answer + chat.decode([chat.end_id])
    assert chat.decode(ids) == meant.replace(tokens.GUARD, "")


@given(templates, talks, spelled)
def test_no_text_brings_a_control_token(chats, template, talk, answer):
    """As many control ids as the same conversation has with harmless words.
    Red: tokens.py:Chat.guard: `m[0][:1] + GUARD + m[0][1:]` -> `m[0]`
    Red: tokens.py:Chat.response_ids: `self.guard(response)` -> `response`"""
    def controls(said, response):
        ids = chats[template].prompt_ids(said) + chats[template].response_ids(response)
        return [i for i in ids if i < len(folder.CONTROL)]

    assert controls(talk, answer) == controls(tuple((r, "a") for r, _ in talk), "a")


@given(templates, words, words, st.integers(2, 40), st.booleans())
def test_a_row_fits_or_is_skipped_and_its_answer_is_never_cut(
        chats, template, prompt, answer, room, cut):
    """The prompt is whole or, where that is asked for, its end behind its BOS.
    Red: tokens.py:encode: `prompt[len(prompt) - room:]` -> `prompt[:room]`
    Red: tokens.py:encode: `> max_length` -> `> max_length + 1`
    Red: tokens.py:encode: `keep = prompt[:1]` -> `keep = []`"""
    chat, said = chats[template], (("user", prompt),)
    whole, response = chat.prompt_ids(said), chat.response_ids(answer)
    row = data.Example(said, answer, 0.5, "scored", "here")
    found, dropped = tokens.encode_all([row], chat, room, cut)
    assert len(found) + len(dropped) == 1
    if len(whole) + len(response) <= room:
        assert found[0].ids == whole + response and found[0].prompt_len == len(whole)
    elif found:
        kept, answered = found[0].ids[:found[0].prompt_len], found[0].ids[found[0].prompt_len:]
        bos = kept[0] == chat.bos_id == whole[0]
        assert cut and answered == response and len(found[0].ids) == room
        assert kept[bos:] == whole[len(whole) - len(kept) + bos:] and kept[0] == (
            chat.bos_id if whole[0] == chat.bos_id else kept[0])
    else:
        assert not cut or room - len(response) < 1 + (whole[0] == chat.bos_id)


@given(batches)
def test_the_mask_is_the_response_and_the_rest_is_padding(found):
    """Row by row ids, then zeros; True from prompt_len to the end of the row; float32 rewards.
    Red: tokens.py:collate: `start <= position` -> `start < position`
    Red: tokens.py:collate: `e.ids + [0] *` -> `e.ids + [1] *`
    Red: tokens.py:collate: `(position < end)` -> `(position <= end)`"""
    batch = tokens.collate(found)
    assert batch.ids.shape == batch.response_mask.shape == (
        len(found), max(len(e.ids) for e in found))
    for row, mask, reward, e in zip(batch.ids, batch.response_mask, batch.rewards, found,
                                    strict=True):
        assert row[:len(e.ids)].tolist() == e.ids and not row[len(e.ids):].any()
        assert mask.nonzero()[:, 0].tolist() == list(range(e.prompt_len, len(e.ids)))
        assert reward.dtype == torch.float32 and math.isclose(reward, e.reward, abs_tol=1e-7)


@given(st.lists(st.lists(encoded(), min_size=1, max_size=2), max_size=8), budgets)
def test_micro_batches_are_the_units_in_order_within_the_budget(units, budget):
    """Or one unit that is larger alone; a group is closed only where the next would not fit.
    Red: tokens.py:micro_batches: `room -= size` -> `room -= 1`
    Red: tokens.py:micro_batches: `size <= room` -> `size < room`"""
    groups = tokens.micro_batches(units, budget)
    weights = [[sum(len(e.ids) for e in unit) for unit in group] for group in groups]
    assert [unit for group in groups for unit in group] == units
    assert all(sum(w) <= budget or len(w) == 1 for w in weights)
    assert all(sum(one) + two[0] > budget for one, two in itertools.pairwise(weights))


@given(batches)
def test_a_mismatched_row_has_its_own_prompt_and_anothers_answer(found):
    """Every row has one unless all prompts are alike; nothing known of its own answer is kept.
    Red: tokens.py:mismatch: `if e.prompt != row.prompt` -> `if e is not row`
    Red: tokens.py:mismatch: `ids=row.ids[: row.prompt_len]` -> `ids=e.ids[: e.prompt_len]`"""
    made, prompts = tokens.mismatch(found), {e.prompt for e in found}
    assert len(made) == (len(found) if len(prompts) > 1 else 0)
    for row, other in zip(found, made, strict=bool(made)) if made else ():
        assert other.ids[:other.prompt_len] == row.ids[:row.prompt_len]
        assert other.prompt_len == row.prompt_len and other.ref_logps is None
        answers = [e.ids[e.prompt_len:] for e in found if e.prompt != row.prompt]
        assert other.ids[other.prompt_len:] in answers


@given(encoded(), encoded())
def test_two_rows_share_a_key_just_if_their_ids_and_boundary_are_the_same(one, two):
    """The store of reference log-probs never takes one row for another.
    Red: reference.py:keys: `(row.prompt_len, row.ids)` -> `(row.prompt_len, len(row.ids))`"""
    same = (one.ids, one.prompt_len) == (two.ids, two.prompt_len)
    assert (reference.keys([one]) == reference.keys([two])) == same


@given(encoded(), st.integers(1, 8))
def test_moving_the_boundary_changes_the_key(row, place):
    """Red: reference.py:keys: `(row.prompt_len, row.ids)` -> `row.ids`"""
    assume(place != row.prompt_len)
    assert reference.keys([row]) != reference.keys([tokens.replace(row, prompt_len=place)])


hexes = st.binary(min_size=16, max_size=16).map(bytes.hex)


@given(st.dictionaries(hexes, st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_a_store_holds_what_was_written(tmp_path_factory, known):
    """Every key and every float32, in order.
    Red: reference.py:write: `list(known.values())` -> `list(known.values())[::-1]`
    Red: reference.py:read: `bytes(k).hex()` -> `bytes(k[:8]).hex()`"""
    path = tmp_path_factory.getbasetemp() / "store.safetensors"
    reference.write(path, known)
    assert list(reference.read(path).items()) == list(known.items())
