"""A merge checked against its lock, and made again from it.

May import: the host and what stands below. Start reading at `reproduce.reproduce`:
commands      `mergekit-dam verify` and `mergekit-dam reproduce`
verify        is a folder what its lock says?
places        where the models and texts of a lock are now
reproduce     merge again, and compare
compare       what differs, and by how much
"""
