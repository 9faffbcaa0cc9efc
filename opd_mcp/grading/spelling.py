"""Spellings of one answer brought to one: wrappers taken off, LaTeX without its variants."""

import re

_WRAPPERS = (
    ("$$", "$$"),
    ("$", "$"),
    ("\\(", "\\)"),
    ("\\[", "\\]"),
    ("**", "**"),
    ("`", "`"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
    ("‘", "’"),
    ("\\text{", "}"),
    ("\\textbf{", "}"),
    ("\\mathrm{", "}"),
    ("\\mathbf{", "}"),
    ("\\mbox{", "}"),
    ("\\boxed{", "}"),
)
# More layers than anybody writes; keeps the work linear in the text.
_MOST_WRAPPERS = 12
_SPACES = re.compile(r"\\[!,;: ]|\\q?quad\b|~|\s+")
_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\.?")
_FRACTIONS = re.compile(r"\\[dtc]frac(?![a-z])")
_SHORT_FRACTION = re.compile(r"\\frac(?:\{([^{}]*)\}|(\w))(?:\{([^{}]*)\}|(\w))")
_SHORT_ROOT = re.compile(r"\\sqrt(\w)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\{([^{}]*)\}")
_UNIT = re.compile(r"(?<=[\d})])\s*\\(?:text|mathrm|mbox)\{[^{}\d]*\}(?:\^\{?\d\}?)?$")
_DEGREES = re.compile(r"\^\{?\\circ\}?|°")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BRACED_COMMA = re.compile(r"\{,\}")
_NAME = re.compile(r"^[a-zA-Z]{1,2}(?:\(\w\))?(?:=|\\in(?![a-z]))")
_WORDS = re.compile(r"[A-Za-z][A-Za-z .,'-]+")
_ONE_SIDED = {"(": ")", "[": "]", "{": "}"}


def unwrapped(answer: str) -> str:
    r"""The answer without dollar signs, quotes, bold, `\text{}` or `\boxed{}` around it, and without its full stop."""
    for _ in range(_MOST_WRAPPERS):
        before = answer
        answer = answer.strip()
        if answer.endswith(".") and not answer.endswith(".."):
            answer = answer[:-1]
        for start, end in _WRAPPERS:
            inner = answer[len(start) : len(answer) - len(end)]
            if len(answer) > len(start) + len(end) and answer.startswith(start) and answer.endswith(end):
                if (start == "$" and "$" in inner) or (end == "}" and not _balanced(inner)):
                    continue
                answer = inner
                break
        if answer == before:
            break
    return answer


def _balanced(text: str) -> bool:
    """Whether every brace closes one that was opened in the text."""
    depth = 0
    for character in re.sub(r"\\.", "", text):
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return False
    return depth == 0


def without_brackets(answer: str) -> str:
    """`(7)`, `[7]` and `{7}` as `7`; pairs, intervals and sets as they are."""
    end = _ONE_SIDED.get(answer[:1])
    inner = answer[1:-1]
    if end and answer.endswith(end) and inner.strip() and not re.search(r"[,;(){}\[\]]", inner):
        return inner.strip()
    return answer


def text_key(answer: str) -> str:
    """What the `exact` grader compares: case, spacing, quotes and the last full stop do not count."""
    return " ".join(unwrapped(answer).casefold().split())


def latex_key(answer: str) -> str:
    r"""One spelling of a LaTeX answer: no spacing or sizes, `\frac12` in full, no units, `x=` and thousands' commas.

    Words are compared without case, symbols with it. After Hendrycks et al. 2021, `math_equivalence`.
    """
    text = unwrapped(answer)
    if _WORDS.fullmatch(text):
        return "".join(text.casefold().split())
    text = _UNIT.sub("", _SIZES.sub("", text))
    text = _SPACES.sub("", _TEXT.sub(r"\1", text))
    text = _THOUSANDS.sub("", _BRACED_COMMA.sub(",", _DEGREES.sub("", text)))
    text = text.replace("\\$", "").replace("$", "").replace("\\%", "").replace("%", "").replace("−", "-")
    text = text.replace("\\varnothing", "\\emptyset").replace("\\cdot", "*").replace("\\times", "*")
    text = _FRACTIONS.sub(r"\\frac", text)
    text = _SHORT_FRACTION.sub(lambda m: f"\\frac{{{m[1] or m[2] or ''}}}{{{m[3] or m[4] or ''}}}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    return without_brackets(_NAME.sub("", text, count=1))
