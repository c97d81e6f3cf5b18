"""Packing changes which tokens run and no number: what runs, and the model against plain rows."""
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_backward import LAST, NOTHING, SEGMENTS, agree, attention, qkv
from test_model import adapted, every_family
from torch import Tensor

import lora
import packing

CPU = torch.device("cpu")


def written(*rows: str) -> tuple[Tensor, Tensor]:
    """ids and mask of rows of letters: a capital is scored, '.' is padding."""
    ids = torch.tensor([[0 if c == "." else ord(c.lower()) - 94 for c in row] for row in rows])
    return ids, torch.tensor([[c.isupper() for c in row] for row in rows])


BATCHES = {
    "plain": tiny.batch(),
    "pair": written("abcDEF...", "abcGHIJK."),
    "pairs": written("abcDE.", "abcFGH", "abdIJ.", "abdKL."),
    "three of one prompt": written("abcD", "abcE", "abcF"),
    "far apart": written("abCDE", "fgH..", "abIJ.", "fgKLM"),
    "one token, shared": written("abcdE.", "abcdFG", "abcdH.", "abcdE."),
    "only ones": written("abC", "abD", "cdE", "cdE"),
    "several turns": written("abCDefGH.", "abCDefgHI", "abIJklmNO", "abPcDeF.."),
    "unscored": written("abcd", "abCD", "efgh", "abEF"),
    "unscored first": written("abcdef", "abcDEF", "abcGHI"),
    "last token differs": written("abcD", "abeD"),
    "one is the other's beginning": written("abC..", "abcDE", "abcdE", "abE.."),
    "prompts of one token": written("aBCD", "aEF.", "bCD.")}
every_batch = pytest.mark.parametrize("ids, mask", BATCHES.values(), ids=BATCHES.keys())


def pack(ids: Tensor, mask: Tensor) -> packing.Packed:
    return packing.pack(ids, mask, CPU)


def plain_logps(net, ids: Tensor, mask: Tensor) -> Tensor:
    """Every row alone, in full, by the plain log softmax of all its logits; (B, T)."""
    rows = []
    for row in ids:
        logp = net.logits(net(row[None]))[0, :-1].log_softmax(-1)
        rows.append(logp.gather(-1, row[1:, None])[:, 0])
    return torch.nn.functional.pad(torch.stack(rows), (1, 0)).where(mask, 0)


def letters(ids: Tensor) -> str:
    return "".join(chr(i + 94) for i in ids.tolist())


def texts(packed: packing.Packed) -> list[Tensor]:
    """Of every token that runs, the places of all tokens that attention shows it: its text."""
    found, places = [], torch.arange(packed.ids.numel())
    for _, rows, prompt in packed.segments:
        for place in places[rows]:
            found.append(torch.cat((places[prompt], places[rows.start:place + 1])))
    return found


@every_batch
def test_a_scored_token_is_predicted_from_the_text_before_it(ids, mask):
    """By the definition: the token at `source` sees ids[:t] of its row, at positions 0 to t - 1,
    the target is ids[t], the place is that of t, and every scored token comes once, in order.

    Red: packing.py:pack: `torch.where(where == first, ready,` -> `torch.where(where < 0, ready,`
    Red: packing.py:pack: `torch.arange(shared, end)` -> `torch.arange(end - shared)`
    Red: packing.py:pack: `ids_BT[row, where]` -> `ids_BT[row, where - 1]`
    """
    packed = pack(ids, mask)
    seen = [texts(packed)[i] for i in packed.kept[packed.source]]
    assert packed.place.tolist() == mask.flatten().nonzero()[:, 0].tolist()
    for text, token, place in zip(seen, packed.target, packed.place, strict=True):
        row, t = divmod(int(place), ids.shape[1])
        assert torch.equal(packed.ids[0, text], ids[row, :t]) and token == ids[row, t]
        assert packed.positions[text].tolist() == list(range(t))


@every_batch
def test_segments_lie_behind_one_another_and_the_last_layer_asks_their_last_tokens(ids, mask):
    """Rows tile the N tokens and queries the M kept ones, which are the last of their segment;
    a prompt that is gone on from was run before, and no segment is empty.

    Red: packing.py:pack: `if len(position):` -> `if True:`
    Red: packing.py:pack: `lead = shared or first - 1` -> `lead = shared or first`
    """
    packed = pack(ids, mask)
    tail = end = 0
    assert len(packed.final) == len(packed.segments)
    for (own, rows, prompt), last in zip(packed.segments, packed.final, strict=True):
        assert own == rows and last[1:] == (rows, prompt) and rows.start == end < rows.stop
        queries, end = last[0], rows.stop
        asked = torch.arange(rows.stop - queries.stop + queries.start, rows.stop)
        assert queries.start == tail and torch.equal(packed.kept[queries], asked)
        assert rows.start <= asked[0] and prompt.stop <= rows.start
        tail = queries.stop
    assert (end, tail) == (packed.ids.numel(), len(packed.kept))


@every_batch
def test_nothing_runs_that_no_scored_token_needs(ids, mask):
    """Not padding, not text behind a response nor its last token, a prompt once; and the last
    layer works out no token of a prompt but its last one.

    Red: packing.py:pack: `int(where[-1])` -> `len(scored) - 1`
    Red: packing.py:pack: `kept = position[lead - shared:]` -> `kept = position`
    """
    packed = pack(ids, mask)
    needed = torch.cat([texts(packed)[i] for i in packed.kept[packed.source]])
    assert set(needed.tolist()) == set(range(packed.ids.numel()))
    rows = [int(m.nonzero()[-1] - m.nonzero()[0]) for m in mask if m.any()]
    prompts = {letters(i[:m.nonzero()[0]]) for i, m in zip(ids, mask, strict=True) if m.any()}
    assert len(packed.kept) == sum(rows) + len(prompts)
    assert packed.ids.numel() == sum(rows) + sum(map(len, prompts))


@pytest.mark.parametrize("name, ids, positions, kept", [
    ("pair", "abcdeghij", "012343456", "cdeghij"),
    ("pairs", "abcdfgabdik", "01233401233", "cdfgdik"),
    ("three of one prompt", "abc", "012", "c"),
    ("far apart", "abcdfgikl", "012301223", "bcdgikl"),
    ("one token, shared", "abcdf", "01234", "df"),
    ("only ones", "abcd", "0101", "bd"),
    ("unscored", "abce", "0122", "bce"),
    ("last token differs", "abcabe", "012012", "ce"),
    ("several turns", "abcdefgcdefghijklmnpcde", "01234562345672345672345",
     "bcdefgcdefghijklmnpcde"),
    ("prompts of one token", "abcebc", "012101", "abcebc")])
def test_these_tokens_run_and_no_others(name, ids, positions, kept):
    """Written out: a prompt once, the later response behind it at the positions it goes on from.

    Red: packing.py:pack: `if prompt.start < start else 0` -> `if False else 0`
    """
    packed = pack(*BATCHES[name])
    assert letters(packed.ids[0]) == ids
    assert "".join(map(str, packed.positions.tolist())) == positions
    assert letters(packed.ids[0, packed.kept]) == kept


@pytest.mark.parametrize("mask, words", [
    ([[0, 0, 0], [0, 0, 0]], "no row has a token"), ([[0, 0, 1], [1, 1, 1]], "position 0")])
def test_a_batch_that_cannot_be_scored_is_refused(mask, words):
    """One without a scored token, and a scored token with nothing before it.

    Red: packing.py:pack: `assert parts` -> `assert True`
    Red: packing.py:pack: `assert first > 0` -> `assert True`
    """
    with pytest.raises(AssertionError, match=words):
        pack(torch.full((2, 3), 5), torch.tensor(mask).bool())


@pytest.mark.parametrize("trained", ["adapters", "everything"])
@pytest.mark.parametrize("name", ["pair", "far apart", "one token, shared", "several turns",
                                  "unscored", "prompts of one token"])
@every_family
def test_a_batch_has_the_logps_and_gradients_of_its_rows_alone(changes, name, trained):
    """Log-probs and the gradient of every parameter, as the plain model gives them for one row
    after another; with checkpointing and without.

    Red: model.py:Attention.packed: `[t[kept] for t in tables]` -> `[t[:len(kept)] for t in tables]`
    Red: packing.py:pack: `tuple(ids_BT[row, :first].tolist())` -> `first`
    Red: packing.py:pack: `prompt = prompt if shared else slice(0, 0)` -> `prompt = slice(0, 0)`
    Red: backward.py:by_key: `torch.cat((x[prompt], x[rows]))` -> `torch.cat((x[rows], x[prompt]))`
    """
    net, (ids, mask) = adapted(torch.float64, **changes), BATCHES[name]
    net.requires_grad_(trained == "everything")
    for layer in lora.adapters(net).values():
        layer.lora_A.requires_grad_()
        layer.lora_B.requires_grad_()
    wanted = [p for p in net.parameters() if p.requires_grad]
    weights = torch.arange(ids.numel()).view_as(ids) % 7 - 3.5  # tells positions apart
    want = plain_logps(net, ids, mask)
    slopes = torch.autograd.grad((want * weights).sum(), wanted)
    for checkpointing in (False, True):
        got = net.response_logps(ids, mask, checkpointing)[0]
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
        found = torch.autograd.grad((got * weights).sum(), wanted)
        torch.testing.assert_close(found, slopes, rtol=0, atol=1e-10)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype, near, steep", [
    (torch.bfloat16, 0.2, 0.15), (torch.float32, 1e-5, 1e-5)], ids=["bfloat16", "float32"])
def test_short_floats_give_the_exact_numbers_to_their_rounding(dtype, near, steep, checkpointing):
    """A batch of pairs, against the plain float64 model with the same weights: log-probs to
    `near`, every gradient to `steep` of its own length, in the dtype of its parameter.

    Red: packing.py:pack: `ready, tail + where - 1 - lead` -> `ready, tail + where - lead`
    Red: backward.py:TargetLogps.backward: `slope * grad_N` -> `slope.abs() * grad_N`
    """
    net, (ids, mask) = adapted(dtype).requires_grad_(), BATCHES["pairs"]
    got = net.response_logps(ids, mask, checkpointing)[0]
    found = torch.autograd.grad(got.sum(), list(net.parameters()))
    assert got.dtype == torch.float32
    assert all(g.dtype == p.dtype for g, p in zip(found, net.parameters(), strict=True))
    want = plain_logps(net.double(), ids, mask)
    slopes = torch.autograd.grad(want.sum(), list(net.parameters()))
    assert (got - want).abs().max() < near
    for a, b in zip(found, slopes, strict=True):
        assert (a - b).norm() < steep * b.norm()


@every_family
def test_the_last_layer_works_on_predicting_tokens_only(changes):
    """Its keys and values are of all N tokens, everything behind them of the M that predict.

    Red: model.py:Transformer.packed: `last = i + 1 ==` -> `last = i + 2 ==`
    Red: model.py:Attention.packed: `x_1ND, tables = x_1ND.index_select(1, kept), ` -> `tables = `
    """
    net, (ids, mask) = tiny.transformer(num_hidden_layers=3, **changes), BATCHES["pair"]
    met, names = {}, ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    for name, module in net.named_modules():
        if name.endswith((*names, "model.norm")):
            module.register_forward_hook(lambda _, x, y, name=name: met.update({name: x[0].shape}))
    net.response_logps(ids, mask)
    counts = {name: shape[-2] for name, shape in met.items()}
    few = {name for name, count in counts.items() if count == len("cdeghij")}
    assert len(counts) == 16 and set(counts.values()) == {len("abcdeghij"), 7}
    assert few == {"model.norm", "model.layers.2.mlp.down_proj",
                   *(f"model.layers.2.self_attn.{p}_proj" for p in "qo")}


def kept_bytes(net, lengths: tuple) -> int:
    """What autograd keeps of a batch of (prompt, response) lengths."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        net.response_logps(*tiny.batch(lengths))
    return sum(t.nbytes for t in saved)


@every_family
def test_what_is_kept_for_backward_grows_by_the_token_and_not_by_its_square(changes):
    """Ten tokens more cost the same behind 20 tokens and behind 50.

    Red: backward.py:SegmentAttention.forward: `(q, k, v, y)` -> `(q, k, v, y, p)`
    """
    net = adapted(torch.float64, **changes)
    few, more, many, most = (kept_bytes(net, ((3, n),)) for n in (20, 30, 50, 60))
    assert more - few == most - many > 0


def test_frozen_weights_never_have_a_gradient():
    """After a backward pass every adapter has one, and nothing else.

    Red: lora.py:inject: `model.requires_grad_(False)` -> `model.requires_grad_(True)`
    """
    net = adapted(torch.float64)
    net.response_logps(*BATCHES["pairs"])[0].sum().backward()
    assert all((p.grad is not None) == ("lora_" in n) for n, p in net.named_parameters())


@pytest.mark.parametrize("segments", [SEGMENTS, LAST], ids=["all", "last"])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_the_kernel_of_other_devices_attends_as_the_chunks_of_the_cpu(segments, window, groups):
    """Values and gradients of both ways, on the CPU.

    Red: packing.py:attend_each: `(v_NGK[prompt], values)` -> `(values, v_NGK[prompt])`
    Red: packing.py:attention_mask: `keys - queries:, None` -> `:queries, None`
    """
    agree(lambda q, k, v: packing.attend_each(q, k, v, segments, window),
          attention(segments, window), qkv(segments, groups))


def test_attention_runs_by_chunks_on_the_cpu_and_by_the_kernel_elsewhere(monkeypatch):
    """Nothing is read off the queries but their device; meta counts as the CPU (memory.py).

    Red: packing.py:attend_packed: `q_MHK.device.type in ("cpu", "meta")` -> `True`
    Red: packing.py:attend_packed: `if cpu else` -> `if not cpu else`
    """
    rows = slice(0, 31)
    monkeypatch.setattr(packing, "attend_each", lambda q, k, v, segments, window: "kernel")
    inputs = [x.detach() for x in qkv(SEGMENTS, 2)]
    for device in ("cpu", "meta"):
        y = packing.attend_packed(*(x.to(device) for x in inputs), [(rows, rows, NOTHING)], None)
        assert y.shape == inputs[0].shape
    there = SimpleNamespace(device=torch.device("cuda"))
    assert packing.attend_packed(there, there, there, [(rows, rows, NOTHING)], None) == "kernel"
