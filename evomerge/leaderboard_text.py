"""A leaderboard as text: terminal, JSON, CSV, Markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from evomerge.statistics import Difference, Estimate

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from evomerge.leaderboard import Leaderboard, Row

FORMAT = 1  # of the JSON
TASKS_ABREAST = 3  # what 100 columns hold
WINNER = " (winner)"


def to_json(board: Leaderboard) -> str:
    """Keys are those of Leaderboard, and ``evomerge_leaderboard``: the version of this format."""
    return json.dumps({"evomerge_leaderboard": FORMAT, **asdict(board)}, indent=2, allow_nan=False)


def to_csv(board: Leaderboard) -> str:
    """One line a row of each section: select, test, search (not re-tested)."""
    out = io.StringIO()
    head = ["section", "rank", "subject", "name", "kind", "winner", "score", "low", "high"]
    head += ["difference", "difference_low", "difference_high", "p", "search", "failures", "misses", "front"]
    several = [f"objective {name}" for name in _objectives(board)]
    per_task = [f"{name}{part}" for name in (*board.tasks, *several) for part in (":score", ":low", ":high")]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *per_task, "merge"])
    for section, rows in (("select", board.select), ("test", board.test), ("search", board.search_only)):
        for r in rows:
            d = r.difference
            cells = [section, r.rank, r.subject, r.name, r.kind, int(r.subject == board.winner), *_three(r.score)]
            cells += [d.value, d.low, d.high, d.p] if d else [None] * 4
            cells += [r.search, r.failures, "; ".join(r.misses), int(section == "select" and r.subject in board.front)]
            cells += [x for task in board.tasks for x in _three(r.tasks.get(task))]
            cells += [x for name in _objectives(board) for x in _three(r.objectives.get(name))]
            writer.writerow(["" if c is None else c for c in [*cells, r.merge]])
    return out.getvalue()


def to_markdown(board: Leaderboard) -> str:
    """Sections of tables, and the verdict above them."""
    lines = [f"# {_md(board.study)}", "", f"**{_md(board.verdict)}**", ""]
    objectives = _objectives(board)
    head = ["", "select", "against best control", "p", *(f"objective {_md(name)}" for name in objectives)]
    head += [*map(_md, board.tasks), "search", "failures", "merge"]
    for title, rows in (("Select", board.select), ("Test", board.test)):
        if not rows:
            continue
        columns = ["#", *head] if title == "Select" else ["#", "", "test", *head[2:]]
        lines += [f"## {title}", "", _md_row(columns), _md_row(["--:", ":--", *["--:"] * (len(columns) - 3), ":--"])]
        for r in rows:
            cells = [_rank(r), _label(r, board), _scored(r.score), _scored(r.difference), _p(r.difference)]
            cells += [_scored(r.objectives.get(name)) for name in objectives]
            cells += [_scored(r.tasks.get(task)) for task in board.tasks]
            lines.append(_md_row(map(_md, [*cells, _number(r.search), str(r.failures), r.merge])))
        lines.append("")
    if board.search_only:
        lines += ["## Not re-tested, by search score (optimistic)", "", "| | search | merge |", "|:--|--:|:--|"]
        lines += [_md_row(map(_md, [_label(r, board), _number(r.search), r.merge])) for r in board.search_only]
        lines.append("")
    lines += [f"- {_md(line)}" for line in _missed(board)]
    lines += [f"- {_md(name)} failed: {_md(reason)}" for name, reason in board.failed]
    lines += [f"- {_md(note)}" for note in board.notes]
    return "\n".join(lines) + "\n"


def render_terminal(board: Leaderboard, console: Console | None = None) -> None:
    """Print the leaderboard; it fits 100 columns, and folds in fewer."""
    from rich.console import Console
    from rich.text import Text

    console = console or Console()
    console.print(Text(f"{board.study}\n", style="bold"))
    for table in _tables(board):
        console.print(table)
    for line in _missed(board):
        console.print(Text(line, style="yellow"))
    for name, reason in board.failed:
        console.print(Text(f"{name} failed: {reason}", style="yellow"))
    for note in board.notes:
        console.print(Text(note))
    console.print()
    console.print(Text(board.verdict, style="bold"))


def _tables(board: Leaderboard) -> Iterator[Table]:
    control, interval = "against best control", "score [95% interval]"
    if board.select:
        rows = []
        for r in board.select:
            scores = [_scored(r.score), _scored(r.difference), _p(r.difference), _number(r.search)]
            rows.append([_rank(r), _label(r, board), *scores, str(r.failures or "")])
        yield _table("Ranked on select", ["#", "", interval, control, "p", "search", "failed"], rows)
        yield from _more_tables("Select", board.select, board)
        merges = [[r.name + (WINNER if r.subject == board.winner else ""), r.merge] for r in board.select]
        yield _table("What they are", ["", "merge"], merges)
    if board.test:
        rows = [[_label(r, board), _scored(r.score), _scored(r.difference), _p(r.difference)] for r in board.test]
        adapted = ", and with adapters" if board.surgery else ""
        yield _table(f"The winner and the controls on test{adapted}", ["", interval, control, "p"], rows)
        yield from _more_tables("Test", board.test, board)
    if board.search_only:
        rows = [[_label(r, board), _number(r.search), r.merge] for r in board.search_only]
        yield _table("Not re-tested, by search score (optimistic)", ["", "search", "merge"], rows)


def _more_tables(title: str, rows: Sequence[Row], board: Leaderboard) -> Iterator[Table]:
    """Scores by objective and by task (unless the tasks are the objectives), as many abreast as fit."""
    tasks = board.tasks if len(board.tasks) > 1 else ()
    if all(r.tasks.get(task) == r.objectives.get(task) for r in rows for task in tasks):
        tasks = ()
    for kind, names in (("objective", _objectives(board)), ("task", tasks)):
        for start in range(0, len(names), TASKS_ABREAST):
            abreast = names[start : start + TASKS_ABREAST]
            scores = [r.objectives if kind == "objective" else r.tasks for r in rows]
            cells = [
                [_label(r, board), *(_scored(of.get(name)) for name in abreast)]
                for r, of in zip(rows, scores, strict=True)
            ]
            yield _table(f"{title} by {kind}", ["", *abreast], cells)


def _objectives(board: Leaderboard) -> tuple[str, ...]:
    """What has a column of its own beside the score."""
    return board.objectives if len(board.objectives) > 1 else ()


def _missed(board: Leaderboard) -> list[str]:
    """A line for each row that misses a constraint."""
    sections = (("select", board.select), ("test", board.test))
    return [f"{r.name} misses on {split}: {'; '.join(r.misses)}" for split, rows in sections for r in rows if r.misses]


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Numbers to the right, text to the left. Cells are plain text: brackets and all."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in head:
        table.add_column(Text(name), justify="left" if name in ("", "merge") else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row), style="bold" if any(cell.endswith(WINNER) for cell in row[:2]) else None)
    return table


def _rank(r: Row) -> str:
    return "" if r.rank is None else str(r.rank)


def _label(r: Row, board: Leaderboard) -> str:
    on_select = any(r is row for row in board.select)  # the front is that of select
    marks = [
        (" (control)", r.kind == "control"),
        (" (not a plain checkpoint)", r.kind == "surgery"),
        (" (infeasible)", bool(r.misses)),
        (" (front)", on_select and r.subject in board.front),
        (WINNER, r.subject == board.winner),
    ]
    return r.name + "".join(mark for mark, on in marks if on)


def _number(value: float | None, sign: str = "") -> str:
    return "" if value is None else f"{value:{sign}.3f}"


def _interval(e: Estimate | Difference) -> str:
    sign = "+" if isinstance(e, Difference) else ""
    return "" if e.low is None else f"[{_number(e.low, sign)}, {_number(e.high, sign)}]"


def _scored(e: Estimate | Difference | None) -> str:
    if e is None:
        return ""
    return f"{_number(e.value, '+' if isinstance(e, Difference) else '')} {_interval(e)}".strip()


def _p(d: Difference | None) -> str:
    if d is None or d.p is None:
        return ""
    return "<.001" if d.p < 0.001 else f"{d.p:.3f}"


def _three(e: Estimate | None) -> list[float | None]:
    return [None] * 3 if e is None else [e.value, e.low, e.high]


def _md(text: str) -> str:
    for mark in ("\\", "|", "*", "_", "<", "`", "["):
        text = text.replace(mark, "\\" + mark)
    return text.replace("\n", " ")


def _md_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
