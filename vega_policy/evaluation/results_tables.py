"""Comparisons of policies as text, as Markdown and as numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vega_policy.evaluation.comparison import UnpairedRunsError, markdown_table
from vega_policy.evaluation.conditions import unlike_conditions
from vega_policy.evaluation.policy_runs import PolicyRuns, RunKey
from vega_policy.evaluation.results import (
    AVERAGES,
    Difference,
    Success,
    difference,
    rows_of,
    success,
)

_METHOD = (
    "Success and differences in %, with 95% intervals over episodes: Wilson's for success; for differences "
    "Bonett and Price's for pairs, an initial state's episodes of all seeds kept together. "
    "Averages weigh their suites alike; theirs are Zou and Donner's."
)
_MCNEMAR = "McNemar: exact p (episodes that only the first solved : only the second)."
_OWN_SEEDS = "Success is over all seeds of a policy, a difference over those that both policies played."
_ONE_SEED = "Of one training seed the intervals cannot say how another training would come out."
_SEEDS = (
    "The intervals are for the trainings at hand; how another training would come out is told by the spread "
    "over training seeds (sd: standard deviation), which they do not contain."
)


@dataclass(frozen=True)
class Comparison:
    """Several policies, each against the last, their reference.

    Attributes:
        policies: The policies, the reference last.
        rows: Suites and averages, in the order of display.
        successes: Success of each policy by row, over all that it played.
        differences: Paired difference to the reference by row, of every other policy.
    """

    policies: Sequence[PolicyRuns]
    rows: Sequence[str]
    successes: dict[str, dict[str, Success]]
    differences: dict[str, dict[str, Difference]]

    def numbers(self) -> dict[str, Any]:
        """Return everything as JSON values: rates in [0, 1], not in percent."""
        *others, reference = self.policies
        return {
            "reference": reference.name,
            "policies": {p.name: {"folder": p.folder, "control": p.control} for p in self.policies},
            "success": {
                name: {row: asdict(value) for row, value in rows.items()}
                for name, rows in self.successes.items()
            },
            "difference_to_reference": {
                name: {row: asdict(value) for row, value in rows.items()}
                for name, rows in self.differences.items()
            },
            "unpaired": {
                p.name: {"only_here": _missing(p, reference), "only_in_reference": _missing(reference, p)}
                for p in others
            },
            "notes": _notes(self),
        }


def compare_policies(policies: Sequence[PolicyRuns]) -> Comparison:
    """Compare policies on every evaluation that has the same place below both folders.

    Args:
        policies: At least two, with different names; the last is the reference.

    Raises:
        UnpairedRunsError: If one has no evaluation in common with the reference, or they did not play the
            same episodes.
    """
    *others, reference = policies
    for policy in others:
        if not policy.runs.keys() & reference.runs.keys():
            raise UnpairedRunsError(
                f"{policy.folder} and {reference.folder} have no <seed>/<suite> in common: the first has "
                f"{_places(policy.runs)}; the second has {_places(reference.runs)}"
            )
    rows = rows_of(policies)
    successes = {p.name: {row: value for row in rows if (value := success(p, row))} for p in policies}
    differences = {
        p.name: {row: value for row in rows if (value := difference(p, reference, row))} for p in others
    }
    return Comparison(policies, rows, successes, differences)


def results_table(comparison: Comparison, *, markdown: bool = False) -> str:
    """Return a comparison as text.

    Args:
        comparison: Of two policies, a line for each suite; of more, a line for each policy.
        markdown: Whether the tables are written as Markdown.
    """
    two = len(comparison.policies) == 2
    tables = [_by_suite(comparison)] if two else _by_policy(comparison)
    pieces = [markdown_table(cells) if markdown else _text_table(cells) for cells in tables]
    return "\n\n".join([*pieces, ("\n\n" if markdown else "\n").join(_notes(comparison))])


def _text_table(cells: Sequence[Sequence[str]]) -> str:
    """Return cells as text, a line for each row, the first column flush left and the others flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in cells
    )


def _by_suite(comparison: Comparison) -> list[list[str]]:
    first, second = comparison.policies
    head = ["suite", "seeds x episodes", first.name, second.name, "difference", "McNemar", "by seed"]
    cells = [
        [
            row,
            _count(value.first),
            _rate(value.first),
            _rate(value.second),
            _change(value),
            "-" if value.p is None else f"{value.p:.3g} ({value.only_first}:{value.only_second})",
            ", ".join(f"{100 * seed:+.1f}" for seed in value.by_seed.values()) + _deviation(value),
        ]
        for row, value in comparison.differences[first.name].items()
    ]
    return [head, *cells]


def _by_policy(comparison: Comparison) -> list[list[list[str]]]:
    """The table of success, and that of differences to the reference."""
    rows, reference = comparison.rows, comparison.policies[-1].name
    rates = [
        [name, *(f"{_rate(of[row])} ({_count(of[row])})" if row in of else "-" for row in rows)]
        for name, of in comparison.successes.items()
    ]
    changes = [
        [name, *(_change(of[row]) + _deviation(of[row]) if row in of else "-" for row in rows)]
        for name, of in comparison.differences.items()
    ]
    return [
        [["success (seeds x episodes)", *rows], *rates],
        [[f"difference to {reference}", *rows], *changes],
    ]


def _notes(comparison: Comparison) -> list[str]:
    *others, reference = comparison.policies
    values = [value for rows in comparison.differences.values() for value in rows.values()]
    repeated = any(len(value.by_seed) > 1 for value in values)
    notes = [f"{_METHOD} {_MCNEMAR if len(others) == 1 else _OWN_SEEDS}", _SEEDS if repeated else _ONE_SEED]
    for policy in others:
        for here, there in ((policy, reference), (reference, policy)):
            if missing := _missing(here, there):
                notes.append(f"Not compared, in {here.name} but not in {there.name}: {', '.join(missing)}.")
        common = [key for key in policy.runs if key in reference.runs]
        notes += unlike_conditions(
            (policy.name, reference.name),
            {"/".join(key): (policy.settings[key], reference.settings[key]) for key in common},
        )
        notes += _notes_on_averages(comparison, policy)
    return notes


def _notes_on_averages(comparison: Comparison, policy: PolicyRuns) -> list[str]:
    """Which averages, or seeds of them, are left out because a suite is missing."""
    notes, reference = [], comparison.policies[-1]
    common = policy.runs.keys() & reference.runs.keys()
    for row, suites in AVERAGES.items():
        value = comparison.differences[policy.name].get(row)
        seeds = sorted({seed for seed, suite in common if suite in suites})
        left_out = [seed for seed in seeds if value is None or seed not in value.by_seed]
        # With less than the four in all there is no average to speak of.
        if left_out and {suite for _, suite in common}.issuperset(suites):
            notes.append(
                f"{row}, {policy.name} against {reference.name}: without {', '.join(left_out)}, where not "
                "all four suites are there for both."
            )
    return notes


def _missing(here: PolicyRuns, there: PolicyRuns) -> list[str]:
    return ["/".join(key) for key in here.runs if key not in there.runs]


def _places(runs: Iterable[RunKey]) -> str:
    return ", ".join("/".join(key) for key in runs)


def _count(value: Success) -> str:
    return f"{len(value.by_seed)} x {value.episodes // len(value.by_seed)}"


def _rate(value: Success) -> str:
    return f"{100 * value.rate:.1f} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _change(value: Difference) -> str:
    return f"{100 * value.difference:+.1f} [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


def _deviation(value: Difference) -> str:
    return "" if value.seed_deviation is None else f" (sd {100 * value.seed_deviation:.1f})"
