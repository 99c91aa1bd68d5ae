"""Fields of settings: the check that their bounds make, and what is read of them for the reference."""

from __future__ import annotations

from dataclasses import MISSING, dataclass

import pytest

from nemo_fiberpo.fields import Key, changeable, check, keys, setting, summary


@dataclass(frozen=True)
class Inner:
    """Keys of a part."""

    share: float = setting(0.5, at_least=0, at_most=1, may_change=True)
    """A share."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Sizes:
    """Sizes of a thing.

    More about it.
    """

    size: int = setting(at_least=2)
    """How large it is,
    in all."""

    rate: float = setting(1.0, above=0)
    """How fast."""

    kind: str = setting("round", choices=("round", "square", "flat"))
    """Its shape."""

    most: int | None = setting(None, at_least=1)
    """Largest size."""

    on: bool = setting(False)
    """Whether it is on."""

    path: str = setting("x")
    """Where it is."""

    inner: Inner = setting(default_factory=Inner)

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"size": 1}, "size: must be a whole number of at least 2, got 1"),
        ({"size": True}, "size: must be a whole number of at least 2, got True"),
        ({"size": 2.0}, "size: must be a whole number of at least 2, got 2.0"),
        ({"size": None}, "size: must be a whole number of at least 2, got None"),
        ({"rate": 0}, "rate: must be finite and greater than 0, got 0"),
        ({"rate": float("inf")}, "rate: must be finite and greater than 0, got inf"),
        ({"rate": "fast"}, "rate: must be a number, got 'fast'"),
        ({"rate": True}, "rate: must be a number, got True"),
        ({"kind": "sqare"}, "kind: must be one of round, square, flat, got 'sqare'; did you mean 'square'?"),
        ({"most": 0}, "most: must be a whole number of at least 1, got 0"),
        ({"on": 1}, "on: must be true or false, got 1"),
        ({"path": 3}, "path: must be a text, got 3"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(given, message):
    with pytest.raises(ValueError) as error:
        Sizes(**{"size": 2} | given)
    assert str(error.value) == message


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_share_is_refused_on_both_sides(share):
    with pytest.raises(ValueError, match=r"^share: must be from 0 to 1, got "):
        Inner(share)


def test_what_fits_is_taken_and_numbers_become_floats():
    assert Sizes(2, rate=3, most=None) == Sizes(size=2, rate=3.0)
    assert isinstance(Sizes(2, rate=3).rate, float) and Inner(0).share == 0.0 and Inner(1).share == 1.0


def test_the_reference_has_default_bounds_and_meaning_of_every_field():
    assert keys(Sizes) == [
        Key("size", "whole number, at least 2", MISSING, "How large it is,\nin all."),
        Key("rate", "number, greater than 0", 1.0, "How fast."),
        Key("kind", "round, square, flat", "round", "Its shape."),
        Key("most", "whole number, at least 1, or null", None, "Largest size."),
        Key("on", "true or false", False, "Whether it is on."),
        Key("path", "text", "x", "Where it is."),
        Key("inner.share", "number, from 0 to 1", 0.5, "A share.", may_change=True),
    ]
    assert summary(Sizes) == "Sizes of a thing."


def test_keys_that_may_change_are_named_in_full():
    assert changeable(Sizes, "things") == ["things.inner.share"]
