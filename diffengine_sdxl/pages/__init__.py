"""HTML pages: jinja2 templates with one style, charts as SVG, images as data URLs; and model cards, in Markdown."""

from .html import is_ours, render  # noqa: F401
