"""Checkpoints of adapters.

format.py     format 1: what a folder holds, the manifest, the tensors' names and shapes
write.py      writing, completely or not at all
read.py       reading and verifying untrusted files
untrusted.py  opening untrusted files, and strict JSON
convert.py    converting other trainers' checkpoints to format 1
publish.py    copying a checkpoint into a server's adapters folder
"""
