"""Two builds of one image compared: `make image IMAGE=--twice`."""

import json

from deploy.image.engines import Engine

# Runs in an image: prints the digest of every file that its user may read, and where every link leads.
_DIGESTS = """
import hashlib, json, os
found = {}
for top in ("/usr", "/opt", "/etc", "/var"):
    for folder, folders, names in os.walk(top):
        for path in (os.path.join(folder, name) for name in (*folders, *names)):
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path) and os.access(path, os.R_OK):
                found[path] = hashlib.sha256(open(path, "rb").read()).hexdigest()
print(json.dumps(found))
"""


def differing(engine: Engine, first: str, second: str) -> str:
    """The layers that differ, and the files in which; empty if none does. Raises EngineError."""
    layers = engine.layers(first), engine.layers(second)
    wrong = [number for number, pair in enumerate(zip(*layers, strict=False)) if len(set(pair)) > 1]
    if not wrong and len(layers[0]) == len(layers[1]):
        return ""
    digests = [json.loads(engine.python(image, _DIGESTS).splitlines()[-1]) for image in (first, second)]
    files = sorted(
        path for path in digests[0].keys() | digests[1].keys() if digests[0].get(path) != digests[1].get(path)
    )
    named = " ".join(files) or "no readable file's content: owners, modes or dates"
    return f"layers {wrong} of {len(layers[0])} and {len(layers[1])}: {named}"
