"""An HTTP server with the API of OpenAI: requests of many clients share the batch of one engine. Extra ``server``."""

from typing import TYPE_CHECKING

from mcsd.lazy import lazy_attributes
from mcsd.server.options import ListenOptions, ServerOptions

if TYPE_CHECKING:
    from mcsd.server.app import create_app
    from mcsd.server.listen import serve

__all__ = ["ListenOptions", "ServerOptions", "create_app", "serve"]

__getattr__ = lazy_attributes(__name__, {"create_app": "mcsd.server.app", "serve": "mcsd.server.listen"})
