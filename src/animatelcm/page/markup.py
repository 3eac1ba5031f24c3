"""HTML from Python: whatever is no markup is escaped."""

from __future__ import annotations

import html

VOID = frozenset({"br", "img", "input", "link", "meta"})
Part = "str | None | list[Part]"


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, /, *inside: Part, **attributes: str | int | bool | None) -> Markup:
    """An element. Inside: text, markup, lists of them, or None for nothing.

    Attributes: ``class_`` is class, ``data_column`` data-column; True stands alone, None and False are left out.
    """
    opening = name + "".join(_attribute(key, value) for key, value in attributes.items())
    return Markup(f"<{opening}>" if name in VOID else f"<{opening}>{joined(inside)}</{name}>")


def joined(parts: Part | tuple[Part, ...]) -> Markup:
    """Parts one after the other, with what is text escaped."""
    if parts is None:
        return Markup()
    if isinstance(parts, str):
        return parts if isinstance(parts, Markup) else escaped(parts)
    return Markup("".join(joined(part) for part in parts))


def escaped(text: str) -> Markup:
    """Text that reads as it is, in an element or between quotes. A carriage return would come back as a line feed."""
    return Markup(html.escape(text, quote=True).replace("\r", "&#13;"))


def _attribute(key: str, value: str | int | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escaped(str(value))}"'
