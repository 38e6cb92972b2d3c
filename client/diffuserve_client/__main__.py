"""`python -m diffuserve_client` is the `diffuserve` command."""

from diffuserve_client._command import app

app(prog_name="diffuserve")
