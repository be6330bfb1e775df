"""Overlays, figures and the page: written, readable, small, and nothing fetched from elsewhere."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from aha import overlays
from aha.report import columns, drawing, figures, html

METHODS = ("random", "grad_cam", "aha T=0", "aha T=3")
METRICS = ("deletion", "insertion", "ins_minus_del", "adp", "pic", "seconds_per_image")


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def maps(images):
    ramp = torch.linspace(-2, 5, 64)[None, None, None].expand(3, 1, 64, 64)
    return {"grad_cam": ramp, "aha T=3": ramp.flip(-1)}


@pytest.fixture
def grids(monkeypatch):
    """What the figures asked `drawing.image_grid` for."""
    seen = []
    draw = drawing.image_grid
    monkeypatch.setattr(figures, "image_grid", lambda *given: seen.append(given) or draw(*given))
    return seen


def summary():
    """Higher is better along METHODS: deletion and adp fall, insertion and pic rise, each is slower."""
    methods = {}
    for i, name in enumerate(METHODS):
        values = {"deletion": 0.4 - i / 10, "insertion": 0.5 + i / 10, "ins_minus_del": 0.1 + i / 5}
        values |= {"adp": 40.0 - i, "pic": 30.0 + i, "seconds_per_image": 0.01 * (i + 1)}
        methods[name] = {**values, "ci95": {m: [v - 0.01, v + 0.01] for m, v in values.items()}}
    return {
        "classifier": {"accuracy": 0.961, "name": "tiny <ViT> & co", "images": 48},
        "methods": methods,
        "references": {"black": methods, "blur": methods},
        "protocol": {"name": "aha", "points": 21, "references": ["black", "blur"], "preprocessing": "centre crop"},
        "protocols": [{"name": "mda", "points": 225, "preprocessing": "shorter side to 224 px"}],
        "target": "predicted",
        "seed": 42,
        "versions": {"torch": "2.11.0"},
        "device": "cpu",
        "failures": [{"method": "rise", "images": [1, 2], "reason": "<script>alert(1)</script>"}],
        "comparisons": {"aha T=3 − aha T=0": {"difference": 0.2, "ci95": [0.1, 0.3], "p": 0.001}},
        "shortcut": {"share_before": 0.03, "share_after": 0.6, "per_step": [0.03, 0.2, 0.6]},
    }


def many(count=28):
    """A summary of many methods under several protocols, with costs and significance; the last is the best."""
    generator = np.random.default_rng(count)
    methods = {}
    for i in range(count):
        name = "random" if i == 0 else f"aha T={i}" if i > count - 3 else f"method_{i}"
        deletion, insertion = 0.4 - 0.01 * i, 0.4 + 0.01 * i
        values = {"deletion": deletion, "insertion": insertion, "ins_minus_del": insertion - deletion, "adp": 70.0 - i}
        values |= {f"{protocol}/{m}": values[m] / 2 for protocol in ("rise", "mda") for m in ("deletion", "insertion")}
        intervals = {metric: [value - 0.01, value + 0.01] for metric, value in values.items()}
        costs = {"seconds_per_image": float(10 ** generator.uniform(-3, 1)), "forward_per_image": 3.0 * i}
        costs |= {"backward_per_image": float(i % 2), "peak_bytes_per_image": 2.0**20 * (i + 1)}
        methods[name] = {**values, **costs, "ci95": intervals}
    best = list(methods)[-1]
    significance = {
        metric: {
            name: {
                "best": best,
                "difference": row[metric] - methods[best][metric],
                "p": 0.5 if name == f"aha T={count - 2}" else 0.001,
            }
            for name, row in methods.items()
            if name != best
        }
        for metric in ("deletion", "insertion", "ins_minus_del")
    }
    classifier = {"accuracy": 0.9, "name": "vit", "images": 100}
    return {"classifier": classifier, "methods": methods, "significance": significance, "target": "predicted"}


def opened(path, budget=drawing.BUDGET):
    """The figure as an array, after the checks that hold for each of them."""
    assert path.stat().st_size <= budget
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= 100
    assert pixels.std() > 5
    return pixels


def test_overlay_shows_the_important_and_keeps_the_rest(images, maps):
    shown = overlays.overlay(images[0], maps["grad_cam"][0], scale=1)
    assert shown.shape == (64, 64, 3)
    assert shown.dtype == np.uint8
    left, right = shown[:, :8].astype(float), shown[:, -8:].astype(float)
    luma = np.array([0.299, 0.587, 0.114])
    grey = (overlays.to_pixels(images[0])[:, :8] @ luma).ravel()
    assert np.corrcoef((left @ luma).ravel(), grey)[0, 1] > 0.95  # the image is still there
    assert (right[..., 0] - right[..., 2]).mean() > 80  # warm
    assert right.std(axis=(0, 1)).max() < left.std(axis=(0, 1)).max()


def test_overlay_is_robust_and_scale_free(images):
    heat = torch.rand(64, 64, generator=torch.Generator().manual_seed(1))
    shown = overlays.overlay(images[0], heat)
    assert np.abs(shown.astype(int) - overlays.overlay(images[0], heat[None] * 1e4 - 7)).max() <= 1
    heat[3, 3] = 1e6
    away = np.ones((64, 64), bool)
    away[3, 3] = False
    again = overlays.overlay(images[0], heat, scale=1).astype(int)
    before = overlays.overlay(images[0], torch.where(heat > 1, 1.0, heat), scale=1)
    assert np.abs(again - before)[away].max() <= 3  # one outlier does not darken the map
    constant = overlays.overlay(images[0], torch.full((64, 64), 3.0))
    assert np.array_equal(constant, overlays.overlay(images[0], torch.zeros(64, 64)))


def test_small_images_are_enlarged_by_whole_pixels(images, maps):
    shown = overlays.overlay(images[0], maps["grad_cam"][0])
    assert shown.shape == (256, 256, 3)
    assert np.array_equal(shown[::4, ::4].repeat(4, 0).repeat(4, 1), shown)
    assert overlays.overlay(torch.rand(3, 224, 200), torch.rand(224, 200)).shape == (224, 200, 3)


@pytest.mark.parametrize(
    ("image", "heat", "words"),
    [
        (torch.zeros(1, 8, 8), torch.zeros(8, 8), "give \\(3, H, W\\)"),
        (torch.zeros(3, 8, 8), torch.zeros(2, 8, 8), "give \\(1, H, W\\)"),
        (torch.zeros(3, 8, 8), torch.zeros(8, 9), "one value per pixel"),
        (torch.zeros(3, 8, 8), torch.full((8, 8), torch.nan), "finite"),
    ],
)
def test_overlay_refuses_what_does_not_fit(image, heat, words):
    with pytest.raises(ValueError, match=words):
        overlays.overlay(image, heat)


def test_what_is_nearly_flat_looks_flat(images):
    """Noise of a thousandth of the map's level is not stretched to full contrast; a tenth of it is."""
    noise = torch.rand(64, 64, generator=torch.Generator().manual_seed(2))
    alone = overlays.overlay(images[0], torch.ones(64, 64), scale=1).astype(int)
    faint, strong = (overlays.overlay(images[0], 5 + 5 * share * noise, scale=1) for share in (1e-3, 0.1))
    assert np.abs(faint - alone).max() <= 5
    assert np.abs(strong - alone).max() > 100
    low, high = overlays.limits(5 + 5e-3 * noise)
    assert high - low == pytest.approx(0.25, rel=0.01)
    assert overlays.limits(torch.full((2, 2), 3.0)) == (3, 3)


@pytest.fixture
def photograph():
    """A grey photograph of odd size, and a map over its right part with a hill; nothing was seen at the left."""
    y, x = np.mgrid[:201, :333].astype(np.float32)
    heat = np.exp(-((x - 200) ** 2 + (y - 90) ** 2) / 2000)
    heat[:, :80] = np.nan
    return np.full((201, 333, 3), 128, np.uint8), heat


def test_figure(photograph, tmp_path):
    image, heat = photograph
    path = overlays.save_figure(image, heat[None], tmp_path / "new" / "a.png", ["class 3 cat, p = 0.9"], 0.05)
    with Image.open(path) as picture:
        drawn = np.asarray(picture).astype(int)
    assert drawn.shape[1] == overlays.NARROW > 333  # room for the caption
    left = (overlays.NARROW - 333) // 2
    body = drawn[:201, left : left + 333]
    assert (body[:, 3:74] < 60).all()  # not seen
    assert body[90, 200, 0] - body[90, 200, 2] > 100  # the hill is warm
    assert np.abs(body[10, 300] - body[10, 300].mean()).max() < 3  # far from it the image is grey
    # the outline of the top twentieth, a circle around the hill, is all that is white or black in there
    line = np.isin(body[..., 0], (0, 255)) & (np.ptp(body, axis=-1) == 0)
    line[:, :90] = False
    y, x = np.nonzero(line)
    radius = (0.05 * np.isfinite(heat).sum() / np.pi) ** 0.5
    distance = np.hypot(y - 90, x - 200)
    assert len(y) > 2 * radius
    assert distance.min() > radius - 1 and distance.max() < radius + 4
    bar = drawn[201:].max(axis=-1) - drawn[201:].min(axis=-1)
    assert bar.max() > 100  # colours
    assert (drawn[201:] == overlays.INK).all(axis=-1).sum() > 20  # text


def test_figure_of_steps_and_of_large_photographs(photograph, tmp_path):
    image, heat = photograph
    steps = np.stack([heat, 2 * heat])
    with Image.open(overlays.save_figure(image, steps, tmp_path / "a.png", side=333)) as picture:
        assert picture.width == 2 * 333 + overlays.GAP
        drawn = np.asarray(picture).astype(int)
    # one bar for both: the weaker step is the paler
    assert np.ptp(drawn[90, 200]) < np.ptp(drawn[90, 333 + overlays.GAP + 200]) - 40
    with Image.open(overlays.save_figure(image, heat[None], tmp_path / "b.png", side=100)) as picture:
        assert picture.width == overlays.NARROW
    with pytest.raises(ValueError, match="give \\(T, 201, 333\\)"):
        overlays.save_figure(image, heat, tmp_path / "c.png")
    with pytest.raises(ValueError, match="no finite value"):
        overlays.save_figure(image, np.full_like(heat, np.nan)[None], tmp_path / "c.png")
    # a constant map has no colours, in the picture and in the bar
    with Image.open(overlays.save_figure(image, np.ones_like(heat)[None], tmp_path / "d.png")) as picture:
        assert np.ptp(np.asarray(picture).astype(int), axis=-1).max() <= 19  # of the letters
    assert not (tmp_path / "c.png").exists()


def test_an_outline_lies_just_outside():
    inside = np.zeros((40, 50), bool)
    inside[10:20, 15:40] = True
    image = np.full((40, 50, 3), 128, np.uint8)
    drawn = overlays.outlined(image, inside)
    wanted = image.copy()
    wanted[8:22, 13:42] = 0
    wanted[9:21, 14:41] = 255
    wanted[10:20, 15:40] = 128
    assert np.array_equal(drawn, wanted)
    assert (image == 128).all()


def test_captions_are_broken_between_words(photograph, tmp_path):
    image, heat = photograph
    one, many = (
        Image.open(overlays.save_figure(image, heat[None], tmp_path / f"{n}.png", ["some words " * n])).size
        for n in (1, 20)
    )
    assert one[0] == many[0]
    assert many[1] > one[1] + 50


def test_without_the_extra(tmp_path):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("matplotlib", "jinja2"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import numpy as np
from aha import overlays
from aha.report import figures, html
image = np.random.rand(3, 64, 64)
pixels = overlays.to_pixels(image)
overlays.save_figure(pixels, image[:1], {str(tmp_path / "overlay.png")!r}, ["class 1"], 0.1)
for call in (
    lambda: figures.qualitative(image[None], {{"a": image[None, :1]}}, {str(tmp_path / "grid.png")!r}),
    lambda: html.render({{("", ""): {{"methods": {{"a": {{}}}}}}}}, {{}}, {str(tmp_path / "report.html")!r}),
):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("pip install aha-attribution[report]") for line in lines)
    assert [path.name for path in tmp_path.iterdir()] == ["overlay.png"]


def test_noisy_photographs_stay_within_the_budget(tmp_path, monkeypatch):
    noise = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(drawing, "GRID_BUDGET", drawing.BUDGET)
    opened(figures.qualitative(noise, dict.fromkeys(METHODS, noise[:, :1]), tmp_path / "noise.png"))


def test_refinement(images, maps, tmp_path, grids):
    trail = torch.stack([maps["grad_cam"]] * 4)
    path = tmp_path / "refinement.png"
    scores = torch.arange(12.0).reshape(4, 3) / 1000
    opened(figures.refinement(images, trail, path, scores), drawing.GRID_BUDGET)
    (band,) = grids.pop()[0]
    assert list(band.names) == ["input", *(f"T = {t}" for t in range(4))]
    texts = ["Ins − Del", "0.001", "0.004", "0.007", "0.010"]
    assert band.notes[1] == [(text, text == "0.010") for text in texts]
    opened(figures.refinement(images, trail, path), drawing.GRID_BUDGET)
    assert not any(grids.pop()[0][0].notes)
    with pytest.raises(ValueError, match="3 scores for 4 steps"):
        figures.refinement(images, trail, tmp_path / "bad.png", np.ones((3, 3)))
    with pytest.raises(ValueError, match="one per image"):
        figures.refinement(images, trail, tmp_path / "bad.png", np.ones((4, 2)))


def test_curves_and_bars(tmp_path):
    curve = torch.linspace(1, 0, 21)
    both = {"deletion": curve, "insertion": curve.flip(0)}
    many = {f"method_{i}": {"black": both, "mean": both} for i in range(13)} | {"aha T=3": {"black": both}}
    opened(figures.curves(many, tmp_path / "curves.png"))
    few = dict.fromkeys(METHODS, many["aha T=3"])
    opened(figures.curves(few, tmp_path / "few.png", summary=summary()))
    opened(figures.bars(summary(), "ins_minus_del", tmp_path / "bars.png"))
    opened(figures.bars(summary(), "deletion", tmp_path / "bars.png"))
    with pytest.raises(ValueError, match="no method has a value"):
        figures.bars(summary(), "iou", tmp_path / "bars.png")
    with pytest.raises(ValueError, match="at least one method"):
        figures.curves({}, tmp_path / "none.png")


def test_area_of_a_line_is_one_half():
    assert figures._area(np.linspace(0, 1, 5)) == pytest.approx(0.5)


def test_training_reads_resumed_and_broken_logs(tmp_path):
    log = tmp_path / "log.jsonl"
    records = [{"step": s, "loss": 1 / s, "insertion": 0.5, "lr": 1e-4} for s in (*range(1, 60), *range(30, 90))]
    log.write_text("\n".join([*map(json.dumps, records), '{"step": 91, "lo']))
    steps = [record["step"] for record in figures._read_log(log)]
    assert steps == list(range(1, 90))
    opened(figures.training(log, tmp_path / "training.png"))
    log.write_text('{"step": 20, "loss": NaN, "tau": 0.3}\n')
    opened(figures.training(log, tmp_path / "training.png"))
    log.write_text("")
    with pytest.raises(ValueError, match="no training record"):
        figures.training(log, tmp_path / "training.png")


def test_the_callers_matplotlib_settings_are_left_alone(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.bars(summary(), "deletion", tmp_path / "bars.png")
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("better", [True, False])
def test_front_holds_what_nothing_beats(better):
    generator = np.random.default_rng(0)
    points = {str(i): tuple(generator.integers(0, 12, 2).tolist()) for i in range(60)}

    def beats(a, b):
        gain = a[1] - b[1] if better else b[1] - a[1]
        return a[0] <= b[0] and gain >= 0 and a != b

    expected = {b for b in points.values() if not any(beats(a, b) for a in points.values())}
    front = figures._front(points, better)
    assert set(front) == expected
    assert front == sorted(front)


def test_names_cover_neither_names_nor_points():
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    generator = np.random.default_rng(3)
    points = {f"some_method_{i}": (float(x), float(y)) for i, (x, y) in enumerate(generator.random((26, 2)))}
    points["some_method_26"] = points["some_method_0"]  # two at one place
    figure = Figure(figsize=(7.4, 4.6), dpi=drawing.DPI)
    axes = figure.add_axes((0.1, 0.1, 0.85, 0.85), xlim=(-0.1, 1.1), ylim=(-0.1, 1.1))
    axes.plot((0.5, 0.5), (0.2, 0.4))
    figures._name_points(axes, points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    frame = axes.get_window_extent(renderer)
    boxes = {text.get_text().replace(" ", "_"): text.get_window_extent(renderer) for text in axes.texts}
    assert set(boxes) == set(points)
    for name, box in boxes.items():
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert frame.y0 <= box.y0 < box.y1 <= frame.y1
        assert not any(box.overlaps(other) for of, other in boxes.items() if of != name)
        for x, y in map(axes.transData.transform, points.values()):
            assert not (box.x0 - 4 < x < box.x1 + 4 and box.y0 - 4 < y < box.y1 + 4)


def test_tradeoff(tmp_path):
    rows = many()["methods"]
    for cost in ("seconds_per_image", "passes", "peak_bytes_per_image"):
        opened(figures.tradeoff(rows, tmp_path / f"{cost}.png", cost=cost))
    few = {name: rows[name] for name in ("random", "method_1")}  # random costs no pass
    opened(figures.tradeoff(few, tmp_path / "few.png", "rise/deletion", "passes"))
    one = {"a": {"ins_minus_del": 0.5, "seconds_per_image": 0.0}}
    opened(figures.tradeoff(one, tmp_path / "one.png"))
    for arguments, words in (
        ({"cost": "money"}, "choose one of"),
        ({"metric": "mystery"}, "no better direction"),
        ({"metric": "iou"}, "no method has both"),
    ):
        with pytest.raises(ValueError, match=words):
            figures.tradeoff(rows, tmp_path / "bad.png", **arguments)


def test_matrices_say_what_may_be_chance(tmp_path, monkeypatch):
    summary = many(8)
    seen = []
    draw = figures._matrix
    monkeypatch.setattr(figures, "_matrix", lambda *given: seen.append(given) or draw(*given))
    opened(figures.significance_matrix(summary, tmp_path / "significance.png"))
    _, table, colors, *_ = seen.pop()
    rows = list(table.rows)
    assert [column.path[-1] for column in table.columns] == ["Deletion ↓", "Insertion ↑", "Ins − Del ↑"]
    assert [row.name for row in rows[:2]] == ["aha T=7", "aha T=6"]
    assert [cell.text for cell in rows[0].cells] == ["best"] * 3
    assert [cell.text for cell in rows[1].cells] == ["+0.0100", "−0.0100", "−0.0200"]
    assert [cell.small for cell in rows[1].cells] == ["p 0.5"] * 3
    assert set(colors[0]) == {drawing.ACCENT}
    assert set(colors[1]) == {figures._ALIKE}
    assert figures._ALIKE not in colors[2]
    # the further from the best, the darker
    assert all(sum(bytes.fromhex(colors[2][i][1:])) > sum(bytes.fromhex(colors[7][i][1:])) for i in range(3))
    results = {("vit", "true"): summary, ("a_very_long_name_of_a_model", "true"): many(5)}
    opened(figures.models(results, tmp_path / "models.png", "deletion"))
    _, table, colors, *_ = seen.pop()
    assert [column.path for column in table.columns] == [("vit",), ("a_very_long_name_of_a_model",)]
    found = {row.name: row.cells for row in table.rows}
    assert [cell.text for cell in found["aha T=7"]] == ["0.3300", "–"]
    best = {(name, i) for name, cells in found.items() for i, cell in enumerate(cells) if cell.place == 1}
    assert best == {("aha T=7", 0), ("aha T=4", 1)}
    shades = dict(zip(found, colors, strict=True))
    assert shades["aha T=7"][0] == shades["aha T=4"][1] < shades["random"][0]  # deletion: the lowest is the deepest
    assert shades["aha T=7"][1] == "#ffffff"
    for call in (
        lambda: figures.significance_matrix({"methods": {}}, tmp_path / "bad.png"),
        lambda: figures.models(results, tmp_path / "bad.png", "iou"),
    ):
        with pytest.raises(ValueError, match=r"no significance|no result"):
            call()


def test_many_methods_go_onto_further_lines(images, maps, tmp_path, grids):
    methods = [f"method_{i}" for i in range(12)] + ["aha T=3"]
    layers = dict.fromkeys(methods, maps["grad_cam"])
    scores = {name: torch.tensor([i / 100, -i / 100, 0.5]) for i, name in enumerate(methods[:-1])}
    masks = torch.zeros(3, 1, 64, 64, dtype=torch.bool)
    masks[:, :, 20:40, 20:40] = True
    path = tmp_path / "qualitative.png"
    figures.qualitative(images, layers, path, ["a", "b", "c"], scores, masks)
    opened(path, drawing.GRID_BUDGET)
    bands, _, titles = grids.pop()
    assert titles == ["a", "b", "c"]
    assert [list(band.names) for band in bands] == [["input", *methods[:7]], ["input", *methods[7:]]]
    texts = [[[text for text, _ in line] for line in band.notes] for band in bands]
    assert texts[0][1] == ["Ins − Del", "0.000", *(f"−0.0{i}0" for i in range(1, 7))]
    assert texts[1][0][-1] == ""  # no score, no number
    assert [[[i for i, (_, best) in enumerate(line) if best] for line in band.notes] for band in bands] == [
        [[], [1], [1, 2, 3, 4, 5, 6, 7]],
        [[5], [], [1, 2, 3, 4, 5]],
    ]
    figures.qualitative(images, layers, path)
    bare = grids.pop()[0]
    for with_outline, without in zip(bands, bare, strict=True):
        for lines in zip(with_outline.panels, without.panels, strict=True):
            assert all(a.shape == (256, 256, 3) for a in lines[0])
            assert all((a != b).any() for a, b in zip(*lines, strict=True))  # outlined in every panel
        assert not without.notes[0]
    for arguments, words in (
        ({"scores": {"method_0": torch.zeros(2)}}, "scores of method_0 have shape"),
        ({"titles": ["a", "b"]}, "2 titles for 3 images"),
        ({"masks": masks[:2]}, r"give \(3, 1, H, W\)"),
    ):
        with pytest.raises(ValueError, match=words):
            figures.qualitative(images, layers, path, **arguments)
    with pytest.raises(ValueError, match="at least one method"):
        figures.qualitative(images, {}, path)


def test_ablation_and_curves_by_reference(tmp_path):
    rows = many(6)["methods"]
    lines = {"one": dict(enumerate(rows.values())), "two": {4: rows["random"], 32: rows["method_1"]}}
    opened(figures.ablation(lines, tmp_path / "ablation.png"))
    opened(figures.ablation({"two": lines["two"]}, tmp_path / "log.png", ["adp"], "fractions S"))
    with pytest.raises(ValueError, match="no row has a value of iou"):
        figures.ablation(lines, tmp_path / "bad.png", ["iou"])
    ramp = np.linspace(0, 1, 21)
    curves = {}
    for i, name in enumerate(many()["methods"]):
        both = {"insertion": ramp ** (1 - i / 40), "deletion": 1 - ramp ** (1 - i / 40)}
        curves[name] = {"black": both, "a longer name": both}
    opened(figures.curves_by_reference(curves, tmp_path / "curves.png"))
    with pytest.raises(ValueError, match="at least one method"):
        figures.curves_by_reference({}, tmp_path / "bad.png")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "figures").mkdir()
    for name in ("zebra", "training", "maps"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(
            folder / "figures" / f"{name}.png"
        )
    (folder / "summary.json").write_text(json.dumps(summary()), encoding="utf-8")
    path = html.write(folder)
    assert path == folder / "report.html"
    return path.read_text(encoding="utf-8")


def test_page_fetches_nothing(page):
    sources = re.findall(r"""(?:src|href|url|action)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert len(sources) == 5  # the icon, three figures that were there and one that follows from the summary
    assert all(source.startswith("data:") for source in sources)
    assert "<script" not in page
    assert "http" not in re.sub(r"base64,[^\"]+", "", page)
    assert "@import" not in page


def test_page_has_every_method_metric_and_interval(page):
    table = page[page.index("<h2>Results</h2>") : page.index("<details")]
    for name, values in summary()["methods"].items():
        row = re.search(rf'<th scope="row">{re.escape(name)}</th>.*?</tr>', table, re.DOTALL)[0]
        assert f"{values['ins_minus_del']:.4f}" in row
        assert row.count("<small>") == len(METRICS)
        low, high = values["ci95"]["insertion"]
        assert f"{low:.3f}\u2009…\u2009{high:.3f}" in row
    headings = re.findall(r'<th scope="col">([^<]+)</th>', table)[1:7]
    assert headings == ["Ins − Del ↑", "Deletion ↓", "Insertion ↑", "ADP ↓", "PIC ↑", "s / image ↓"]


def test_best_is_bold_and_second_underlined(page):
    table = page[page.index("<h2>Results</h2>") : page.index("Paired bootstrap")]
    best = re.findall(r"<td><b>([\d.]+)</b>", table)
    second = re.findall(r"<td><u>([\d.]+)</u>", table)
    assert best == ["0.7000", "0.1000", "0.8000", "37.00", "33.00", "0.01"]
    assert sorted(second) == sorted(["0.5000", "0.7000", "0.2000", "38.00", "32.00", "0.02"])


def test_page_escapes_text_and_tells_the_rest(page):
    assert "<title>aha report · tiny &lt;ViT&gt; &amp; co</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "rise (2 images)" in page
    for fact in (
        "black, blur",
        "2.11.0",
        "share after",
        "per step",
        "Protocol mda",
        "225",
        "+0.2000",
        "+0.1000 … +0.3000",
        "seed",
    ):
        assert fact in page
    assert re.findall(r"<dt>preprocessing</dt><dd>([^<]+)", page) == ["centre crop", "shorter side to 224 px"]
    assert page.count("<details>") == 2  # one per reference
    titles = re.findall(r"<figcaption><b>(\w+)", page)
    assert titles == ["Maps", "Faithfulness", "Training", "zebra"]


def test_ties_and_gaps(tmp_path):
    methods = {
        "a": {"iou": 0.5, "mystery_metric": 1.0},
        "b": {"iou": 0.5, "deletion": None, "ci95": {"iou": None}},
        "c": {"iou": float("nan")},
        "d": {"iou": 0.25},
    }
    summary = {"methods": methods, "classifier": {"note": {"x": "<i>"}}}
    page = html.render({("", ""): summary}, {}, tmp_path / "deep" / "page.html")
    text = page.read_text(encoding="utf-8")
    assert text.count("<b>0.5000</b>") == 2
    assert text.count("<u>0.2500</u>") == 1
    assert ">mystery metric<" in text
    assert "note · x</dt><dd>&lt;i&gt;</dd>" in text
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FileNotFoundError, "holds no summary.json"),
        ("{", ValueError, "is empty or damaged"),
        ("[]", ValueError, "not a JSON object"),
        ('{"methods": {"a": {}}, "sha256": "0"}', ValueError, "changed or damaged since"),
        ('{"methods": {}}', ValueError, "has no methods"),
    ],
)
def test_what_is_not_a_summary_is_one_clear_line(tmp_path, content, error, words):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(error, match=words) as caught:
        html.write(tmp_path)
    assert "\n" not in str(caught.value)


def balanced(page):
    """Whether every element of the page is closed where it must be."""
    from html.parser import HTMLParser

    open_ones = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in ("meta", "link", "img"):
                open_ones.append(tag)

        def handle_endtag(self, tag):
            assert open_ones.pop() == tag

    Parser().feed(page)
    return not open_ones


def test_page_of_many_methods(tmp_path):
    summary = many()
    page = html.render({("", ""): summary}, {}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert balanced(page)
    own, others = page[page.index("<h2>Results") :].split("<h3>Other protocols</h3>")
    headings = re.findall(r'<th scope="col">([^<]+)</th>', own)[1:]
    assert headings[:4] == ["Ins − Del ↑", "Deletion ↓", "Insertion ↑", "ADP ↓"]
    assert headings[4:] == ["s / image ↓", "F / image ↓", "B / image ↓", "MiB / image ↓"]
    assert own.count('<th scope="row">') == len(summary["methods"])
    assert "RISE Deletion ↓" in others
    for name, row in summary["methods"].items():
        line = re.search(rf'<th scope="row">{re.escape(name)}</th>.*?</tr>', own, re.DOTALL)[0]
        # no interval of costs
        assert line.count("<small>") == 4
        assert f">{columns.number('forward_per_image', row['forward_per_image'])}" in line
        assert ("†" in line) == (name == "aha T=26")
    assert "Not separable from it: aha T=26." in page
    differences = page[page.index("Differences to the best") :]
    assert differences.count("<small>p 0.001</small>") == 3 * (len(summary["methods"]) - 2)
    assert "not measured" not in page
    summary["methods"]["method_3"]["adp"] = None
    page = html.render({("", ""): summary}, {}, tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("not measured") == 1


def test_page_of_several_classifiers(tmp_path):
    for place, name, target, count in (
        ("a/predicted", "vit", "predicted", 6),
        ("a/true", "vit", "true", 6),
        ("b", "deit", "true", 4),
    ):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        summary = many(count)
        summary |= {"target": target, "classifier": {**summary["classifier"], "name": name}}
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = html.write(tmp_path).read_text(encoding="utf-8")
    assert balanced(page)
    assert re.findall(r'<h1 class="part" id="part-\d">([^<]+)', page) == [
        *("vit, predicted class", "vit, true class", "deit, true class"),
    ]
    assert re.findall(r'<a href="#part-(\d)">', page) == ["1", "2", "3"]
    overview = page[: page.index('class="part"')]
    row = re.search(r'<th scope="row">aha T=5</th>.*?</tr>', overview, re.DOTALL)[0]
    assert row.count("<b>0.1000</b>") == 2
    assert row.count("–") == 1
    # one of all, and per result two trade-offs and the significance
    assert page.count("data:image/png;base64") == 1 + 3 * 3
    assert (tmp_path / "figures" / "models.png").is_file()


def test_write_without_matplotlib_shows_what_is_there(tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text(json.dumps(many(4)), encoding="utf-8")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = html.write(tmp_path).read_text(encoding="utf-8")
    assert "data:image/png" not in page
    assert "<h2>Results</h2>" in page


HOSTILE = """</td></title></style>"'><script>alert(1)</script><img src=x onerror=alert(1)> $\\foo{$ &amp; {{ 7*7 }}"""


def poisoned(value):
    """A summary in which every text, and every name that is not one of ours, is hostile."""
    ours = {"name", "accuracy", "images", "deletion", "insertion", "ins_minus_del", "ci95", "p", "best", "difference"}
    if isinstance(value, dict):
        return {key if key in {*ours, *summary()} else f"{key}{HOSTILE}": poisoned(of) for key, of in value.items()}
    if isinstance(value, list) and any(isinstance(of, str) for of in value):
        return [poisoned(of) for of in value]
    return f"{value}{HOSTILE}" if isinstance(value, str) else value


def test_no_text_becomes_part_of_the_page(tmp_path):
    """Names of classes, methods, classifiers and files, titles and reasons come from outside."""
    from html.parser import HTMLParser

    told = poisoned(summary() | {"title": "title"})
    told["failures"] = [{"method": HOSTILE, "images": [1], "reason": HOSTILE}]
    told["comparisons"] = {HOSTILE: {"difference": 0.2, "ci95": [0.1, 0.3], "p": 0.001}}
    told["significance"] = {
        "deletion": {name: {"best": HOSTILE, "difference": 0.1, "p": 0.4} for name in told["methods"]}
    }
    picture = tmp_path / "picture.png"
    Image.new("RGB", (20, 20), (200, 3, 4)).save(picture)
    results = {(HOSTILE, HOSTILE): told, ("other" + HOSTILE, "true"): told}
    pictures = {HOSTILE: picture, "<script>": picture}
    page = html.render(results, dict.fromkeys(results, pictures), tmp_path / "p.html", pictures).read_text("utf-8")
    tags, attributes = set(), set()

    class Parser(HTMLParser):
        def handle_starttag(self, tag, attrs):
            tags.add(tag)
            attributes.update(name for name, _ in attrs)
            assert tag != "img" or dict(attrs)["src"].startswith("data:image/")

    Parser().feed(page)
    assert tags.isdisjoint({"script", "iframe", "object", "svg"})
    assert not {name for name in attributes if name.startswith("on")}
    assert balanced(page)
    assert page.count("alert(1)") > 50
    assert "{{ 7*7 }}" in page


def test_no_text_becomes_part_of_a_table_or_breaks_a_figure(tmp_path):
    from aha.report import tables

    rows = {f"{name}{HOSTILE}": row for name, row in summary()["methods"].items()}
    table = tables.comparison(rows, caption=HOSTILE)
    markdown, latex = table.to_markdown(), table.to_latex()
    assert re.search(r"(?<!\\)<(script|img)", markdown) is None
    assert "\\foo{" not in latex
    assert r"\$\textbackslash{}foo\{\$" in latex
    assert latex.count("{") - latex.count("\\{") == latex.count("}") - latex.count("\\}")
    told = summary() | {"methods": rows}
    figures.bars(told, "ins_minus_del", tmp_path / "bars.png")
    figures.draw({(HOSTILE, "predicted"): told, ("b", "predicted"): told}, tmp_path)
    heat = {HOSTILE: torch.rand(2, 1, 32, 32), "b": torch.rand(2, 1, 32, 32)}
    figures.qualitative(torch.rand(2, 3, 32, 32), heat, tmp_path / "maps.png", [HOSTILE, "$\\frac{$"])
    curve = {"deletion": torch.rand(5), "insertion": torch.rand(5)}
    figures.curves({HOSTILE: {HOSTILE: curve}, "b": {HOSTILE: curve}}, tmp_path / "curves.png")
    for path in tmp_path.glob("*.png"):
        opened(path, drawing.GRID_BUDGET)


def test_a_damaged_figure_is_said(tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(summary()))
    (tmp_path / "figures").mkdir()
    path = tmp_path / "figures" / "maps.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    html.write(tmp_path)
    for damaged in (b"", whole[:200], *(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :] for at in (1, 25, 500))):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"maps\.png is no image or damaged: run the evaluation again"):
            html.write(tmp_path)
