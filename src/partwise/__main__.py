"""``python -m partwise`` is the ``partwise`` command."""

from __future__ import annotations

from partwise.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
