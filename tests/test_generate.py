"""Theorems about sampling: batches, caches, stops, and draws with the right frequencies."""
import argparse
import math

import pytest
import tiny
import torch

import generate
import lora
import model
import tokens

PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [10], [11, 12, 13], [14, 15, 16, 17]]
LOGITS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5], dtype=torch.float64)


def argmax_loop(net, prompt, count):
    """`count` greedy tokens, the whole text read again for each."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(net.logits(net(torch.tensor([ids]))[0, -1]).argmax().item())
    return ids[len(prompt):]


def adapted(dropout=0.5):
    net, generator = tiny.transformer(), torch.Generator().manual_seed(1)
    lora.inject(net, 2, 4.0, dropout=dropout, generator=generator)
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=generator))
    return net


def draws(temperature, top_p, count=100_000):
    """How often each token of LOGITS is drawn."""
    generator = torch.Generator().manual_seed(0)
    drawn = generate.next_token(LOGITS.expand(count, -1), temperature, top_p, generator)
    return drawn.bincount(minlength=len(LOGITS)).double()


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}], ids=["full", "window"])
def test_a_batch_answers_as_each_prompt_alone_and_as_without_a_cache(changes):
    """For prompts of one to seven tokens, in float64.
    Red: generate.py:sample: `drawn_B[:, None], cache)` -> `drawn_B[:, None], None)`
    Red: generate.py:read: `(0, 0, longest - length, 0)` -> `(0, 0, 0, longest - length)`
    Red: generate.py:read: `[longest - len(prompts[i])]` -> `[0]`
    Red: packing.py:attention_mask: `key >= first_B1` -> `key > first_B1`
    Red: model.py:Transformer.extend: `(cache[0].first_B1 if cache else 0)` -> `0`"""
    net = tiny.transformer(**changes)
    batch = generate.sample(net, PROMPTS, 9, ())
    assert batch == [generate.sample(net, [p], 9, ())[0] for p in PROMPTS]
    assert batch == [argmax_loop(net, p, 9) for p in PROMPTS]


def test_a_response_ends_with_the_first_stop_token():
    """Any of the stop ids ends it; nothing follows; the others go on.
    Red: generate.py:sample: `[i][-1] not in stop_ids` -> `[i][-1] != min(stop_ids)`"""
    net = tiny.transformer()
    free = generate.sample(net, PROMPTS, 9, ())
    stops = {free[0][2], free[2][4]}
    ends = [next((i + 1 for i, t in enumerate(r) if t in stops), 9) for r in free]
    cut = [response[:end] for response, end in zip(free, ends, strict=True)]
    assert generate.sample(net, PROMPTS, 9, stops) == cut and len(set(ends)) > 1


def test_nothing_is_drawn_behind_a_stop_token():
    """At temperature 1, 160 responses: all that end early end with a stop token, none goes on.
    Red: generate.py:sample: `if i in going:` -> `if rows:`
    Red: generate.py:sample: `and responses[i][-1] not in stop_ids` -> `and len(going) > i`"""
    generator, stops = torch.Generator().manual_seed(0), {2, 5, 9}
    said = generate.sample(tiny.transformer(), PROMPTS, 12, stops, 1.0, 1.0, generator, copies=40)
    assert not any(stops & {*s[:-1]} for s in said) and len({len(s) for s in said}) == 12
    assert all(len(s) == 12 or s[-1] in stops for s in said)


def test_rows_that_have_ended_leave_the_batch_and_change_no_answer(monkeypatch):
    """In float64, eight prompts of which a few end at a time; a step reads those that are left.
    Red: generate.py:sample: `CROWDED * len(rows)` -> `0`
    Red: generate.py:sample: `[rows[n] for n in stay]` -> `rows[:len(stay)]`
    Red: generate.py:sample: `drawn_B[stay]` -> `drawn_B[:len(stay)]`
    Red: generate.py:sample: `past.kept[stay]` -> `past.kept[:len(stay)]`
    Red: generate.py:sample: `past.first_B1[stay]` -> `past.first_B1[:len(stay)]`"""
    net, prompts, stops = tiny.transformer(), [*PROMPTS, [5, 3], [9, 3], [7], [20, 3]], {3, 8, 11}
    want, read, extend = [generate.sample(net, [p], 20, stops)[0] for p in prompts], [], net.extend
    monkeypatch.setattr(net, "extend", lambda ids, cache: (read.append(len(ids)),
                                                           extend(ids, cache))[1])
    assert generate.sample(net, prompts, 20, stops) == want and 1 < len({*map(len, want)})
    steps = read[-max(map(len, want)) + 1:]
    assert steps[0] == 8 and steps[-1] < 8 and steps == sorted(steps, reverse=True)
    assert all(sum(len(w) > t for w in want) > 0.75 * n for t, n in enumerate(steps, 1)
               if n not in steps[:t - 1])


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}], ids=["full", "window"])
def test_copies_are_the_prompt_asked_as_often_and_read_once(changes, monkeypatch):
    """At temperature 0, side by side. Every token of a prompt is read once.
    Red: generate.py:read: `for i in range(len(prompts))` -> `for i in [0, 2, 1, 3]`
    Red: generate.py:sample: `= read(net` -> `= read(net, prompts, 1) and read(net`
    Red: generate.py:read: `(p) == length` -> `(p) >= length`"""
    net = tiny.transformer(**changes)
    want = generate.sample(net, [p for p in PROMPTS for _ in range(3)], 9, ())
    read, extend = [], net.extend
    monkeypatch.setattr(net, "extend", lambda ids, cache: (read.append(0 if cache else ids.numel()),
                                                           extend(ids, cache))[1])
    assert generate.sample(net, PROMPTS, 9, (), copies=3) == want
    assert sum(read) == sum(map(len, PROMPTS))


def test_copies_are_independent_draws():
    """The first tokens of 5000 copies are as frequent as the softmax says, and so are those of
    neighbours together: alike as often as two independent draws. Chi-square of 22 degrees below
    60, the share alike within 4 deviations. Whole responses differ.
    Red: generate.py:next_token: `torch.rand(len(sums), 1,` -> `torch.rand(1, 1,`
    Red: generate.py:next_token: `torch.rand(len(sums), 1,` -> `torch.rand(-(len(sums) // -2), 1,`
    Red: generate.py:next_token: `u.to(sums.device) *` -> `u.to(sums.device).square() *`"""
    net, generator = tiny.transformer(), torch.Generator().manual_seed(0)
    said = generate.sample(net, PROMPTS[:1], 1, (), 1.0, 1.0, generator, copies=5000)
    probs, first = net.logits(net(torch.tensor(PROMPTS[:1]))[0, -1]).softmax(-1), torch.tensor(said)
    found, alike = first[:, 0].bincount(minlength=tiny.V), probs.square().sum()
    assert ((found - 5000 * probs).square() / (5000 * probs)).sum() < 60
    share = (first[0::2] == first[1::2]).double().mean()
    assert (share - alike).abs() < 4 * (alike * (1 - alike) / 2500).sqrt()
    longer = generate.sample(net, PROMPTS, 9, (), 1.0, 1.0, generator, copies=5)
    assert all(len({tuple(s) for s in longer[i:i + 5]}) == 5 for i in range(0, 20, 5))


@pytest.mark.parametrize("room", [1, 3, 128])
@pytest.mark.parametrize("changes", [
    {}, {"sliding_window": 4}, {"model_type": "qwen3", "num_key_value_heads": 1}],
    ids=["full", "window", "qwen3"])
def test_log_probs_while_sampling_are_those_that_training_scores(changes, room, monkeypatch):
    """In float32 within 1e-5, of 20 tokens drawn at temperature 1 behind prompts of 1 to 7 tokens.
    Red: model.py:Past.grow: `store[:, :, :start] = self.kept` -> `store.zero_()`
    Red: model.py:Past.grow: `end > store.shape[2]` -> `end > store.shape[2] + 1`
    Red: model.py:Attention.forward: `*past.kept.chunk(2, 1)` -> `*past.kept.chunk(2, 1)[::-1]`
    Red: packing.py:attend: `groups, -1, shape[3])` -> `-1, groups, shape[3]).transpose(1, 2)`"""
    monkeypatch.setattr(model, "ROOM", room)
    net, drawn, draw = tiny.transformer(dtype=torch.float32, **changes), [], generate.next_token
    monkeypatch.setattr(generate, "next_token", lambda logits, *how: (drawn.append(logits),
                                                                      draw(logits, *how))[1])
    said = generate.sample(net, PROMPTS, 20, (), 1.0, 1.0, torch.Generator().manual_seed(0), 2)
    ids, mask = tiny.batch([(len(p), 20) for p in PROMPTS for _ in range(2)])
    for i, answer in enumerate(said):
        ids[i, mask[i]] = torch.tensor(answer)
        ids[i, :len(PROMPTS[i // 2])] = torch.tensor(PROMPTS[i // 2])
    got = torch.stack(drawn, 1).log_softmax(-1).gather(-1, torch.tensor(said)[..., None])[..., 0]
    want = net.response_logps(ids, mask)[0][mask].view(8, 20)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("most", [0, 1, 5])
def test_a_response_has_at_most_max_new_tokens(most):
    """Red: generate.py:sample: `len(responses[i]) < room` -> `len(responses[i]) <= room`
    Red: generate.py:sample: `len(room) if max_new_tokens else 0` -> `len(room)`"""
    assert [len(r) for r in generate.sample(tiny.transformer(), PROMPTS, most, ())] == [most] * 4


@pytest.mark.parametrize("temperature, top_p, kept", [
    (1.0, 1.0, [0, 1, 2, 3, 4]), (0.5, 1.0, [0, 1, 2, 3, 4]), (2.0, 0.8, [0, 1, 2, 4]),
    (1.0, 0.8, [0, 2, 4]), (1.0, 0.75, [0, 2]), (1.0, 0.5, [2])])
def test_draws_follow_the_softmax_of_the_smallest_set_that_reaches_top_p(temperature, top_p, kept):
    """p = .207, .076, .563, .028, .126, at temperature 2 .227, .138, .374, .084, .177: the two
    likeliest of the first reach .770, three .896. Chi-square of 1e5 draws below 30.
    Red: generate.py:next_token: `logits_BV / temperature` -> `logits_BV * temperature`
    Red: generate.py:next_token: `probs.cumsum(-1) - probs >= top_p` -> `probs.cumsum(-1) >= top_p`
    Red: generate.py:next_token: `- probs >= top_p` -> `- probs > 1`
    Red: generate.py:next_token: `u.to(sums.device) * sums[:, -1:]` -> `u.to(sums.device)`
    Red: generate.py:next_token: `ids.gather(-1, drawn)` -> `drawn`"""
    probs = (LOGITS / temperature).softmax(-1)
    found, expected = draws(temperature, top_p), torch.zeros_like(probs)
    expected[kept] = 100_000 * probs[kept] / probs[kept].sum()
    assert found[expected == 0].sum() == 0
    assert ((found - expected).square() / expected)[kept].sum() < 30


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_a_token_of_no_probability_is_never_drawn(top_p, monkeypatch):
    """Not at the smallest uniform number, 0, nor at the largest, 1 - 2^-24 in float32.
    Red: generate.py:next_token: `right=True` -> `right=False`
    Red: generate.py:next_token: `u.to(sums.device) * sums[:, -1:]` -> `u.to(sums.device) * 1.1`"""
    logits = torch.tensor([[-1e4, 0.3, -1e4, 0.1, -1e4]] * 2)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([[0.0], [1 - 2**-24]]))
    assert generate.next_token(logits, 1.0, top_p, None).tolist() == [1, 3]


def test_temperature_zero_takes_the_likeliest():
    """Red: generate.py:next_token: `logits_BV.argmax(-1)` -> `logits_BV.argmin(-1)`"""
    assert draws(0.0, 0.1, 7).tolist() == [0, 0, 7, 0, 0]


def test_one_seed_gives_one_sample():
    """Red: generate.py:next_token: `generator=generator` -> `generator=None`"""
    net = tiny.transformer()
    said = [generate.sample(net, PROMPTS, 9, (), 1.0, 1.0, torch.Generator().manual_seed(seed))
            for seed in (5, 5, 6)]
    assert said[0] == said[1] != said[2]


def test_adapters_are_on_and_dropout_is_off_while_sampling():
    """And the model is left in the mode it was in.
    Red: generate.py:sample: `net.eval()` -> `pass`
    Red: generate.py:sample: `net.train(training)` -> `pass`
    Red: lora.py:LoRALinear.forward: `not self.enabled or` -> `True or`"""
    net, still = adapted().train(), adapted(dropout=0.0)
    said = generate.sample(net, PROMPTS, 9, ())
    assert net.training and said == [argmax_loop(still, p, 9) for p in PROMPTS]
    assert said != generate.sample(tiny.transformer(), PROMPTS, 9, ())


def test_no_prompts_give_no_responses_and_an_empty_one_is_refused():
    """Red: generate.py:sample: `if not prompts:` -> `if 0:`
    Red: generate.py:sample: `if not all(prompts):` -> `if 0:`"""
    assert generate.sample(tiny.transformer(), [], 9, ()) == []
    with pytest.raises(ValueError, match="no tokens"):
        generate.sample(tiny.transformer(), [[3], []], 9, ())


def scripted(monkeypatch, *answers):
    """Replaces sample by answers in order; returns the list of prompts it is given."""
    asked, left = [], list(answers)
    monkeypatch.setattr(generate, "sample", lambda net, prompts, *_: (
        asked.extend(prompts), [left.pop(0) for _ in prompts])[1])
    return asked


def test_complete_drops_the_end_token_and_nothing_else(base, monkeypatch):
    """A cut response keeps its last token; inner blanks stay.
    Red: tokens.py:Chat.answer: `ids = ids[:-1] if` -> `ids = ids if`
    Red: tokens.py:Chat.answer: `if ids and ids[-1] in self.stop_ids` -> `if 1`"""
    chat = tokens.Chat(base, "plain")
    ended, cut = chat.response_ids("one  two"), chat.response_ids(" three ")[:-1]
    scripted(monkeypatch, ended, cut, [chat.end_id])
    asked = [(("user", "Say one."),)] * 3
    assert generate.complete(None, chat, asked, 9) == ["one  two", " three ", ""]


def test_a_chat_remembers_its_turns(base, monkeypatch, capsys):
    """Each prompt is the whole conversation so far.
    Red: generate.py:converse: `said.append(("assistant", answer))` -> `pass`
    Red: generate.py:converse: `print(answer)` -> `pass`"""
    chat, typed = tokens.Chat(base, "chatml"), iter(["one", "two"])
    asked = scripted(monkeypatch, chat.response_ids("ten"), chat.response_ids("nine"))

    def ask(_):
        if (line := next(typed, None)) is None:
            raise EOFError
        return line

    monkeypatch.setattr("builtins.input", ask)
    generate.converse(None, chat, argparse.Namespace(
        seed=0, max_new_tokens=9, temperature=0.0, top_p=1.0))
    first = (("user", "one"),)
    assert asked == [chat.prompt_ids(first),
                     chat.prompt_ids((*first, ("assistant", "ten"), ("user", "two")))]
    assert capsys.readouterr().out == "ten\nnine\n"


def test_without_a_prompt_the_command_is_a_chat(base, monkeypatch, capsys):
    """It reads lines until there are none.
    Red: generate.py:main: `return converse(net, chat, args)` -> `return`"""
    typed = iter(["Say one"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or (_ for _ in ()).throw(
        EOFError))
    generate.main(["--model", str(base), "--template", "plain", "--max_new_tokens", "3"])
    assert capsys.readouterr().out and next(typed, None) is None


def test_the_command_answers_each_prompt_greedily(base, capsys):
    """With the adapter it is given: the same text as complete.
    Red: generate.py:main: `lora.load(net, args.adapter)` -> `pass`
    Red: generate.py:main: `for p in args.prompt]` -> `for p in args.prompt[:1]]`"""
    net, folder = model.load(base, torch.float32), base.parent / "sampled"
    lora.inject(net, 2, 4.0, generator=torch.Generator().manual_seed(0))
    for layer in lora.adapters(net).values():
        layer.lora_B.data.fill_(math.sqrt(0.1))
    lora.save(net, folder, "tiny")
    generate.main(["--model", str(base), "--adapter", str(folder), "--template", "plain",
                   "--max_new_tokens", "5", "--prompt", "Say one", "--prompt", "Say two and six"])
    want = generate.complete(net, tokens.Chat(base, "plain"), [
        (("user", "Say one"),), (("user", "Say two and six"),)], 5)
    assert capsys.readouterr().out == "\n\n".join(want) + "\n"


def test_a_response_ends_where_the_context_does_and_a_full_context_is_refused():
    """128 positions: of 120 tokens eight are left, of 128 none; a neighbour has its own.
    Red: generate.py:sample: `min(max_new_tokens, context - len(p))` -> `max_new_tokens`
    Red: generate.py:sample: `context - len(p)` -> `context - longest`
    Red: generate.py:sample: `if longest >= context` -> `if 0`"""
    net = tiny.transformer()
    assert [len(r) for r in generate.sample(net, [[3] * 120, [3]], 99, ())] == [8, 99]
    alone, = generate.sample(net, [[3]], 99, ())
    assert generate.sample(net, [[3] * 120, [3]], 99, ())[1] == alone
    with pytest.raises(ValueError, match="has 128 tokens, and the model's context of 128"):
        generate.sample(net, [[3], [3] * 128], 1, ())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(temperature):
    """The likeliest of NaN would be the first.
    Red: generate.py:next_token: `if not logits_BV.sum(-1).isfinite().all()` -> `if 0`"""
    with pytest.raises(ValueError, match="logits are not finite"):
        generate.next_token(torch.tensor([[0.0, math.nan]]), temperature, 1.0, None)


def test_a_prompt_that_is_no_utf_8_is_refused():
    """Red: generate.py:turn: `"\\ud800" <= c <= "\\udfff"` -> `c < " "`"""
    assert generate.turn("caf\u00e9") == ("user", "caf\u00e9")
    with pytest.raises(ValueError, match="is no UTF-8"):
        generate.turn("caf\udce9")


def test_ctrl_c_ends_a_chat_without_a_traceback(base, monkeypatch, capsys):
    """Red: generate.py:main: `except KeyboardInterrupt` -> `except KeyError`
    Red: generate.py:main: `sys.exit(130)` -> `sys.exit(0)`"""
    def press(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", press)
    with pytest.raises(SystemExit) as stop:
        generate.main(["--model", str(base), "--template", "plain"])
    assert stop.value.code == 130 and capsys.readouterr().err == "generate.py: stopped\n"
