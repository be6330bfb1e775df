"""The demo classifier: a small vision transformer that reads the digit in a scene, shipped with its weights.

    python -m aha.demo.classifier --out scenes_vit.safetensors

makes the weights again. A plain timm VisionTransformer (64 px, patch 8, 6 blocks of width 96, class token),
so whatever works on timm models works on this one. Besides whole scenes it is trained on scenes with parts
replaced by the reference images of deletion curves (black, mean colour, blur), and, towards the uniform
distribution, on scenes without a digit and on bare references: its answers on perturbed images are meant, not
accidents of extrapolation.

From labels alone a transformer this small spends thousands of steps before it finds the digit at all. A
guide, dropped long before the end of training, has the patch tokens trace the strokes and name the digit; it
is not part of the model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer

from aha.classifier import Classifier
from aha.data.scenes import Scenes
from aha.precision import autocast, stepwise_attention, uses_bf16

CONFIG = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 6, "num_heads": 3, "num_classes": 10}
MEAN = STD = (0.5, 0.5, 0.5)
WEIGHTS = "scenes_vit.safetensors"

STEPS = 5000
BATCH_SIZE = 64
LEARNING_RATE = 1e-3
WARM_UP = 200  # steps
SMOOTHING = 0.02  # of the labels
OCCLUDED = 0.35  # share of the images with parts replaced
EMPTY = 0.08  # share of the images without a digit
VISIBLE = 0.6  # an occluded image shows at least this share of its digit, or is left whole
WHOLE_UNTIL = 0.2  # share of the training before the first occluded or empty image
GUIDED_UNTIL = 0.6  # share of the training over which the guide's weight falls to zero


def build(**config) -> VisionTransformer:
    """The untrained network: images (B, 3, 64, 64), normalised by MEAN and STD, to logits (B, 10).

    config: overrides of CONFIG, the keyword arguments of timm's VisionTransformer.
    """
    module = VisionTransformer(**{**CONFIG, **config})
    size = module.patch_embed.img_size
    # where timm keeps what a model expects, read by timm.data.resolve_model_data_config
    module.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": "aha_scenes_vit",
        "input_size": (3, *size),
        "fixed_input_size": True,
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": module.num_classes,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return module


def weights_path() -> Path:
    """Where the shipped weights are."""
    return Path(__file__).with_name(WEIGHTS)


def load(path: str | os.PathLike | None = None) -> VisionTransformer:
    """The trained network, float32, in eval mode, on the CPU, gradients off.

    path: a file written by `train`; None is the one shipped. Raises FileNotFoundError where it is missing.
    """
    path = weights_path() if path is None else path
    with safe_open(str(path), "pt") as file:
        module = build(**json.loads(file.metadata()["timm"]))
        module.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
    return module.eval().requires_grad_(False)


def scenes() -> Classifier:
    """The classifier ``scenes``: the shipped network, with its normalisation and the names of its classes."""
    with torch.inference_mode(False):
        module, size = load(), CONFIG["img_size"]
    made = {"kind": "scenes", "name": "scenes"}
    return Classifier(module, MEAN, STD, (size, size), CONFIG["num_classes"], Scenes.class_names, source=made)


def info(path: str | os.PathLike | None = None) -> dict[str, str]:
    """How a weights file was made: timm arguments, mean, std (JSON), accuracies, command, seed, seconds."""
    path = weights_path() if path is None else path
    with safe_open(str(path), "pt") as file:
        return file.metadata()


def normalise(images: torch.Tensor) -> torch.Tensor:
    """RGB in [0, 1] to what the network takes, (B, 3, H, W)."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


@torch.no_grad()
def predict(module: torch.nn.Module, images: torch.Tensor, batch_size: int = 128) -> torch.Tensor:
    """Probabilities (B, 10) for images (B, 3, H, W), RGB in [0, 1], in eval mode; the mode is put back."""
    training = module.training
    module.eval()
    try:
        return torch.cat([module(normalise(part)).softmax(-1) for part in images.split(batch_size)])
    finally:
        module.train(training)


def accuracy(module: torch.nn.Module, split: str = "val", size: int = 1024, seed: int = 1) -> float:
    """Share of right answers on `size` scenes of a split."""
    scenes = Scenes(split, size=size, seed=seed).batch(range(size))
    return (predict(module, scenes["image"]).argmax(-1) == scenes["label"]).float().mean().item()


def train(
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    out: str | os.PathLike | None = None,
    command: str = "aha.demo.classifier.train()",
) -> VisionTransformer:
    """Trains from scratch on scenes of the train split, each seen once, and reports accuracies.

    out: where to write the weights, float16 safetensors with `info` as metadata; None writes nothing. The
        returned
    module holds the rounded weights, in eval mode. About 20 minutes on two cores.
    """
    if out is not None and not os.path.isdir(folder := os.path.dirname(os.path.abspath(out))):
        raise FileNotFoundError(f"cannot write {out}: no folder {folder}")
    started = time.perf_counter()
    torch.manual_seed(seed)
    module = build(weight_init="jax")  # timm's default is too small for a width of 96: attention would start flat
    batches = _Batches(batch_size, seed, whole_until=int(WHOLE_UNTIL * steps))
    guide = _Guide(module)
    fit(module, batches, steps, LEARNING_RATE, WARM_UP, "training the demo classifier", guide)
    state = {name: tensor.half().contiguous() for name, tensor in module.state_dict().items()}
    module.load_state_dict(state)  # what is measured is what is stored
    module.eval().requires_grad_(False)
    record = {
        "timm": json.dumps(CONFIG),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
        "accuracy_val": f"{accuracy(module, 'val'):.4f}",
        "accuracy_test": f"{accuracy(module, 'test'):.4f}",
        "command": command,
        "seed": str(seed),
        "steps": str(steps),
        "batch_size": str(batch_size),
        "seconds": f"{time.perf_counter() - started:.0f}",
    }
    if out is not None:
        safetensors.torch.save_file(state, str(out), metadata=record)
    print(f"accuracy {record['accuracy_val']} (val), {record['accuracy_test']} (test), {record['seconds']} s")
    return module


def fit(module, batches, steps: int, learning_rate: float, warm_up: int = 0, title: str = "training", guide=None):
    """Muon and AdamW with warm-up and cosine decay. `batches` is a function from step to images (B, 3, H, W),
    target probabilities (B, 10) and masks (B, 1, H, W); the next batch is made in a thread meanwhile.
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    parameters = [*module.parameters(), *(guide.parameters() if guide else ())]
    # Muon needs half the steps of AdamW here, and suits only the matrices between layers
    inner = [p for p in module.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    outer = [p for p in parameters if id(p) not in chosen]
    optimizers = (
        torch.optim.Muon(inner, lr=3 * learning_rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, weight_decay=0.05, fused=True),
    )

    def rate(step):
        rising = min(1.0, (step + 1) / (warm_up + 1))
        return rising * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    cpu = torch.device("cpu")
    module.train()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    attention = stepwise_attention(module, uses_bf16("auto", cpu))
    with attention, Progress(*columns) as progress, ThreadPoolExecutor(1) as thread:
        task = progress.add_task(title, total=steps, note="")
        loss_mean, right_mean = 0.0, 0.0
        coming = thread.submit(batches, 0)
        for step in range(steps):
            images, targets, masks = coming.result()
            coming = thread.submit(batches, step + 1)
            with autocast("auto", cpu):
                tokens = module.forward_features(normalise(images))
                logits = module.forward_head(tokens).float()
            loss = F.cross_entropy(logits, targets)
            weight = max(0.0, 1 - step / (GUIDED_UNTIL * steps)) if guide else 0.0
            total = loss + weight * guide(tokens[:, 1:].float(), masks, targets) if weight else loss
            total.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
            keep = min(0.98, step / (step + 1))
            loss_mean = keep * loss_mean + (1 - keep) * loss.item()
            right = (logits.argmax(-1) == targets.argmax(-1))[targets.amax(-1) > 0.5]
            right_mean = keep * right_mean + (1 - keep) * right.float().mean().item()
            progress.update(task, advance=1, note=f"loss {loss_mean:.3f}  right {right_mean:.3f}")
            if not progress.console.is_terminal and (step + 1) % 250 == 0:
                progress.console.print(f"step {step + 1}: loss {loss_mean:.4f} right {right_mean:.4f}")
    module.eval()


class _Guide(torch.nn.Module):
    """Has every patch token trace the strokes within its patch, and those with strokes name the digit."""

    def __init__(self, module):
        super().__init__()
        self.patch = module.patch_embed.patch_size[0]
        self.trace = torch.nn.Linear(module.embed_dim, self.patch**2)
        self.name = torch.nn.Linear(module.embed_dim, module.num_classes)

    def forward(self, tokens, masks, targets):
        strokes = F.pixel_unshuffle(masks, self.patch).flatten(2).transpose(1, 2)  # (B, tokens, pixels of a patch)
        trace = F.binary_cross_entropy_with_logits(self.trace(tokens), strokes)
        share = strokes.mean(-1) / strokes.sum((1, 2))[:, None].clamp(min=1) * self.patch**2
        named = -(self.name(tokens).log_softmax(-1) * targets[:, None]).sum(-1)
        return 4 * trace + (named * share).sum(1).mean()


class _Batches:
    """Fresh scenes for each step, some occluded, some without a digit."""

    def __init__(self, batch_size: int, seed: int, whole_until: int = 0):
        self.scenes, self.batch_size, self.seed = Scenes("train", seed=seed), batch_size, seed
        self.whole_until = whole_until

    def __call__(self, step: int):
        random = torch.Generator().manual_seed(self.seed + (step << 20))
        indices = range(step * self.batch_size, (step + 1) * self.batch_size)
        scenes = self.scenes.batch(indices)
        images, masks = scenes["image"], scenes["mask"].float()
        targets = F.one_hot(scenes["label"], 10).float().mul_(1 - SMOOTHING).add_(SMOOTHING / 10)
        if step < self.whole_until:
            return images, targets, masks

        n_empty, n_occluded = round(EMPTY * self.batch_size), round(OCCLUDED * self.batch_size)
        half = n_empty // 2
        images[:half] = self.scenes.backgrounds(indices[:half])
        for i in range(half, n_empty):
            images[i : i + 1] = _reference(images[i : i + 1], i % 3)
        masks[:n_empty] = 0
        targets[:n_empty] = 0.1
        # the empty scenes, not the bare references, and the first of the others
        for part in (slice(0, half), slice(n_empty, n_empty + n_occluded)):
            images[part] = _occlude(images[part], masks[part], random)
        return images, targets, masks


def _reference(images, kind: int):
    """The references of deletion and insertion: black, mean colour, blur (a box, close to sigma 37)."""
    if kind == 0:
        return torch.zeros_like(images)
    if kind == 1:
        return Scenes.mean_colour.view(3, 1, 1).expand_as(images)
    wide = F.pad(images, (18, 18, 18, 18), mode="reflect")
    return F.avg_pool2d(F.avg_pool2d(wide, (37, 1), stride=1), (1, 37), stride=1)


def _occlude(images, masks, random):
    """Replaces cells of a random grid by a reference: any share of the background's, fewer of the digit's."""
    n, size = len(images), images.shape[-2:]
    grid = int(torch.randint(4, 33, (), generator=random))
    strokes = F.adaptive_max_pool2d(masks, grid) > 0
    chance = torch.rand(n, 1, 1, 1, generator=random) * torch.where(strokes, 0.3, 1.0)
    removed = (torch.rand(n, 1, grid, grid, generator=random) < chance).float()
    mode = "bilinear" if torch.rand((), generator=random) < 0.5 else "nearest"
    removed = F.interpolate(removed, size, mode=mode)
    ink = masks.sum((1, 2, 3), keepdim=True)
    seen = (masks * (1 - removed)).sum((1, 2, 3), keepdim=True)
    removed = removed * (seen >= VISIBLE * ink)
    reference = _reference(images, int(torch.randint(3, (), generator=random)))
    return images + removed * (reference - images)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aha.demo.classifier", description="train the demo classifier")
    parser.add_argument("--out", required=True, help="safetensors file to write")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    changed = [
        f" --{name.replace('_', '-')} {value}"
        for name, value in vars(a).items()
        if name != "out" and value != parser.get_default(name)
    ]
    command = f"python -m aha.demo.classifier --out {os.path.basename(a.out)}{''.join(changed)}"
    train(a.steps, a.batch_size, a.seed, a.out, command)


if __name__ == "__main__":
    main()
