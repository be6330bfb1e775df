"""Weights as people save them: the right tensors, or one line that says what the file is; nothing is ever run."""

import argparse
import os
import pickle
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from aha.weights import load_weights, numbers, read_weights


class Net(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))  # a part of its own that is named as a prefix
        self.fc = nn.Linear(4, classes)


class Settings:
    def __init__(self):
        self.lr = 0.1


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def saved(content, path, **options):
    torch.save(content, path, **options)
    return path


def loads(path, into=None):
    """Whether the file's weights are those of the module that was saved, parameter by parameter."""
    into = Net() if into is None else into
    state, _ = read_weights(path)
    load_weights(into, state, path)
    torch.manual_seed(0)
    expected = Net().state_dict()
    return all(torch.equal(value, expected[name]) for name, value in into.state_dict().items())


def refusal(path):
    with pytest.raises(ValueError, match=r"^.") as caught:
        read_weights(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(path))
    return text.removeprefix(str(path))


WRAPPINGS = {
    "bare": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 3},
    "model": lambda s: {"model": s, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": []}},
    "model_state_dict": lambda s: {"epoch": 3, "model_state_dict": s},
    "net": lambda s: {"net": s, "acc": 91.2},
    "network": lambda s: {"network": s},
    "weights": lambda s: {"weights": s, "step": torch.tensor(7)},
    "params": lambda s: {"params": s},
    "module": lambda s: {"module": s, "dp_world_size": 8},
    "nested": lambda s: {"model": {"state_dict": s, "name": "a"}, "epoch": 1},
    "namespace": lambda s: {"state_dict": s, "args": argparse.Namespace(lr=1, names=["a"])},
    "numpy scalars": lambda s: {
        "model": s,
        "best": np.float64(0.9),
        "step": np.int64(3),
        "done": np.bool_(True),
        "kind": np.dtype("float32"),
    },
    "ema none": lambda s: {"model": s, "ema": None, "state_dict_ema": {}},
    "settings named like weights": lambda s: {"model": {"name": "a", "depth": 3}, "state_dict": s},
    "twice the same": lambda s: {"model": s, "net": s},
    "flat extras": lambda s: {**s, "epoch": 3, "lr": 0.1},
    "parameters": lambda s: {k: nn.Parameter(v, requires_grad=v.is_floating_point()) for k, v in s.items()},
    "lightning": lambda s: {"state_dict": prefixed(s, "model."), "hyper_parameters": {"lr": 1}, "callbacks": {}},
}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_state_dict_is_found(net, tmp_path, wrapping, zipped):
    content = WRAPPINGS[wrapping](net.state_dict())
    assert loads(saved(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped))


@pytest.mark.parametrize("ema", ["state_dict_ema", "model_ema", "ema_state_dict", "ema"])
def test_average_is_preferred(net, tmp_path, ema):
    raw = {key: value + 1 for key, value in net.state_dict().items()}
    assert loads(saved({"state_dict": raw, ema: net.state_dict()}, tmp_path / "a.pth"))
    assert loads(saved({"model": raw, ema: {"decay": 0.99, "module": net.state_dict()}}, tmp_path / "b.pth"))
    assert not loads(saved({"state_dict": raw}, tmp_path / "c.pth"))


@pytest.mark.parametrize(
    "prefix", ["module.", "model.", "_orig_mod.", "net.", "backbone.", "module._orig_mod.", "model.backbone.module."]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_prefixes_are_taken_off(net, tmp_path, prefix, suffix):
    path = tmp_path / f"a{suffix}"
    state = prefixed(net.state_dict(), prefix)
    safetensors.torch.save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    assert loads(path)


def test_prefixes_of_the_module_itself_stay(net, tmp_path):
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Net()

    path = saved(prefixed(net.state_dict(), "module."), tmp_path / "a.pth")
    outer = Outer()
    load_weights(outer, read_weights(path)[0], path)
    assert torch.equal(outer.module.fc.weight, net.fc.weight)


def test_averaged_model_and_compiled_parts(net, tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    assert "n_averaged" in averaged.state_dict()
    assert loads(saved(averaged.state_dict(), tmp_path / "a.pth"))
    parts = {key.replace("model.", "model._orig_mod."): value for key, value in net.state_dict().items()}
    assert loads(saved(parts, tmp_path / "b.pth"))
    net.model = torch.compile(net.model)
    assert loads(saved(nn.DataParallel(net).state_dict(), tmp_path / "c.pth"))


def test_loading_is_strict(net, tmp_path):
    state = prefixed(net.state_dict(), "module.")
    path = tmp_path / "a.pth"
    del state["module.fc.bias"]
    state["module.other"] = torch.zeros(1)
    state["module.fc.weight"] = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"a.pth does not fit Net: parameters 1 missing \(fc.bias\)") as caught:
        load_weights(Net(), state, path)
    assert "1 unexpected (other)" in str(caught.value)
    assert "1 of another shape (fc.weight (5, 4) for (3, 4))" in str(caught.value)
    # a prefix of some names only is no prefix
    some = {**net.state_dict(), "module.extra": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"1 unexpected \(module.extra\)"):
        load_weights(Net(), some, path)


def test_surplus_is_left_out_under_a_prefix_too(net):
    body = Net()
    del body.fc
    load_weights(body, prefixed(net.state_dict(), "module."), "a.pth", surplus=("fc", "head"))
    assert torch.equal(body.model[0].weight, net.model[0].weight)
    with pytest.raises(ValueError, match=r"unexpected \(fc.bias, fc.weight\)"):
        load_weights(body, net.state_dict(), "a.pth", surplus=("head",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_everything_becomes_float32(net, tmp_path, dtype):
    halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in net.state_dict().items()}
    state, metadata = read_weights(saved(halves, tmp_path / "a.pth"))
    assert state["fc.weight"].dtype == torch.float32
    assert state["model.1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(state["fc.weight"], halves["fc.weight"].float())
    assert metadata == {}


def test_metadata_and_numbers(net, tmp_path):
    safetensors.torch.save_file(net.state_dict(), tmp_path / "a.pth", metadata={"mean": "[0.5, 0.4, 0.3]"})
    state, metadata = read_weights(str(tmp_path / "a.pth"))  # safetensors by content, not by suffix
    assert torch.equal(state["fc.bias"], net.fc.bias)
    assert numbers(metadata["mean"], ()) == (0.5, 0.4, 0.3)
    assert numbers("0.5 0.4,0.3", ()) == (0.5, 0.4, 0.3)
    assert numbers(None, (1, 2)) == (1, 2)
    for bad in ("a", "", "[nan]"):
        with pytest.raises(ValueError, match="no list of"):
            numbers(bad, ())


def test_suffix_does_not_decide(net, tmp_path):
    assert loads(saved(net.state_dict(), tmp_path / "a.safetensors"))
    assert loads(saved(net.state_dict(), tmp_path / "b"))


@pytest.mark.parametrize("zipped", [True, False])
def test_whole_model_is_named(net, tmp_path, zipped):
    options = {"_use_new_zipfile_serialization": zipped}
    says = f"holds a whole model ({__name__}.Net), not a state dict: where it was made, save model.state_dict()"
    assert refusal(saved(net, tmp_path / "a.pth", **options)).strip() == says
    beside = {"epoch": 3, "settings": Settings(), "model": net}
    assert refusal(saved(beside, tmp_path / "b.pth", **options)).strip() == says
    parallel = refusal(saved(nn.DataParallel(net), tmp_path / "c.pth", **options))
    assert "whole model (torch.nn.parallel.data_parallel.DataParallel)" in parallel
    assert "whole model" in refusal(saved(net, tmp_path / "d.pth", pickle_protocol=4))


LAYOUTS = {
    "an optimizer": (
        lambda s: torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1).state_dict(),
        "the state of an optimizer",
    ),
    "two networks": (lambda s: {"student": s, "teacher": s, "epoch": 3}, "student (dict of 9 tensors), teacher (dict"),
    "two meant": (lambda s: {"model": s, "net": {k: v + 1 for k, v in s.items()}}, "several state dicts (model, net)"),
    "settings": (lambda s: {"lr": 0.1, "epoch": 3}, "lr (float), epoch (int)"),
    "a counter": (lambda s: {"step": torch.tensor(3), "optimizer": {"lr": 1}}, "step (tensor), optimizer (dict of 1)"),
    "a list": (lambda s: [s, 3], "holds a list"),
    "a tensor": (lambda s: torch.zeros(3), "holds one tensor"),
    "nothing": (lambda s: {}, "an empty dict"),
    "empty": (lambda s: {"state_dict": {}}, "state_dict (dict of 0)"),
    "an object": (lambda s: {"model": s, "settings": Settings()}, f"pickled objects ({__name__}.Settings)"),
    "meta": (lambda s: {k: v.to("meta") for k, v in s.items()}, "without values"),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_named(net, tmp_path, layout, zipped):
    make, says = LAYOUTS[layout]
    content = make(net.state_dict())
    assert says in refusal(saved(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped))


def test_another_pickle_protocol_is_named(net, tmp_path):
    assert "another pickle protocol" in refusal(saved(net.state_dict(), tmp_path / "a.pth", pickle_protocol=4))


FILES = {
    "empty": (b"", "is empty (0 bytes)"),
    "text": (b"hello there", "is text ('hello there'"),
    "utf-16": ("hello there".encode("utf-16"), "neither a safetensors file nor"),
    "page": (b"\n<!DOCTYPE html><html><body>404", "is a web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n", "git-lfs pointer"),
    "shards": (b'{"metadata": {}, "weight_map": {"a": "model-00001.safetensors"}}', "list of shards"),
    "json": (b'{"a": 1}', "is text"),
    "gzip": (b"\x1f\x8b\x08\x00\x01\x02", "compressed with gzip"),
    "hdf5": (b"\x89HDF\r\n\x1a\n\x00\x00", "an HDF5 file"),
    "zeros": (bytes(5000), "neither a safetensors file nor"),
    "few bytes": (b"\x80\x02\x8a", "damaged or cut short"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kind", FILES)
def test_foreign_files_are_named(tmp_path, kind, suffix):
    content, says = FILES[kind]
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert says in refusal(path)


@pytest.mark.parametrize("left", [9, 100, 0.3, 0.9, -4])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_cut_files(net, tmp_path, kind, left):
    path = tmp_path / "a.pth"
    if kind == "safetensors":
        safetensors.torch.save_file(net.state_dict(), path)
    else:
        torch.save(net.state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    assert "fetch it again" in refusal(path)


def test_other_archives_and_folders(net, tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "script.pt")
    assert "TorchScript archive" in refusal(tmp_path / "script.pt")
    np.savez(tmp_path / "arrays.npz", a=np.zeros(2))
    assert "NumPy arrays" in refusal(tmp_path / "arrays.npz")
    with zipfile.ZipFile(tmp_path / "packed.pth", "w") as archive:
        archive.writestr("inner.pth", "x")
    assert "a zip archive of inner.pth" in refusal(tmp_path / "packed.pth")
    with tarfile.open(tmp_path / "tar.pth", "w") as archive:
        archive.add(tmp_path / "arrays.npz", "a.npz")
    assert "tar archive" in refusal(tmp_path / "tar.pth")
    assert "is a folder: give a weights file (it holds packed.pth, script.pt, …)" in refusal(tmp_path)
    safetensors.torch.save_file({}, tmp_path / "none.safetensors")
    assert "holds no tensors" in refusal(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match=r"no weights file at .*gone\.pth"):
        read_weights(tmp_path / "gone.pth")


def malicious_files(folder, mark):
    """The same object in every form that a loader knows."""
    bad = Malicious(mark)
    state = {"w": torch.zeros(2)}
    contents = {
        "alone": bad,
        "beside": {"state_dict": state, "args": bad},
        "inside": {"state_dict": {**state, "x": bad}},
        "namespace": {"model": state, "args": argparse.Namespace(x=bad)},
        "in a list": [state, [bad]],
    }
    for name, content in contents.items():
        for protocol in (2, 4):
            for zipped in (True, False):
                path = folder / f"{name}{protocol}{zipped}.pth"
                yield saved(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
        for protocol in range(6):
            path = folder / f"{name}{protocol}.pkl"
            path.write_bytes(pickle.dumps(content, protocol))
            yield path
    blob = pickle.dumps(bad, 2)
    for name, files in {
        "script": {"a/data.pkl": blob, "a/constants.pkl": blob, "a/version": b"3"},
        "archive": {"a/data.pkl": blob, "a/version": b"3", "a/byteorder": b"little"},
    }.items():
        path = folder / f"{name}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for inner, content in files.items():
                archive.writestr(inner, content)
        yield path
    path = folder / "tar.pth"
    (folder / "pickle").write_bytes(blob)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for member in ("storages", "tensors", "pickle"):
            archive.add(folder / "pickle", member)
    yield path


def test_nothing_is_run(tmp_path):
    mark = tmp_path / "was_here"
    files = list(malicious_files(tmp_path, mark))
    assert len(files) > 50
    for path in files:
        refusal(path)
        refusal(path.rename(path.with_name(f"{path.name}.safetensors")))
        assert not mark.exists(), path.name
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()  # the object does act, where it is let


def test_the_list_of_harmless_types_is_left_as_it_was(net, tmp_path):
    path = saved(WRAPPINGS["numpy scalars"](net.state_dict()), tmp_path / "a.pth")
    with torch.serialization.safe_globals([argparse.Namespace, Settings]):
        before = set(torch.serialization.get_safe_globals())
        failed = []

        def read():
            try:
                read_weights(path)
            except ValueError as error:
                failed.append(error)

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert set(torch.serialization.get_safe_globals()) == before
