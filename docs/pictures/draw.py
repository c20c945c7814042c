"""Draws the pictures of the documents as SVG files beside this one, light and dark: `python docs/pictures/draw.py`.

`price.svg` is the README's, out of a result file; `call.svg` and `data-flow.svg` are those of docs/design.md.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from statistics import quantiles

HERE = Path(__file__).resolve().parent
GRID = HERE.parents[1] / "benchmarks/results/amd-epyc-grid.json"
STYLE = """
  svg { --page: #ffffff; --ink: #1f2328; --soft: #59636e; --line: #8c959f; --box: #f6f8fa; --edge: #d1d9e0;
        --ours: #1a73e8; --theirs: #9aa0a6; --strong: #ddf4ff; --strong-edge: #54aeff; }
  @media (prefers-color-scheme: dark) {
    svg { --page: #0d1117; --ink: #f0f6fc; --soft: #9198a1; --line: #6e7681; --box: #151b23; --edge: #3d444d;
          --ours: #4493f8; --theirs: #7d8590; --strong: #0c2d6b; --strong-edge: #388bfd; }
  }
  text { font: 14px -apple-system, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif; fill: var(--ink); }
  .title { font-weight: 600; font-size: 16px; } .soft { fill: var(--soft); font-size: 12.5px; }
  .name { font-weight: 600; } .value { font-weight: 600; font-size: 15px; }
  .math { font: 13px ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .page { fill: var(--page); } .box { fill: var(--box); stroke: var(--edge); }
  .strong { fill: var(--strong); stroke: var(--strong-edge); }
  .ours { fill: var(--ours); } .theirs { fill: var(--theirs); }
  .line { stroke: var(--line); stroke-width: 1.5; fill: none; marker-end: url(#head); }
  .rule { stroke: var(--ink); stroke-width: 1.5; stroke-dasharray: 5 4; } .spread { stroke: var(--ink); stroke-width: 1.2; }
  #head path { fill: var(--line); }
"""
HEAD = (
    '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z"/></marker></defs>'
)


class Picture:
    """An SVG picture that is drawn piece by piece; coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'role="img">\n<title>{escape(title)}</title>\n<style>{STYLE}</style>\n{HEAD}',
            f'<rect class="page" width="{width}" height="{height}"/>',
        ]

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'
        )

    def rect(self, x: float, y: float, w: float, h: float, kind: str, radius: int = 0) -> None:
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{radius}" class="{kind}"/>'
        )

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str) -> None:
        self.parts.append(f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" class="{kind}"/>')

    def arrow(self, *points: tuple[float, float]) -> None:
        """A line from point to point, with a head at the last."""
        path = " L".join(f"{x:g} {y:g}" for x, y in points)
        self.parts.append(f'<path d="M{path}" class="line"/>')

    def box(self, x: float, y: float, w: float, h: float, *lines: str, kind: str = "box") -> None:
        """A box with a name and further lines; a line that begins with "=" is a formula."""
        self.rect(x, y, w, h, kind, radius=6)
        top = y + h / 2 - 9.5 * (len(lines) - 1) + 5
        for index, line in enumerate(lines):
            style = "math" if line.startswith("=") else "soft" if index else "name"
            self.text(x + w / 2, top + 19 * index, line.removeprefix("="), style, "middle")

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def price() -> str:
    """What a LoRA layer's training step takes over the frozen layer's, by median and quartiles of every case of the grid."""
    rows = json.loads(GRID.read_text())["rows"]
    bars, cases = [], 0
    for dtype in ("float32", "bfloat16"):
        for name, kind in (("PyTorch's operations", "theirs"), ("lora_kernels", "ours")):
            found = [
                row["to_floor"]
                for row in rows
                if (row["suite"], row["mode"], row["problem"]["dtype"]) == ("linear", "step", dtype)
                and (row.get("auto") if kind == "ours" else row["contender"] == "reference")
            ]
            cases = len(found)
            bars.append((dtype, name, kind, quantiles(found, n=4, method="inclusive")))
    picture = Picture(
        860, 306, "Forward and backward of a LoRA layer, over the frozen layer's time"
    )
    picture.text(
        24, 34, "Forward and backward of a LoRA layer, over the frozen layer's time", "title"
    )
    left, scale = 250, 318  # pixels at 0, and of 1.0
    for index, (dtype, name, kind, (low, middle, high)) in enumerate(bars):
        top = 62 + 44 * index + 20 * (index // 2)
        if index % 2 == 0:
            picture.text(24, top + 42, dtype, "name")
        picture.text(left - 12, top + 22, name, "" if kind == "ours" else "soft", "end")
        picture.rect(left, top, scale * middle, 34, kind, radius=2)
        picture.line(left + scale * low, top + 17, left + scale * high, top + 17, "spread")
        for end in (low, high):
            picture.line(left + scale * end, top + 11, left + scale * end, top + 23, "spread")
        picture.text(left + scale * max(high, middle) + 12, top + 22, f"{middle:.2f}", "value")
    picture.line(left + scale, 52, left + scale, 262, "rule")
    picture.text(left + scale, 280, "1.00: the frozen layer, no LoRA at all", "soft", "middle")
    picture.text(
        24,
        298,
        f"Measured on a 2-core AMD EPYC CPU, torch 2.13: medians and quartiles of {cases} cases each.",
        "soft",
    )
    return picture.svg()


def call() -> str:
    """The way of a call through the package."""
    picture = Picture(900, 560, "The way of a call")
    picture.text(24, 32, "The way of a call", "title")
    picture.box(24, 52, 200, 62, "modules", "LinearWithLoRA, replace_…")
    picture.box(240, 52, 200, 62, "integrations.peft", "accelerate(model)")
    picture.box(456, 52, 200, 62, "your code", "lora_linear(x, weight, A, B)")
    picture.box(
        24, 152, 632, 62, "functional", "checks the operands once, casts the adapter, flattens x"
    )
    for x in (124, 340, 556):
        picture.arrow((x, 114), (x, 150))
    picture.box(24, 252, 306, 62, "autograd", "eager mode: a Function with every derivative")
    picture.box(350, 252, 306, 62, "ops", "under a compiler: one registered operator")
    picture.arrow((177, 214), (177, 250))
    picture.arrow((503, 214), (503, 250))
    picture.box(
        24,
        352,
        632,
        62,
        "formulas",
        "forward, backward and jvp, written once over three products: shrink, expand, wgrad",
    )
    picture.arrow((177, 314), (177, 350))
    picture.arrow((503, 314), (503, 350))
    for index, (name, what) in enumerate(
        (
            ("eager", "ATen, any device"),
            ("cpu", "C++, AVX2 to AVX-512"),
            ("triton", "NVIDIA, AMD"),
            ("cuda", "C++, few rows"),
        )
    ):
        x = 24 + 161 * index
        picture.box(x, 462, 149, 62, name, what)
        picture.arrow((x + 74.5, 414), (x + 74.5, 460))
    picture.text(
        24,
        548,
        "backends: each gives candidates for a problem, or the reason why it cannot compute it",
        "soft",
    )
    picture.box(
        700,
        252,
        176,
        162,
        "plan",
        "a Problem: sizes, dtypes,",
        "device, weight format",
        "a Plan: the products,",
        "a reason for each other;",
        "explain prints it",
        kind="strong",
    )
    picture.arrow((656, 183), (788, 183), (788, 250))
    picture.text(790, 176, "the numbers", "soft", "middle")
    picture.arrow((700, 383), (658, 383))
    picture.arrow((656, 493), (700, 493))
    picture.box(
        700,
        448,
        176,
        90,
        "what decides",
        "measured by tune, else",
        "predicted times;",
        "the device's self-test",
    )
    picture.arrow((788, 448), (788, 416))
    return picture.svg()


def data_flow() -> str:
    """What is read and written between operands and results, forward and backward."""
    picture = Picture(900, 470, "The data flow of forward and backward")
    for left, title in ((24, "Forward"), (474, "Backward, from dy [M, N]")):
        picture.text(left, 32, title, "title")
    picture.box(24, 54, 112, 46, "x", "[M, K]")
    picture.box(24, 130, 112, 46, "A", "[K, R]")
    picture.box(24, 250, 112, 46, "W", "[K, N], frozen")
    picture.box(24, 320, 112, 46, "B, bias", "[R, N], [N]")
    picture.box(186, 106, 220, 62, "shrink", "=s = alpha·x·A", kind="strong")
    picture.box(
        186, 240, 220, 110, "expand", "=acc  = x·W", "=acc += s·B", "=acc += bias", kind="strong"
    )
    picture.box(186, 400, 220, 46, "y [M, N]", "written once, rounded once")
    picture.arrow((136, 70), (296, 70), (296, 104))
    picture.arrow((136, 153), (184, 153))
    picture.arrow((296, 168), (296, 238))
    picture.text(304, 196, "s [M, R],", "soft")
    picture.text(304, 212, "float32", "soft")
    picture.arrow((136, 86), (160, 86), (160, 262), (184, 262))
    picture.arrow((136, 280), (184, 280))
    picture.arrow((136, 338), (184, 338))
    picture.arrow((296, 350), (296, 398))
    picture.line(440, 20, 440, 450, "spread")

    picture.box(474, 54, 112, 46, "dy", "[M, N]")
    picture.box(474, 130, 112, 46, "B, s", "s was kept")
    picture.box(474, 250, 112, 46, "W, A", "W read as Wᵀ")
    picture.box(474, 350, 112, 46, "x", "was kept")
    picture.box(
        636, 96, 240, 80, "one reading of dy", "=q  = alpha·dy·Bᵀ", "=dB = sᵀ·dy", kind="strong"
    )
    picture.box(636, 226, 240, 80, "expand, on other strides", "=dx = dy·Wᵀ + q·Aᵀ", kind="strong")
    picture.box(636, 350, 240, 62, "wgrad", "=dA = xᵀ·q", kind="strong")
    picture.arrow((586, 70), (756, 70), (756, 94))
    picture.arrow((586, 153), (634, 153))
    picture.arrow((756, 176), (756, 224))
    picture.text(764, 205, "q [M, R]", "soft")
    picture.arrow((586, 86), (610, 86), (610, 248), (634, 248))
    picture.arrow((586, 276), (634, 276))
    picture.arrow((756, 306), (756, 348))
    picture.text(764, 332, "q", "soft")
    picture.arrow((586, 373), (634, 373))
    picture.text(474, 434, "No tensor of width N or K is written and read again;", "soft")
    picture.text(474, 451, "W is never copied or transposed in memory.", "soft")
    return picture.svg()


PICTURES = {"price.svg": price, "call.svg": call, "data-flow.svg": data_flow}


if __name__ == "__main__":
    for file, drawn in PICTURES.items():
        (HERE / file).write_text(drawn(), encoding="utf-8")
        print(HERE / file)
