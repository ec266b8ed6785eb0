"""EmojiNet: a benchmark of robust fine-tuning for CLIP that two CPU cores can run.

About 1,900 concepts, each drawn by up to eleven design teams, joined on the Unicode code point.
The protocol and its figures are in docs/emojinet.md.

    sources.py   the packages that are downloaded: versions, checksums, licences
    download.py  fetches and unpacks them           join.py     which icon of which vendor shows which concept
    classes.py   the 33 classes and their names     split.py    who is task, test, validation and pool
    texts.py     captions, prompts, templates       draw.py     SVG -> PNG
    twins.py     drawings that are near-copies      write.py    shards and CLIP_benchmark folders
    build.py     all of the above in order, one command
"""
