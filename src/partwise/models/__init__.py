"""Where parts sit in a model family.

Importing this package loads nothing heavy.
"""

from __future__ import annotations
