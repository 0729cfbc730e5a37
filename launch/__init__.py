"""The command line: settings in, processes out. Imports no torch at module level."""
