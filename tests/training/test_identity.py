"""What a run was made from is in its checkpoints: classifier, images, version of the library."""

import dataclasses
import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import aha
from aha.data import ImageFolder, Preprocessing
from aha.files import read_json, write_json
from aha.identity import fingerprint

from ..toys import TINY_DECODER, tiny_classifier

CONFIG = aha.TrainConfig(steps=2, batch_size=2, fractions=3, targets=1, cells=(3, 4), precision="fp32")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.bmp")
    return tmp_path / "in"


def fit(folder, output, clf=None, resume=False):
    clf = clf or tiny_classifier()
    torch.manual_seed(0)
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    config = dataclasses.replace(CONFIG, output=str(output))
    data = ImageFolder(folder, 32, Preprocessing(1))
    aha.Trainer(explainer, clf, data, config).fit(resume=resume, progress=False)
    return explainer


def test_a_run_is_not_resumed_with_another_classifier(folder, tmp_path):
    clf = tiny_classifier()
    fit(folder, tmp_path / "run", clf)
    fit(folder, tmp_path / "run", tiny_classifier(), resume=True)  # equal weights are the same classifier
    with torch.no_grad():
        clf.module.head.weight[-1, -1] += 1e-3  # as a fine-tuned one may differ: late, and little
    with pytest.raises(ValueError, match=r"made with other settings \(classifier\)"):
        fit(folder, tmp_path / "run", clf, resume=True)


@pytest.mark.parametrize("change", ["another image", "one less", "labels"])
def test_a_run_is_not_resumed_with_other_images(folder, tmp_path, change):
    fit(folder, tmp_path / "run")
    if change == "another image":
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(folder / "3.bmp")
    elif change == "one less":
        (folder / "3.bmp").unlink()
    else:
        (folder / "labels.csv").write_text("file,label\n" + "".join(f"{n}.bmp,{n}\n" for n in range(4)))
    with pytest.raises(ValueError, match=r"made with other settings \(data\)"):
        fit(folder, tmp_path / "run", resume=True)


def test_another_version_is_said(folder, tmp_path):
    fit(folder, tmp_path / "run")
    (record,) = (tmp_path / "run" / "checkpoints").glob("step_*/run.json")
    kept = read_json(record, required=True)
    assert kept["aha"] == aha.__version__
    write_json(record, {**kept, "aha": "0.0.1"})
    with pytest.warns(UserWarning, match=f"was made by aha 0.0.1, this is {aha.__version__}"):
        fit(folder, tmp_path / "run", resume=True)


def test_an_explainer_remembers_classifier_and_images(folder, tmp_path):
    explainer = fit(folder, tmp_path / "run")
    config = json.loads((tmp_path / "run" / "explainer" / "config.json").read_text())
    assert config["data"] == explainer.settings["data"]
    assert config["data"]["images"] == 4
    clf = tiny_classifier()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aha.Explainer.from_pretrained(tmp_path / "run" / "explainer", clf)
    with torch.no_grad():
        clf.module.head.weight[-1, -1] += 1e-3
    with pytest.warns(UserWarning, match="is not the one this explainer was trained for"):
        aha.Explainer.from_pretrained(tmp_path / "run" / "explainer", clf)


def test_fingerprints_see_every_value_and_every_buffer():
    net = torch.nn.Sequential(torch.nn.Linear(30, 30), torch.nn.BatchNorm1d(30))
    first = fingerprint(net)
    assert fingerprint(net) == first
    for change in (net[0].weight, net[1].running_mean, net[1].running_var):
        with torch.no_grad():
            change.view(-1)[-1] += 0.5
        assert fingerprint(net) != first
        first = fingerprint(net)
    clf = tiny_classifier()
    other = aha.Classifier.wrap(clf.module, (0.4,) * 3, (0.5,) * 3, (32, 32))
    assert fingerprint(clf) != fingerprint(other)  # other pixels reach the network
