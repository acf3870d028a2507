"""The names of `partwise.serve.http_server`, under the name that the plan had: it goes once nothing imports it, since a standard module is called so."""

from __future__ import annotations

from partwise.serve.http_server import HttpFlags, serve_http, start_in_thread

__all__ = ["HttpFlags", "serve_http", "start_in_thread"]
