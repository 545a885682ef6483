"""The report as one HTML file: everything in it, nothing fetched, and all that comes from data escaped."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import Markup

from flows.charts import GREY, LABELS, Chart, mark, plotly
from flows.dossier import Dossier
from flows.facts import context, number
from flows.figures import shrink, tile, webp
from flows.portrait import OUTLIERS, OWN, TEMPERATURES, Film, Map, Pairs, Samples, Sitter, Traversal

ASSETS = files("flows") / "assets"
SIDE = 64  # pixels that an image's longer side has at most in the page
SHOWN = 56  # pixels of the screen that a small image's longer side is enlarged to, about
SPRITE = 8_000_000  # pixels of all the map's images together, which keeps them under 3 MB
LOSSLESS = 700_000  # bytes of a sheet's pixels up to which it is kept to the bit


@dataclass(frozen=True)
class Shown:
    """What the page shows of a model."""

    pairs: list[Pairs]
    samples: list[Samples]
    interpolations: list[Film]
    edits: list[Film]
    traversals: list[Traversal]
    map: Map
    charts: list[Chart]
    scores: Chart


class Page:
    """The page of a report, from what is on record and what the model shows."""

    def __init__(self, dossier: Dossier, sitter: Sitter, shown: Shown):
        self.dossier, self.sitter, self.shown = dossier, sitter, shown
        _, height, width = sitter.model.config.image_shape
        shrunk = min(1.0, SIDE / max(height, width))
        # Of an image in the page's sheets; and how wide a small one is on the screen.
        self.width, self.height = max(1, round(width * shrunk)), max(1, round(height * shrunk))
        self.cell = self.width * max(1, round(SHOWN / max(self.width, self.height)))

    def html(self) -> str:
        """The whole file."""
        from jinja2 import Environment, FunctionLoader, StrictUndefined
        from plotly.offline import get_plotlyjs

        environment = Environment(
            loader=FunctionLoader(lambda name: (ASSETS / name).read_text()),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        environment.filters |= {"number": number, "image": self.image, "json": to_json}
        page = environment.get_template("report.html")
        return page.render(
            **context(self.dossier),
            page=self,
            shown=self.shown,
            plotly=plotly,
            css=Markup((ASSETS / "report.css").read_text()),
            script=Markup((ASSETS / "report.js").read_text()),
            library=Markup(get_plotlyjs()),
            temperatures=TEMPERATURES,
            captions=[f"temperature {temperature:g}" for temperature in TEMPERATURES],
            own=OWN,
        )

    def image(self, images: np.ndarray, columns: int = 0, gap: int = 0) -> str:
        """Images (N, C, H, W), or one (C, H, W), as the URI of one sheet of `columns`, by default a row."""
        images = shrink(images[None] if images.ndim == 3 else images, SIDE)
        page = tile(images, columns or len(images), gap)
        return data_uri(page if gap else page[:, :, :-1])

    def strip(self, frames: np.ndarray) -> str:
        """The frames of a film in a row, each with a transparent column at its right: all are as wide."""
        page = np.pad(tile(shrink(frames, SIDE), len(frames), gap=1), ((0, 0), (0, 1), (0, 0)))
        return data_uri(page)

    def samples(self, samples: Samples) -> str:
        """The sheets of all temperatures side by side, as one."""
        sheets = [shrink(sheet, SIDE) for sheet in samples.sheets]
        tiled = [tile(sheet, math.isqrt(len(sheet)), gap=1) for sheet in sheets]
        tiled = [np.pad(sheet, ((0, 1), (0, 1), (0, 0))) for sheet in tiled]
        return data_uri(np.concatenate(tiled, axis=1))

    @cached_property
    def typical(self) -> tuple[float, float]:
        """The median score, and the robust standard deviation around it."""
        middle = float(np.median(self.sitter.scores))
        return middle, 1.4826 * float(np.median(np.abs(self.sitter.scores - middle)))

    def outliers(self) -> list[dict[str, Any]]:
        """The images that fit worst: id, path, label, score, and how far from the median that is."""
        places = self.sitter.order[:OUTLIERS]
        reconstructions = self.sitter.decode(self.sitter.latents[places])
        middle, spread = self.typical
        return [
            {
                "image": self.sitter.shown.images[place],
                "reconstruction": reconstruction,
                "id": self.sitter.shown.ids[place],
                "path": self.dossier.path(self.sitter.shown.ids[place]),
                "label": self.sitter.shown.labels[place],
                "score": float(self.sitter.scores[place]),
                "away": (float(self.sitter.scores[place]) - middle) / spread if spread else None,
            }
            for place, reconstruction in zip(places, reconstructions, strict=True)
        ]

    def projected(self, name: str) -> str:
        """How a projection of the map came about."""
        if name == "UMAP":
            return "laid out by UMAP so that neighbours stay neighbours; distances far apart mean little"
        share = f"{self.shown.map.explained:.0%}"
        return f"projected by PCA on the two directions in which they vary most ({share} of the variance)"

    def legend(self) -> list[dict[str, Any]]:
        """The map's labels with their colour, symbol and count; the rarest together as the last."""
        rows = []
        for place, (name, count, other) in enumerate(self._labels):
            color, symbol = (GREY, "circle") if other else mark(place)
            rows.append({"name": name, "color": color, "symbol": symbol, "count": count})
        return rows

    @cached_property
    def _labels(self) -> list[tuple[str, int, bool]]:
        """Each label, its count, and whether it stands for all the rarer ones."""
        counts = Counter(self.sitter.shown.labels[place] or "no label" for place in self.shown.map.places)
        common = sorted(name for name, _ in counts.most_common(LABELS))
        rest = sum(counts.values()) - sum(counts[name] for name in common)
        kept = [(name, counts[name], False) for name in common]
        return [*kept, (f"{len(counts) - len(common)} other labels", rest, True)] if rest else kept

    def points(self) -> dict[str, Any]:
        """What the map's script needs of each point, and where its image is in the sprite."""
        places = self.shown.map.places
        names = {name: n for n, (name, _, other) in enumerate(self._labels) if not other}
        labels = [self.sitter.shown.labels[place] or "no label" for place in places]
        side = math.isqrt(SPRITE // len(places))
        thumbs = shrink(self.sitter.shown.images[places], min(SIDE, side))
        columns = math.ceil(math.sqrt(len(places)))
        return {
            "ids": [self.sitter.shown.ids[place] for place in places],
            "label": [names.get(label, len(names)) for label in labels],
            "labels": labels if len(names) < len(set(labels)) else [],
            "legend": self.legend(),
            "score": [round(float(score), 2) for score in self.sitter.scores[places]],
            "scoreName": self.dossier.score_name,
            "projections": {
                name: {"x": xy[:, 0].round(3).tolist(), "y": xy[:, 1].round(3).tolist()}
                for name, xy in self.shown.map.points.items()
            },
            "sprite": {
                "uri": data_uri(tile(thumbs, columns)[:, :, :-1], quality=60),
                "columns": columns,
                "width": thumbs.shape[3],
                "height": thumbs.shape[2],
            },
        }


def data_uri(page: np.ndarray, quality: int = 82) -> str:
    """A picture (H, W, C) as a URI that holds it, a large one at that quality."""
    content = webp(page, None if page.size <= LOSSLESS else quality)
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"


def to_json(value: Any) -> Markup:
    """JSON that can stand in a script element: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
