"""``python -m arf_plugin``: the same as ``arf``."""

import sys

from arf_plugin.cli.main import main

sys.exit(main())
