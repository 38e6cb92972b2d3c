"""Other designs of a Stable Diffusion server, small and complete, to run beside this one on the same machine.

Each is a context manager that gives a function from a request to its picture, safe to call from many threads. All of
them make the picture that this service makes of the same request, so what differs is only how requests share the
engines. Where a choice was open it was made in the peer's favour; each module says what it models.
"""
