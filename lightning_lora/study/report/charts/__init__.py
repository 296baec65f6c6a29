"""Charts as SVG text, from numbers alone: `line_chart`, `interval_chart`, `heat_map`, on `axis` and `svg`."""
