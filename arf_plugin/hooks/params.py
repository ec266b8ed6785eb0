"""open_clip_train.params: the trainer's own parser, with our flags in it."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

from arf_plugin.flags import add_arf_flags


class _ParserWithFlags(argparse.ArgumentParser):
    """Adds the ARF group when parsing begins, so that it comes last in --help."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        add_arf_flags(self)
        return super().parse_args(*args, **kwargs)


def argparse_with_flags(original: Any, context: Any) -> SimpleNamespace:
    """The module ``argparse`` as ``params.py`` sees it while it parses."""
    return SimpleNamespace(**{**vars(original), "ArgumentParser": _ParserWithFlags})
