"""The only folder that names an upstream symbol: switches ARF on in open_clip's trainer, and off again."""

from arf_plugin.hooks.activation import deactivate, parse_args

__all__ = ["deactivate", "parse_args"]
