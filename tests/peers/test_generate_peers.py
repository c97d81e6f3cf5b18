"""Sampling against transformers' `generate`: greedy answers token for token.

Run with transformers installed.
"""
import json
from pathlib import Path

import pytest
import torch
import transformers

import generate
from bench import sampling, work

STORIES = Path(__file__).resolve().parents[2].parent / "shared/data/models/stories260k"
PROMPTS = [[1, 403, 407, 261, 378], [1, 385], [1, 410, 413, 372, 291, 268, 388, 426], [1, 403]]


@pytest.mark.skipif(not STORIES.is_dir(), reason="shared data is not here")
@pytest.mark.parametrize("copies", [1, 3])
def test_a_real_model_answers_a_batch_as_transformers_does(copies):
    """150 greedy tokens behind four prompts of unequal length, each alone there, together here.
    Seen red with first_B1 - 1; tests/red.py has no shared data to run it."""
    net, peer = sampling.load(STORIES)
    want = [sampling.theirs(peer, [p], 1, 150, 0.0)[0] for p in PROMPTS for _ in range(copies)]
    assert generate.sample(net, PROMPTS, 150, (), copies=copies) == want


@pytest.mark.parametrize("changes", [
    {}, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}],
    ids=["full", "window"])
def test_the_benchmark_s_two_samplers_say_the_same(tmp_path, changes):
    """The bench in miniature, its model with or without a sliding window.

    Red: generate.py:read: `[longest - len(prompts[i])]` -> `[0]`
    Red: bench/sampling.py:theirs: `[0] * (longest - len(p)) + p` -> `p + [0] * (longest - len(p))`
    Red: bench/sampling.py:compare: `taken[0][0][1], taken` -> `taken[0][0][1][1:], taken`
    """
    path = work.make("tiny", tmp_path, rows=2) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    prompts, both = sampling.make_prompts(5, 512), sampling.load(tmp_path / "tiny")
    assert len({*map(len, prompts)}) > 3
    here, there, alike = sampling.compare(*both, (prompts, 2, 20, 0.0), 1)
    assert here > 0 and there > 0 and alike == 10


def test_transformers_draws_from_the_whole_softmax():
    """The peer of the benchmark at temperature 1: neither top_k nor top_p cuts anything.

    Red: bench/sampling.py:theirs: `"top_k": 0` -> `"top_k": 1`
    """
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**work.config(work.SHAPES["tiny"]))
    net = transformers.AutoModelForCausalLM.from_config(config).eval()
    net.generation_config.eos_token_id = None
    said = sampling.theirs(net, [[5, 6]], 400, 1, 1.0)
    assert len({s[0] for s in said}) > 200
