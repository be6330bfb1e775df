"""Two small images' maps of every method, by its formula in NumPy, float64, image by image and patch by patch.

Of the library only the network's own steps (`by_hand`) and its random draws are used. Methods, options and
architectures are gone through in the methods' own test files; here is one case of each, and none is left out.
"""

import functools
import importlib
import itertools
import zlib

import numpy as np
import pytest
import torch

from aha import Explainer, attributors

from ..toys import TINY_DECODER
from .architectures import make, pictures
from .by_hand import embedded, forward_by_hand, gradients_by_hand
from .test_fullgrad import shares_by_hand
from .test_relevance import relevances_by_hand

SIDE, CELLS, HEADS, BLOCKS = 32, 4, 3, 3
PATCHES = range(CELLS * CELLS)
TARGET = [1, 3]
STEPS = 20


@functools.cache
def classifier():
    clf = make("vit").double()
    for layer in (clf.module.patch_embed.proj, clf.module.head):
        layer.weight.data *= 2  # confidences that differ between images
    return clf


class Sight:
    """One image: pixels, normalised pixels, and what the network makes of them."""

    def __init__(self, image, target):
        self.clf, self.vit, self.image, self.target = classifier(), classifier().module, image, target
        mean, std = ([[[v]] for v in values] for values in ((0.5, 0.4, 0.6), (0.25, 0.2, 0.3)))
        self.mean, self.std = np.array(mean), np.array(std)
        self.pixels = self.normalised(image.numpy())

    def normalised(self, image):
        return (image - self.mean) / self.std

    @functools.cached_property
    def attention(self):
        """(A, G): attention of every block (block, head, query, key) and the logit's derivatives by it."""
        return tuple(np.array([t.numpy() for t in part]) for part in self.gradients(self.pixels))

    def gradients(self, pixels):
        return gradients_by_hand(self.vit, torch.tensor(pixels)[None], self.target)

    def seen(self, name):
        """One of the network's values for each block, and the logit's derivatives by it, both (block, token, …)."""
        seen = forward_by_hand(self.vit, torch.tensor(self.pixels)[None].requires_grad_())
        gradients = torch.autograd.grad(seen["logits"][0][self.target], seen[name])
        return tuple(np.array([t.detach().numpy() for t in part]) for part in (seen[name], gradients))

    def logit(self, pixels):
        with torch.no_grad():
            return self.vit(torch.tensor(pixels)[None])[0, self.target].item()

    def confidence(self, pixels):
        with torch.no_grad():
            return softmax(self.vit(torch.tensor(pixels)[None])[0].numpy())[self.target]

    def pixel_gradient(self, image):
        """∂logit/∂x of x in [0, 1]."""
        x = torch.tensor(self.normalised(image))[None].requires_grad_()
        return torch.autograd.grad(self.vit(x)[0, self.target], x)[0][0].numpy() / self.std

    def head(self, tokens):
        with torch.no_grad():
            return self.vit.forward_head(self.vit.norm(tokens))[0].numpy()


def softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def rescaled(values):
    return (values - values.min()) / (values.max() - values.min())


def along(values, size):
    """Bilinear enlargement of the first dimension: pixel centres at (i + ½)·n/size − ½, the border repeated."""
    n, rows = len(values), []
    for i in range(size):
        at = min(max((i + 0.5) * n / size - 0.5, 0), n - 1)
        low = int(at)
        high = min(low + 1, n - 1)
        rows.append((1 - (at - low)) * values[low] + (at - low) * values[high])
    return np.array(rows)


def enlarged(grid, height=SIDE, width=SIDE):
    return along(along(grid, height).T, width).T


def upsampled(patches):
    return enlarged(np.asarray(patches).reshape(CELLS, CELLS))


def cell(row, col, cells=CELLS):
    return row * cells // SIDE * cells + col * cells // SIDE


# one function for each method: what one image's map is, from the class token's row where there is one


def random(sight):
    generator = torch.Generator().manual_seed(zlib.crc32(sight.image.float().numpy().tobytes(), 0))
    return torch.rand(1, SIDE, SIDE, generator=generator)[0].numpy()


def raw_attention(sight):
    return upsampled(sum(head[0, 1:] for head in sight.attention[0][-1]) / HEADS)


def rollout(sight):
    joint = np.eye(17)
    for block in sight.attention[0]:
        mixed = np.eye(17) + sum(block) / HEADS
        joint = np.array([row / row.sum() for row in mixed]) @ joint
    return upsampled(joint[0, 1:])


def gradcam_vit(sight):
    total = 0
    for attention, gradient in zip(*(part[-1] for part in sight.attention), strict=True):
        total = total + gradient[0, 1:].mean() * attention[0, 1:]
    return upsampled(np.maximum(total, 0))


def gradcam_vit_by_element(sight):
    total = 0
    for attention, gradient in zip(*(part[-1] for part in sight.attention), strict=True):
        total = total + gradient[0, 1:] * attention[0, 1:] / HEADS
    return upsampled(np.maximum(total, 0))


def integrated(sight):
    """W over the patches: of the logit, along the normalised pixels' path from zero."""
    mean = 0
    for k in range(1, STEPS + 1):
        mean = mean + sight.gradients(k / STEPS * sight.pixels)[1][-1].numpy() / STEPS
    return sum(np.maximum(head[0, 1:], 0) for head in mean) / HEADS


def attention_ig(sight):
    return upsampled(integrated(sight))


def transition_attention(sight):
    mixed = [sum(block) / HEADS for block in sight.attention[0]]
    state = mixed.pop()[0]
    while mixed:
        state = state + state @ mixed.pop()
    return upsampled(state[1:] * integrated(sight))


def bi_attention(sight):
    joint = np.eye(17)
    for attention, gradient in list(zip(*sight.attention, strict=True))[1:]:
        importance = [np.abs(a.T @ g).mean() for a, g in zip(attention, gradient, strict=True)]
        joint = joint + sum(i / sum(importance) * a for i, a in zip(importance, attention, strict=True)) @ joint
    return upsampled(joint[0, 1:] * integrated(sight))


def bi_attention_by_token(sight):
    seen = forward_by_hand(sight.vit, torch.tensor(sight.pixels)[None])
    joint = np.eye(17)
    for at in range(1, BLOCKS):
        mixed = sum(sight.attention[0][at]) / HEADS
        entering = seen["entering"][at].detach().numpy()
        values = np.concatenate(list(seen["values"][at].detach().numpy()), axis=1)
        projection = sight.vit.blocks[at].attn.proj.weight.detach().numpy()
        for token in range(17):
            size = np.sqrt((entering[token] ** 2).sum())
            mixed[:, token] *= np.sqrt(((projection @ values[token]) ** 2).sum()) / size
        joint = joint + mixed @ joint
    return upsampled(joint[0, 1:] * integrated(sight))


def chefer(sight):
    relevances, _ = relevances_by_hand(sight.vit, torch.tensor(sight.pixels)[None], sight.target, "vit")
    joint = np.eye(17)
    for relevance, gradient in zip(relevances, sight.attention[1], strict=True):
        joint = joint + np.maximum(gradient * relevance.numpy(), 0).sum(axis=0) / HEADS @ joint
    return upsampled(joint[0, 1:])


def legrad(sight):
    seen = forward_by_hand(sight.vit, torch.tensor(sight.pixels)[None])
    total = np.zeros(17)
    for heads, tokens in zip(seen["attention_heads"], seen["leaving"], strict=True):
        logit = sight.vit.head(sight.vit.norm(tokens[0]))[sight.target]
        for gradient in torch.autograd.grad(logit, heads, retain_graph=True):
            for row in gradient.numpy():
                total += np.maximum(row, 0) / (HEADS * 17)
    return upsampled(total[1:])


def attcam(sight):
    tokens, gradients = sight.seen("entering")
    total = np.zeros(17)
    for at in range(BLOCKS - 1):
        received = sum(head[query] for head in sight.attention[0][at] for query in range(17)) / (HEADS * 17)
        total += received * (tokens[at + 1] * gradients[at + 1]).sum(axis=1)
    return upsampled(total[1:])


def fullgrad_plus(sight):
    with attributors.undisturbed(sight.clf):
        return upsampled(shares_by_hand(sight.clf, sight.image, sight.target).numpy()[1:])


def libragrad(sight):
    """Pixels times the gradient of a network whose attention, gates and scales are held as they are."""

    def norm(layer, x):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + layer.eps).rsqrt().detach()
        return centred * scale * layer.weight + layer.bias

    pixels = torch.tensor(sight.pixels)[None].requires_grad_()
    seen = forward_by_hand(sight.vit, pixels.detach())
    tokens = embedded(sight.vit, pixels)[0][0]
    for at, block in enumerate(sight.vit.blocks):
        values = (norm(block.norm1, tokens) @ block.attn.qkv.weight[48:].T + block.attn.qkv.bias[48:]).split(8, dim=1)
        heads = [a.detach() @ v for a, v in zip(seen["attention_heads"][at], values, strict=True)]
        tokens = tokens + block.attn.proj(torch.cat(heads, dim=1))
        gate = (seen["active"][at] / seen["hidden"][at]).detach()
        tokens = tokens + block.mlp.fc2(gate * block.mlp.fc1(norm(block.norm2, tokens)))
    logit = sight.vit.head(norm(sight.vit.norm, tokens)[0])[sight.target]
    assert logit.item() == pytest.approx(sight.logit(sight.pixels), rel=1e-9)
    return (sight.pixels * torch.autograd.grad(logit, pixels)[0][0].numpy()).sum(axis=0)


def input_x_gradient(sight):
    image = sight.image.numpy()
    return np.abs((image * sight.pixel_gradient(image)).sum(axis=0))


def integrated_gradients(sight):
    image, total = sight.image.numpy(), 0
    for at, weight in zip(*np.polynomial.legendre.leggauss(10), strict=True):
        total = total + weight / 2 * sight.pixel_gradient((1 + at) / 2 * image)
    return (image * total).sum(axis=0)


def channels(sight):
    """Maps of the last block's first norm and the gradients by them, both (channel, row, column)."""
    return (part[-1][1:].T.reshape(24, CELLS, CELLS) for part in sight.seen("normed"))


def gradcam(sight):
    return enlarged(np.maximum(sum(g.mean() * a for a, g in zip(*channels(sight), strict=True)), 0))


def gradcam_pp(sight):
    total = 0
    for a, g in zip(*channels(sight), strict=True):
        alpha = g**2 / (2 * g**2 + a.sum() * g**3 + 1e-12)
        total = total + (alpha * np.maximum(g, 0)).sum() * a
    return enlarged(np.maximum(total, 0))


def hirescam(sight):
    return enlarged(np.maximum(sum(g * a for a, g in zip(*channels(sight), strict=True)), 0))


def scorecam(sight):
    maps, _ = channels(sight)
    scores = [sight.logit(sight.pixels * rescaled(enlarged(a))) for a in maps]
    return enlarged(np.maximum(sum(w * a for w, a in zip(softmax(np.array(scores)), maps, strict=True)), 0))


def ablationcam(sight):
    seen = forward_by_hand(sight.vit, torch.tensor(sight.pixels)[None])
    block, entering, normed = sight.vit.blocks[-1], seen["entering"][-1][None], seen["normed"][-1][None]
    score, total = sight.logit(sight.pixels), 0
    for channel, a in enumerate(next(channels(sight))):
        without = normed.clone()
        without[0, 1:, channel] = 0
        tokens = entering + block.attn(without)
        ablated = sight.head(tokens + block.mlp(block.norm2(tokens)))[sight.target]
        total = total + (score - ablated) / score * a
    return enlarged(np.maximum(total, 0))


def complete_linkage(vectors, threshold):
    """Clusters as lists of indices: the nearest two merge until none are nearer than ``threshold``."""
    units = vectors / np.sqrt((vectors**2).sum(axis=1, keepdims=True))
    distances, clusters = 1 - units @ units.T, [[i] for i in range(len(vectors))]
    while len(clusters) > 1:
        apart = {
            (a, b): distances[np.ix_(clusters[a], clusters[b])].max()
            for a, b in itertools.combinations(range(len(clusters)), 2)
        }
        a, b = min(apart, key=apart.get)
        if apart[a, b] >= threshold:
            break
        clusters[a] += clusters.pop(b)
    return sorted(clusters, key=min)


def vit_cx(sight):
    maps = np.array([rescaled(enlarged(a)) for a in next(channels(sight))])
    clusters = complete_linkage(maps.reshape(24, -1), 0.3)
    assert 1 < len(clusters) < 24
    whole, total, coverage = sight.confidence(sight.pixels), 0, 0
    for k, members in enumerate(clusters):
        mask = rescaled(maps[members].mean(axis=0))
        generator = torch.Generator().manual_seed(zlib.crc32(f"0 {k}".encode()))
        noise = 0.1 * torch.randn(3, SIDE, SIDE, generator=generator).numpy() * (1 - mask)
        score = sight.confidence(sight.pixels * mask + noise) - sight.confidence(sight.pixels + noise) + whole
        total, coverage = total + score * mask, coverage + mask
    return total / coverage


def tis(sight):
    """With more masks than channels every channel is a cluster of its own."""
    seen = forward_by_hand(sight.vit, torch.tensor(sight.pixels)[None])
    tokens = embedded(sight.vit, torch.tensor(sight.pixels)[None])[0]
    total, shown = np.zeros(16), np.zeros(16)
    for leaving in seen["leaving"]:
        for channel in leaving.detach().numpy()[1:].T:
            kept = sorted(np.argsort(-channel, kind="stable")[:8])
            state = tokens[:, [0, *(1 + patch for patch in kept)]]
            for block in sight.vit.blocks:
                state = block(state)
            total[kept] += softmax(sight.head(state))[sight.target]
            shown[kept] += 1
    return upsampled(total / np.maximum(shown, 1))


def caap(sight):
    """Blocks 1 and 2 of 3, from the mean colour."""

    def inputs(tokens, replace=None):
        entering = []
        for at, block in enumerate(sight.vit.blocks):
            if replace is not None and at >= 1:
                tokens = tokens.clone()
                tokens[0, 1 + replace] = source[at][0, 1 + replace]
            entering.append(tokens)
            tokens = block(tokens)
        return entering, sight.head(tokens)[sight.target]

    start = embedded(sight.vit, torch.tensor(sight.pixels)[None])[0]
    neutral = embedded(sight.vit, torch.zeros_like(torch.tensor(sight.pixels))[None])[0]
    source, _ = inputs(start)
    _, nothing = inputs(neutral)
    return upsampled([inputs(neutral, patch)[1] - nothing for patch in PATCHES])


def rise(sight):
    generator = torch.Generator().manual_seed(0)
    coins = (torch.rand(30, 1, 7, 7, generator=generator) < 0.5).double().numpy()[:, 0]
    down, right = torch.rand(2, 30, generator=generator).numpy()
    total, coverage = 0, 0
    for coin, y, x in zip(coins, (down * 5).astype(int), (right * 5).astype(int), strict=True):
        # cells of ⌈32/7⌉ = 5 pixels, one cell more than the image
        mask = enlarged(coin, 37, 37)[y : y + SIDE, x : x + SIDE]
        total, coverage = total + sight.confidence(sight.pixels * mask) * mask, coverage + mask
    return total / coverage


def game(sight, cells):
    """v: a coalition of cells → the confidence where the others have the mean colour."""
    where = np.array([[cell(row, col, cells) for col in range(SIDE)] for row in range(SIDE)])

    @functools.cache
    def value(members):
        return sight.confidence(sight.pixels * np.isin(where, members))  # zero is the mean colour, normalised

    return value


def lime(sight):
    value = game(sight, CELLS)
    drawn = torch.rand(40, 16, generator=torch.Generator().manual_seed(0)) < 0.5
    drawn[0] = True
    gram, moments = np.zeros((17, 17)), np.zeros(17)
    for z in drawn.double().numpy():
        distance = 1 - np.sqrt(z.sum() / 16)
        weight, row = np.exp(-(distance**2) / (2 * 0.25**2)), np.array([1, *z])
        gram += weight * np.outer(row, row)
        moments += weight * row * value(tuple(np.flatnonzero(z).tolist()))
    # the intercept goes free
    return upsampled(np.linalg.solve(gram + np.diag([0] + [1] * 16), moments)[1:])


def kernel_shap(sight):
    """The Shapley values of four players: their mean contribution over all orders."""
    value, phi = game(sight, 2), np.zeros(4)
    orders = list(itertools.permutations(range(4)))
    for order in orders:
        for at, player in enumerate(order):
            before = value(tuple(sorted(order[:at])))
            phi[player] += (value(tuple(sorted(order[: at + 1]))) - before) / len(orders)
    return enlarged(phi.reshape(2, 2))


def efficient(sight, nothing):
    """A network's map as a density of φ, shifted so that Σφ = v(N) − v(∅)."""
    density = explainer().attribute(sight.image[None].float(), sight.target)[0, 0].double().numpy()
    phi = np.array([density[i : i + 8, j : j + 8].mean() / 16 for i in range(0, 32, 8) for j in range(0, 32, 8)])
    return upsampled(phi + (sight.confidence(sight.pixels) - nothing - phi.sum()) / 16)


def fastshap(sight):
    return efficient(sight, sight.confidence(0 * sight.pixels))


def vit_shapley(sight):
    state = embedded(sight.vit, torch.tensor(sight.pixels)[None])[0][:, :1]
    for block in sight.vit.blocks:
        state = block(state)
    return efficient(sight, softmax(sight.head(state))[sight.target])


@functools.cache
def explainer():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Explainer.build(narrow(), evidence=False, decoder=TINY_DECODER)


@functools.cache
def narrow():
    """The classifier in float32, for networks that are."""
    clf = make("vit")
    clf.load_state_dict(classifier().state_dict())
    return clf


# name → the function above and options of the method; learned ones get `explainer` with the objective
FIXTURES = {
    "ablationcam": (ablationcam, {}),
    "attcam": (attcam, {}),
    "attention_ig": (attention_ig, {}),
    "bi_attention": (bi_attention, {"start": 1}),
    "bi_attention by token": (bi_attention_by_token, {"level": "token", "start": 1}),
    "caap": (caap, {"neutral": "mean"}),
    "chefer": (chefer, {}),
    "fastshap": (fastshap, {}),
    "fullgrad_plus": (fullgrad_plus, {}),
    "gradcam": (gradcam, {}),
    "gradcam_pp": (gradcam_pp, {}),
    "gradcam_vit": (gradcam_vit, {}),
    "gradcam_vit by element": (gradcam_vit_by_element, {"weights": "element"}),
    "hirescam": (hirescam, {}),
    "input_x_gradient": (input_x_gradient, {}),
    "integrated_gradients": (integrated_gradients, {"n_steps": 10}),
    "kernel_shap": (kernel_shap, {"cells": 2}),
    "legrad": (legrad, {}),
    "libragrad": (libragrad, {}),
    "lime": (lime, {"n_samples": 40}),
    "random": (random, {}),
    "raw_attention": (raw_attention, {}),
    "rise": (rise, {"n_masks": 30}),
    "rollout": (rollout, {}),
    "scorecam": (scorecam, {}),
    "tis": (tis, {}),
    "transition_attention": (transition_attention, {}),
    "vit_cx": (vit_cx, {"threshold": 0.3}),
    "vit_shapley": (vit_shapley, {}),
}
# by hand where their parts are: the step of a refinement, the search of MDA
ELSEWHERE = {
    "aha": ("tests.test_refinement", "test_two_steps_by_hand"),
    "mda": ("tests.attributors.test_mda", "test_maps_by_hand"),
}
LEARNED = ("fastshap", "vit_shapley")


def test_every_method_has_a_fixture():
    assert {*(variant.split()[0] for variant in FIXTURES), *ELSEWHERE} == set(attributors.available())
    for module, test in ELSEWHERE.values():
        assert callable(getattr(importlib.import_module(module), test))


@pytest.mark.parametrize("variant", FIXTURES)
def test_maps_of_two_images_by_hand(variant):
    name = variant.split()[0]
    by_hand, options = FIXTURES[variant]
    if name == "integrated_gradients":
        pytest.importorskip("captum")
    clf = classifier()
    images = pictures(clf, 2)
    if name in LEARNED:
        clf, images = narrow(), images.float()
        explainer().settings.update(objective=name, references=("mean",))
        options = {"explainer": explainer()}
    maps = attributors.create(name, clf, **options).attribute(images, TARGET)[:, 0].double().numpy()
    expected = np.array([by_hand(Sight(image, t)) for image, t in zip(images.double(), TARGET, strict=True)])
    # maps and confidences are rounded to float32, an explainer computes in it; what pixels have in common says nothing
    bound = 1e-4 if name in LEARNED else 1e-5
    assert np.abs(maps - expected).max() <= bound * (expected.max() - expected.min())
    assert all(image.max() > image.min() for image in expected)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3 * np.abs(expected).max()
