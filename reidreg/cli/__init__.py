"""The command line: one function per command, each a thin layer over the package.

The door is `main.main`, which only `python -m reidreg` and the console script use. Modules import
what is heavy inside functions, so that `reidreg --help` answers at once.
"""
