"""Families S01 to S08: files that would run code, lead out of the folder, or fill the memory."""
import gzip
import json
from pathlib import Path

from faults.case import Case, bomb, edit, header, link, several, tensors, write

PROGRAMS = ("generate", "evaluate", "train", "lora")
ADAPTER = {"generate": "--adapter DIR/adapter", "evaluate": "--adapter DIR/adapter"}


def pickles() -> list[Case]:
    """S01: a pickle under every name that is read, and under those that others read."""
    out = []
    for i, name in enumerate((
            "model/config.json", "model/model.safetensors", "model/model.safetensors.index.json",
            "model/tokenizer.json", "model/tokenizer_config.json", "model/generation_config.json",
            "adapter/adapter_config.json", "adapter/adapter_model.safetensors")):
        for program in (("generate", "evaluate") if "adapter" in name else PROGRAMS[i % 2::2]):
            if program != "lora" or "token" not in name and "generation" not in name:
                out.append(Case(f"S01 a pickle named {name}, {program}", program, bomb(name),
                                ADAPTER.get(program, ""), Path(name).name))
    for i, name in enumerate((
            "model/pytorch_model.bin", "model/pytorch_model-00001-of-00002.bin", "model/model.pt",
            "model/tokenizer.model", "model/training_args.bin", "model/consolidated.00.pth",
            "model/optimizer.pt", "model/special_tokens_map.json", "model/tokenizer.pkl",
            "adapter/adapter_model.bin", "adapter/training_args.bin", "adapter/optimizer.pt",
            "model/spiece.model", "model/vocab.json", "model/scheduler.pt")):
        program = PROGRAMS[i % 4]
        out.append(Case(f"S01 a pickle beside the rest, {name}", program, bomb(name),
                        ADAPTER.get(program, ""), oracle="V"))
    return [
        *out, Case("S01 a pickled chat template", "generate", bomb("model/chat_template.jinja"),
                   "--template checkpoint", "chat_template.jinja"),
        Case("S01 a pickle as data", "evaluate", bomb("data.jsonl"), "", "data.jsonl")]


def code() -> list[Case]:
    """S02 and S03: code in a folder, and paths that lead out of it."""
    script = "import os\nos.system('touch pwned')\nopen('pwned', 'w')\n"
    auto = {"AutoConfig": "modeling_x.Config", "AutoModelForCausalLM": "modeling_x.Model",
            "AutoTokenizer": ["modeling_x.Tokenizer", None]}
    out = []
    for program in PROGRAMS:
        out += [
            Case(f"S02 auto_map in config.json, {program}", program, several(
                edit("model/config.json", auto_map=auto, trust_remote_code=True),
                write("model/modeling_x.py", script)), oracle="V"),
            Case(f"S02 auto_map in tokenizer_config.json, {program}", program, several(
                edit("model/tokenizer_config.json", auto_map=auto, tokenizer_class="X"),
                write("model/modeling_x.py", script)), oracle="V"),
            Case(f"S02 modules where the command is given, {program}", program, several(
                *(write(f"{n}.py", script) for n in (
                    "json", "torch", "jinja2", "safetensors", "huggingface_hub", "sitecustomize",
                    "pyarrow", "matplotlib"))), oracle="V")]

    def renamed(h: dict) -> dict:
        return {("../../pwned" if n == "model.norm.weight" else n): v for n, v in h.items()}

    return [
        *out,
        Case("S02 an adapter with auto_mapping", "generate", several(
            edit("adapter/adapter_config.json", auto_mapping={
                "base_model_class": "X", "parent_library": "modeling_x"}),
            write("adapter/modeling_x.py", script)), "--adapter DIR/adapter", oracle="V"),
        Case("S03 a tensor named ../../pwned", "generate", header(
            "model/model.safetensors", renamed), "", "../../pwned"),
        Case("S03 a tensor named ../../pwned, merged", "lora", header(
            "model/model.safetensors", renamed), "", "../../pwned"),
        Case("S03 a shard named as a config", "lora", write(
            "model/model.safetensors.index.json", json.dumps({"weight_map": {
                "model.norm.weight": "config.json"}})), "", "both"),
        Case("S04 merged is a link out of the tree", "lora", several(
            lambda place: (place / "far").mkdir(), link("merged", "far")), "", "merged;link")]


def sizes() -> list[Case]:
    """S06: much from little."""
    out = []
    for i, name in enumerate(("config.json", "tokenizer.json", "tokenizer_config.json",
                              "generation_config.json", "model.safetensors")):
        def big(place: Path, name: str = name) -> None:
            with open(place / "model" / name, "r+b") as file:
                file.truncate(40_000_000_000)

        program = PROGRAMS[i % 3]
        out += [
            Case(f"S06 {name} is gzip", program, write(f"model/{name}", gzip.compress(
                bytes(10_000_000))), "", f"{name};gzip"),
            Case(f"S06 {name} has 40 GB", program, big, "", name)]
    numbers = "[" + "1," * 3_000_000 + "1]"
    return [
        *out,
        Case("S06 a long list in config.json", "generate", write(
            "model/config.json", f'{{"a": {numbers}}}'), "", "config.json;model_type"),
        Case("S06 an alias-like nest in config.json", "generate", write(
            "model/config.json", '{"model_type":' * 900 + "1" + "}" * 900), "", "config.json")]


def shown() -> list[Case]:
    """S07 and S08: patterns from files, and control characters in what is shown."""
    evil, out = "\x1b]0;pwned\x07\x1b[2J\r\n\x9b31m", []
    for key in ("model_type", "hidden_act", "rms_norm_eps", "sliding_window"):
        out.append(Case(f"S08 control characters in {key}", PROGRAMS[len(out) % 3],
                        edit("model/config.json", **{key: evil}), "", f"config.json;{key}"))
    for name, path, keys in (
            ("ends an answer", "model/tokenizer_config.json", {"eos_token": evil}),
            ("rope_type", "model/config.json", {"rope_parameters": {"rope_type": evil}}),
            ("layer_types", "model/config.json", {"layer_types": [evil, evil]}),
            ("eos_token_id", "model/generation_config.json", {"eos_token_id": evil})):
        out.append(Case(f"S08 control characters in {name}", PROGRAMS[len(out) % 3],
                        edit(path, **keys), "", name))
    for program in ("generate", "lora"):
        out += [
            Case(f"S08 control characters in {key}, {program}", program,
                 edit("adapter/adapter_config.json", **{key: value}), ADAPTER.get(program, ""),
                 key) for key, value in (("peft_type", evil), ("zork", evil), ("bias", evil),
                                         ("rank_pattern", {f"({evil}": 2}))]
        out.append(Case(f"S08 control characters in the base's name, {program}", program, several(
            edit("adapter/adapter_config.json", base_model_name_or_path=evil),
            edit("model/config.json", num_hidden_layers=1), tensors(
                "model/model.safetensors", lambda t: [t.pop(n) for n in list(t)
                                                      if "layers.1" in n])),
            ADAPTER.get(program, ""), "layers.1"))
    return [
        *out,
        Case("S08 control characters in a tensor's name", "generate", header(
            "model/model.safetensors", lambda h: {
                (f"a{evil}" if n == "model.norm.weight" else n): v for n, v in h.items()}), "",
            "no name of a tensor"),
        Case("S08 control characters in an extra tensor", "evaluate", tensors(
            "model/model.safetensors", lambda t: t.update({f" {evil}": t["model.norm.weight"]
                                                           .clone()})), "", "no name of a tensor"),
        Case("S08 control characters in a JSON key", "train", write(
            "model/config.json", json.dumps({evil: 1})[:-1] + f", {json.dumps(evil)}: 2}}"), "",
            "config.json;twice"),
        Case("S08 control characters in a file beside", "generate", several(
            write("model/\x1b[2J.bin", "x"), lambda place: (
                place / "model/model.safetensors").unlink()), "", "model.safetensors")]


def cases() -> list[Case]:
    return [*pickles(), *code(), *sizes(), *shown()]
