"""What frozen encoders computed of training samples, kept on the disk and found by what went in.

    keys.py    digests: the address of an entry
    plan.py    what of a run is kept, and by which encoders; the store as its users see it
    rows.py    the rows of a batch: found ones taken, the others computed one by one and kept
"""
