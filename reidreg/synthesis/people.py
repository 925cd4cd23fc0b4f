"""What people look like: body, hair, clothes and bag, fixed for each identity."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from reidreg.synthesis.colours import (
    CLOTH,
    DENIM,
    HAIR,
    SKIN,
    Colour,
    pick_cloth_colour,
    pick_colour,
)
from reidreg.synthesis.streams import PERSON, pick, random_stream

# The same for every person, in heights of the person.
SHOULDER_HEIGHT = 0.815


@dataclass(frozen=True, slots=True)
class Garment:
    """The look of one piece of clothing.

    Args:
        pattern: plain, stripes, pinstripes, checks, dots, yoke, band, logo, panel, or open.
        base: The main colour.
        accent: The pattern's colour.
        period: Distance between repeats, in heights of the person.
        at: Where a single feature sits, from 0 (top) to 1 (hem).
    """

    pattern: str
    base: Colour
    accent: Colour
    period: float
    at: float


@dataclass(frozen=True, slots=True)
class Person:
    """The traits that all crops of one identity share; lengths are in heights of the person.

    Args:
        girth: Thickness of body and limbs, relative to the mean.
        shoulder: Half the width of the shoulders.
        hip: Half the width of the hips.
        leg: Height of the hip joints.
        head: Size of the head, relative to the mean.
        skin: Colour of the skin.
        hair: Colour of the hair.
        hair_style: bald, short, bob, long, tail, or bun.
        hat: none, cap, beanie, or brim.
        hat_colour: Colour of the hat.
        upper: The garment on the upper body.
        sleeve: Share of the arm that is covered.
        sleeve_colour: Colour of the sleeves.
        hem: Height at which the upper garment ends.
        lower: The garment on the legs.
        lower_kind: trousers, shorts, or skirt.
        lower_hem: Height at which the lower garment ends.
        shoes: Colour of the shoes.
        bag: none, backpack, handbag, or messenger.
        bag_colour: Colour of the bag.
        bag_size: Size of the bag, relative to the mean.
        bag_side: The side on which it is carried, 1 for the left and -1 for the right.
    """

    girth: float
    shoulder: float
    hip: float
    leg: float
    head: float
    skin: Colour
    hair: Colour
    hair_style: str
    hat: str
    hat_colour: Colour
    upper: Garment
    sleeve: float
    sleeve_colour: Colour
    hem: float
    lower: Garment
    lower_kind: str
    lower_hem: float
    shoes: Colour
    bag: str
    bag_colour: Colour
    bag_size: float
    bag_side: int


_UPPER_ODDS = {
    "plain": 4.5, "stripes": 1.4, "pinstripes": 0.8, "checks": 1.3, "dots": 0.7, "yoke": 1.2,
    "band": 1.2, "logo": 1.6, "panel": 1.2, "open": 1.8,
}  # fmt: skip
_BAG_ODDS = {"none": 4.0, "backpack": 3.0, "handbag": 1.6, "messenger": 1.6}
_HAIR_ODDS = {"short": 4.0, "bald": 0.5, "bob": 1.4, "long": 1.8, "tail": 1.0, "bun": 0.6}
_HAT_ODDS = {"none": 7.0, "cap": 1.5, "beanie": 0.8, "brim": 0.5}


def _accent(rng: np.random.Generator, base: Colour) -> Colour:
    """Draw a colour that differs from another in brightness, which survives a colour cast."""
    for _ in range(12):
        colour = pick_cloth_colour(rng)
        if abs(sum(colour) - sum(base)) > 150:
            return colour
    return (236, 236, 232) if sum(base) < 380 else (30, 30, 36)


def _upper(rng: np.random.Generator) -> Garment:
    base = pick_cloth_colour(rng)
    return Garment(
        pattern=pick(rng, _UPPER_ODDS),
        base=base,
        accent=_accent(rng, base),
        period=float(rng.uniform(0.04, 0.085)),
        at=float(rng.uniform(0.22, 0.6)),
    )


def _lower(rng: np.random.Generator, kind: str, upper: Garment) -> Garment:
    if kind == "skirt" and rng.random() < 0.4:
        return upper  # a dress
    jeans = kind == "trousers" and rng.random() < 0.45
    base = pick_colour(rng, DENIM) if jeans else pick_cloth_colour(rng)
    odds = {"plain": 3.0, "faded": 1.2, "side": 1.2, "yoke": 0.6}
    if kind == "skirt":
        odds = {"plain": 3.0, "checks": 1.0, "band": 1.0, "dots": 0.5}
    return Garment(
        pattern=pick(rng, odds),
        base=base,
        accent=_accent(rng, base),
        period=float(rng.uniform(0.04, 0.07)),
        at=float(rng.uniform(0.4, 0.8)),
    )


def make_person(rng: np.random.Generator) -> Person:
    """Draw the traits of one identity.

    Args:
        rng: The identity's random stream.
    """
    upper = _upper(rng)
    kind = pick(rng, {"trousers": 6.0, "shorts": 1.6, "skirt": 1.8})
    lower_hem = {"trousers": 0.045, "shorts": rng.uniform(0.24, 0.34), "skirt": 0.0}[kind]
    if kind == "skirt":
        lower_hem = rng.uniform(0.1, 0.36)
    leg = float(rng.uniform(0.455, 0.525))
    coat = upper.pattern in ("plain", "checks", "open") and rng.random() < 0.25
    contrast = upper.pattern in ("plain", "logo", "panel", "band") and rng.random() < 0.3
    return Person(
        girth=float(rng.uniform(0.82, 1.3)),
        shoulder=float(rng.uniform(0.108, 0.142)),
        hip=float(rng.uniform(0.078, 0.105)),
        leg=leg,
        head=float(rng.uniform(0.9, 1.14)),
        skin=pick_colour(rng, SKIN, 6),
        hair=pick_colour(rng, HAIR, 6),
        hair_style=pick(rng, _HAIR_ODDS),
        hat=pick(rng, _HAT_ODDS),
        hat_colour=pick_cloth_colour(rng),
        upper=upper,
        sleeve=(0.06, 0.42, 0.96, 0.96)[int(rng.integers(4))],
        sleeve_colour=upper.accent if contrast else upper.base,
        hem=float(rng.uniform(0.26, 0.36)) if coat else leg - float(rng.uniform(0.0, 0.05)),
        lower=_lower(rng, kind, upper),
        lower_kind=kind,
        lower_hem=float(lower_hem),
        shoes=pick_colour(rng, CLOTH[:6] + CLOTH[13:16] + CLOTH[20:]),
        bag=pick(rng, _BAG_ODDS),
        bag_colour=pick_cloth_colour(rng),
        bag_size=float(rng.uniform(0.75, 1.3)),
        bag_side=1 if rng.random() < 0.5 else -1,
    )


@lru_cache(maxsize=512)
def person_of(seed: int, pid: int) -> Person:
    """The traits of an identity.

    Args:
        seed: The data set's seed.
        pid: The identity, 0 or more.
    """
    return make_person(random_stream(seed, PERSON, pid))
