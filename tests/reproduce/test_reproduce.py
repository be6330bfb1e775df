"""The papers' tables and figures: the catalogue, what it would take, and the same path on scenes."""

import contextlib
import dataclasses
import functools
import json

import PIL.Image
import pytest
import torch

from aha import attributors, cli, shortcut
from aha.classifier import Classifier, from_name
from aha.data import Preprocessing, Scenes
from aha.demo import shortcut as demo_shortcut
from aha.evaluation import MethodSpec, Records
from aha.evaluation.pieces import FAILURES
from aha.explainer import Explainer
from aha.metrics import PROTOCOLS, Protocol
from aha.reproduce import EXPERIMENTS, catalog, estimate, run
from aha.source import Source
from aha.store import Packs
from aha.training import TrainConfig

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")
pytestmark = pytest.mark.usefixtures("coarse")


def setting(output, **changed):
    return run.Setting(
        **{"scale": "small", "data": "scenes", "output": output, "images": 2, "batch_size": 2, **changed}
    )


def test_the_catalogue_holds_what_the_command_promises():
    promised = {*(f"table{i}" for i in range(1, 8)), "fig3", "fig5", "mda-table1", "ablations"}
    assert promised == set(EXPERIMENTS)
    for experiment in EXPERIMENTS.values():
        specs = [MethodSpec.parse(text) for text in experiment.methods]
        assert len({spec.label for spec in specs}) == len(specs)
        assert set(experiment.protocols) <= set(PROTOCOLS)
        for variant in experiment.variants:
            TrainConfig(**variant.training)  # knows every setting
        for rows in experiment.published.values():
            named = {spec.label for spec in specs} | {run.row_name("", t) for t in experiment.steps}
            assert set(rows) <= named
    assert set(catalog.SMALL_OPTIONS) <= set(attributors.available())
    with pytest.raises(ValueError, match="choose one of table1"):
        catalog.get("table9")


@pytest.fixture(scope="module")
def scenes():
    return from_name("scenes")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_can_be_estimated(name, tmp_path, monkeypatch):
    monkeypatch.setattr(estimate, "time_of_a_pass", lambda clf: (0.01, 2.0))
    monkeypatch.setattr(estimate, "untrained", lambda _: from_name("random:test_vit"))
    monkeypatch.setattr(catalog, "ENCODER", None)  # a ViT-L takes seconds to make
    paper = run.Setting("paper", "imagenet", tmp_path, masks=tmp_path)
    work = estimate.estimate(name, paper)
    assert sum(part.hours for part in work) > 0
    trains = [part for part in work if "training" in part.what]
    assert len(trains) == len(EXPERIMENTS[name].explainers) * len(EXPERIMENTS[name].classifiers)
    assert all(part.images == estimate.TRAINING_IMAGES for part in trains)


def test_dry_run_prints_and_computes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    command = ["reproduce", "table1", "--scale", "small", "--dry-run", "--output", str(tmp_path / "out")]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    for text in ("MDA", "AHA T=3", "hours here", "training"):
        assert text in printed
    assert not (tmp_path / "out").exists()


def test_imagenet_is_asked_for_in_one_line(capsys):
    assert cli.main(["reproduce", "table1"]) == 1
    assert "give --data FOLDER, or try --scale small" in " ".join(capsys.readouterr().err.split())


@contextlib.contextmanager
def passes_of_all_classifiers(monkeypatch):
    """Counts forward and backward passes of every classifier that a `Source` loads."""
    total = attributors.Passes()
    load = Source.load_classifier
    with contextlib.ExitStack() as stack:
        counters = []

        def counted(source):
            clf = load(source)
            counters.append(stack.enter_context(attributors.count_passes(clf)))
            return clf

        monkeypatch.setattr(Source, "load_classifier", counted)
        yield total
        for counter in counters:
            total.forward += counter.forward
            total.backward += counter.backward


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table1", "table7", "mda-table1", "fig3"])
def test_the_estimate_is_what_is_counted(name, tmp_path, monkeypatch):
    """A whole experiment at small scale, from training to the last metric, against --dry-run's sum."""
    monkeypatch.setattr(estimate, "time_of_a_pass", lambda clf: (0.01, 2.0))
    small = setting(tmp_path, images=3)
    work = estimate.estimate(name, small)
    with passes_of_all_classifiers(monkeypatch) as counted:
        run.reproduce(name, small)
    for side in ("forward", "backward"):
        expected = sum(part.images * getattr(part, side) for part in work)
        assert getattr(counted, side) == pytest.approx(expected, rel=0.02), side


def test_the_estimate_counts_every_crop_of_a_folder(tmp_path, monkeypatch):
    """Protocols that crop differently have the methods explain twice; scenes, of one size, do not show it."""
    monkeypatch.setattr(estimate, "time_of_a_pass", lambda clf: (0.01, 2.0))
    short = Protocol("wide", points=4, references=("black",), metrics=("deletion",))
    tight = dataclasses.replace(short, name="tight", preprocessing=Preprocessing(1.0))
    for protocol in (short, tight):
        monkeypatch.setitem(PROTOCOLS, protocol.name, protocol)
    experiment = catalog.Experiment(
        "crops",
        "Two crops",
        classifiers=("random:test_vit",),
        methods=("attention_ig:n_steps=3", "rollout"),
        steps=(),
        protocols=("wide", "tight"),
    )
    monkeypatch.setitem(EXPERIMENTS, "crops", experiment)
    (tmp_path / "val").mkdir()
    for number in range(2):
        PIL.Image.new("RGB", (90, 70), (90 * number, 40, 200)).save(tmp_path / "val" / f"{number}.png")
    (tmp_path / "val" / "labels.csv").write_text("file,label\n0.png,1\n1.png,2\n")
    paper = run.Setting("paper", str(tmp_path), tmp_path / "out", images=2, batch_size=2)
    work = estimate.estimate("crops", paper)
    with passes_of_all_classifiers(monkeypatch) as counted:
        run.reproduce("crops", paper)
    for side in ("forward", "backward"):
        assert getattr(counted, side) == pytest.approx(sum(part.images * getattr(part, side) for part in work)), side


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One output folder: experiments find what others have trained and measured."""
    return tmp_path_factory.mktemp("reproduce")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table1", "table2", "table4", "table6", "table7", "mda-table1", "fig3", "ablations"])
def test_tables_and_ablations_on_scenes(shared, name):
    small = setting(shared)
    folder = run.reproduce(name, small)
    page = (folder / "report.html").read_text()
    experiment = EXPERIMENTS[name]
    summaries = [json.loads(path.read_text()) for path in folder.rglob("summary.json")]
    assert len(summaries) == len(experiment.targets)
    for summary in summaries:
        assert summary["failures"] == []
        assert summary["protocol"]["name"] == experiment.protocols[0]
        rows = set(summary["methods"])
        wanted = {MethodSpec.parse(text).label for text in experiment.methods}
        wanted |= {run.row_name(v.name, t) for v in experiment.explainers for t in small.steps(experiment)}
        assert rows == wanted
    assert "AHA" in page or not experiment.steps
    assert list((folder / "tables").glob("*.tex"))
    assert len(Records.read(folder))
    if experiment.kind == "ablation":
        assert list(folder.rglob("ablation_steps.png"))


@pytest.mark.slow
def test_what_one_experiment_has_made_the_others_find(shared):
    run.reproduce("table1", setting(shared))
    before = kept(shared)
    assert before
    run.reproduce("table5", setting(shared))
    assert kept(shared).items() >= before.items()


def kept(output):
    """Pieces and where their records are; one that is made again is another record."""
    return {
        (root, key): place
        for root in output.glob("cells/*/*")
        for key, place in Packs(root)._places.items()
        if not key.startswith(FAILURES)
    }


def test_an_explainer_that_a_kill_left_half_saved_is_made_again(tmp_path):
    (source,) = setting(tmp_path).sources(EXPERIMENTS["table1"])
    variant, *_ = EXPERIMENTS["table1"].explainers
    folder = run.train(source, setting(tmp_path), variant)
    config = folder / "config.json"
    content = config.read_bytes()
    config.unlink()  # written last
    assert run.train(source, setting(tmp_path), variant) == folder
    assert json.loads(config.read_text())["response"] == json.loads(content)["response"]
    Explainer.from_pretrained(folder)


@pytest.mark.slow
def test_the_shortcut_experiment_on_scenes(shared, monkeypatch):
    # enough for 8 scenes to be called by their circle; how well it is learned is the demo's test
    monkeypatch.setattr(demo_shortcut, "fine_tune", functools.partial(demo_shortcut.fine_tune, steps=72))
    folder = run.reproduce("fig5", setting(shared, images=8))
    numbers = json.loads((folder / "shortcut.json").read_text())
    assert len(numbers["per_step"]) == 6
    assert numbers["scenes"] == 8
    assert (folder / "shortcut.png").is_file()


def test_the_circle_is_planted_and_called(tmp_path):
    torch.manual_seed(0)

    class Corner(torch.nn.Module):
        """Class 3 for a white disc in the upper left corner."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, pixels):
            logits = pixels.new_zeros(len(pixels), 10)
            shown = pixels[:, :, 4:10, 4:10].mean(dim=(1, 2, 3))
            logits[:, 3] = self.weight * shown - 0.5
            return logits

    clf = Classifier.wrap(Corner(), input_size=(64, 64), num_classes=10)
    tuned = shortcut.plant(clf, Scenes("train", size=64), 3, steps=40, batch_size=16, lr=0.1, precision="fp32")
    assert tuned.module.weight > 0
    assert clf.module.weight == 0


def test_a_classifier_without_the_shortcut_is_refused(scenes):
    from aha.explainer import Explainer

    explainer = Explainer.build(scenes)
    blind = Classifier.wrap(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 64 * 64, 10)), input_size=(64, 64)
    )
    torch.nn.init.zeros_(blind.module[1].weight)
    torch.nn.init.zeros_(blind.module[1].bias)
    with pytest.raises(ValueError, match="fine-tune for more steps"):
        shortcut.experiment(explainer, blind, Scenes("test", size=8), 3, images=2)
