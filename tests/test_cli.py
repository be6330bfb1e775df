"""The command line as a person uses it; in a process of its own where that could make a difference."""

import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aha import cli, lock
from aha.attributors import available
from aha.data.photograph import Fit
from aha.evaluation import Records
from aha.metrics import PROTOCOLS
from aha.report import html

from . import faults, launch

pytestmark = pytest.mark.usefixtures("coarse")
FAST = ["--steps", "2", "--batch-size", "2", "--fractions", "4", "--n-iters", "3", "--targets", "1"]
NARROW = ["--embedding", "8", "--width", "8", "--head", "8"]


@dataclasses.dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


def aha(*arguments):
    """The command in this process; an exception that it does not turn into a line is the test's."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(stdout), redirect_stderr(stderr):
        patch.setenv("COLUMNS", "200")
        try:
            code = cli.main([*map(str, arguments)])
        except SystemExit as stopped:  # by the parser
            code = stopped.code
    return Done(code, stdout.getvalue(), stderr.getvalue())


def aha_alone(*arguments):
    """The command in a process of its own."""
    return launch.finished([sys.executable, "-m", "aha.cli", *arguments], OMP_NUM_THREADS="1", COLUMNS="200")


def fails(done, message):
    """A clear line on stderr, no traceback, an exit code that says so."""
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    assert message in " ".join(done.stderr.split()), done.stderr
    return True


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    done = aha("train", "--output", folder, *FAST, *NARROW, "--limit", 8)
    assert done.returncode == 0, done.stderr
    return folder / "explainer"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(random.integers(0, 256, (80, 90, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def test_in_a_process_of_its_own(tmp_path):
    assert aha_alone("--version").stdout.startswith("aha 0")
    assert fails(aha_alone("report", tmp_path / "nowhere"), "nowhere")
    assert aha_alone("explode").returncode == 2


def test_nothing_is_lost_at_the_end_of_the_process(tmp_path):
    """The command leaves without Python's own end: what is printed, registered to be done and returned is kept."""
    code = """
import atexit, sys
from aha import cli
work = cli.main
def main():
    atexit.register(lambda: print("the page " * 50_000))
    return work()
cli.main = main
sys.argv = ["aha", *sys.argv[1:]]
"""
    empty = ["report", "--folder", tmp_path]
    for arguments, expected in ((["--version"], 0), (["explode"], 2), (["list", "--no-such"], 2), (empty, 1)):
        plain = launch.finished([sys.executable, "-c", code + "sys.exit(cli.main())", *arguments])
        done = launch.finished([sys.executable, "-c", code + "cli.console()", *arguments])
        assert done.returncode == plain.returncode == expected
        assert (done.stdout, done.stderr) == (plain.stdout, plain.stderr)
        assert done.stdout.count("the page") == 50_000
    done = launch.finished([sys.executable, "-c", code + "work = lambda: 1 / 0; cli.console()"])
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_help_and_version():
    done = aha("--help")
    assert done.returncode == 0
    for name in ("demo", "train", "explain", "refine", "evaluate", "compare", "report", "list", "info"):
        assert name in done.stdout
    assert aha("--version").stdout.startswith("aha 0")
    assert fails(aha("explode"), "no command 'explode': choose one of demo")
    assert aha("explain", "--help").returncode == 0


def test_list():
    done = aha("list")
    assert done.returncode == 0
    for name in ("random", "integrated_gradients", "gradcam_vit", "rollout", "rise"):
        assert name in done.stdout
    protocols = done.stdout.split("protocol", 1)[1]
    for name in PROTOCOLS:
        assert name in protocols


def test_the_documentation_lists_every_method_and_protocol():
    page = Path(__file__).parents[1] / "docs" / "methods.md"
    done = aha("list", "--markdown")
    assert done.returncode == 0
    assert page.read_text(encoding="utf-8").endswith(done.stdout), "append the output of aha list --markdown to it"


def test_the_readme_counts_the_methods():
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"# {len(available()) - 1} other methods, one interface" in readme


def test_train_writes_everything(trained):
    run = trained.parent
    assert {"explainer", "checkpoints", "log.jsonl", "tensorboard"} == {path.name for path in run.iterdir()}


def test_resume_with_other_settings_is_refused(trained):
    arguments = [
        "train",
        "--output",
        trained.parent,
        *FAST,
        *NARROW,
        "--limit",
        8,
        "--resume",
        "--lr",
        "1e-5",
    ]
    assert fails(aha(*arguments), "made with other settings (lr)")


def test_explain_and_refine(trained, photos, tmp_path):
    done = aha("explain", photos, "--explainer", trained, "--output", tmp_path / "maps")
    assert done.returncode == 0, done.stderr
    assert "0.png: class" in done.stdout and "the crop sees" in done.stdout
    heat = np.load(tmp_path / "maps" / "0.npy")
    assert heat.shape == (80, 90)  # of the file
    checksum = hashlib.sha256((tmp_path / "maps" / "0.npy").read_bytes()).hexdigest()
    assert (tmp_path / "maps" / "0.npy.sha256").read_text() == f"{checksum}  0.npy\n"  # sha256sum -c takes it
    seen = 0.875 * 80
    assert np.isfinite(heat).sum() == pytest.approx(seen**2, rel=0.05)
    assert Image.open(tmp_path / "maps" / "0.png").size[1] > 80 * 3
    steps = ["--steps", 1, "--output", tmp_path / "steps"]
    done = aha("refine", photos / "0.png", "--explainer", trained, *steps)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "steps" / "0.npy").shape == (2, 80, 90)
    for fit in ("pad", "tile"):
        arguments = ["--explainer", trained, "--fit", fit, "--output", tmp_path / fit]
        done = aha("explain", photos / "0.png", *arguments)
        assert done.returncode == 0, done.stderr
        assert "all of the photograph is seen" in done.stdout
        heat = np.load(tmp_path / fit / "0.npy")
        assert heat.shape == (80, 90)
        assert np.isfinite(heat).all()
    assert aha("explain", photos / "0.png", "--explainer", trained, "--fit", "stretch").returncode == 2


def test_the_fits_are_those_of_photographs():
    assert cli.Fit == Fit


def test_explain_needs_no_matplotlib(trained, photos, tmp_path):
    arguments = ["explain", *map(str, (photos / "0.png", "--explainer", trained, "--output", tmp_path))]
    code = f"""
import sys
from aha import cli, lock
assert cli.main({arguments!r}) == 0
sys.exit(any(name in sys.modules for name in ("matplotlib", "torchmetrics", "transformers")))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_one_bad_image_costs_only_itself(trained, photos, tmp_path):
    good, bad = photos / "0.png", tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:500])
    done = aha("explain", good, bad, photos / "1.png", "--explainer", trained, "--output", tmp_path / "maps")
    assert fails(done, "1 of 3 images failed")
    assert "bad.png" in done.stderr
    assert (tmp_path / "maps" / "0.npy").is_file()
    assert (tmp_path / "maps" / "1.npy").is_file()
    assert not (tmp_path / "maps" / "bad.npy").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--explainer", "nowhere"], "no folder nowhere"),
        (["--target", "10"], "target 10 is out of range"),
        (["missing.png"], "missing.png"),
    ],
)
def test_explain_bad_input(trained, photos, tmp_path, change, message):
    arguments = ["explain", photos / "0.png", "--explainer", trained, "--output", tmp_path / "maps"]
    if change[0] == "--explainer":
        arguments[3] = change[1]
    elif change[0] == "--target":
        arguments += change
    else:
        arguments[1] = change[0]
    assert fails(aha(*arguments), message)
    assert not (tmp_path / "maps").exists()


def test_evaluate(trained, tmp_path):
    steps = ["--steps", 0, 1, "--methods", "random", "raw_attention", "--limit", 6]
    done = aha("evaluate", "--explainer", trained, "--output", tmp_path, *steps)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary["methods"]) == {"aha T=0", "aha T=1", "random", "raw_attention"}
    assert "Ins − Del ↑" in done.stdout
    assert {key.method for key in Records.read(tmp_path)} == set(summary["methods"])
    assert (tmp_path / "report.html").is_file()


@pytest.mark.slow
def test_compare_on_photographs_with_a_local_classifier(photos, tmp_path):
    import timm
    import torch

    torch.manual_seed(0)
    weights = tmp_path / "weights.pth"
    torch.save(timm.create_model("resnet10t").state_dict(), weights)
    classifier = ["--classifier", "resnet10t", "--weights", weights, "--data", photos]
    done = aha("compare", *classifier, "--methods", "random", "input_x_gradient", "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["classifier"]["images"] == 3
    assert fails(aha("compare", *classifier, "--methods", "rollout", "--output", tmp_path / "no"), "rollout")
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_compare_of_everything_at_once(trained, tmp_path):
    """Two classifiers, two targets, two protocols, options of methods, an explainer; then once more."""
    command = [
        *("compare", "--classifier", "scenes", "random:test_vit", "--explainer", trained, trained, "--steps", 1),
        *("--methods", "rollout", "few@rise:n_masks=4", "all maps@tis:n_masks=4"),
        *("--protocols", "aha", "chefer", "--references", "black", "--target", "predicted", "true"),
        *("--limit", 3, "--output", tmp_path),
    ]
    done = aha(*command)
    # the explainer was trained on the scenes classifier, and serves the other one too
    assert done.returncode == 0, done.stderr
    for path in tmp_path.rglob("summary.json"):
        assert "aha T=1" in json.loads(path.read_text())["methods"]
    command[command.index("--explainer") : command.index("--steps") + 2] = []
    done = aha(*command)
    assert done.returncode == 0, done.stderr
    found = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("summary.json")}
    assert len(found) == 4
    assert "scenes/true" in found
    summary = json.loads((tmp_path / "scenes" / "true" / "summary.json").read_text())
    assert set(summary["methods"]) == {"rollout", "few", "all maps"}
    assert set(summary["references"]) == {"black"}
    assert "chefer/positive" in summary["methods"]["few"]
    assert summary["methods"]["few"]["forward_per_image"] == 4
    assert summary["significance"]["ins_minus_del"]
    for name in ("report.html", "tables/models.md", "tables/models.tex", "scenes/predicted/figures/maps.png"):
        assert (tmp_path / name).is_file(), name
    assert "Ins − Del ↑" in done.stdout
    pieces = {path: path.read_bytes() for path in tmp_path.rglob("cells/**/*.pack")}
    assert pieces
    again = aha(*command)
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("cells/**/*.pack")} == pieces
    assert json.loads((tmp_path / "scenes" / "true" / "summary.json").read_text()) == summary


@pytest.mark.slow
def test_compare_with_an_explainer_writes_parquet(trained, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    done = aha("compare", "--explainer", trained, "--methods", "random", "--limit", 3, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    table = parquet.read_table(tmp_path / "scores.parquet").to_pydict()
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    assert {row["method"] for row in rows} == {"aha T=0", "aha T=6", "random"}
    assert {row["target"] for row in rows} == {"predicted"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    wanted = {"method": "random", "metric": "ins_minus_del", "reference": ""}
    values = [row["value"] for row in rows if wanted.items() <= row.items()]
    assert len(values) == 3
    assert summary["methods"]["random"]["ins_minus_del"] == pytest.approx(sum(values) / 3)
    assert summary["protocol"]["preprocessing"]


def test_localisation_on_masked_photographs(photos, tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    square = np.zeros((80, 90), dtype=np.uint8)
    square[20:50, 30:60] = 255
    for i in range(2):  # the third image has none
        Image.fromarray(square).save(masks / f"{i}.png")
    arguments = ["--classifier", "random:test_resnet", "--data", photos, "--masks", masks, "--methods", "random"]
    done = aha("compare", *arguments, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out" / "summary.json").read_text())["methods"]["random"]
    assert 0 < row["iou"] < 1
    empty = ["--masks", tmp_path / "out", *arguments[:4], "--output", tmp_path / "no"]
    assert fails(aha("compare", *empty), "holds no mask for 0.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing"], "missing"),
        (["--classifier", "resnet_of_nowhere"], "timm has no model 'resnet_of_nowhere'"),
        (["--weights", "missing.pth", "--classifier", "resnet10t"], "no weights file at missing.pth"),
        (["--methods", "rolout"], "did you mean 'rollout'"),
        (["--limit", "0"], "limit"),
        (["--target", "best"], "predicted, true"),
    ],
)
def test_compare_bad_input(arguments, message, tmp_path):
    done = aha("compare", "--output", tmp_path / "out", *arguments)
    assert fails(done, message)
    assert not (tmp_path / "out").exists()


def test_train_bad_input(photos, tmp_path):
    train = ["train", "--output", tmp_path / "out", *FAST]
    assert fails(aha(*train, "--data", "missing"), "missing")
    assert fails(aha(*train, "--batch-size", "0"), "batch_size=0")
    assert fails(aha(*train, "--encoder", "vit_of_nowhere"), "timm has no model")
    assert fails(aha(*train, "--data", photos, "--holdout", "3"), "cannot hold out 3 of 3")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "plan"])
def test_commands_of_one_process_are_not_done_twice(command, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fails(aha(command), f"aha {command}: error: {command} is the work of one process: start it without torchrun")


def test_a_warning_is_a_line(monkeypatch):
    shown = warnings.showwarning

    def warn(*_):
        warnings.warn("what\n  to know", stacklevel=1)

    monkeypatch.setattr(cli, "_run", warn)
    assert aha("list").stderr == "aha: warning: what to know\n"
    assert warnings.showwarning is shown


def test_one_evaluation_at_a_time_in_a_folder(tmp_path, monkeypatch):
    evaluate = ["evaluate", "--classifier", "scenes", "--steps", 0, "--limit", 2, "--output", tmp_path]
    with lock.held(tmp_path):
        assert fails(aha(*evaluate), f"{tmp_path} is in use by process {os.getpid()}")
    write = html.write
    taken = []

    def in_use(folder):
        taken.append((folder / lock.NAME).is_file())
        return write(folder)

    monkeypatch.setattr(html, "write", in_use)
    assert aha(*evaluate).returncode == 0
    compare = ["compare", "--methods", "random", "--limit", 2, "--output", tmp_path / "compared"]
    assert aha(*compare).returncode == 0
    assert taken == [True, True]  # until the last page is there
    assert not [*tmp_path.rglob(lock.NAME)]


def test_an_evaluation_counts_what_failed(photos, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for name in ("bad", "worse"):
        (data / f"{name}.png").write_bytes(name.encode())
    evaluate = ["evaluate", "--classifier", "scenes", "--data", data, "--no-labels", "--steps", 0]
    done = aha(*evaluate, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert "part of the evaluation failed, the rest is written: cannot read image" in done.stderr
    assert done.stderr.endswith("(and 1 more, see summary.json)\n")
    failures = json.loads((tmp_path / "out" / "summary.json").read_text())["failures"]
    assert [("bad.png" in failure["reason"], "worse.png" in failure["reason"]) for failure in failures] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("command", [["explain"], ["refine", "--steps", "1"]])
def test_a_full_disk_keeps_whole_maps_and_ends_the_rest(photos, tmp_path, command):
    output = tmp_path / "maps"
    arguments = [*command, photos, "--classifier", "scenes", "--output", output]
    changes = faults.changes(lambda: aha(*arguments), output)
    # a map, its checksum and an overlay for each of three
    assert sum("replace" in change for change in changes) == 9
    for number in range(0, len(changes), 4):
        shutil.rmtree(output, ignore_errors=True)
        done = faults.refused(lambda: aha(*arguments), output, number).value
        assert fails(done, "cannot be written, the disk is full: free some space, or give another folder")
        assert len(done.stderr.splitlines()) == 1
        assert not [*output.glob(".*")]
        for path in output.glob("*.npy"):
            assert np.isfinite(np.load(path)).any()
        for path in output.glob("*.sha256"):
            checksum, name = path.read_text().split()
            assert hashlib.sha256((output / name).read_bytes()).hexdigest() == checksum
        for path in output.glob("*.png"):
            Image.open(path).load()


def test_explain_with_the_universal_explainer(photos, tmp_path):
    done = aha("explain", photos / "0.png", "--classifier", "scenes", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    heat = np.load(tmp_path / "0.npy")
    assert np.isfinite(heat[~np.isnan(heat)]).all()
    fast = aha("explain", photos / "0.png", "--classifier", "scenes", "--preset", "fast", "--output", tmp_path / "fast")
    assert fast.returncode == 0, fast.stderr
    assert not np.array_equal(np.load(tmp_path / "fast" / "0.npy"), heat, equal_nan=True)
    assert fails(aha("explain", photos / "0.png", "--output", tmp_path), "give --classifier NAME")
