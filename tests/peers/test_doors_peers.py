"""A merged folder through the doors that others build: lm-evaluation-harness, offline.

Run with lm_eval installed (requirements-peers.txt).
"""
import pytest
import torch
from test_lora_peers import randomise

import lora
import merging
import model
import questions
import tokens
from lab.measure import BASE

CHOICES = BASE.parent / "data/truth_choices.jsonl"


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The bundled base with a random adapter folded in."""
    torch.manual_seed(0)
    net, place = model.load(BASE, torch.float32), tmp_path_factory.mktemp("doors")
    lora.inject(net, 4, 4.0)
    randomise(net)
    lora.save(net, place / "adapter", str(BASE))
    merging.merge(BASE, [place / "adapter"], place / "merged")
    return place / "merged"


@pytest.fixture(scope="module")
def harness(merged, monkeypatch_module):
    """What the harness finds on the task of docs/evaluate.md, run as its command runs it."""
    monkeypatch_module.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch_module.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch_module.chdir(BASE.parent.parent)  # the task names its data from there
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager
    return simple_evaluate(
        model="hf", model_args=f"pretrained={merged},dtype=float32", tasks=["truth_choices"],
        task_manager=TaskManager(include_path="docs/lm_eval"), apply_chat_template=True,
        device="cpu", batch_size=16, bootstrap_iters=0, log_samples=True)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_the_harness_finds_the_log_likelihoods_that_we_find(merged, harness):
    """Of every choice, without the end token, which it does not score.
    Red: questions.py:read: `return ` -> `return []; `"""
    net, chat = model.load(merged, torch.float32), tokens.Chat(merged)
    asked = questions.read(CHOICES)
    rows = sorted(harness["samples"]["truth_choices"], key=lambda row: row["doc_id"])
    assert len(rows) == len(asked) == 43
    for question, row in zip(asked, rows, strict=True):
        said = row["doc"]["mc1_targets"]["choices"]
        prompt = chat.prompt_ids(question.prompt)
        batch = tokens.collate([tokens.Encoded(prompt + chat.response_ids(text), len(prompt), 1.0,
                                               "sft", "", ()) for text in said])
        with torch.no_grad():
            logps, mask = net.response_logps(batch.ids, batch.response_mask)
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        mine = logps.masked_fill(last, 0).sum(1).tolist()
        theirs = [float(answer[0][0]) for answer in row["resps"]]
        assert mine == pytest.approx(theirs, abs=1e-4)
