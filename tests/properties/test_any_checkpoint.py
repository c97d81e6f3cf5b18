"""Properties of checkpoint.py and durable.py: any flag, any damage, any tensors."""
import json
import shutil
from dataclasses import asdict, fields, replace

import pytest
import tiny
import torch
from anything import noise, seeds
from hypothesis import given
from hypothesis import strategies as st

import checkpoint
import config
import lora

durable = pytest.importorskip("durable", reason="checkpoints without a manifest")
FREE = checkpoint.FREE + getattr(checkpoint, "CONTENT", ())
contents = st.dictionaries(st.text("abc", min_size=1, max_size=4).map("f{}".format),
                           st.binary(max_size=40), min_size=1, max_size=3)


@given(st.sampled_from([f.name for f in fields(config.Config)]), st.data())
def test_a_run_goes_on_with_another_flag_just_if_the_flag_is_free(name, found):
    """Every other change is refused by name; the same settings never are.
    Red: checkpoint.py:compare: `if key not in FREE + CONTENT and` -> `if key not in FREE and`
    Red: checkpoint.py:compare: `old["config"].get(key) != value` -> `False`"""
    old = config.Config("m", ("d",))
    other = {str: "other", bool: True, int: 7, float: 0.25, tuple[str, ...]: ("x", "y"),
             tuple[float, float]: (-1.0, 2.0)}[{f.name: f.type for f in fields(old)}[name]]
    new = replace(old, **{name: found.draw(st.sampled_from((other, getattr(old, name))))})
    kept = json.loads(json.dumps({"inputs": {}, "config": asdict(old)}))
    try:
        checkpoint.compare(kept, {"inputs": {}, "config": asdict(new)}, "run")
        assert name in FREE or new == old
    except ValueError as error:
        assert name not in FREE and new != old and f"{name} was" in str(error)


inputs = st.dictionaries(st.sampled_from(("model", "file 1", "file 2")), st.sampled_from("ab"))


@given(inputs, inputs)
def test_a_run_goes_on_just_if_its_files_are_the_ones_it_began_with(old, new):
    """One more, one less or another digest is refused by name.
    Red: checkpoint.py:compare: `old["inputs"] | now["inputs"]` -> `old["inputs"]`
    Red: checkpoint.py:compare: `old["inputs"].get(key) != now["inputs"].get(key)` -> `False`"""
    try:
        checkpoint.compare({"inputs": old, "config": {}}, {"inputs": new, "config": {}}, "run")
        assert old == new
    except ValueError as error:
        assert old != new and any(f": {key} has changed" in str(error) for key in old | new)


@given(seeds)
def test_a_checkpoint_gives_back_every_bit_of_adapters_and_optimizer(tmp_path_factory, seed):
    """Whatever their numbers.
    Red: checkpoint.py:restore: `data.copy_(tensor)` -> `data.copy_(tensor.bfloat16())`
    Red: checkpoint.py:restore: `optimizer.state[weights[name]][part] = tensor` -> `_ = tensor`"""
    nets = []
    for fill in (True, False):
        net = tiny.transformer(num_hidden_layers=1)
        lora.inject(net, 2, 4.0, ("q_proj", "up_proj"))
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for i, p in enumerate(trained):
            p.grad = noise(seed + i, *p.shape)
        if fill:
            optimizer.step()
        nets.append((net, optimizer, trained))
    out = tmp_path_factory.getbasetemp() / "bits"
    shutil.rmtree(out, ignore_errors=True)
    checkpoint.save(nets[0][0], nets[0][1], out, {"step": 1}, config.Config("m", ("d",)))
    checkpoint.restore(nets[1][0], nets[1][1], out / "checkpoints/step-1")
    for one, two in zip(nets[0][2], nets[1][2], strict=True):
        assert torch.equal(one, two)
        states = nets[0][1].state[one], nets[1][1].state[two]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@given(contents, st.data())
def test_any_change_to_a_folder_with_a_manifest_is_noticed(tmp_path_factory, files, data):
    """A byte changed, added or lost, a file gone; and nothing is said of a whole one.
    Red: durable.py:damage: `return None` -> `return str(parent)`
    Red: durable.py:folder: `if manifest:` -> `if not manifest:`"""
    out = tmp_path_factory.getbasetemp() / "kept"
    with durable.folder(out, manifest=True) as part:
        for name, content in files.items():
            (part / name).write_bytes(content)
    assert durable.damage(out) is None
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.name in files} == files
    path = out / data.draw(st.sampled_from(sorted(files)))
    content = path.read_bytes()
    way = data.draw(st.sampled_from(("changed", "longer", "shorter", "gone")))
    if way == "gone":
        path.unlink()
    elif content or way == "longer":
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        path.write_bytes({"changed": content[:at] + bytes([content[at] ^ 1 if content else 0])
                          + content[at + 1:], "longer": content + b"x",
                          "shorter": content[:-1]}[way])
    else:
        return
    assert durable.damage(out)


@given(contents, contents)
def test_a_folder_or_file_that_is_replaced_is_wholly_the_new_one(tmp_path_factory, old, new):
    """Nothing of the old one stays, and nothing lies beside it.
    Red: durable.py:exchange: `os.rename(part, final)` -> `shutil.copytree(part, final)`
    Red: durable.py:write: `os.replace(part, path)` -> `path.write_bytes(content[:5])`"""
    top = tmp_path_factory.getbasetemp() / "whole"
    for files in (old, new):
        with durable.folder(top / "final") as part:
            for name, content in files.items():
                (part / name).write_bytes(content)
                durable.write(top / "one", content)
    assert {p.name: p.read_bytes() for p in (top / "final").iterdir()} == new
    assert (top / "one").read_bytes() == list(new.values())[-1]
    assert sorted(p.name for p in top.iterdir()) == ["final", "one"]


@given(st.lists(st.sampled_from(("step-1", "step-2", "step-10", "step-9", "step-x", "step-3.bak",
                                 "tmp-step-4-1", "notes")), unique=True))
def test_checkpoints_are_found_by_step_and_nothing_else_is_taken_for_one(tmp_path_factory, found):
    """step-10 stands behind step-9.
    Red: checkpoint.py:number: `int(folder.name.removeprefix("step-"))` -> `folder.name`"""
    out = tmp_path_factory.getbasetemp() / "steps"
    shutil.rmtree(out, ignore_errors=True)
    for name in found:
        (out / "checkpoints" / name).mkdir(parents=True)
    numbers = sorted(int(n[5:]) for n in found if n[5:].isdigit() and n.startswith("step-"))
    assert [p.name for p in checkpoint.steps(out)] == [f"step-{n}" for n in numbers]
