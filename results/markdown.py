"""Tables and numbers as Markdown."""


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = []
    for cells in [header, ["---"] * len(header), *rows]:
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def percent(value: float | None) -> str:
    """A share in percent, "" where there is none."""
    return "" if value is None else f"{100 * value:.1f}"


def shown(value) -> str:
    """A value as it is, "" where there is none."""
    return "" if value is None else str(value)


def points(center: float, low: float | None, high: float | None) -> str:
    """A difference in points with its interval, which a single document does not have."""
    if low is None or high is None:
        return f"{100 * center:.1f}"
    return f"{100 * center:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def nats(value: float | None, interval: list | None = None) -> str:
    """A log-probability, or a difference of two with its interval. "" where there is none."""
    if value is None:
        return ""
    if interval is None or None in interval:
        return f"{value:.3f}"
    low, high = interval
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def paper_row(table: dict, results: dict):
    """The paper's row for a run's task. None: it has none, as for models trained on another task."""
    if "trained_on" in results["config"]:
        return None
    return table.get(results["config"]["task"])
