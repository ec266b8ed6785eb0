"""The command ``arf``: one file per sub-command."""
