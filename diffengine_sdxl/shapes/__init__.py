"""A world of coloured shapes, drawn by code and measured exactly; see docs/shapes.md."""
