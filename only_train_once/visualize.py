"""The groups of a network as an SVG picture: one card per group, top to bottom in network order.

A card shows the name, the kind and the number of units, a bar as long as the group is wide compared with the widest
one (dark: the share that is removed), and the slices it cuts. A frozen group is grey and says why. The writer makes
plain SVG 1.1 with text as text, needs no library, and escapes everything that comes from names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .groups import ParamSlice, PruningGroup, Role

CARD_WIDTH = 560
PADDING = 14
LINE = 17
GAP = 12
COLUMNS_WHEN_WIDE = 3
SHOWN_SLICES = 6  # without display_params, longer lists end in "and n more"

_ROLE_COLOURS = {
    Role.ZERO: "#1f5fa8",
    Role.FOLLOW: "#5b7f95",
    Role.CONSUMER: "#8a6d1d",
    Role.ATTRIBUTE: "#6b4d8f",
    Role.NORM: "#6b4d8f",
}
_INK, _MUTED, _FROZEN = "#1a2530", "#5f6b76", "#8b929a"


@dataclass(frozen=True)
class _Line:
    """One line of text on a card."""

    text: str
    colour: str = _INK
    size: int = 12
    bold: bool = False


@dataclass(frozen=True)
class _Card:
    """What one rectangle shows.

    Attributes:
        title: the name, in as many lines as it needs.
        subtitle: below it.
        fraction: length of the bar, of the card's inner width.
        gone: dark share of the bar.
        lines: text below the bar.
        grey: whether the card stands back.
    """

    title: tuple[_Line, ...]
    subtitle: _Line
    fraction: float
    gone: float
    lines: tuple[_Line, ...]
    grey: bool

    @property
    def height(self) -> int:
        return 2 * PADDING + LINE * (1 + len(self.title) + len(self.lines)) + 12


def _wrap(text: str, width: int) -> list[str]:
    """Break at spaces, and inside a word that alone is too long, so that nothing runs off a card."""
    lines, current = [], ""
    for word in text.split():
        while len(word) > width:
            room = width - len(current) - 1 if current else width
            if room > 0:
                current = f"{current} {word[:room]}" if current else word[:room]
                word = word[room:]
            lines.append(current)
            current = ""
        if current and len(current) + 1 + len(word) > width:
            lines.append(current)
            current = word
        else:
            current = f"{current} {word}" if current else word
    return [*lines, current] if current else lines or [""]


def _text(line: _Line, x: int, y: int) -> str:
    weight = ' font-weight="bold"' if line.bold else ""
    return f'<text x="{x}" y="{y}" font-size="{line.size}" fill="{line.colour}"{weight}>{_escaped(line.text)}</text>'


def _escaped(text: str) -> str:
    """Text as XML allows it: markup escaped, control characters (which XML forbids) replaced."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), {'"': "&quot;"})


def _slice_lines(group: PruningGroup, everything: bool) -> list[_Line]:
    slices = group.slices
    shown = slices if everything or len(slices) <= SHOWN_SLICES else slices[: SHOWN_SLICES - 1]
    lines = [
        _Line(part, _ROLE_COLOURS[s.role] if group.prunable else _FROZEN, 11)
        for s in shown
        for part in _wrap(f"{s}{', held at zero' if s.pinned else ''}", 84)
    ]
    rest = len(slices) - len(shown)
    return [*lines, _Line(f"and {rest} more", _MUTED, 11)] if rest else lines


def _title(name: str, colour: str) -> tuple[_Line, ...]:
    return tuple(_Line(part, colour, 14, bold=True) for part in _wrap(name, 62))


def _group_card(group: PruningGroup, widest: int, removed: int, everything: bool) -> _Card:
    gone = f", {removed} removed" if removed else ""
    ink = _INK if group.prunable else _FROZEN
    lines = [] if group.prunable else [_Line(part, _FROZEN) for part in _wrap(f"frozen: {group.reason}", 78)]
    return _Card(
        title=_title(group.name, ink),
        subtitle=_Line(f"{group.size} units ({group.kind.value}){gone}", _MUTED),
        fraction=group.size / widest,
        gone=removed / group.size if group.size else 0.0,
        lines=(*lines, *_slice_lines(group, everything)),
        grey=not group.prunable,
    )


def _tensor_cards(groups: Sequence[PruningGroup], removed: Mapping[str, Sequence[int]]) -> list[_Card]:
    """One card per tensor instead: which groups cut which of its dims."""
    users: dict[str, list[tuple[PruningGroup, ParamSlice]]] = {}
    for group in groups:
        for part in group.slices:
            if part.role.is_tensor:
                users.setdefault(part.param, []).append((group, part))
    widest = max((s.length for parts in users.values() for _, s in parts), default=1)
    cards = []
    for name, parts in users.items():
        lines = tuple(
            _Line(t, _ROLE_COLOURS[s.role] if g.prunable else _FROZEN, 11)
            for g, s in parts
            for t in _wrap(f"dim {s.dim}: {g.name} ({s.role.value}){'' if g.prunable else ', frozen'}", 84)
        )
        length = max(s.length for _, s in parts)
        gone = max(len(removed.get(g.name, ())) / max(g.size, 1) for g, _ in parts)
        grey = not any(g.prunable for g, _ in parts)
        sizes = ", ".join(dict.fromkeys(f"dim {s.dim} of {s.length}" for _, s in parts))
        title = _title(name, _FROZEN if grey else _INK)
        cards.append(_Card(title, _Line(sizes, _MUTED), length / widest, gone, lines, grey))
    return cards


def _draw(card: _Card, x: int, y: int) -> list[str]:
    inner = CARD_WIDTH - 2 * PADDING
    bar = max(2, round(inner * card.fraction))
    fill, stroke, colour = ("#f1f2f3", "#c9cdd1", "#c3c8cd") if card.grey else ("#ffffff", "#b8c4d0", "#9cc3ea")
    left, top = x + PADDING, y + PADDING
    bar_top = top + (1 + len(card.title)) * LINE + 4
    out = [
        f'<rect x="{x}" y="{y}" width="{CARD_WIDTH}" height="{card.height}" rx="6" fill="{fill}" stroke="{stroke}"/>',
        *(_text(line, left, top + 12 + LINE * i) for i, line in enumerate(card.title)),
        _text(card.subtitle, left, top + 12 + LINE * len(card.title)),
        f'<rect x="{left}" y="{bar_top}" width="{bar}" height="8" rx="2" fill="{colour}"/>',
    ]
    if card.gone:
        out.append(
            f'<rect x="{left}" y="{bar_top}" width="{max(1, round(bar * card.gone))}" height="8" rx="2" '
            'fill="#33475b"/>'
        )
    start = bar_top + 24
    out += [_text(line, left, start + LINE * i) for i, line in enumerate(card.lines)]
    return out


def _legend(x: int, y: int) -> list[str]:
    parts, offset = [], x
    for role in Role:
        parts.append(f'<rect x="{offset}" y="{y - 9}" width="10" height="10" rx="2" fill="{_ROLE_COLOURS[role]}"/>')
        parts.append(_text(_Line(role.value, _MUTED, 11), offset + 14, y))
        offset += 30 + 8 * len(role.value)
    return parts


def draw_groups(
    groups: Sequence[PruningGroup],
    *,
    title: str = "Pruning groups",
    removed: Mapping[str, Sequence[int]] | None = None,
    vertical: bool = True,
    by_node_groups: bool = True,
    display_params: bool = False,
) -> str:
    """The groups as one SVG document.

    Args:
        groups: in network order.
        title: shown on top.
        removed: group name -> units that are at zero; drawn dark in the bars.
        vertical: one column; otherwise three.
        by_node_groups: one card per group; otherwise one per tensor, with the groups that cut it.
        display_params: list every slice instead of the first few.
    """
    removed = removed or {}
    if by_node_groups:
        widest = max((g.size for g in groups), default=1)
        cards = [_group_card(g, max(widest, 1), len(removed.get(g.name, ())), display_params) for g in groups]
    else:
        cards = _tensor_cards(groups, removed)
    prunable = [g for g in groups if g.prunable]
    subtitle = (
        f"{len(groups)} groups, {len(prunable)} prunable with {sum(g.size for g in prunable)} units, "
        f"{sum(len(units) for units in removed.values())} of them at zero"
    )
    columns = 1 if vertical else COLUMNS_WHEN_WIDE
    top = 78
    body: list[str] = []
    heights = [top] * columns
    for index, card in enumerate(cards):
        column = index % columns
        body += _draw(card, GAP + column * (CARD_WIDTH + GAP), heights[column])
        heights[column] += card.height + GAP
    width, height = GAP + columns * (CARD_WIDTH + GAP), max(heights) + GAP
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="ui-sans-serif, Helvetica, Arial, sans-serif">',
        f"<title>{_escaped(title)}</title>",
        f'<rect width="{width}" height="{height}" fill="#f7f9fb"/>',
        _text(_Line(_wrap(title, 60)[0], _INK, 18, bold=True), GAP, 28),
        _text(_Line(subtitle, _MUTED), GAP, 47),
        *_legend(GAP, 66),
    ]
    return "\n".join([*head, *body, "</svg>", ""])
