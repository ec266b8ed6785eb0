"""Anchor building: the stage skeleton and the stages caption, embed, index, retrieve and pack."""
