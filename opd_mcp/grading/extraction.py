"""Where a response says its answer: after its thinking, in a box, behind a mark or a phrase; linear in its length."""

import re

from opd_mcp.grading.grade import Grade
from opd_mcp.schemas.errors import ArgumentError

# A brace that a box opened, any other brace, and what a backslash hides.
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+(\w+)|\\.|[{}]", re.DOTALL)
_STATED = re.compile(
    r"\b(?:answer|result|solution|option|choice)\b[^\n.:=]{0,60}?(?:\bis\b|\bequals\b|[:=])[\s:*_]*|<answer>\s*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?;](?=\s|$)|\*\*|</answer>")
_FENCE = re.compile(r"^```[ \t]*(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def after_thinking(response: str) -> str:
    """What follows the last `</think>`; nothing where a thinking block that opens the response never ends."""
    _, closed, rest = response.rpartition("</think>")
    if not closed and response.lstrip().startswith("<think>"):
        return ""
    return rest


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete `\boxed{…}` (or `\fbox`, or `\boxed 5`), the innermost where they nest."""
    opened: list[int | None] = []
    best, content = -1, None
    for match in _BRACES.finditer(text):
        token = match.group()
        if match.group(1) is not None:
            best, content = match.start(), match.group(1)
        elif token == "}":
            start = opened.pop() if opened else None
            if start is not None and start > best:
                best, content = start, text[start : match.start()]
        elif token.endswith("{") and token != "\\{":
            opened.append(match.end() if len(token) > 1 else None)
    return content if content is None else content.strip()


def stated_answers(text: str) -> list[str]:
    """What follows the last "the answer is", "Answer:" or `<answer>`: the rest of its line, then only its sentence."""
    match = None
    for match in _STATED.finditer(text):  # noqa: B007 (the last one is wanted)
        pass
    if match is None:
        return []
    line = text[match.end() :].split("\n", 1)[0].strip()
    sentence = _SENTENCE_END.split(line, maxsplit=1)[0].strip()
    line = line.removesuffix("</answer>").strip()
    return [stated for stated in dict.fromkeys((line, sentence)) if stated]


def last_marked(text: str) -> str | None:
    """The rest of the line after the last `####`, GSM8K's mark."""
    _, mark, rest = text.rpartition("####")
    line = rest.strip().split("\n", 1)[0].strip()
    return line if mark and line else None


def last_code(text: str) -> str | None:
    """The last fenced block that names Python or no language."""
    blocks = [body for language, body in _FENCE.findall(text) if language.lower() in ("", "py", "python", "python3")]
    return blocks[-1] if blocks else None


def compiled_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """The pattern, checked: valid, with at most one group. Raises ArgumentError `invalid_argument`."""
    if pattern is None:
        return None
    fix = "Set 'benchmark.answer_pattern' to a valid regular expression with one group, e.g. '#(\\d+)'."
    try:
        compiled = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ArgumentError(
            "invalid_argument", f"The answer pattern is invalid: {error}.", value=pattern, fix=fix
        ) from error
    if compiled.groups > 1:
        raise ArgumentError("invalid_argument", "The answer pattern has several groups.", value=pattern, fix=fix)
    return compiled


def extracted_answer(response: str, pattern: re.Pattern[str] | None) -> str | None:
    """The last match's group (or whole match), stripped; the whole response without a pattern; None without a match."""
    if pattern is None:
        return response.strip()
    matches = list(pattern.finditer(response))
    # A group that took no part in its match is no answer.
    return found.strip() if matches and (found := matches[-1].group(pattern.groups)) is not None else None


def by_pattern(response: str, gold: str, pattern: re.Pattern[str] | None) -> Grade:
    """Whether the response's answer equals the expected one."""
    answer = extracted_answer(response, pattern)
    return Grade(answer == gold.strip(), answer)
