"""Draws docs/branches.svg: the three branches of Algorithm 1, one of which gives a training row its target.

    python docs/branches.py

The colours follow the reader's setting, light or dark (prefers-color-scheme). The picture has its own ground,
because a page may be dark where the reader's system is light. Its three colours follow Okabe and Ito, which
people with any colour vision tell apart. Every branch is also labelled with words.
"""

from pathlib import Path

WIDTH, HEIGHT = 860, 366
PREDICTION_Y, PARAPHRASE_Y, GOLD_Y = 96, 196, 286  # the middle of each branch, in pixels from the top
BOX_HEIGHT = 56

STYLE = """
  svg { --ground: #ffffff; --ink: #1f2328; --quiet: #59636e; --line: #818b98; --box: #f4f6f8;
        --prediction: #0072b2; --paraphrase: #00795a; --gold: #9a6700; }
  @media (prefers-color-scheme: dark) {
    svg { --ground: #0d1117; --ink: #e6edf3; --quiet: #9198a1; --line: #848d97; --box: #1c2128;
          --prediction: #56b4e9; --paraphrase: #2fc298; --gold: #e69f00; }
  }
  text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 15px; }
  text { fill: var(--ink); }
  .ground { fill: var(--ground); }
  .box { fill: var(--box); stroke: var(--line); stroke-width: 1.5; }
  .line { fill: none; stroke: var(--line); stroke-width: 1.5; }
  .head { fill: var(--line); }
  .formula { font-size: 17px; font-weight: 600; }
  .quiet { font-size: 13px; fill: var(--quiet); }
  .prediction { stroke: var(--prediction); stroke-width: 2.5; }
  .paraphrase { stroke: var(--paraphrase); stroke-width: 2.5; }
  .gold { stroke: var(--gold); stroke-width: 2.5; }
"""
DESCRIPTION = """\
The model answers the question. If the judge accepts its response, the model is trained on that. Otherwise the
model paraphrases the gold. If the judge accepts the paraphrase, the model is trained on that, otherwise on
the gold."""


def text(x: int, y: int, words: str, style: str = "", anchor: str = "middle") -> str:
    return f'<text x="{x}" y="{y}" class="{style}" text-anchor="{anchor}">{words}</text>'


def box(x: int, middle: int, width: int, formula: str, words: str, branch: str = "") -> str:
    """A box whose left side is at `x`: a formula, and below it what the formula means."""
    top = middle - BOX_HEIGHT // 2
    center = x + width // 2
    frame = f'<rect x="{x}" y="{top}" width="{width}" height="{BOX_HEIGHT}" rx="8" class="box {branch}"/>'
    above = text(center, middle - 4, formula, "formula")
    below = text(center, middle + 17, words, "quiet")
    return "\n".join([frame, above, below])


def question(x: int, middle: int, width: int, words: str) -> str:
    """A diamond whose left corner is at `x`: what the judge is asked."""
    center, half = x + width // 2, BOX_HEIGHT // 2
    points = f"{x},{middle} {center},{middle - half} {x + width},{middle} {center},{middle + half}"
    return f'<polygon points="{points}" class="box"/>\n' + text(center, middle + 5, words)


def arrow_right(start: str, x: int, y: int) -> str:
    """A line along the path `start` with its head at (x, y), pointing right."""
    return f'<path d="{start} H {x - 8}" class="line"/>\n<path d="M {x} {y} l -10 -5 v 10 z" class="head"/>'


def arrow_down(start: str, x: int, y: int) -> str:
    """A line along the path `start` with its head at (x, y), pointing down."""
    return f'<path d="{start} V {y - 8}" class="line"/>\n<path d="M {x} {y} l -5 -10 h 10 z" class="head"/>'


def draw() -> str:
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" class="ground"/>']

    # Headings of the columns.
    parts.append(text(91, 36, "the data D", "quiet"))
    parts.append(text(273, 36, "the model M writes", "quiet"))
    parts.append(text(450, 36, "the judge decides", "quiet"))
    parts.append(text(668, 36, "D′: what M is trained on", "quiet"))
    parts.append(text(818, 36, "GSM8K*", "quiet"))

    # A row of the data, and the first branch: the model's own response.
    parts.append(box(22, PREDICTION_Y, 138, "(x, y)", "question, gold"))
    parts.append(arrow_right(f"M 160 {PREDICTION_Y}", 193, PREDICTION_Y))
    parts.append(box(193, PREDICTION_Y, 160, "ŷ = M(x)", "its own response"))
    parts.append(arrow_right(f"M 353 {PREDICTION_Y}", 390, PREDICTION_Y))
    parts.append(question(390, PREDICTION_Y, 120, "ŷ = y ?"))
    parts.append(text(536, PREDICTION_Y - 8, "yes", "quiet"))
    parts.append(arrow_right(f"M 510 {PREDICTION_Y}", 566, PREDICTION_Y))
    parts.append(box(566, PREDICTION_Y, 204, "(x, ŷ)", "the model’s own response", "prediction"))

    # Rejected: the second branch, the model's paraphrase of the gold.
    between = (PREDICTION_Y + PARAPHRASE_Y) // 2
    parts.append(text(466, between + 1, "no", "quiet"))
    parts.append(arrow_down(f"M 450 {PREDICTION_Y + 28} V {between} H 273", 273, PARAPHRASE_Y - 28))
    parts.append(box(193, PARAPHRASE_Y, 160, "ỹ = M([x; y])", "its own paraphrase"))
    parts.append(arrow_right(f"M 353 {PARAPHRASE_Y}", 390, PARAPHRASE_Y))
    parts.append(question(390, PARAPHRASE_Y, 120, "ỹ = y ?"))
    parts.append(text(536, PARAPHRASE_Y - 8, "yes", "quiet"))
    parts.append(arrow_right(f"M 510 {PARAPHRASE_Y}", 566, PARAPHRASE_Y))
    parts.append(box(566, PARAPHRASE_Y, 204, "(x, ỹ)", "its paraphrase of the gold", "paraphrase"))

    # Rejected again: the third branch, the gold itself.
    parts.append(text(466, PARAPHRASE_Y + 50, "no", "quiet"))
    parts.append(arrow_right(f"M 450 {PARAPHRASE_Y + 28} V {GOLD_Y}", 566, GOLD_Y))
    parts.append(box(566, GOLD_Y, 204, "(x, y)", "the gold", "gold"))

    # How often the paper took each branch.
    for y, share in ((PREDICTION_Y, "49.5 %"), (PARAPHRASE_Y, "42.1 %"), (GOLD_Y, "8.4 %")):
        parts.append(text(818, y + 5, share))
    footnote = "* share of the training rows of GSM8K in the paper (Table 3)"
    parts.append(text(838, HEIGHT - 18, footnote, "quiet", "end"))
    return "\n".join(parts)


def main() -> None:
    title = "<title>The three branches of S3FT</title>"
    description = f"<desc>{DESCRIPTION}</desc>"
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    lines = [opening, title, description, f"<style>{STYLE}</style>", draw(), "</svg>", ""]
    Path(__file__).with_suffix(".svg").write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
