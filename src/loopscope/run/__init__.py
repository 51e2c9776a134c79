"""The run folder: a training on disk. Written by one process, read by any.

    files.py        writing a file so that it is there whole, or not at all
    folder.py       what lies where; the manifest
    lock.py         one writer
    plain.py        Python values as JSON and arrays
    checkpoint.py   everything the next step reads, in two files
    keep.py         which checkpoints stay
    journal.py      SQLite: every step's scalars, epochs, events
    identity.py     what bits depend on, and what has changed
    memory.py       the attributes of stateful callbacks
    writer.py       the thread that writes
    recorder.py     listens to a loop and decides what is written
    resume.py       from the folder back into a loop

Nothing in a run folder is ever unpickled or executed.
"""
