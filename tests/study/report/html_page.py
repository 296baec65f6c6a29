"""An HTML page taken apart strictly: what is not well-formed is refused."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "input", "link"}
HIDDEN = {"script", "style", "pre", "svg", "title"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    above: list[str]
    text: str = ""


@dataclass
class HtmlPage(HTMLParser):
    """Every element with its attributes and its own text; elements must close in order."""

    source: str
    elements: list[Element] = field(default_factory=list)
    visible: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._open: list[Element] = []
        self.feed(self.source)
        self.close()
        assert not self._open, f"not closed: {[each.name for each in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"an attribute of <{tag}> is there twice: {names}"
        element = Element(tag, dict(attrs), [each.name for each in self._open])
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1].name == tag, f"</{tag}> closes <{self._open[-1].name}>"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if not self._open:
            return
        self._open[-1].text += data
        if not HIDDEN & {each.name for each in self._open}:
            self.visible.append(data)

    def all_of(self, name: str) -> list[Element]:
        return [each for each in self.elements if each.name == name]

    def __hash__(self) -> int:
        return id(self)
