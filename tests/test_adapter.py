"""What an adapter's folder promises: PEFT's format, read exactly or refused by name, and merged."""
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_lora import FIRST, adapted, logits
from test_weights import shard

import lora
import merging
import model
import peft_folder

ROOT = Path(__file__).resolve().parents[1]
HALF = peft_folder.KEY.format(FIRST, "A")


def same(a: model.Transformer, b: model.Transformer) -> bool:
    one, two = a.state_dict(), b.state_dict()
    scales = [[layer.scale for layer in lora.adapters(net).values()] for net in (a, b)]
    return one.keys() == two.keys() and scales[0] == scales[1] and all(
        torch.equal(one[n], two[n]) for n in one)


def edit(folder: Path, **changes) -> None:
    """Changes keys of adapter_config.json; None removes one."""
    path = folder / "adapter_config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def tamper(folder: Path, change: Callable) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize("targets", [
    lora.TARGETS, ("q_proj",), (FIRST, "model.layers.1.mlp.up_proj"), "all-linear"])
def test_a_saved_adapter_loads_back_exactly(tmp_path, targets):
    """Weights, scale, dropout and layers, whatever the way they were selected.

    Red: lora.py:load: `layer.lora_B.data.copy_(b)` -> `layer.lora_B.data.copy_(b.bfloat16())`
    """
    net, again = adapted(targets=targets, dropout=0.25), tiny.transformer()
    lora.save(net, tmp_path, "some/base")
    lora.load(again, tmp_path)
    assert same(net, again) and torch.equal(logits(net.eval()), logits(again.eval()))
    assert {layer.dropout for layer in lora.adapters(again).values()} == {0.25}
    assert all(p.requires_grad == ("lora_" in n) for n, p in again.named_parameters())


def test_a_folder_is_what_peft_calls_one(tmp_path):
    """Its key names, float32 tensors, target names, and rank 4 with alpha 8.

    Red: lora.py:save: `layer.scale * ranks[n]` -> `layer.scale`
    """
    lora.save(adapted(torch.bfloat16), tmp_path, "some/base")
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["base_model_name_or_path"] == "some/base" and raw["peft_type"] == "LORA"
    assert (raw["r"], raw["lora_alpha"], raw["use_rslora"]) == (4, 8.0, False)
    assert set(raw["target_modules"]) == set(lora.TARGETS) and not raw["rank_pattern"]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert HALF == "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    assert tensors[HALF].shape == (4, 16) and len(tensors) == 28
    assert {t.dtype for t in tensors.values()} == {torch.float32}


def test_what_a_plain_adapter_is_not_is_written_out(tmp_path):
    """PEFT's readers ask for these keys; without them some take other defaults.

    Red: lora.py:save: `"inference_mode": True` -> `"inference_mode": False`
    Red: lora.py:save: `"bias": "none", ` -> ``
    Red: lora.py:save: `"format": "pt", "base"` -> `"base"`
    """
    lora.save(adapted(), tmp_path, "base")
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    wanted = {"task_type": "CAUSAL_LM", "bias": "none", "use_dora": False, "fan_in_fan_out": False,
              "modules_to_save": None, "inference_mode": True, "lora_dropout": 0.0}
    assert wanted == {k: raw[k] for k in wanted}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata().keys() == {"format", "base"} and file.metadata()["format"] == "pt"


def test_a_loaded_adapter_has_no_dropout_by_default_and_trains_alone(tmp_path):
    """A folder that names no lora_dropout, a model whose weights all asked for gradients.

    Red: peft_config.py:read: `"lora_dropout": 0.0` -> `"lora_dropout": 0.5`
    Red: lora.py:load: `model.requires_grad_(False)` -> `pass`
    """
    lora.save(adapted(), tmp_path, "base")
    edit(tmp_path, lora_dropout=None)
    net = tiny.transformer().requires_grad_(True)
    lora.load(net, tmp_path)
    assert {layer.dropout for layer in lora.adapters(net).values()} == {0.0}
    assert all(p.requires_grad == ("lora_" in n) for n, p in net.named_parameters())


@pytest.mark.parametrize("way", [True, "gaussian"])
def test_how_an_adapter_was_begun_does_not_matter_to_its_reader(tmp_path, way):
    """Where the base was left alone: these two only draw A and B.

    Red: peft_config.py:read: `and init != "gaussian"` -> ``
    """
    net, again = adapted(), tiny.transformer()
    lora.save(net, tmp_path, "base")
    edit(tmp_path, init_lora_weights=way)
    lora.load(again, tmp_path)
    assert same(net, again)


def test_ranks_and_alphas_that_differ_by_layer_survive(tmp_path):
    """Layers unlike the first are listed in rank_pattern and alpha_pattern.

    Red: lora.py:save: `"rank_pattern": {n: r` -> `"rank_pattern": {n: 4`
    """
    net, again = tiny.transformer(), tiny.transformer()
    for i, name in enumerate(lora.matching(net, ["q_proj", "up_proj"])):
        layer = lora.attach(net, name, (2, 3, 2, 5)[i], (0.5, 0.5, 2.0, 0.75)[i], 0.0)
        for half in (layer.lora_A, layer.lora_B):
            half.data.normal_(generator=torch.Generator().manual_seed(i))
    lora.save(net, tmp_path, "base")
    lora.load(again, tmp_path)
    assert same(net, again)


def test_rslora_is_alpha_over_the_root_of_r_and_is_written_as_an_equal_product(tmp_path):
    """8 / sqrt(4) = 4; written as lora_alpha 16 with r 4 and use_rslora false.

    Red: peft_folder.py:read: `math.sqrt(r) if` -> `r if`
    """
    lora.save(adapted(), tmp_path / "plain", "base")
    edit(tmp_path / "plain", use_rslora=True)
    net = tiny.transformer()
    lora.load(net, tmp_path / "plain")
    assert {layer.scale for layer in lora.adapters(net).values()} == {4.0}
    lora.save(net, tmp_path / "again", "base")
    raw = json.loads((tmp_path / "again/adapter_config.json").read_text())
    assert (raw["lora_alpha"], raw["use_rslora"]) == (16.0, False)


def test_patterns_override_rank_and_alpha_by_the_end_of_a_name(tmp_path):
    """As PEFT matches them: `q_proj` and `layers.1.self_attn.q_proj` are both patterns.

    Red: peft_folder.py:read: `("alpha", config["lora_alpha"])` -> `("rank", config["lora_alpha"])`
    """
    lora.save(adapted(targets=("q_proj", "v_proj")), tmp_path, "base")
    edit(tmp_path, alpha_pattern={"layers.1.self_attn.q_proj": 2, "v_proj": 6}, lora_alpha=4)
    net = tiny.transformer()
    lora.load(net, tmp_path)
    assert [layer.scale for layer in lora.adapters(net).values()] == [1.0, 1.5, 0.5, 1.5]


CONFIGS = [
    ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "bias"), ({"peft_type": "IA3"}, "IA3"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"), ({"r": 8}, "expected.*rank 8"),
    ({"layers_to_transform": [0]}, "layers_to_transform"), ({"r": None}, "r must be.*None"),
    ({"target_modules": ["q_proj"]}, "differ in 12 layers"), ({"lora_alpha": None}, "lora_alpha"),
    ({"target_modules": ["q_proj", "wq"]}, "'wq'"), ({"lora_alpha": math.nan}, "lora_alpha"),
    ({"target_modules": [*lora.TARGETS, "lm_head"]}, "lm_head"), ({"lora_alpha": "8"}, "lora_al"),
    ({"target_modules": None}, "target_modules"), ({"init_lora_weights": "pissa"}, "pissa"),
    ({"rank_pattern": {"q_proj": 2}}, "expected.*rank 2"), ({"use_qalora": True}, "use_qalora"),
]


@pytest.mark.parametrize("changes, words", CONFIGS, ids=[str(c) for c, _ in CONFIGS])
def test_an_adapter_that_is_not_plain_lora_is_refused_by_name(tmp_path, changes, words):
    """Or whose config and tensors disagree: never another model in silence.

    Red: peft_config.py:read: `config.keys() - PLAIN` -> `config.keys() - PLAIN - {"use_dora"}`
    """
    lora.save(adapted(), tmp_path, "base")
    edit(tmp_path, **changes)
    with pytest.raises(ValueError, match=words):
        lora.load(tiny.transformer(), tmp_path)


TENSORS = {
    "missing half": (lambda t: t.pop(HALF), "not half of a pair"),
    "unknown name": (lambda t: t.update({"lm_head.weight": torch.ones(2)}), "lm_head.weight"),
    "wrong rank": (lambda t: t.update({HALF: torch.ones(3, 16)}), r"A \(3, 16\).*rank 4"),
    "wrong shape": (lambda t: t.update({HALF: torch.ones(4, 15)}), r"\(16, 15\)|\(32, 15\)"),
    "one dimension": (lambda t: t.update({HALF: torch.ones(4)}), r"A \(4,\)"),
    "nan": (lambda t: t.update({HALF: torch.full((4, 16), math.nan)}), "nan at"),
    "extra layer": (lambda t: t.update({
        HALF.replace("layers.0", "layers.2"): torch.ones(4, 16),
        HALF.replace("layers.0", "layers.2").replace("lora_A", "lora_B"): torch.ones(32, 4)}),
        "layers.2"),
    "fewer layers": (lambda t: [t.pop(peft_folder.KEY.format(FIRST, h)) for h in "AB"], FIRST),
}


@pytest.mark.parametrize("change, words", TENSORS.values(), ids=TENSORS.keys())
def test_a_damaged_adapter_is_refused_by_name(tmp_path, change, words):
    """Nothing missing, nothing left, nothing that is not a number; the model stays as it was.

    Red: peft_folder.py:read: `weights.check_finite(` -> `print(`
    """
    lora.save(adapted(), tmp_path, "base")
    tamper(tmp_path, change)
    net = tiny.transformer()
    with pytest.raises(ValueError, match=words):
        lora.load(net, tmp_path)
    assert not lora.adapters(net)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_or_broken_adapter_file_is_named(tmp_path, name):
    """One file gone, then there but cut short.

    Red: peft_folder.py:read: `{file.name} is missing` -> `a file is missing`
    """
    lora.save(adapted(), tmp_path, "base")
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        lora.load(tiny.transformer(), tmp_path)
    (tmp_path / name).write_bytes(data[:len(data) // 2])
    with pytest.raises(ValueError, match=f"{name}.* not valid JSON|{name}.* bytes of tensors"):
        lora.load(tiny.transformer(), tmp_path)


def test_a_model_that_carries_adapters_takes_no_second_one(tmp_path):
    """Loading would drop the first without a word.

    Red: lora.py:load: `if adapters(model):` -> `if False:`
    """
    lora.save(adapted(), tmp_path, "base")
    with pytest.raises(ValueError, match="already carries adapters"):
        lora.load(adapted(), tmp_path)


def folders(tmp_path: Path, dtype: torch.dtype = torch.float32) -> tuple[list[str], torch.Tensor]:
    """Arguments of a merge of two new folders, and the logits it has to give."""
    base, net = tmp_path / "base", adapted(dtype)
    model.save(tiny.transformer(dtype=dtype), base)
    lora.save(net, tmp_path / "adapter", str(base))
    (base / "tokenizer.json").write_text('{"a": 1}')
    (tmp_path / "adapter/chat_template.jinja").write_text("hello")
    return ["merge", "--model", str(base), "--adapter", str(tmp_path / "adapter"),
            "--out", str(tmp_path / "out")], logits(net)


@pytest.mark.parametrize("sharded", [False, True])
def test_a_merged_folder_is_the_adapted_model(tmp_path, capsys, sharded):
    """float32 logits within 1e-5; tokenizer and chat template come along, a second copy of the
    weights under other names does not.

    Red: merging.py:merge: `scale * b.to(wide)` -> `b.to(wide)`
    Red: merging.py:merge: `for path in shards:` -> `for path in model.glob("*.safetensors"):`
    """
    arguments, want = folders(tmp_path)
    save_file({"layers.0.wq": torch.ones(1)}, tmp_path / "base/consolidated.safetensors")
    if sharded:
        shard(tmp_path / "base")
    lora.main(arguments)
    assert "14 layers" in capsys.readouterr().out
    got = logits(model.load(tmp_path / "out", torch.float32))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert (tmp_path / "out/tokenizer.json").read_text() == '{"a": 1}'
    assert (tmp_path / "out/chat_template.jinja").read_text() == "hello"
    assert not list((tmp_path / "out").glob("[ac]*d*.safetensors"))


def test_a_bfloat16_base_stays_bfloat16_and_is_rounded_once(tmp_path):
    """bf16(float32(W) + scale * B A), in every adapted layer; the others are untouched.

    Red: merging.py:merge: `b.to(wide)` -> `b.bfloat16().to(wide)`
    """
    lora.main(folders(tmp_path, torch.bfloat16)[0])
    base, net = tiny.transformer(dtype=torch.bfloat16), adapted(torch.bfloat16)
    merged, layers = load_file(tmp_path / "out/model.safetensors"), lora.adapters(net)
    assert len(merged) == 21
    for name, weight in base.state_dict().items():
        layer = layers.get(name.removesuffix(".weight"))
        wide = weight.float() + (layer.scale * layer.lora_B @ layer.lora_A if layer else 0)
        assert torch.equal(merged[name], wide.bfloat16())


@pytest.mark.parametrize("command", ["load", "merge"])
def test_an_adapter_goes_onto_its_own_base_in_any_dtype_and_onto_no_other(tmp_path, command):
    """One that names no base (PEFT's own) goes wherever its shapes do.

    Red: peft_folder.py:check_base: `not in (None, fingerprint(rows))` -> `== 0`
    Red: peft_folder.py:check_base: `(None, ` -> `(`
    Red: peft_folder.py:fingerprint: `torch.bfloat16)` -> `rows[name].dtype)`
    Red: merging.py:check_fit: `peft_folder.check_base(adapter, config, rows)` -> `pass`
    Red: lora.py:load: `    peft_folder.check_base(folder` -> `    str(folder`
    """
    folders(tmp_path)

    def use(out: str) -> None:
        if command == "merge":
            merging.merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / out)
        else:
            lora.load(model.load(tmp_path / "base", torch.float32), tmp_path / "adapter")

    use("first")
    model.save(tiny.transformer(dtype=torch.bfloat16), tmp_path / "base")
    use("second")
    model.save(tiny.transformer(seed=1, dtype=torch.float32), tmp_path / "base")
    with pytest.raises(ValueError, match="adapter was trained on another base"):
        use("third")
    path = tmp_path / "adapter/adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt"})
    use("third")


def full_out(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious.txt").write_text("x")


def narrow_base(tmp_path: Path) -> None:
    model.save(tiny.transformer(intermediate_size=20), tmp_path / "base")


def shallow_base(tmp_path: Path) -> None:
    model.save(tiny.transformer(num_hidden_layers=1), tmp_path / "base")


def broken_base(tmp_path: Path) -> None:
    (tmp_path / "base/model.safetensors").write_text("version https://git-lfs")


@pytest.mark.parametrize("damage, words", [
    (full_out, "not empty"), (narrow_base, "mlp.down_proj"), (shallow_base, "model.layers.1"),
    (broken_base, "git lfs pull")])
def test_a_merge_that_cannot_be_ends_with_two_and_one_line(tmp_path, capsys, damage, words):
    """And writes nothing.

    Red: command.py:stop: `sys.exit(2)` -> `sys.exit(1)`
    """
    arguments, _ = folders(tmp_path)
    damage(tmp_path)
    with pytest.raises(SystemExit) as caught:
        lora.main(arguments)
    err = capsys.readouterr().err
    assert caught.value.code == 2 and err.count("\n") == 1 and words in err
    out = tmp_path / "out"
    assert not out.exists() or [f.name for f in out.iterdir()] == ["precious.txt"]


def test_the_command_line_merges(tmp_path):
    """python lora.py merge, as a user types it.

    Red: lora.py: `if __name__ == "__main__":` -> `if False:`
    """
    command = [sys.executable, str(ROOT / "lora.py"), *folders(tmp_path)[0]]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "14 layers" in run.stdout and (tmp_path / "out/config.json").is_file()
