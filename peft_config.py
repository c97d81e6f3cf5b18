"""adapter_config.json: the settings of a plain LoRA, and nothing that is more than that."""
import re
from collections.abc import Sequence
from pathlib import Path

import bounds
import strict

PLAIN = {  # what plain LoRA may say in adapter_config.json; any other key must be null or false
    "peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "bias",
    "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "inference_mode", "revision",
    "peft_version", "auto_mapping", "megatron_core", "qalora_group_size", "init_lora_weights",
    "layers_pattern"}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def read(path: Path) -> dict:
    """adapter_config.json of a plain LoRA, every number of its kind and range."""
    config = {"bias": "none", "lora_dropout": 0.0} | strict.read_json(path)
    init = config.get("init_lora_weights")
    odd = [key for key in config.keys() - PLAIN if config[key] is not False
           and config[key] not in (None, "", [], {})]
    odd += [key for key, good in (("peft_type", ("LORA",)), ("bias", ("none",)),
                                  ("task_type", ("CAUSAL_LM", None)))
            if config.get(key) not in good]
    odd += ["init_lora_weights"] * bool(init and init is not True and init != "gaussian")
    for key in odd:  # the other ways to begin change the base
        raise ValueError(f"{path}: {key} = {strict.show(config.get(key))} is not supported, only "
                         "plain LoRA of a causal language model")
    targets = config.get("target_modules")
    if not targets or not (type(targets) is str or type(targets) is list and all(
            type(t) is str for t in targets)):
        raise ValueError(f"{path}: target_modules is {strict.show(targets)}, expected names of "
                         "layers, or a regular expression")
    try:
        bounds.boolean(config, "use_rslora")
        bounds.whole("r", config.get("r"))
        bounds.positive("lora_alpha", config.get("lora_alpha"), 1e30)
        if type(drop := config["lora_dropout"]) not in (int, float) or not 0 <= drop < 1:
            raise ValueError(f"lora_dropout must be from 0 to below 1, found {strict.show(drop)}")
        for key in ("rank_pattern", "alpha_pattern"):
            config[key] = patterns(key, config.get(key) or {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config


def patterns(key: str, given: object) -> list[tuple[re.Pattern, float]]:
    """(expression for the end of a layer's name, its rank or alpha) in the order of the file."""
    if type(given) is not dict:
        raise ValueError(f"{key} must be an object, found {strict.show(given)}")
    found = []
    for name, value in given.items():
        where = f"{key} of {strict.show(name)}"
        number = bounds.whole(where, value) if key == "rank_pattern" else (
            bounds.positive(where, value, 1e30))
        found.append((bounds.pattern(rf"(.*\.)?({name})", key), number))
    return found


def select(linear: Sequence[str], targets: str | Sequence[str]) -> list[str]:
    """The names among `linear` that `targets` selects, as PEFT reads target_modules.

    A list holds full names or their last parts; a string is a regular expression for the full
    name, or "all-linear" (everything but lm_head). A target that matches nothing: ValueError.
    """
    listed = [] if isinstance(targets, str) else targets
    patterns = {t: re.compile(rf"(.*\.)?{re.escape(t)}") for t in listed} or {
        targets: re.compile(r"(?!.*\blm_head$).*") if targets == "all-linear" else
        bounds.pattern(targets, "target_modules")}
    found = {t: [n for n in linear if p.fullmatch(n)] for t, p in patterns.items()}
    for target in (t for t in found if not found[t]):
        last = sorted({n.split(".")[-1] for n in linear})
        raise ValueError(f"LoRA target {target!r} matches no linear layer; the model has {last}")
    return [n for n in linear if any(n in names for names in found.values())]
