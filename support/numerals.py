r"""Numbers written in a text: which there are, and the last one, which the judge `numeric` compares (A.3).

Skip the table on first reading. It says, row by row, what the pattern below it reads, and why.

    written                                   read as         because
    18   +18   18.   18!   **18**   _18_      18              marks around digits are not part of a number
    18.00   018                               18              it is compared by value, exactly, however long
    1,234   1,234,567.5                       1234, 1234567.5 groups of exactly three digits
    1{,}234   1\,234   1'234   1_234   1 234  1234            so written too (the last: thin, no-break blank),
    1,\!234                                   1234            as MATH does it
    118 000   1 200 300                       118000, 1200300 a plain blank does so too, unless
    3 4   5 12 100   12 100 5   0 500         4, 100, 5, 500  more digits stand beside it, or a zero before
    1,23   3, 4   1,2345                      23, 4, 2345     any other comma ends a number
    .5   0.5                                  0.5             but ...5 is 5, and 1.2.3 ends in 3
    $18   £18   18 %   18kg   18 km/h         18              currency, percent and units are not read
    \boxed{18}   \$18   \(18\)   #### 18      18              nor is markup
    m^2   m^{2}   cm²                         nothing         an exponent is no number of its own,
    10^6   2^{5}   1.2 x 10^3   10⁶           10, 2, 10, 10   nor is a power worked out: the base is read
    -18   −18   ‐18   ‑18   ‒18   –18   (-18) -18             a minus is any of these, and touches its number
    -$18   $-18   -€ 18   -₩18   -US$18       -18             or the number's currency,
    5-18   day-18   ) -18                     18, 18, -18     and nothing that it could subtract from,
    10%-18%   5°-18°   20€-18€   $20$-$18$    18              a sign that ends a number among them,
    - 18   10 - 18   —18                      18              a bullet, a subtraction, a dash is no sign
    1.8e1   1E3                               18, 1000        an exponent of up to three digits
    ３   १८                                    3, 18           the decimal digits of any script
    8/3   -1/2   \frac{8}{3}                  8/3, -1/2, 8/3  a fraction is one number, with its exact value,
    2 2/3   2\frac{2}{3}                      8/3             so is a mixed one,
    3/4/2020   5-8/3   m2/3   8/0   8/3kg     2020, 3, 3, 0, 3 but only where nothing else hangs on it
    3:45   7-9   2x4   m2   9 km/h            45, 9, 4, 2, 9  no times, ranges, products: the last number
    ½   ²   eighteen   ∞   nan                nothing         not written in digits

    Two answers without a number are not equal.
"""

import re
from collections import deque
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import islice

# Hyphens, the figure dash and the en dash, the minus sign, the small and the wide hyphen.
MINUS = r"-\u2010-\u2013\u2212\ufe63\uff0d"
CURRENCY = r"¢-¥֏؋৲৳৻૱௹฿៛₠-⃀﷼﹩＄￠￡￥￦"  # besides $, which is also a mark of LaTeX
NUMBER = re.compile(
    r"""
    \^ \{? [MINUS]? [\d.]+                                  # an exponent: passed over
  | (?: (?<! [^\W_] ) (?<! [MINUS)\]}%°] )               # a minus, with nothing to subtract from: no letter,
        (?<! \d [$CURRENCY] ) (?<! \d \\ \$ )                # digit, bracket, minus, no 5%, 5°, 5€, 5\$,
        (?<! \d \s [CURRENCY] )                            # no 5 € (but 5 $-3$ is two numbers)
        (?P<minus> [MINUS] )
        (?: [A-Z]{0,3} \\? \$ | [A-Z]{0,3} [CURRENCY] \ ? | \\ [cdt]? frac \ ? \{ \ ? )? )?
    (?P<digits> \d{1,3} (?: (?: [,，'’_\u00a0\u2009\u202f] | \{,\} | \\[,\ ] | ,\\! ) \d{3} )+ (?! \d )
              | (?<! \d \s ) (?! 0 ) \d{1,3} (?: \  \d{3} )+ (?! \d | \  \d )   # 1,234,567 and 1 234 567
              | \d+
              | (?<! [\w.] ) (?= \. \d ) )                   # .5
    (?P<rest> (?: \. \d+ )? (?: [eE] [+-]? \d{1,3} (?! \w ) )? )
    """.replace("MINUS", MINUS).replace("CURRENCY", CURRENCY),
    re.VERBOSE,
)
FRACTION_START = re.compile(r"(?<![^\W_])(?<![/^.,])(?<!\d[-+*×·:])")  # no m2/3, no 1/2/3, no 5-2/3
FRACTION_END = re.compile(r"(?![^\W_])(?![/^])")
FRACTION_DIGITS = 40  # longer ones are no fractions: their value would take long to work out
MIXED = re.compile(r" | ?\\[cdt]?frac ?\{ ?")  # between the 2 and the 1 of `2 1/3`


def plain_numbers(text: str) -> Iterator[re.Match]:
    """The matches of NUMBER that are a number, and no exponent."""
    return (match for match in NUMBER.finditer(text) if match["digits"] is not None)


def last_number(text: str) -> Decimal | Fraction | None:
    """The last number of a text by the table above, None if it has none."""
    matches = list(deque(plain_numbers(text), maxlen=3))
    for count in (3, 2, 1):
        number = read_number(text, matches[-count:], count)
        if number is not None:
            return number
    return None


def first_number(text: str) -> Decimal | Fraction | None:
    """The first number of a text by the table above, None if it has none."""
    matches = list(islice(plain_numbers(text), 3))
    for count in (3, 2, 1):
        number = read_number(text, matches[:count], count)
        if number is not None:
            return number
    return None


def read_number(text: str, matches: list[re.Match], count: int) -> Decimal | Fraction | None:
    """The number that `count` neighbours are together: three a mixed one, two a fraction, else None."""
    if len(matches) < count:
        return None
    if count == 3:
        return read_mixed(text, *matches)
    if count == 2:
        return read_fraction(text, *matches)
    return value(matches[0])


def read_mixed(text: str, whole: re.Match, top: re.Match, bottom: re.Match) -> Fraction | None:
    r"""The value of `2 1/3` or `2\frac{1}{3}`."""
    fraction = read_fraction(text, top, bottom)
    gap = text[whole.end() : top.start()]
    if fraction is None or not 0 < fraction < 1 or not MIXED.fullmatch(gap):
        return None
    if whole["rest"] or not FRACTION_START.match(text, whole.start()):
        return None
    sign = -1 if whole["minus"] else 1
    return Fraction(value(whole)) + sign * fraction


def read_fraction(text: str, top: re.Match, bottom: re.Match) -> Fraction | None:
    r"""The value of `8/3` or `\frac{8}{3}`. None: the two numbers are no fraction, or more hangs on it."""
    between = text[top.end() : bottom.start()]
    if between in ("/", "⁄", "∕"):
        alone = FRACTION_START.match(text, top.start()) and FRACTION_END.match(text, bottom.end())
    else:
        before = text[max(0, top.start() - 8) : top.start("digits")].replace(" ", "")
        after = text[bottom.end() : bottom.end() + 2].lstrip()
        alone = between.replace(" ", "") == "}{" and "frac{" in before and after.startswith("}")
    if not alone or len(top[0]) + len(bottom[0]) > FRACTION_DIGITS or value(bottom) == 0:
        return None
    return Fraction(value(top)) / Fraction(value(bottom))


def value(match: re.Match) -> Decimal:
    """The number of one match of NUMBER."""
    sign = "-" if match["minus"] else ""
    digits = re.sub(r"\D", "", match["digits"]) or "0"
    return Decimal(sign + digits + match["rest"])


def same_number(a: Decimal | Fraction | None, b: Decimal | Fraction | None) -> bool:
    """Are both the same number, exactly? Two answers without a number (None) are not."""
    if a is None or b is None:
        return False
    if isinstance(a, Decimal) and isinstance(b, Decimal):
        return a == b
    return Fraction(a) == Fraction(b)


ANSWER_MARK = re.compile(r"\\boxed\s*\{|####|\banswer\s+is\b", re.IGNORECASE)
END_OF_MARKED = re.compile(r"[.!?](?=\s|$)|\n")


def marked_number(text: str) -> Decimal | Fraction | None:
    r"""The number that a response marks as its answer by `\boxed{...}`, `####` or "the answer is", else None.

    It is for the report, which counts where it is not the last number. The judge reads the last number, as
    the paper does. The last mark with a number counts, and of it the first number, after an equals sign if
    there is one.
    """
    for mark in reversed(list(ANSWER_MARK.finditer(text))):
        rest = text[mark.end() :]
        if mark[0].endswith("{"):
            marked = rest[: closing_brace(rest)]
        else:
            marked = END_OF_MARKED.split(rest.lstrip(" :*\n"), maxsplit=1)[0]
        number = first_number(marked.rpartition("=")[2])
        if number is not None:
            return number
    return None


def closing_brace(text: str) -> int:
    """Where the brace closes that was open before the text. Its length, where none does."""
    depth = 1
    for i, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return i
    return len(text)


def mark_differs(text: str) -> bool:
    """Does a response mark a number as its answer and end in another?"""
    marked = marked_number(text)
    return marked is not None and not same_number(marked, last_number(text))
