"""One HTML file with everything a run has measured: no script, no font, no image from elsewhere.

jinja2 (extra ``report``) is imported when a page is made.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from . import columns as names
from . import comparison_figures
from .columns import LABELS, direction, heading, is_number, is_ours
from .tables import ABSENT, ALIKE, UNMEASURED

# file stem → title and caption; other files are shown after these under their own name
CAPTIONS = {
    "maps": (
        "Maps",
        "Attribution over the image, one row per image. Warm is important. Where the evidence is known, "
        "it is outlined in the input.",
    ),
    "refinement": (
        "Test-time refinement",
        "The explainer's head takes T gradient steps of the same objective on one image; T = 0 is a single "
        "forward pass.",
    ),
    "curves": (
        "Deletion and insertion",
        "Probability of the explained class while pixels are removed or shown, the most important first; "
        "mean over images and references.",
    ),
    "curves_by_reference": (
        "Curves by reference",
        "The same for every reference image on its own.",
    ),
    "ins_minus_del": ("Faithfulness", "Insertion minus deletion with its 95 % confidence interval."),
    "tradeoff": (
        "Faithfulness and time",
        "Insertion minus deletion over the time to make one map; up and to the left is better.",
    ),
    "tradeoff_passes": (
        "Faithfulness and passes",
        "The same over the passes through the classifier, which do not depend on the machine.",
    ),
    "significance": (
        "Difference to the best",
        "Per metric, the method's mean minus the best one's, on the same images.",
    ),
    "models": ("Classifiers", "Insertion minus deletion; the deeper the blue, the better in its column."),
    "qualitative": ("Maps of all methods", "Warm is important; below each map its own insertion minus deletion."),
    "ablation": ("Ablation", "Band: 95 % interval."),
    "shortcut": ("Shortcut experiment", "Refinement against a classifier that has learned a shortcut."),
    "training": ("Training", "Faint: single values. Solid: running mean."),
}

EXPLANATIONS = {
    "insertion": "area under the probability while the most important pixels are shown first.",
    "deletion": "area under the probability while the most important pixels are removed first.",
    "ins_minus_del": "insertion minus deletion: the faithfulness of the order of the pixels.",
    "positive": "area under the accuracy while the most important pixels are removed first.",
    "negative": "area under the accuracy while the least important pixels are removed first.",
    "neg_minus_pos": "negative minus positive perturbation.",
    "adp": "average drop of the probability in percent when the map itself is the mask.",
    "pic": "share of images in percent whose probability rises when the map itself is the mask.",
    "pointing_game": "how often the highest pixel lies on the evidence or right beside it.",
    "iou": "overlap of the map, cut at its mean, with the evidence.",
    "map": "average precision of the pixels against the evidence.",
    "f1": "F1 of the map, cut at its mean, against the evidence.",
    "seconds_per_image": "time to make one map.",
    "forward_per_image": "forward passes through the classifier for one map.",
    "backward_per_image": "backward passes through the classifier for one map.",
    "peak_bytes_per_image": "memory at the peak of explaining one image by itself.",
}

Key = tuple[str, str]  # model and explained class


class Cell(NamedTuple):
    """A value of the table as text: what stands small below it, whether it is the best (1) or second best (2), and
    whether its distance to the best may be chance."""

    text: str
    small: str | None = None
    place: int = 0
    alike: bool = False


def write(folder: str | Path) -> Path:
    """Make ``folder``/report.html of what a run left there. Returns the path.

    That is ``summary.json`` and ``figures/*.png`` for one classifier and explained class, or one such pair in every
    sub-folder, at most two levels down, for several. The figures that follow from a summary alone (cost,
    significance, classifiers side by side) are drawn anew if matplotlib is there.

    Raises:
        FileNotFoundError: if there is no summary.json.
        ValueError: if one is not a summary.
        ImportError: without jinja2.
    """
    folder = Path(folder)
    places = [folder] if (folder / "summary.json").is_file() else _places_of_results(folder)
    if not places:
        raise FileNotFoundError(f"{folder} holds no summary.json: run `aha evaluate` or `aha demo` into it first")
    results: dict[Key, Mapping[str, Any]] = {}
    figures: dict[Key, dict[str, Path]] = {}
    for place in places:
        summary = _read(place / "summary.json")
        key = (summary.get("classifier") or {}).get("name", place.name), str(summary.get("target", ""))
        if key in results:  # the same classifier and class once more: told apart by the folder
            key = f"{key[0]} ({place.relative_to(folder)})", key[1]
        results[key] = summary
        figures[key] = _drawn(place / "figures", functools.partial(comparison_figures.draw, summary))
    overview = {}
    if len(results) > 1:
        overview = _drawn(folder / "figures", functools.partial(comparison_figures.draw_results, results))
    return render_results(results, figures, folder / "report.html", overview)


def _places_of_results(folder: Path) -> list[Path]:
    found = {path.parent for pattern in ("*", "*/*") for path in folder.glob(f"{pattern}/summary.json")}
    return sorted(found)


def _read(source: Path) -> Mapping[str, Any]:
    try:
        summary = json.loads(source.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{source} is not JSON ({error}): run the evaluation again") from error
    _methods(summary)
    return summary


def _drawn(folder: Path, draw: Callable[[Path], object]) -> dict[str, Path]:
    """The figures of a folder, after drawing what can be drawn: file stem → path, those with captions first."""
    # without matplotlib the page shows what is there
    with contextlib.suppress(ImportError):
        draw(folder)
    known = list(CAPTIONS)
    found = sorted(
        folder.glob("*.png"),
        key=lambda path: (known.index(path.stem) if path.stem in CAPTIONS else len(known), path.stem),
    )
    return {path.stem: path for path in found}


def render(
    summary: Mapping[str, Any],
    figures: Mapping[str, str | Path],
    out: str | Path,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write one self-contained page on one classifier. Returns the path.

    Args:
        summary: what `aha evaluate` writes to summary.json.
        figures: title → image file; a title that `CAPTIONS` knows is replaced and captioned.
        out: the HTML file; its folder is made.
        extra: further facts about the run, shown with the protocol; may be nested.

    Raises:
        ValueError: if the summary has no methods.
        ImportError: without jinja2.
    """
    return render_results({("", ""): summary}, {("", ""): figures}, out, extra=extra)


def render_results(
    results: Mapping[Key, Mapping[str, Any]],
    figures: Mapping[Key, Mapping[str, str | Path]],
    out: str | Path,
    overview: Mapping[str, str | Path] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write one self-contained page on several classifiers or explained classes. Returns the path.

    Args:
        results: (model, target) → summary; with several the page starts with all of them side by side.
        figures: (model, target) → title → image file, as in `render`.
        out: the HTML file; its folder is made.
        overview: figures of all results together.
        extra: further facts about the run.

    Raises:
        ValueError: if there are no results or one has no methods.
        ImportError: without jinja2.
    """
    if not results:
        raise ValueError("there are no results: give (model, target) → summary")
    for summary in results.values():
        _methods(summary)
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("the report needs jinja2: pip install aha-attribution[report]") from error
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    parts = [
        _part(key, summary, figures.get(key, {}), (extra or {}) if len(results) == 1 else {})
        for key, summary in results.items()
    ]
    named = next((str(summary["title"]) for summary in results.values() if summary.get("title")), None)
    page = environment.get_template("report.html.j2").render(
        title=named or (parts[0]["classifier"] if len(parts) == 1 else f"{len(parts)} comparisons"),
        parts=parts,
        level=names.LEVEL,
        overview=_overview(results, [part["name"] for part in parts]) if len(parts) > 1 else None,
        overview_figures=[_figure(title, Path(path)) for title, path in (overview or {}).items()],
        overview_facts=[(name.replace("_", " "), text) for name, text in _flat(extra)] if extra else [],
    )
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def _methods(summary: Any) -> Mapping[str, Mapping[str, Any]]:
    methods = summary.get("methods") if isinstance(summary, Mapping) else None
    if not isinstance(methods, Mapping) or not methods:
        raise ValueError("the summary has no methods: give the summary.json of an evaluation")
    return methods


def _part(
    key: Key, summary: Mapping[str, Any], figures: Mapping[str, str | Path], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """What the page says about one result."""
    methods = _methods(summary)
    classifier = summary.get("classifier") or {}
    significance = summary.get("significance") or {}
    metrics = _metrics(methods)
    order = _order(methods, metrics)
    own, others = ([m for m in metrics if bool(names.split(m)[0]) is other] for other in (False, True))
    return {
        "name": f"{key[0]}, {key[1]} class" if all(key) else key[0],
        "classifier": classifier.get("name", "classifier"),
        "facts": _facts(summary, classifier),
        "headline": _headline(methods, significance),
        "table": _table(methods, own, order, significance),
        "protocols": _table(methods, others, order, significance) if others else None,
        "explanations": _explanations(metrics),
        "references": {
            name: _table(of, *_chosen(of))
            for name, of in (summary.get("references") or {}).items()
            if isinstance(of, Mapping) and of
        },
        "differences": _differences(significance, order),
        "shortcut": _shortcut(summary.get("shortcut")),
        "figures": [_figure(title, Path(path)) for title, path in figures.items()],
        "comparisons": _comparisons(summary.get("comparisons")),
        "failures": _failures(summary.get("failures")),
        "run": [
            (title, [(name.replace("_", " "), text) for name, text in _flat(facts)])
            for title, facts in (
                ("Protocol", {**_named("name", summary.get("protocol")), **_pick(summary, "target", "seed")}),
                ("Classifier", classifier),
                ("Versions", {**_named("version", summary.get("versions")), **_pick(summary, "device")}),
                ("More", extra),
            )
            if facts
        ],
    }


def _metrics(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Metrics that any method has a number of: those of the protocol aha first, what leads a page before its parts."""
    seen = dict.fromkeys(key for values in methods.values() for key, value in values.items() if is_number(value))
    protocols = list(dict.fromkeys(["", *(names.split(metric)[0] for metric in seen)]))
    known = list(LABELS)

    def place(metric: str) -> tuple[int, int, str]:
        protocol, name = names.split(metric)
        return protocols.index(protocol), known.index(name) if name in LABELS else len(known), name

    return sorted(seen, key=place)


def _order(methods: Mapping[str, Mapping[str, Any]], metrics: list[str]) -> list[str]:
    """Names of the methods, the best of the first metric first."""
    order = list(methods)
    if metrics and (better := direction(metrics[0])) is not None:
        known = {n: v for n in order if is_number(v := methods[n].get(metrics[0]))}
        order.sort(key=lambda n: -known.get(n, -float("inf")) if better else known.get(n, float("inf")))
    return order


def _chosen(methods: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], list[str]]:
    metrics = _metrics(methods)
    return metrics, _order(methods, metrics)


def _table(
    methods: Mapping[str, Mapping[str, Any]],
    metrics: list[str],
    order: list[str],
    significance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Headings and rows of cells."""
    columns = {m: names.places({name: values.get(m) for name, values in methods.items()}, m) for m in metrics}
    rows: list[dict[str, Any]] = []
    for name in order:
        cells = []
        for m in metrics:
            found = ((significance or {}).get(m) or {}).get(name)
            place = columns[m].get(name, 0)
            alike = place != 1 and names.inseparable(found)
            cells.append(Cell(_text(methods[name], m), _interval(methods[name], m), place, alike))
        rows.append({"name": name, "ours": is_ours(name), "cells": cells})
    marked = any(cell.alike for row in rows for cell in row["cells"])
    return {"headings": [heading(m) for m in metrics], "rows": rows, "alike": ALIKE if marked else None}


def _overview(results: Mapping[Key, Mapping[str, Any]], titles: list[str]) -> dict[str, Any] | None:
    """Insertion minus deletion of every method in every result."""
    metric = "ins_minus_del"
    tables = [_table(s["methods"], [metric], list(s["methods"]), s.get("significance")) for s in results.values()]
    cells = [{row["name"]: row["cells"][0] for row in table["rows"]} for table in tables]
    methods = list(dict.fromkeys(name for column in cells for name in column))
    means = {
        name: [v for s in results.values() if is_number(v := s["methods"].get(name, {}).get(metric))]
        for name in methods
    }
    if not any(means.values()):
        return None
    # methods that ran everywhere come first: a mean of fewer results does not compare
    methods.sort(key=lambda n: (-len(means[n]), -sum(means[n])))
    rows = [
        {"name": n, "ours": is_ours(n), "cells": [column.get(n, Cell(ABSENT)) for column in cells]} for n in methods
    ]
    alike = next((table["alike"] for table in tables if table["alike"]), None)
    return {"headings": titles, "rows": rows, "alike": alike, "metric": heading(metric)}


def _differences(significance: Mapping[str, Any], order: list[str]) -> dict[str, Any] | None:
    """Method minus the best of each metric, with the corrected p below."""
    tested = [m for m in LABELS if significance.get(m)] + sorted(
        m for m in significance if significance[m] and m not in LABELS
    )
    if not tested:
        return None
    rows = []
    for name in order:
        cells = []
        for metric in tested:
            found = significance[metric].get(name) or {}
            best = any(of.get("best") == name for of in significance[metric].values())
            difference, p = found.get("difference"), found.get("p")
            if best:
                cells.append(Cell("best", None, 1))
            elif is_number(difference):
                text = f"{'+' if difference > 0 else ''}{names.number(metric, difference)}"
                cells.append(Cell(text, f"p {p:.2g}" if is_number(p) else None, 0, names.inseparable(found)))
            else:
                cells.append(Cell(ABSENT))
        rows.append({"name": name, "ours": is_ours(name), "cells": cells})
    return {"headings": [heading(m) for m in tested], "rows": rows, "alike": ALIKE}


def _text(row: Mapping[str, Any], metric: str) -> str:
    value = row.get(metric)
    if is_number(value):
        return names.number(metric, value)
    return UNMEASURED if metric in row else ABSENT


def _interval(row: Mapping[str, Any], metric: str) -> str | None:
    bounds = names.interval(row, metric)
    if bounds is None:
        return None
    low, high = (names.number(metric, bound, digits=3) for bound in bounds)
    return f"{low}\N{THIN SPACE}…\N{THIN SPACE}{high}"  # narrow: twelve columns share a page


def _explanations(metrics: list[str]) -> list[tuple[str, str]]:
    seen = dict.fromkeys(names.split(metric)[1] for metric in metrics)
    return [(heading(name), EXPLANATIONS[name]) for name in seen if name in EXPLANATIONS]


def _headline(methods: Mapping[str, Mapping[str, Any]], significance: Mapping[str, Any]) -> str | None:
    scored = {n: v["ins_minus_del"] for n, v in methods.items() if is_number(v.get("ins_minus_del"))}
    if not scored:
        return None
    best = max(scored, key=scored.__getitem__)
    interval = _interval(methods[best], "ins_minus_del")
    text = f"Most faithful: {best}, insertion − deletion {scored[best]:.4f}"
    text += f" (95 % interval {interval})." if interval else "."
    tested = significance.get("ins_minus_del") or {}
    alike = [name for name, found in tested.items() if name != best and names.inseparable(found)]
    return text + (f" Not separable from it: {', '.join(alike)}." if alike else "")


def _facts(summary: Mapping[str, Any], classifier: Mapping[str, Any]) -> list[str]:
    facts = [f"{len(summary['methods'])} methods"]
    if is_number(classifier.get("images")):
        facts.append(f"{classifier['images']} images")
    if is_number(classifier.get("accuracy")):
        facts.append(f"classifier accuracy {100 * classifier['accuracy']:.1f} %")
    if summary.get("target") is not None:
        facts.append(f"explained class: {summary['target']}")
    return facts


def _comparisons(values: Any) -> list[dict[str, str]]:
    """Paired differences {"a − b": {"difference", "ci95", "p"}} as text."""
    rows = []
    for pair, found in (values or {}).items():
        interval = found.get("ci95")
        known = interval and all(map(is_number, interval))
        rows.append(
            {
                "pair": pair,
                "difference": f"{found['difference']:+.4f}" if is_number(found.get("difference")) else "–",
                "interval": f"{interval[0]:+.4f} … {interval[1]:+.4f}" if known else "–",
                "p": f"{found['p']:.2g}" if is_number(found.get("p")) else "–",
            }
        )
    return rows


def _failures(values: Any) -> list[tuple[str, str]]:
    """What failed and why, of {method: reason} or of records {"method", "images", "reason"}."""
    if not isinstance(values, (list, tuple)):
        return list(_flat(values or {}))
    rows = []
    for record in values:
        if isinstance(record, Mapping) and "reason" in record:
            count = len(record.get("images") or ())
            where = f" ({count} image{'s' * (count != 1)})" if count else ""
            rows.append((f"{record.get('method') or 'not used'}{where}", str(record["reason"])))
        else:
            rows.append(("", _plain(record)))
    return rows


def _shortcut(values: Any) -> dict[str, Any] | None:
    """Single numbers as a list of facts, lists of numbers as the rows of one table over the steps."""
    if not isinstance(values, Mapping) or not values:
        return None
    series = {
        str(k): [_plain(x) for x in v]
        for k, v in values.items()
        if isinstance(v, (list, tuple)) and v and all(map(is_number, v))
    }
    return {
        "facts": [(n.replace("_", " "), t) for n, t in _flat({k: v for k, v in values.items() if k not in series})],
        "series": {k.replace("_", " "): v for k, v in series.items()},
        "steps": range(max(map(len, series.values()), default=0)),
    }


def _figure(title: str, path: Path) -> dict[str, Any]:
    name, caption = CAPTIONS.get(title, (title.replace("_", " "), ""))
    with Image.open(path) as picture:
        kind, dpi = Image.MIME[picture.format or "PNG"], picture.info.get("dpi", (0, 0))[0]
        # at this many dots per inch the letters of our figures are as large as the page's
        size = [round(side * 124 / dpi) if dpi > 1 else side for side in picture.size]
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return {"title": name, "caption": caption, "size": size, "source": f"data:{kind};base64,{data}"}


def _named(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    return {} if value is None else {name: value}


def _pick(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}


def _flat(values: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as (name, text); a list of plain values is one line, one of others a line each."""
    if isinstance(values, Mapping):
        items: Any = values.items()
    elif isinstance(values, (list, tuple)) and any(isinstance(v, (Mapping, list, tuple)) for v in values):
        items = enumerate(values, 1)
    else:
        many = isinstance(values, (list, tuple))
        yield prefix, ", ".join(map(_plain, values)) if many else _plain(values)
        return
    for key, value in items:
        name = str(key) if isinstance(values, Mapping) and not prefix else f"{prefix} · {key}".strip(" ·")
        yield from _flat(value, name)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
