"""The command line: arguments, progress and printing, one file a command.

Knows every room. Knows nothing that another program would need. Only `__main__` and the installed command import it.
"""
