"""Adapters that come and go while the server runs.

source.py        what lies in the folder of adapters      mirror.py      an fsspec URL as such a folder
watch.py         when to look again                       verifier.py    checks a version, in a process of its own
spool.py         verified copies, by content              version.py     one verified version, and its life's stages
record.py        an adapter and what should serve         weights.py     a canary's split of the requests
residency.py     which versions are in the engine         events.py      what happened, for logs, metrics, watchers
registry.py      takes versions through their life
"""
