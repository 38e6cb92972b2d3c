"""diffuserve: Stable Diffusion on Triton, all active requests stepped in one batch.

This package is what runs inside Triton, and the types that the server, the export and the client share.
"""

__version__ = "0.1.0"
