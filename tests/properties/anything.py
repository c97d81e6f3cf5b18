"""What the properties draw from: JSON values, rows of data files, rows of tokens, tensors."""
import json

import torch
from hypothesis import strategies as st

import tokens

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
words = st.text("abc <>|_.\n\u00e9", min_size=1, max_size=8).filter(str.strip)
scalars = st.one_of(st.none(), st.booleans(), st.integers(-9, 9), texts,
                    st.floats(allow_nan=False, allow_infinity=False))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    texts, inner, max_size=3), max_leaves=6)
seeds = st.integers(0, 10**9)

roles = st.sampled_from(("user", "assistant", "system", "human", "gpt", "tool"))
messages = st.lists(st.fixed_dictionaries({"role": roles, "content": words}), max_size=4)
MARKS = ("\n\nHuman: q", "\n\nAssistant: a", "\n\nAssistant: b", "<extra_id_1>User\n", "c")
marked = st.lists(st.sampled_from(MARKS), max_size=4).map("".join)
COLUMNS = ("prompt", "response", "completion", "instruction", "input", "output", "question",
           "answer", "messages", "conversations", "data", "score", "chosen", "rejected", "label",
           "helpfulness", "correctness", "coherence", "metadata", "history", "system",
           "score_chosen", "score_rejected", "text")
plausible = st.one_of(words, messages, marked, st.integers(0, 4), st.booleans(),
                      st.lists(words, max_size=4))
rows = st.dictionaries(st.sampled_from(COLUMNS), plausible | values, max_size=5) | st.one_of([
    st.fixed_dictionaries(dict.fromkeys(columns, plausible)) for columns in (
        ("prompt", "response"), ("prompt", "chosen", "rejected"), ("chosen", "rejected"),
        ("messages",), ("data",), ("prompt", "completion", "label"), ("messages", "label"),
        ("prompt", "response", "score"), ("prompt", "response", "history", "system"))])


def line(value: object) -> bytes:
    """The value as one line of a .jsonl file."""
    return json.dumps(value, ensure_ascii=False).encode()


KINDS = ("sft", "chosen", "rejected", "scored")


@st.composite
def encoded(draw, prompts: int = 4):
    """A row of 1 to 6 prompt ids and 1 to 5 response ids; one prompt has one text."""
    which = draw(st.integers(1, prompts))
    answer = draw(st.lists(st.integers(3, 22), min_size=1, max_size=5))
    return tokens.Encoded([*range(which, 2 * which + 1), *answer], which + 1,
                          draw(st.sampled_from((0.0, 0.25, 0.5, 0.9, 1.0))),
                          draw(st.sampled_from(KINDS)), "", (("user", str(which)),))


batches = st.lists(encoded(), min_size=1, max_size=6)


def noise(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers, a function of the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
