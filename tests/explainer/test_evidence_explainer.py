"""Explainers that see evidence: what they are before training, what they learn, what is kept of them."""

import json

import pytest
import torch

import aha
from aha.evidence import CONTRAST, Evident
from aha.explainer.decoder import DecoderConfig
from aha.explainer.evidence_decoder import EvidenceConfig, EvidenceDecoder
from aha.patches import by_patch, find_patches
from aha.source import Source
from aha.training.command import train

from ..attributors.architectures import make, pictures


def best(clf, images, target=None, contrast=CONTRAST):
    """The best single map, as an explainer gives it: by whole patches where the classifier reads those."""
    maps = Evident(clf, contrast)(images, target).best
    return by_patch(maps, find_patches(clf.module, 3, *maps.shape[-2:]))


@pytest.mark.parametrize("kind", ["vit", "oblong", "mixer", "resnet", "swin"])
def test_untrained_it_equals_the_best_evidence(kind):
    clf = make(kind)
    images = pictures(clf, 2)
    explainer = aha.Explainer.build(clf, evidence=True)
    assert torch.equal(explainer.attribute(images, 1), best(clf, images, 1))


def test_it_is_small_and_knows_no_class():
    decoder = EvidenceDecoder(3, 3, EvidenceConfig())
    assert sum(p.numel() for p in decoder.parameters()) < 300_000
    assert not any(isinstance(m, torch.nn.Embedding) for m in decoder.modules())


@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (5, 5)])
def test_any_size(stride, size):
    decoder = EvidenceDecoder(3, 3, EvidenceConfig(8, stride)).eval()
    dense = decoder.dense(torch.rand(2, 3, *size), torch.randn(2, 3, *size), torch.ones(2, 3, dtype=torch.bool))
    assert dense.shape == (2, 8, *(-(-side // stride) for side in size))


def test_absent_maps_do_not_matter():
    decoder = EvidenceDecoder(3, 3, EvidenceConfig(8)).eval()
    images, maps = torch.rand(1, 3, 16, 16), torch.randn(1, 3, 16, 16)
    present = torch.tensor([[True, False, True]])
    other = maps.clone()
    other[:, 1] = 5
    assert torch.equal(decoder.dense(images, maps, present), decoder.dense(images, other, present))
    assert not torch.equal(decoder.dense(images, maps, present), decoder.dense(images, maps, ~present))


def test_trained_saved_and_refined(tmp_path):
    clf = make("vit")
    images = pictures(clf, 4)
    explainer = aha.Explainer.build(clf, evidence=True, decoder=EvidenceConfig(8))
    config = aha.TrainConfig(steps=3, batch_size=2, fractions=4, cells=(2, 4), targets=2, log_every=1)
    aha.Trainer(explainer, clf, [{"image": image} for image in images], config).fit(progress=False)
    maps = explainer.attribute(images)
    assert not torch.equal(maps, best(clf, images))
    again = aha.Explainer.from_pretrained(explainer.save_pretrained(tmp_path / "explainer"), clf)
    assert torch.equal(again.attribute(images), maps)
    assert again.decoder.config == EvidenceConfig(8)
    refined = aha.refine(explainer, clf, images, steps=1, fractions=4)
    assert refined.shape == maps.shape
    # two targets of an image are two images
    pair = explainer(images[:1], torch.tensor([[0, 1]]))
    assert torch.allclose(pair, torch.cat([explainer(images[:1], torch.tensor([n])) for n in (0, 1)]), atol=1e-5)


def test_the_contrast_goes_with_the_explainer(tmp_path):
    clf = make("vit")
    images = pictures(clf, 2)
    explainer = aha.Explainer.build(clf)
    assert explainer.settings["contrast"] == CONTRAST
    config = json.loads((explainer.save_pretrained(tmp_path) / "config.json").read_text())
    del config["sha256"]  # of the content, which changes

    def loaded(contrast):
        content = {k: v for k, v in config.items() if k != "contrast"}
        if contrast is not None:
            content["contrast"] = contrast
        (tmp_path / "config.json").write_text(json.dumps(content))
        return aha.Explainer.from_pretrained(tmp_path, clf)

    # explainers of before there was one see the evidence that they were trained on
    for saved, contrast in ((CONTRAST, CONTRAST), (1, 1), (None, 0)):
        again = loaded(saved)
        assert torch.equal(again.attribute(images, 1), best(clf, images, 1, contrast))
        assert torch.equal(again.of(make("resnet")).of(clf).attribute(images, 1), again.attribute(images, 1))
    for wrong in (-1, 2, "much", True):
        with pytest.raises(ValueError, match=r"contrast=.*: give a finite number ≥ 0 and ≤ 1"):
            loaded(wrong)


def test_a_run_is_not_resumed_with_another_contrast(tmp_path):
    clf = make("vit")
    images = [{"image": image} for image in pictures(clf, 4)]
    config = aha.TrainConfig(steps=1, batch_size=2, fractions=4, cells=(2, 4), save_every=1, output=str(tmp_path))
    explainer = aha.Explainer.build(clf, decoder=EvidenceConfig(8))
    aha.Trainer(explainer, clf, images, config).fit(progress=False)
    other = aha.Explainer.build(clf, decoder=EvidenceConfig(8))
    other.settings["contrast"] = 0
    with pytest.raises(ValueError, match=r"made with other settings \(contrast\)"):
        aha.Trainer(other, clf, images, config).fit(progress=False, resume=True)


def test_one_explainer_serves_any_classifier(tmp_path, recwarn):
    vit, resnet = make("vit"), make("resnet")
    explainer = aha.Explainer.build(vit, evidence=True, decoder=EvidenceConfig(8))
    with torch.no_grad():
        explainer.decoder.head[-1].weight.normal_()
    images = pictures(resnet, 2)
    other = explainer.of(resnet)
    assert other.decoder is explainer.decoder
    assert explainer.of(vit) is explainer
    maps = other.attribute(images, 1)
    assert not torch.equal(maps, best(resnet, images, 1))
    loaded = aha.Explainer.from_pretrained(explainer.save_pretrained(tmp_path), resnet)
    method = aha.attributors.create("aha", resnet, explainer=explainer)
    for found in (
        loaded.attribute(images, 1),
        method.attribute(images, 1),
        aha.refine(explainer, resnet, images, 1, steps=0),
    ):
        assert torch.equal(found, maps)
    assert not recwarn.list
    own = aha.Explainer.build(vit, evidence=False)
    assert own.of(resnet) is own


def test_the_passes_are_counted():
    clf = make("resnet")
    explainer = aha.Explainer.build(clf, evidence=True, decoder=EvidenceConfig(8))
    method = aha.attributors.create("aha", clf, explainer=explainer)
    images = pictures(clf, 2)
    with aha.attributors.count_passes(clf) as seen:
        method.attribute(images, 1)
    assert seen == 2 * method.passes(images)


def test_what_does_not_go_together_is_refused():
    clf = make("vit")
    for options in (
        {"evidence": True, "decoder": DecoderConfig()},
        {"evidence": False, "decoder": EvidenceConfig()},
        {"encoder": "classifier", "decoder": EvidenceConfig()},
    ):
        with pytest.raises(ValueError, match=r"evidence without an encoder|an encoder's features") as error:
            aha.Explainer.build(clf, **options)
        assert "\n" not in str(error.value)


def test_the_command_trains_one(tmp_path, capsys):
    config = aha.TrainConfig(steps=1, batch_size=2, fractions=4, cells=(4, 8), output=str(tmp_path))
    train(Source(limit=4), evidence=True, config=config)
    assert "explainer written" in capsys.readouterr().out
    assert isinstance(aha.Explainer.from_pretrained(tmp_path / "explainer").decoder, EvidenceDecoder)
