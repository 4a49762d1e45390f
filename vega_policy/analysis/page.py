"""The report: one page without scripts that gathers tables, pictures, film and recording."""

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vega_policy.analysis.bootstrap import Estimate
from vega_policy.analysis.measures import HEADLINE, METRICS
from vega_policy.analysis.questions import KINDS
from vega_policy.analysis.reasoning import WORDS, Answers, QuestionSet
from vega_policy.analysis.sweep import Sweep

PAGE = "report.html"
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --paper: #fff; --line: #d0d0d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161616; --line: #444; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1200px;
       margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; } .verdict { font-size: 1.15rem; font-weight: 600; } .quiet { opacity: .75; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .85rem; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
img, video { max-width: 100%; display: block; margin: .5rem 0; }
"""


def verdict(found: Sweep, untrained: bool, scenes: int) -> str:
    """What may be said about the trained prior and its untrained copy, by intervals.

    Args:
        found: All numbers.
        untrained: Whether the probed weights are those of a seed.
        scenes: Number of scenes.
    """
    name = found.default.reader
    if untrained:
        return (
            f"The weights of {name} are untrained (a seed's). Nothing is said about training here; give "
            "prior.path=FOLDER with trained weights to have them compared with an untrained copy."
        )
    twin = found.twin()
    if twin is None:
        return f"There is no untrained copy of {name}: copies are built of Wan priors."
    if scenes < 2:
        return "One scene gives no intervals; whether training helps cannot be said."
    gains = found.gains(twin)
    kinds = {
        "beats its untrained copy on": [n for n, g in gains.items() if g.low > 0],
        "loses to it on": [n for n, g in gains.items() if g.high < 0],
        "shows no difference on": [n for n, g in gains.items() if g.low <= 0 <= g.high],
    }
    told = [
        f"{words} {', '.join(METRICS[n].title for n in names)}" for words, names in kinds.items() if names
    ]
    return f"At {found.default} the trained prior {'; '.join(told)} (95% intervals over {scenes} scenes)."


def write_page(folder: Path, title: str, sections: Mapping[str, str]) -> Path:
    """Write the page.

    Args:
        folder: Folder of the report; pictures are named relative to it.
        title: Heading.
        sections: Heading -> HTML.
    """
    body = "".join(f"<h2>{escape(heading)}</h2>{content}" for heading, content in sections.items() if content)
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
    path = folder / PAGE
    path.write_text(page)
    return path


def main_table(found: Sweep) -> str:
    """All metrics of the prior at its default place, its copy, and what they are compared with."""
    numbers = found.table()
    rows = [(str(r), *(_cell(numbers[r][name]) for name in METRICS)) for r in found.compared()]
    return table(("reader", *(metric.title for metric in METRICS.values())), rows) + paragraph(
        "95% bootstrap intervals over scenes; probes are tested on held-out scenes. Correspondence is "
        "VEGA-3D's score, which a component common to all tokens raises: read it beside its chance level and "
        "centred."
    )


def gains_table(found: Sweep) -> str:
    """Paired differences of the prior to every other reader."""
    others = [readout for readout in found.compared() if readout != found.default]
    rows = [(str(other), *(_cell(g) for g in found.gains(other).values())) for other in others]
    header = (f"{found.default} minus", *(METRICS[name].title for name in HEADLINE))
    return table(header, rows)


def best_table(found: Sweep) -> str:
    """Where in the sweep each metric is best."""
    numbers, rows = found.table(), []
    swept = [readout for readout in numbers if readout.layer is not None]
    for name in HEADLINE:
        known = [readout for readout in swept if math.isfinite(numbers[readout][name].value)]
        if known:
            best = max(known, key=lambda readout, n=name: numbers[readout][n].value)
            rows.append((METRICS[name].title, str(best), _cell(numbers[best][name])))
    note = "The best of many is picked on the scenes it is told on, so its number flatters it."
    return table(("metric", "best readout", "value"), rows) + paragraph(note)


def answers_table(answers: Answers) -> str:
    """Scores of every model by type."""
    kinds = [kind for kind in KINDS if any(question.kind == kind for question in answers.questions)]
    counts = [sum(question.kind == kind for question in answers.questions) for kind in kinds]
    header = ("model", "mean of types", *(kind.replace("_", " ") for kind in kinds))
    rows = [("test questions", str(sum(counts)), *map(str, counts))]
    rows += [
        (name, _cell(answers.row(name)), *(_cell(answers.row(name, kind)) for kind in kinds))
        for name in answers.scores
    ]
    others = ("semantic only", "fused, random prior", "fused, untrained copy", "fused, blind", WORDS)
    for other in (name for name in others if name in answers.scores):
        gains = [_cell(answers.gain("fused", other, kind)) for kind in kinds]
        rows.append((f"fused minus {other}", _cell(answers.gain("fused", other)), *gains))
    return table(header, rows) + paragraph(
        "Share right for choices, mean relative accuracy for distances and sizes (VSI-Bench), Acc@0.25 for "
        "grounding (ScanRefer); intervals over unseen scenes. Every answer to a text is right equally often, "
        "so that words alone should stay at chance."
    )


def examples(questions: QuestionSet) -> str:
    """One question of each type with its answer."""
    rows = []
    for kind in KINDS:
        asked = [question for question in questions.test if question.kind == kind]
        if asked:
            one = asked[0]
            right = one.choice or (f"{one.number:.1f}" if one.number else "")
            if one.box:
                right = "box at " + ", ".join(f"{number:.2f}" for number in one.box)
            rows.append((kind.replace("_", " "), f"scene {one.scene}: {one.text}", right))
    return table(("type", "question", "answer"), rows)


def pictures(folder: Path, paths: Iterable[Path], words: str = "") -> str:
    """Pictures below each other."""
    shown = [f'<img src="{escape(str(p.relative_to(folder)))}" alt="{escape(p.stem)}">' for p in paths]
    return (paragraph(words) if words else "") + "".join(shown)


def film(folder: Path, path: Path, words: str) -> str:
    """A film with its caption."""
    source = escape(str(path.relative_to(folder)))
    return f'{paragraph(words)}<video src="{source}" controls loop muted></video>'


def settings_table(values: Mapping[str, Any]) -> str:
    """Plain values."""
    return table(("setting", "value"), [(name, str(value)) for name, value in values.items()])


def paragraph(text: str, kind: str = "quiet") -> str:
    """A paragraph of one class."""
    return f'<p class="{kind}">{escape(text)}</p>'


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table that scrolls where it is too wide."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _cell(number: Estimate) -> str:
    if not math.isfinite(number.value):
        return "\u2013"
    if not math.isfinite(number.low):
        return f"{number.value:.3f}"
    return str(number)
