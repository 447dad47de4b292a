"""Find numbers in plain text and LaTeX (decimal, scientific, powers, fractions, mixed) and compute their values.

A notation is read as a whole or not at all: ``3/4``, ``\\frac{3}{4}``, ``7^6`` and ``6.02 x 10^23`` are one number,
and ``5\\sqrt{3}``, ``12:30`` and ``2024-01-02`` contain none, so that no part of them is taken for the answer.
"""

import re
from fractions import Fraction

MAX_DIGITS = 1000
"""Numbers with more digits are compared as text."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_EXPONENT = (
    r"\s?(?:\^|\*\*)\s?"
    r"(?:\{{\s*(?P<{0}_braced>-?[0-9]+)\s*\}}|\((?P<{0}_round>-?[0-9]+)\)|(?P<{0}_bare>-?[0-9]+))"
)
_LATEX_FRACTION = (
    r"\\[dt]?frac\s*(?:\{\s*(?P<top>-?[0-9.,]+)\s*\}\s*\{\s*(?P<bottom>-?[0-9.,]+)\s*\}"
    r"|(?P<top1>[0-9])\s*(?P<bottom1>[0-9]))"
)
# a minus sign after a digit or letter is a subtraction: 7-3 contains 7 and 3
_SIGN = r"(?:(?<!\w)[-+]\s?)?"
_NUMBER = rf"""
    (?P<sign>{_SIGN})
    (?:
        (?:(?P<whole>[0-9]+)\s{{0,3}})?{_LATEX_FRACTION}  # \frac{{3}}{{4}}, 1\frac{{3}}{{4}}
      | (?<!\w)(?<![0-9]\.)(?P<mixed>[0-9]+)\ (?P<mixed_top>[0-9]+)/(?P<mixed_bottom>[0-9]+)              # 1 3/4
      | (?:(?<!\w)(?<![0-9]\.)|(?=\.))(?P<decimal>{_DECIMAL})
        (?:[eE](?P<e>[-+]?[0-9]+)(?!\w))?                                   # 1e-5
        (?:\s?(?:x|×|\*|·|\\times|\\cdot)\s?10{_EXPONENT.format("ten")})?      # 6.02 x 10^23
        (?:{_EXPONENT.format("power")})?                                      # 7^6
        (?:\s?/\s?(?P<denominator>{_DECIMAL})(?!\w))?                       # 3/4
    )
"""
_IRRATIONAL = (
    r"(?:(?<![0-9.])[0-9.]{1,99}\s{0,3})?(?:\\sqrt|√|(?<!\w)sqrt|\\pi(?![a-z])|π)"
    r"(?:\s*(?:\[[^\]]{0,9}\]|\{[^{}]{0,99}\}|\([^()]{0,99}\)|[0-9.]+))*"
)
# dates, times, ratios, versions, towers of powers, chains of divisions
_NO_NUMBER = r"""
    (?<![\w.])(?:[0-9]{1,9}(?::[0-9]{1,9})+ | [0-9]{4}-[0-9]{2}-[0-9]{2}(?![0-9]) | [0-9]{1,9}(?:/[0-9]{1,9}){2,} |
        [0-9]{1,9}(?:\^[0-9]{1,9}){2,} | [0-9]{1,9}(?:\.[0-9]{1,9}){2,})
"""
# the exponent of a unit or a variable, as in m^2
_EXPONENT_OF_A_WORD = r"(?<=[A-Za-z)}\]])(?:\^|\*\*)\s?(?:\{[^{}]{0,99}\}|[-+]?[\w.]+)"
_TOKEN = re.compile(
    rf"(?P<none>{_NO_NUMBER} | {_IRRATIONAL}) | (?P<number>{_NUMBER}) (?:\s?(?P<irrational>{_IRRATIONAL}))? "
    rf"| {_EXPONENT_OF_A_WORD}",
    re.VERBOSE,
)
_REMARK = re.compile(r"(?<=[0-9])\s+\([A-Za-z][^()]*\)")
_SUPERSCRIPTS = re.compile(r"(?<=[0-9)}])[⁰¹²³⁴-⁹⁻]+")
_PLAIN = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_WRAPPER = re.compile(
    r"\\boxed\{(.*)\}|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]|\\text(?:bf)?\{(.*)\}|\((-?[0-9.,]+)\)", re.DOTALL
)
_FRILLS = re.compile(r"^(-?)\\?[$€£]\s?|(?:\s?\\?[%°]){1,9}$")


def last_number(text: str) -> str | None:
    """The last number in a text, in its full notation without thousands separators.

    ``"so 1,234.50 in all."`` gives ``"1234.50"``, ``"= 3/4"`` gives ``"3/4"``. Exponents of units (``5 m^2``) and
    remarks in parentheses after a number (``42 (since 6*7)``) are ignored.
    """
    last = None
    for match in _TOKEN.finditer(_REMARK.sub("", _normal(text))):
        if match["number"] or match["none"]:
            last = match
    return None if last is None else re.sub(r"(?<=[0-9]),(?=[0-9]{3})", "", last.group().strip())


def number_value(text: str) -> Fraction | None:
    """The value of a text that consists of one number; None for any other text.

    A currency, percent or degree sign, and LaTeX's ``$…$`` and ``\\boxed{…}`` around it are ignored.
    """
    if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS:
        return Fraction(int(text))  # the most frequent case
    text = _normal(text).strip()
    while wrapper := _WRAPPER.fullmatch(text):
        text = next(group for group in wrapper.groups() if group is not None).strip()
    match = _TOKEN.fullmatch(_FRILLS.sub(r"\1", text).strip().removesuffix("."))
    if match is None or not match["number"] or match["irrational"] or len(text) > 2 * MAX_DIGITS:
        return None
    try:
        return _value(match)
    except (ZeroDivisionError, OverflowError, ValueError):
        return None


def _normal(text: str) -> str:
    text = text.replace("−", "-").replace("\\!", "").replace("\\,", "").replace("\\left", "").replace("\\right", "")
    return _SUPERSCRIPTS.sub(lambda match: "^" + match.group().translate(_PLAIN), text)


def _value(match: re.Match[str]) -> Fraction:
    number = lambda name: Fraction(match[name].replace(",", ""))
    sign = -1 if "-" in match["sign"] else 1
    if match["mixed"]:
        return sign * (number("mixed") + number("mixed_top") / number("mixed_bottom"))
    if match["decimal"] is None:
        suffix = "" if match["top"] else "1"
        return sign * (Fraction(match["whole"] or 0) + number("top" + suffix) / number("bottom" + suffix))
    value = number("decimal")
    value *= _power(Fraction(10), int(match["e"] or 0)) * _power(Fraction(10), _exponent(match, "ten") or 0)
    if (exponent := _exponent(match, "power")) is not None:
        value = _power(value, exponent)
    return sign * value / (number("denominator") if match["denominator"] else 1)


def _exponent(match: re.Match[str], name: str) -> int | None:
    found = match[f"{name}_braced"] or match[f"{name}_round"] or match[f"{name}_bare"]
    return None if found is None else int(found)


def _power(base: Fraction, exponent: int) -> Fraction:
    digits = max(len(str(base.numerator)), len(str(base.denominator)))
    if abs(exponent) * digits > MAX_DIGITS:
        raise OverflowError
    return base**exponent
