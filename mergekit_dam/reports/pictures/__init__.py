"""Pictures as SVG, from numbers alone. They have no size of their own: widths are percentages."""
