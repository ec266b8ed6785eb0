"""The engine applies all hooks or none, and undoes exactly what it applied."""

from __future__ import annotations

import sys
import types

import pytest

from arf_plugin.errors import IncompatibleUpstreamError
from arf_plugin.hooks.engine import Engine, Hook


def shout(original, context):
    """A wrapper, as hooks name them."""
    return lambda: original().upper() + context


@pytest.fixture
def upstream(monkeypatch):
    """A package of two modules; the second from-imports a function of the first."""
    defining, importing = types.ModuleType("upstream_defining"), types.ModuleType("upstream_importing")
    defining.greet = importing.greet = lambda: "hello"
    defining.leave = lambda: "bye"
    monkeypatch.setitem(sys.modules, "upstream_defining", defining)
    monkeypatch.setitem(sys.modules, "upstream_importing", importing)
    return defining, importing


def hook(target, versions=">=1,<2", origin=None):
    return Hook("a-hook", target, origin, versions, f"{__name__}:shout", "run", "says it loudly")


def test_apply_wraps_and_undo_restores_identity(upstream):
    defining, importing = upstream
    before = importing.greet, defining.leave
    engine = Engine("upstream")
    engine.apply(
        [hook("upstream_importing:greet", origin="upstream_defining:greet"), hook("upstream_defining:leave")],
        "1.5",
        "!",
    )
    assert (importing.greet(), defining.leave()) == ("HELLO!", "BYE!")
    assert engine.applied == ["a-hook", "a-hook"]
    engine.undo()
    assert importing.greet is before[0] and defining.leave is before[1]
    assert engine.applied == []


def test_a_built_in_is_shadowed_in_one_module_alone(upstream):
    defining, importing = upstream
    engine = Engine("upstream")
    shadow = hook("upstream_defining:input", ">=1", "builtins:input")
    engine.apply([shadow], "1.5", "!")
    assert "input" in vars(defining) and "input" not in vars(importing)
    assert "upstream's own builtins:input" in engine.check(shadow, "1.5")  # somebody else has shadowed it
    engine.undo()
    assert "input" not in vars(defining) and engine.check(shadow, "1.5") is None


def test_undo_keeps_what_was_applied_before(upstream):
    defining, importing = upstream
    engine = Engine("upstream")
    engine.apply([hook("upstream_importing:greet")], "1.5", "!")
    engine.apply([hook("upstream_defining:leave")], "1.5", "?")
    engine.undo(keep=1)
    assert (importing.greet(), defining.leave()) == ("HELLO!", "bye")


@pytest.mark.parametrize(
    ("bad", "version", "found"),
    [
        (hook("upstream_defining:leave", versions=">=2"), "1.5", "upstream 1.5 is installed"),
        (hook("upstream_defining:missing"), "1.5", "module upstream_defining has no 'missing'"),
        (hook("upstream_nowhere:leave"), "1.5", "module upstream_nowhere cannot be imported"),
        (
            hook("upstream_importing:greet", origin="upstream_defining:leave"),
            "1.5",
            "upstream's own upstream_defining:leave",
        ),
    ],
)
def test_a_hook_that_does_not_fit_undoes_the_others_and_says_why(upstream, bad, version, found):
    _, importing = upstream
    before = importing.greet
    engine = Engine("upstream")
    with pytest.raises(IncompatibleUpstreamError) as caught:
        engine.apply([hook("upstream_importing:greet"), bad], version, "!")
    assert found in str(caught.value) and "arf doctor" in str(caught.value)
    assert importing.greet is before and engine.applied == []
    assert found in engine.check(bad, version)


def test_modules_can_be_given_in_place_of_imported_ones(upstream):
    main = types.ModuleType("__main__")
    main.greet = upstream[0].greet
    engine = Engine("upstream")
    engine.apply([hook("upstream_importing:greet")], "1.5", "!", {"upstream_importing": main})
    assert main.greet() == "HELLO!" and upstream[1].greet() == "hello"
