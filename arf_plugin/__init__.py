"""Anchor-based Robust Fine-tuning (ARF) for the open_clip trainer.

Importing this package imports nothing but the standard library's bare minimum:
it is on the path of every Python process in an environment that has the plugin.
"""

__version__ = "0.1.0"
