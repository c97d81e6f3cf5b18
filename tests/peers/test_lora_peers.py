"""Adapter folders exchanged with peft, in both directions, and merged folders in transformers.

Both sides compute in float64, transformers with its float32 islands lifted, so that 1e-10 is
enough for noise; 1e-5 is what rounding merged weights to float32 costs. Run with peft installed;
`-rP` prints the largest difference of each comparison.
"""
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils
from test_model_peers import float64_islands, ids, near, peer, random_peer
from transformers import AutoModelForCausalLM

import deltas
import heads
import lora
import merging
import model

PATTERNS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 6,
            "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 12, "model.layers.2.mlp.down_proj": 1}}
CONFIGS = {
    "plain": {"target_modules": list(lora.TARGETS), "r": 8, "lora_alpha": 16},
    "alpha-below-r": {"target_modules": ["q_proj", "up_proj"], "r": 32, "lora_alpha": 16},
    "rslora": {"target_modules": ["q_proj", "up_proj"], "r": 8, "use_rslora": True},
    "patterns": PATTERNS,
    "patterns-rslora": PATTERNS | {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear", "r": 4},
    "regex": {"target_modules": r".*layers\.[12]\..*(q|up)_proj", "r": 4},
    "full-path": {"target_modules": ["model.layers.1.mlp.up_proj", "o_proj"], "r": 4},
    "head": {"target_modules": ["lm_head", "k_proj"], "r": 4, "lora_dropout": 0.1},
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
families = pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen3"])


def randomise(net: torch.nn.Module) -> torch.nn.Module:
    """B small and random, so that the adapter moves the logits by about one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.05 * torch.randn(weight.shape, generator=generator))
    return net.eval()


def ours_in(base: Path, adapter: Path) -> model.Transformer:
    net = model.load(base, torch.float64)
    lora.load(net, adapter)
    return net.eval()


@torch.no_grad()
def logits(net: torch.nn.Module) -> torch.Tensor:
    """In float64; a model of transformers or peft stays in float64 afterwards."""
    if isinstance(net, model.Transformer):
        return net.logits(net(ids((3, 17))))
    base = net.get_base_model() if isinstance(net, PeftModel) else net
    net.double()
    with float64_islands(base):
        return net(ids((3, 17)), use_cache=False).logits


def from_peft(tmp_path: Path, config: dict, kind: str = "mistral") -> torch.Tensor:
    """Writes base/ and adapter/ with peft; the logits they give there."""
    random_peer(tmp_path / "base", model_type=kind)
    net = randomise(get_peft_model(peer(tmp_path / "base", torch.float32, "sdpa"),
                                   LoraConfig(task_type="CAUSAL_LM", **config)))
    net.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with net.disable_adapter():
        plain = logits(net)
    assert (logits(net) - plain).abs().max() > 0.1
    return logits(net)


@every_config
def test_an_adapter_of_peft_opens_here(tmp_path, config):
    """Logits within 1e-10, whatever the spelling of targets, ranks and scales.

    Red: peft_folder.py:read: `math.sqrt(r) if` -> `r if`
    """
    want = from_peft(tmp_path, config)
    net = ours_in(tmp_path / "base", tmp_path / "adapter")
    near(logits(net), want, 1e-10)


@every_config
def test_an_adapter_written_again_here_still_opens_in_peft(tmp_path, config):
    """peft -> here -> peft: one format, with no layer or scale lost.

    Red: lora.py:save: `"alpha_pattern": {n: a` -> `"alpha_pattern": {n: 1.0`
    """
    want = from_peft(tmp_path, config)
    net = ours_in(tmp_path / "base", tmp_path / "adapter")
    lora.save(net, tmp_path / "again", str(tmp_path / "base"))
    base = peer(tmp_path / "base", torch.float32, "sdpa")
    opened = PeftModel.from_pretrained(base, tmp_path / "again").eval()
    near(logits(opened), want, 1e-10)


@families
@pytest.mark.parametrize("targets", [lora.TARGETS, ("q_proj",), "all-linear", r".*\.1\.mlp\..*"])
def test_an_adapter_written_here_opens_in_peft(tmp_path, kind, targets, recwarn):
    """Logits within 1e-10 and not a word about missing or unexpected keys, with a head beside it.

    Red: lora.py:save: `"lora_alpha": alphas[first]` -> `"lora_alpha": ranks[first]`
    Red: heads.py: `FILE = "heads.safetensors"` -> `FILE = "adapter_model.safetensors"`
    """
    random_peer(tmp_path / "base", model_type=kind)
    net = model.load(tmp_path / "base", torch.float32)  # adapters are stored in float32
    lora.inject(net, 8, 4, targets, generator=torch.Generator().manual_seed(0))
    heads.attach(net, "score").weight.data.fill_(1.0)
    lora.save(randomise(net), tmp_path / "adapter", str(tmp_path / "base"))
    base = peer(tmp_path / "base", torch.float32, "sdpa")
    opened = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert not [w for w in recwarn if "adapter key" in str(w.message)]
    near(logits(opened), logits(net.double()), 1e-10)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisations_that_change_the_base_are_refused(tmp_path, init):
    """peft takes their start out of the base weights: read as plain LoRA it would be doubled.

    Red: peft_config.py:read: `["init_lora_weights"] * ` -> `[] * `
    """
    config = CONFIGS["plain"] | {"init_lora_weights": init}
    random_peer(tmp_path / "base", model_type="mistral")
    base = peer(tmp_path / "base", torch.float32, "sdpa")
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config)).save_pretrained(
        tmp_path / "adapter")
    with pytest.raises(ValueError, match="init_lora_weights"):
        ours_in(tmp_path / "base", tmp_path / "adapter")


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_a_merged_folder_opens_in_transformers(tmp_path, kind, dtype, tied):
    """The adapted model's logits within 1e-5; a bfloat16 base stays one.

    Red: merging.py:merge: `scale * b.to(wide)` -> `b.to(wide)`
    """
    random_peer(tmp_path / "float32", model_type=kind, tie_word_embeddings=tied)
    model.save(model.load(tmp_path / "float32", dtype), tmp_path / "base")
    net = model.load(tmp_path / "base", dtype)
    lora.inject(net, 8, 4, generator=torch.Generator().manual_seed(0))
    lora.save(randomise(net), tmp_path / "adapter", "base")
    lora.main(["merge", "--model", str(tmp_path / "base"), "--adapter", str(tmp_path / "adapter"),
               "--out", str(tmp_path / "out")])
    opened, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True)
    assert opened.dtype == dtype and not any(report.values())
    near(logits(opened), logits(model.load(tmp_path / "out", torch.float64)), 1e-10)
    if dtype == torch.float32:
        near(logits(opened), logits(net.double()), 1e-5)


def test_a_sharded_folder_of_transformers_is_merged_shard_by_shard(tmp_path):
    """Same shard names and index; logits within 1e-5 in transformers.

    Red: merging.py:merge: `part / path.name` -> `part / "model.safetensors"`
    """
    want = from_peft(tmp_path, CONFIGS["plain"])
    peer(tmp_path / "base", torch.float32, "sdpa").save_pretrained(
        tmp_path / "shards", max_shard_size="100KB")
    merging.merge(tmp_path / "shards", [tmp_path / "adapter"], tmp_path / "out")
    index = "model.safetensors.index.json"
    files = set(json.loads((tmp_path / "out" / index).read_text())["weight_map"].values())
    assert len(files) > 2 and files == {f.name for f in (tmp_path / "out").glob("*.safetensors")}
    near(logits(peer(tmp_path / "out", torch.float32, "sdpa")), want, 1e-5)


@every_config
def test_merged_weights_are_those_of_peft(tmp_path, config):
    """merge here and merge_and_unload there, in float64: weights within 1e-14, logits 1e-10.

    Red: lora.py:merge: `sign * layer.delta()` -> `2 * sign * layer.delta()`
    """
    from_peft(tmp_path, config)
    net = ours_in(tmp_path / "base", tmp_path / "adapter")
    base = peer(tmp_path / "base", torch.float32, "sdpa")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").double().merge_and_unload()
    lora.merge(net)
    lora.remove(net)
    for name, weight in theirs.state_dict().items():
        near(net.state_dict()[name], weight, 1e-14)
    near(logits(net), logits(theirs.eval()), 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 2.0, 1.0), (1.0, -0.5)])
@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.filterwarnings("ignore:The density")
def test_deltas_are_merged_as_by_the_steps_of_peft(dtype, factors, density):
    """prune, elect and merge of merge_utils on dense deltas, each weighted before the vote: 1e-6.

    Its own ties() votes first and weighs then, the same with equal weights alone; it keeps
    int(density n) and where all cancel elects +, neither of which these deltas meet.
    Red: deltas.py:ties: `agree.sum(0).clamp(min=1)` -> `len(deltas)`
    Red: deltas.py:linear: `w * trim` -> `trim`
    """
    generator, weights = torch.Generator().manual_seed(0), torch.tensor(factors, dtype=dtype)
    given = [torch.randn(32, 24, generator=generator).to(dtype) for _ in factors]
    near(deltas.linear(given, factors, density),
         merge_utils.magnitude_prune(given, weights, density), 1e-6)
    pruned = torch.stack([w * merge_utils.prune(d, density, "magnitude")
                          for w, d in zip(factors, given, strict=True)])
    found = deltas.ties(given, factors, density)
    sign = merge_utils.calculate_majority_sign_mask(pruned, "total")
    near(found, merge_utils.disjoint_merge(pruned, sign), 1e-6)
    if len(set(factors)) == 1:
        near(found, merge_utils.ties(given, weights, density), 1e-6)
