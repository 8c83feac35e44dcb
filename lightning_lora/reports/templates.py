"""Templates of pages. Imports no torch."""

from typing import Any

from jinja2 import Environment, PackageLoader, Template


def template(name: str, **marks: Any) -> Template:
    """Return a template of this folder; pages in HTML escape what they show."""
    loader = PackageLoader("lightning_lora", "reports")
    environment = Environment(loader=loader, autoescape=name.endswith(".html.j2"), trim_blocks=True, **marks)
    environment.filters["latex"] = _latex
    return environment.get_template(name)


def _latex(text: str) -> str:
    bold = text.startswith("**")
    text = text.replace("**", "")
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$"}
    text = "".join(named.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)
    return f"\\textbf{{{text}}}" if bold else text
