"""Numbers as people write them: signs, thousands, decimals, fractions, powers of ten, percent, currency and units."""

import re
from dataclasses import dataclass
from fractions import Fraction

from opd_mcp.grading.spelling import unwrapped, without_brackets

# Longer digit strings are no answers, and arithmetic on them takes time.
LONGEST = 400
LARGEST_EXPONENT = 400
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_POWER = r"(?:\s*(?:\*|×|\\times|\\cdot)\s*10\s*\^\s*\{?\s*(?P<ten>[+-]?\d{1,4})\s*\}?|[eE](?P<e>[+-]?\d{1,4}))"
_FRACTION = r"\\frac\s*(?:\{\s*(?P<up>-?[\d,]+)\s*\}|(?P<up1>\d))\s*(?:\{\s*(?P<down>[\d,]+)\s*\}|(?P<down1>\d))"
_SLASHED = r"\s*/\s*(?P<below>[\d,]+(?:\.\d+)?)"
_NUMBER = rf"(?:(?P<whole>{_DIGITS})(?:{_POWER}|{_SLASHED}|\s*{_FRACTION}|\s+(?P<n>\d+)/(?P<d>\d+))?|{{FRACTION}})"
_NUMBER = _NUMBER.replace("{FRACTION}", re.sub(r"\?P<(\w+)>", r"?P<alone_\1>", _FRACTION))
# Spaces are counted: an open-ended run of them would be tried again from each of its places.
_SIGN = r"(?:(?P<sign>[+-])\s{0,3})?(?:\\?[$€£¥]\s{0,3}(?P<late>-)?)?"
_PERCENT = r"(?P<percent>\s*\\?%|\s*percent\b)?"
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = rf"(?:\s*(?P<scale>{'|'.join(_SCALES)})\b)?"
_UNIT = (
    r"(?:\^\{?\\circ\}?|°[CF]?|\s*\\(?:text|mathrm|mbox)\s*\{[^{}\d]*\}(?:\^\{?\d\}?)?|"
    r"\s*(?P<unit>[A-Za-z][A-Za-z.'\s/-]+)(?:\^\{?\d\}?)?)?"
)
_PLAIN = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_WHOLE = re.compile(rf"{_SIGN}{_NUMBER}{_SCALE}{_PERCENT}{_UNIT}")
_INSIDE = re.compile(rf"(?<![\w.)\]}}{{\\^])(?<!\{{-)(?:{_SIGN}){_NUMBER}{_SCALE}{_PERCENT}(?!\d)")
# After a number these make it a part of something else: 2x, 2\pi, 2^3, 3(4), 5/x.
_GOES_ON = re.compile(
    r"[\^*/(_√π]|[A-Za-z](?![A-Za-z])|(?:pi|sqrt|sin|cos|tan|log|ln|exp)\b|"
    r"\\(?![\s,;:!.)\]$%]|text|mathrm|mbox)"
)
_NO_UNIT = re.compile(
    r"\b(?:or|and|to|of|in|by|mod|over|plus|minus|times|pi|sqrt|sin|cos|tan|log|ln|exp|half|quarter|third|if|not|for)\b",
    re.IGNORECASE,
)
_DASHES = str.maketrans({"−": "-", "–": "-", "—": "-", "\u00a0": " ", "\u202f": " "})
_BOLD = re.compile(r"(?<!\w)\*\*|\*\*(?!\w)")
_SPACED = re.compile(r"\\[!,;:]|\\ |(?<=\d)\{,\}(?=\d)")
_NAME = re.compile(r"^[A-Za-z]\w{0,3}\s*(?:=|≈|\\approx)\s*")


@dataclass(frozen=True)
class Number:
    """An exact value; `percent` where it was written with a percent sign, `digits` the decimals it was given to."""

    value: Fraction
    percent: bool = False
    digits: int | None = None


def _tidied(text: str) -> str:
    text = _SPACED.sub(lambda m: "," if m.group() == "{,}" else "", _BOLD.sub(" ", text.translate(_DASHES)))
    return text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\left", "").replace("\\right", "")


def parsed_number(text: str) -> Number | None:
    """The number that the whole text is, with a name before it (`x = 5`) or a unit behind it; None where it is none."""
    if len(text) > LONGEST:
        return None
    if _PLAIN.fullmatch(text):  # most answers, at a tenth of the time
        return Number(Fraction(text), digits=len(text.partition(".")[2]) or None)
    text = without_brackets(unwrapped(_tidied(_NAME.sub("", unwrapped(text)))))
    match = _WHOLE.fullmatch(text)
    if match is None or ((unit := match["unit"]) and (len(unit.strip()) < 2 or _NO_UNIT.search(unit))):
        return None
    return _number(match)


def numbers_in(text: str) -> list[tuple[str, Number]]:
    """Every number that stands for itself in a text, as written and as a value; not the 2 of `2x` or of `x^2`."""
    text = _tidied(text)
    return [
        (match.group().strip(), number)
        for match in _INSIDE.finditer(text)
        if len(match.group()) <= LONGEST
        and not _GOES_ON.match(text, match.end())
        and (number := _number(match)) is not None
    ]


def _number(match: re.Match[str]) -> Number | None:
    parts = match.groupdict()
    whole = (parts["whole"] or "").replace(",", "")
    up = parts["up"] or parts["up1"] or parts["n"]
    down = parts["down"] or parts["down1"] or parts["d"]
    alone = parts["alone_up"] or parts["alone_up1"]
    power = int(parts["ten"] or parts["e"] or 0)
    below = Fraction((parts["below"] or "1").replace(",", "").rstrip(".") or "0")
    if abs(power) > LARGEST_EXPONENT or not below:
        return None
    value = Fraction(whole or "0") * Fraction(10) ** power / below
    for above, under in ((up, down), (alone, parts["alone_down"] or parts["alone_down1"])):
        if above is not None and under is not None:
            if not int(under.replace(",", "")):
                return None
            value += Fraction(int(above.replace(",", "")), int(under.replace(",", "")))
    value *= _SCALES.get((parts["scale"] or "").lower(), 1)
    if "-" in ((parts["sign"] or ""), (parts["late"] or "")):
        value = -value
    decimals = len(whole.partition(".")[2]) if not (power or up or alone or parts["below"] or parts["scale"]) else 0
    return Number(value, parts["percent"] is not None, decimals or None)


def same_number(first: Number, second: Number) -> bool:
    """Equal exactly; or one is the other rounded to at least six significant decimals; percent may be written out."""
    values = [(first.value, second.value)]
    if first.percent != second.percent:
        values.append((first.value / 100, second.value) if first.percent else (first.value, second.value / 100))
    return any(a == b or _rounds_to(b, a, first.digits) or _rounds_to(a, b, second.digits) for a, b in values)


def _rounds_to(value: Fraction, rounded: Fraction, digits: int | None) -> bool:
    """Whether `rounded`, written with `digits` decimals, is the value to six significant digits or more."""
    if digits is None or abs(rounded) * 10**digits < 100_000:
        return False
    return abs(value - rounded) * 2 * 10**digits <= 1
