"""Draw a person onto an image: legs, torso, arms, bag, head, hair and hat."""

from __future__ import annotations

import math

from PIL import Image

from reidreg.synthesis.colours import tone
from reidreg.synthesis.painting import Painter
from reidreg.synthesis.people import SHOULDER_HEIGHT, Garment, Person
from reidreg.synthesis.poses import Pose, arm_joints, leg_joints
from reidreg.synthesis.projection import Joint, Ring, View


class Figure:
    """One person in one pose, drawn with the far parts first.

    Args:
        image: Drawn on in place.
        person: The traits of the identity.
        pose: How they stand or walk.
        view: The projection of the body.
        light: Side light, -1 (from the left) to 1.
    """

    def __init__(
        self, image: Image.Image, person: Person, pose: Pose, view: View, light: float
    ) -> None:
        self.painter = Painter(image, view, light)
        self.draw = self.painter.draw
        self.person = person
        self.pose = pose
        self.view = view
        self.light = light

    def paint(self) -> None:
        """Draw the person and their shadow on the ground."""
        view, person = self.view, self.person
        front = math.cos(view.yaw) > 0
        sides = sorted((-1, 1), key=lambda side: view.depth(side, 0.0))
        self._shadow()
        if person.bag == "backpack" and front:
            self._backpack()
        self._arm(sides[0])
        for side in sides:
            self._leg(side)
        self._torso()
        if person.bag == "backpack":
            self._straps() if front else self._backpack()
        self._head()
        self._arm(sides[1])

    def _shadow(self) -> None:
        view = self.view
        x, y = view.centre - view.roll * view.unit / 2, view.foot
        wide, tall = 0.17 * view.unit, (0.012 + 0.1 * math.sin(view.pitch)) * view.unit
        x += self.light * wide
        self.draw.ellipse((x - wide, y - tall, x + wide, y + tall), fill=(10, 10, 16, 90))

    def _leg(self, side: int) -> None:
        person, lower = self.person, self.person.lower
        hip, knee, ankle = leg_joints(person, self.pose, side)
        thick = person.girth * 0.056
        far = 0.82 if self.view.depth(side, 0.0) < 0 else 1.0
        toe = (ankle[0] + 0.012 * side, max(0.012, ankle[1] - 0.022), ankle[2] + 0.075)
        heel = (ankle[0], max(0.014, ankle[1] - 0.02), ankle[2] - 0.015)
        self.painter.limb(heel, toe, 0.026, 0.021, tone(person.shoes, far))
        trousers = person.lower_kind == "trousers"
        thigh = person.skin if person.lower_kind == "skirt" else lower.base
        shin = lower.base if trousers else person.skin
        if trousers and lower.pattern == "yoke":
            shin = lower.accent
        rest = thick * 0.56 if trousers else thick * 0.5
        self.painter.limb(knee, ankle, thick * 0.74, rest, tone(shin, far))
        self.painter.limb(hip, knee, thick * 1.12, thick * 0.8, tone(thigh, far))
        if lower.pattern == "faded" and trousers:
            self.painter.limb(hip, knee, thick * 0.5, thick * 0.3, tone(lower.base, 1.35 * far))
        if lower.pattern == "side" and person.lower_kind != "skirt":
            out = side * thick * 0.7
            a, b, c = ((x + out, y, z) for x, y, z in (hip, knee, ankle))
            self.painter.limb(a, b, 0.011, 0.011, lower.accent)
            if trousers:
                self.painter.limb(b, c, 0.011, 0.011, lower.accent)

    def _torso(self) -> None:
        person, lean = self.person, self.pose.lean
        body = person.girth
        hip: Ring = (person.leg, person.hip * body**0.5, 0.062 * body, 0.0)
        if person.lower_kind == "skirt":
            flare = 1.25 + 0.9 * (person.leg - person.lower_hem)
            hem: Ring = (person.lower_hem, hip[1] * flare, hip[2] * flare * 1.2, 0.0)
            waist: Ring = (person.leg + 0.08, hip[1] * 0.9, hip[2] * 0.95, 0.0)
            self.painter.cloth((waist, hip, hem), person.lower)
        else:
            block = Garment("plain", person.lower.base, person.lower.base, 0.05, 0.5)
            low: Ring = (person.leg - 0.05, hip[1] * 0.98, hip[2], 0.0)
            self.painter.cloth(((person.leg + 0.06, hip[1], hip[2], 0.0), hip, low), block)
        loose = 1.06 if person.hem > person.leg - 0.06 else 1.25
        shoulder = person.shoulder
        rings: list[Ring] = [
            (SHOULDER_HEIGHT + 0.03, shoulder * 0.45, 0.04, lean),
            (SHOULDER_HEIGHT + 0.004, shoulder * 0.97, 0.055 * body, lean),
            (SHOULDER_HEIGHT - 0.09, shoulder * 0.93, 0.07 * body, lean * 0.7),
            (person.leg + 0.12, person.hip * body * 0.93, 0.065 * body, lean * 0.3),
            (min(person.leg, person.hem + 0.02), hip[1] * loose, hip[2] * loose, 0.0),
        ]
        if person.hem < person.leg - 0.02:
            rings.append((person.hem, hip[1] * loose * 1.08, hip[2] * loose * 1.15, 0.0))
        self.painter.cloth(rings, person.upper)

    def _arm(self, side: int) -> None:
        person = self.person
        shoulder, elbow, hand = arm_joints(person, self.pose, side)
        thick = 0.037 * person.girth**0.6
        far = 0.8 if self.view.depth(side, 0.0) < 0 else 0.95
        near = self.view.depth(side, 0.0) >= 0
        carries = person.bag in ("handbag", "messenger") and side == person.bag_side
        if carries and not near:
            self._side_bag(hand, far)
        skin, cloth = tone(person.skin, far), tone(person.sleeve_colour, far)
        full = person.sleeve > 0.9
        self.painter.limb(elbow, hand, thick * 0.8, thick * 0.66, cloth if full else skin)
        self.painter.limb(hand, (hand[0], hand[1] - 0.012, hand[2]), 0.022, 0.018, skin)
        upper = cloth if person.sleeve > 0.4 else skin
        self.painter.limb(shoulder, elbow, thick, thick * 0.82, upper)
        if person.upper.pattern in ("stripes", "checks") and person.sleeve > 0.4:
            self._bands(shoulder, elbow, thick)
            if full:
                self._bands(elbow, hand, thick * 0.8)
        if carries and near:
            self._side_bag(hand, far)

    def _bands(self, a: Joint, b: Joint, thick: float) -> None:
        """Stripes across a sleeve."""
        (ax, ay), (bx, by) = self.view.point(*a), self.view.point(*b)
        wide = thick * self.view.scale(a[1]) * 0.92
        step = max(4.0, self.person.upper.period * self.view.unit)
        count = int(abs(by - ay) / step)
        for k in range(count):
            t = (k + 0.5) / max(1, count)
            x, y = ax + (bx - ax) * t, ay + (by - ay) * t
            fill = tone(self.person.upper.accent, 0.92)
            self.draw.rectangle((x - wide, y, x + wide, y + step * 0.4), fill=fill)

    def _side_bag(self, hand: Joint, far: float) -> None:
        person = self.person
        colour = tone(person.bag_colour, far)
        size = 0.12 * person.bag_size
        side = person.bag_side
        if person.bag == "handbag":
            grip = self.view.point(*hand)
            centre = (hand[0] + side * 0.012, hand[1] - 0.055 - size / 2, hand[2])
            middle = self.view.point(centre[0], centre[1] + size / 2, centre[2])
            self.draw.line((*grip, *middle), fill=tone(colour, 0.7), width=4)
            self.painter.box(centre, (0.05, size, size * 1.25), colour)
            return
        centre = (side * (person.hip + 0.05), person.leg + 0.02, -0.01)
        over = self.view.point(-side * person.shoulder * 0.5, SHOULDER_HEIGHT + 0.015, 0.0)
        self.draw.line((*over, *self.view.point(*centre)), fill=tone(colour, 0.8), width=6)
        self.painter.box(centre, (0.055, size * 0.95, size * 1.4), colour)

    def _backpack(self) -> None:
        size = self.person.bag_size
        tall, deep = 0.235 * size, 0.1 * size
        centre = (0.0, SHOULDER_HEIGHT - 0.01 - tall / 2, -0.055 * self.person.girth - deep / 2)
        self.painter.box(centre, (0.19 * size, tall, deep), self.person.bag_colour)

    def _straps(self) -> None:
        person = self.person
        depth = 0.06 * person.girth
        for side in (-1, 1):
            x = side * person.shoulder * 0.55
            top = self.view.point(x, SHOULDER_HEIGHT + 0.02, depth * 0.3)
            low = self.view.point(x * 1.2, SHOULDER_HEIGHT - 0.19, depth)
            self.draw.line((*top, *low), fill=tone(person.bag_colour, 0.9), width=8)

    def _head(self) -> None:
        person, view = self.person, self.view
        yaw = view.yaw + self.pose.turn
        tall = 0.068 * person.head
        base = (0.0, 0.995 - tall, self.pose.lean + 0.012)
        self.painter.limb((0.0, 0.82, self.pose.lean), base, 0.032, 0.03, tone(person.skin, 0.85))
        x, y = view.point(*base)
        unit = view.scale(0.93)
        rx = 0.054 * person.head * unit * (1.0 + 0.12 * abs(math.sin(yaw)))
        ry = tall * unit
        hair = tone(person.skin, 0.95) if person.hair_style == "bald" else person.hair
        front = math.cos(yaw) > -0.1
        if front:
            self._hair(x, y, rx, ry, yaw)
        self.painter.ellipse(x, y, rx, ry, hair)
        reach = max(0.0, (math.cos(yaw) + 0.5) / 1.5) ** 0.5
        if reach > 0.0:
            face = rx * (0.35 + 0.5 * reach)
            slide = math.sin(yaw) * (rx - face) * 1.02
            self.painter.ellipse(x + slide, y + ry * 0.16, face, ry * 0.82, person.skin)
            chin = tone(person.skin, 0.8)
            self.painter.ellipse(x + slide, y + ry * 0.95, face * 0.5, ry * 0.1, chin)
        if not front:
            self._hair(x, y, rx, ry, yaw)
        self._hat(x, y, rx, ry, yaw)

    def _hair(self, x: float, y: float, rx: float, ry: float, yaw: float) -> None:
        """Hair that hangs, or is tied, behind the head."""
        style, colour = self.person.hair_style, self.person.hair
        back = x - math.sin(yaw) * rx * 0.5
        if style in ("long", "bob"):
            fall = 2.5 if style == "long" else 1.15
            self.draw.rounded_rectangle(
                (back - rx * 1.08, y - ry * 0.6, back + rx * 1.08, y + ry * fall), rx * 0.9, colour
            )
        elif style == "tail":
            tail = x - math.sin(yaw) * rx * 1.15
            self.draw.rounded_rectangle(
                (tail - rx * 0.38, y - ry * 0.3, tail + rx * 0.38, y + ry * 2.0), rx * 0.3, colour
            )
        elif style == "bun":
            knot = x - math.sin(yaw) * rx * 0.9
            self.painter.ellipse(knot, y - ry * 0.95, rx * 0.5, ry * 0.4, colour)

    def _hat(self, x: float, y: float, rx: float, ry: float, yaw: float) -> None:
        hat, colour = self.person.hat, self.person.hat_colour
        if hat == "none":
            return
        top, rim = y - ry * 1.12, y - ry * 0.25
        box = (x - rx * 1.1, top, x + rx * 1.1, 2 * rim - top)
        self.draw.chord(box, 180, 360, fill=colour)
        dark = tone(colour, 0.75)
        if hat == "beanie":
            self.draw.rectangle((x - rx * 1.08, rim - ry * 0.2, x + rx * 1.08, rim), fill=dark)
        elif hat == "brim":
            self.draw.ellipse((x - rx * 1.8, rim - 4, x + rx * 1.8, rim + 5), fill=dark)
        elif math.cos(yaw) > -0.4:
            tip = x + math.sin(yaw) * rx * 0.9
            self.draw.ellipse((tip - rx * 0.95, rim - 3, tip + rx * 0.95, rim + 5), fill=dark)
