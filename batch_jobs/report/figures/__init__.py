"""The figures of a report.

`catalogue` lists them; `detection`, `behaviour`, `steering` and `resistance` draw them on the panels of a `sheet`, with
axes from `axes`. `style` defines the look, and `paper_figure` adapts figures to the page's light and dark themes.
"""
