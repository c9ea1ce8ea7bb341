"""`mmubus console`: a server in a web browser; `mmubus.console.serve` starts it, as an ordinary client.

Nothing that a page shows comes from elsewhere than this process: the scripts are NiceGUI's own, out of its wheel, and
the answers forbid the browser to ask anybody else. All that a page is about is in its address.
"""
