"""A saved explainer is replaced as a whole; what was changed since, or is no configuration, is refused in a line."""

import errno
import functools
import json
import os
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

import aha
from aha import files
from aha.explainer.explainer import UNIVERSAL

from .. import faults
from ..toys import TINY_DECODER, tiny_classifier

forking = pytest.mark.skipif(
    not hasattr(os, "fork") or torch.cuda.is_available(), reason="children are forked, which CUDA does not survive"
)


CLASSIFIER = tiny_classifier()


@functools.cache
def made(seed):
    return aha.Explainer.build(CLASSIFIER, evidence=False, decoder=TINY_DECODER, seed=seed)


def seed_of(folder, among=(0, 1)):
    """Which of the explainers is in ``folder``, whole."""
    found = aha.Explainer.from_pretrained(folder, CLASSIFIER).decoder.state_dict()
    for seed in among:
        expected = made(seed).decoder.state_dict()
        if all(torch.equal(expected[name], value) for name, value in found.items()):
            return seed
    raise AssertionError("a mixture")


def test_an_explainer_is_replaced_by_turns(tmp_path):
    names = []
    for seed in (0, 1, 0):
        made(seed).save_pretrained(tmp_path)
        assert seed_of(tmp_path) == seed
        (weights,) = tmp_path.glob("*.safetensors")
        names.append(weights.name)
    assert names == ["decoder.safetensors", "decoder.1.safetensors", "decoder.safetensors"]


@forking
@pytest.mark.parametrize("torn", [False, True])
def test_killed_at_any_change_the_old_one_or_the_new_one_is_there(tmp_path, torn):
    old, new = made(0), made(1)
    count = len(faults.changes(lambda: (old.save_pretrained(tmp_path), None)[1], tmp_path))
    assert count > 10
    seen = []
    for number in range(count + 1):  # a save over another has one more: the old weights go
        folder = old.save_pretrained(tmp_path / str(number))
        faults.killed(lambda folder=folder: new.save_pretrained(folder), folder, number, torn)
        seen.append(seed_of(folder))
        made(0).save_pretrained(folder)  # and it can be saved again
        assert seed_of(folder) == 0
    assert seen == sorted(seen)
    assert set(seen) == {0, 1}


@forking
@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_refuses(tmp_path, reason):
    old, new = made(0), made(1)
    for number in range(12):
        folder = old.save_pretrained(tmp_path / str(number))
        error = faults.refused(lambda folder=folder: new.save_pretrained(folder), folder, number, reason).error
        assert seed_of(folder) in (0, 1)
        if error is None:
            break
        assert isinstance(error, files.WriteError)
        assert re.fullmatch(rf"{folder}/\S+ cannot be written, .*: .*", str(error))
        if reason != errno.EROFS:
            assert not list(folder.glob("*.partial"))
    assert number > 8


@pytest.mark.parametrize("name", ["decoder.safetensors", "config.json"])
def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path, name):
    path = made(0).save_pretrained(tmp_path) / name
    whole, refused = path.read_bytes(), 0
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(8 * len(whole), (150,), generator=generator).tolist()
    for place in places:
        faults.flipped(path, place)
        try:
            assert seed_of(tmp_path) == 0
        except ValueError as error:
            refused += 1
            line = str(error)
            assert "\n" not in line and str(tmp_path) in line
        path.write_bytes(whole)
    assert refused == 150 if name == "decoder.safetensors" else refused > 100  # but for blanks


def test_weights_of_another_save_are_noticed(tmp_path):
    made(0).save_pretrained(tmp_path / "a")
    made(1).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "decoder.safetensors").replace(tmp_path / "a" / "decoder.safetensors")
    with pytest.raises(ValueError, match=r"decoder\.safetensors was changed or damaged since it was written"):
        aha.Explainer.from_pretrained(tmp_path / "a", tiny_classifier())


def test_earlier_versions_kept_no_checksum(tmp_path):
    made(1).save_pretrained(tmp_path)
    config = files.read_json(tmp_path / "config.json")
    del config["weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert seed_of(tmp_path) == 1


def test_the_explainer_that_ships_has_checksums():
    config = files.read_json(UNIVERSAL / "config.json", required=True)
    assert config["weights"]["sha256"] == files.digest((UNIVERSAL / "decoder.safetensors").read_bytes())


EDITS = [
    (("format",), 2),
    (("format",), None),
    (("classifier",), "vit"),
    (("classifier", "kind"), 3),
    (("classifier", "name"), None),
    (("classifier", "num_classes"), 10**12),
    (("classifier", "num_classes"), -5),
    (("classifier", "num_classes"), "5"),
    (("classifier", "input_size"), [32]),
    (("classifier", "input_size"), [10**9, 10**9]),
    (("classifier", "input_size"), "32"),
    (("classifier", "class_names"), [1, 2, 3, 4, 5]),
    (("classifier", "class_names"), 7),
    (("classifier", "fingerprint"), {}),
    (("classifier", "weights"), "../../other.pth"),
    (("classifier", "weights"), "inside/../../../etc/passwd"),
    (("classifier", "weights"), ["a"]),
    (("classifier", "options"), [1]),
    (("classifier", "options"), {"embed_dim": 10**9}),
    (("classifier", "options"), {"img_size": [10**9, 32]}),
    (("classifier", "options"), {"checkpoint_path": "/tmp/x.pth"}),
    (("classifier", "options"), {"pretrained_cfg_overlay": {"file": "/tmp/x.pth"}}),
    (("encoder",), 4),
    (("encoder", "kind"), "module"),
    (("encoder", "kind"), []),
    (("encoder", "name"), ""),
    (("decoder",), [1]),
    (("decoder", "width"), 10**9),
    (("decoder", "width"), 0),
    (("decoder", "width"), 16.5),
    (("decoder", "head"), True),
    (("decoder", "embedding"), "16"),
    (("decoder", "strides"), [4, 8, 16]),
    (("decoder", "strides"), [0, 8, 16, 32]),
    (("decoder", "strides"), {"a": 1}),
    (("decoder", "stride"), 4),
    (("evidence",), "yes"),
    (("temperature",), 0),
    (("temperature",), "hot"),
    (("temperature",), float("nan")),
    (("scores",), "raw"),
    (("scores",), ["free"]),
    (("cells",), [7]),
    (("cells",), [7, 10**9]),
    (("cells",), "28"),
    (("objective",), 3),
    (("references",), "blur"),
    (("players",), [0, 2]),
    (("data",), 3),
    (("response",), {"shares": [0, 1]}),
    (("weights",), "decoder.safetensors"),
    (("weights", "file"), "../decoder.safetensors"),
    (("weights", "file"), "/etc/passwd"),
    (("weights", "sha256"), "0"),
    # what came is not said at any length
    (("evidence",), "x" * 5000),
    (("classifier", "input_size"), "x" * 5000),
    (("classifier", "weights"), "../" + "x" * 5000),
    (("classifier", "options"), {"embed_dim" * 500: 10**9}),
    (("decoder", "width"), list(range(5000))),
    (("references",), list(range(5000))),
]


@pytest.mark.parametrize(("place", "value"), EDITS, ids=lambda part: re.sub(r"\W+", "_", str(part))[:60])
def test_an_edited_configuration_is_refused_in_a_line_that_names_the_entry(
    explainer, classifier, tmp_path, place, value
):
    path = explainer.save_pretrained(tmp_path) / "config.json"
    config = files.read_json(path)
    part = config
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = value
    path.write_text(json.dumps(config))  # as one who edits it on purpose
    with pytest.raises(ValueError, match=r"config\.json is not an explainer's configuration \(") as caught:
        aha.Explainer.from_pretrained(tmp_path, classifier)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    words = {"kind", place[-1], place[-1].removesuffix("s")}
    assert any(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("change", [{"width": 4096}, {"embedding": 16384, "head": 16384, "width": 16384}])
def test_widths_that_are_not_those_of_the_weights_ask_for_no_memory(explainer, classifier, tmp_path, change):
    resource = pytest.importorskip("resource")
    path = explainer.save_pretrained(tmp_path) / "config.json"
    config = files.read_json(path)
    config["decoder"].update(change)
    path.write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"does not fit Decoder: parameters .* of another shape"):
        aha.Explainer.from_pretrained(tmp_path, classifier)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


def test_a_path_in_the_configuration_is_of_its_folder_or_absolute(tmp_path, monkeypatch):
    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 4}
    clf = aha.Classifier.from_timm("vit_tiny_patch16_224", pretrained=False, **options)
    torch.save(clf.module.state_dict(), tmp_path / "weights.pth")
    monkeypatch.chdir(tmp_path)
    again = aha.Classifier.from_timm("vit_tiny_patch16_224", weights="weights.pth", **options)
    path = aha.Explainer.build(again, evidence=False, decoder=TINY_DECODER).save_pretrained(tmp_path / "saved")
    monkeypatch.chdir("/")
    loaded = aha.Explainer.from_pretrained(path)  # from another folder than it was saved in
    assert loaded.classifier.source["weights"] == str(tmp_path / "weights.pth")
    (tmp_path / "weights.pth").rename(path / "weights.pth")
    config = files.read_json(path / "config.json")
    config["classifier"]["weights"] = "weights.pth"
    files.write_json(path / "config.json", config)
    assert aha.Explainer.from_pretrained(path).classifier.source["weights"] == str(path / "weights.pth")


def test_code_of_a_repository_is_never_run(tmp_path):
    """Nothing asks transformers for it, and a model that needs it is refused."""
    root = Path(aha.__file__).parent
    assert not [path for path in root.rglob("*.py") if "trust_remote_code" in path.read_text()]
    config = {"model_type": "ours", "auto_map": {"AutoConfig": "ours.C", "AutoModelForImageClassification": "ours.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mark = tmp_path / "ran"
    (tmp_path / "ours.py").write_text(f"open({str(mark)!r}, 'w')\nclass C: pass\nclass M: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        aha.Classifier.from_hf(str(tmp_path))
    assert not mark.exists()


def test_saved_weights_are_plain(explainer, tmp_path):
    explainer.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "decoder.safetensors")
    assert saved.keys() == explainer.decoder.state_dict().keys()


@pytest.mark.parametrize(
    ("part", "name", "what"),
    [
        ("classifier", "no_such_model", "the classifier that {} names cannot be made (timm has no model"),
        ("encoder", "no_such_model", "{} has no encoder for test_vit (timm has no model"),
    ],
)
def test_what_a_configuration_names_and_is_not_there(tmp_path, part, name, what):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.pth")
    known = aha.Classifier.from_timm("test_vit", weights=tmp_path / "vit.pth", num_classes=3)
    path = aha.Explainer.build(known, decoder=TINY_DECODER, evidence=False).save_pretrained(tmp_path) / "config.json"
    assert aha.Explainer.from_pretrained(tmp_path).classifier.num_classes == 3
    config = files.read_json(path)
    config[part] = {**config[part], "kind": "timm", "name": name}
    files.write_json(path, config)
    with pytest.raises(ValueError, match=f"^{re.escape(what.format(path))}"):
        aha.Explainer.from_pretrained(tmp_path)
