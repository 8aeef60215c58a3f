"""The look shared by the page and the static figures: one colour, one dash and one label per arm.

Colours come in pairs, for a light and for a dark background; each has a contrast of at least 3:1 with its
background. Arms that are close in hue, also to a colour-blind reader, differ in dash.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import cycle

LIGHT_BACKGROUND = "#fcfbf8"
DARK_BACKGROUND = "#14161a"


@dataclass(frozen=True)
class ArmStyle:
    """How one arm is drawn: its name in words, a colour per background and a plotly dash name."""

    label: str
    light: str
    dark: str
    dash: str = "solid"


_KNOWN = {
    "low_rank": ArmStyle("low-rank decay", "#c2410c", "#ff8f5c"),
    "l2": ArmStyle("L2", "#1d63b8", "#6cb2ff"),
    "l2_tuned": ArmStyle("tuned L2", "#0b3a75", "#b4d6ff", "dash"),
    "none": ArmStyle("no decay", "#767b84", "#8d939d", "dot"),
    "prototype": ArmStyle("prototype", "#b08500", "#e8c34a", "dashdot"),
    "uniform_attention": ArmStyle("uniform attention", "#8b3a8f", "#dd8fe0", "longdash"),
    "no_qk_norm": ArmStyle("no QK-norm", "#0d7a5f", "#4fd1ab"),
    "radial_only": ArmStyle("radial part only", "#b0307a", "#ff86bf", "longdashdot"),
    "tangential_only": ArmStyle("tangential part only", "#5b7f13", "#b2d65e", "dash"),
    # Relatives of the arms above, in a neighbouring colour and another dash.
    "smooth": ArmStyle("smooth low-rank decay", "#a34a2a", "#ffb199", "dot"),
    "low_rank_all": ArmStyle("low-rank decay of all", "#9a2f0a", "#ff7a6b", "dash"),
    "l2_all": ArmStyle("L2 of all", "#3f5fd0", "#9db4ff", "dashdot"),
    "truncate": ArmStyle("truncated once", "#7a5c00", "#d8b861", "longdash"),
    "raise_rank": ArmStyle("rank raised", "#00738c", "#5fd0e8", "dash"),
    "sphere": ArmStyle("fixed norm", "#45586e", "#a9bfd6", "longdash"),
    "sphere_low_rank": ArmStyle("low-rank decay at fixed norm", "#b5480f", "#ffab73", "longdash"),
    "fast_query_key": ArmStyle("faster queries and keys", "#6a3fb5", "#b99bff"),
    "after_memorising": ArmStyle("low rank after memorising", "#c0392b", "#ff9a8a", "dashdot"),
    "kept_on": ArmStyle("low rank kept on", "#c2410c", "#ff8f5c", "longdash"),
    "until_generalised": ArmStyle("low rank until generalised", "#a05a12", "#f0b06a", "dot"),
    "target_rank": ArmStyle("target rank", "#2f7a2f", "#7fd67f", "dash"),
    "target_rank_head": ArmStyle("target rank per head", "#1f6f5c", "#6fdcc0", "dot"),
    "paper_a1": ArmStyle("published A1", "#b08500", "#e8c34a", "dash"),
    "paper_s5": ArmStyle("published S5", "#8a6a3a", "#d9bd8e", "dashdot"),
    "paper_s6": ArmStyle("published S6", "#7d4f6d", "#d3a3c2", "longdash"),
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
