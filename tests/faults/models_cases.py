"""Families M01 to M33: model folders that are damaged, foreign or hostile."""
import gzip
import json
from pathlib import Path

from faults.case import (
    Case,
    Change,
    cut,
    directory,
    edit,
    fifo,
    header,
    link,
    real,
    remove,
    rename,
    several,
    tensors,
    write,
)

CONFIG, WEIGHTS, INDEX = "model/config.json", "model/model.safetensors", \
    "model/model.safetensors.index.json"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "head_dim")
PROGRAMS = ("generate", "evaluate", "train")
NORM, UP = "model.norm.weight", "model.layers.1.mlp.up_proj.weight"
HTML = "<!DOCTYPE html><html><head><title>404</title></head><body>Not found</body></html>"
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:12345\nsize 1234\n"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
SAID = (  # keys of config.json, and words of the message
    ("M05 eps is one", {"rms_norm_eps": 1}, "rms_norm_eps;1"),
    ("M05 eps is 1.0", {"rms_norm_eps": 1.0}, "rms_norm_eps;1.0"),
    ("M06 heads do not divide", {"head_dim": ..., "num_attention_heads": 3}, "3;heads"),
    ("M06 three kv heads", {"num_key_value_heads": 3}, "3 kv heads"),
    ("M06 more kv heads than heads", {"num_key_value_heads": 8}, "8 kv heads"),
    ("M06 an odd head", {"head_dim": 7}, "head_dim;7"),
    ("M07 a layer more", {"num_hidden_layers": 3}, "9 tensors are missing;layers.2"),
    ("M07 a thousand layers", {"num_hidden_layers": 1000}, "num_hidden_layers;1000"),
    ("M08 a layer less", {"num_hidden_layers": 1}, "have no place;layers.1"),
    ("M30 model_type is a list", {"model_type": ["llama"]}, "model_type"),
    ("M30 model_type is null", {"model_type": None}, "model_type"),
    ("M30 relu2", {"hidden_act": "relu2"}, "hidden_act;relu2"),
    ("M30 act is a list", {"hidden_act": ["silu"]}, "hidden_act"),
    ("M30 attention_bias", {"attention_bias": True}, "attention_bias"),
    ("M30 mlp_bias", {"mlp_bias": True}, "mlp_bias"),
    ("M30 qwen2 without its biases", {"model_type": "qwen2"}, "bias;missing"),
    ("M30 qwen3 without its norms", {"model_type": "qwen3"}, "k_norm;missing"),
    ("M30 experts", {"num_local_experts": 8}, "num_local_experts"),
    ("M30 gemma", {"model_type": "gemma2"}, "model_type;gemma2"),
    ("M25 tie is a string", {"tie_word_embeddings": "false"}, "tie_word_embeddings;'fal"),
    ("M25 tie is 1", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
    ("M15 quantisation", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("M31 hidden 10^8", {"hidden_size": 10**8}, "100000000"),
    ("M31 layers 10^9", {"num_hidden_layers": 10**9}, "num_hidden_layers;1000000000"),
    ("M31 layers 9999", {"num_hidden_layers": 9999}, "num_hidden_layers;9999"),
    ("M31 heads 10^9", {"num_attention_heads": 10**9}, "num_attention_heads"),
    ("M31 all 10^8", {k: 10**8 for k in SIZES if "num" not in k}, "100000000"),
    ("M28 partial rotary", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("M28 rope_scaling is a list", {"rope_scaling": [1]}, "rope_scaling"),
    ("M28 rope_scaling is a string", {"rope_scaling": "linear"}, "rope_scaling"),
    ("M28 rope_parameters is 7", {"rope_parameters": 7}, "rope_parameters"),
    ("M28 rope per layer kind", {"rope_parameters": {"full_attention": {"rope_type": "x"},
                                                    "rope_theta": 5.0}}, "rope"),
    ("M28 rope_type is a list", {"rope_scaling": {"rope_type": []}}, "rope_type"),
    ("M28 layer_types is a string", {"layer_types": "full_attention"}, "layer_types"),
    ("M28 layer_types is 3", {"layer_types": 3}, "layer_types"),
    ("M28 an unknown layer type", {"layer_types": ["full_attention", "mamba"]},
     "layer_types;mamba"),
    ("M28 a list as layer type", {"layer_types": [[], []]}, "layer_types"),
    ("M28 one layer type", {"layer_types": ["full_attention"]}, "layer_types"),
    ("M28 max_window_layers is a string", {
        "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4,
        "max_window_layers": "x"}, "max_window_layers;'x'"),
    ("M28 use_sliding_window is a string", {
        "model_type": "qwen2", "use_sliding_window": "no", "sliding_window": 4},
     "use_sliding_window;'no'"))


def intact() -> list[Case]:
    return [
        Case("M00 nothing is wrong, generate", "generate", None, oracle="V"),
        Case("M00 nothing is wrong, train", "train", None, oracle="V", words="uft"),
        Case("M00 nothing is wrong, evaluate", "evaluate", None, oracle="V", words="40 rows"),
        Case("M00 nothing is wrong, merge", "lora", None, oracle="V", words="14 layers merged"),
        Case("M00 the adapter is read", "generate", None, "--adapter DIR/adapter", oracle="V"),
    ]


def text_faults() -> list[Case]:
    """M01 and M02: config.json as bytes."""
    at = "config.json"
    out = [Case(f"M01 config.json cut after {n} bytes", PROGRAMS[i % 3], cut(CONFIG, n), "", at)
           for i, n in enumerate((1, 2, 10, 20, 40, 80, 120, 200, 280, 360, 440, 520, 600, -2))]
    nested = "[" * 100_000
    for name, content, words in (
            ("is empty", "", "empty"), ("is a list", "[]", "list;object"),
            ("is a number", "7", "int;object"), ("is null", "null", "object"),
            ("is a string", '"mistral"', "object"), ("is blank", " \n ", ""),
            ("is YAML", "model_type: mistral\nvocab_size: 3\n", "line 1;column 1"),
            ("is a web page", HTML, "web page"), ("is a pointer", LFS, "git lfs pull"),
            ("is gzip", gzip.compress(b"{}"), "gzip"), ("has single quotes", "{'a': 1}", "line 1"),
            ("ends in a comma", '{"model_type": "mistral",\n}', "line 2"),
            ("has text behind", '{"model_type": "mistral"}\n{}', "line 2"),
            ("is 100,000 deep", nested, "deep"), ("is a deep object", '{"a":' * 100_000, "deep"),
            ("is 100 MB", b" " * 100_000_000, "bytes"),
            ("has a comment", '{"model_type": "mistral" // kind\n}', "line 1"),
            ("has a control character", b'{"model\x00_type": "mistral"}', "line 1")):
        out.append(Case(f"M01 config.json {name}", PROGRAMS[len(out) % 3], write(CONFIG, content),
                        "", f"{at};{words}"))
    def encoded(code: str) -> Change:
        return lambda place: (place / CONFIG).write_text(
            (place / CONFIG).read_text("utf-8"), code)

    out += [
        Case("M01 no config.json", "train", remove(CONFIG), words="config.json is missing"),
        Case("M01 a 5000-digit integer", "train", write(CONFIG, '{"vocab_size": ' + "9" * 5000
                                                        + "}"), "", at),
        Case("M01 a key twice", "generate", lambda place: (place / CONFIG).write_text(
            (place / CONFIG).read_text().replace("{", '{"rms_norm_eps": 1e-6,', 1)), "",
            "config.json;'rms_norm_eps';twice"),
        Case("M02 config.json with a byte order mark", "generate", encoded("utf-8-sig"),
             oracle="V"),
        Case("M02 config.json in UTF-16", "generate", encoded("utf-16"), "", f"{at};UTF-16"),
        Case("M02 config.json in UTF-16 without mark", "train", encoded("utf-16-le"), "",
             f"{at};UTF-16"),
        Case("M02 config.json in UTF-32", "evaluate", encoded("utf-32"), "", f"{at};UTF-32"),
        Case("M02 config.json in latin-1", "train", lambda place: (place / CONFIG).write_bytes(
            (place / CONFIG).read_bytes().replace(b"mistral", b"mistr\xe9l")), "",
            f"{at};UTF-8;byte 0xe9")]
    return out


def number_faults() -> list[Case]:
    """M03 to M09, M30 and M31: what config.json says."""
    out, odd = [], {"a string": "7", "a fraction": 8.5, "true": True, "null": None, "a list": [2],
                    "negative": -1, "zero": 0, "huge": 10**12, "an object": {"a": 1}}
    for key in SIZES:
        out.append(Case(f"M03 no {key}", PROGRAMS[len(out) % 3], edit(CONFIG, **{key: ...}), "",
                        "k_proj" if key == "head_dim" else f"config.json;{key}"))
        for name, value in odd.items():
            words = "k_proj" if (key, name) == ("head_dim", "null") else f"config.json;{key}"
            out.append(Case(f"M04 {key} is {name}", PROGRAMS[len(out) % 3],
                            edit(CONFIG, **{key: value}), "", words))
    for key in ("rms_norm_eps", "rope_theta", "sliding_window"):
        for name, value in (odd | {"NaN": float("nan"), "infinite": float("inf"), "astronomic":
                                   10**400, "minus infinite": -float("inf")}).items():
            good = (key, name) == ("sliding_window", "null")
            if name != "a fraction" and (key, name) != ("rope_theta", "huge"):
                out.append(Case(f"M05 {key} is {name}", "evaluate" if good else "generate",
                                edit(CONFIG, rope_parameters=..., **{key: value}), "",
                                "" if good else f"config.json;{key}", "V" if good else "R"))
    for key in ("rms_norm_eps", "rope_theta", "hidden_act", "model_type"):
        out.append(Case(f"M03 no {key}", "generate", edit(
            CONFIG, **({"rope_parameters": ...} | {key: ...})), "",
                        f"config.json;{key}"))
    for name, keys, words in SAID:
        out.append(Case(name, PROGRAMS[len(out) % 3],
                        edit(CONFIG, **({"rope_parameters": ...} | keys)), "",
                        f"config.json;{words}" if "missing" not in words and "no place" not in words
                        and "10000" not in words else words))
    for kind in ("yarn", "dynamic", "longrope", "su", "mrope", "ntk"):
        out.append(Case(f"M28 rope {kind}", "generate", edit(
            CONFIG, rope_parameters=..., rope_scaling={"type": kind, "factor": 4.0}), "",
            f"rope_type;{kind}"))
    for key, value in (("factor", 0), ("factor", "8"), ("factor", None), ("factor", float("nan")),
                       ("low_freq_factor", 4.0), ("high_freq_factor", 0.5), ("factor", 10**400),
                       ("original_max_position_embeddings", -1)):
        out.append(Case(f"M28 llama3 {key} {str(value)[:5]}", "generate", edit(
            CONFIG, rope_parameters=..., rope_scaling=LLAMA3 | {key: value}), "",
            f"config.json;{key}"))
    return out + [
        Case("M09 vocab one more", "evaluate", edit(CONFIG, vocab_size=299), "", "(298, 16);299"),
        Case("M09 vocab one less", "generate", edit(CONFIG, vocab_size=297), "", "297"),
        Case("M03 llama without its kv heads", "generate", edit(
            CONFIG, model_type="llama", num_key_value_heads=...), "", "k_proj"),
        Case("M03 llama's theta may be absent", "generate", edit(
            CONFIG, model_type="llama", rope_theta=..., rope_parameters=...), oracle="V"),
        Case("M28 llama3 as published", "generate", edit(
            CONFIG, rope_parameters=..., rope_scaling=LLAMA3), oracle="V")]


def tensor_faults() -> list[Case]:
    """M10 to M16, M25 and S13: what the weights are."""
    import torch

    names = ["lm_head.weight", "model.embed_tokens.weight", NORM] + [
        f"model.layers.0.{n}.weight" for n in (
            "input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.down_proj",
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")] + [UP]
    out = [Case(f"M10 no {name}", PROGRAMS[i % 3], tensors(WEIGHTS, lambda t, n=name: t.pop(n)), "",
                f"missing;{name}") for i, name in enumerate(names)]
    for i, name in enumerate(names):
        for value in (float("nan"), float("inf")):
            def poison(t: dict, name: str = name, value: float = value) -> None:
                t[name].view(-1)[-1] = value

            out.append(Case(f"M14 {value} in {name}", PROGRAMS[i % 3], tensors(WEIGHTS, poison),
                            "", f"model.safetensors;{name};{value};["))
    for dtype in ("int8", "uint8", "int32", "bool", "float8_e4m3fn", "float8_e5m2", "complex64"):
        def cast(t: dict, dtype: str = dtype) -> None:
            t[UP] = t[UP].to(getattr(torch, dtype))

        out.append(Case(f"M15 {dtype} weights", "generate", tensors(WEIGHTS, cast), "",
                        f"model.safetensors;{UP}"))
    def mixed(t: dict) -> None:
        for i, name in enumerate(t):
            t[name] = t[name].to((torch.float16, torch.bfloat16, torch.float64)[i % 3])

    shapes = {"transposed": lambda w: w.T, "of one dimension": lambda w: w.flatten(),
              "of three": lambda w: w[None], "a row short": lambda w: w[:-1],
              "empty": lambda w: w[:0], "a number": lambda w: w[0, 0]}
    out += [Case(f"M12 a matrix {name}", PROGRAMS[i % 3], tensors(
        WEIGHTS, lambda t, f=f: t.update({UP: f(t[UP])})), "", f"{UP};shape;(24, 16)")
        for i, (name, f) in enumerate(shapes.items())]
    return [*out, Case("M16 three dtypes", "generate", tensors(WEIGHTS, mixed), oracle="V")]


def other_tensor_faults() -> list[Case]:
    """M11, M16, M25 and S13: one more tensor, ties, and odd numbers."""
    import torch

    twin = "model.embed_tokens.weight"
    return [
        Case("M11 an extra tensor", "generate", tensors(
            WEIGHTS, lambda t: t.update({"model.layers.0.extra": torch.ones(1)})), "",
            "have no place;model.layers.0.extra"),
        Case("M11 rotary frequencies", "generate", tensors(WEIGHTS, lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})), oracle="V"),
        Case("M16 float64 beyond float32", "generate", tensors(WEIGHTS, lambda t: t.update(
            {UP: t[UP].double() * 1e300})), "", f"{UP};inf"),
        Case("M16 float32 beyond float16 is read in bfloat16", "generate", None,
             "--dtype bfloat16", oracle="V"),
        Case("M25 tied with another head", "generate", edit(CONFIG, tie_word_embeddings=True), "",
             "lm_head.weight;tie_word_embeddings is True"),
        Case("M25 tied with its own head", "generate", several(
            tensors(WEIGHTS, lambda t: t.update({"lm_head.weight": t[twin].clone()})),
            edit(CONFIG, tie_word_embeddings=True)), oracle="V"),
        Case("M25 tied without a head", "generate", several(
            tensors(WEIGHTS, lambda t: t.pop("lm_head.weight")),
            edit(CONFIG, tie_word_embeddings=True)), oracle="V"),
        Case("M25 tied without embedding", "generate", several(
            tensors(WEIGHTS, lambda t: t.pop(twin)), edit(CONFIG, tie_word_embeddings=True)), "",
            f"missing;{twin}"),
        Case("M25 a NaN in a tied head", "generate", several(
            tensors(WEIGHTS, lambda t: t.update({"lm_head.weight": t[twin] * float("nan")})),
            edit(CONFIG, tie_word_embeddings=True)), "", "lm_head.weight"),
        Case("S13 denormal weights", "generate", tensors(
            WEIGHTS, lambda t: t.update({UP: t[UP] * 1e-40})), oracle="V"),
        Case("S13 NaN with a payload", "generate", tensors(WEIGHTS, lambda t: t.update(
            {NORM: torch.full((16,), 0x7FC12345, dtype=torch.int32).view(torch.float32)})), "",
            f"{NORM};nan")]


def entry(**keys) -> Change:
    return header(WEIGHTS, lambda h: h | {UP: h[UP] | keys})


def moved(by: tuple[int, int]) -> Change:
    return header(WEIGHTS, lambda h: h | {UP: h[UP] | {"data_offsets": [
        a + b for a, b in zip(h[UP]["data_offsets"], by, strict=True)]}})


def twice(h: dict) -> str:
    return json.dumps(h).replace("{", f'{{"{NORM}": {json.dumps(h[NORM])},', 1)


def sparse(place: Path) -> None:
    with open(place / WEIGHTS, "wb") as file:
        file.write((100_000_001).to_bytes(8, "little") + b"{")
        file.truncate(200_000_000)


def byte_faults() -> list[Case]:
    """M18 to M20: safetensors byte by byte."""
    at, again = "model.safetensors", "model.safetensors;download it again"
    out = [Case(f"M18 weights cut after {n} bytes", PROGRAMS[i % 3], cut(WEIGHTS, n), "", again)
           for i, n in enumerate((1, 7, 8, 9, 100, 1000, 2000, 3000, 5000, 20000, -1, -4))]

    def size(n: int) -> Change:
        return lambda place: (place / WEIGHTS).write_bytes(
            n.to_bytes(8, "little") + (place / WEIGHTS).read_bytes()[8:])

    out += [Case(f"M18 header of {n} bytes", "generate", size(n), "", again)
            for n in (0, 1, 2**63, 2**64 - 1, 10**9, 100_000_001, 10**6)]

    for name, change, words in (
            ("is empty", write(WEIGHTS, ""), "empty"),
            ("header is no JSON", header(WEIGHTS, lambda h: str(h)), ""),
            ("header is a list", header(WEIGHTS, lambda h: "[1]"), ""),
            ("header is bad UTF-8", header(WEIGHTS, lambda h: b'{"\xff\xfe": 1}'), "utf-8"),
            ("header is 100,000 deep", header(WEIGHTS, lambda h: '{"a":' * 100_000), "deep"),
            ("overlap", moved((-4, -4)), UP), ("a hole", moved((4, 4)), UP),
            ("negative offset", entry(data_offsets=[-4, 4]), UP),
            ("offsets turned", entry(data_offsets=[1536, 0]), UP),
            ("offsets beyond the end", moved((10**9, 10**9)), ""),
            ("offsets of 2^63", entry(data_offsets=[2**63, 2**63 + 1536]), ""),
            ("offsets are strings", entry(data_offsets=["0", "1536"]), UP),
            ("three offsets", entry(data_offsets=[0, 1, 2]), UP),
            ("no offsets", header(WEIGHTS, lambda h: h | {UP: {"dtype": "F32", "shape": [1]}}), UP),
            ("unknown dtype", entry(dtype="F33"), f"{UP};F33"),
            ("dtype is null", entry(dtype=None), UP), ("shape is null", entry(shape=None), UP),
            ("negative shape", entry(shape=[-24, -16]), UP),
            ("fractional shape", entry(shape=[24.0, 16]), UP),
            ("shape of true", entry(shape=[True, 384]), UP),
            ("size overflows", entry(shape=[2**40, 2**40, 2**40]), UP),
            ("size does not fit", entry(shape=[24, 17]), UP),
            ("an entry is a list", header(WEIGHTS, lambda h: h | {UP: [1]}), UP),
            ("an unknown key", entry(stride=[1, 1]), f"{UP};stride"),
            ("metadata is a list", header(WEIGHTS, lambda h: h | {"__metadata__": [1]}),
             "__metadata__"),
            ("metadata of numbers", header(WEIGHTS, lambda h: h | {"__metadata__": {"a": 1}}),
             "__metadata__"),
            ("trailing bytes", lambda place: (place / WEIGHTS).write_bytes(
                (place / WEIGHTS).read_bytes() + b"xx"), "59970;59968")):
        out.append(Case(f"M18 {name}", PROGRAMS[len(out) % 3], change, "", f"{again};{words}"))

    return out + [
        Case("M18 a header of 100 MB", "generate", sparse, "", f"{again};100000001"),
        Case("M20 a tensor twice", "generate", header(WEIGHTS, twice), "", f"{at};{NORM};twice"),
        Case("M20 a leading space", "generate", header(WEIGHTS, lambda h: " " + json.dumps(h)), "",
             at),
        Case("M19 a pointer of git lfs", "generate", write(WEIGHTS, LFS), "", f"{at};git lfs pull"),
        Case("M19 a web page", "evaluate", write(WEIGHTS, HTML), "", f"{at};web page"),
        Case("M19 gzip", "train", write(WEIGHTS, gzip.compress(b"x" * 99)), "", f"{at};gzip"),
        Case("M19 zip", "train", write(WEIGHTS, b"PK\x03\x04" + b"x" * 99), "", f"{at};zip"),
        Case("M19 merging a pointer", "lora", write(WEIGHTS, LFS), "", f"{at};git lfs pull")]


def split(place: Path) -> None:
    """The one weight file becomes a.safetensors and b.safetensors with an index."""
    from safetensors.torch import load_file, save_file

    state = load_file(place / WEIGHTS)
    where = {n: "ab"[i % 2] + ".safetensors" for i, n in enumerate(state)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({n: t for n, t in state.items() if where[n] == file}, place / "model" / file)
    size = sum(t.nbytes for t in state.values())
    (place / INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": where}))
    (place / WEIGHTS).unlink()


def lists(name: str, value: object) -> Change:
    def change(place: Path) -> None:
        raw = json.loads((place / INDEX).read_text())
        raw["weight_map"][name] = value
        (place / INDEX).write_text(json.dumps(raw))

    return several(split, change)


def flip(name: str, both: bool) -> Change:
    """The index, or the other shard as well, says otherwise where a tensor lies."""
    def change(place: Path) -> None:
        raw = json.loads((place / INDEX).read_text())
        here = raw["weight_map"][name]
        there = ("b" if here[0] == "a" else "a") + here[1:]
        if both:
            import torch

            tensors(f"model/{there}", lambda t: t.update({name: torch.ones(16)}))(place)
        else:
            raw["weight_map"][name] = there
            (place / INDEX).write_text(json.dumps(raw))

    return several(split, change)


def index_faults() -> list[Case]:
    """M21 to M24: shards and their index."""
    a, b = "model/a.safetensors", "model/b.safetensors"
    at = "model.safetensors.index.json"
    out = [Case(f"M22 a shard at {where!a}", PROGRAMS[i % 3], lists(NORM, where), "",
                f"{at};outside the folder") for i, where in enumerate(
                    ("../a.safetensors", "/etc/passwd", "sub/../../a.safetensors", "..", ".",
                     "./a.safetensors", "sub/a.safetensors", "", "\u0000x", "a\nb/c"))]
    for name, change, words in (
            ("M21 a shard is missing", several(split, remove(b)), "b.safetensors"),
            ("M21 a shard is empty", several(split, write(b, "")), "b.safetensors;empty"),
            ("M21 a shard is a pointer", several(split, write(b, LFS)), "b.safetensors;git lfs"),
            ("M21 a shard is cut", several(split, cut(b, -8)), "b.safetensors"),
            ("M21 a shard is a folder", several(split, directory(b)), "b.safetensors;folder"),
            ("M21 a shard is a pipe", several(split, fifo(b)), "b.safetensors;pipe"),
            ("M23 a tensor in another shard", flip(NORM, False), NORM),
            ("M23 a head in another shard", flip("lm_head.weight", False), "lm_head.weight"),
            ("M23 a tensor that no shard holds", lists("model.zork", "a.safetensors"),
             f"{at};model.zork"),
            ("M23 both shards hold it", flip(NORM, True), NORM),
            ("M23 a tensor the index forgets", several(split, lambda place: edit(
                INDEX, weight_map={n: s for n, s in json.loads((place / INDEX).read_text())[
                    "weight_map"].items() if n != NORM})(place)), NORM),
            ("M21 index is empty", several(split, write(INDEX, "")), f"{at};empty"),
            ("M21 index is cut", several(split, cut(INDEX, 300)), at),
            ("M21 index is a list", several(split, write(INDEX, "[]")), at),
            ("M21 no weight_map", several(split, edit(INDEX, weight_map=...)), f"{at};weight_map"),
            ("M21 weight_map is a list", several(split, edit(INDEX, weight_map=[["a", "b"]])),
             f"{at};weight_map"),
            ("M21 weight_map is empty", several(split, edit(INDEX, weight_map={})),
             f"{at};weight_map"),
            ("M21 a shard is a number", lists(NORM, 7), f"{at};7"),
            ("M21 a shard is null", lists(NORM, None), at),
            ("M21 a shard is a list", lists(NORM, ["a.safetensors"]), at),
            ("M22 a shard is a pickle", lists(NORM, "pytorch_model.bin"), "pytorch_model.bin"),
            ("M24 both kinds", several(split, lambda place: (place / a).rename(place / WEIGHTS)),
             "both"),
            ("M23 the last shard is poisoned", several(split, tensors(b, lambda t: t[
                NORM if NORM in t else min(t)].view(-1).fill_(float("nan")))),
             "b.safetensors;nan")):
        out.append(Case(name, PROGRAMS[len(out) % 3], change, "", words))
    return out + [
        Case("M21 two good shards", "generate", split, oracle="V"),
        Case("M21 two good shards, merged", "lora", split, oracle="V", words="14 layers"),
        Case("M21 merging without a shard", "lora", several(split, remove(b)), "",
             "b.safetensors"),
        Case("M23 a wrong total is not read", "generate", several(
            split, edit(INDEX, metadata={"total_size": "5"})), oracle="V"),
        Case("M21 no total", "generate", several(split, edit(INDEX, metadata=...)), oracle="V")]


def cache(place: Path) -> None:
    (place / "blobs").mkdir()
    for i, path in enumerate((place / "model").iterdir()):
        path.rename(place / f"blobs/{i}")
        path.symlink_to(f"../blobs/{i}")


def file_faults() -> list[Case]:
    """M17, M26, M27 and M33: what is no regular file, and names."""
    out = [Case(f"M17 only {name}", PROGRAMS[i % 3], rename(WEIGHTS, f"model/{name}"), "",
                f"model.safetensors;{name}") for i, name in enumerate(
                    ("pytorch_model.bin", "model.pt", "model.ckpt", "consolidated.00.pth",
                     "tf_model.h5", "model.gguf"))]
    for i, name in enumerate(("config.json", "model.safetensors", "tokenizer.json",
                              "tokenizer_config.json", "generation_config.json",
                              "chat_template.jinja", "model.safetensors.index.json")):
        path, program = f"model/{name}", PROGRAMS[i % 3]
        flags = "--template checkpoint" if name == "chat_template.jinja" else ""
        out += [
            Case(f"M26 {name} is a pipe", program, fifo(path), flags, f"{name};pipe"),
            Case(f"M26 {name} is /dev/zero", program, link(path, "/dev/zero"), flags,
                 f"{name};device"),
            Case(f"M26 {name} is a folder", program, directory(path), flags, f"{name};folder"),
            Case(f"M26 {name} is a dangling link", program, link(path, "nowhere"), flags, name),
            Case(f"M26 {name} links to itself", program, link(path, name), flags, name)]

    for name in ("with spaces", "\U0001f600 smile", "back\\slash", "quote'd", "percent%20", "-dash",
                 "tab\there", "semi;colon", "100" + "x" * 200, "[brackets]"):
        out.append(Case(f"M27 a folder named {name!a}", "generate", lambda place, n=name: (
            place / "model").rename(place / real(n)), "ONLY --prompt hi --template plain "
            f"--max_new_tokens 2 --model 'DIR/{name}'".replace("quote'd", "quote'\"'\"'d"),
            oracle="V"))
    return out + [
        Case("M26 files as in a hub cache", "generate", cache, oracle="V"),
        Case("M27 a folder with a trailing slash", "generate", None, "--model DIR/model/",
             oracle="V"),
        Case("M27 a relative folder", "generate", None, "--model ./model/../model", oracle="V"),
        Case("M27 a newline in the name", "generate", lambda place: (place / "model").rename(
            place / "a\nb"), "--model 'DIR/a\nb'", oracle="V"),
        Case("M27 a newline in the name of nothing", "generate", None, "--model 'DIR/a\nb'",
             "a\\nb"),
        Case("M27 an escape code in the name of nothing", "generate", None,
             "--model 'DIR/\x1b[31mred'", "\\x1b[31mred"),
        Case("M27 merging into the name of nothing", "lora", None, "--model 'DIR/a\nb'", "a\\nb"),
        Case("M27 the folder is the weight file", "generate", None,
             "--model DIR/model/model.safetensors", "model.safetensors;is a file"),
        Case("M27 the folder is a file", "train", None, "--model DIR/data.jsonl",
             "data.jsonl;is a file"),
        Case("M27 the folder is empty", "evaluate", lambda place: (place / "empty").mkdir(),
             "--model DIR/empty", "empty;no tokenizer.json"),
        Case("M27 the folder is a pipe", "evaluate", fifo("p"), "--model DIR/p", "DIR/p"),
        Case("M27 the folder links to itself", "train", link("p", "p"), "--model DIR/p", "DIR/p"),
        Case("M27 a name of 5000 letters", "generate", None, "--model DIR/" + "x" * 5000, "xxx"),
        Case("M27 no name at all", "generate", None, "--model ''", "tokenizer.json"),
        Case("M27 the folder is the adapter", "evaluate", None, "--model DIR/adapter",
             "adapter;no tokenizer.json"),
        Case("M33 a hub id", "generate", None, "--model no/such-model",
             "no/such-model;fetching it failed"),
        Case("M33 a hub id to train", "train", None, "--model meta-llama/Llama-3.2-1B",
             "meta-llama/Llama-3.2-1B;fetching it failed"),
        Case("M33 a hub id to merge", "lora", None, "--model no/such-model", "no/such-model"),
        Case("M33 a hub id with dots", "evaluate", None, "--model no/..", "no/.."),
        Case("M33 an id without owner", "evaluate", None, "--model gpt2", "gpt2;no such folder"),
        Case("M33 a web address", "evaluate", None, "--model https://huggingface.co/gpt2", "gpt2")]


def cases() -> list[Case]:
    return [*intact(), *text_faults(), *number_faults(), *tensor_faults(), *other_tensor_faults(),
            *byte_faults(), *index_faults(), *file_faults()]
