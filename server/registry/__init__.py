"""Adapters, which may be added and removed while the server runs.

version.py       a version's stages, its place in the engine, every move between them: start here
record.py        an adapter: its versions, and which of them should serve

registry.py      changes of what serves: by the folder, by a call, for a new engine
lifecycle.py     verifies, loads, warms and drains versions
residency.py     loads versions into the engine and evicts them
folder.py        the folder of adapters over time         source.py      its content at one moment
mirror.py        an fsspec URL as such a folder           spool.py       verified copies, by content
verifier.py      checks a version in a child process     weights.py     a canary's split of the requests
catalog.py       which version answers which task         events.py      what happened, for logs, metrics, watchers
storage.py       calls that may never return         adapters.py    the registry of a server, from its settings
uploads.py       checkpoints that come over the network, in pieces
"""
