"""What merging promises: sums and TIES of deltas, the folders that hold them, reward models."""
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from test_lora import FIRST, seeded
from torch import Tensor, nn

import deltas
import heads
import lora
import merging
import model
import scoring
import tokens
import weights


def drawn(*seeds: int, shape: tuple[int, ...] = (6, 5)) -> list[Tensor]:
    return [torch.randn(shape, generator=seeded(s), dtype=torch.float64) for s in seeds]


def close(found: Tensor, want: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(found, want, rtol=0, atol=atol)


def adapter(folder: Path, seed: int = 1, r: int = 4, alpha: float = 8.0,
            targets: Sequence[str] = lora.TARGETS) -> dict[str, Tensor]:
    """Writes an adapter of the tiny base; {layer: its delta}."""
    net = tiny.transformer(dtype=torch.float32)
    lora.inject(net, r, alpha, targets, generator=seeded(seed))
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(torch.randn(layer.lora_B.shape, generator=seeded(seed + 50)))
    lora.save(net, folder, "base")
    return {name: layer.delta().detach() for name, layer in lora.adapters(net).items()}


def merged(place: Path, *flags: str, names: str = "a b", base: str = "base") -> dict[str, Tensor]:
    """The tensors that the command writes."""
    words = [w for name in names.split() for w in ("--adapter", str(place / name))]
    lora.main(["merge", "--model", str(place / base), *words, *flags, "--out", str(place / "out")])
    return load_file((place / "out").rename(place / f"out{len(list(place.iterdir()))}")
                     / "model.safetensors")


@pytest.fixture
def place(tmp_path):
    """base/, and its adapters a/ and b/."""
    model.save(tiny.transformer(dtype=torch.float32), tmp_path / "base")
    adapter(tmp_path / "a", 1)
    adapter(tmp_path / "b", 2)
    return tmp_path


@pytest.mark.parametrize("density, kept", [(1.0, 30), (0.5, 15), (0.21, 6), (0.2, 6), (1e-9, 1)])
def test_exactly_the_largest_share_stays_as_it_is(density, kept):
    """round(density n) entries, at least one; every one that stays is at least every one that goes.

    Red: deltas.py:trim: `size > least` -> `size < least`
    Red: deltas.py:trim: `round(density * delta.numel())` -> `int(density * delta.numel() + 1)`
    Red: deltas.py:trim: `max(1, round(density * ` -> `max(0, round(density * `
    """
    delta, = drawn(1)
    found = deltas.trim(delta, density)
    stays = found != 0
    assert stays.sum() == kept and torch.equal(found[stays], delta[stays])
    assert kept == 30 or delta[stays].abs().min() > delta[~stays].abs().max()


def test_of_equal_magnitudes_the_first_stay():
    """Exactly as many as asked for, whatever the sign, in row-major order.

    Red: deltas.py:trim: `[:kept - int(keep.sum()), 0]` -> `[:, 0]`
    Red: deltas.py:trim: `[:kept - int(keep.sum()), 0]` -> `[-kept + int(keep.sum()):, 0]`
    """
    found = deltas.trim(torch.tensor([[1.0, -1.0, 1.0], [-1.0, 2.0, 1.0]]), 0.5)
    assert found.tolist() == [[1.0, -1.0, 0.0], [0.0, 2.0, 0.0]]


def test_task_arithmetic_is_the_weighted_sum():
    """2 delta_1 - delta_2 / 2, of what is left of both.

    Red: deltas.py:linear: `w * trim` -> `trim`
    Red: deltas.py:linear: `trim(d, density)` -> `d`
    """
    one, two = drawn(1, 2)
    close(deltas.linear([one, two], [2.0, -0.5]), 2 * one - two / 2)
    close(deltas.linear([one, two], [2.0, -0.5], 0.3),
          2 * deltas.trim(one, 0.3) - deltas.trim(two, 0.3) / 2)


def test_agreeing_signs_give_their_mean_and_opposite_signs_the_larger_value():
    """By hand: mean(1, 3); 3 against -1; -3 against 1; a zero is silent; 2 against -2 cancel.

    Red: deltas.py:ties: `agree.sum(0).clamp(min=1)` -> `len(deltas)`
    Red: deltas.py:ties: `(v * agree)` -> `v`
    Red: deltas.py:ties: `v.sum(0).sign()` -> `v.sign().sum(0).sign()`
    """
    one = torch.tensor([1.0, 3.0, -3.0, 0.0, 2.0, 0.0])
    two = torch.tensor([3.0, -1.0, 1.0, 5.0, -2.0, 0.0])
    assert deltas.ties([one, two], [1.0, 1.0]).tolist() == [2.0, 3.0, -3.0, 5.0, 0.0, 0.0]


def test_a_factor_counts_in_the_vote_and_in_the_mean_and_divides_nothing():
    """By hand: mean(2 * 1, 3) = 2.5; 2 * 2 against -3; equal factors are lambda; a negative one
    turns its delta round; a factor of 0 leaves the other one alone.

    Red: deltas.py:ties: `[w * trim` -> `[trim`
    Red: deltas.py:ties: `v.sum(0).sign()` -> `torch.stack(list(deltas)).sum(0).sign()`
    """
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -3.0])
    assert deltas.ties([one, two], [2.0, 1.0]).tolist() == [2.5, 4.0]
    assert deltas.ties([one, two], [0.5, 0.5]).tolist() == [1.0, -1.5]
    assert deltas.ties([one, two], [1.0, -1.0]).tolist() == [-3.0, 2.5]
    assert deltas.ties([one, two], [0.0, 1.0]).tolist() == two.tolist()


@pytest.mark.parametrize("method", deltas.METHODS.values(), ids=deltas.METHODS)
def test_the_order_of_the_adapters_changes_nothing(method):
    """Any order of three, each with its factor.

    Red: deltas.py:ties: `return (v * agree)` -> `agree[0] = True; return (v * agree)`
    Red: deltas.py:linear: `torch.add` -> `torch.sub`
    """
    given, factors = drawn(1, 2, 3), (1.0, 0.5, 2.0)
    want = method(given, factors, 0.6)
    for order in itertools.permutations(range(3)):
        close(method([given[i] for i in order], [factors[i] for i in order], 0.6), want)


def test_equal_deltas_give_that_delta_and_one_delta_gives_itself():
    """And a delta of zeros beside it changes nothing, as if its adapter had not that layer.

    Red: deltas.py:ties: `agree.sum(0).clamp(min=1)` -> `agree.sum(0).clamp(min=2)`
    Red: deltas.py:ties: `v.sign() == v.sum(0).sign()` -> `v.sign() * v.sum(0).sign() >= 0`
    """
    delta, = drawn(1)
    for density in (1.0, 0.4):
        want = deltas.trim(delta, density)
        assert torch.equal(deltas.ties([delta, delta], [1.0, 1.0], density), want)
        assert torch.equal(deltas.ties([delta, 0 * delta], [1.0, 1.0], density), want)
        for method in deltas.METHODS.values():
            assert torch.equal(method([delta], [1.0], density), want)
    assert torch.equal(deltas.ties([delta, delta], [1.0, 1.0]), delta)


@pytest.mark.parametrize("method", deltas.METHODS.values(), ids=deltas.METHODS)
def test_scaling_every_delta_or_every_factor_scales_the_result(method):
    """f(c delta; w) = f(delta; c w) = c f(delta; w), also for c = -2.

    Red: deltas.py:ties: `agree = v.sign() ==` -> `agree = v.sign().abs() ==`
    Red: deltas.py:trim: `delta.abs()` -> `delta`
    """
    given, factors = drawn(1, 2, 3), (1.0, 0.5, 2.0)
    want = method(given, factors, 0.6)
    for c in (3.0, -2.0):
        close(method([c * d for d in given], factors, 0.6), c * want)
        close(method(given, [c * w for w in factors], 0.6), c * want)


def test_a_weight_of_zero_leaves_the_merge_of_the_other_bit_for_bit(place):
    """linear with weights (1, 0), and no weight at all is 1 each.

    Red: merging.py:merge: `used.append(factor)` -> `used.append(1.0)`
    Red: merging.py:merge: `[1.0] * len(adapters)` -> `[0.5] * len(adapters)`
    Red: lora.py:main: `args.method, args.weight,` -> `args.method, [],`
    """
    alone = merged(place, names="a")
    both = merged(place, "--method", "linear", "--weight", "1", "--weight", "0")
    assert alone.keys() == both.keys() and all(torch.equal(alone[n], both[n]) for n in alone)
    ones = merged(place, "--method", "linear", "--weight", "1", "--weight", "1")
    default = merged(place, "--method", "linear")
    assert all(torch.equal(ones[n], default[n]) for n in ones)
    assert not torch.equal(ones[f"{FIRST}.weight"], both[f"{FIRST}.weight"])


def test_a_sum_of_two_is_one_merged_after_the_other(place):
    """float32 within 1e-6; the second adapter forgets its base, which is the merged one then.

    Red: deltas.py:linear: `functools.reduce(torch.add, each)` -> `next(each)`
    """
    both = merged(place, "--method", "linear")
    path = place / "b/adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    merging.merge(place / "base", [place / "a"], place / "first")
    after = merged(place, names="b", base="first")
    for name in after:
        close(both[name], after[name], 1e-6)


def test_the_command_merges_deltas_of_any_rank_scale_and_layers(tmp_path):
    """W + f(those of its deltas that there are), in every layer that anybody adapts.

    Red: merging.py:merge: `deltas.METHODS[method or "linear"]` -> `deltas.METHODS["linear"]`
    Red: merging.py:merge: `(given, used, density)` -> `(given, used)`
    Red: merging.py:merge: `for _, layers in opened.values() for name` -> `for name`
    Red: lora.py:main: `args.density)` -> `1.0)`
    """
    net = tiny.transformer(dtype=torch.float32)
    model.save(net, tmp_path / "base")
    one = adapter(tmp_path / "a", 1, 2, 6.0, ["q_proj", "up_proj"])
    two = adapter(tmp_path / "b", 2, 5, 1.0, ["q_proj", "down_proj"])
    for method in deltas.METHODS:
        found = merged(tmp_path, "--method", method, "--weight", "0.5", "--weight", "2",
                       "--density", "0.3")
        changed = 0
        for name, weight in net.state_dict().items():
            given = [(d[layer], w) for d, w in ((one, 0.5), (two, 2.0))
                     if (layer := name.removesuffix(".weight")) in d]
            update = deltas.METHODS[method](*zip(*given, strict=True), 0.3) if given else 0
            close(found[name], weight + update, 1e-6)
            changed += bool(given)
        assert changed == 6


def test_one_adapter_may_be_weighted_and_trimmed(place):
    """W + w trim(delta): both methods are the same then, and neither is asked for.

    Red: merging.py:check_flags: `if count > 1 and not method` -> `if not method`
    Red: merging.py:merge: `method or "linear"` -> `method`
    """
    delta, base = adapter(place / "a", 1), load_file(place / "base/model.safetensors")
    found = merged(place, "--weight", "0.5", "--density", "0.2", names="a")
    for name, layer in delta.items():
        close(found[f"{name}.weight"], base[f"{name}.weight"] + 0.5 * deltas.trim(layer, 0.2), 1e-6)


def test_the_first_adapters_template_comes_along(place):
    """And nothing of the others'.

    Red: merging.py:merge: `adapters[0].iterdir()` -> `adapters[-1].iterdir()`
    """
    for name in "ab":
        (place / name / "chat_template.jinja").write_text(name)
        (place / name / "generation_config.json").write_text(f'{{"{name}": 1}}')
    (place / "b/extra.txt").write_text("x")
    merging.merge(place / "base", [place / "b", place / "a"], place / "ba", "ties")
    merging.merge(place / "base", [place / "a", place / "b"], place / "ab", "ties")
    assert [(place / n / "chat_template.jinja").read_text() for n in ("ab", "ba")] == ["a", "b"]
    assert (place / "ab/generation_config.json").read_text() == '{"a": 1}'
    assert not (place / "ab/extra.txt").exists()


REFUSED = {
    "weights not matching": ("a b", "--method ties --weight 1", "1 times --weight and 2 times"),
    "more weights": ("a", "--weight 1 --weight 2", "2 times --weight and 1 times --adapter"),
    "a weight of nan": ("a b", "--method ties --weight 1 --weight nan", "--weight: found nan"),
    "a weight of 1e9": ("a b", "--method linear --weight 1 --weight -1e9", "found -1e+09"),
    "density 0": ("a b", "--method ties --density 0", "--density: found 0,"),
    "density above 1": ("a", "--density 1.5", "--density: found 1.5"),
    "density nan": ("a", "--density nan", "--density: found nan"),
    "no method": ("a b", "", "no --method"),
    "a method for one": ("a", "--method ties", "one --adapter"),
    "another method": ("a b", "--method dare", "--method"),
    "one twice": ("a a/../a", "--method ties", "twice"),
    "another base": ("a far", "--method ties", "far was trained on another base"),
}


@pytest.mark.parametrize("names, flags, words", REFUSED.values(), ids=REFUSED)
def test_flags_that_do_not_go_together_are_refused_in_one_sentence(place, capsys, names, flags,
                                                                   words):
    """Exit code 2, one line, and nothing is written.

    Red: merging.py:check_flags: `len(factors) != count` -> `False`
    Red: merging.py:check_flags: `if not -1000 <= factor <= 1000` -> `if False`
    Red: merging.py:check_flags: `not 0 < density <= 1` -> `density > 1`
    Red: merging.py:check_flags: `not 0 < density <= 1` -> `not 0 < density`
    Red: merging.py:check_flags: `if count > 1 and not method` -> `if False`
    Red: merging.py:check_flags: `if count < 2 and method` -> `if False`
    Red: merging.py:check_flags: `adapter.resolve() for` -> `adapter for`
    Red: merging.py:merge: `check_fit(` -> `adapter.name == "far" or check_fit(`
    """
    net = tiny.transformer(1, torch.float32)
    lora.inject(net, 2, 2)
    lora.save(net, place / "far", "elsewhere")
    with pytest.raises(SystemExit) as caught:
        merged(place, *flags.split(), names=names)
    told = capsys.readouterr().err
    assert caught.value.code == 2 and told.count("\n") == 1 and words in told, told
    assert sorted(p.name for p in place.iterdir()) == ["a", "b", "base", "far"]


def test_an_update_that_overflows_is_refused_and_not_voted_away(place, capsys):
    """inf against -inf would leave 0, and the base would pass for the merged model.

    Red: merging.py:merge: `factor * given[-1])` -> `weight)`
    """
    halves = load_file(place / "a/adapter_model.safetensors")
    for name, sign in (("a", 1e20), ("b", -1e20)):
        big = {n: t * (sign if "lora_B" in n else 1e20) for n, t in halves.items()}
        save_file(big, place / name / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        merged(place, "--method", "ties")
    assert "a: model.layers.0.mlp.down_proj.weight's update holds" in capsys.readouterr().err


def reward_model(place: Path, **changes) -> model.Transformer:
    """Writes base/ and a reward model's adapter r/, both random."""
    net = tiny.transformer(dtype=torch.float32, **changes)
    model.save(net, place / "base")
    lora.inject(net, 4, 8.0, generator=seeded(3))
    heads.attach(net, "score").weight.data.copy_(torch.randn(1, tiny.D, generator=seeded(4)))
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=seeded(5)))
    lora.save(net, place / "r", "base")
    return net.eval()


def cut(folder: Path, shards: Sequence[Sequence[str]]) -> Path:
    """The folder's tensors in several files and an index; the first has those not named."""
    held = load_file(folder / "model.safetensors")
    places = {n: next((i for i, part in enumerate(shards, 2) if n in part), 1) for n in held}
    places = {n: f"model-{i}.safetensors" for n, i in places.items()}
    for file in set(places.values()):
        save_file({n: t for n, t in held.items() if places[n] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def told(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@torch.no_grad()
def judged(net: model.Transformer) -> Tensor:
    ids, mask = tiny.batch()
    return scoring.judge(net, tokens.Batch(ids, mask, torch.zeros(3), ("",) * 3, None))


LAYOUTS = {"one file": (False, None), "tied": (True, None), "a shard of lm_head alone": (
    False, [["lm_head.weight"]]), "lm_head first": (False, [["model.norm.weight"], [
        "model.embed_tokens.weight"]]), "tied shards": (True, [["model.norm.weight"]])}


@pytest.mark.parametrize("tied, shards", LAYOUTS.values(), ids=LAYOUTS)
def test_a_merged_reward_model_has_its_score_for_lm_head_and_the_same_scores(tmp_path, tied,
                                                                             shards):
    """The index and the files hold every tensor once, and config.json says what it is.

    Red: merging.py:merge: `tensors |= {"score.weight": score} if path` -> `tensors |= {} if path`
    Red: merging.py:merge: `tensors.pop("lm_head.weight", None)` -> `None`
    Red: merging.py:merge: `if tensors:` -> `if True:`
    Red: merging.py:merge: `classify(part, min(shards).name)` -> `None`
    Red: merging.py:classify: `if n != "lm_head.weight"` -> `if n`
    Red: merging.py:classify: `{"score.weight": first}` -> `{}`
    Red: merging.py:classify: `"ForSequenceClassification"` -> `"ForCausalLM"`
    Red: merging.py:classify: `{"0": "LABEL_0"}` -> `{}`
    Red: merging.py:classify: `"num_labels": 1` -> `"num_labels": 2`
    """
    net, old = reward_model(tmp_path, tie_word_embeddings=tied, id2label={"0": "a", "1": "b"},
                            label2id={"a": 0, "b": 1}), tmp_path / "base"
    base = cut(old, shards) if shards else old
    merging.merge(base, [tmp_path / "r"], tmp_path / "out")
    found = weights.headers(tmp_path / "out")
    assert set(found) == set((tmp_path / "out").glob("*.safetensors"))
    had, has = (sorted(n for header in headers.values() for n in header)
                for headers in (weights.headers(base), found))
    assert has == sorted({*had, "score.weight"} - {"lm_head.weight"})
    says = told(tmp_path / "out")
    assert says["architectures"] == ["MistralForSequenceClassification"]
    assert (says["num_labels"], says["id2label"], says["label2id"]) == (
        1, {"0": "LABEL_0"}, {"LABEL_0": 0})
    assert says["hidden_size"] == tiny.D and told(base)["architectures"] == ["MistralForCausalLM"]
    again = model.load(tmp_path / "out", torch.float32, judge=True)
    assert not hasattr(again, "lm_head") and judged(net).std() > 0.1
    close(judged(again), judged(net), 1e-5)


ENDS = {"the end": (2, None, None), "a stop": (7, [2, 7], None), "one of several": (7, None, None),
        "another": (5, [2, 7], 5), "none": (None, [2, 7], None), "zero": (0, None, 0)}


@pytest.mark.parametrize("pad, stops, left", ENDS.values(), ids=ENDS)
def test_a_pad_that_ends_responses_is_left_out_of_a_reward_model(tmp_path, pad, stops, left):
    """transformers reads the score before trailing pads: the end would not be seen.

    Red: merging.py:classify: `names["pad_token_id"] = None` -> `pass`
    Red: merging.py:classify: `if type(e) is list else [e]` -> `if type(e) is list else []`
    Red: merging.py:classify: `config, strict.optional_json` -> `{}, strict.optional_json`
    Red: merging.py:classify: `folder / "generation_config.json"` -> `folder / "no.json"`
    """
    reward_model(tmp_path, pad_token_id=pad, eos_token_id=[2, 7] if pad == 7 and not stops else 2)
    if stops:
        (tmp_path / "r/generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    merging.merge(tmp_path / "base", [tmp_path / "r"], tmp_path / "out")
    assert told(tmp_path / "out")["pad_token_id"] == left


@pytest.mark.parametrize("name", ["score", "value"])
def test_a_model_with_a_head_is_merged_alone(place, capsys, name):
    """A reward model, or a policy with a value head, beside another adapter: exit code 2, one line.

    Red: merging.py:check_flags: `count > 1 and any(heads` -> `False and any(heads`
    """
    lora_with(name, place / "r")
    with pytest.raises(SystemExit) as caught:
        merged(place, "--method", "linear", names="a r")
    said = capsys.readouterr().err
    assert caught.value.code == 2 and said.count("\n") == 1 and "are not merged with" in said
    assert not (place / "out").exists()


def lora_with(head: str, folder: Path) -> None:
    """Writes an adapter of the tiny base with that head."""
    net = tiny.transformer(dtype=torch.float32)
    lora.inject(net, 2, 2, generator=seeded())
    heads.attach(net, head)
    lora.save(net, folder, "base")


def test_a_policy_with_a_value_head_is_merged_into_a_language_model(place):
    """Its head is left behind, and config.json is the base's.

    Red: merging.py:merge: `.get("score.weight")` -> `.get("value.weight")`
    """
    lora_with("value", place / "r")
    merging.merge(place / "base", [place / "r"], place / "out")
    assert told(place / "out") == told(place / "base")
    names = load_file(place / "out/model.safetensors").keys()
    assert names == tiny.transformer().state_dict().keys()


def test_a_reward_model_is_opened_as_a_judge_only(tmp_path):
    """model.load refuses it as a policy, and a classifier of several labels altogether.

    Red: model.py:load: `judges(config) and not judge` -> `False`
    Red: model.py:judges: `"ForSequenceClassification" in` -> `"ForCausalLM" in`
    Red: model.py:check_tensors: `"a reward model" if` -> `"config.json" if`
    """
    reward_model(tmp_path)
    merging.merge(tmp_path / "base", [tmp_path / "r"], tmp_path / "out")
    with pytest.raises(ValueError, match="is a reward model, which says no tokens"):
        model.load(tmp_path / "out", torch.float32)
    assert model.load(tmp_path / "base", torch.float32, judge=True).lm_head.weight.any()
    path = tmp_path / "out/model.safetensors"
    held = load_file(path)
    save_file(held | {"score.weight": torch.ones(3, tiny.D)}, path)
    with pytest.raises(ValueError, match=r"\(3, 16\), a reward model asks for \(1, 16\)"):
        model.load(tmp_path / "out", torch.float32, judge=True)


def test_l1_is_the_sum_of_the_magnitudes_of_all_deltas():
    """Its value over layers of other shapes and scales, and its gradient by finite differences.

    Red: lora.py:l1: `.abs()` -> ``
    Red: lora.py:l1: `layer.delta()` -> `(layer.lora_B @ layer.lora_A)`
    Red: lora.py:l1: `layer.delta()` -> `layer.delta().detach()`
    Red: lora.py:l1: `adapters(model).values()` -> `[*adapters(model).values()][:1]`
    """
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    lora.inject(net, 2, 5.0, "all-linear", generator=seeded())
    assert lora.l1(net) == 0
    halves = [p for layer in lora.adapters(net).values() for p in (layer.lora_A, layer.lora_B)]
    for i, half in enumerate(halves):
        half.data = torch.randn(half.shape, generator=seeded(i), dtype=torch.float64)
    close(lora.l1(net), sum((2.5 * halves[i + 1] @ halves[i]).abs().sum() for i in (0, 2)))
    assert torch.autograd.gradcheck(lambda *_: lora.l1(net), halves)  # it moves them in place
