"""The command line: ``aha demo | train | explain | refine | evaluate | compare | list | info``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

if TYPE_CHECKING:
    from .source import Source

COMMANDS = {
    "demo": "train an explainer for the demo classifier, evaluate it against the baselines, write a report",
    "train": "train an explainer for a classifier on a folder of images",
    "explain": "attribution maps and overlays of images",
    "refine": "refine the maps of images step by step",
    "evaluate": "faithfulness of an explainer on a folder of images",
    "compare": "faithfulness of several methods on a folder of images",
    "report": "write report.html again from a results folder",
    "list": "the attribution methods",
    "info": "versions, devices, backends and why one is missing",
}


def demo(output: Path = Path("runs/demo"), scenes: int = 128, steps: int | None = None, seed: int = 0) -> None:
    """Train, evaluate and show the whole method on scenes, in minutes.

    Args:
        output: results folder.
        scenes: held-out scenes of the evaluation.
        steps: training steps; default: enough for the published table.
        seed: of training, scenes and bootstrap.
    """
    from .demo import run

    run.main(output, scenes, steps, seed)


def explain(
    images: tyro.conf.Positional[tuple[Path, ...]],
    explainer: Path,
    output: Path = Path("runs/explain"),
    target: int | None = None,
    steps: int = 0,
    lr: float | None = None,
) -> None:
    """Write an overlay (.png) and the raw map (.npy) of every image.

    Args:
        images: files or folders.
        explainer: folder written by train.
        output: folder for the results.
        target: class index; default: the prediction.
        steps: refinement steps T.
        lr: learning rate of the refinement.
    """
    _explain(images, explainer, output, target, steps, lr, every_step=False)


def refine(
    images: tyro.conf.Positional[tuple[Path, ...]],
    explainer: Path,
    output: Path = Path("runs/refine"),
    target: int | None = None,
    steps: int = 5,
    lr: float | None = None,
    classifier: str | None = None,
    weights: Path | None = None,
) -> None:
    """Refine the maps of images and show every step, T = 0 … STEPS.

    Args:
        images: files or folders.
        explainer: folder written by train.
        output: folder for the results.
        target: class index; default: the prediction.
        steps: refinement steps T.
        lr: learning rate of the refinement.
        classifier: be faithful to this classifier instead of the one the explainer was trained for.
        weights: its local weights file.
    """
    from .source import Source

    other = Source(classifier, weights) if classifier else None
    _explain(images, explainer, output, target, steps, lr, every_step=True, other=other)


def evaluate(
    explainer: Path,
    data: str = "scenes",
    split: str | None = None,
    holdout: int = 0,
    output: Path = Path("runs/evaluate"),
    steps: tuple[int, ...] = (0, 3),
    lr: float | None = None,
    methods: tuple[str, ...] = (),
    target: str = "predicted",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Faithfulness of an explainer, and of other methods beside it.

    Args:
        explainer: folder written by train.
        data: a folder of images, or scenes.
        split: sub-folder of the data, e.g. val.
        holdout: evaluate only the images that train --holdout kept aside.
        output: folder for per_image.csv, summary.json and report.html.
        steps: refinement steps T, one row of the table each.
        lr: learning rate of the refinement.
        methods: other attribution methods (see aha list), or all.
        target: explain the predicted or the true class.
        limit: use only the first images.
        batch_size: images at a time.
        seed: of the random methods and the bootstrap.
    """
    from . import attributors
    from .source import Source

    loaded = _load(explainer)
    source = Source(data=data, split=split, holdout=holdout, limit=limit)
    images = source.images(loaded.classifier.input_size, training=False, seed=seed)
    extra: dict[str, Any] = {} if lr is None else {"lr": lr}
    chosen: dict[str, Any] = {}
    for t in steps:
        chosen[f"aha T={t}"] = attributors.AHA(loaded.classifier, explainer=loaded, steps=t, **extra if t else {})
    skipped: list[str] = []
    chosen.update(_methods(methods, loaded.classifier, seed, skipped))
    _evaluate(loaded.classifier, chosen, images, output, target, batch_size, seed, skipped)


def compare(
    classifier: str = "scenes",
    weights: Path | None = None,
    data: str = "scenes",
    split: str | None = None,
    holdout: int = 0,
    methods: tuple[str, ...] = ("all",),
    output: Path = Path("runs/compare"),
    target: str = "predicted",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Faithfulness of attribution methods on a classifier.

    Args:
        classifier: a timm name, hf: and a transformers name or folder, or scenes (the demo classifier).
        weights: local weights file (.safetensors, .pth) instead of the hub.
        data: a folder of images (ImageFolder, ImageNet or flat with labels.csv), or scenes.
        split: sub-folder of the data, e.g. val.
        holdout: evaluate only the images that train --holdout kept aside.
        methods: see aha list, or all.
        output: folder for per_image.csv, summary.json and report.html.
        target: explain the predicted or the true class.
        limit: use only the first images.
        batch_size: images at a time.
        seed: of the random methods and the bootstrap.
    """
    from .source import Source

    source = Source(classifier, weights, data, split, holdout, limit)
    model = source.load_classifier()
    images = source.images(model.input_size, training=False, seed=seed)
    skipped: list[str] = []
    chosen = _methods(methods, model, seed, skipped)
    _evaluate(model, chosen, images, output, target, batch_size, seed, skipped)


def report(folder: Path) -> None:
    """Write FOLDER/report.html from its summary.json and figures."""
    from .report import html

    print(html.write(folder))


def list_methods() -> None:
    """The attribution methods, their cost and their papers."""
    from rich.console import Console
    from rich.table import Table

    from . import attributors

    table = Table("method", "cost", "architectures", "paper")
    for name, about in attributors.available().items():
        table.add_row(name, about.cost, about.architectures, about.paper)
    Console().print(table)


def info(json: bool = False) -> None:
    """Versions, devices, backends of every operator, and the reason where one cannot run.

    Args:
        json: machine-readable.
    """
    from . import info as about

    about.main(json)


def _methods(names: tuple[str, ...], classifier: Any, seed: int, skipped: list[str]) -> dict[str, Any]:
    """Attributors by name; with ``all``, those that cannot run here go to ``skipped`` with the reason."""
    from . import attributors

    if "all" not in names:
        return {name: attributors.create(name, classifier, seed=seed) for name in names}
    chosen: dict[str, Any] = {}
    for name in attributors.available():
        try:
            chosen[name] = attributors.create(name, classifier, seed=seed)
        except (ValueError, ImportError) as error:
            skipped.append(f"{name}: {error}")
    return chosen


def _evaluate(
    classifier: Any,
    methods: dict[str, Any],
    data: Any,
    output: Path,
    target: str,
    batch_size: int,
    seed: int,
    skipped: list[str],
) -> None:
    from . import terminal
    from .evaluation import evaluate

    result = evaluate(classifier, methods, data, target=target, batch_size=batch_size, seed=seed)
    result.write(output)
    console = terminal.console()
    console.print(result.table())
    try:
        from .report import figures, html
    except ImportError as error:
        console.print(f"no figures and no report.html: {error}")
    else:
        summary = result.summary()
        figures.curves(result.curves, output / "figures" / "curves.png", summary=summary)
        figures.bars(summary, "ins_minus_del", output / "figures" / "ins_minus_del.png")
        html.write(output)
    for line in skipped:
        console.print(f"skipped {line}")
    console.print(f"results written to {output}")
    if result.failures:
        raise CommandError(f"part of the evaluation failed, the rest is written: {result.failures[0].reason}")


def _load(folder: Path) -> Any:
    """An explainer and its classifier, on the GPU if there is one."""
    import torch

    from .explainer import Explainer

    explainer = Explainer.from_pretrained(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    explainer.classifier.to(device)
    return explainer.to(device)


def _explain(
    paths: tuple[Path, ...],
    folder: Path,
    output: Path,
    target: int | None,
    steps: int,
    lr: float | None,
    every_step: bool,
    other: Source | None = None,
) -> None:
    import numpy as np
    import torch
    from rich.progress import track

    from .data import find_images, load_image
    from .refinement import refine
    from .report import overlays

    files = [file for path in paths for file in find_images(path)]
    explainer = _load(folder)
    classifier = other.load_classifier() if other else explainer.classifier
    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    bad: list[str] = []
    for file in track(files, "explaining", disable=len(files) < 2):
        try:
            image = load_image(file, image_size=classifier.input_size[0])[None].to(classifier.device)
        except ValueError as error:
            bad.append(str(error))
            continue
        classes = classifier.resolve_target(image, target)
        with torch.no_grad():
            probability = float(classifier.probabilities(image)[0, classes[0]])
        trail = refine(explainer, classifier, image, classes, steps, every_step=True, **options)[:, 0].cpu()
        output.mkdir(parents=True, exist_ok=True)
        # two folders may hold files of one name
        alone = sum(other_file.stem == file.stem for other_file in files) == 1
        stem = file.stem if alone else "_".join([*file.parent.parts[-1:], file.name.replace(".", "_")])
        np.save(output / f"{stem}.npy", trail[:, 0].numpy() if every_step else trail[-1, 0].numpy())
        shown = trail if every_step else trail[-1:]
        overlays.save_strip(image[0].cpu(), shown, output / f"{stem}.png")
        names = classifier.class_names
        label = f"{int(classes)} {names[int(classes)]}" if names else f"{int(classes)}"
        print(f"{file.name}: class {label}, p = {probability:.3f}")
    print(f"{len(files) - len(bad)} maps written to {output}")
    if bad:
        raise CommandError(f"{len(bad)} of {len(files)} images failed: {'; '.join(bad)}")


class CommandError(RuntimeError):
    """Part of a command failed; what worked is kept."""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 the command failed (one line says why), 2 wrong usage."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        print("usage: aha COMMAND [OPTIONS]\n\nLearned visual attribution.\n")
        print("\n".join(f"  {name:{width}}  {text}" for name, text in COMMANDS.items()))
        print("\naha COMMAND --help shows its options.")
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        from ._version import __version__

        print(f"aha {__version__}")
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"aha: no command {name!r}: choose one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        _run(name, rest)
    except KeyboardInterrupt:
        print("aha: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, CommandError) and type(error) is RuntimeError:
            raise  # a fault of ours: show where
        print(f"aha {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _run(name: str, arguments: list[str]) -> None:
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "explain": explain,
        "refine": refine,
        "evaluate": evaluate,
        "compare": compare,
        "report": report,
        "list": list_methods,
        "info": info,
    }
    if name == "train":  # its options live with the trainer, which is slow to import
        from .training.command import train

        commands["train"] = train
    tyro.cli(commands[name], prog=f"aha {name}", args=arguments, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    sys.exit(main())
