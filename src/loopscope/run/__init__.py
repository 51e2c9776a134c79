"""The run folder: a training on disk. Written by one process, read by any.

docs/architecture.md says what each file is for, docs/run-format.md what lies in the
folder. Nothing in a run folder is ever unpickled or executed.
"""
