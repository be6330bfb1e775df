"""The command line: ``aha demo | train | explain | refine | evaluate | compare | list | info``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

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


@dataclass(frozen=True)
class Source:
    """Which classifier, and which images."""

    classifier: str = "scenes"
    """A timm name, hf: and a transformers name or folder, or scenes (the demo classifier)."""
    weights: Path | None = None
    """Local weights file (.safetensors, .pth) instead of the hub."""
    data: str = "scenes"
    """A folder of images (ImageFolder, ImageNet or flat with labels.csv), or scenes."""
    split: str | None = None
    """Sub-folder of the data, e.g. train or val."""
    holdout: int = 0
    """Images kept aside from training: train leaves them out, evaluate and compare use only them."""


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


def _train(arguments: list[str]) -> None:
    import tyro

    from .explainer.decoder import DecoderConfig
    from .training import TrainConfig

    def train(
        output: Path,
        source: Annotated[Source, tyro.conf.arg(name="")] = Source(),  # noqa: B008 - tyro reads it
        encoder: str | None = None,
        encoder_weights: Path | None = None,
        decoder: DecoderConfig = DecoderConfig(),  # noqa: B008
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008
        augment: bool = True,
        limit: int | None = None,
        resume: bool = False,
    ) -> None:
        """Train an explainer; writes OUTPUT/explainer, checkpoints, log.jsonl and TensorBoard files.

        Args:
            output: folder of the run.
            encoder: a timm name, hf: and a transformers name or folder; default: the classifier's own features.
            encoder_weights: local weights file for a timm encoder.
            augment: random crops and flips.
            limit: use only the first images.
            resume: continue from the newest checkpoint in OUTPUT.
        """
        import dataclasses

        from .classifier import from_name
        from .explainer import Explainer
        from .training import Trainer

        classifier = from_name(source.classifier, source.weights)
        data = _data(source, classifier, training=True, augment=augment, seed=config.seed, limit=limit)
        explainer = Explainer.build(classifier, encoder, encoder_weights, decoder=decoder)
        run = dataclasses.replace(config, output=str(output))
        Trainer(explainer, classifier, data, run).fit(resume=resume)
        print(f"explainer written to {output / 'explainer'}")

    tyro.cli(train, prog="aha train", args=arguments, config=(tyro.conf.OmitArgPrefixes,))


def explain(
    images: tuple[Path, ...],
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
    images: tuple[Path, ...],
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
    from .explainer import Explainer

    loaded = Explainer.from_pretrained(explainer)
    source = Source(data=data, split=split, holdout=holdout)
    images = _data(source, loaded.classifier, training=False, seed=seed, limit=limit)
    extra = {} if lr is None else {"lr": lr}
    chosen: dict[str, Any] = {}
    for t in steps:
        chosen[f"aha T={t}"] = attributors.AHA(
            loaded.classifier, explainer=loaded, steps=t, **extra if t else {}
        )
    skipped: list[str] = []
    chosen.update(_methods(methods, loaded.classifier, seed, skipped))
    _evaluate(loaded.classifier, chosen, images, output, target, batch_size, seed, skipped)


def compare(
    source: Source = Source(),  # noqa: B008
    methods: tuple[str, ...] = ("all",),
    output: Path = Path("runs/compare"),
    target: str = "predicted",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> None:
    """Faithfulness of attribution methods on a classifier.

    Args:
        methods: see aha list, or all.
        output: folder for per_image.csv, summary.json and report.html.
        target: explain the predicted or the true class.
        limit: use only the first images.
        batch_size: images at a time.
        seed: of the random methods and the bootstrap.
    """
    from .classifier import from_name

    classifier = from_name(source.classifier, source.weights)
    images = _data(source, classifier, training=False, seed=seed, limit=limit)
    skipped: list[str] = []
    chosen = _methods(methods, classifier, seed, skipped)
    _evaluate(classifier, chosen, images, output, target, batch_size, seed, skipped)


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


def _data(
    source: Source,
    classifier: Any,
    training: bool,
    augment: bool = False,
    seed: int = 0,
    limit: int | None = None,
) -> Any:
    from .data import ImageFolder, Part, Scenes, hold_out

    side = classifier.input_size[0]
    if source.data == "scenes":
        size = limit or (4096 if training else 128)
        return Scenes("train" if training else "test", size=size, seed=seed, image_size=side)
    data = ImageFolder(
        source.data,
        image_size=side,
        split=source.split,
        augment=training and augment,
        seed=seed,
    )
    indices = list(range(len(data)))
    if source.holdout:
        kept, held = hold_out(len(data), source.holdout)
        indices = kept if training else held
    return Part(data, indices[:limit])


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
    from rich.console import Console

    from .evaluation import evaluate

    result = evaluate(classifier, methods, data, target=target, batch_size=batch_size, seed=seed)
    result.write(output)
    console = Console()
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

    from .classifier import from_name
    from .data import find_images, load_image
    from .explainer import Explainer
    from .refinement import refine
    from .report import overlays

    files = [file for path in paths for file in find_images(path)]
    explainer = Explainer.from_pretrained(folder)
    classifier = from_name(other.classifier, other.weights) if other else explainer.classifier
    options = {} if lr is None else {"lr": lr}
    bad: list[str] = []
    for file in track(files, "explaining", disable=len(files) < 2):
        try:
            image = load_image(file, image_size=classifier.input_size[0])[None]
        except ValueError as error:
            bad.append(str(error))
            continue
        classes = classifier.resolve_target(image, target)
        with torch.no_grad():
            probability = float(classifier.probabilities(image)[0, classes[0]])
        trail = refine(explainer, classifier, image, classes, steps, every_step=True, **options)[:, 0]
        output.mkdir(parents=True, exist_ok=True)
        np.save(output / f"{file.stem}.npy", trail[:, 0].numpy() if every_step else trail[-1, 0].numpy())
        shown = trail if every_step else trail[-1:]
        overlays.save_strip(image[0], shown, output / f"{file.stem}.png")
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
    import tyro

    if name == "train":  # its options come from modules that are slow to import
        _train(arguments)
        return
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
    options = (tyro.conf.OmitArgPrefixes,)
    tyro.cli(commands[name], prog=f"aha {name}", args=arguments, config=options)


if __name__ == "__main__":
    sys.exit(main())
