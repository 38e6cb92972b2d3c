from diffuserve_export.command import app

app(prog_name="python -m diffuserve_export")
