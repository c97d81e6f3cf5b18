"""Weights on disk: which safetensors files a model has, every header checked before one is mapped.

    8 bytes: the length N of the header, little-endian
    N bytes: {"NAME": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the tensors one behind the other, without overlap, hole or rest
"""
import itertools
import math
import os
from pathlib import Path

import torch
from torch import Tensor

import strict

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # the others hold quantised weights, or none
ODD = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2,
       "I32": 4, "U32": 4, "I64": 8, "U64": 8, "C64": 8}
LIMIT = 100_000_000  # bytes of a header, as the format says
Header = dict[str, tuple[int, ...]]  # the shape of each tensor


def header(path: Path) -> Header:
    """{tensor name: shape} of a safetensors file of floating-point numbers, nothing odd in it."""
    if not strict.exists(path):
        raise ValueError(f"{path} is missing")
    with open(path, "rb") as file:
        start, size = file.read(99), os.fstat(file.fileno()).st_size
        length = int.from_bytes(start[:8], "little")
        file.seek(8)
        text = file.read(length) if size >= 8 and length <= min(LIMIT, size - 8) else b""
    try:
        if not text.startswith(b"{"):
            raise ValueError(f"a header of {length} bytes in a file of {size}")
        found = strict.parse(text.decode("utf-8"))
        about = found.pop("__metadata__", {})
        if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
            raise ValueError("__metadata__ is no object of texts")
        spans = sorted(span(name, entry) for name, entry in found.items())
        for (_, end, _), (begin, _, name) in itertools.pairwise([(0, 0, ""), *spans]):
            if begin != end:
                raise ValueError(f"{name} begins at {begin}, but what is before it ends at {end}")
        if (end := spans[-1][1] if spans else 0) != size - 8 - length:
            raise ValueError(f"{size - 8 - length} bytes of tensors where the header has {end}, "
                             f"the last of them {spans[-1][2] if spans else 'none'}")
    except ValueError as error:
        raise ValueError(f"{path} is no readable safetensors file: {error}{strict.sign(start)}: "
                         "download it again") from None
    for name, entry in found.items():
        if entry["dtype"] not in BYTES:
            raise ValueError(f"{path}: {name} is quantised to {entry['dtype']}, expected one of "
                             f"{', '.join(BYTES)}: give the original model")
    return {name: tuple(entry["shape"]) for name, entry in found.items()}


def span(name: str, entry: object) -> tuple[int, int, str]:
    """(begin, end, name) of a tensor's bytes.   ValueError where its entry does not add up."""
    keys = {"dtype", "shape", "data_offsets"}
    if "/" in name or not name.isprintable():
        raise ValueError(f"{strict.show(name)} is no name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != keys:
        raise ValueError(f"{name} has the entry {strict.show(entry)}, expected {sorted(keys)}")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    whole = all(isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)
                for numbers in (shape, place))
    width = (BYTES | ODD).get(dtype) if isinstance(dtype, str) else None
    if not width or not whole or len(place) != 2 or place[1] - place[0] != math.prod(shape) * width:
        raise ValueError(f"{name} is {strict.show(dtype)} of shape {strict.show(shape)} at "
                         f"{strict.show(place)}, which does not add up")
    return place[0], place[1], name


def headers(folder: Path) -> dict[Path, Header]:
    """The header of each weight file: the one, or those its index lists, which must agree."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not strict.exists(index):
        if not strict.exists(single):
            beside = [p.name for e in ("bin", "pt", "pth", "ckpt", "h5", "gguf")
                      for p in sorted(folder.glob(f"*.{e}"))]
            found = f"found only {beside[:4]}, pickles or other formats, which are never loaded" \
                ": convert them once with transformers' save_pretrained" if beside else (
                    f"{strict.found(folder)}: download it")
            raise ValueError(f"{folder} has no {single.name}, {found}")
        return {single: header(single)}
    if strict.exists(single):
        raise ValueError(f"{folder} holds both {single.name} and {index.name}: remove one")
    places = strict.read_json(index, 64 << 20).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{index}: weight_map is {strict.show(places)}, expected an object of "
                         "tensor names and their files: download it again")
    for name, shard in places.items():
        if type(shard) is not str or Path(shard).name != shard or not (
                shard.strip(".") and shard.isprintable()):
            raise ValueError(f"{index}: {name} lies in {strict.show(shard)}, which is no file or "
                             "points outside the folder: download the index again")
        if not shard.endswith(".safetensors") or not strict.exists(folder / shard):
            raise ValueError(f"{folder} has no {shard} in safetensors, which {index.name} lists: "
                             "download it")
    out = {folder / shard: header(folder / shard) for shard in sorted(set(places.values()))}
    for path, found in out.items():
        listed = {name for name, shard in places.items() if shard == path.name}
        if odd := found.keys() ^ listed:
            raise ValueError(f"{index} and {path.name} differ in {len(odd)} tensors, first "
                             f"{min(odd)}, which the {'file' if min(odd) in listed else 'index'} "
                             "lacks there: download both again")
    return out


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """ValueError names the first NaN or infinity of a tensor and where it lies."""
    if tensor.numel() and not torch.isfinite(torch.stack(tensor.aminmax())).all():
        place = (~tensor.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"{path}: {name} holds {tensor[tuple(place)].item()} at {place}, expected "
                         "no NaN or infinity: the file is damaged, download it again")
