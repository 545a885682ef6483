"""A model card: a page of Markdown, a registered version's description and Prefect's summary."""

from __future__ import annotations

from flows import facts
from flows.dossier import Dossier
from flows.results import told


def card(dossier: Dossier) -> str:
    """What it is, how good it is, what it was made of, how to use it."""
    decided, why = facts.verdict(dossier)
    made, scores, model = dossier.ingested, dossier.scores, dossier.facts["model"]
    channels, height, width = made.geometry
    counts = ", ".join(f"{n:,} {split}" for split, n in made.counts.items())
    lines = [
        f"# {dossier.title}",
        f"**{decided}**: {why}.",
        f"Model `{model['model']}` of {height} x {width} {'grey' if channels == 1 else 'RGB'} images, "
        f"{model['likelihood'].replace('_', ' ')} likelihood, latents of {_levels(dossier)} dimensions.",
        f"Trained on `{_code(made.source)}`, snapshot `{made.fingerprint}`: {made.rows:,} images ({counts}), "
        f"{told(made)}, {made.leaked:,} test images also in train.",
        f"## Scores on {scores.protocol['images']:,} {scores.protocol['split']} images",
        _table(dossier),
        "Likelihoods in nats an image, ± one standard error. Higher ELBO and lower NLL are better; the NLL "
        f"is the importance-weighted bound of {scores.protocol.get('k', 1)} draws.",
        "## Use",
        f'    mlflow.pyfunc.load_model("{dossier.model.uri}")  # uint8 (-1, {channels}, {height}, {width})\n'
        f"    vae-flows report {dossier.model.uri} --out report.html",
    ]  # fmt: skip
    return "\n\n".join(lines)


def _levels(dossier: Dossier) -> str:
    return " + ".join(" x ".join(map(str, level)) for level in dossier.facts["levels"])


def _table(dossier: Dossier) -> str:
    head = ["", "this model"] + ([dossier.rival_name, "difference"] if dossier.rival else [])
    lines = [head, ["---"] * len(head)]
    for row in facts.rows(dossier):
        compared = [row["rival"], row["difference"]] if dossier.rival else []
        lines.append([f"{row['name']}{', ' + row['unit'] if row['unit'] else ''}", row["own"], *compared])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _code(text: str) -> str:
    """Text that can stand between backticks."""
    return text.replace("`", "'").replace("\n", " ")
