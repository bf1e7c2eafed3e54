"""Where do the suite's packages take `UserError` from? Here (it is defined below them all)."""

from connectors.errors import UserError

__all__ = ["UserError"]
