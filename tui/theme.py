"""The colours of the panel."""

from __future__ import annotations

from textual.color import Color, ColorParseError
from textual.theme import Theme

THEME = Theme(
    name="surgvqa",
    primary="#5aa9e6",
    secondary="#8ecae6",
    accent="#f4a259",
    success="#5fcf9b",
    warning="#f2c14e",
    error="#f2696b",
    foreground="#e3e9ef",
    background="#0e141b",
    surface="#131b24",
    panel="#1c2733",
    dark=True,
    variables={
        "muted": "#8796a5",
        "chart-train": "#5aa9e6",
        "chart-eval": "#f4a259",
        "footer-key-foreground": "#f4a259",
        "footer-background": "#131b24",
        "footer-description-foreground": "#b6c2ce",
        "border": "#2c3b4b",
        "border-blurred": "#2c3b4b",
        "block-cursor-background": "#274866",
        "block-cursor-foreground": "#ffffff",
        "block-cursor-blurred-background": "#1d3145",
        "input-selection-background": "#5aa9e6 40%",
    },
)


def variables_of(theme: Theme) -> dict[str, str]:
    """The panel's own variables in a theme that does not define them: its colours, muted text between two of them."""
    known = theme.to_color_system().generate()
    try:
        ground, text = Color.parse(known["background"]), Color.parse(known["foreground"])
        muted = "ansi_bright_black" if theme.ansi or ground.ansi is not None else text.blend(ground, 0.35).hex
    except ColorParseError:
        muted = "ansi_bright_black"
    return {"muted": muted, "chart-train": known["primary"], "chart-eval": known["accent"]}
