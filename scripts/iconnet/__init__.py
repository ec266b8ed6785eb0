"""IconNet: interface icons of fourteen teams as a second benchmark, large enough to tell methods apart.

The protocol is in docs/iconnet.md; what is shared with EmojiNet is in scripts/benchmarks.

    sources.py   the packages that are downloaded   names.py    what an icon's name says: style, concept, variant
    concepts.py  the written list of concepts       split.py    who is task, test, validation and pool
    texts.py     captions, prompts, templates       build.py    makes the data
    twins.py     measures near-copies               recipe.py    hyper-parameters
    iconnet.yaml  the suite, for `arf evaluate` and `arf ablate`
"""
