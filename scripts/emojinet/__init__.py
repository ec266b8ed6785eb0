"""EmojiNet: a benchmark of robust fine-tuning for CLIP that two CPU cores can run.

About 860 concepts, each drawn by up to eleven design teams, joined on the Unicode code point.
The protocol and its figures are in docs/emojinet.md. What it shares with IconNet is in scripts/benchmarks.

Data, by build.py:

    sources.py   the packages that are downloaded   join.py     which icon of which vendor shows which concept
    classes.py   the 33 classes and their names     split.py    who is task, test, validation and pool
    texts.py     captions, prompts, templates       twins.py    measures near-copies
    attribution.py  who drew and wrote the packages

The comparison, by quickstart.py:

    recipe.py     all hyper-parameters              report.py   table, JSON, picture
    vit.py        a vision transformer instead
"""
