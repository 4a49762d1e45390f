"""HTML reports: typed blocks (paragraphs, tables, figures, bar charts) rendered by one jinja2 template."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True)
class Paragraph:
    """Text in one style: `quiet`, `headline`, `verdict` or plain."""

    text: str
    style: str = ""
    kind: ClassVar[str] = "paragraph"


@dataclass(frozen=True)
class Table:
    """A table whose cells are written with `str`."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """A video, an image or both, one above the other; paths are relative to the report's folder."""

    caption: str
    image: str | None = None
    video: str | None = None
    kind: ClassVar[str] = "figure"


@dataclass(frozen=True)
class Gallery:
    """Small figures side by side."""

    figures: Sequence[Figure]
    kind: ClassVar[str] = "gallery"


@dataclass(frozen=True)
class Bar:
    """A rate with its interval, all in [0, 1]; the main bars have the accent colour."""

    label: str
    value: float
    low: float
    high: float
    is_main: bool = True


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars with intervals; the caption is the text for screen readers."""

    caption: str
    bars: Sequence[Bar]
    kind: ClassVar[str] = "bars"


Block = Paragraph | Table | Figure | Gallery | BarChart


@dataclass(frozen=True)
class Section:
    """A heading and its blocks; a section without blocks is left out, an empty heading is not written."""

    heading: str
    blocks: Sequence[Block]


def render_report(title: str, sections: Sequence[Section]) -> str:
    """Return the page as HTML; every text is escaped."""
    environment = Environment(
        loader=PackageLoader("vega_policy", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(title=title, sections=sections)
