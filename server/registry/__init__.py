"""Adapters that come and go while the server runs.

source.py        what lies in the folder of adapters      mirror.py      an fsspec URL as such a folder
folder.py        that folder over time                    watch.py       when to look again
verifier.py      checks a version, in a separate process  spool.py       verified copies, by content
version.py       one verified version, and its stages     versions.py    versions brought up and taken away
residency.py     which versions are in the engine         weights.py     a canary's split of the requests
record.py        an adapter and what should serve         events.py      what happened, for logs, metrics, watchers
registry.py      what serves, and what changes it         parts.py       what a registry is put together from
"""
