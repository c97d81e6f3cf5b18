"""strict.py, weights.py and bounds.py: what comes from outside is as expected, or named."""
import json
import os
import re

import pytest

import bounds
import strict
import weights

TEXTS = {
    b"\0\0\0\0": "is no text in UTF-8", b"{\0}\0": "it is UTF-16", b'{"a": "\xe9"}': "0xe9 at off",
    b'{"a": 1, "b": 2, "a": 3}': "'a' is there twice", b'{"a": NaN}': "'a' is nan, expected",
    b'{"a": ' * 99999: "nested too deep", b"[1]": "it holds a list, expected an object",
    b"{\n  3}": "not valid JSON at line 2, column 3", b"": "it is empty", b"\x1f\x8b": "gzip: unp",
    b"{" + b" " * 100 + b"}": "has 102 bytes, expected 99 at most"}


@pytest.mark.parametrize("content", TEXTS, ids=range(len(TEXTS)))
def test_a_json_file_is_one_object_of_finite_numbers_or_refused(tmp_path, content):
    """With the file's name, and what it is instead.
    Red: strict.py:read_text: `if b"\\0" not in data[:4]` -> `if True`
    Red: strict.py:read_text: `except UnicodeDecodeError` -> `except KeyError`
    Red: strict.py:parse: `if len(found) < len(pairs)` -> `if False`
    Red: strict.py:parse: `not isfinite(value)` -> `False`
    Red: strict.py:parse: `except RecursionError` -> `except KeyError`
    Red: strict.py:parse: `if type(found) is not dict` -> `if False`
    Red: strict.py:read_text: `.st_size) > limit` -> `.st_size) < 0`"""
    path = tmp_path / "x.json"
    path.write_bytes(content)
    most = 99 if content.endswith(b" }") else 1 << 20
    with pytest.raises(ValueError, match=rf"x\.json.*{re.escape(TEXTS[content])}"):
        strict.read_json(path, most)
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert strict.read_json(path) == strict.optional_json(path) == {"a": 1}


def test_what_is_no_file_is_named(tmp_path):
    """Nothing is opened that could hang.
    Red: strict.py:exists: `if os.path.islink(path)` -> `if False`
    Red: strict.py:exists: `except NotADirectoryError` -> `except KeyError`
    Red: strict.py:exists: `if kind != stat.S_IFREG` -> `if False`
    Red: strict.py:read_text: `if not exists(path)` -> `if False`"""
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "none")
    os.mkfifo(tmp_path / "pipe")
    for name, told in (("link", "is a link to nothing"), ("pipe", "is a pipe, expected a file"),
                       ("file/x", "file is a file, expected a folder"), ("none", "is missing"),
                       (".", "is a folder, expected a file")):
        with pytest.raises(ValueError, match=told):
            (strict.read_text if name == "none" else strict.exists)(tmp_path / name)
    assert strict.optional_json(tmp_path / "none") == {}


GOOD = {"dtype": "F32", "shape": [2, 1], "data_offsets": [0, 8]}
HEADERS = {
    '{"__metadata__": {"a": 1}}': "__metadata__ is no object of texts",
    json.dumps({"w": GOOD | {"data_offsets": [4, 12]}}): "w begins at 4, but what is before it",
    json.dumps({"a/b": GOOD}): "'a/b' is no name of a tensor", '{"w": 3}': "w has the entry 3",
    json.dumps({"w": GOOD | {"shape": [2, 2]}}): "w is 'F32' of shape [2, 2] at [0, 8], which does",
    json.dumps({"w": GOOD | {"dtype": "I64", "shape": [1]}}): "quantised to I64"}


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_a_header_that_does_not_add_up_is_refused(tmp_path, header):
    """Before anything is mapped.
    Red: weights.py:header: `if begin != end` -> `if False`
    Red: weights.py:header: `not isinstance(about, dict) or not all(` -> `False and all(`
    Red: weights.py:span: `if "/" in name or not name.isprintable()` -> `if False`
    Red: weights.py:span: `if not isinstance(entry, dict) or` -> `if`
    Red: weights.py:span: `!= math.prod(shape) * width` -> `< 0`
    Red: weights.py:header: `if entry["dtype"] not in BYTES` -> `if False`"""
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0" * 8)
    with pytest.raises(ValueError, match=rf"x\.safetensors.*{re.escape(HEADERS[header])}"):
        weights.header(path)


def test_weights_are_in_one_place(tmp_path):
    """Red: weights.py:header: `if not strict.exists(path)` -> `if False`
    Red: weights.py:headers: `    if strict.exists(single):` -> `    if False:`"""
    with pytest.raises(ValueError, match="x is missing"):
        weights.header(tmp_path / "x")
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="holds both model.safetensors and .*: remove one"):
        weights.headers(tmp_path)


@pytest.mark.parametrize("text, told", [
    (3, "expected a text"), ("(", "unterminated"), ("(a+)+", "it could run for ever"),
    ("(a|b)*", "it could run for ever"), ("a*" * 6, "five times at most")])
def test_a_pattern_that_is_none_or_never_ends_is_refused(text, told):
    """Red: bounds.py:tame: `if endless and closed` -> `if False`
    Red: bounds.py:tame: `return count <= repeats` -> `return True`
    Red: bounds.py:pattern: `isinstance(text, str) and tame` -> `tame`
    Red: bounds.py:pattern: `(re.error, ` -> `(`"""
    with pytest.raises(ValueError, match=rf"^here: .* is no usable regular expression: .*{told}"):
        bounds.pattern(text, "here")
    assert bounds.pattern(r"(ab)?c{2}[*+]*d+", "here").fullmatch("abcc*+d")


def test_a_flag_of_a_file_is_true_false_or_absent():
    """Red: bounds.py:boolean: `type(raw[key]) is not bool` -> `False`
    Red: bounds.py:boolean: `return bool(raw.get(key))` -> `return raw.get(key)`"""
    assert [bounds.boolean({"a": x}, "a") for x in (True, False, None)] == [True, False, False]
    with pytest.raises(ValueError, match="^a must be true or false, found 1"):
        bounds.boolean({"a": 1}, "a")
