"""The loop of the GPU bench, in miniature on the CPU, trains as our step does.

    python -m pytest tests/peers/test_gpu_peers.py
"""
import pytest

from bench import gpu, gpu_peer, gpu_step


def said(build, name, *flags):
    """The line of a driver on three steps of three rows, two micro-batches each."""
    parser = gpu_step.parser("")
    parser.set_defaults(shape="tiny", head=name)
    return gpu_step.line(parser.parse_args([
        "--device", "cpu", "--rows", "3", "--length", "32", "--steps", "2", "--warmup", "1",
        "--micro_batch_tokens", "64", *flags]), name, build)


@pytest.mark.parametrize("head", ["full", "response"])
def test_the_loop_has_our_log_probs_and_our_loss_at_every_step(head):
    """The weights, A too, are the same numbers: the first loss shows the scores, the first log-prob
    the model, the later losses gradient and update.
    Red: bench/gpu_peer.py:logps: `hidden[row, place - 1]` -> `hidden[row, place]`
    Red: bench/gpu_peer.py:logps: `said[row, place - 1]` -> `said[row, place - 2]`
    Red: bench/gpu_peer.py:collate: `range(e.prompt_len, len(e.ids))` -> `range(1, len(e.ids))`
    Red: bench/gpu_peer.py:update: `policy - reference` -> `policy`
    Red: bench/gpu_peer.py:update: `share.square().sum() / len(units)` -> `share.square().mean()`
    Red: bench/gpu_peer.py:load: `gpu_step.draw(net.named_parameters())` -> `pass`
    Red: bench/gpu_peer.py:load: `lora_alpha=clock.ALPHA` -> `lora_alpha=1`"""
    ours, peer = (said(build, head, "--dtype", "float32")
                  for build in (gpu_step.build, gpu_peer.build))
    assert ours.keys() == peer.keys() and ours["rows"] == peer["rows"]
    assert ours["first_logps"] == pytest.approx(peer["first_logps"], abs=1e-4)
    assert ours["losses"] == pytest.approx(peer["losses"], abs=1e-5)
    assert len(set(ours["losses"])) == 3


@pytest.mark.parametrize("head", ["full", "response"])
def test_a_row_of_the_loop_in_bfloat16_is_not_void(head):
    """Red: bench/gpu_peer.py:logps: `hidden[row, place - 1]` -> `hidden[row, place]`
    Red: bench/gpu_peer.py:logps: `said[row, place - 1]` -> `said[row, place - 2]`"""
    ours, peer = (said(build, head) for build in (gpu_step.build, gpu_peer.build))
    assert gpu.why_void(ours, peer) == ""
    assert abs(ours["losses"][0] - peer["losses"][0]) < 1e-6
