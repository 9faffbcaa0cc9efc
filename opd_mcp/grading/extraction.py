"""Where a response says its answer: after its thinking, in a box, behind a mark or a phrase; linear in its length."""

import re

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
