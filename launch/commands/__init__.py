"""One file a command; `launch.cli` lists them by name and imports each only when it is called."""
