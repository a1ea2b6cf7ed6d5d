"""What the commands do, free of argument parsing; `cli.py` calls them.

`shields` reads and writes small files and imports neither torch nor megatron-core; `jobs` is the rest.
"""
