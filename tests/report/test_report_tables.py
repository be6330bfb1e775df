"""Tables of a comparison: the numbers come back as they went in, the right ones stand out, LaTeX has its structure."""

import io
import re
import types

import numpy as np
import pytest
from rich.console import Console

from aha.metrics import catalog
from aha.report import columns, figures, html, tables

METHODS = ("random", "rollout", "bi_attention", "rise", "aha T=0", "aha T=3")


def rows(seed=0):
    """Random means with intervals and costs; deletion falls and insertion rises along METHODS."""
    generator = np.random.default_rng(seed)
    found = {}
    for i, name in enumerate(METHODS):
        deletion, insertion = 0.4 - i / 20 + 0.02 * generator.random(), 0.4 + i / 20 + 0.02 * generator.random()
        values = {"deletion": deletion, "insertion": insertion, "ins_minus_del": insertion - deletion}
        values |= {
            "positive": deletion + 0.05,
            "negative": insertion + 0.1,
            "neg_minus_pos": 0.05 + insertion - deletion,
        }
        values |= {"adp": 60 - 9 * i + generator.random(), "pic": 10 + 5 * i + generator.random()}
        intervals = {name: [value - 0.01, value + 0.03] for name, value in values.items()}
        costs = {"seconds_per_image": 10.0 ** (i - 4) * 1.234, "forward_per_image": 10.0**i, "backward_per_image": 0.0}
        found[name] = {**values, **costs, "peak_bytes_per_image": 3.5 * 2**20 * (i + 1), "ci95": intervals}
    return found


def parsed(text):
    """Markdown → headings, and (name, cells) per row, without the marks of names."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len({len(line) for line in cells}) == 1
    assert all(re.fullmatch(r":-+|-+:", cell) for cell in cells[1])
    return cells[0], [(line[0].strip("*"), line[1:]) for line in cells[2:]]


def value(cell):
    """The number of a cell, whatever stands around it."""
    return float(re.search(r"-?\d+(\.\d+)?", cell).group())


def latex_rows(text):
    """The rows of the tabular as lists of cells, a multicolumn as what it spans; checks what makes LaTeX compile."""
    plain = re.sub(r"\\[&%$#_{}]", "", text)
    depth = 0
    for sign in plain:
        depth += {"{": 1, "}": -1}.get(sign, 0)
        assert depth >= 0
    assert depth == 0
    assert plain.count("$") % 2 == 0
    stack = []
    for kind, name in re.findall(r"\\(begin|end)\{([^}]*)\}", text):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert not stack
    spec, body = re.search(r"\\begin\{tabular\}\{((?:[^{}]|\{[^{}]*\})*)\}\n(.*)\\end\{tabular\}", text, re.S).groups()
    width = len(re.sub(r"@\{[^}]*\}", "", spec))
    found = []
    for line in body.splitlines():
        if not line.endswith(r"\\"):
            assert re.fullmatch(r"\\(toprule|midrule|bottomrule|addlinespace)|(\\cmidrule\(lr\)\{\d+-\d+\} ?)+", line)
            continue
        cells = re.split(r"(?<!\\)&", line.removesuffix(r"\\"))
        spans = [int(m.group(1)) if (m := re.match(r"\s*\\multicolumn\{(\d+)\}", cell)) else 1 for cell in cells]
        assert sum(spans) == width
        found.append([cell.strip() for cell in cells])
    outside = text.replace(body, "")
    assert "&" not in re.sub(r"\\&", "", outside)
    return found


def test_markdown_gives_the_numbers_back():
    table = tables.comparison(rows(), caption="all of them")
    text = table.to_markdown()
    assert text.startswith("all of them\n\n|")
    headings, lines = parsed(text)
    assert headings == [
        *("method", "Deletion ↓", "Insertion ↑", "Ins − Del ↑", "Positive ↓", "Negative ↑", "Neg − Pos ↑"),
        *("ADP ↓", "PIC ↑", "s / image ↓"),
    ]
    assert [name for name, _ in lines] == list(METHODS)
    shown = [*catalog.names("curves"), *catalog.names("accuracy"), *catalog.names("confidence"), "seconds_per_image"]
    for name, cells in lines:
        for metric, cell in zip(shown, cells, strict=True):
            expected = rows()[name][metric]
            half = {"adp": 0.005, "pic": 0.005, "seconds_per_image": 0.005 * expected}.get(metric, 0.00005)
            assert value(cell) == pytest.approx(expected, abs=half * 1.0001)


def test_latex_holds_the_same_numbers():
    table = tables.comparison(rows(), caption="50 % of a_b", label="tab:a-b", intervals=True)
    text = table.to_latex()
    lines = latex_rows(text)
    assert len(lines) == 1 + len(METHODS)
    for (_, markdown), latex in zip(parsed(table.to_markdown())[1], lines[1:], strict=True):
        assert [value(re.sub(r"\\[a-z]+|\$", "", cell)) for cell in latex[1:]] == [value(cell) for cell in markdown]
    assert r"\caption{50 \% of a\_b}" in text
    assert r"\label{tab:a-b}" in text
    assert r"\begin{table*}" in text
    assert r"\begin{table}" in tables.comparison(rows(), metrics=["adp"]).to_latex()
    assert text.count(r"\midrule") == 2  # under the head, and before ours
    assert text.index(r"\textbf{aha T=0}") > text.rindex(r"\midrule")


def test_best_is_bold_and_second_underlined_in_the_better_direction():
    given = {
        "a": {"deletion": 0.3, "insertion": 0.7, "rise/deletion": 0.1, "mas/insertion": 0.9},
        "b": {"deletion": 0.2, "insertion": 0.5, "rise/deletion": 0.4, "mas/insertion": 0.1},
        "c": {"deletion": 0.1, "insertion": 0.6, "rise/deletion": 0.2, "mas/insertion": 0.3},
    }
    table = tables.comparison(given, metrics=["deletion", "insertion", "rise/deletion", "mas/insertion"])
    assert [[cell.place for cell in row.cells] for row in table.rows] == [[0, 1, 1, 1], [2, 0, 0, 0], [1, 2, 2, 2]]
    lines = dict(parsed(table.to_markdown())[1])
    assert lines["a"] == ["0.3000", "**0.7000**", "**0.1000**", "**0.9000**"]
    assert lines["c"] == ["**0.1000**", "<ins>0.6000</ins>", "<ins>0.2000</ins>", "<ins>0.3000</ins>"]
    assert latex_rows(table.to_latex())[-1] == [
        *("c", r"\textbf{0.1000}", r"\underline{0.6000}", r"\underline{0.2000}", r"\underline{0.3000}")
    ]


def test_values_printed_alike_share_a_place():
    given = {name: {"insertion": v} for name, v in {"a": 0.70001, "b": 0.7, "c": 0.5, "d": 0.50004, "e": 0.4}.items()}
    places = [row.cells[0].place for row in tables.comparison(given).rows]
    assert places == [1, 1, 2, 2, 0]
    equal = tables.comparison({name: {"insertion": 0.5} for name in "abc"})
    assert [row.cells[0].place for row in equal.rows] == [0, 0, 0]


def test_absent_is_not_unmeasured():
    given = {
        "a": {"deletion": 0.1, "insertion": 0.5},
        "b": {"deletion": None, "insertion": 0.4},
        "c": {"insertion": 0.3},
        "d": {"deletion": float("nan"), "insertion": float("inf")},
    }
    lines = dict(parsed(tables.comparison(given).to_markdown())[1])
    assert [cells[0] for cells in lines.values()] == ["0.1000", "not measured", "–", "not measured"]
    assert lines["a"][1] == "**0.5000**"
    assert lines["d"][1] == "not measured"
    latex = latex_rows(tables.comparison(given).to_latex())
    assert [line[1] for line in latex[1:]] == [
        "0.1000",
        r"{\scriptsize not measured}",
        "--",
        r"{\scriptsize not measured}",
    ]


def test_intervals_and_what_may_be_chance():
    found = {"rise": {"best": "aha T=3", "p": 0.3}, "aha T=0": {"best": "aha T=3", "p": 0.049}, "rollout": {"p": None}}
    table = tables.comparison(rows(), {"insertion": found}, metrics=["insertion"], intervals=True)
    lines = dict(parsed(table.to_markdown())[1])
    assert {name for name, cells in lines.items() if "†" in cells[0]} == {"rise"}
    assert all(cells[0].endswith(" ±0.0200") for cells in lines.values())
    assert "† the difference" in table.to_markdown()
    assert r"$^{\dagger}$" in table.to_latex()
    assert "†" not in tables.comparison(rows(), metrics=["insertion"], intervals=True).to_markdown()
    assert "±" not in tables.comparison(rows(), metrics=["insertion"]).to_markdown()


def test_names_of_any_signs():
    name = r"50% a_b & {c} #1 $x$ ~^\|*_d_*"
    table = tables.comparison({name: {"adp": 1.0}, "τ <1>": {"adp": -2.0}})
    line = latex_rows(table.to_latex())[1]
    assert line[0] == (
        r"50\% a\_b \& \{c\} \#1 \$x\$ \textasciitilde{}\textasciicircum{}\textbackslash{}\textbar{}*\_d\_*"
    )
    assert latex_rows(table.to_latex())[2] == [r"$\tau$ \textless{}1\textgreater{}", r"\textbf{$-$2.00}"]
    headings, lines = parsed(table.to_markdown())
    assert headings == ["method", "ADP ↓"]
    cell = re.search(r"\| (50.*?) \|[^|]*\|$", table.to_markdown(), re.M).group(1)
    assert re.sub(r"\\(.)", r"\1", cell.strip()) == name
    # an underscore in a word is plain, others and pipes are not
    assert "a_b" in cell
    assert r"\_d\_" in cell
    assert r"\|" in cell
    assert value(lines[1][1][0]) == -2.0


def test_references_are_blocks_of_rows():
    summary = {"methods": rows(), "references": {"black": rows(1), "blur": rows(2)}}
    chosen = ["deletion", "insertion"]
    below = tables.references(summary, chosen)
    names = [name for name, _ in parsed(below.to_markdown())[1]]
    assert names == ["black", *METHODS, "blur", *METHODS]
    lines = latex_rows(below.to_latex())
    assert lines[1] == [r"\multicolumn{3}{l}{\emph{black}}"]
    assert [block.title for block in below.blocks] == ["black", "", "blur", ""]
    assert "s / image" not in tables.references({"references": {"black": {"a": {"adp": 1.0}}}}).to_markdown()
    with pytest.raises(ValueError, match="no references"):
        tables.references({"methods": rows()})


def test_models_side_by_side_and_targets_below():
    fewer = {name: row for name, row in rows(3).items() if name != "rise"}
    results = {
        ("ViT-B/16", "predicted"): {"methods": rows(1)},
        ("ViT-B/16", "true"): {"methods": rows(2)},
        ("ViT-B/32", "predicted"): {"methods": fewer},
    }
    table = tables.models(results, ["insertion", "seconds_per_image"])
    headings, lines = parsed(table.to_markdown())
    assert headings[1::2] == ["ViT-B/16 · Insertion ↑", "ViT-B/32 · Insertion ↑"]
    assert [name for name, _ in lines] == ["predicted class", *METHODS, "true class", *METHODS]
    first, second = dict(lines[1:7]), dict(lines[8:])
    assert first["rise"][2:] == ["–", "–"]
    assert {cell for cells in second.values() for cell in cells[2:]} == {"–"}
    # best is best of one model and one target
    assert all(found["aha T=3"][0].startswith("**") for found in (first, second))
    assert first["aha T=3"][2].startswith("**")
    head = latex_rows(table.to_latex())[0]
    assert head == ["", r"\multicolumn{2}{c}{ViT-B/16}", r"\multicolumn{2}{c}{ViT-B/32}"]
    assert r"\cmidrule(lr){2-3} \cmidrule(lr){4-5}" in table.to_latex()
    assert value(second["rollout"][0]) == pytest.approx(rows(2)["rollout"]["insertion"], abs=0.00005)
    latex_rows(table.to_latex())
    one = tables.models({("ViT", "true"): {"methods": rows()}}, ["insertion"])
    assert [name for name, _ in parsed(one.to_markdown())[1]] == list(METHODS)
    with pytest.raises(ValueError, match="no results"):
        tables.models({})


def test_protocols_are_a_level_of_headings():
    given = {
        "a": {"deletion": 0.1, "rise/deletion": 0.2, "mda/insertion": 0.3, "new/insertion": 0.4, "forward_per_image": 3}
    }
    table = tables.comparison(given, metrics=columns.measured(given.values()))
    assert [column.path for column in table.columns] == [
        *(
            ("", "Deletion ↓"),
            ("RISE", "Deletion ↓"),
            ("MDA", "Insertion ↑"),
            ("new", "Insertion ↑"),
            ("", "F / image ↓"),
        ),
    ]
    assert latex_rows(table.to_latex())[0][2:5] == [
        rf"\multicolumn{{1}}{{c}}{{{name}}}" for name in ("RISE", "MDA", "new")
    ]
    assert parsed(table.to_markdown())[0][2] == "RISE · Deletion ↓"


def test_costs_are_plain_numbers():
    for given in (0.0, 9.4e-5, 0.00176, 0.5, 12.345, 99.96, 1234.4, 4e6):
        text = columns.number("seconds_per_image", given)
        assert re.fullmatch(r"\d+(\.\d+)?", text)
        assert float(text) == pytest.approx(given, rel=0.005)
    assert columns.number("deletion", -0.00001) == "0.0000"
    assert columns.number("peak_bytes_per_image", 3.5 * 2**20) == "3.5"
    # many methods share the least, so nobody wins
    table = tables.comparison(rows(), metrics=["forward_per_image", "peak_bytes_per_image", "seconds_per_image"])
    assert [cell.place for cell in next(table.rows).cells] == [0, 0, 1]


def test_headings_are_the_catalogues():
    for key, metric in catalog.METRICS.items():
        assert columns.heading(key) == f"{metric.title} {metric.arrow}"
        assert columns.heading(f"some/{key}") == f"some {metric.title} {metric.arrow}"
    assert columns.heading("mda/insertion") == "MDA Insertion ↑"
    assert columns.heading("rise/mystery_score") == "RISE mystery score"
    shuffled = ["peak_bytes_per_image", "rise/insertion", "mystery", "iou", "rise/deletion", "deletion"]
    assert columns.ordered(shuffled) == [
        *("deletion", "iou", "mystery", "rise/deletion", "rise/insertion", "peak_bytes_per_image"),
    ]


def test_a_metric_from_outside_has_its_own_title_arrow_and_digits(monkeypatch, tmp_path):
    monkeypatch.setattr(catalog, "METRICS", dict(catalog.METRICS))
    catalog.add(catalog.Metric("wobble", "Wobble <1>", False, "mine", "how far it wobbles.", digits=1, scale=10.0))
    given = {name: {**row, "wobble": i / 10 + 0.001} for i, (name, row) in enumerate(rows().items())}
    table = tables.comparison(given, metrics=["wobble"])
    assert [column.path for column in table.columns] == [("Wobble <1> ↓",)]
    assert [cells for _, (cells,) in parsed(table.to_markdown())[1]] == [
        *("**0.0**", "<ins>1.0</ins>", "2.0", "3.0", "4.0", "5.0"),
    ]
    assert r"Wobble \textless{}1\textgreater{} $\downarrow$" in table.to_latex()
    page = html.render({("", ""): {"methods": given}}, {}, tmp_path / "page.html").read_text()
    headings = re.findall(r'<th scope="col">([^<]+)</th>', page)
    assert headings.index("Wobble &lt;1&gt; ↓") == headings.index("PIC ↑") + 1  # behind the others, before the costs
    assert "<td><b>0.0</b></td>" in page
    assert "<dt>Wobble &lt;1&gt; ↓</dt><dd>how far it wobbles.</dd>" in page
    # the figures order by its direction
    assert columns.best_first([given], "wobble") == list(METHODS)
    figures.bars({"methods": given}, "wobble", tmp_path / "bars.png")
    assert [cell.text for cell in next(tables.overview({"vit": {"methods": given}}, "wobble").rows).cells] == ["0.0"]


def test_html_holds_the_same_cells():
    found = {"rise": {"best": "aha T=3", "p": 0.3}}
    given = {**rows(), "<i>": {"adp": None}}
    table = tables.ranked(given, ["adp", "ins_minus_del"], {"ins_minus_del": found}, "A & B.")
    text = table.to_html()
    assert re.findall(r'<th scope="col">([^<]*)</th>', text) == ["method", "Ins − Del ↑", "ADP ↓"]
    lines = re.findall(r'<tr( class="ours")?><th scope="row">(.*?)</th>\n(.*?)\n</tr>', text, re.S)
    # the best of the headline first, what has none last
    assert [name for _, name, _ in lines] == [*reversed(METHODS), "&lt;i&gt;"]
    assert [bool(ours) for ours, *_ in lines] == [True, True, False, False, False, False, False]
    for (_, _, cells), row in zip(lines, table.rows, strict=True):
        shown = re.findall(
            r"<td>(?:<[bu]>)?([^<]*)(?:</[bu]>)?(?:<sup>(.*?)</sup>)?(?:<small>(.*?)</small>)?</td>", cells
        )
        assert shown == [(cell.text, cell.mark, cell.small) for cell in row.cells]
        if row.name in METHODS:
            low, high = given[row.name]["ci95"]["ins_minus_del"]
            assert row.cells[0].small == f"{low:.3f}\N{THIN SPACE}…\N{THIN SPACE}{high:.3f}"
    assert {name for _, name, cells in lines if "†" in cells} == {"rise"}
    assert text.count("<b>") == text.count("<u>") == 2
    assert "not measured" in lines[-1][2]
    assert text.endswith(" A &amp; B.</p>")
    blocks = tables.models({("m", "true"): {"methods": rows()}, ("m", "predicted"): {"methods": rows()}}, ["adp"])
    assert '<th scope="rowgroup" colspan="2">true class</th>' in blocks.to_html()


def test_what_an_evaluation_measured():
    methods = {name: {**row, "iou": 0.5, "f1": 0.1, "rise/deletion": 0.2} for name, row in rows().items()}
    summary = {
        "classifier": {"name": "vit", "accuracy": 0.98765, "images": 7},
        "methods": methods,
        "significance": {"insertion": {"rise": {"best": "aha T=3", "p": 0.3}}},
        "protocol": {"name": "aha", "metrics": ["deletion", "insertion", "pic"]},
        "target": "true",
    }
    failures = ["rise failed on 2 images: out of memory"]
    evaluation = types.SimpleNamespace(summary=lambda: summary, failure_lines=lambda: iter(failures))
    table = tables.of(evaluation)
    assert table.caption == "vit: 7 images, true class, accuracy 0.988 ↑"
    assert [column.path for column in table.columns] == [
        *(("Deletion ↓",), ("Insertion ↑",), ("PIC ↑",), ("IoU ↑",), ("s / image ↓",)),
    ]
    assert [row.name for row in table.rows] == list(METHODS)
    assert table.notes[-1] == failures[0]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(table.to_rich())
    assert failures[0] in [line.strip() for line in console.export_text().splitlines()]
    summary["classifier"]["accuracy"] = None
    assert tables.of(evaluation).caption == "vit: 7 images, true class"


def test_terminal_shows_all():
    console = Console(width=300, record=True, file=io.StringIO())
    table = tables.comparison(rows(), caption="[bold]not markup[/bold]", intervals=True)
    console.print(table.to_rich())
    text = console.export_text()
    assert "[bold]not markup[/bold]" in text
    for row in table.rows:
        assert all(f"{cell.text} {cell.small}".strip() in text for cell in row.cells)
    narrow = Console(width=60, record=True, file=io.StringIO())
    narrow.print(tables.comparison(rows()).to_rich())
    assert "…" not in narrow.export_text()


def test_files(tmp_path):
    summary = {"methods": rows(), "references": {"black": rows(1)}}
    made = tables.write({("a/b", "true"): summary}, tmp_path / "one")
    assert [path.relative_to(tmp_path / "one").as_posix() for path in made] == [
        *("comparison.md", "comparison.tex", "references.md", "references.tex"),
    ]
    made = tables.write({("a/b", "true"): summary, ("a/b", "predicted"): {"methods": rows()}}, tmp_path / "two")
    assert {path.relative_to(tmp_path / "two").as_posix() for path in made} == {
        *(f"a_b/true/{name}.{end}" for name in ("comparison", "references") for end in ("md", "tex")),
        *(f"{stem}.{end}" for stem in ("a_b/predicted/comparison", "models") for end in ("md", "tex")),
    }
    for path in made:
        text = path.read_text(encoding="utf-8")
        assert latex_rows(text) if path.suffix == ".tex" else parsed(text)
    with pytest.raises(ValueError, match=r"give one of \.md, \.tex"):
        tables.comparison(rows()).write(tmp_path / "table.html")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tables.comparison({}), "no methods"),
        (lambda: tables.comparison(rows(), metrics=["iou"]), "no method has a value of iou"),
        (lambda: tables.comparison({"a": {"mystery": 1.0}}), "choose among mystery"),
        (lambda: tables.comparison(rows(), label="tab: a}"), "label="),
        (lambda: tables.Table((tables.Column(("a",)), tables.Column(("a", "b"))), ()), "differ in length"),
        (
            lambda: tables.Table((tables.Column(("a",)),), (tables.Block((tables.Row("r", ()),)),)),
            "row 'r' has 0 cells",
        ),
    ],
)
def test_what_does_not_fit_is_one_clear_line(call, words):
    with pytest.raises(ValueError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
