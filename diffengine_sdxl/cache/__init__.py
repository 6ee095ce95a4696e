"""What frozen encoders computed of training samples, kept on the disk and found by what went in.

    keys.py    digests: the address of an entry
    plan.py    what of a run is kept, and by which encoders; the store as its users see it
    rows.py    the rows of a batch: found ones taken, the others computed one by one and kept
    samples.py entries of samples: packed, unpacked, put for a batch
    store.py   the store: pending entries, the thread that writes them, what the user is told
    index.py   where each entry lies, in SQLite; only a summary of the shards
    shards.py  safetensors files of entries
    verify.py  a store that compares entries with what would be computed
"""
