"""Theorems about the memory estimate: shapes without numbers keep what a real run keeps."""
import json
import re

import pytest
import tiny
import torch

import config
import lora
import memory
import train


@pytest.fixture
def folder(tmp_path):
    """A folder with config.json alone: no weight is read."""
    (tmp_path / "config.json").write_text(json.dumps(tiny.config()), "utf-8")
    return tmp_path


def settings(folder, **changes):
    return config.Config(model=str(folder), data=("d",), lora_r=2, max_length=32,
                         micro_batch_tokens=100, **changes)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_meta_device_counts_the_bytes_that_a_real_forward_pass_keeps(folder, checkpointing):
    """Of the same three rows: not one byte more or less.
    Red: packing.py:attend_packed: `("cpu", "meta")` -> `("cpu",)`"""
    net = tiny.transformer(dtype=torch.float32)
    lora.inject(net, 2, 16.0)
    real = memory.kept(net, 3, 32, checkpointing)
    assert memory.kept(memory.blank(settings(folder), folder), 3, 32, checkpointing) == real > 0


def test_checkpointing_keeps_less_and_rows_keep_in_proportion(folder):
    """Red: memory.py:kept: `mask, checkpointing)` -> `mask, False)`
    Red: memory.py:kept: `torch.ones(rows, length` -> `torch.ones(1, length`"""
    net = memory.blank(settings(folder), folder)
    four, eight = (memory.kept(net, rows, 32, False) for rows in (4, 8))
    assert memory.kept(net, 4, 32, True) < four / 4
    assert eight == pytest.approx(2 * four, rel=0.02)


@pytest.mark.parametrize("dtype, size", [("float32", 4), ("bfloat16", 2)])
def test_weights_and_moments_are_counted_by_their_dtype(folder, dtype, size):
    """Frozen weights in --dtype; adapters, gradients and two moments always in float32.
    Red: memory.py:blank: `net.to(getattr(torch, config.dtype))` -> `pass`
    Red: memory.py: `MOMENTS = 4` -> `MOMENTS = 3`
    Red: memory.py:estimate: `if not p.requires_grad)` -> `)`"""
    net, parts = tiny.transformer(), memory.estimate(settings(folder, dtype=dtype), folder)
    count = sum(p.numel() for p in net.parameters())
    lora.inject(net, 2, 16.0)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    assert parts["frozen weights"] == size * count
    assert parts["adapters, gradients, moments"] == 4 * 4 * trained


def test_sampling_counts_keys_and_values_and_the_larger_of_both_peaks(folder):
    """Red: memory.py:estimate: `cells = 2 * ` -> `cells = `
    Red: memory.py:most: `max(activations + temporaries` -> `max(activations`
    Red: memory.py:blank: `heads.attach(net, head)` -> `pass`"""
    setup = settings(folder, loss="ppo", group=3, batch_size=5, response_tokens=8)
    parts = memory.estimate(setup, folder)
    cells = 15 * 40 * 2 * 2 * 2 * 8 * 4  # rows, tokens, keys and values, layers, kv heads, size, 4
    assert parts["keys and values while sampling"] == cells
    plain = memory.estimate(settings(folder), folder)
    gained = parts["adapters, gradients, moments"] - plain["adapters, gradients, moments"]
    assert gained == 4 * 4 * tiny.D
    fixed, moved = sum(list(parts.values())[:2]), sum(list(parts.values())[2:4])
    assert memory.most(parts) == fixed + moved
    assert memory.most(parts | {"keys and values while sampling": 1e12}) == fixed + 1e12


def test_the_command_says_the_estimate_and_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    """No data is read, no weight is needed, no run is made.
    Red: train.py:main: `if config.memory_estimate:` -> `if False:`"""
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    train.main(["--model", str(folder), "--data", "none.jsonl", "--lora_r", "2", "--max_length",
                "32", "--memory_estimate", "true"])
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 5 and all(re.search(r"\d+\.\d{3} GB$", line) for line in told)
    assert sorted(tmp_path.rglob("*")) == before
