"""The test loss when units go one after another, in the order that a ranking says."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
from scores import AT_ONCE, Ranking
from trained import Net, Settings, tested_on, view_of

from jaxprune.score.coalitions import Game, evaluated
from jaxprune.score.unit_loss import unit_game
from jaxprune.tree import put
from jaxprune.types import Masks

#: What a table of this study calls all layers together.
WHOLE = '*'


def removal_curves(
    net: Net, number: int, rankings: Sequence[Ranking], settings: Settings
) -> pl.DataFrame:
    """A row for every point of every curve of a seed.

    Columns: `method`, `examples`, `draw`; `layer`, from which units go, or '*' for all layers;
    `units` it has; `removed` of them; `loss` on the test images. All layers together are measured
    for the scores of all examples only.
    """
    frames = []
    for layer, (units,) in net.units.shapes.items():
        scores = [ranking.scores[layer] for ranking in rankings]
        frames += _curves(net, number, layer, rankings, scores, np.arange(units + 1), settings)
    best = [r for r in rankings if r.examples in (0, max(settings.examples))]
    scores = [np.concatenate(list(comparable(ranking).values())) for ranking in best]
    shares = np.arange(0, 1 + 1e-9, settings.step)
    removed = np.round(shares * len(scores[0])).astype(int)
    return pl.concat([*frames, *_curves(net, number, WHOLE, best, scores, removed, settings)])


def _curves(
    net: Net,
    number: int,
    layer: str,
    rankings: Sequence[Ranking],
    scores: Sequence[np.ndarray],
    removed: np.ndarray,
    settings: Settings,
) -> list[pl.DataFrame]:
    """The curves of a layer, or of all, by some scores of its units."""
    losses = _losses(net, number, layer, [prefixes(own, removed) for own in scores], settings)
    frames = []
    for ranking, own in zip(rankings, losses, strict=True):
        named = {
            'method': ranking.method,
            'examples': ranking.examples,
            'draw': ranking.draw,
            'layer': layer,
            'units': len(scores[0]),
        }
        frame = pl.DataFrame({'removed': removed, 'loss': own})
        frames.append(frame.select(*(pl.lit(v).alias(k) for k, v in named.items()), pl.all()))
    return frames


def prefixes(scores: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Which units are left when so many of the lowest are removed, `(points, units)`.

    Of equal scores those with the lower number go first.
    """
    rank = np.argsort(np.argsort(scores, kind='stable'))
    return rank >= removed[:, None]


def comparable(ranking: Ranking) -> dict[str, np.ndarray]:
    """Scores for one ranking of all layers: as they are, but norms over their layer's mean."""
    if ranking.method != 'weight norm':
        return ranking.scores
    return {layer: scores / scores.mean() for layer, scores in ranking.scores.items()}


def kept_units(ranking: Ranking, share: float) -> Masks:
    """What is left when a share of all units is removed; the best unit of each layer stays."""
    scores = {layer: own.astype(float) for layer, own in comparable(ranking).items()}
    for own in scores.values():
        own[np.argmax(own)] = np.inf
    units = sum(map(len, scores.values()))
    count = min(round(share * units), units - len(scores))
    mask = prefixes(np.concatenate(list(scores.values())), np.array([count]))[0]
    ends = np.cumsum([len(own) for own in scores.values()])[:-1]
    return dict(zip(scores, np.split(mask, ends), strict=True))


def _losses(
    net: Net, number: int, layer: str, masks: Sequence[np.ndarray], settings: Settings
) -> list[np.ndarray]:
    """The mean test loss under masks of a layer, or of all; each mask is evaluated once."""
    several, back = np.unique(np.concatenate(masks), axis=0, return_inverse=True)
    game = (
        whole_game(net, number, settings)
        if layer == WHOLE
        else layer_game(net, number, layer, settings)
    )
    losses = evaluated(game, jnp.asarray(several), AT_ONCE[net.name], 'unrolled')
    means = np.asarray(losses, np.float64).mean(1)[back.reshape(-1)]
    return np.split(means, np.cumsum([len(m) for m in masks])[:-1])


def layer_game(net: Net, number: int, layer: str, settings: Settings) -> Game:
    """`units of a layer that are there -> losses of the test images`."""
    batch = tested_on(net, settings.tested)
    gated = net.units.gates('activation')
    return unit_game(net.problem, gated, layer, view_of(net, number), [batch])


def whole_game(net: Net, number: int, settings: Settings) -> Game:
    """The same for all layers together, one after the other in the mask."""
    batch, view = tested_on(net, settings.tested), view_of(net, number)
    sizes = {layer: shape[0] for layer, shape in net.units.shapes.items()}
    ends = np.cumsum(list(sizes.values()))[:-1].tolist()
    # What comes before all gates is computed once, here: else XLA does so while it compiles.
    gated = net.units.gates('activation')
    tail = gated.tail(list(sizes), put(view.params, view.weights), batch.x, view.model_state)

    def game(mask: jax.Array) -> jax.Array:
        parts = jnp.split(mask.astype(jnp.float32), ends)
        return net.problem.loss(tail(dict(zip(sizes, parts, strict=True))), batch.y)

    return game
