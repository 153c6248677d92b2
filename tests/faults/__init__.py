"""What the fault tests do to a store: kill its writers, cut the power, fill the disk, damage the files.

Everything here works on files and processes from outside. The store itself is used through its public names only, so
that the tests hold for every format of it.
"""
