"""Bar charts as SVG, with nothing but the standard library."""

from html import escape

WIDTH, LEFT, BAR, GAP, TOP = 640, 150, 22, 10, 48
OURS, OTHERS = "#2563a8", "#9aa4b0"


def bars(title, unit, values):
    """A horizontal chart; `values` are (label, value, smallest, largest), the first one being ours."""
    scale = (WIDTH - LEFT - 90) / max([largest for _, _, _, largest in values] + [1])
    height = TOP + len(values) * (BAR + GAP) + 8
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
           '<rect width="100%" height="100%" fill="white"/>',
           f'<text x="8" y="18" font-size="14" font-weight="bold">{escape(title)}</text>',
           f'<text x="8" y="36" fill="#555">{escape(unit)}</text>']
    for index, (label, value, smallest, largest) in enumerate(values):
        y = TOP + index * (BAR + GAP)
        middle = y + BAR / 2
        out += [f'<text x="{LEFT - 8}" y="{middle + 4}" text-anchor="end">{escape(label)}</text>',
                f'<rect x="{LEFT}" y="{y}" width="{value * scale:.1f}" height="{BAR}" fill="{OTHERS if index else OURS}"/>',
                f'<path d="M{LEFT + smallest * scale:.1f} {middle}H{LEFT + largest * scale:.1f}" stroke="black"/>',
                f'<text x="{LEFT + max(value, largest) * scale + 6:.1f}" y="{middle + 4}">{value:,.0f}</text>']
    return "\n".join([*out, "</svg>", ""])
