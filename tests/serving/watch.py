"""A reader in a process of its own: prints each answer unlike the one before, until told to stop."""

import sys
from pathlib import Path

from model import queries

import fastcompat as fc
from fastcompat.serving import layout

folder = Path(sys.argv[1])
asked = {m: queries()[m] for m in ("v1", "v2")}
last = ""
with fc.MixedGallery.open(folder) as gallery:
    print("ready", flush=True)
    stop = False
    while not stop:
        stop = (folder.parent / "stop").exists()  # then once more
        scores, found = gallery.search(asked, 9)
        answer = layout.digest(scores.tobytes(), found.tobytes()).hex()
        if answer != last:
            print(answer, flush=True)
        last = answer
