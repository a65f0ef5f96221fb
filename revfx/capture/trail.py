"""What runs on fake tensors inside a call that is recorded whole: what is known of the numbers that it takes and gives.

See `revfx.passes.atoms` and `revfx.passes.kinks`.
"""

from __future__ import annotations

from typing import Any

from revfx.eager.trees import address, tensors
from revfx.passes.atoms import CERTAIN, Levels, may_be_continuous
from revfx.passes.kinks import Inside, Made, look_inside, made_by, name_alone


class Trail:
    """The operations of the latest call, with the levels of atoms of all fake tensors, which are known by their ids.

    `own` are those of parameters whose numbers have no pattern.
    """

    def __init__(self) -> None:
        self.levels, self.made, self.own = Levels(), list[Made](), set[int]()
        self.alive: list[Any] = []  # else another could get an id

    def begin(self) -> None:
        """Begin with another call."""
        self.made = []

    def follow(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note that the operation `name` gave `out`."""
        read = [(id(t), t, self.levels.of.get(id(t), CERTAIN)) for t in tensors((args, kwargs))]
        for i, t in enumerate(tensors(out)):
            self.levels.note(id(t), name, [level for _, _, level in read], args, kwargs, address)
            level = self.levels.of[id(t)] = self.levels.of[id(t)] if may_be_continuous(t) else CERTAIN
            self.made.append(made_by(id(t), name_alone(name, i), level, read, (args, kwargs), t))
            self.alive += (t, args, kwargs)

    def follow_function(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        """Note that an autograd function gave `out`: its backward may tell numbers apart."""
        read = [id(t) for t in tensors((args, kwargs))]
        levels = tuple(self.levels.of.get(k, CERTAIN) for k in read)
        for t in tensors(out):
            level = self.levels.of.get(id(t), CERTAIN)
            self.made.append(Made(id(t), name, level, tuple(read), levels, inside=Inside()))
            self.alive += (t, args, kwargs)

    def numbers(self, given: list[Any], out: Any) -> dict[str, Any]:
        """Return what the call that took the leaves `given` and gave `out` does with numbers, for its node's `meta`."""
        made = [id(t) for t in tensors(out)]
        return {
            "atoms": max((self.levels.of.get(k, CERTAIN) for k in made), default=CERTAIN),
            "inside": look_inside(self.made, self.own, [id(x) for x in given], made),
        }
