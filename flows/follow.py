"""Follow: the latent tables that follow a champion are encoded again when the alias moves."""

from __future__ import annotations

import logging

from prefect import flow

from flows import promotion
from flows.config import Encode, Follow
from flows.encode import encode
from flows.followers import following, unsubscribe
from flows.results import Followed, Table
from flows.tracking import tracked

logger = logging.getLogger("vae_flows.follow")


@flow(name="follow")
def follow(config: Follow) -> Followed:
    """Encode what follows the champion since its last move; nothing where that was done."""
    with tracked(config) as run:
        if config.drop:
            unsubscribe(config.root, config.name, config.drop)
        moves = promotion.reconcile(config.root, config.name)
        champion = f"models:/{config.name}/{moves[-1].version}" if moves else ""
        settled = not moves or promotion.settled(config.root, config.name, moves[-1])
        tables = []
        if not settled:
            promotion.announce(config.name, moves[-1])
            tables = encode_all(config, champion)
            promotion.settle(config.root, config.name, moves[-1], {"tables": [t.uri for t in tables]})
        sources = list(following(config.root, config.name))
        changed = bool(config.drop) or not settled
        return run.sign(Followed(changed=changed, champion=champion, sources=sources, tables=tables))


def encode_all(config: Follow, champion: str) -> list[Table]:
    """Every table that follows, by the champion; a source that is gone doesn't keep the others back."""
    wanted = following(config.root, config.name)
    logger.info("follow: %d tables follow the champion, now %s", len(wanted), champion)
    tables, faults = [], []
    for origin, settings in wanted.items():
        try:
            tables.append(encode(Encode(root=config.root, model=champion, **settings)))
        except ValueError as error:
            faults.append((origin, error))
    if faults:
        raise RuntimeError(
            f"{champion} is champion, but {len(faults)} of the {len(wanted)} tables that follow it can't be "
            f"encoded: {faults[0][1]}; mend that source, or let it go by "
            f"`vae-flows follow {config.name} --drop {faults[0][0]}`"
        )
    return tables
