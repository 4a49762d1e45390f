"""HTML reports are one escaped page without scripts."""

from vega_policy.evaluation.report import (
    Bar,
    BarChart,
    Figure,
    Gallery,
    Paragraph,
    Section,
    Table,
    render_report,
)


def test_every_block_is_rendered_and_escaped_without_scripts():
    sections = [
        Section("", [Paragraph("50.0%", "headline")]),
        Section(
            "Numbers",
            [Table(("task", "rate"), [("a & b", 0.5)]), BarChart("rates", [Bar("<a>", 0.5, 0.25, 0.75)])],
        ),
        Section("Videos", [Gallery([Figure("first", "a.png", "a.mp4")]), Figure("map", image="b.png")]),
        Section("Empty", []),
    ]
    page = render_report("Suite <script>", sections)
    for expected in (
        "<h1>Suite &lt;script&gt;</h1>",
        '<p class="headline">50.0%</p>',
        "<td>a &amp; b</td><td>0.5</td>",
        'width="250.0"',
        '<video src="a.mp4"',
        '<img src="b.png" alt="map">',
    ):
        assert expected in page
    assert "<script" not in page
    assert "Empty" not in page
    assert page.count("<h2>") == 2
