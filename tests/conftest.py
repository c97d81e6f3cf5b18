"""Fixtures shared by the tests of the commands: a model folder and data files, written once."""
import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach the network


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A tiny model folder; read it, never write into it."""
    import folder

    return folder.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A folder of demonstrations.jsonl, scores.jsonl, pairs.jsonl and labels.jsonl."""
    import folder

    return folder.write_files(tmp_path_factory.mktemp("data") / "files")


@pytest.fixture
def adapted(base):
    """The tiny model with an adapter that changes it."""
    import torch

    import lora
    import model

    net, generator = model.load(base, torch.float32), torch.Generator().manual_seed(0)
    lora.inject(net, 2, 4.0, generator=generator)
    for layer in lora.adapters(net).values():
        layer.lora_B.data.copy_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
    return net
