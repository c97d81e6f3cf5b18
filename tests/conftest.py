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
