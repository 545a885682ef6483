"""Charts of the report: each made once, drawn by plotly in the page and by matplotlib as a PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Paul Tol's "bright": told apart by the colour-blind, on white and on black.
PALETTE = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#AA3377")
GREY = "#BBBBBB"  # of what has no colour of its own
SYMBOLS = {"circle": "o", "diamond": "D", "square": "s"}  # by matplotlib's names
LABELS = len(PALETTE) * len(SYMBOLS)  # that colour and symbol together tell apart
WIDEST = 64  # dimensions of a chart of them, those of the largest KL


@dataclass(frozen=True)
class Series:
    """One line; an `area` is a histogram's outline, filled."""

    name: str
    x: list[float]
    y: list[float]
    area: bool = False


@dataclass(frozen=True)
class Heat:
    """Values (rows, columns) as colours; `rows` names them from the bottom."""

    x: list[float]
    rows: list[str]
    values: list[list[float]]


@dataclass(frozen=True)
class Chart:
    """What is drawn, with the axes' units, and in words for who does not see it."""

    name: str
    title: str
    alt: str
    x: str
    y: str
    series: tuple[Series, ...] = ()
    heat: Heat | None = None


def training_charts(history: dict[str, Any]) -> list[Chart]:
    """ELBO, reconstruction and KL by step; KL of each level and dimension, and active units, by epoch."""
    lines, epochs = history["lines"], [epoch for epoch in history["epochs"] if "active_units" in epoch]
    if not lines:
        return []
    terms = [("log_likelihood", "Reconstruction", "log-likelihood, nats an image")]
    if epochs:
        terms = [("elbo", "ELBO", "nats an image"), *terms, ("kl", "KL", "nats an image")]
    charts = [_over_steps(lines, *term) for term in terms]
    steps = [float(epoch["step"]) for epoch in epochs]
    if epochs:
        units = [float(epoch["active_units"]) for epoch in epochs]
        charts.append(
            _lines("active-units", "Active units", "of all dimensions", {"active units": (steps, units)})
        )
    if epochs and len(epochs[-1]["kl_per_level"]) > 1:
        levels = np.array([epoch["kl_per_level"] for epoch in epochs]).T
        named = {f"level {n}{' (top)' if not n else ''}": (steps, kl.tolist()) for n, kl in enumerate(levels)}
        charts.append(_lines("kl-levels", "KL of each level", "nats an image", named))
    if epochs and epochs[-1]["kl_per_dim"]:
        charts.append(_kl_of_dimensions(steps, np.array([epoch["kl_per_dim"] for epoch in epochs])))
    return charts


def score_chart(name: str, own: np.ndarray, rival: np.ndarray | None, rival_name: str) -> Chart:
    """The histogram of a score over images, and the champion's on the same images as a line."""
    both = own if rival is None else np.concatenate([own, rival])
    edges = np.histogram_bin_edges(both, min(60, max(8, round(2 * len(own) ** (1 / 3)))))
    series = [_outline("this model", own, edges, area=True)]
    if rival is not None:
        series.append(_outline(rival_name, rival, edges))
    low, middle, high = np.quantile(own, [0.05, 0.5, 0.95])
    alt = (
        f"Histogram of the {name} of {len(own):,} images: median {middle:.4g} nats, "
        f"nine in ten between {low:.4g} and {high:.4g}."
    )
    return Chart("scores", f"{name} of each image", alt, f"{name}, nats", "images a bin", tuple(series))


def _over_steps(lines: list[dict[str, Any]], term: str, title: str, unit: str) -> Chart:
    split = {
        name: ([float(line["step"]) for line in lines if line["split"] == key],
               [line[term] for line in lines if line["split"] == key])
        for key, name in (("train", "training"), ("validation", "validation"))
    }  # fmt: skip
    return _lines(term.replace("_", "-"), title, unit, {name: xy for name, xy in split.items() if xy[0]})


def _lines(name: str, title: str, unit: str, named: dict[str, tuple[list[float], list[float]]]) -> Chart:
    series = tuple(Series(key, x, y) for key, (x, y) in named.items())
    ends = ", ".join(f"{one.name} from {one.y[0]:.4g} to {one.y[-1]:.4g}" for one in series[:8])
    return Chart(name, title, f"{title} over training steps: {ends}.", "step", unit, series)


def _kl_of_dimensions(steps: list[float], kl: np.ndarray) -> Chart:
    order = np.argsort(kl[-1])[-WIDEST:]
    heat = Heat(steps, [f"dimension {one}" for one in order], kl[:, order].T.round(4).tolist())
    alt = (
        f"KL of {len(order)} latent dimensions over training steps; at the end the largest is "
        f"{kl[-1].max():.3g} nats (dimension {kl[-1].argmax()}), the smallest shown {kl[-1][order[0]]:.3g}."
    )
    return Chart("kl-dimensions", "KL of each dimension", alt, "step", "nats an image", heat=heat)


def _outline(name: str, values: np.ndarray, edges: np.ndarray, area: bool = False) -> Series:
    counts, _ = np.histogram(values, edges)
    return Series(name, np.repeat(edges, 2).tolist(), [0, *np.repeat(counts, 2).tolist(), 0], area)


def plotly(chart: Chart) -> dict[str, Any]:
    """The chart as plotly's JSON; the page adds its own colours of text and grid."""
    colors = _colors(len(chart.series))
    data = [_trace(one, color) for one, color in zip(chart.series, colors, strict=True)]
    y: dict[str, Any] = {"rangemode": "tozero" if chart.name == "active-units" else "normal"}
    if chart.heat is not None:
        data.append(_heatmap(chart.heat, chart.y))
        y = {"showticklabels": False, "ticks": ""}  # rows have names, and there may be too many to print
    layout = {"xaxis": {"title": {"text": chart.x}}, "yaxis": y, "showlegend": len(chart.series) > 1}
    return {"data": data, "layout": layout}


def _trace(one: Series, color: str) -> dict[str, Any]:
    line = {"color": color, "width": 1.5 if one.area else 2}
    trace = {"type": "scatter", "mode": "lines", "name": one.name, "line": line}
    filled = {"fill": "tozeroy", "hoverinfo": "skip"} if one.area else {}
    return {**trace, "x": _short(one.x), "y": _short(one.y), **filled}


def _heatmap(heat: Heat, unit: str) -> dict[str, Any]:
    bar = {"thickness": 12, "outlinewidth": 0, "title": {"text": unit, "side": "right"}}
    values = {"x": heat.x, "y": heat.rows, "z": heat.values}
    return {"type": "heatmap", **values, "colorscale": "Cividis", "colorbar": bar}


def png(chart: Chart) -> bytes:
    """The chart as a PNG."""
    return _figure(lambda axes: _draw(axes, chart), chart.title, (6.4, 3.6))


def _draw(axes: Axes, chart: Chart) -> None:
    for one, color in zip(chart.series, _colors(len(chart.series)), strict=True):
        axes.plot(one.x, one.y, color=color, label=one.name)
        if one.area:
            axes.fill_between(one.x, one.y, color=color, alpha=0.3)
    if (heat := chart.heat) is not None:
        drawn = axes.pcolormesh(heat.x, range(len(heat.rows)), np.array(heat.values), cmap="cividis")
        axes.figure.colorbar(drawn, label=chart.y)
    elif len(chart.series) > 1:
        axes.legend(frameon=False)
    axes.set(xlabel=chart.x, ylabel="dimension, by KL" if heat else chart.y)


def mark(place: int) -> tuple[str, str]:
    """Colour and symbol of the map's label of that place.

    >>> mark(0), mark(7)
    (('#4477AA', 'circle'), ('#EE6677', 'diamond'))
    """
    return PALETTE[place % len(PALETTE)], list(SYMBOLS)[place // len(PALETTE) % len(SYMBOLS)]


def map_png(points: np.ndarray, labels: Sequence[str | None], title: str) -> bytes:
    """The latent map (N, 2) as a PNG, coloured by label."""

    def draw(axes: Axes) -> None:
        names = sorted({label or "" for label in labels})
        of = np.array([label or "" for label in labels])
        for place, name in enumerate(names):
            color, symbol = mark(place)
            look: dict[str, Any] = {"s": 4, "color": color, "marker": SYMBOLS[symbol], "linewidths": 0}
            axes.scatter(*points[of == name].T, label=_clipped(name) or None, **look)
        if 1 < len(names) <= LABELS:
            axes.legend(frameon=False, markerscale=3, fontsize="small", bbox_to_anchor=(1, 1))
        axes.set_aspect("equal", "datalim")

    return _figure(draw, title, (7.2, 5.4))


def _figure(draw: Callable[[Axes], None], title: str, size: tuple[float, float]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    draw(axes)
    axes.set_title(title, loc="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _colors(count: int) -> list[str]:
    return [PALETTE[place % len(PALETTE)] for place in range(count)]


def _clipped(name: str, length: int = 24) -> str:
    # matplotlib reads a leading underscore as "no label", and text between dollars as mathematics.
    name = name.replace("$", r"\$").lstrip("_")
    return name if len(name) <= length else name[: length - 1] + "…"


def _short(values: list[float]) -> list[float]:
    """Six digits are enough for a screen."""
    return [float(f"{value:.6g}") for value in values]
