"""Overlays, figures and the page: written, readable, small, and nothing fetched from elsewhere."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from aha.report import figures, html, overlays

METHODS = ("random", "grad_cam", "aha T=0", "aha T=3")
METRICS = ("deletion", "insertion", "ins_minus_del", "adp", "pic", "seconds_per_image")


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def maps(images):
    ramp = torch.linspace(-2, 5, 64)[None, None, None].expand(3, 1, 64, 64)
    return {"grad_cam": ramp, "aha T=3": ramp.flip(-1)}


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
        "protocol": {"name": "aha", "points": 21, "references": ["black", "blur"]},
        "target": "predicted",
        "seed": 42,
        "versions": {"torch": "2.11.0"},
        "device": "cpu",
        "failures": [{"method": "rise", "images": [1, 2], "reason": "<script>alert(1)</script>"}],
        "comparisons": {"aha T=3 − aha T=0": {"difference": 0.2, "ci95": [0.1, 0.3], "p": 0.001}},
        "shortcut": {"share_before": 0.03, "share_after": 0.6, "per_step": [0.03, 0.2, 0.6]},
    }


def opened(path):
    """The figure as an array, after the checks that hold for each of them."""
    assert path.stat().st_size <= figures.BUDGET
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    assert min(pixels.shape[:2]) >= 100
    assert pixels.std() > 5
    return pixels


# ---- overlays


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


def test_strip(images, maps, tmp_path):
    path = overlays.save_strip(images[0], maps["grad_cam"], tmp_path / "new" / "strip.png")
    with Image.open(path) as picture:
        assert picture.size == (4 * 256 + 3 * overlays.GAP, 256)


def test_without_the_extra(tmp_path):
    code = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("matplotlib", "jinja2"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import numpy as np
from aha.report import figures, html, overlays
image = np.random.rand(3, 64, 64)
overlays.save_overlay({str(tmp_path / "overlay.png")!r}, image, image[:1])
for call in (
    lambda: figures.map_grid(image[None], {{"a": image[None, :1]}}, {str(tmp_path / "grid.png")!r}),
    lambda: html.render({{"methods": {{"a": {{}}}}}}, {{}}, {str(tmp_path / "report.html")!r}),
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


# ---- figures


def test_map_grid(images, maps, tmp_path):
    masks = torch.zeros(3, 1, 64, 64, dtype=torch.bool)
    masks[:, :, 20:40, 20:40] = True
    path = figures.map_grid(images, maps, tmp_path / "maps.png", titles=["a", "b", "c"], masks=masks)
    with_outline = opened(path)
    without = opened(figures.map_grid(images, maps, tmp_path / "plain.png", titles=["a", "b", "c"]))
    assert with_outline.shape == without.shape
    assert with_outline.shape[1] > 3 * 256
    assert not np.array_equal(with_outline, without)
    with pytest.raises(ValueError, match="2 titles for 3 images"):
        figures.map_grid(images, maps, tmp_path / "bad.png", titles=["a", "b"])
    with pytest.raises(ValueError, match=r"give \(3, 1, H, W\)"):
        figures.map_grid(images, {"one": maps["grad_cam"][:2]}, tmp_path / "bad.png")


def test_noisy_photographs_stay_within_the_budget(tmp_path):
    noise = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    opened(figures.map_grid(noise, dict.fromkeys(METHODS, noise[:, :1]), tmp_path / "noise.png"))


@pytest.mark.parametrize("scores", [np.ones((4, 3)), torch.ones(4)])
def test_refinement(images, maps, tmp_path, scores):
    trail = torch.stack([maps["grad_cam"]] * 4)
    opened(figures.refinement(images, trail, tmp_path / "refinement.png", scores))
    with pytest.raises(ValueError, match="one value per map"):
        figures.refinement(images, trail, tmp_path / "bad.png", np.ones(3))


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


# ---- the page


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
    assert len(sources) == 4
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
    assert headings == ["Ins − Del ↑", "Insertion ↑", "Deletion ↓", "ADP ↓", "PIC ↑", "s / image ↓"]


def test_best_is_bold_and_second_underlined(page):
    table = page[page.index("<h2>Results</h2>") : page.index("Paired bootstrap")]
    best = re.findall(r"<td><b>([\d.]+)</b>", table)
    second = re.findall(r"<td><u>([\d.]+)</u>", table)
    assert best == ["0.7000", "0.8000", "0.1000", "37.00", "33.00", "0.01"]
    assert sorted(second) == sorted(["0.5000", "0.7000", "0.2000", "38.00", "32.00", "0.02"])


def test_page_escapes_text_and_tells_the_rest(page):
    assert "<title>aha report · tiny &lt;ViT&gt; &amp; co</title>" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "rise (2 images)" in page
    for fact in ("black, blur", "2.11.0", "share after", "per step", "+0.2000", "+0.1000 … +0.3000", "seed"):
        assert fact in page
    assert page.count("<details>") == 2  # one per reference
    titles = re.findall(r"<figcaption><b>(\w+)", page)
    assert titles == ["Maps", "Training", "zebra"]


def test_ties_and_gaps(tmp_path):
    methods = {
        "a": {"iou": 0.5, "mystery_metric": 1.0},
        "b": {"iou": 0.5, "deletion": None, "ci95": {"iou": None}},
        "c": {"iou": float("nan")},
        "d": {"iou": 0.25},
    }
    page = html.render({"methods": methods}, {}, tmp_path / "deep" / "page.html", extra={"note": {"x": "<i>"}})
    text = page.read_text(encoding="utf-8")
    assert text.count("<b>0.5000</b>") == 2
    assert text.count("<u>0.2500</u>") == 1
    assert ">mystery metric<" in text
    assert "x</dt><dd>&lt;i&gt;</dd>" in text
    assert "None" not in text
    assert "nan" not in text


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, FileNotFoundError, "holds no summary.json"),
        ("{", ValueError, "is not JSON"),
        ("[]", ValueError, "has no methods"),
        ('{"methods": {}}', ValueError, "has no methods"),
    ],
)
def test_what_is_not_a_summary_is_one_clear_line(tmp_path, content, error, words):
    if content is not None:
        (tmp_path / "summary.json").write_text(content)
    with pytest.raises(error, match=words) as caught:
        html.write(tmp_path)
    assert "\n" not in str(caught.value)
