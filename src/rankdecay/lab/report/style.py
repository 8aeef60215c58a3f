"""The look shared by the page and the static figures: one colour, one dash and one label per arm.

Colours come in pairs, for a light and for a dark background; each has a contrast of at least 3:1 with its
background. Arms that are close in hue, also to a colour-blind reader, differ in dash.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle


@dataclass(frozen=True)
class ArmStyle:
    """Style of one arm: its name in words, a colour per background and a plotly dash name."""

    label: str
    light: str
    dark: str
    dash: str = "solid"


_KNOWN = {
    "low_rank": ArmStyle("low-rank decay", "#c2410c", "#ff8f5c"),
    "l2": ArmStyle("L2", "#1d63b8", "#6cb2ff"),
    "l2_tuned": ArmStyle("tuned L2", "#0b3a75", "#b4d6ff", "dash"),
    "l2_ramp": ArmStyle("L2 with a warm-up", "#3a54c4", "#8fa6ff", "dash"),
    "radial": ArmStyle("constant amount of the norm", "#a0327f", "#ff8fd0", "dot"),
    "none": ArmStyle("no decay", "#767b84", "#8d939d", "dot"),
    "prototype": ArmStyle("prototype", "#b08500", "#e8c34a", "dashdot"),
    "uniform_attention": ArmStyle("uniform attention", "#8b3a8f", "#dd8fe0", "longdash"),
}
# For arms this file does not know, in the order they appear; a colour already in the run is passed over.
_SPARE = [
    ("#0d7a5f", "#4fd1ab", "dashdot"),
    ("#b0307a", "#ff86bf", "longdash"),
    ("#5b7f13", "#b2d65e", "dot"),
    ("#6b4f3a", "#cfae93", "dash"),
    ("#4b4ba8", "#a9a9ff", "solid"),
]


def arm_styles(names: Iterable[str], more: Mapping[str, ArmStyle] | None = None) -> dict[str, ArmStyle]:
    """The style of every arm, in the order given; an unknown arm keeps its own name as its label.

    Args:
        names: arm names as they stand in `config.json`.
        more: styles of an experiment's own arms, which count before those known here.

    Returns:
        One `ArmStyle` per name; a documented arm always gets the same one.
    """
    names, known = list(names), _KNOWN | dict(more or {})
    taken = {known[name].light for name in names if name in known}
    spare = cycle([look for look in _SPARE if look[0] not in taken])
    return {name: known[name] if name in known else ArmStyle(name, *next(spare)) for name in dict.fromkeys(names)}
