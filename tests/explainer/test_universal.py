"""The explainer that ships, and explainers of evidence and an encoder's features together."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import aha
from aha.classifier import from_name
from aha.explainer.decoder import Decoder
from aha.explainer.evidence_decoder import STEM
from aha.explainer.explainer import UNIVERSAL, head_rows
from aha.files import read_json, write_json
from aha.source import Source
from aha.training import universal
from aha.training.command import Universal, train
from aha.training.trainer import CONTINUED, TEMPERATURES

from ..test_evidence import make, pictures
from ..toys import TINY_DECODER, tiny_classifier


def test_it_serves_any_classifier_and_is_small(recwarn):
    assert sum(path.stat().st_size for path in UNIVERSAL.iterdir()) <= 2e6
    assert sum(p.numel() for p in aha.Explainer.universal(make("vit")).parameters()) <= 300_000
    for name in ("vit", "resnet"):
        clf = make(name)
        images = pictures(clf, 2)
        explainer = aha.Explainer.universal(clf)
        maps = explainer.attribute(images, 1)
        assert maps.shape == (2, 1, *images.shape[-2:]) and maps.isfinite().all()
        # it was trained: it is not what an untrained one gives, but where whole patches are ranked
        untrained = aha.Explainer.build(clf).attribute(images, 1)
        assert torch.equal(maps, untrained) == (name == "vit")
        assert name == "vit" or not torch.allclose(maps, untrained, atol=1e-2)
    assert not recwarn.list


@pytest.mark.parametrize("made_for", ["vit", "resnet"])
def test_it_adds_to_pixels_and_not_to_patches_whatever_it_was_made_for(made_for, tmp_path):
    """By every way that an explainer gets another classifier, and after it was saved."""
    made = {name: make(name) for name in ("vit", "resnet")}
    explainer = aha.Explainer.universal(made[made_for])
    saved = explainer.save_pretrained(tmp_path)
    for name, clf in made.items():
        images = pictures(clf, 2)
        own = aha.Explainer.universal(clf).attribute(images, 1)
        turned = aha.Explainer.universal(made[made_for])
        turned.turn_to(clf)
        found = {
            "of": explainer.of(clf).attribute(images, 1),
            "turn_to": turned.attribute(images, 1),
            "saved": aha.Explainer.from_pretrained(saved, clf).attribute(images, 1),
            "refine": aha.refine(explainer, clf, images, 1, steps=0),
            "method": aha.attributors.create("aha", clf, explainer=explainer, scale="raw").attribute(images, 1),
        }
        for way, maps in found.items():
            assert torch.equal(maps, own), (name, way)
        base = aha.Explainer.build(clf).attribute(images, 1)
        assert torch.equal(own, base) == (name == "vit")
    content = {name: value for name, value in read_json(saved / "config.json").items() if name != "sha256"}
    write_json(saved / "config.json", {**content, "adds_to_patches": "no"})
    with pytest.raises(ValueError, match="adds_to_patches='no': give true or false"):
        aha.Explainer.from_pretrained(saved, made["vit"])


@pytest.mark.parametrize("names", [("vit",), ("resnet",), ("resnet", "vit")])
def test_training_further_begins_at_the_base_map_where_there_are_patches(names, tmp_path):
    """There the last layer starts anew, and what was learned before it is kept; elsewhere all is."""
    (clf, data), *beside = [(clf, [{"image": image} for image in pictures(clf, 3)]) for clf in map(make, names)]
    stored = load_file(UNIVERSAL / read_json(UNIVERSAL / "config.json")["weights"]["file"])
    explainer = aha.Explainer.universal(clf)
    config = aha.TrainConfig(steps=2, batch_size=2, fractions=4, cells=(2, 4), lr=0.01, output=str(tmp_path))
    seen, step = [], aha.Trainer._train_step
    trainer = aha.Trainer(explainer, clf, data, config, beside=beside)

    def watched(batch):
        seen.append({name: value.clone() for name, value in explainer.decoder.state_dict().items()})
        return step(trainer, batch)

    trainer._train_step = watched
    trainer.fit(progress=False)
    last = f"head.{len(explainer.decoder.head) - 1}."
    for name, value in seen[0].items():
        if name.startswith(last) and "vit" in names:
            assert not value.any() and stored[name].any()
        else:
            assert torch.equal(value, stored[name])
    # what it has learned from now on counts for patches, if it learned from them
    assert explainer.settings.get("adds_to_patches", True) == ("vit" in names)
    # a run that goes on keeps what its last layer has learned
    assert explainer.decoder.head[-1].weight.any()
    again = aha.Explainer.universal(clf)
    aha.Trainer(again, clf, data, config, beside=beside).fit(resume=True, progress=False)
    for a, b in zip(explainer.decoder.parameters(), again.decoder.parameters(), strict=True):
        assert torch.equal(a, b)
    assert again.settings == explainer.settings


def test_a_training_that_is_refused_changes_no_explainer(tmp_path):
    clf = make("vit")
    data = [{"image": image} for image in pictures(clf, 3)]
    config = aha.TrainConfig(steps=1, batch_size=2, fractions=4, cells=(2, 4), output=str(tmp_path))
    aha.Trainer(aha.Explainer.universal(clf), clf, data, config).fit(progress=False)
    other = aha.Explainer.universal(clf)
    before = {name: value.clone() for name, value in other.decoder.state_dict().items()}
    with pytest.raises(ValueError, match="holds a run: resume it"):
        aha.Trainer(other, clf, data, config).fit(progress=False)
    with pytest.raises(ValueError, match="made with other settings"):
        aha.Trainer(other, clf, data, dataclasses.replace(config, lr=0.1)).fit(progress=False, resume=True)
    assert all(torch.equal(value, before[name]) for name, value in other.decoder.state_dict().items())
    assert other.settings["adds_to_patches"] is False


def test_it_says_nothing_of_where_it_was_made():
    config = json.loads((UNIVERSAL / "config.json").read_text())
    assert "weights" not in config["classifier"]
    assert "/" not in json.dumps(config)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_encoder_and_evidence_together(name, tmp_path):
    clf = make(name)
    images = pictures(clf, 2)
    explainer = aha.Explainer.build(clf, "classifier", decoder=TINY_DECODER)
    untrained = aha.Explainer.build(clf).attribute(images, 1)
    assert torch.equal(explainer.attribute(images, 1), untrained)  # the full gradient
    torch.nn.init.normal_(explainer.decoder.head[-1].weight)
    maps = explainer.eval().attribute(images, 1)
    assert not torch.allclose(maps, untrained)
    assert not torch.equal(maps, explainer.attribute(images, 2))
    explainer.save_pretrained(tmp_path)
    assert torch.equal(aha.Explainer.from_pretrained(tmp_path, clf).attribute(images, 1), maps)
    with aha.attributors.count_passes(clf) as seen:
        method = aha.attributors.create("aha", clf, explainer=explainer)
        method.attribute(images, 1)
    assert seen == 2 * method.passes(images)


@pytest.mark.parametrize("encoder", [None, "classifier"])
def test_an_explainer_of_three_roles_sees_three(encoder, tmp_path):
    clf = make("vit")
    images = pictures(clf, 2)
    explainer = aha.Explainer.build(clf, encoder, decoder=TINY_DECODER if encoder else None)
    torch.nn.init.normal_(explainer.decoder.head[-1].weight)
    # as if the later ones did not matter; saved without them, as they were before there were six
    weight = explainer.decoder.sight.stem.weight.data
    weight[:, 3:6], weight[:, 9:] = 0, 0
    maps = explainer.eval().attribute(images, 1)
    explainer.save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    state = load_file(file)
    state[STEM] = torch.cat([state[STEM][:, :3], state[STEM][:, 6:9]], dim=1)
    save_file(state, file)
    config = read_json(tmp_path / "config.json")
    del config["weights"]  # the checksum of the others
    write_json(tmp_path / "config.json", config)
    assert torch.equal(aha.Explainer.from_pretrained(tmp_path, clf).attribute(images, 1), maps)


@pytest.mark.parametrize("shape", [(10**12, 0, 3, 3), (48, 7, 3, 3), (48, 14, 3, 3), (48, 6)])
def test_a_stem_of_another_shape_is_refused(shape, tmp_path):
    clf = make("vit")
    aha.Explainer.build(clf).save_pretrained(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    save_file({**load_file(file), STEM: torch.empty(shape)}, file)
    config = read_json(tmp_path / "config.json")
    del config["weights"]
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match=r"does not fit EvidenceDecoder: .*of another shape \(sight\.stem\.weight"):
        aha.Explainer.from_pretrained(tmp_path, clf)


def test_the_class_embedding_is_a_linear_map_of_the_heads_rows():
    clf = tiny_classifier()
    rows = head_rows(clf)
    assert rows.shape[0] == clf.num_classes
    decoder = aha.Explainer.build(clf, "classifier", decoder=TINY_DECODER).decoder
    assert isinstance(decoder, Decoder) and decoder.embedding.in_features == rows.shape[1]
    known = rows - rows.mean(dim=0)
    torch.testing.assert_close(decoder.rows, known / known.norm(dim=1).mean())
    table = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER).decoder
    assert table.rows is None and isinstance(table.embedding, torch.nn.Embedding)


def test_several_classifiers_in_turn(tmp_path):
    vit, resnet = make("vit"), make("resnet")

    def images(clf, count):
        return [{"image": image} for image in pictures(clf, count)]

    def trainer(steps, output=None):
        torch.manual_seed(0)
        config = aha.TrainConfig(
            steps=steps,
            batch_size=2,
            fractions=4,
            cells=(2, 4),
            targets=1,
            dropped_roles=0.3,
            save_every=1,
            output=output,
        )
        explainer = aha.Explainer.build(vit)
        return aha.Trainer(explainer, vit, images(vit, 5), config, beside=[(resnet, images(resnet, 3))])

    seen = []
    whole = trainer(4, str(tmp_path / "a"))
    step = whole._train_step

    def watched(batch):
        seen.append((whole._subject().classifier, tuple(batch["image"].shape[-2:])))
        return step(batch)

    whole._train_step = watched
    whole.fit(progress=False)
    assert [clf for clf, _ in seen] == [vit, resnet, vit, resnet]
    assert all(size == clf.input_size for clf, size in seen)
    assert whole.explainer.classifier is vit
    # cut off after three steps, it ends as if it had not been
    cut = trainer(4, str(tmp_path / "b"))
    proper = cut._train_step

    def killed(batch):
        if cut.step == 3:
            raise KeyboardInterrupt
        return proper(batch)

    cut._train_step = killed
    with pytest.raises(KeyboardInterrupt):
        cut.fit(progress=False)
    again = trainer(4, str(tmp_path / "b"))
    again.fit(resume=True, progress=False)
    assert again.step == 4
    for a, b in zip(whole.explainer.parameters(), again.explainer.parameters(), strict=True):
        assert torch.equal(a, b)
    own = aha.Explainer.build(vit, evidence=False, decoder=TINY_DECODER)
    with pytest.raises(ValueError, match="several classifiers need an explainer with evidence"):
        aha.Trainer(own, vit, images(vit, 2), aha.TrainConfig(steps=1), beside=[(resnet, images(resnet, 2))])
    with pytest.raises(ValueError, match="dropped_roles=1"):
        aha.TrainConfig(dropped_roles=1.0)


def test_the_command_goes_on_from_it_or_from_another_or_from_nothing(tmp_path, capsys):
    config = aha.TrainConfig(steps=1, batch_size=2, fractions=4, cells=(4, 8), lr=1e-12, warmup=0.0)

    def trained(name, **options):
        output = str(tmp_path / name)
        train(Source(limit=4), config=dataclasses.replace(config, output=output), **options)
        assert "explainer written" in capsys.readouterr().out
        return aha.Explainer.from_pretrained(tmp_path / name / "explainer")

    def same(a, b):
        return all(
            torch.allclose(x, y, atol=1e-6) for x, y in zip(a.decoder.parameters(), b.decoder.parameters(), strict=True)
        )

    clf = from_name("scenes")
    universal = aha.Explainer.universal(clf)
    universal.prepare_for([clf])
    assert same(trained("default"), universal)
    fresh = trained("fresh", fresh=True)
    assert not fresh.decoder.head[-1].weight.abs().max() > 1e-6
    assert same(trained("from", start=tmp_path / "fresh" / "explainer"), fresh)
    both = trained("both", encoder="classifier", decoder=TINY_DECODER)
    assert both.encoder is not None and both.sees_evidence
    published = trained("published", evidence=False, decoder=TINY_DECODER)
    assert published.encoder is not None and not published.sees_evidence
    with pytest.raises(ValueError, match=r"--start .* and --fresh"):
        train(start=tmp_path, fresh=True)


def test_it_can_be_made_again(tmp_path, monkeypatch):
    """The command's way, with the classifier and the photographs of the tests."""
    monkeypatch.setattr(universal, "CLASSIFIERS", ("one", "scenes"))
    monkeypatch.setattr(universal, "fetch", lambda folder: folder)
    monkeypatch.setattr(universal, "Photographs", lambda folder, size, seed: Pictures(size))
    known = {"one": lambda: make("resnet"), "scenes": lambda: from_name("scenes")}
    monkeypatch.setattr(universal, "from_name", lambda name, weights: known[name]())
    few = dataclasses.replace(universal.TRAINING, steps=2, batch_size=2, fractions=3, cells=(2, 4))
    monkeypatch.setattr(universal, "TRAINING", few)
    config = aha.TrainConfig(output=str(tmp_path / "run"))
    train(config=config, remake=Universal(universal=True, photographs=tmp_path))
    made = aha.Explainer.from_pretrained(tmp_path / "run" / "explainer", make("vit"))
    assert made.settings["response"] is not None
    images = pictures(make("vit"), 1)
    assert made.attribute(images, 1, scale="calibrated").isfinite().all()


class Pictures(torch.utils.data.Dataset):
    """Noise of one size."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": torch.rand(3, self.size, self.size, generator=torch.Generator().manual_seed(index))}


def test_weights_are_found_by_name_in_their_folder(tmp_path):
    (tmp_path / "vit_tiny_patch16_224.safetensors").touch()
    found = universal.weights_file(tmp_path, "vit_tiny_patch16_224.augreg_in21k_ft_in1k")
    assert found == tmp_path / "vit_tiny_patch16_224.safetensors"
    assert universal.weights_file(None, "any") is None and universal.weights_file(tmp_path, "scenes") is None
    with pytest.raises(ValueError, match=r"holds no deit_tiny\.safetensors"):
        universal.weights_file(tmp_path, "deit_tiny")


def test_other_channels_are_refused_in_one_line():
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    clf = aha.Classifier.wrap(net, (0.5,), (0.5,), 32)
    with pytest.raises(ValueError, match="sees 3 channels, Sequential takes 1: train one of its own") as error:
        aha.Explainer.universal(clf)
    assert "\n" not in str(error.value)
    assert aha.Explainer.build(clf).attribute(torch.rand(1, 1, 32, 32)).shape == (1, 1, 32, 32)


def test_what_starts_untrained_starts_soft(tmp_path):
    """A classifier of one channel has no universal explainer to go on from: its training is a whole one."""

    class Grey:
        def load_classifier(self):
            net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
            return aha.Classifier.wrap(net, (0.5,), (0.5,), 32)

        def images(self, *_, **__):
            return [{"image": torch.rand(1, 32, 32, generator=torch.Generator().manual_seed(i))} for i in range(4)]

    config = aha.TrainConfig(steps=1, batch_size=2, fractions=4, cells=(4, 8), log_every=1)
    started = {}
    for name, source in (("grey", Grey()), ("scenes", Source(limit=4))):
        train(source, config=dataclasses.replace(config, output=str(tmp_path / name)))
        started[name] = json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0])["tau"]
    assert started == {"grey": TEMPERATURES["standardized"][0], "scenes": CONTINUED[0]}
