"""The figures of a report. `catalogue` names them all; `detection`, `behaviour`, `steering` and `resistance` draw them
on `axes` of a `sheet`; `style` holds the look, `inline_svg` fits them to the page's light and dark themes."""
