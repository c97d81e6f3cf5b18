"""Families E02 to E17: adapter folders that do not fit, are damaged, or lie."""
from pathlib import Path

from faults.case import (
    Case,
    cut,
    directory,
    edit,
    fifo,
    header,
    link,
    remove,
    rename,
    several,
    tensors,
    write,
)

CONFIG, WEIGHTS = "adapter/adapter_config.json", "adapter/adapter_model.safetensors"
KEY = "base_model.model.model.layers.{}.{}.lora_{}.weight"
Q0A, Q0B = (KEY.format(0, "self_attn.q_proj", half) for half in "AB")
USE = {"generate": "--adapter DIR/adapter", "evaluate": "--adapter DIR/adapter", "lora": ""}
PROGRAMS = tuple(USE)
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NAN = float("nan")
LISTED = (
    ("E06", "r", (4, 1, 0, -2, 2.0, "2", True, None, [2], 10**12, ..., NAN)),
    ("E07", "lora_alpha", (NAN, float("inf"), "4", True, None, [4], ..., 10**400, 0)),
    ("E07", "lora_dropout", (1.5, 1.0, -0.1, NAN, "0.1", True, [0.1], 10**400)),
    ("E07", "use_rslora", ("false", 1, "yes", [True])),
    ("E07", "peft_type", ("IA3", "ADALORA", "lora ", 7, None, ...)),
    ("E07", "bias", ("all", "lora_only", True, 7)),
    ("E07", "use_dora", (True, "no")), ("E07", "modules_to_save", (["lm_head"], "lm_head")),
    ("E07", "fan_in_fan_out", (True,)), ("E07", "layers_to_transform", (0, [0], [0, 1])),
    ("E07", "layer_replication", ([[0, 1]],)), ("E07", "exclude_modules", ("q_proj",)),
    ("E07", "target_parameters", (["x"],)), ("E07", "trainable_token_indices", ([1],)),
    ("E07", "init_lora_weights", ("pissa", "olora", "eva", 7)), ("E07", "lora_bias", (True,)),
    ("E07", "use_qalora", (True,)), ("E07", "arrow_config", ({"a": 1},)),
    ("E07", "kasa_config", ({"a": 1},)), ("E07", "zork", (1, "x", {"a": 1})),
    ("E07", "task_type", ("SEQ_CLS", 7)),
    ("E06", "target_modules", ([], None, ..., 7, {"q_proj": 1}, [7], ["q_proj"], ["zork"],
                               [*ALL, "lm_head"], "q_proj", "(q_proj", ".*[", "(x+x+)+y",
                               ".*" * 12 + "z", [[]], "", "all", True)),
    ("E06", "rank_pattern", ([], "q_proj", {"q_proj": 3}, {"q_proj": "2"}, {"q_proj": 2.0},
                             {"q_proj": True}, {"q_proj": None}, {"(q": 2}, {"(a+a+)+b": 2},
                             {"*": 2}, {".*" * 12 + "z": 2})),
    ("E06", "alpha_pattern", ([1], 5, {"q_proj": NAN}, {"q_proj": "2"}, {"q_proj": None},
                              {"q_proj": [1]}, {"(q": 2}, {"(a*)*b": 2})))


def case(name: str, change, words: str, program: str, oracle: str = "R") -> Case:
    return Case(name, program, change, USE[program], words, oracle)


def settings() -> list[Case]:
    """E06 and E07: adapter_config.json says another thing than plain LoRA, or nothing sensible."""
    out, at = [], "adapter_config.json"
    for family, key, values in LISTED:
        for value in values:
            shown = "absent" if value is ... else f"{value!a}"[:24]
            good = key in ("rank_pattern",) and value == []
            words = "" if good else f"adapter;{key}"
            if key == "target_modules" and value in ("q_proj", ["q_proj"], "all", ["zork"],
                                                     [*ALL, "lm_head"]):
                words = "adapter;" + ("lm_head" if "lm_head" in value else
                                      "layers" if value == ["q_proj"] else
                                      "q_proj" if "q_proj" in value else "matches no")
            if key in ("r", "rank_pattern") and type(value) in (int, dict) and value in (
                    4, 1, 10**12, {"q_proj": 3}):
                words = f"adapter;{value['q_proj'] if isinstance(value, dict) else value}"
            if value == {"q_proj": NAN}:
                words = "adapter;q_proj;nan"
            program = "generate" if "target" in words or key == "target_modules" else (
                PROGRAMS[len(out) % 3])
            out.append(case(f"{family} {key} is {shown}", edit(CONFIG, **{key: value}), words,
                            program, "V" if good else "R"))
    for name, text, words in (
            ("a list", "[]", "list;object"), ("empty", "", "empty"), ("null", "null", "object"),
            ("cut", '{"r": 2, "lora', ""), ("a web page", "<html></html>", "web page"),
            ("deep", '{"a":' * 100_000, "deep"), ("twice", '{"r": 2, "r": 2}', "'r';twice"),
            ("NaN", '{"r": NaN}', "nan"), ("latin-1", b'{"a": "\xe9"}', "UTF-8"),
            ("5000 digits", '{"r": ' + "9" * 5000 + "}", "")):
        out.append(case(f"E07 adapter_config.json is {name}", write(CONFIG, text), f"{at};{words}",
                        PROGRAMS[len(out) % 3]))
    plain = {"auto_mapping": {"base_model_class": "X"}, "revision": "main",
             "megatron_core": "megatron.core", "qalora_group_size": 16, "peft_version": "9.9",
             "loftq_config": {}, "use_rslora": False, "inference_mode": False}
    return [
        *out, case("E07 what PEFT writes for plain LoRA", edit(CONFIG, **plain), "", "generate",
                   "V"),
        case("E07 targets by a pattern", edit(
            CONFIG, target_modules=r".*\.(q|k|v|o|gate|up|down)_proj"), "", "generate", "V"),
        case("E07 all-linear", edit(CONFIG, target_modules="all-linear"), "", "generate", "V"),
        case("E07 rslora", edit(CONFIG, use_rslora=True), "14 layers", "lora", "V"),
        case("E06 a rank by pattern", edit(CONFIG, r=4, rank_pattern={r"layers\.\d+.*": 2}), "",
             "generate", "V"),
        case("E07 a base path out of the tree", edit(
            CONFIG, base_model_name_or_path="../../../etc"), "", "generate", "V")]


def weights() -> list[Case]:
    """E03 to E05, E16: the tensors of an adapter."""
    import torch

    out = []
    for name, edit_all, words in (
            ("E04 half missing", lambda t: t.pop(Q0A), "q_proj"),
            ("E04 a layer missing", lambda t: (t.pop(Q0A), t.pop(Q0B)), "q_proj"),
            ("E04 all missing", lambda t: t.clear(), "adapter"),
            ("E04 an extra tensor", lambda t: t.update({"lm_head.weight": torch.ones(2, 2)}),
             "lm_head.weight"),
            ("E04 renamed", lambda t: t.update({Q0A.replace("q_proj", "wq"): t.pop(Q0A)}),
             "q_proj"),
            ("E04 an adapter's own name in the keys", lambda t: t.update(
                {Q0A.replace(".weight", ".default.weight"): t.pop(Q0A)}), "default"),
            ("E03 a layer more", lambda t: t.update({
                KEY.format(2, "self_attn.q_proj", h): t[KEY.format(0, "self_attn.q_proj", h)]
                .clone() for h in "AB"}), "layers.2"),
            ("E06 another rank", lambda t: t.update({Q0A: torch.ones(3, 16)}), "rank 2"),
            ("E06 one dimension", lambda t: t.update({Q0A: torch.ones(2)}), "q_proj"),
            ("E06 no dimension", lambda t: t.update({Q0A: torch.tensor(2.0)}), "q_proj"),
            ("E06 three dimensions", lambda t: t.update({Q0A: torch.ones(2, 16, 1)}), "q_proj"),
            ("E06 another width", lambda t: t.update({Q0A: torch.ones(2, 15)}), "q_proj;15"),
            ("E05 NaN in A", lambda t: t[Q0A].view(-1)[-1:].fill_(float("nan")), "q_proj;nan"),
            ("E05 NaN in B", lambda t: t[Q0B].view(-1)[-1:].fill_(float("nan")), "q_proj;nan"),
            ("E05 infinity in B", lambda t: t[Q0B].view(-1)[-1:].fill_(float("inf")),
             "q_proj;inf"),
            ("E05 int8", lambda t: t.update({Q0A: t[Q0A].to(torch.int8)}), "q_proj;I8"),
            ("E05 float8", lambda t: t.update({Q0B: t[Q0B].to(torch.float8_e4m3fn)}),
             "q_proj;F8_E4M3"),
            ("E05 bool", lambda t: t.update({Q0B: t[Q0B] > 0}), "q_proj;BOOL"),
            ("E05 float64 beyond float32", lambda t: t.update({Q0B: t[Q0B].double() * 1e300}),
             "q_proj;inf"),
            ("S03 a tensor named ../../x", lambda t: t.update({"../../x": torch.ones(1)}),
             "../../x"),
            ("S08 a tensor with an escape code", lambda t: t.update(
                {"\x1b[31m\nred": torch.ones(1)}), "red")):
        for program in ("generate", "lora"):
            out.append(case(f"{name}, {program}", tensors(WEIGHTS, edit_all), words, program))
    for dtype in ("bfloat16", "float16", "float64"):
        def cast(t: dict, dtype: str = dtype) -> None:
            t.update({key: w.to(getattr(torch, dtype)) for key, w in t.items()})

        out += [case(f"E16 in {dtype}, {p}", tensors(WEIGHTS, cast), "", p, "V")
                for p in ("generate", "lora")]
    return out


def weight_files() -> list[Case]:
    """E04 and E07: an adapter's two files as bytes, or as no file at all."""
    out, at = [], "adapter_model.safetensors"
    for name, change, words in (
            ("is empty", write(WEIGHTS, ""), "empty"), ("is cut", cut(WEIGHTS, -4), ""),
            ("is a header cut", cut(WEIGHTS, 50), ""), ("has a byte more", lambda place: (
                place / WEIGHTS).write_bytes((place / WEIGHTS).read_bytes() + b"x"), ""),
            ("is a pointer", write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\n"),
             "git lfs pull"), ("is a pipe", fifo(WEIGHTS), "pipe"),
            ("is /dev/zero", link(WEIGHTS, "/dev/zero"), "device"),
            ("is a folder", directory(WEIGHTS), "folder"), ("is missing", remove(WEIGHTS), ""),
            ("is a pickle", rename(WEIGHTS, "adapter/adapter_model.bin"), "adapter_model.bin"),
            ("has an overlap", header(WEIGHTS, lambda h: h | {Q0A: h[Q0A] | {
                "data_offsets": [0, 128]}}), "download it again")):
        out.append(case(f"E04 the weight file {name}", change, f"{at};{words}",
                        PROGRAMS[len(out) % 3]))
    config = "adapter_config.json"
    return out + [
        case("E07 config is a pipe", fifo(CONFIG), f"{config};pipe", "generate"),
        case("E07 config is /dev/zero", link(CONFIG, "/dev/zero"), f"{config};device", "lora"),
        case("E07 config is a folder", directory(CONFIG), f"{config};folder", "evaluate"),
        case("E07 config is missing", remove(CONFIG), f"{config} is missing", "generate")]


def other_base(place: Path) -> None:
    """model/ holds other weights of the same shapes."""
    tensors("model/model.safetensors", lambda t: [w.mul_(1.5) for w in t.values()])(place)


def merged(place: Path) -> None:
    """model/ is the merged model already."""
    import merging

    merging.merge(place / "model", [place / "adapter"], place / "new")
    (place / "model").rename(place / "old")
    (place / "new").rename(place / "model")


def bases() -> list[Case]:
    """E02, E03, E08, E13 and E14: what an adapter is put on, and where to."""
    base = "model/config.json"
    weights, out = "model/model.safetensors", []
    for program in PROGRAMS:
        out += [
            case(f"E02 other weights of the same shapes, {program}", other_base, "another base",
                 program),
            case(f"E08 merged twice, {program}", merged, "another base",
                 program)]

    def less(t: dict) -> None:
        for name in [n for n in t if "layers.1" in n]:
            del t[name]

    def more(t: dict) -> None:
        t |= {n.replace("layers.1", "layers.2"): t[n].clone() for n in list(t) if "layers.1" in n}

    for program in PROGRAMS:
        out += [
            case(f"E03 a base of one layer, {program}", several(
                tensors(weights, less), edit(base, num_hidden_layers=1)), "layers.1", program),
            case(f"E03 a base of three layers, {program}", several(
                tensors(weights, more), edit(base, num_hidden_layers=3)), "layers.2", program),
            case(f"E03 another model's adapter, {program}", lambda place: (
                (place / "adapter").rename(place / "mine"),
                (place / "other").rename(place / "adapter")), "down_proj;40", program)]
    return [
        *out,
        Case("E13 merging into the base folder", "lora", None, "--out DIR/model", "not empty"),
        Case("E13 merging into the adapter", "lora", None, "--out DIR/adapter", "not empty"),
        Case("E13 merging into a file", "lora", None, "--out DIR/data.jsonl", "data.jsonl"),
        Case("E13 merging below a file", "lora", None, "--out DIR/data.jsonl/x", "data.jsonl"),
        Case("E13 merging into an empty folder", "lora", directory("merged"), oracle="V"),
        Case("E13 merging into a new place", "lora", None, "--out DIR/a/b/c", oracle="V"),
        Case("E13 merging through a dangling link", "lora", link("merged", "nowhere"), "",
             "merged"),
        Case("E14 a merge was stopped before", "lora", write("tmp-merged-9/x", "x"), oracle="V"),
        Case("E05 merging into a NaN", "lora", tensors(weights, lambda t: t[
            "model.norm.weight"].fill_(float("nan"))), "", "model.norm.weight;nan"),
        Case("E05 merging into int8", "lora", tensors(weights, lambda t: t.update(
            {"lm_head.weight": t["lm_head.weight"].char()})), "", "lm_head.weight;I8"),
        Case("E05 merging makes an infinity", "lora", several(
            tensors(WEIGHTS, lambda t: [w.fill_(1e30) for w in t.values()])), "", "inf"),
        Case("E08 merging a quantised base", "lora", edit(
            base, quantization_config={"bits": 4}), "", "quantization_config"),
        Case("E08 merging without config.json", "lora", lambda place: (
            place / base).unlink(), "", "config.json is missing"),
        Case("E14 a pipe among the files to copy", "lora", fifo("model/extra.json"), "",
             "extra.json;pipe"),
        Case("E14 a device among the files to copy", "lora", link(
            "adapter/extra.json", "/dev/zero"), "", "extra.json;device"),
        Case("E13 no adapter at all", "generate", None, "--adapter DIR/none",
             "none;adapter_config.json"),
        Case("E13 the adapter is a file", "generate", None, "--adapter DIR/data.jsonl",
             "data.jsonl;is a file"),
        Case("E13 the adapter is the model", "evaluate", None, "--adapter DIR/model",
             "model;adapter_config.json"),
        Case("E13 the adapter is a hub id", "lora", None, "ONLY merge --model DIR/model --adapter "
             "no/such --out DIR/merged", "no/such;adapter_config.json")]


def second(place: Path) -> None:
    """again/ is another adapter of model/, on fewer layers."""
    import torch

    import lora
    import model

    net = model.load(place / "model", torch.float32)
    lora.inject(net, 3, 1.5, ["q_proj", "v_proj"])
    for layer in lora.adapters(net).values():
        layer.lora_B.data.fill_(0.1)
    lora.save(net, place / "again", "my/base")


def several_adapters() -> list[Case]:
    """E17: flags of merging two."""
    two, out = "--adapter DIR/again", []
    for flags, words in (
            ("--method ties --density 0.2", ""),
            ("--method linear --weight 1 --weight -0.5", ""),
            ("", "--method"), ("--method dare", "--method; dare; ties"),
            ("--method ties --weight 1", "--weight"),
            ("--method ties --density 0", "--density"),
            ("--method ties --density nan", "--density; nan"),
            ("--method ties --weight inf --weight 1", "--weight; inf"),
            ("--method ties --weight 1 --weight 1 --weight 1 --adapter DIR/other",
             "other; down_proj")):
        out.append(Case(f"E17 merging two, {flags or 'without a word'}", "lora", second,
                        f"{two} {flags}", words or "14 layers merged", "R" if words else "V"))
    return [*out, Case("E17 merging one by ties", "lora", None, "--method ties", "one --adapter"),
            Case("E17 merging one, trimmed", "lora", None, "--density 0.5", "14 layers", "V"),
            Case("E17 merging one twice", "lora", None, "--method ties --adapter DIR/adapter/",
                 "twice"),
            Case("E17 merging a link to itself", "lora", link("again", "adapter"),
                 f"--method ties {two}", "twice")]


def cases() -> list[Case]:
    return [*settings(), *weights(), *weight_files(), *bases(), *several_adapters()]
