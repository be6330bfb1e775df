"""The command line: ``aha demo | train | plan | explain | refine | evaluate | compare | reproduce | list | info``."""

from __future__ import annotations

import atexit
import gc
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from .launcher import told
from .signals import TEMPORARY, Interrupted
from .terminal import CommandError, failed

if TYPE_CHECKING:
    from .classifier import Classifier
    from .evaluation import Comparison
    from .explainer import Explainer
    from .source import Source

Fit = Literal["crop", "pad", "tile"]  # that of aha.data.photograph, which is slow to import
Preset = Literal["fast", "default", "best"]  # those of aha.refinement, likewise
STEP = 640  # of the overlays of a refinement, which stand side by side
SINGLE = ("demo", "plan")  # commands that do not share their work

COMMANDS = {
    "demo": "train an explainer for the demo classifier, evaluate it against the baselines, write a report",
    "train": "train an explainer for a classifier on a folder of images",
    "plan": "what training and evaluation would take: passes, memory, hours and cost",
    "explain": "attribution maps and overlays of images",
    "refine": "refine the maps of images step by step",
    "evaluate": "faithfulness of an explainer on a folder of images",
    "compare": "classifiers, methods, metrics and targets side by side on a folder of images; resumable",
    "reproduce": "the papers' tables and figures",
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
    explainer: Path | None = None,
    classifier: str | None = None,
    weights: Path | None = None,
    output: Path = Path("runs/explain"),
    target: int | None = None,
    preset: Preset | None = None,
    steps: int | None = None,
    lr: float | None = None,
    fit: Fit = "crop",
) -> None:
    """Write an overlay (.png) and the map (.npy, and its checksum) of every image, in the image's own geometry.

    The overlay names the class and its probability, and outlines the top pixels that keep 90 % of it where the rest is
    blurred. Overlay and map (H, W) have the file's resolution, upright, or a longer side of 2048 pixels; the map is NaN
    where the classifier saw nothing.

    Args:
        images: files or folders.
        explainer: folder written by train; default: the universal explainer, which serves any --classifier.
        classifier: a timm name, hf: and a transformers name or folder, lite0 (EfficientNet-lite0 with the weights of
            the extra demo) or scenes; default: the one the explainer was trained for.
        weights: its local weights file.
        output: folder for the results.
        target: class index; default: the prediction.
        preset: refine the map on the image with few, some or many passes; default: one pass.
        steps: refinement steps T, in place of the preset's.
        lr: step size of the refinement, likewise.
        fit: crop explains the central square, pad the whole image with its longer side as the input's, tile the whole
            image by overlapping windows, finer where it is large.
    """
    steps = 0 if steps is None and preset is None else steps
    source = _source(explainer, classifier, weights)
    _explain(images, explainer, source, output, target, preset or "default", steps, lr, fit, every_step=False)


def refine(
    images: tyro.conf.Positional[tuple[Path, ...]],
    explainer: Path | None = None,
    classifier: str | None = None,
    weights: Path | None = None,
    output: Path = Path("runs/refine"),
    target: int | None = None,
    steps: int = 6,
    lr: float | None = None,
    fit: Fit = "crop",
) -> None:
    """Refine the maps of images and show every step, T = 0 … STEPS, side by side.

    The map (.npy) is (STEPS + 1, H, W), in the geometry of the file, as explain's.

    Args:
        images: files or folders.
        explainer: folder written by train; default: the universal explainer, which serves any --classifier.
        classifier: be faithful to this classifier instead of the one the explainer was trained for.
        weights: its local weights file.
        output: folder for the results.
        target: class index; default: the prediction.
        steps: refinement steps T.
        lr: how far a step moves the map, in its standard deviations.
        fit: crop, pad or tile, as of explain.
    """
    source = _source(explainer, classifier, weights)
    _explain(images, explainer, source, output, target, "default", steps, lr, fit, every_step=True)


def evaluate(
    explainer: Path | None = None,
    classifier: str | None = None,
    weights: Path | None = None,
    data: str = "scenes",
    split: str | None = None,
    holdout: int = 0,
    output: Path = Path("runs/evaluate"),
    steps: tuple[int, ...] = (0, 6),
    lr: float | None = None,
    methods: tuple[str, ...] = (),
    target: str = "predicted",
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    labels: bool = True,
) -> None:
    """Faithfulness of an explainer, and of other methods beside it.

    Several processes (torchrun --nproc-per-node N -m aha.cli evaluate …) share the work.

    Args:
        explainer: folder written by train; default: the universal explainer, which serves any --classifier.
        classifier: what is explained; default: the classifier that the explainer was trained for.
        weights: its local weights file.
        data: a folder of images, or scenes.
        split: sub-folder of the data, e.g. val.
        holdout: evaluate only the images that train --holdout kept aside.
        output: folder for scores, images (.parquet, or .csv without pyarrow), summary.json and report.html.
        steps: refinement steps T, one row of the table each; of an explainer trained for the ranking.
        lr: learning rate of the refinement.
        methods: other attribution methods (see aha list), or all.
        target: explain the predicted or the true class.
        limit: use only the first images.
        batch_size: images at a time.
        seed: of the random methods and the bootstrap.
        labels: read the images' labels; --no-labels for folders that are not named after the classifier's classes.
    """
    from . import attributors
    from .source import Source

    loaded, clf = _load(explainer, _source(explainer, classifier, weights))
    source = Source(data=data, split=split, holdout=holdout, limit=limit, labels=labels)
    images = source.images(clf.input_size, training=False, seed=seed)
    extra: dict[str, Any] = {} if lr is None else {"lr": lr}
    chosen: dict[str, Any] = {}
    kind = attributors.learned.method_of(loaded)
    if kind == "aha":
        for t in steps:
            chosen[f"aha T={t}"] = attributors.AHA(clf, explainer=loaded, steps=t, **extra if t else {})
    else:
        chosen[kind] = attributors.create(kind, clf, explainer=loaded)
    skipped: list[str] = []
    chosen.update(_methods(methods, clf, seed, skipped))
    _evaluate(clf, chosen, images, output, target, batch_size, seed, skipped)


def compare(
    classifier: tuple[str, ...] = ("scenes",),
    weights: tuple[Path, ...] = (),
    data: str = "scenes",
    split: str | None = None,
    holdout: int = 0,
    masks: Path | None = None,
    methods: tuple[str, ...] = ("all",),
    explainer: tuple[Path, ...] = (),
    steps: tuple[int, ...] = (0, 6),
    protocols: tuple[str, ...] = ("aha",),
    references: tuple[str, ...] = (),
    target: tuple[str, ...] = ("predicted",),
    output: Path = Path("runs/compare"),
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
    labels: bool = True,
) -> None:
    """Classifiers × methods × metrics × references × targets over a set of images, resumable.

    Maps and scores are kept under OUTPUT/cells; running again computes only what is missing. Several processes
    (torchrun --nproc-per-node N -m aha.cli compare …) share the work. Writes scores and images (.parquet, or .csv
    without pyarrow), and for every classifier and target summary.json, tables in Markdown and LaTeX, figures and
    report.html.

    Args:
        classifier: timm names, hf: and a transformers name or folder, random: and a timm name, or scenes.
        weights: local weights files (.safetensors, .pth) instead of the hub, one per classifier.
        data: a folder of images (ImageFolder, ImageNet, flat with labels.csv, or .tar shards), or scenes.
        split: sub-folder of the data, e.g. val.
        holdout: evaluate only the images that train --holdout kept aside.
        masks: folder of masks of the object, <image name>.png, for the localisation metrics.
        methods: see aha list; name:option=value,… sets options, label@name names the row; all adds every method.
        explainer: folders written by train, one per classifier; adds AHA's rows.
        steps: refinement steps T of those rows.
        protocols: aha, rise, chefer, mda, mas, monotonicity; the first leads. A folder's images are resized and
            cropped as each asks.
        references: black, mean, blur: only these instead of the first protocol's.
        target: explain the predicted class, the true one, or both.
        output: results folder.
        limit: that many images, drawn at random with the seed.
        batch_size: images at a time.
        seed: of the random methods, the choice of images and the bootstrap.
        labels: read the images' labels; --no-labels for folders that are not named after the classifier's classes.
    """
    import dataclasses

    from . import terminal
    from .attributors import specs
    from .evaluation import compare as run
    from .metrics import protocols as presets
    from .report import comparison as pages
    from .report import tables
    from .source import Source

    chosen, everything = specs.parse(methods)
    for name, given in (("weights", weights), ("explainer", explainer)):
        if given and len(given) != len(classifier):
            raise ValueError(f"{len(given)} {name} for {len(classifier)} classifiers: give one each, in the same order")
    sources = [
        Source(name, weights[i] if weights else None, data, split, holdout, limit, masks, labels)
        for i, name in enumerate(classifier)
    ]
    settings = [presets.get(name) for name in protocols]
    if references:
        settings[0] = dataclasses.replace(settings[0], references=references)
    rows = [
        [*chosen, *(specs.MethodSpec("aha", {"explainer": str(explainer[i]), "steps": t}, f"aha T={t}") for t in steps)]
        if explainer
        else chosen
        for i in range(len(sources))
    ]
    options: dict[str, Any] = {"strict": not everything, "batch_size": batch_size, "seed": seed}
    console = terminal.console()

    def write(done: Comparison) -> None:
        try:
            pages.write(done, output)
        except ImportError as error:  # tables and numbers are written before it needs the extra
            console.print(f"no figures and no report.html: {error}")

    with terminal.progress() as bar:
        done = run(sources, rows, output, settings, target, progress=bar, finish=write, **options)
    if done is None:  # another process writes
        return
    for result in done.results.values():
        console.print(tables.of(result).to_rich())
    for line in done.skipped:
        console.print(f"skipped {line}")
    console.print(f"results written to {output}")
    if done.failures:
        raise CommandError(f"part of the comparison failed, the rest is written: {_first(done.failures)}")


def reproduce(
    experiment: tyro.conf.Positional[str],
    data: Path | None = None,
    output: Path = Path("runs/reproduce"),
    scale: str = "paper",
    dry_run: bool = False,
    weights: Path | None = None,
    encoder_weights: Path | None = None,
    masks: Path | None = None,
    images: int | None = None,
    batch_size: int = 32,
    workers: int = 12,
    seed: int = 0,
) -> None:
    """A table or figure of the papers: table1 … table7, fig3, fig5, ablations, mda-table1.

    Trains the explainers that are missing, measures what is missing, and writes tables, figures and report.html into
    OUTPUT/EXPERIMENT, with the published figures beside the measured ones. --dry-run tells beforehand what it takes.

    Args:
        experiment: its name.
        data: ImageNet's folder with train and val.
        output: shared by all experiments: explainers, maps and scores are found again.
        scale: paper, or small: the same path on scenes, in minutes, to see that it works here.
        dry_run: print classifiers, passes, estimated hours and disk, and stop.
        weights: folder of <classifier>.safetensors files instead of the hub.
        encoder_weights: local weights of the explainer's encoder.
        masks: folder of masks, for table6.
        images: number of images instead of the experiment's.
        batch_size: images at a time.
        workers: processes that read training images.
        seed: of everything random.
    """
    from . import processes
    from .reproduce import estimate, run

    small = scale == "small"
    if data is None and not (small or dry_run):
        raise ValueError(f"{experiment} needs ImageNet: give --data FOLDER, or try --scale small or --dry-run")
    source = "scenes" if small else str(data)
    setting = run.Setting(scale, source, output, weights, encoder_weights, masks, images, batch_size, workers, seed)
    main = processes.join().is_main_process
    if dry_run:
        if main:
            estimate.main(experiment, setting)
        return
    page = run.reproduce(experiment, setting)
    if main:
        print(f"results written to {page}")


def report(folder: Path) -> None:
    """Write FOLDER/report.html from its summary.json and figures."""
    from .report import html

    print(html.write(folder))


def list_methods(markdown: bool = False) -> None:
    """The attribution methods, their cost and their papers; the evaluation protocols.

    Args:
        markdown: in full, as docs/methods.md holds them.
    """
    from rich.table import Table

    from . import attributors, terminal
    from .metrics import PROTOCOLS

    if markdown:

        def row(*cells: str) -> str:
            return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

        headings = ("method", "paper", "cost per image", "architectures", "source's licence")
        print(row(*headings, "beside the authors' code", "choices, approximations"))
        print("|---|---|---|---|---|---|---|")
        for name, about in attributors.available().items():
            cells = (about.paper, about.cost, about.architectures, about.licence, about.fidelity, about.notes)
            print(row(f"`{name}`", *cells))
        print()
        print(row("protocol", "what it measures, and what its figures compare with"))
        print("|---|---|")
        for name, protocol in PROTOCOLS.items():
            print(row(f"`{name}`", protocol.about))
        return
    methods = Table("method", "cost", "architectures", "paper")
    for name, about in attributors.available().items():
        methods.add_row(name, about.cost, about.architectures, about.paper)
    measured = Table("protocol", "measures", "about")
    for name, protocol in PROTOCOLS.items():
        measured.add_row(name, ", ".join(protocol.metrics), protocol.about)
    console = terminal.console()
    console.print(methods)
    console.print(measured)


def info(json: bool = False) -> None:
    """Versions, devices, backends of every operator, and the reason where one cannot run.

    Args:
        json: machine-readable.
    """
    from . import info as about

    about.main(json)


def _methods(names: tuple[str, ...], classifier: Any, seed: int, skipped: list[str]) -> dict[str, Any]:
    """Attributors by name; with ``all``, those that cannot run here, or need an explainer, go to ``skipped``."""
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
    from . import lock, processes, terminal
    from .evaluation import evaluate
    from .report import figures, html, tables

    main = processes.join().is_main_process
    console = terminal.console()
    with lock.held(output) if main else nullcontext():  # before hours of measuring
        with terminal.progress(disable=not main) as bar:
            result = evaluate(classifier, methods, data, target=target, batch_size=batch_size, seed=seed, progress=bar)
        if not main:  # another process writes
            return
        result.write(output)
        console.print(tables.of(result).to_rich())
        try:
            summary = result.summary()
            figures.curves(result.curves, output / "figures" / "curves.png", summary=summary)
            figures.bars(summary, "ins_minus_del", output / "figures" / "ins_minus_del.png")
            html.write(output)
        except ImportError as error:  # of the extra
            console.print(f"no figures and no report.html: {error}")
    for line in skipped:
        console.print(f"skipped {line}")
    console.print(f"results written to {output}")
    if result.failures:
        reasons = [failure.reason for failure in result.failures]
        raise CommandError(f"part of the evaluation failed, the rest is written: {_first(reasons)}")


def _first(failures: Sequence[str]) -> str:
    """One of them, and how many more there are: a page has all."""
    more = f" (and {len(failures) - 1} more, see summary.json)" if len(failures) > 1 else ""
    return f"{failures[0]}{more}"


def _source(explainer: Path | None, classifier: str | None, weights: Path | None) -> Source | None:
    """The classifier that is asked for; None: that of the explainer."""
    if classifier is None:
        if explainer is None:
            raise ValueError("no classifier: give --classifier NAME, for example lite0, or --explainer with a folder")
        if weights is not None:
            raise ValueError(f"--weights {weights} without --classifier: name the classifier that they are of")

    with _importing():
        import timm  # noqa: F401, with torch most of the time until a photograph's map

        from .source import Source

    return None if classifier is None else Source(classifier, weights)


def _load(folder: Path | None, source: Source | None) -> tuple[Explainer, Classifier]:
    """The explainer, by default the universal one, and the classifier to explain, on the GPU if there is one."""
    import torch

    from .explainer import Explainer

    classifier = source.load_classifier() if source else None
    if folder is None:
        assert classifier is not None
        explainer = Explainer.universal(classifier)
    elif classifier is None:
        explainer = Explainer.from_pretrained(folder)
    else:
        # one that sees an encoder's features keeps the classifier it was trained for, and may be refined for another
        explainer = Explainer.from_pretrained(folder).of(classifier)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    explainer.classifier.to(device)
    return explainer.to(device), classifier or explainer.classifier


def _maker(
    folder: Path | None, source: Source | None, preset: str, steps: int | None, lr: float | None
) -> tuple[Callable[[Any, Any], Any], Classifier]:
    """What makes maps (T+1, N, 1, H, W) of images and classes, and the classifier that they are faithful to.

    Their values are the change of the probability that a pixel is worth, where the explainer knows that.
    """
    import torch

    from . import calibration
    from .refinement import refine

    explainer, classifier = _load(folder, source)
    options: dict[str, Any] = {} if lr is None else {"lr": lr}
    scale = calibration.best_scale(explainer)

    def make(images: Any, target: Any) -> Any:
        # at T = 0 it is one pass of the explainer
        trail = refine(explainer, classifier, images, target, steps, preset=preset, every_step=True, **options)
        return torch.stack(
            [calibration.calibrated(classifier, explainer, images, maps, target, scale) for maps in trail]
        )

    return make, classifier


def _explain(
    paths: tuple[Path, ...],
    folder: Path | None,
    source: Source | None,
    output: Path,
    target: int | None,
    preset: str,
    steps: int | None,
    lr: float | None,
    fit: Fit,
    every_step: bool,
) -> None:
    import numpy as np
    from rich.progress import track

    from . import overlays, photograph, processes
    from .checks import check_integer, check_number, check_target
    from .data import find_images, output_names
    from .files import WriteError, write_summed, writing

    if steps is not None:
        check_integer("steps", steps, 0)
    if lr is not None:
        check_number("lr", lr, 0, above=True)
    files = find_images(*paths)
    make_maps, classifier = _maker(folder, source, preset, steps, lr)
    if target is not None:
        check_target(target, 1, classifier.num_classes, classifier.device)
    bad: list[str] = []
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    state = processes.join()
    own = list(zip(files, output_names(files), strict=True))[state.process_index :: state.num_processes]
    for file, name in track(own, "explaining", disable=len(files) < 2 or not state.is_main_process):
        try:
            found = photograph.explain(file, classifier, make_maps, target, fit)
            maps = found.maps if every_step else found.maps[-1:]
            content = io.BytesIO()
            np.save(content, maps if every_step else maps[0])
            write_summed(output / f"{name}.npy", content.getvalue())
            caption, side = found.caption(), STEP if every_step else photograph.LONGEST
            overlays.save_figure(found.picture, maps, output / f"{name}.png", caption, found.kept, side)
        except WriteError:  # nor could the others be kept
            raise
        except (ValueError, OSError) as error:  # of this image; the others go on
            bad.append(str(error) if str(file) in str(error) else f"{file}: {error}")
            continue
        print(f"{file.name}: {'; '.join(caption)}")
    bad = processes.gathered(bad)
    if not state.is_main_process:
        return
    print(f"{len(files) - len(bad)} maps written to {output}")
    if bad:
        raise failed(bad, len(files), "images")


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code.

    0 done, 1 the command failed (one line says why), 2 wrong usage, 75 a signal asked it to end and it can go
    on, 130 the same by Ctrl-C.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file's name may hold bytes that no encoding knows
            stream.reconfigure(errors="backslashreplace")
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
        from .memory import keep_freed

        keep_freed()
        with _warnings_in_a_line():
            _run(name, rest)
    except KeyboardInterrupt as error:
        print(f"aha: interrupted{f' by {error}' if str(error) else ''}", file=sys.stderr)
        return 130
    except Interrupted as error:
        print(f"aha {name}: ended by {error}", file=sys.stderr)
        return TEMPORARY
    except (ValueError, OSError, ImportError, RuntimeError, FloatingPointError) as error:
        if isinstance(error, RuntimeError) and not isinstance(error, CommandError) and type(error) is RuntimeError:
            raise  # a fault of ours: show where
        print(f"aha {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def console() -> None:
    """The command ``aha``: `main`, and out without taking torch's modules apart, which takes most of a second.

    What is registered with atexit from here on is done before: the first registered comes last.
    """
    status = 1

    def leave() -> None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # closed: nobody reads it any more
                stream.flush()
        os._exit(status)

    atexit.register(leave)
    try:
        status = main()
    except SystemExit as error:  # wrong usage
        status = error.code if isinstance(error.code, int) else 1
        raise


@contextmanager
def _importing() -> Iterator[None]:
    """Imports without the garbage collector, which goes through all that came again and again; all of it stays."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # once: garbage of a caller's own work would stay as well
            gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Warnings without the place in the code that they come from."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"aha: warning: {' '.join(str(message).split())}", file=sys.stderr)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def _run(name: str, arguments: list[str]) -> None:
    commands: dict[str, Callable[..., None]] = {
        "demo": demo,
        "explain": explain,
        "refine": refine,
        "evaluate": evaluate,
        "compare": compare,
        "reproduce": reproduce,
        "report": report,
        "list": list_methods,
        "info": info,
    }
    if name == "train":  # its options live with the trainer, which is slow to import
        from .training.command import train

        commands["train"] = train
    if name == "plan":  # likewise
        from .plan import command

        commands["plan"] = command
    if told("WORLD_SIZE") > 1:
        if name in SINGLE:
            raise ValueError(f"{name} is the work of one process: start it without torchrun or accelerate launch")
        from . import processes

        processes.join()  # which gives each its GPU
    tyro.cli(commands[name], prog=f"aha {name}", args=arguments, config=(tyro.conf.OmitArgPrefixes,))


if __name__ == "__main__":
    console()
