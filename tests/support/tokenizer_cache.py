"""Makes each of open_clip's tokenizers once in a process, which takes longer than a step of a tiny model.

To be imported for its effect, by the tests' own process and by the one that `support.forks` forks.
"""

from __future__ import annotations

import functools
from typing import Any

from open_clip.tokenizer import SimpleTokenizer

_make = SimpleTokenizer.__init__


@functools.cache
def _attributes(**given: Any) -> dict[str, Any]:
    made = object.__new__(SimpleTokenizer)
    _make(made, **given)
    return vars(made)


def _copy(self: SimpleTokenizer, **given: Any) -> None:
    vars(self).update(_attributes(**given))


SimpleTokenizer.__init__ = _copy
for length in (16, 32, 77):  # of the tests' models
    SimpleTokenizer(context_length=length)
