"""Write tables in Markdown. This needs no torch, so that gpu.py starts at once."""


def markdown_table(title: str, rows: dict[str, dict]) -> str:
    """Return a table with one row for each name in `rows`, and a column for every value that a row has.

    A value is a number, shown with four digits, or text. A row without a value shows a dash.
    """
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"**{title}**", "", _line(["", *columns]), "|---" * (len(columns) + 1) + "|"]
    lines += [_line([name, *(_cell(row.get(column)) for column in columns)]) for name, row in rows.items()]
    return "\n".join(lines)


def _cell(value) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(cells: list[str]) -> str:
    cells = [" ".join(cell.split()).replace("|", "\\|") for cell in cells]  # a cell has one line and no column's end
    return f"| {' | '.join(cells)} |"
