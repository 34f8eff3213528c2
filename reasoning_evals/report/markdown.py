"""Report -> Markdown: the same content as the page, without charts."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Sequence

from reasoning_evals.comparing import Difference, detectable_text, p_cell, t_text
from reasoning_evals.report import text as form
from reasoning_evals.report.build import Example, Report, Side

_SPECIAL = re.compile(r"([\\`*_{}\[\]#|~])")


def render_markdown(report: Report) -> str:
    """Headings, tables and fenced model output; model output cannot close its own fence."""
    comparison = report.comparison
    parts = [f"# {inline(report.title)}", *_verdicts(report)]
    facts = {
        "Task": comparison.task,
        "Problems": f"{comparison.num_problems} x {comparison.num_samples} samples in each arm",
        **report.facts,
    }
    parts.append("\n".join(f"- {inline(name)}: {inline(value)}" for name, value in facts.items()))
    if report.traces_page:
        parts.append(
            f"Answers token by token, with the experts that fire: [{report.traces_page}]({report.traces_page})"
        )
    for title, table in report.tables.items():
        parts += [
            f"## {inline(title)}",
            table_text([*map(inline, table.head)], [[*map(inline, row)] for row in table.rows]),
        ]
    parts += ["## Arms", _arms(report), "## Paired differences", _pairs(report)]
    parts += ["## Accuracy by domain", _domains(report)]
    if rows := report.audit_rows():
        columns = report.audit_columns()
        cells = [[inline(arm), *[_cell(row.get(name)) for name in columns]] for arm, row in rows]
        parts += ["## What fired", table_text(["arm", *map(inline, columns)], cells)]
    if comparison.pairs:
        pair = comparison.pairs[0]
        for title, examples, total in (
            (f"Solved more often by {pair.b}", report.gained, len(pair.gained)),
            (f"Solved less often by {pair.b}", report.lost, len(pair.lost)),
        ):
            parts.append(f"## {inline(title)} ({len(examples)} of {total} shown)")
            parts += [_example(example) for example in examples]
    parts += ["## Config", _fence(json.dumps(report.run, indent=1, sort_keys=True, ensure_ascii=False), "json")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdicts(report: Report) -> list[str]:
    pairs = report.comparison.pairs
    sentences = [*report.headline, *(pair.sentence for pair in pairs)]
    lines = [f"Note: {inline(note)}" for note in report.above]
    lines += [f"**{inline(sentences[0])}**"] if sentences else []
    lines += [inline(sentence) for sentence in sentences[1:]]
    lines += [inline(sentence) for sentence in report.read_again]
    lines += [f"Note: {inline(note)}" for note in report.comparison.notes]
    return lines


def _arms(report: Report) -> str:
    comparison = report.comparison
    head = [
        "arm",
        "accuracy",
        "95%",
        f"pass@{comparison.num_samples}",
        f"maj@{comparison.num_samples}",
        "thinking tokens",
    ]
    head += ["95%", "total tokens", "wrong", "no answer", "never closed", "grader failed"]
    rows = [
        [
            inline(arm.name),
            form.percent(arm.accuracy.mean),
            form.percent_interval(arm.accuracy),
            form.percent(arm.pass_at_k),
            form.percent(arm.majority_at_k),
            form.count(arm.thinking_tokens.mean if arm.thinking_tokens else None),
            form.count_interval(arm.thinking_tokens),
            form.count(arm.total_tokens.mean if arm.total_tokens else None),
            form.percent(arm.wrong),
            form.percent(arm.no_answer),
            form.percent(arm.truncated),
            form.percent(arm.grader_failed),
        ]
        for arm in comparison.arms
    ]
    return table_text(head, rows)


def _pairs(report: Report) -> str:
    head = [
        "pair",
        "accuracy, points",
        "95%",
        "bootstrap 95%",
        "p (t)",
        "p (sign flip)",
        "p (Holm)",
        "won / lost / tied",
    ]
    head += ["mean tokens, ratio", "tokens where both solved", "detectable, points", "verdict"]
    rows = []
    for pair in report.comparison.pairs:
        found = pair.accuracy
        rows.append(
            [
                f"{inline(pair.b)} − {inline(pair.a)}",
                form.signed_points(found.mean),
                form.points_interval(found),
                form.bootstrap_points_interval(found),
                t_text(found),
                p_cell(found.sign_flip_p),
                p_cell(pair.holm_p),
                f"{pair.wins} / {pair.losses} / {pair.ties}",
                form.length_change(pair.length),
                _difference(pair.tokens_both_solved),
                detectable_text(found),
                pair.verdict,
            ]
        )
    return table_text(head, rows) if rows else "Nothing was compared."


def _difference(found: Difference | None) -> str:
    return "–" if found is None else f"{form.signed_count(found.mean)} ({form.signed_interval(found)})"


def _domains(report: Report) -> str:
    arms = report.comparison.arms
    names = sorted({name for arm in arms for name in arm.domains})
    rows = [
        [
            inline(name),
            str(arms[0].domains[name].num_problems),
            *[f"{form.percent(arm.domains[name].mean)} ({form.percent_interval(arm.domains[name])})" for arm in arms],
        ]
        for name in names
    ]
    return table_text(["domain", "problems", *[inline(arm.name) for arm in arms]], rows)


def _example(example: Example) -> str:
    parts = [
        f"### {inline(example.problem_id)}",
        _fence(example.question),
        f"Expected: {inline(example.target)}. Solved by {inline(example.a.arm)} {form.percent(example.rate_a, 0)} of the "
        f"time, by {inline(example.b.arm)} {form.percent(example.rate_b, 0)}.",
    ]
    for side in (example.a, example.b):
        parts.append(_side(side))
    return "\n\n".join(parts)


def _side(side: Side) -> str:
    got = "no answer" if side.extracted is None else inline(side.extracted)
    outcome = form.OUTCOMES.get(side.outcome, side.outcome)
    return "\n\n".join(
        [
            f"**{inline(side.arm)}**, sample {side.sample_idx}, {side.total_tokens} tokens: {outcome}; read: {got}; "
            f"{inline(side.reason)}",
            *([inline(side.gates)] if side.gates else []),
            f"<details><summary>thought ({side.thought_length:,} characters)</summary>",
            _fence(side.thought),
            "</details>",
            _fence(side.answer),
        ]
    )


def inline(value: object) -> str:
    """Text on one line with markup escaped."""
    return _SPECIAL.sub(r"\\\1", html.escape(" ".join(form.visible(value).split()), quote=False))


def _cell(value: object) -> str:
    return f"{value:,.6g}" if isinstance(value, float) else inline("–" if value is None else value)


def _fence(content: str, kind: str = "") -> str:
    """A code block whose fence is longer than any run of backticks in it."""
    content = form.visible(content)
    longest = max((len(run) for run in re.findall(r"`+", content)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{kind}\n{content}\n{fence}"


def table_text(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are already escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
