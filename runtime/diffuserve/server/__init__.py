"""Starting and stopping Triton: what `make serve`, the tests and the benches use. Standard library only."""

from diffuserve.server.errors import ServerSetupError, ServerStartError
from diffuserve.server.options import ServerOptions
from diffuserve.server.process import TritonServer

__all__ = ["ServerOptions", "ServerSetupError", "ServerStartError", "TritonServer"]
