"""What counts as a number, row by row of the table in support/numerals.py."""

import time
from decimal import Decimal
from fractions import Fraction

import pytest

from judges import numeric
from support.numerals import last_number, mark_differs, marked_number, same_number

NUMBERS = [
    ("18", "18 +18 18. 18! 18? **18** *18* _18_ `18` (18) 18; 018 018.0 18.00"),
    ("1234",
        "1,234 1,234. 1{,}234 1\\,234 1'234 1’234 1_234 1，234 1\u202f234 1\u00a0234 1\u20091\u2009234 1,234.00"),
    ("1234567.5", "1,234,567.5 1234567.50 1{,}234{,}567.5 1,\\!234,\\!567.5"),
    ("1450", r"1,\!450 \boxed{1,\!450} $1,\!450$"),
    ("20",
        "10%-20% 20€-20€ 20£-20£ $20$-$20$ $20$-20 20$-20$ 20\\$-\\$20 5°-20° 5¥-20 5₹–20 5%−$20 5\u00a0€-20\u00a0€"),
    ("-20", "€-20 £-20 $-20 \\$-20 x$-20 **-20%** (-20°)"),
    ("10", r"10^6 10^{6} 1.2x10^3 1.2×10^{-3} 10⁶ $10^6$"), ("2", "2^5 2^{10} 2⁵ 2^-1"),
    ("23", "1,23"), ("4", "3,4"), ("2345", "1,2345"), ("67", "12,345,67"), ("567", "1234,567"),
    ("0.5", ".5 0.5 $.50 +.5 0.50."), ("5", "...5"), ("3", "1.2.3"),
    ("18", "$18 £18 €18 ¥18 ₹18 US$18 USD18 Rs18 18€ 18% 18kg 18km/h 18th 18-year-old #18 18°"),
    ("18", r"\boxed{18} $\boxed{18}$. \$18 \(18\) \[18\] $18$ \text{is}18 18\% ####18 <<9+9=18>>18 \times18"),
    (None, "m^2 m^{2} m^{-2} cm² ½ ² ٪ eighteen ∞ nan inf - . , $ ① Ⅷ 十"),
    ("18", "18m^2 18cm² 18m^{2}"),
    ("-18", "-18 −18 –18 －18 -$18 −£18 -\\$18 (-18) $-18 **-18** =-18 :-18 -18.0 \\boxed{-18} -18%"),
    ("18", "5-18 day-18 10−18 1–18 --18 5)-18"), ("-18", ")\u00a0-18"),
    ("-0.5", "-.5 −0.5 -$.50"), ("-1234.5", "-1,234.5 -$1,234.50"),
    ("18", "1.8e1 1.8E+1 180e-1"), ("1000", "1E3 1e3"), ("4444", "1e4444"),
    ("4", "2x4 3:4"), ("9", "7-9"), ("2", "m2 H2"),
    ("-18", "‐18 ‑18 ‒18 –18 ﹣18 -₩18 ‑₽18 -US$18 -R$18 -₱18 \\boxed{‑18}"),
    ("18", "—18 20₩-18₩ 20₽‑18₽ 1‐18"),
    ("0.75", "3/4 3/4. **3/4** (3/4) $3/4$ x=3/4 \\frac{3}{4} \\boxed{3/4} $\\dfrac{3}{4}$. 3⁄4 6/8 1.5/2"),
    ("-0.75", "-3/4 −3/4 -\\frac{3}{4} \\frac{-3}{4} \\boxed{-\\frac{3}{4}}"), ("2.5", "2\\frac{1}{2}"),
    ("8", "16/2 1,000/125"),
    ("2020", "3/4/2020 2020-3/4/2020"), ("3", "5-8/3 m2/3 8/3kg 2*8/3 2^8/3 http://x.com/8/3 8/3/"),
    ("0", "8/0 0/3"),
    ("18", "60km/18 km/h18 18km/h"),
    ("3", "３ 三３"), ("18", "१८ ١٨ 𝟏𝟖"), ("-18", "−१८"),
]  # (value, texts with that value, separated by blanks)


def equal(found, value) -> bool:
    """Is it the number `value` (an int, a text, a Decimal or a Fraction), or None where that is None?"""
    if value is None:
        return found is None
    return same_number(found, Decimal(value) if type(value) in (int, str) else value)


@pytest.mark.parametrize("value, text",
    [(value, text) for value, texts in NUMBERS for text in texts.split(" ")])
def test_what_counts_as_a_number(value, text):
    total = f"The total is 7, and so the answer is {text} ."
    assert equal(last_number(text), value)
    assert equal(last_number(total), 7 if value is None else value)


@pytest.mark.parametrize("text, value", [
    ("", None), ("no number here", None), ("- 18", 18), ("10 - 18", 18), ("18 %", 18), ("18 m^2", 18),
    ("18 km/h.", 18),
    ("The answer is $1,200.00 per month.", 1200), ("She has 3 + 4 = 7 apples.", 7),
    ("It takes 3, 4 or 5 days.", 5),
    ("Tom has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\n#### 9", 9), ("#### 1,450", 1450), ("#### -3", -3),
    ("**Answer:** \\(\\boxed{1{,}450}\\)\n", 1450), ("18\x00", 18), ("18\ud800", 18), ("\ufeff18\r\n", 18),
    ("118 000", 118000), ("It costs $118 000.50 in all", Decimal("118000.5")), ("1 200 300", 1200300),
    ("in 2 000", 2000),
    ("3 4", 4), ("5 12 100", 100), ("12 100 5", 5), ("0 500", 500), ("555 123 4567", 4567),
    ("In 2019 200 came", 200),
    ("118\n000", 0), ("118  000", 0), ("12 1000", 1000), ("118\\ 000", 118000), ("-118 000", -118000),
    ("-€ 18", -18), ("20 €-18 €", 18), ("2 2/3 cups", Fraction(8, 3)), ("-2 1/2", Decimal("-2.5")),
    ("7 8/3", Fraction(8, 3)),
    ("The answer is 8/3.", Fraction(8, 3)), ("\\frac{8}{3}", Fraction(8, 3)),
    ("\\frac { 8 } { 3 }", Fraction(8, 3)), ("-\\frac {1} {2}", Decimal("-0.5")), ("{8}{3}", 3),
    ("\\frac{8}{3", 3), ("1,000/3", Fraction(1000, 3)),
    ("open 24/7", Fraction(24, 7)), ("on 3/4/2020.", 2020), ("8 / 3", 3), ("60 km/h", 60),
    ("1/2 1/3", Fraction(1, 3)),
    ("9" * 5000 + "/3", 3),
    ("From 10%-20% of it", 20), ("20€-30€", 30), ("$20$-$30$", 30), ("5°-18°", 18), ("5 $-3$", -3),
    ("1.2 x 10^3", 10),
    ("9" * 5000, Decimal("9" * 5000)), ("-" + "9" * 5000 + ".5", Decimal("-" + "9" * 5000 + ".5")),
])
def test_last_number_of_a_text(text, value):
    assert equal(last_number(text), value)


def test_numbers_are_compared_by_exact_value():
    assert numeric("So the answer is 18.00.", "... #### 18")
    assert not numeric("18.0000000000000000000000000000000001", "#### 18")
    assert numeric("9" * 5000, "9" * 5000 + ".0") and not numeric("9" * 5000, "9" * 4999 + "8")
    assert not numeric("-18", "18") and not numeric("34", "3 4")
    assert numeric("The answer is 8/3.", "2 2/3") and numeric("3/4", "0.75") and numeric("16/2", "8")
    assert not numeric("The answer is 8/3.", "3") and not numeric("1/3",
        "0.3333333333333333333333333333333333")


@pytest.mark.parametrize("response, gold", [("", ""), ("none", "none"), ("no", "18"), ("18", "no"),
("nan", "nan")])
def test_two_answers_without_a_number_are_not_equal(response, gold):
    assert numeric(response, gold) is False


@pytest.mark.parametrize("text, marked, differs", [
    ("so it is \\boxed{7} dozens of eggs in 4 weeks.", 7, True),
    ("The answer is 18 dollars for 3 days.", 18, True),
    ("The answer is 18 - 4 = 14, in 5 days.", 14, True), ("#### 18", 18, False),
    ("#### 1 118 000\nDone in 3 steps.", 1118000, True),
    ("\\boxed{\\frac{8}{3}}", Fraction(8, 3), False), ("\\boxed{x = 8/3} of 3", Fraction(8, 3), True),
    ("The Answer is:\n\n**18** (see 2)", 18, True), ("The answer is 7. No: the answer is 8.", 8, False),
    ("\\boxed{7}. So the answer is above, see 3", 3, False),
    ("\\boxed{7} Hence the answer is clear. 3", 7, True),
    ("Eggs: 18", None, False), ("the answer is yes. 3", None, False), ("", None, False),
    ("\\boxed{", None, False),
    ("\\boxed{0.75} or 3/4", Decimal("0.75"), False),
])
def test_the_marked_answer_beside_the_last_number(text, marked, differs):
    assert equal(marked_number(text), marked)
    assert mark_differs(text) is differs


@pytest.mark.parametrize("flood", ["9", "1 111 ", "111 ", "1/", "1/2 ", "\\frac{1}{", "\\boxed{", "1,111",
    "1,", "-", "^", "1.", ".", " ", "1e", "-$", "^{", "1\\,", "_",
                                   "1,\\!111", "5$-"])
def test_a_flood_is_read_in_linear_time(flood):
    last_number(flood * 10)
    marked_number(flood * 10)
    times = []
    for n in (10_000, 40_000):
        start = time.process_time()
        last_number(flood * n)
        times.append(time.process_time() - start)
    assert times[1] < 0.05 + 10 * times[0]  # 4 times as long would do; 16 times is quadratic
