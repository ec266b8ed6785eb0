"""Anchor data on its way into training: texts joined to task samples, pair anchors, and their common batch."""
