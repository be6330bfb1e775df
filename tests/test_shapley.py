"""Shapley regression against enumeration, dropped tokens against shorter sequences, and its training."""

import dataclasses
import json
import math
from itertools import combinations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import aha
from aha import attributors, cli, references, shapley
from aha.classifier import Classifier
from aha.regions import grid
from aha.shapley import ShapleyObjective, TokenMasks, coalitions, player_grid, size_probabilities
from aha.training import checkpoint

from .attributors import architectures
from .toys import TINY_DECODER, tiny_vit

METHODS = ("fastshap", "vit_shapley")
CONFIG = aha.TrainConfig(
    steps=6, batch_size=4, accumulate=2, coalitions=4, targets=1, save_every=0, log_every=2, precision="fp32"
)
# as kinds of tests/attributors/architectures.py
ARCHITECTURES = {
    **{kind: (kind, {}) for kind in ("vit", "oblong", "registers", "distilled", "dinov3", "eva02", "beit", "parallel")},
    # without a norm behind the pooling, which would hide its scale
    "average": ("average", {"fc_norm": False}),
    "average_of_all": ("vit", {"global_pool": "avg", "pool_include_prefix": True, "fc_norm": False}),
}
BY_HAND = ("vit", "oblong", "registers", "average", "average_of_all", "distilled")


def make(kind):
    name, options = ARCHITECTURES[kind]
    return architectures.make(name, **options)


class Tangled(nn.Module):
    """Eight cells of one pixel, with products of neighbours: far from additive."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        self.one = nn.Parameter(torch.randn(24, 3, generator=generator, dtype=torch.float64))
        self.two = nn.Parameter(torch.randn(12, 3, generator=generator, dtype=torch.float64))

    def forward(self, pixels):
        x = pixels.flatten(1).double()
        return x @ self.one + 3 * (x[:, ::2] * x[:, 1::2]) @ self.two


@pytest.fixture
def tangled():
    """A game in float64: objective, images (3,3,2,4), target, reference, eight players."""
    clf = Classifier.wrap(Tangled(), (0.4,) * 3, (0.5,) * 3, (2, 4), num_classes=3).double()
    images = torch.rand(3, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    objective = ShapleyObjective(clf, players=(2, 4))
    return objective, images, torch.tensor([0, 2, 1]), references.mean(images, clf.mean_colour), grid(2, 4, (2, 4))


def test_coalitions_of_a_seed_per_map_do_not_depend_on_the_batch(tangled):
    objective, images, target, reference, players = tangled
    maps, seeds = torch.zeros(3, 1, 2, 4, dtype=torch.float64), torch.tensor([3, 4, 5])
    whole = objective(images, maps, target, [reference], players, seed=seeds).loss
    for i in range(3):
        of = slice(i, i + 1)
        alone = objective(images[of], maps[of], target[of], [reference[of]], players, seed=int(seeds[i])).loss
        torch.testing.assert_close(alone, whole[of])
    with pytest.raises(ValueError, match=r"give an integer, or \(3,\) int64"):
        objective(images, maps, target, [reference], players, seed=seeds[:2])


def enumerate_sets(players):
    codes = torch.arange(2**players)
    return ((codes[:, None] >> torch.arange(players)) & 1).bool()


def exact(objective, images, target, blank, regions):
    """φ (B,n): every player's marginal contribution, averaged over all orders."""
    n = regions.count
    sets = enumerate_sets(n)
    v = objective.game(images, [blank], sets.expand(len(images), -1, -1), target, regions)[:, 0].double()
    phi = torch.zeros(len(images), n, dtype=torch.float64)
    for player in range(n):
        for code, members in enumerate(sets):
            if not members[player]:
                s = int(members.sum())
                weight = math.factorial(s) * math.factorial(n - 1 - s) / math.factorial(n)
                phi[:, player] += weight * (v[:, code + 2**player] - v[:, code])
    return phi


def minimise(objective, images, target, blank, regions, seed=0):
    """The cell values (B,n) that minimise the objective, which is quadratic: one Newton step."""

    def gradient(cells):
        cells = cells.clone().requires_grad_()
        maps = cells.view(-1, 1, regions.rows, regions.cols)
        loss = objective(images, maps, target, [blank], regions, seed=seed).loss
        return torch.autograd.grad(loss.sum(), cells)[0]

    start = torch.zeros(len(images), regions.count, dtype=images.dtype)
    slope = gradient(start)
    columns = [gradient(start + unit) - slope for unit in torch.eye(regions.count, dtype=images.dtype)]
    # the normalisation takes a shift of all cells out: the Hessian is singular along it
    cells = -(torch.linalg.pinv(torch.stack(columns, dim=-1)) @ slope[:, :, None])[:, :, 0]
    maps = cells.view(-1, 1, regions.rows, regions.cols)
    return objective.values(images, maps, target, [blank], regions)


def test_sizes_follow_the_shapley_kernel():
    assert size_probabilities(4).tolist() == pytest.approx([4 / 11, 3 / 11, 4 / 11])
    # the kernel weight of a set, (n−1)/(C(n,s)·s·(n−s)), times the number of sets of its size
    kernel = [(8 - 1) / (s * (8 - s)) for s in range(1, 8)]
    assert size_probabilities(8).tolist() == pytest.approx([k / sum(kernel) for k in kernel])


def test_frequencies_of_sets():
    draws = 40000
    sets = coalitions(2, draws // 2, 5, torch.Generator().manual_seed(0)).flatten(0, 1)
    assert sets.dtype == torch.bool
    expected = size_probabilities(5)
    code = (sets * 2 ** torch.arange(5)).sum(dim=1)
    found = torch.bincount(code, minlength=32) / draws
    assert found[0] == found[31] == 0
    for size in range(1, 5):
        for members in combinations(range(5), size):
            p = expected[size - 1].item() / math.comb(5, size)
            frequency = found[sum(2**m for m in members)].item()
            assert abs(frequency - p) < 4 * (p * (1 - p) / draws) ** 0.5, members


def test_every_set_comes_with_its_complement(tangled):
    objective, images, target, blank, regions = tangled
    sets = coalitions(3, 5, 8, torch.Generator().manual_seed(1))
    values = objective.game(images, [blank], sets, target, regions)
    swapped = objective.game(images, [blank], ~sets, target, regions)
    torch.testing.assert_close(values, swapped.flip(1), rtol=0, atol=1e-14)


def test_the_minimiser_are_the_shapley_values(tangled, monkeypatch):
    objective, images, target, blank, regions = tangled
    # all sets in the kernel's proportions: 3360/(s(8−s)C(8,s)) copies of each, one of a pair holds the first player
    sets = [members for members in enumerate_sets(8) if members[0] and not members.all()]
    copies = [round(3360 / (s * (8 - s) * math.comb(8, s))) for s in (int(members.sum()) for members in sets)]
    assert sorted(set(copies)) == [3, 4, 10, 60]
    everything = torch.stack([m for m, count in zip(sets, copies, strict=True) for _ in range(count)])
    monkeypatch.setattr(shapley, "coalitions", lambda batch, *_: everything.expand(batch, -1, -1))
    phi = minimise(objective, images, target, blank, regions)
    expected = exact(objective, images, target, blank, regions)
    assert expected.abs().max() > 0.05
    torch.testing.assert_close(phi, expected, rtol=0, atol=1e-10)


def test_the_sampled_objective_converges_to_it(tangled):
    objective, images, target, blank, regions = tangled
    expected = exact(objective, images, target, blank, regions)

    def error(count):
        many = dataclasses.replace(objective, coalitions=count, chunk=4096)
        runs = [minimise(many, images, target, blank, regions, seed) - expected for seed in range(3)]
        return torch.stack(runs).square().mean().sqrt() / expected.square().mean().sqrt()

    assert error(8192) < 0.04
    # 1/√M: 64 times the sets, an eighth of the error
    assert error(8192) < error(128) / 4


def test_the_value_of_the_loss_by_hand(tangled):
    objective, images, target, blank, regions = tangled
    clf = objective.classifier
    maps = torch.randn(3, 1, 2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    objective = dataclasses.replace(objective, coalitions=6)
    out = objective(images, maps, target, [blank], regions, seed=11)
    sets = coalitions(3, 3, 8, torch.Generator().manual_seed(11))
    for i in range(3):

        def v(present, i=i):
            mixed = torch.where(present.view(1, 2, 4), images[i], blank[i])
            return clf(mixed[None]).softmax(dim=-1)[0, target[i]]

        full, empty = v(torch.ones(8, dtype=torch.bool)), v(torch.zeros(8, dtype=torch.bool))
        phi = maps[i].flatten() / 8
        gap = full - empty - phi.sum()
        phi = phi + gap / 8
        errors = [(v(s) - empty - phi[s].sum()) ** 2 for drawn in sets[i] for s in (drawn, ~drawn)]
        flats = [(v(s) - empty - (full - empty) * s.sum() / 8) ** 2 for drawn in sets[i] for s in (drawn, ~drawn)]
        torch.testing.assert_close(out.loss[i], 8 * torch.stack(errors).mean())
        torch.testing.assert_close(out.flat[i], 8 * torch.stack(flats).mean())
        torch.testing.assert_close(out.gap[i], gap.abs())


def test_normalised_values_are_efficient_and_keep_the_order(tangled):
    objective, images, target, blank, regions = tangled
    maps = torch.randn(3, 1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    phi = objective.values(images, maps, target, [blank], regions)
    clf = objective.classifier
    change = (clf(images).softmax(-1) - clf(blank).softmax(-1)).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(phi.sum(dim=1), change, rtol=0, atol=1e-14)
    assert torch.equal(phi.argsort(dim=1), maps.flatten(1).argsort(dim=1))


def test_gradient_by_finite_differences(tangled):
    objective, images, target, blank, regions = tangled
    maps = torch.randn(3, 1, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: objective(images, x, target, [blank], regions, seed=5).loss, (maps,))


@pytest.mark.parametrize("absence", ["pixels", "tokens"])
def test_chunks_do_not_matter(classifier, images, absence):
    maps = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    target, blank = classifier.resolve_target(images), references.blur(images)
    objective = ShapleyObjective(classifier, absence=absence, coalitions=6)
    regions = objective.regions(32, 32)
    assert (regions.rows, regions.cols) == (4, 4)
    expected = objective(images, maps, target, [blank], regions, seed=2)
    for chunk in (2, 6, 20):
        seen = []
        watch = classifier.module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(len(args[0])))
        out = dataclasses.replace(objective, chunk=chunk)(images, maps, target, [blank], regions, seed=2)
        watch.remove()
        assert max(seen) <= chunk
        assert sum(seen) == 3 * (6 + 2)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_seeds(classifier, images):
    maps = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    target, blank = classifier.resolve_target(images), references.black(images)
    objective = ShapleyObjective(classifier, coalitions=4)
    before = torch.get_rng_state()
    one, same, other = (
        objective(images, maps, target, [blank], objective.regions(32, 32), seed=seed).loss for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_references_and_shared_targets_are_averaged_in_the_game(tangled):
    objective, images, target, blank, regions = tangled
    sets = coalitions(3, 4, 8, torch.Generator().manual_seed(1))
    black = references.black(images)
    both = objective.game(images, [blank, black], sets, target, regions)
    single = [objective.game(images, [b], sets, target, regions) for b in (blank, black)]
    torch.testing.assert_close(both, sum(single) / 2)
    pair = torch.stack([target, (target + 1) % 3], dim=1)
    shared = objective.game(images, [blank], sets, pair, regions)
    parts = [objective.game(images, [blank], sets, pair[:, i], regions) for i in range(2)]
    torch.testing.assert_close(shared, sum(parts) / 2)


def test_a_surrogate_plays_in_the_classifiers_place(classifier, images):
    other = Classifier.wrap(tiny_vit(seed=9), (0.3,) * 3, (0.5,) * 3, (32, 32))
    maps = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    arguments = (images, maps, torch.tensor([0, 1, 2]), [references.black(images)], grid(32, 32, 4))
    plain, alone = ShapleyObjective(classifier)(*arguments), ShapleyObjective(other)(*arguments)
    assert torch.equal(ShapleyObjective(classifier, surrogate=other)(*arguments).loss, alone.loss)
    assert not torch.equal(plain.loss, alone.loss)
    few = Classifier.wrap(tiny_vit(classes=3), input_size=(32, 32))
    with pytest.raises(ValueError, match="the surrogate has 3 classes"):
        ShapleyObjective(classifier, surrogate=few)


def test_players(classifier):
    assert player_grid(classifier, 32, 32) == (4, 4)
    convolutional = Classifier.wrap(nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    assert player_grid(convolutional, 224, 224) == (14, 14)
    assert player_grid(convolutional, 64, 96) == (8, 12)
    assert player_grid(convolutional, 8, 8) == (2, 2)
    with torch.device("meta"):
        swin = Classifier(timm.create_model("swin_tiny_patch4_window7_224"), (0.5,) * 3, (0.5,) * 3, (224, 224), 1000)
    assert player_grid(swin, 224, 224) == (14, 14)
    assert ShapleyObjective(classifier, players=(2, 3)).regions(32, 32).count == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"absence": "words"}, "choose one of pixels, tokens"),
        ({"coalitions": 5}, "coalitions=5: give an even number"),
        ({"chunk": 1}, "chunk=1: give an integer ≥ 2"),
        ({"absence": "tokens", "players": (2, 2)}, "the players are the patches"),
    ],
)
def test_bad_settings(classifier, options, message):
    with pytest.raises(ValueError, match=message):
        ShapleyObjective(classifier, **options)


def test_a_single_player_is_refused(classifier, images):
    objective = ShapleyObjective(classifier, players=(1, 1))
    with pytest.raises(ValueError, match="nothing to share"):
        objective(images, images[:, :1], torch.zeros(3, dtype=torch.int64), [images], objective.regions(32, 32))


def shortened(module, pixels, keep, prefix):
    """A plain timm ViT on the tokens in ``keep`` (patches,) alone."""
    tokens = module.norm_pre(module._pos_embed(module.patch_embed(pixels)))
    left = torch.cat([torch.ones(prefix, dtype=torch.bool), keep])
    return module.forward_head(module.norm(module.blocks(tokens[:, left])))


@pytest.mark.parametrize("kind", BY_HAND)
def test_masked_tokens_are_dropped_tokens(kind):
    clf = make(kind)
    masks = TokenMasks(clf)
    images = torch.rand(4, 3, *clf.input_size, generator=torch.Generator().manual_seed(1))
    patches = math.prod(masks.grid(*clf.input_size))
    keep = torch.rand(4, patches, generator=torch.Generator().manual_seed(2)) < 0.4
    keep[1], keep[2] = True, F.one_hot(torch.tensor(3), patches).bool()
    pixels = clf.normalize(images)
    with masks.keeping(keep):
        found = clf.forward_normalized(pixels)
    expected = torch.cat([shortened(clf.module, pixels[i : i + 1], keep[i], masks.prefix) for i in range(4)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - clf(images))[0].abs().max() > 0.02
    torch.testing.assert_close(found[1], clf(images)[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_dropped_patches_are_not_seen(kind):
    clf = make(kind)
    masks = TokenMasks(clf)
    rows, cols = masks.grid(*clf.input_size)
    keep = torch.rand(3, rows * cols, generator=torch.Generator().manual_seed(2)) < 0.5
    keep[2] = False
    shown = keep.view(3, 1, rows, 1, cols, 1).expand(-1, -1, -1, 8, -1, 8).reshape(3, 1, *clf.input_size)
    images, others = torch.rand(2, 3, 3, *clf.input_size, generator=torch.Generator().manual_seed(1))
    plain = clf(images)
    with masks.keeping(keep):
        first, second = clf(images), clf(torch.where(shown, images, others))
    assert torch.isfinite(first).all()
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)
    assert (first - plain).abs().max() > 0.02
    with masks.keeping(torch.ones_like(keep)):
        torch.testing.assert_close(clf(images), plain, rtol=1e-4, atol=1e-4)
    with masks.keeping(keep[:1]):
        assert torch.allclose(clf(images[:1]), first[:1], atol=1e-5)
    # fused attention or not
    for module in clf.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not module.fused_attn
    with masks.keeping(keep):
        torch.testing.assert_close(clf(images), first, rtol=1e-3, atol=1e-4)


def test_masks_are_taken_off_also_after_an_exception():
    clf = make("average")
    masks = TokenMasks(clf)
    images = torch.rand(2, 3, 32, 32)
    expected = clf(images)
    with pytest.raises(RuntimeError, match="out of luck"), masks.keeping(torch.zeros(2, 16, dtype=torch.bool)):
        raise RuntimeError("out of luck")
    assert torch.equal(clf(images), expected)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in clf.modules())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("resnet18", {}),
        ("convnext_atto", {}),
        ("mixer_s32_224", {}),
        ("vit_relpos_small_patch16_224", {"depth": 1}),
        ("vit_tiny_patch16_224", {"depth": 1, "global_pool": "max", "class_token": False}),
        ("vit_tiny_patch16_224", {"depth": 1, "global_pool": "map"}),
    ],
)
def test_other_architectures_are_refused(architecture, options):
    with torch.device("meta"):
        module = timm.create_model(architecture, **options)
    clf = Classifier(module, (0.5,) * 3, (0.5,) * 3, (224, 224), 1000)
    with pytest.raises(ValueError, match=r"vit_shapley masks attention and accepts .*: choose fastshap") as error:
        ShapleyObjective(clf, absence="tokens")
    assert "\n" not in str(error.value)
    assert type(module).__name__ in str(error.value)
    ShapleyObjective(clf, absence="pixels")


def test_players_that_are_not_the_patches(classifier, images):
    objective = ShapleyObjective(classifier, absence="tokens")
    with pytest.raises(ValueError, match="3×3 players for 4×4 patches"):
        objective(images, images[:, :1], torch.zeros(3, dtype=torch.int64), [], grid(32, 32, 3))


class Mosaics(torch.utils.data.Dataset):
    """Images of 4×8 coloured tiles, 8 px each."""

    def __init__(self, size=8):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        tiles = torch.rand(3, 4, 8, generator=torch.Generator().manual_seed(index))
        return {"image": tiles.repeat_interleave(8, 1).repeat_interleave(8, 2)}


def fresh():
    """A ViT with eight patches, few enough to enumerate, and an untrained explainer."""
    module = tiny_vit(img_size=(32, 64), patch_size=16)
    clf = Classifier.wrap(module, (0.5,) * 3, (0.25,) * 3, (32, 64), num_classes=5)
    torch.manual_seed(3)
    return aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER), clf


def fit(config, resume=False, **options):
    explainer, clf = fresh()
    aha.Trainer(explainer, clf, Mosaics(), config, **options).fit(resume=resume, progress=False)
    return explainer, clf


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_training_finds_the_shapley_values(tmp_path, name):
    config = dataclasses.replace(
        CONFIG, objective=name, steps=60, coalitions=16, batch_size=8, accumulate=1, lr=3e-3, log_every=1
    )
    explainer, clf = fit(dataclasses.replace(config, output=str(tmp_path)))
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {"loss", "flat", "gap", "scores_std", "lr", "grad_norm", "images_per_second"} <= set(log[0])
    ratio = [record["loss"] / record["flat"] for record in log]
    assert ratio[0] == pytest.approx(1, abs=0.1)
    assert sum(ratio[-10:]) < 0.9 * sum(ratio[:10])
    # against enumeration
    images = torch.stack([Mosaics()[i]["image"] for i in range(8)])
    target = clf.resolve_target(images)
    method = attributors.create(name, clf, explainer=explainer)
    blank, regions = references.mean(images, clf.mean_colour), method.game.regions(32, 64)
    expected = exact(method.game, images, target, blank, regions)
    phi = method.values(images, target).flatten(1).double()
    torch.testing.assert_close(phi.sum(dim=1), expected.sum(dim=1), rtol=0, atol=1e-5)
    correlation = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(phi, expected, strict=True)]
    # random values of eight players: a standard deviation of 0.38 each, 0.13 for the mean of eight images
    assert sum(correlation) / 8 > 0.6, correlation
    untrained, _ = fresh()
    start = method.game.shares(untrained.attribute(images, target), regions).double()
    start = start + (expected - start).mean(dim=1, keepdim=True)
    assert (phi - expected).norm() < 0.8 * (start - expected).norm()


@pytest.mark.parametrize("name", METHODS)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, name):
    config = dataclasses.replace(CONFIG, objective=name, output=str(tmp_path / "whole"), save_every=3)
    whole = fit(config)[0].decoder.state_dict()
    first = tmp_path / "whole" / "checkpoints" / "step_00000003"
    resumed = fit(dataclasses.replace(config, output=str(tmp_path / "again")), resume=first)[0].decoder.state_dict()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    other = fit(dataclasses.replace(config, output=None, seed=7))[0].decoder.state_dict()
    assert any(not torch.equal(value, other[key]) for key, value in whole.items())
    changed = dataclasses.replace(config, coalitions=6)
    with pytest.raises(ValueError, match=r"other settings \(coalitions\)"):
        fit(changed, resume=True)
    with pytest.raises(ValueError, match=r"other settings \(.*objective"):
        fit(dataclasses.replace(config, objective="ranking"), resume=True)


def test_an_objective_of_ones_own(tmp_path):
    other = Classifier.wrap(tiny_vit(seed=9, img_size=(32, 64), patch_size=16), input_size=(32, 64), num_classes=5)
    explainer, clf = fresh()
    objective = ShapleyObjective(clf, coalitions=4, surrogate=other)
    config = dataclasses.replace(CONFIG, steps=2, output=str(tmp_path))
    aha.Trainer(explainer, clf, Mosaics(), config, objective).fit(progress=False)
    loaded = aha.Explainer.from_pretrained(tmp_path / "explainer", clf)
    assert loaded.settings["objective"] == "fastshap"
    assert loaded.settings["references"] == ["mean"]
    with pytest.raises(ValueError, match="trained with a surrogate: pass surrogate="):
        attributors.create("fastshap", clf, explainer=loaded)
    method = attributors.create("fastshap", clf, explainer=loaded, surrogate=other)
    images = torch.stack([Mosaics()[i]["image"] for i in range(2)])
    blank = references.mean(images, clf.mean_colour)
    change = (other.probabilities(images) - other.probabilities(blank))[:, 1]
    torch.testing.assert_close(method.values(images, torch.tensor([1, 1])).sum(dim=(1, 2)), change)
    # a surrogate is part of what a resumed run must share
    saved = checkpoint.available(tmp_path / "checkpoints")[-1]
    trainer = aha.Trainer(*fresh(), Mosaics(), config, ShapleyObjective(clf, coalitions=4))
    with pytest.raises(ValueError, match=r"other settings \(surrogate\)"):
        trainer.fit(resume=saved, progress=False)


@pytest.mark.parametrize(
    "options",
    [{"targets": 2}, {"targets": 2, "shared_map": True}, {"players": (2, 3)}, {"references": ("black", "blur")}],
)
def test_options_run(options):
    explainer, _ = fit(dataclasses.replace(CONFIG, objective="fastshap", steps=2, **options))
    assert all(torch.isfinite(value).all() for value in explainer.decoder.state_dict().values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "lime"}, "choose one of ranking, fastshap, vit_shapley"),
        ({"objective": "fastshap", "references": ("white",)}, "choose one or more of black, mean, blur"),
        ({"objective": "vit_shapley", "references": ("black",)}, "vit_shapley drops tokens"),
    ],
)
def test_bad_training_settings(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folders of explainers trained for two steps, by objective."""
    folders = {}
    for name in (*METHODS, "ranking"):
        folders[name] = tmp_path_factory.mktemp(name)
        fit(dataclasses.replace(CONFIG, objective=name, steps=2, fractions=4, n_iters=3, output=str(folders[name])))
    return {name: folder / "explainer" for name, folder in folders.items()}


@pytest.mark.parametrize("name", METHODS)
def test_attributor(trained, name):
    _, clf = fresh()
    images = torch.stack([Mosaics()[i]["image"] for i in range(3)])
    method = attributors.create(name, clf, explainer=trained[name])
    with attributors.count_passes(clf) as passes:
        maps = method.attribute(images, [0, 3, 1])
    # v(N), v(∅) and the features that the explainer reads
    assert (passes.forward, passes.backward) == (3 * 3, 0)
    assert maps.shape == (3, 1, 32, 64)
    assert maps.dtype == torch.float32
    phi = method.values(images, torch.tensor([0, 3, 1]))
    assert phi.shape == (3, 2, 4)
    torch.testing.assert_close(maps, F.interpolate(phi[:, None], (32, 64), mode="bilinear"))
    if name == "fastshap":
        empty = clf.probabilities(references.mean(images, clf.mean_colour))
    else:
        with TokenMasks(clf).keeping(torch.zeros(3, 8, dtype=torch.bool)):
            empty = clf.probabilities(images)
    change = (clf.probabilities(images) - empty).gather(1, torch.tensor([[0], [3], [1]]))[:, 0]
    torch.testing.assert_close(phi.sum(dim=(1, 2)), change, rtol=0, atol=1e-6)
    alone = torch.cat([method.attribute(image[None], t) for image, t in zip(images, (0, 3, 1), strict=True)])
    torch.testing.assert_close(maps, alone, rtol=1e-4, atol=1e-6)
    small = attributors.create(name, clf, explainer=method.explainer, internal_batch_size=1)
    torch.testing.assert_close(small.attribute(images, [0, 3, 1]), maps, rtol=1e-4, atol=1e-6)
    assert not torch.equal(method.attribute(images, 0), method.attribute(images, 1))


@pytest.mark.parametrize("name", ["aha", *METHODS])
def test_an_explainer_is_needed(trained, name):
    _, clf = fresh()
    about = attributors.available()[name]
    assert about.paper
    if name == "aha":  # has one that serves any classifier
        assert attributors.create(name, clf).explainer.sees_evidence
    else:
        with pytest.raises(ValueError, match=f"{name} needs a trained explainer: pass explainer=") as error:
            attributors.create(name, clf)
        assert "\n" not in str(error.value)
    wrong = "ranking" if name != "ranking" and name != "aha" else "fastshap"
    suggested = "aha" if wrong == "ranking" else wrong
    with pytest.raises(ValueError, match=f"this one was trained with {wrong}: use it as {suggested}") as error:
        attributors.create(name, clf, explainer=trained[wrong])
    assert "\n" not in str(error.value)


def test_aha_from_a_folder(trained):
    _, clf = fresh()
    images = torch.stack([Mosaics()[i]["image"] for i in range(2)])
    explainer = aha.Explainer.from_pretrained(trained["ranking"], clf)
    assert explainer.settings["objective"] == "ranking"
    maps = attributors.create("aha", clf, explainer=str(trained["ranking"])).attribute(images, 1)
    assert torch.equal(maps, explainer.attribute(images, 1, scale="calibrated"))


def test_all_skips_what_needs_an_explainer():
    skipped = []
    chosen = cli._methods(("all",), fresh()[1], 0, skipped)
    needed = {line.split(":")[0] for line in skipped if "needs a trained explainer" in line}
    assert needed == {"fastshap", "vit_shapley"}
    assert not needed & set(chosen)


@pytest.mark.parametrize("name", METHODS)
def test_train_and_evaluate_on_scenes(tmp_path, name, capsys):
    fast = ["--steps", "2", "--batch-size", "2", "--coalitions", "4", "--targets", "1", "--limit", "4"]
    narrow = ["--embedding", "8", "--width", "8", "--head", "8"]
    run = str(tmp_path / "run")
    assert cli.main(["train", "--objective", name, "--output", run, *fast, *narrow]) == 0
    arguments = ["--explainer", f"{run}/explainer", "--output", str(tmp_path / "out"), "--limit", "2"]
    assert cli.main(["evaluate", *arguments]) == 0
    assert set(json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]) == {name}
    assert name in capsys.readouterr().out


def test_train_bad_input(tmp_path, capsys):
    fast = ["--steps", "1", "--batch-size", "2", "--limit", "2", "--output", str(tmp_path / "out")]
    assert cli.main(["train", "--objective", "fastshap", "--coalitions", "3", *fast]) == 1
    assert "coalitions=3: give an even number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
